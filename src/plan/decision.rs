//! What was decided, what it is predicted to take, and how that compares with what it took.

use anyhow::{Context, Result};
use serde::{Deserialize, Serialize};

use super::choose::{Answer, Budgets, Question};
use super::facts::Facts;
use super::ledger::{Bytes, Choice};
use super::time::Seconds;
use super::{Machine, refusal};
use crate::comm::{Communicator, SliceMut};
use crate::config::RunPlan;
use crate::device::{Held, Place};
use crate::segment::Keep;
use crate::zero::{Placement, Stage};

/// Stage, tiers and what each segment keeps, for all ranks of a run.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Decision {
    pub stage: u8,
    pub placement: Placement,
    /// What each segment leaves behind on the way forward.
    pub keep: Vec<Keep>,
    pub prediction: Prediction,
    /// What the arenas enforce, in bytes per rank.
    pub device_limit: Option<u64>,
    pub host_limit: Option<u64>,
    pub reasons: Vec<String>,
}

/// What a choice takes.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Prediction {
    pub bytes: Bytes,
    pub seconds: Seconds,
}

/// One predicted number beside the measured one, in bytes.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Compared {
    /// Tier and state, as in `device.parameters`, or `device` for all of a tier.
    pub what: String,
    pub predicted: usize,
    pub measured: usize,
}

impl Decision {
    pub(super) fn new(choice: Choice, prediction: Prediction, budgets: Budgets, reasons: Vec<String>) -> Self {
        let Choice { stage, placement, keep } = choice;
        let (device, host) = (prediction.bytes.device.room as u64, prediction.bytes.host.room as u64);
        // Memory that both tiers share is split as was planned; what is left over is either's.
        let left = budgets.together.map(|all| all.saturating_sub(device + host));
        let limit = |own: Option<u64>, planned: u64| own.or(left.map(|left| planned + left));
        let (device_limit, host_limit) = (limit(budgets.device, device), limit(budgets.host, host));
        Decision { stage, placement, keep, prediction, device_limit, host_limit, reasons }
    }

    /// The fastest way to run `plan` with so many ranks on `machine` that fits its budgets.
    ///
    /// # Errors
    /// A [`Refusal`](crate::Refusal) if nothing fits, with the smallest changes that would.
    pub fn of(plan: &RunPlan, facts: &Facts, world_size: usize, machine: &Machine) -> Result<Decision> {
        match Question::new(plan, facts, world_size, machine).answer()? {
            Answer::Fits(decision) => Ok(decision),
            Answer::TooLarge(nearest) => Err(refusal::refusal(plan, facts, world_size, machine, &nearest)),
        }
    }

    /// As [`Self::of`], decided by rank 0 for everyone: machines may differ in what they tell of themselves. A collective.
    pub fn agree(comm: &dyn Communicator, decide: impl FnOnce() -> Result<Decision>) -> Result<Decision> {
        let mut decided = None;
        let mut bytes = Vec::new();
        if comm.rank() == 0 {
            let decision = decide();
            bytes = match &decision {
                Ok(decision) => serde_json::to_vec(decision).context("writing the plan")?,
                Err(_) => Vec::new(),
            };
            decided = Some(decision);
        }
        let mut length = (bytes.len() as u64).to_le_bytes();
        comm.broadcast(SliceMut::U8(&mut length), 0)?;
        let length = u64::from_le_bytes(length) as usize;
        if length == 0 {
            return decided.unwrap_or_else(|| anyhow::bail!("rank 0 could not plan the run"));
        }
        bytes.resize(length, 0);
        comm.broadcast(SliceMut::U8(&mut bytes), 0)?;
        serde_json::from_slice(&bytes).context("reading the plan of rank 0")
    }

    /// In a line: what it will take of each tier, and where things rest.
    pub fn summary(&self) -> String {
        let size = super::table::size;
        let Placement { parameters, gradients, optimizer } = self.placement;
        let (device, host, drive) =
            (self.prediction.bytes.device.total, self.prediction.bytes.host.total, self.prediction.bytes.drive);
        let tiers = [("device", device), ("host", host), ("nvme", drive)].into_iter().filter(|(_, bytes)| *bytes > 0);
        let tiers: Vec<String> = tiers.map(|(tier, bytes)| format!("{tier} {}", size(bytes))).collect();
        let kept = self.keep.iter().filter(|keep| **keep == Keep::Graph).count();
        format!(
            "per rank: {}; parameters on {parameters}, gradients on {gradients}, optimizer state on {optimizer}; {kept} of {} \
             graphs kept",
            tiers.join(", "),
            self.keep.len()
        )
    }

    pub fn zero_stage(&self) -> Stage {
        Stage::from_number(self.stage).unwrap_or(Stage::Replicated)
    }

    /// What was predicted beside what was held; parts that nothing was predicted for, and parts that nobody measured,
    /// are left out. `rank` is whose these are.
    pub fn compare(&self, held: &Held, rank: usize) -> Vec<Compared> {
        let Bytes { mut device, mut host, state_by_rank, .. } = self.prediction.bytes.clone();
        // The prediction is the fullest rank's.
        if let (Some(&own), Some(&most)) = (state_by_rank.get(rank), state_by_rank.iter().max()) {
            let tier = match self.placement.optimizer {
                Place::Device => &mut device,
                Place::Host | Place::Nvme => &mut host,
            };
            tier.optimizer -= most - own;
            tier.total -= most - own;
        }
        let mut compared = Vec::new();
        let mut add = |what: String, predicted: usize, measured: Option<usize>| {
            if let Some(measured) = measured.filter(|&measured| predicted + measured > 0) {
                compared.push(Compared { what, predicted, measured });
            }
        };
        for (tier, bytes, parts) in [("device", &device, &held.device_parts), ("host", &host, &held.host_parts)] {
            let part = |name: &str| parts.iter().find(|(known, _)| known == name).map(|(_, usage)| usage.peak);
            let states = [
                ("parameters", bytes.parameters + bytes.frozen),
                ("gradients", bytes.gradients),
                ("optimizer", bytes.optimizer),
            ];
            for (name, predicted) in states {
                add(format!("{tier}.{name}"), predicted, part(name));
            }
        }
        let waiting = held.host_parts.iter().find(|(name, _)| name == "activations").map(|(_, usage)| usage.peak);
        add("host.activations".to_string(), host.activations, waiting);
        add("device.activations".to_string(), device.activations, held.activations.map(|usage| usage.peak));
        // Without a counting allocator only the arenas' part of the tier is known.
        let (whole, counts) = match held.counted_there {
            true => (device.bound, true),
            false => (device.total, held.activations.is_some()),
        };
        add("device".to_string(), whole, counts.then_some(held.device_peak));
        add("host".to_string(), host.total, Some(held.host.peak));
        compared
    }

    /// The comparison in a sentence, for the end of a run.
    pub fn sentence(compared: &[Compared]) -> String {
        let size = super::table::size;
        let parts = compared.iter().filter(|c| !c.what.contains('.')).map(|c| {
            let off = 100.0 * (c.measured as f64 / c.predicted.max(1) as f64 - 1.0);
            format!("{} {} of {} planned ({off:+.1} %)", c.what, size(c.measured), size(c.predicted))
        });
        format!("memory at most, per rank: {}", parts.collect::<Vec<_>>().join("; "))
    }
}
