//! Sharing a machine's cores among ranks: how many threads each computes with, and which cores it keeps to.

use std::collections::HashSet;

use crate::comm::process;

/// One rank's share.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Share {
    pub threads: usize,
    /// The cores it keeps to; `None` where it may run anywhere.
    pub cores: Option<Vec<usize>>,
}

/// Every rank's share of what this process may use, or of `threads_total` threads if the user says so.
pub fn shares(ranks: usize, threads_total: Option<usize>) -> Vec<Share> {
    let allowed = near_first(process::allowed_cores(), &topology);
    // A container may be given the time of fewer cores than it may run on; which ones is then the system's business.
    let granted = std::thread::available_parallelism().map_or(1, usize::from);
    split(&allowed, granted, ranks, threads_total)
}

fn split(allowed: &[usize], granted: usize, ranks: usize, threads_total: Option<usize>) -> Vec<Share> {
    let total = threads_total.unwrap_or(granted);
    let pin = ranks > 1 && ranks <= allowed.len() && allowed.len() <= granted;
    let mut first = 0;
    (0..ranks)
        .map(|rank| {
            let cores = part(allowed.len(), ranks, rank);
            let range = first..first + cores;
            first += cores;
            Share { threads: part(total, ranks, rank).max(1), cores: pin.then(|| allowed[range].to_vec()) }
        })
        .collect()
}

/// `total` in `ranks` parts that differ by at most one, the larger ones first.
pub fn part(total: usize, ranks: usize, rank: usize) -> usize {
    total / ranks + usize::from(rank < total % ranks)
}

/// Cores in an order in which neighbours share most: sockets, then cores, then the threads of one core, so that no two
/// ranks compute on the same core while another is idle.
fn near_first(mut cores: Vec<usize>, topology: &dyn Fn(usize) -> (usize, usize)) -> Vec<usize> {
    cores.sort_by_cached_key(|&core| (topology(core), core));
    cores
}

/// Socket and core of one of the system's numbers.
fn topology(cpu: usize) -> (usize, usize) {
    let read = |what: &str| {
        let text = std::fs::read_to_string(format!("/sys/devices/system/cpu/cpu{cpu}/topology/{what}"));
        text.ok().and_then(|text| text.trim().parse().ok())
    };
    match (read("physical_package_id"), read("core_id")) {
        (Some(socket), Some(core)) => (socket, core),
        _ => (0, cpu),
    }
}

/// This process's share where somebody else started the ranks: of the cores it may run on, what it need not leave to the
/// ranks that may run on the same ones. `everyone`: all local ranks' cores, by rank.
pub fn own_share(everyone: &[Vec<usize>], rank: usize) -> usize {
    let granted = std::thread::available_parallelism().map_or(1, usize::from);
    let mine: HashSet<usize> = everyone[rank].iter().copied().collect();
    let sharing = |other: &Vec<usize>| other.iter().any(|core| mine.contains(core));
    let before = everyone[..rank].iter().filter(|other| sharing(other)).count();
    let after = everyone[rank + 1..].iter().filter(|other| sharing(other)).count();
    part(granted, before + 1 + after, before).max(1)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn threads(shares: &[Share]) -> Vec<usize> {
        shares.iter().map(|share| share.threads).collect()
    }

    #[test]
    fn every_core_has_one_rank_and_the_first_ranks_take_the_rest() {
        let shares = split(&[0, 1, 2, 3, 4, 5, 6], 7, 3, None);
        assert_eq!(threads(&shares), [3, 2, 2]);
        let cores: Vec<_> = shares.into_iter().flat_map(|share| share.cores.unwrap()).collect();
        assert_eq!(cores, [0, 1, 2, 3, 4, 5, 6]);
    }

    #[test]
    fn more_ranks_than_cores_compute_with_one_thread_each_anywhere() {
        let shares = split(&[0, 1], 2, 3, None);
        assert_eq!(threads(&shares), [1, 1, 1]);
        assert!(shares.iter().all(|share| share.cores.is_none()));
    }

    #[test]
    fn nobody_is_pinned_where_the_system_grants_time_but_not_cores() {
        let shares = split(&[0, 1, 2, 3], 2, 2, None);
        assert_eq!(shares, [Share { threads: 1, cores: None }, Share { threads: 1, cores: None }]);
        assert_eq!(threads(&split(&[0, 1, 2, 3], 4, 2, Some(3))), [2, 1]);
    }

    #[test]
    fn the_threads_of_one_core_stay_together() {
        // Numbers 0-3 and 4-7 are the first and second threads of the cores 0-3, two on each socket.
        let order = near_first((0..8).collect(), &|cpu| (cpu % 4 / 2, cpu % 4));
        assert_eq!(order, [0, 4, 1, 5, 2, 6, 3, 7]);
    }

    #[test]
    fn ranks_that_others_started_share_only_what_they_share() {
        let granted = std::thread::available_parallelism().map_or(1, usize::from);
        let apart: Vec<Vec<usize>> = vec![vec![0, 1], vec![2, 3]];
        assert_eq!(own_share(&apart, 1), granted);
        let together = vec![vec![0, 1]; granted + 1];
        assert_eq!(own_share(&together, granted), 1);
    }
}
