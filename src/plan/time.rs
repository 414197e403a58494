//! How long a step takes, roughly: what is computed, what travels, and what of that goes on at the same time. Good enough
//! to choose by; a profile says how it really was.

use candle_core::DType;
use serde::{Deserialize, Serialize};

use super::cards::Machine;
use super::facts::Facts;
use super::ledger::{Choice, Terms, Traffic};
use crate::config::MasterDtype;
use crate::device::Place;
use crate::optim::StateKind;
use crate::segment::Keep;

/// Seconds of a step.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Seconds {
    pub forward: f64,
    /// With what runs again.
    pub backward: f64,
    pub update: f64,
    /// Between device and host.
    pub bus: f64,
    pub drive: f64,
    pub between_ranks: f64,
    /// Of the step: less than their sum where they overlap.
    pub step: f64,
}

/// Estimates a step of `choice`.
pub fn seconds(facts: &Facts, terms: &Terms, choice: &Choice, traffic: &Traffic, machine: &Machine) -> Seconds {
    let micro = terms.accumulation as f64;
    let speed = if terms.compute == DType::F32 { machine.flops } else { machine.half_flops };
    let [forward, backward] = facts.flops();
    let again: f64 = facts
        .segments
        .iter()
        .zip(&choice.keep)
        .filter(|(_, keep)| **keep != Keep::Graph)
        .map(|(s, _)| s.measured.plain.flops)
        .sum();
    let latents = facts.rows as f64 * facts.encoder.flops / speed;
    let mut seconds = Seconds {
        forward: micro * (forward / speed + latents),
        backward: micro * (backward + again) / speed,
        update: update(facts, terms, choice, machine),
        bus: traffic.to_device.max(traffic.to_host) as f64 / machine.bus,
        drive: traffic.read as f64 / machine.drive[0] + traffic.written as f64 / machine.drive[1],
        between_ranks: traffic.between_ranks as f64 / machine.between_ranks,
        step: 0.0,
    };
    let Seconds { forward, backward, update, bus, drive, between_ranks, .. } = seconds;
    let travel = bus + between_ranks;
    // A copy that the device makes of its own memory waits for nobody; the others run beside the computation, except
    // that without prefetch each segment waits for its own.
    let (hidden, exposed) = if terms.prefetch { (travel, 0.0) } else { (0.0, travel) };
    seconds.step = if machine.shared {
        // The same cores compute, copy and update: only a drive works beside them.
        let (before, beside) =
            if terms.clips { (backward, forward + update) } else { (0.0, forward + backward + update) };
        before + (beside + travel).max(drive)
    } else if choice.placement.optimizer == Place::Device {
        // The device updates, and computes nothing else meanwhile.
        (forward + backward).max(hidden).max(drive) + update + exposed
    } else if terms.clips {
        // The update runs beside the next step's forward.
        backward.max(hidden / 2.0) + forward.max(hidden / 2.0).max(update).max(drive) + exposed
    } else {
        (forward + backward).max(hidden).max(update).max(drive) + exposed
    };
    seconds
}

/// One pass over weights, state and gradients, where they rest.
fn update(facts: &Facts, terms: &Terms, choice: &Choice, machine: &Machine) -> f64 {
    let owned = facts.trained() as f64 / if choice.stage >= 1 { terms.world_size as f64 } else { 1.0 };
    let state = match terms.state {
        StateKind::F32 => 16.0,
        StateKind::Bits8 => 4.0,
    };
    let weights = if terms.master == MasterDtype::Bf16 { 4.0 } else { 8.0 };
    let rounded = if terms.compute == DType::F32 || terms.master == MasterDtype::Bf16 { 0.0 } else { 2.0 };
    let grads = match terms.grads {
        crate::config::GradAccumDtype::F32 => 4.0,
        crate::config::GradAccumDtype::Bf16 => 2.0,
    };
    let slowest = if choice.placement.optimizer == Place::Device { Place::Device } else { Place::Host };
    owned * (state + weights + rounded + grads) / machine.bandwidth(slowest)
}
