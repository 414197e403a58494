//! The choice: every stage and tier that the configuration leaves open, each with as many graphs kept as fit; of what fits
//! the fastest. Deterministic: the same configuration, graph, ranks and machine give the same choice.

use anyhow::Result;

use super::activations::Wiring;
use super::cards::Machine;
use super::decision::{Decision, Prediction};
use super::facts::Facts;
use super::ledger::{Bytes, Choice, Terms, bytes};
use super::time::seconds;
use crate::config::{RunPlan, Toggle};
use crate::device::Place;
use crate::segment::Keep;
use crate::zero::Placement;

/// What a rank may take, in bytes; `None`: as much as it wants.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Budgets {
    pub device: Option<u64>,
    pub host: Option<u64>,
    /// Both together, where they are the same memory.
    pub together: Option<u64>,
}

/// Part of a machine's memory that runs may have.
const SHARE: f64 = 0.9;
/// A choice is faster than a simpler one only by more than this part.
const FASTER: f64 = 0.05;

impl Budgets {
    /// What `[memory]` says, else what the machine has. The ranks of a machine share its memory.
    pub fn of(plan: &RunPlan, machine: &Machine, world_size: usize) -> Budgets {
        let ranks = world_size.max(1) as u64;
        let share = |bytes: u64| (bytes as f64 * SHARE) as u64 / ranks;
        let (vram, ram) = (plan.memory.vram, plan.memory.ram.map(|bytes| bytes / ranks));
        match machine.shared {
            true => Budgets { device: vram, host: ram, together: Some(share(machine.host)) },
            false => Budgets {
                device: Some(vram.unwrap_or(machine.device_for(world_size, plan.zero.collectives))),
                host: Some(ram.unwrap_or(share(machine.host))),
                together: None,
            },
        }
    }

    /// By how much the worst of the budgets is exceeded, as a factor; at most 1 if all fit.
    pub fn strain(&self, bytes: &Bytes) -> f64 {
        let (device, host) = (bytes.device.room, bytes.host.room);
        let part = |bytes: usize, budget: Option<u64>| budget.map_or(0.0, |budget| bytes as f64 / budget.max(1) as f64);
        part(device, self.device).max(part(host, self.host)).max(part(device + host, self.together))
    }

    pub fn fit(&self, bytes: &Bytes) -> bool {
        self.strain(bytes) <= 1.0
    }
}

/// All that a choice depends on.
pub struct Question<'a> {
    pub plan: &'a RunPlan,
    pub facts: &'a Facts,
    pub terms: Terms,
    pub budgets: Budgets,
    pub machine: &'a Machine,
}

/// What fits, or what came nearest.
pub enum Answer {
    Fits(Decision),
    /// The choice that exceeds the budgets least.
    TooLarge(Decision),
}

impl<'a> Question<'a> {
    pub fn new(plan: &'a RunPlan, facts: &'a Facts, world_size: usize, machine: &'a Machine) -> Self {
        let terms = Terms::of(plan, world_size, !machine.shared);
        Question { plan, facts, terms, budgets: Budgets::of(plan, machine, world_size), machine }
    }

    /// The fastest choice that fits.
    pub fn answer(&self) -> Result<Answer> {
        let wiring = Wiring::of(self.facts);
        let mut best: Option<(Choice, Prediction)> = None;
        let mut nearest: Option<(f64, Choice, Prediction)> = None;
        for (stage, placement) in self.candidates() {
            let choice = self.with_graphs(&wiring, stage, placement);
            let prediction = self.predict(&wiring, &choice);
            let strain = self.budgets.strain(&prediction.bytes);
            if strain > 1.0 {
                if nearest.as_ref().is_none_or(|(least, ..)| strain < *least) {
                    nearest = Some((strain, choice, prediction));
                }
                continue;
            }
            let faster =
                |(_, known): &(Choice, Prediction)| prediction.seconds.step < known.seconds.step * (1.0 - FASTER);
            if best.as_ref().is_none_or(faster) {
                best = Some((choice, prediction));
            }
        }
        let decide = |choice: Choice, prediction: Prediction| {
            let reasons = self.reasons(&wiring, &choice, &prediction);
            Decision::new(choice, prediction, self.budgets, reasons)
        };
        match (best, nearest) {
            (Some((choice, prediction)), _) => Ok(Answer::Fits(decide(choice, prediction))),
            (None, Some((_, choice, prediction))) => Ok(Answer::TooLarge(decide(choice, prediction))),
            (None, None) => anyhow::bail!("there is nothing to choose from"),
        }
    }

