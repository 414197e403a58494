//! Which rank's failure is the cause, and the one paragraph that says so. Ranks that fail because another one did, or
//! because they were stopped, are consequences.

use std::collections::HashSet;
use std::os::unix::process::ExitStatusExt;
use std::process::ExitStatus;

use super::event::Failure;
use super::group::{Ended, Group, Member};
use super::status;

/// How a generation failed.
pub(super) struct Verdict {
    pub status: u8,
    /// For the user; several lines only if several things are wrong with the request.
    pub message: String,
    /// Whether the rank itself said what went wrong, and that it was no consequence.
    pub reported: bool,
}

impl Verdict {
    /// None if all ranks completed their work.
    pub fn of(group: &Group) -> Option<Verdict> {
        let world_size = group.members.len();
        let mut failed: Vec<Suspect> = group.members.iter().filter_map(Suspect::of).collect();
        let named: HashSet<usize> = failed
            .iter()
            .filter_map(|suspect| suspect.failure.as_ref().and_then(|failure| failure.because_of))
            .collect();
        failed.sort_by_key(|suspect| suspect.innocence(&named));
        let culprit = failed.first()?;
        let refused = match &culprit.failure {
            Some(failure) => failure.refused,
            None => culprit.ended.status.code() == Some(i32::from(status::REFUSED)),
        };
        let message = match &culprit.failure {
            // The request is the same for all ranks, so the rank says nothing.
            Some(failure) if failure.refused => failure.message.clone(),
            _ => culprit.describe(world_size),
        };
        let reported = culprit.failure.as_ref().is_some_and(|failure| failure.because_of.is_none());
        Some(Verdict { status: if refused { status::REFUSED } else { status::FAILED }, message, reported })
    }

    /// A wrong request stays wrong.
    pub fn can_restart(&self) -> bool {
        self.status != status::REFUSED
    }
}

/// A rank that did not end well.
struct Suspect {
    rank: usize,
    ended: Ended,
    failure: Option<Failure>,
    last_words: Option<String>,
}

impl Suspect {
    fn of(member: &Member) -> Option<Suspect> {
        let ended = member.ended?;
        let (failure, last_words) = (member.failure(), member.last_words());
        (!ended.status.success()).then_some(Suspect { rank: member.rank, ended, failure, last_words })
    }

    /// The smaller, the likelier it is the cause. `named`: the ranks that others give as the reason of their failure.
    fn innocence(&self, named: &HashSet<usize>) -> u8 {
        let Ended { status, told } = self.ended;
        let stopped = told && matches!(status.signal(), Some(libc::SIGTERM | libc::SIGKILL));
        match &self.failure {
            Some(failure) if failure.because_of.is_some() => 3,
            Some(_) => u8::from(told),
            None if stopped => 5,
            // The others noticed, and ended, before it did.
            None if !told || named.contains(&self.rank) => 0,
            None if status.signal().is_some() => 2,
            None => 4,
        }
    }

    fn describe(&self, world_size: usize) -> String {
        let who = if world_size > 1 { format!("rank {} of {world_size}", self.rank) } else { "the run".to_string() };
        let end = how(self.ended.status);
        match (&self.failure, &self.last_words) {
            (Some(failure), _) => format!("{who} failed ({end}): {}", failure.message),
            (None, Some(words)) => format!("{who} {end}; its last words: {words}"),
            (None, None) => format!("{who} {end}"),
        }
    }
}

/// `ended with exit status 3`, `was killed by SIGKILL (out of memory?)`.
fn how(ended: ExitStatus) -> String {
    let Some(signal) = ended.signal() else {
        return format!("ended with exit status {}", ended.code().unwrap_or_default());
    };
    let (name, hint) = match signal {
        libc::SIGKILL => ("SIGKILL", " (out of memory?)"),
        libc::SIGSEGV => ("SIGSEGV", " (a defect in this program or a library)"),
        libc::SIGBUS => ("SIGBUS", " (a mapped file was cut short, or memory ran out?)"),
        libc::SIGABRT => ("SIGABRT", " (a defect in this program or a library, or out of memory)"),
        libc::SIGILL => ("SIGILL", " (a processor without the instructions it was built for?)"),
        libc::SIGFPE => ("SIGFPE", ""),
        libc::SIGTERM => ("SIGTERM", ""),
        libc::SIGINT => ("SIGINT", ""),
        libc::SIGHUP => ("SIGHUP", ""),
        libc::SIGXCPU => ("SIGXCPU", " (a limit on processor time)"),
        _ => return format!("was killed by signal {signal}"),
    };
    format!("was killed by {name}{hint}")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn suspect(rank: usize, raw: i32, told: bool, because_of: Option<Option<usize>>) -> Suspect {
        let message = "why".to_string();
        let failure = because_of.map(|because_of| Failure { message, refused: false, because_of });
        Suspect { rank, ended: Ended { status: ExitStatus::from_raw(raw), told }, failure, last_words: None }
    }

    #[test]
    fn the_cause_is_told_from_its_consequences() {
        let exit_1 = 1 << 8;
        let mut suspects = [
            suspect(0, exit_1, false, Some(Some(3))),
            suspect(1, libc::SIGTERM, true, None),
            suspect(2, exit_1, true, Some(None)),
            suspect(3, libc::SIGKILL, false, None),
            suspect(4, libc::SIGSEGV, true, None),
            suspect(5, exit_1, true, None),
        ];
        suspects.sort_by_key(|suspect| suspect.innocence(&HashSet::new()));
        assert_eq!(suspects.each_ref().map(|suspect| suspect.rank), [3, 2, 4, 0, 5, 1]);
        // Rank 5 panicked, and rank 0, which waited for it, was gone first.
        assert_eq!(suspects[4].innocence(&HashSet::from([5])), 0);
    }

    #[test]
    fn ends_are_described() {
        assert_eq!(how(ExitStatus::from_raw(3 << 8)), "ended with exit status 3");
        assert_eq!(how(ExitStatus::from_raw(libc::SIGKILL)), "was killed by SIGKILL (out of memory?)");
        let failed = suspect(1, 1 << 8, false, Some(None)).describe(3);
        assert_eq!(failed, "rank 1 of 3 failed (ended with exit status 1): why");
    }
}
