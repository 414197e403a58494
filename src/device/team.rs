//! A rank's compute threads as a team: whoever has work posts it and does it too, and the others help. A helper waits
//! for the next piece awake for a moment, since the next op mostly follows at once and waking a thread costs more than
//! many an op. What is computed and how it is cut are the callers' affair.

use std::any::Any;
use std::cell::Cell;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard};
use std::thread::{self, JoinHandle, Thread};
use std::time::{Duration, Instant};

/// How long a helper stays awake for the next piece of work.
const AWAKE: Duration = Duration::from_millis(1);

/// The caller's thread and `size - 1` helpers.
pub(super) struct Team {
    shared: Arc<Shared>,
    helpers: Vec<JoinHandle<()>>,
}

#[derive(Default)]
struct Shared {
    jobs: Mutex<Jobs>,
    wake: Condvar,
    posted: Posted,
}

/// Counts posted jobs, in a cache line of its own: helpers that are awake look at it all the time.
#[derive(Default)]
#[repr(align(128))]
struct Posted(AtomicUsize);

#[derive(Default)]
struct Jobs {
    open: Vec<JobRef>,
    sleeping: usize,
    closed: bool,
}

/// Work that is being shared; lives on the stack of the thread that posted it.
struct Job<'a> {
    work: &'a (dyn Fn(usize) + Sync),
    tasks: usize,
    next: AtomicUsize,
    helpers: AtomicUsize,
    panic: Mutex<Option<Box<dyn Any + Send>>>,
    owner: Thread,
}

