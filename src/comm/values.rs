//! Small values over the collectives: a number, a decision, a text of unknown length, and a result that all ranks
//! share. Built on the five functions alone, so they work with every communicator.

use anyhow::{Context, Result, anyhow};

use super::{Communicator, PeerFailure, Slice, SliceMut};
use crate::Refusal;

/// What every communicator can do besides its five functions. Each of these is collective.
pub trait CommunicatorExt: Communicator {
    /// Everyone's sum, in rank order.
    fn all_reduce_f64(&self, value: f64) -> Result<f64> {
        let mut sum = [value];
        self.all_reduce(SliceMut::F64(&mut sum))?;
        Ok(sum[0])
    }

    /// Whether any rank says yes.
    fn any(&self, mine: bool) -> Result<bool> {
        Ok(gather_flags(self, mine)?.contains(&1))
    }

    /// Whether every rank says yes.
    fn all(&self, mine: bool) -> Result<bool> {
        Ok(!gather_flags(self, mine)?.contains(&0))
    }

    /// Rank `root`'s bytes, whose length the others need not know; theirs are dropped.
    fn broadcast_bytes(&self, mut bytes: Vec<u8>, root: usize) -> Result<Vec<u8>> {
        let mut length = (bytes.len() as u64).to_le_bytes();
        self.broadcast(SliceMut::U8(&mut length), root)?;
        bytes.resize(u64::from_le_bytes(length) as usize, 0);
        self.broadcast(SliceMut::U8(&mut bytes), root)?;
        Ok(bytes)
    }

    /// Rank `root`'s text, to everyone.
    fn broadcast_string(&self, text: String, root: usize) -> Result<String> {
        String::from_utf8(self.broadcast_bytes(text.into_bytes(), root)?).context("a broadcast text is not UTF-8")
    }

    /// Everyone's bytes, by rank; lengths may differ.
    fn gather_bytes(&self, bytes: &[u8]) -> Result<Vec<Vec<u8>>> {
        let mut lengths = vec![0u8; 8 * self.world_size()];
        self.all_gather(Slice::U8(&(bytes.len() as u64).to_le_bytes()), SliceMut::U8(&mut lengths))?;
        let lengths: Vec<usize> =
            lengths.as_chunks::<8>().0.iter().map(|length| u64::from_le_bytes(*length) as usize).collect();
        let longest = lengths.iter().copied().max().unwrap_or(0);
        let mut padded = bytes.to_vec();
        padded.resize(longest, 0);
        let mut all = vec![0u8; longest * self.world_size()];
        self.all_gather(Slice::U8(&padded), SliceMut::U8(&mut all))?;
        Ok(lengths.iter().enumerate().map(|(r, &length)| all[r * longest..][..length].to_vec()).collect())
    }

    /// Everyone's text, by rank.
    fn gather_strings(&self, text: &str) -> Result<Vec<String>> {
        let all = self.gather_bytes(text.as_bytes())?;
        all.into_iter().map(|bytes| String::from_utf8(bytes).context("a gathered text is not UTF-8")).collect()
    }

    /// Shares how everyone fared: if any rank failed, all fail together, each with its own error or else with that of
    /// the first rank that has one (a [`Refusal`] stays one, another error becomes a [`PeerFailure`]).
    fn agree<T>(&self, mine: Result<T>) -> Result<T> {
        if self.all(mine.is_ok())? {
            return mine;
        }
        // One letter says what kind of error follows; nothing at all says that the rank is sound.
        let report = match &mine {
            Ok(_) => String::new(),
            Err(error) => match error.downcast_ref::<Refusal>() {
                Some(refusal) => format!("r{}", refusal.problems.join("\0")),
                None => format!("e{error:#}"),
            },
        };
        let reports = self.gather_strings(&report)?;
        let first = reports.iter().enumerate().find(|(_, report)| !report.is_empty());
        mine.and_then(|_| {
            let (rank, report) = first.ok_or_else(|| anyhow!("a rank failed without saying how"))?;
            Err(match report.split_at(1) {
                ("r", all) => anyhow::Error::new(Refusal { problems: all.split('\0').map(Into::into).collect() }),
                (_, message) => anyhow::Error::new(PeerFailure { rank, message: message.into() }),
            })
        })
    }
}

impl<C: Communicator + ?Sized> CommunicatorExt for C {}

fn gather_flags(communicator: &(impl Communicator + ?Sized), mine: bool) -> Result<Vec<u8>> {
    let mut flags = vec![0u8; communicator.world_size()];
    communicator.all_gather(Slice::U8(&[u8::from(mine)]), SliceMut::U8(&mut flags))?;
    Ok(flags)
}
