//! What ranks and their launcher ask of the operating system: whether a process lives, signals, inherited descriptors,
//! cores, a clock that all processes share. Linux first; elsewhere the same calls do what they can and say so here.

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::process::CommandExt;
use std::process::Command;
use std::sync::atomic::AtomicU32;
use std::time::Duration;

/// A process, told apart from a later one with the same number by when it started.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Process {
    pub pid: u32,
    /// In the kernel's ticks since boot; 0 where the system does not say.
    pub started: u64,
}

impl Process {
    pub fn this() -> Process {
        let pid = std::process::id();
        Process { pid, started: stat(pid).map_or(0, |(_, started)| started) }
    }

    /// Whether it still runs; a process that ended and was not yet waited for does not.
    pub fn lives(&self) -> bool {
        if cfg!(target_os = "linux") {
            return match stat(self.pid) {
                Some((state, started)) => !matches!(state, 'Z' | 'X') && (self.started == 0 || started == self.started),
                // Without /proc nothing can be said, and a time-out will have to do.
                None => !std::path::Path::new("/proc/self/stat").exists(),
            };
        }
        // SAFETY: signal 0 only asks whether the process exists.
        let answer = unsafe { libc::kill(self.pid as libc::pid_t, 0) };
        answer == 0 || io::Error::last_os_error().raw_os_error() != Some(libc::ESRCH)
    }
}

/// State letter and starting time from /proc (proc(5): fields 3 and 22, counted behind the name, which may hold anything).
fn stat(pid: u32) -> Option<(char, u64)> {
    let text = std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    let mut fields = text.rsplit_once(')')?.1.split_ascii_whitespace();
    let state = fields.next()?.chars().next()?;
    Some((state, fields.nth(18)?.parse().ok()?))
}

/// Sends `signal` to every process of the group that `leader` leads; false if there is none left.
pub fn signal_group(leader: u32, signal: i32) -> bool {
    // SAFETY: kill has no memory effects; a negative number names a group.
    unsafe { libc::kill(-(leader as libc::pid_t), signal) == 0 }
}

/// Whether this process ignores `signal`, as it may have been started to.
pub fn is_ignored(signal: i32) -> bool {
    // SAFETY: all zeros is a valid value of the structure, which is all that is written.
    unsafe {
        let mut action: libc::sigaction = std::mem::zeroed();
        libc::sigaction(signal, std::ptr::null(), &mut action) == 0 && action.sa_sigaction == libc::SIG_IGN
    }
}

/// Gives `signal` back what it does by default.
pub fn obey(signal: i32) {
    // SAFETY: no memory effects; no handler is installed.
    unsafe { libc::signal(signal, libc::SIG_DFL) };
}

#[cfg(test)]
pub fn ignore(signal: i32) {
    // SAFETY: as above.
    unsafe { libc::signal(signal, libc::SIG_IGN) };
}

/// Runs `handle` at every `signal`. It must do nothing but what is safe in a signal's handler (signal-safety(7)).
pub fn at_signal(signal: i32, handle: impl Fn() + Send + Sync + 'static) -> io::Result<()> {
    // SAFETY: the caller's promise.
    unsafe { signal_hook::low_level::register(signal, handle) }.map(drop)
}

/// Milliseconds on a clock that all processes of this machine share and that never jumps back.
pub fn milliseconds() -> u64 {
    let mut now = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: writes the timespec it is given; this clock exists everywhere.
    unsafe { libc::clock_gettime(libc::CLOCK_MONOTONIC, &mut now) };
    now.tv_sec as u64 * 1000 + now.tv_nsec as u64 / 1_000_000
}

/// Sleeps until somebody calls [`wake`] on `word`, or `longest` has passed, or for no reason; not at all if the word
/// is no longer `value`. Works between processes that map the same file.
#[cfg(target_os = "linux")]
pub fn sleep_on(word: &AtomicU32, value: u32, longest: Duration) {
    let time = libc::timespec { tv_sec: longest.as_secs() as _, tv_nsec: longest.subsec_nanos() as _ };
    // SAFETY: the kernel only compares the word and reads the timespec; both outlive the call.
    unsafe { libc::syscall(libc::SYS_futex, word.as_ptr(), libc::FUTEX_WAIT, value, &raw const time) };
}

/// Ends every [`sleep_on`] on `word`, in all processes.
#[cfg(target_os = "linux")]
pub fn wake(word: &AtomicU32) {
    // SAFETY: the word is only an address here.
    unsafe { libc::syscall(libc::SYS_futex, word.as_ptr(), libc::FUTEX_WAKE, i32::MAX) };
}

/// Without futexes between processes: short naps, which need nobody to end them.
#[cfg(not(target_os = "linux"))]
pub fn sleep_on(_word: &AtomicU32, _value: u32, longest: Duration) {
    std::thread::sleep(longest.min(Duration::from_micros(200)));
}

#[cfg(not(target_os = "linux"))]
pub fn wake(_word: &AtomicU32) {}

/// The user this process acts as.
pub fn user_id() -> u32 {
    // SAFETY: has no arguments and cannot fail.
    unsafe { libc::geteuid() }
}

/// Takes over a descriptor that the launcher left open for this process, and keeps it from going further.
pub fn inherited(descriptor: RawFd) -> io::Result<OwnedFd> {
    // SAFETY: asking for and setting a descriptor's flags is sound for any number; a closed one gives an error.
    let flags = unsafe { libc::fcntl(descriptor, libc::F_GETFD) };
    if descriptor <= 2 || flags < 0 {
        return Err(io::Error::new(io::ErrorKind::InvalidInput, format!("descriptor {descriptor} was not inherited")));
    }
    // SAFETY: as above.
    unsafe { libc::fcntl(descriptor, libc::F_SETFD, flags | libc::FD_CLOEXEC) };
    // SAFETY: it is open, and the launcher made it for this process alone, which takes each one once.
    Ok(unsafe { OwnedFd::from_raw_fd(descriptor) })
}