    pub fn predict(&self, wiring: &Wiring, choice: &Choice) -> Prediction {
        let bytes = bytes(self.facts, wiring, self.terms, choice);
        let seconds = seconds(self.facts, &self.terms, choice, &bytes.traffic, self.machine);
        Prediction { bytes, seconds }
    }

    /// Stages and tiers that the configuration allows, the simplest first.
    fn candidates(&self) -> Vec<(u8, Placement)> {
        let zero = &self.plan.zero;
        // Stages 2 and 3 give the same bits: so what memory there is shows in no number.
        let stages = match (zero.stage, self.terms.world_size) {
            (Some(stage), _) => vec![stage],
            (None, 1) => vec![0],
            (None, _) => vec![2, 3],
        };
        let drive = zero.nvme_dir.is_some();
        let open = |asked: Option<Place>, drive: bool| match asked {
            Some(place) => vec![place],
            None if drive => vec![Place::Device, Place::Host, Place::Nvme],
            None => vec![Place::Device, Place::Host],
        };
        let mut candidates = Vec::new();
        for &stage in &stages {
            for optimizer in open(zero.offload_optimizer, drive) {
                for gradients in open(zero.offload_gradients, false) {
                    for parameters in open(zero.offload_params, drive) {
                        candidates.push((stage, Placement { parameters, gradients, optimizer }));
                    }
                }
            }
        }
        // What moves less is simpler.
        candidates.sort_by_key(|(stage, place)| {
            (place.optimizer as u8 + place.gradients as u8 + place.parameters as u8, *stage)
        });
        candidates
    }

    /// With as many graphs kept as fit, those first whose segments are dear to run again for the memory they take.
    fn with_graphs(&self, wiring: &Wiring, stage: u8, placement: Placement) -> Choice {
        let count = self.facts.segments.len();
        let all = |keep: Keep| Choice { stage, placement, keep: vec![keep; count] };
        let fits = |choice: &Choice| self.budgets.fit(&bytes(self.facts, wiring, self.terms, choice));
        let everything = all(Keep::Graph);
        let toggle = self.plan.train.recompute;
        if toggle == Toggle::Off || (toggle == Toggle::Auto && fits(&everything)) {
            return everything;
        }
        let inputs = all(Keep::Inputs);
        let enough = fits(&inputs);
        let mut choice = if enough { inputs.clone() } else { all(Keep::Host) };
        if !enough && !fits(&choice) {
            // Waiting on the host is no help; the budget is short of something else.
            return inputs;
        }
        let worth = |i: usize| self.facts.segments[i].measured.plain.flops / wiring.graph(i).max(1) as f64;
        let mut order: Vec<usize> = (0..count).collect();
        order.sort_by(|&a, &b| worth(b).total_cmp(&worth(a)).then(b.cmp(&a)));
        let better: &[Keep] = match (toggle, enough) {
            (Toggle::On, true) => &[],
            (Toggle::On, false) => &[Keep::Inputs],
            (_, true) => &[Keep::Graph],
            (_, false) => &[Keep::Graph, Keep::Inputs],
        };
        for i in order {
            let before = choice.keep[i];
            let found = better.iter().any(|&keep| {
                choice.keep[i] = keep;
                fits(&choice)
            });
            if !found {
                choice.keep[i] = before;
            }
        }
        choice
    }

