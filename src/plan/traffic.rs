//! What travels in a step for a choice of stage and tiers: between the tiers, to and from a drive, between ranks.

use super::activations::Profile;
use super::ledger::{Ledger, Sizes, Traffic};
use crate::device::Place;

impl Ledger<'_> {
    /// Bytes that travel in a step.
    pub(super) fn traffic(&self, profile: &Profile) -> Traffic {
        let (place, terms, micro) = (self.place(), &self.terms, self.terms.accumulation);
        let trained = |of: fn(&Sizes) -> usize| -> usize { self.sizes.iter().filter(|s| s.trains).map(of).sum() };
        let all = |of: fn(&Sizes) -> usize| -> usize { self.sizes.iter().map(of).sum() };
        let others = |bytes: usize| bytes / terms.world_size * (terms.world_size - 1);
        let [_, masters, _, state] = self.at_rest();
        let waiting = micro * profile.moved;
        let mut traffic = Traffic { to_device: waiting, to_host: waiting, ..Traffic::default() };
        // Forward and backward of every micro-batch bring the parameters.
        let brought = 2 * micro * all(|s| s.owned) * terms.rest();
        match place.parameters {
            Place::Device => {}
            Place::Host => traffic.to_device += brought,
            Place::Nvme => {
                traffic.read += brought;
                traffic.to_device += brought;
            }
        }
        let owned = trained(|s| s.owned);
        let updated_on_host = place.optimizer != Place::Device;
        let partitioned = if self.choice.stage >= 2 { trained(|s| s.shard) } else { trained(|s| s.full) };
        if place.gradients == Place::Host {
            traffic.to_host += 4 * micro * partitioned;
            traffic.to_device += if self.choice.stage < 2 { terms.grad() * (micro - 1) * partitioned } else { 0 };
        } else if updated_on_host {
            traffic.to_host += terms.grad() * owned;
        }
        if updated_on_host && place.parameters == Place::Device {
            traffic.to_device += owned * terms.rest();
        }
        if !updated_on_host {
            traffic.to_device += if place.gradients == Place::Host { terms.grad() * owned } else { 0 };
            traffic.to_host += if place.parameters == Place::Device { 0 } else { owned * terms.rest() };
        }
        if place.optimizer == Place::Nvme {
            traffic.read += state + masters;
            traffic.written += state + masters;
        }
        if place.parameters == Place::Nvme {
            traffic.read += if terms.has_master() { 0 } else { owned * terms.rest() };
            traffic.written += owned * terms.rest();
        }
        if self.several() {
            let gathered = if self.choice.stage >= 3 || (!self.resident() && self.choice.stage >= 1) {
                2 * micro * all(|s| s.full) * terms.rest()
            } else {
                trained(|s| s.full) * terms.used()
            };
            let reductions = if self.choice.stage >= 2 { micro } else { 1 };
            let reduced = reductions * trained(|s| s.full) * if terms.reduce_half { 2 } else { 4 };
            traffic.between_ranks += others(gathered) + others(reduced);
            // The optimizer of stage 0 is replicated: nothing to gather, and sums go to everybody.
            if self.choice.stage == 0 {
                traffic.between_ranks = 2 * others(reduced);
            }
        }
        traffic
    }
}