/// An empty file of memory that no name leads to: memfd on Linux, an unlinked temporary file elsewhere.
pub fn anonymous_file() -> io::Result<File> {
    #[cfg(target_os = "linux")]
    {
        // SAFETY: the name is a C string, and the result is checked and owned by nobody else.
        let fd = unsafe { libc::memfd_create(c"dblaunch-window".as_ptr(), libc::MFD_CLOEXEC) };
        if fd < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: a fresh descriptor of ours.
        Ok(unsafe { File::from_raw_fd(fd) })
    }
    #[cfg(not(target_os = "linux"))]
    {
        let path = std::env::temp_dir().join(format!("dblaunch-window-{}-{}", std::process::id(), milliseconds()));
        let file = File::options().read(true).write(true).create_new(true).open(&path)?;
        std::fs::remove_file(&path)?;
        Ok(file)
    }
}

/// Makes `command` a process group of its own that dies with this process's calling *thread* (even by SIGKILL, on
/// Linux), inherits `descriptors` under their own numbers, and runs on `cores` only, if given.
pub fn prepare(command: &mut Command, descriptors: &[&dyn AsRawFd], cores: Option<&[usize]>) {
    let descriptors: Vec<RawFd> = descriptors.iter().map(|fd| fd.as_raw_fd()).collect();
    let parent = std::process::id() as libc::pid_t;
    let mask = cores.map(core_mask);
    command.process_group(0);
    let before_exec = move || {
        for &descriptor in &descriptors {
            // SAFETY: clears a flag of an open descriptor.
            if unsafe { libc::fcntl(descriptor, libc::F_SETFD, 0) } < 0 {
                return Err(io::Error::last_os_error());
            }
        }
        tie_to(parent)?;
        mask.as_ref().map_or(Ok(()), pin)
    };
    // SAFETY: between fork and exec the closure makes system calls only; it neither allocates nor takes a lock.
    unsafe { command.pre_exec(before_exec) };
}

#[cfg(target_os = "linux")]
fn tie_to(parent: libc::pid_t) -> io::Result<()> {
    // SAFETY: system calls without memory effects.
    let (tied, now) = unsafe { (libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL), libc::getppid()) };
    match (tied, now == parent) {
        (0, true) => Ok(()),
        // The parent ended before the tie was made.
        (0, false) => Err(io::Error::from_raw_os_error(libc::ESRCH)),
        _ => Err(io::Error::last_os_error()),
    }
}

#[cfg(not(target_os = "linux"))]
fn tie_to(_parent: libc::pid_t) -> io::Result<()> {
    Ok(())
}

#[cfg(target_os = "linux")]
fn core_mask(cores: &[usize]) -> libc::cpu_set_t {
    // SAFETY: a cpu_set_t of zeros is the empty set, and CPU_SET is told only numbers inside it.
    unsafe {
        let mut mask: libc::cpu_set_t = std::mem::zeroed();
        cores
            .iter()
            .filter(|&&core| core < libc::CPU_SETSIZE as usize)
            .for_each(|&core| libc::CPU_SET(core, &mut mask));
        mask
    }
}

#[cfg(target_os = "linux")]
fn pin(mask: &libc::cpu_set_t) -> io::Result<()> {
    // SAFETY: reads the mask it is given. A refusal (a core went offline meanwhile) only costs speed.
    unsafe { libc::sched_setaffinity(0, size_of::<libc::cpu_set_t>(), mask) };
    Ok(())
}

#[cfg(not(target_os = "linux"))]
fn core_mask(_cores: &[usize]) {}

#[cfg(not(target_os = "linux"))]
fn pin(_mask: &()) -> io::Result<()> {
    Ok(())
}

/// The machine's cores, whoever may use them.
pub fn online_cores() -> usize {
    // SAFETY: asks for a number.
    unsafe { libc::sysconf(libc::_SC_NPROCESSORS_ONLN) }.max(1) as usize
}

/// The cores this process may run on, in ascending order; empty where the system does not say.
#[cfg(target_os = "linux")]
pub fn allowed_cores() -> Vec<usize> {
    // SAFETY: writes the mask it is given the size of; CPU_ISSET is asked only for numbers inside it.
    unsafe {
        let mut mask: libc::cpu_set_t = std::mem::zeroed();
        if libc::sched_getaffinity(0, size_of::<libc::cpu_set_t>(), &mut mask) != 0 {
            return Vec::new();
        }
        (0..libc::CPU_SETSIZE as usize).filter(|&core| libc::CPU_ISSET(core, &mask)).collect()
    }
}

#[cfg(not(target_os = "linux"))]
pub fn allowed_cores() -> Vec<usize> {
    Vec::new()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn this_process_lives_and_an_ended_one_does_not() {
        assert!(Process::this().lives());
        let mut child = Command::new("true").spawn().unwrap();
        let process = Process { pid: child.id(), started: stat(child.id()).map_or(0, |(_, started)| started) };
        child.wait().unwrap();
        assert!(!process.lives());
    }

    #[test]
    #[cfg(target_os = "linux")]
    fn another_process_under_the_same_number_is_not_this_one() {
        assert!(!Process { started: 1, ..Process::this() }.lives());
    }

    #[test]
    fn a_descriptor_nobody_left_is_an_error() {
        assert!(inherited(1_000_000).is_err());
    }
}