    /// Why each thing was chosen.
    fn reasons(&self, wiring: &Wiring, choice: &Choice, prediction: &Prediction) -> Vec<String> {
        let zero = &self.plan.zero;
        let mut reasons = vec![match (zero.stage, self.terms.world_size, choice.stage) {
            (Some(stage), ..) => format!("stage {stage}: zero.stage says so"),
            (None, 1, _) => "stage 0: one rank has nobody to share with".to_string(),
            (None, ranks, 2) => {
                format!("stage 2: {ranks} ranks share gradients and optimizer state; all parameters fit on each")
            }
            (None, ranks, stage) => format!(
                "stage {stage}: {ranks} ranks share everything; whole parameters do not fit, or leave less time"
            ),
        }];
        let place = choice.placement;
        let states = [
            ("parameters", zero.offload_params, "offload_params", place.parameters),
            ("gradients", zero.offload_gradients, "offload_gradients", place.gradients),
            ("optimizer state", zero.offload_optimizer, "offload_optimizer", place.optimizer),
        ];
        for (k, (what, asked, key, place)) in states.into_iter().enumerate() {
            reasons.push(match asked {
                Some(_) => format!("{what} on {place}: zero.{key} says so"),
                None if place == Place::Device => format!("{what} on {place}: there is room"),
                None => format!("{what} on {place}: {}", self.why_not_nearer(wiring, choice, prediction, k)),
            });
        }
        let kept = choice.keep.iter().filter(|keep| **keep == Keep::Graph).count();
        let count = choice.keep.len();
        let waiting = choice.keep.iter().filter(|keep| **keep == Keep::Host).count();
        if waiting > 0 {
            reasons.push(format!(
                "the inputs of {waiting} segments wait on the host: beside the rest they do not fit on the device"
            ));
        }
        reasons.push(match (self.plan.train.recompute, kept) {
            (Toggle::On, _) => "every segment runs again on the way back: train.recompute = true".to_string(),
            (Toggle::Off, _) => "no segment runs again: train.recompute = false".to_string(),
            (Toggle::Auto, kept) if kept == count => "no segment runs again: all graphs fit".to_string(),
            (Toggle::Auto, 0) => "every segment runs again on the way back: no graph fits beside the rest".to_string(),
            (Toggle::Auto, kept) => format!(
                "{kept} of {count} segments keep their graphs, the dearest to run again first; more do not fit, with {} at {}",
                prediction.bytes.fullest,
                super::table::size(prediction.bytes.device.total)
            ),
        });
        reasons
    }