#[derive(Clone, Copy, PartialEq)]
struct JobRef(*const Job<'static>);
// SAFETY: a job is shared between threads by design, and is there as long as it is among the open ones or has helpers.
unsafe impl Send for JobRef {}

thread_local! {
    static HELPER: Cell<bool> = const { Cell::new(false) };
}

/// Whether this thread is a helper; what it is given it does alone.
pub(super) fn is_helper() -> bool {
    HELPER.get()
}

impl Team {
    pub fn new(size: usize) -> Self {
        let shared = Arc::new(Shared::default());
        let helper = |i| {
            let shared = shared.clone();
            let named = thread::Builder::new().name(format!("compute-{i}"));
            named.spawn(move || shared.help()).ok()
        };
        // A system that grants fewer threads gets fewer helpers.
        let helpers = (1..size).map_while(helper).collect();
        Team { shared, helpers }
    }

    pub fn size(&self) -> usize {
        self.helpers.len() + 1
    }

    /// Runs `work(0..tasks)` on this thread and on whoever of the team is free. A panic comes out of here.
    pub fn run(&self, tasks: usize, work: &(dyn Fn(usize) + Sync)) {
        let job = Job {
            work,
            tasks,
            next: AtomicUsize::new(0),
            helpers: AtomicUsize::new(0),
            panic: Mutex::default(),
            owner: thread::current(),
        };
        // The lifetime is taken away; `Shared::close` returns only when no helper knows the job any more.
        let job_ref = JobRef((&raw const job).cast());
        self.shared.open(job_ref, tasks - 1);
        job.take_part();
        self.shared.close(job_ref, &job);
        let panic = job.panic.lock().unwrap_or_else(|e| e.into_inner()).take();
        if let Some(panic) = panic {
            resume_unwind(panic);
        }
    }
}

impl Drop for Team {
    fn drop(&mut self) {
        self.shared.lock().closed = true;
        self.shared.posted.0.fetch_add(1, Ordering::Release);
        self.shared.wake.notify_all();
        for helper in self.helpers.drain(..) {
            // Panics of the work have gone to who posted it.
            let _ = helper.join();
        }
    }
}

impl Job<'_> {
    /// Does tasks until none is left. After a panic nobody begins another.
    fn take_part(&self) {
        let done = catch_unwind(AssertUnwindSafe(|| {
            loop {
                let task = self.next.fetch_add(1, Ordering::Relaxed);
                if task >= self.tasks {
                    break;
                }
                (self.work)(task);
            }
        }));
        if let Err(panic) = done {
            self.next.store(self.tasks, Ordering::Relaxed);
            self.panic.lock().unwrap_or_else(|e| e.into_inner()).get_or_insert(panic);
        }
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, Jobs> {
        self.jobs.lock().unwrap_or_else(|e| e.into_inner())
    }

    fn open(&self, job: JobRef, useful: usize) {
        let mut jobs = self.lock();
        jobs.open.push(job);
        self.posted.0.fetch_add(1, Ordering::Release);
        let asleep = jobs.sleeping.min(useful);
        drop(jobs);
        (0..asleep).for_each(|_| self.wake.notify_one());
    }

    /// Withdraws a job and waits for its helpers.
    fn close(&self, job_ref: JobRef, job: &Job) {
        self.lock().open.retain(|&other| other != job_ref);
        let start = Instant::now();
        while job.helpers.load(Ordering::Acquire) > 0 {
            // The last helper unparks the owner.
            if start.elapsed() < AWAKE { pause() } else { thread::park() }
        }
    }

    fn help(&self) {
        HELPER.set(true);
        while let Some(JobRef(job)) = self.next_job() {
            // SAFETY: `next_job` has counted this thread among the job's helpers, and its owner waits for those; after
            // the count has gone down the job is not touched again.
            unsafe {
                (*job).take_part();
                let owner = (*job).owner.clone();
                (*job).helpers.fetch_sub(1, Ordering::Release);
                owner.unpark();
            }
        }
    }

    /// A job with tasks left, this thread counted as its helper; none when the team is dissolved.
    fn next_job(&self) -> Option<JobRef> {
        let mut jobs = self.lock();
        loop {
            if jobs.closed {
                return None;
            }
            for &JobRef(job) in &jobs.open {
                // SAFETY: an open job is there, since its owner closes it under this lock first.
                let job_there = unsafe { &*job };
                if job_there.next.load(Ordering::Relaxed) < job_there.tasks {
                    job_there.helpers.fetch_add(1, Ordering::Relaxed);
                    return Some(JobRef(job));
                }
            }
            let seen = self.posted.0.load(Ordering::Acquire);
            drop(jobs);
            let start = Instant::now();
            while self.posted.0.load(Ordering::Acquire) == seen && start.elapsed() < AWAKE {
                pause();
            }
            jobs = self.lock();
            if self.posted.0.load(Ordering::Acquire) == seen && !jobs.closed {
                jobs.sleeping += 1;
                jobs = self.wake.wait(jobs).unwrap_or_else(|e| e.into_inner());
                jobs.sleeping -= 1;
            }
        }
    }
}

/// A moment's rest, on the core: whoever gives it away gets it back late.
fn pause() {
    const TURNS: usize = 16;
    (0..TURNS).for_each(|_| std::hint::spin_loop());
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_task_is_done_once_also_from_several_threads_and_from_inside() {
        let team = Team::new(3);
        thread::scope(|scope| {
            for _ in 0..3 {
                scope.spawn(|| {
                    for tasks in [1, 2, 7, 100] {
                        let done: Vec<AtomicUsize> = (0..tasks * 2).map(|_| AtomicUsize::new(0)).collect();
                        team.run(tasks, &|i| {
                            team.run(2, &|j| {
                                done[2 * i + j].fetch_add(1, Ordering::Relaxed);
                            });
                        });
                        assert!(done.iter().all(|count| count.load(Ordering::Relaxed) == 1));
                    }
                });
            }
        });
    }

    #[test]
    fn a_panic_reaches_who_posted_the_work_and_the_team_goes_on() {
        let team = Team::new(2);
        let failed = catch_unwind(AssertUnwindSafe(|| team.run(50, &|i| assert!(i != 20, "task 20"))));
        assert!(failed.unwrap_err().downcast_ref::<&str>().is_some_and(|text| text.contains("task 20")));
        let count = AtomicUsize::new(0);
        team.run(50, &|_| {
            count.fetch_add(1, Ordering::Relaxed);
        });
        assert_eq!(count.into_inner(), 50);
    }

    #[test]
    fn helpers_that_sleep_are_woken() {
        let team = Team::new(2);
        thread::sleep(AWAKE * 20);
        // Two tasks that end only when both have begun.
        let begun = AtomicUsize::new(0);
        team.run(2, &|_| {
            begun.fetch_add(1, Ordering::SeqCst);
            while begun.load(Ordering::SeqCst) < 2 {
                thread::yield_now();
            }
        });
    }
}