    /// What speaks against the tier one step nearer to the device for state `k` of parameters, gradients, optimizer.
    fn why_not_nearer(&self, wiring: &Wiring, choice: &Choice, prediction: &Prediction, k: usize) -> String {
        let mut nearer = choice.placement;
        let place = [&mut nearer.parameters, &mut nearer.gradients, &mut nearer.optimizer].into_iter().nth(k);
        let Some(place) = place else { return String::new() };
        *place = if *place == Place::Nvme { Place::Host } else { Place::Device };
        let tier = *place;
        let other = self.with_graphs(wiring, choice.stage, nearer);
        let instead = self.predict(wiring, &other);
        if self.budgets.fit(&instead.bytes) {
            return format!(
                "a step takes about {:.2} s, and {:.2} s with them on {tier}",
                prediction.seconds.step, instead.seconds.step
            );
        }
        let (device, host) = (instead.bytes.device.room, instead.bytes.host.room);
        let over = |what: &str, bytes: usize, budget: Option<u64>| {
            let budget = budget.filter(|&budget| bytes as u64 > budget)?;
            Some(format!(
                "on {tier} the {what} would hold {} of {}",
                super::table::size(bytes),
                super::table::size(budget as usize)
            ))
        };
        over("device tier", device, self.budgets.device)
            .or_else(|| over("host tier", host, self.budgets.host))
            .or_else(|| over("machine", device + host, self.budgets.together))
            .unwrap_or_default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::plan::{FrozenFacts, Measured, SegmentFacts, Span};
    use candle_core::DType;

    const MIB: usize = 1 << 20;

    /// A chain of segments of a mebi-parameter each, whose graphs take 8 MiB and whose values take 1.
    fn facts() -> Facts {
        let span =
            |above: usize, change: isize, flops: f64| Span { above: above * MIB, change: change * MIB as isize, flops };
        let segment = |i: usize| SegmentFacts {
            name: format!("unet.{i}"),
            len: MIB,
            small_from: MIB,
            trains: true,
            inputs: vec![i],
            outputs: vec![i + 1],
            measured: Measured {
                plain: span(3, 1, 1e9 * (i + 1) as f64),
                graph: span(9, 8, 1e9 * (i + 1) as f64),
                pull: span(4, -7, 2e9 * (i + 1) as f64),
                outputs: vec![MIB],
            },
        };
        Facts {
            dtype: DType::F32,
            parameters: 6 * MIB,
            rows: 1,
            segments: (0..6).map(segment).collect(),
            slots: vec![MIB; 7],
            given: vec![0],
            prediction: 6,
            scratch: MIB,
            around: 0,
            kept: 0,
            decoding: 0,
            encoder: FrozenFacts { weights: MIB, turns: vec![[MIB / 2, 0, 5 * MIB]], flops: 1e8 },
            validation: None,
        }
    }

    fn plan(sets: &[&str]) -> RunPlan {
        let path = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("configs/photographs.toml");
        let sets: Vec<String> = std::iter::once(&"zero.stage=auto").chain(sets).map(|set| set.to_string()).collect();
        crate::config::load(&path, &sets, 1).unwrap()
    }

    fn card() -> Machine {
        Machine::named("rtx3060-12gb", 32 << 30).unwrap()
    }

    fn decide(sets: &[&str], world_size: usize) -> Result<Decision> {
        Decision::of(&plan(sets), &facts(), world_size, &card())
    }

    #[test]
    fn with_room_everything_is_on_the_device_and_every_graph_is_kept() {
        let decision = decide(&[], 1).unwrap();
        assert_eq!((decision.stage, decision.placement), (0, Placement::DEVICE));
        assert!(decision.keep.iter().all(|keep| *keep == Keep::Graph));
        let device = decision.prediction.bytes.device;
        // Weights, gradients, two moments.
        assert_eq!([device.parameters, device.gradients, device.optimizer], [24 * MIB, 24 * MIB, 48 * MIB]);
        // All graphs, and what pulling the last one back takes.
        let graphs = 6 * 8 * MIB;
        assert!((graphs + 4 * MIB..=graphs + 8 * MIB).contains(&device.activations), "{device:?}");
        assert_eq!(decide(&[], 2).unwrap().stage, 2);
        assert_eq!(decide(&["train.recompute=true"], 1).unwrap().keep, [Keep::Inputs; 6]);
    }

    #[test]
    fn budgets_are_kept_and_less_memory_is_never_faster() {
        let mut before = 0.0;
        for vram in [160, 130, 110, 90, 70, 50, 40] {
            let sets = [format!("memory.vram={vram}MiB")];
            let decision = decide(&[&sets[0]], 1).unwrap();
            let Prediction { bytes, seconds } = &decision.prediction;
            assert!(bytes.device.total <= vram * MIB, "{vram}: {decision:?}");
            // With more memory a simpler choice that fits may be preferred, unless it is much slower.
            assert!(seconds.step >= before * (1.0 - FASTER), "{vram}: {} after {before}", seconds.step);
            before = seconds.step;
            assert_eq!(decision, decide(&[&sets[0]], 1).unwrap());
            let written = serde_json::to_string(&decision).unwrap();
            let read = serde_json::from_str::<Decision>(&written).unwrap();
            assert_eq!(
                (read.placement, read.keep, read.prediction.bytes),
                (decision.placement, decision.keep, bytes.clone())
            );
        }
    }

    #[test]
    fn what_the_configuration_says_is_done() {
        let sets = [
            "zero.stage=3",
            "zero.offload_params=host",
            "zero.offload_gradients=none",
            "zero.offload_optimizer=nvme",
            "zero.nvme_dir=/tmp",
            "train.recompute=false",
        ];
        let decision = decide(&sets, 2).unwrap();
        let placement = Placement { parameters: Place::Host, gradients: Place::Device, optimizer: Place::Nvme };
        assert_eq!((decision.stage, decision.placement), (3, placement));
        assert_eq!(decision.keep, [Keep::Graph; 6]);
        assert!(decision.prediction.bytes.drive >= 24 * MIB);
        assert!(
            decision.reasons.iter().any(|why| why.contains("zero.offload_optimizer says so")),
            "{:?}",
            decision.reasons
        );
    }

    #[test]
    fn when_nothing_fits_the_smallest_change_is_told() {
        let told = |sets: &[&str]| {
            let error = decide(sets, 1).unwrap_err();
            assert!(error.downcast_ref::<crate::Refusal>().is_some());
            error.to_string()
        };
        let fixed = told(&["zero.offload_optimizer=none", "memory.vram=50MiB"]);
        assert!(fixed.contains("\"auto\"") && fixed.contains("memory.vram of"), "{fixed}");
        let short = told(&["memory.vram=40MiB", "memory.ram=60MiB"]);
        assert!(short.contains("zero.nvme_dir") && short.contains("memory.ram of"), "{short}");
        let hopeless = told(&["memory.vram=1MiB"]);
        assert!(
            hopeless.contains("memory.vram of") && hopeless.contains("encoding of a picture")
                || hopeless.contains("unet.")
        );
    }
}
