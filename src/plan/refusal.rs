//! When nothing fits: what came nearest, and the smallest changes with which something would.

use super::choose::{Answer, Budgets, Question};
use super::decision::Decision;
use super::facts::Facts;
use super::table::size;
use super::{Machine, Terms};
use crate::Refusal;
use crate::config::{GradAccumDtype, MasterDtype, OptimizerKind, RunPlan, Toggle};

/// A change of the configuration: what to write, and what the plan then is.
type Change = (&'static str, fn(&RunPlan) -> Option<RunPlan>);

/// The smallest first: those that change no number, then those that change few bits, then those that change the training.
const CHANGES: [Change; 7] = [
    ("train.recompute = \"auto\"", |plan| {
        changed(plan, plan.train.recompute == Toggle::Off, |p| p.train.recompute = Toggle::Auto)
    }),
    ("offload_params, offload_gradients and offload_optimizer = \"auto\" under [zero]", |plan| {
        let fixed = plan.zero.places().iter().any(|(_, place)| place.is_some());
        changed(plan, fixed, |p| {
            (p.zero.offload_params, p.zero.offload_gradients, p.zero.offload_optimizer) = (None, None, None);
        })
    }),
    ("zero.stage = 3", |plan| changed(plan, plan.zero.stage.is_some_and(|s| s < 3), |p| p.zero.stage = Some(3))),
    ("zero.nvme_dir = a folder on a fast drive, with the offload_… keys at \"auto\"", |plan| {
        let open = plan.zero.places().iter().any(|(_, place)| place.is_none());
        changed(plan, plan.zero.nvme_dir.is_none() && open, |p| p.zero.nvme_dir = Some("drive".into()))
    }),
    ("optimizer.kind = \"adamw8bit\"", |plan| {
        changed(plan, plan.optimizer.kind == OptimizerKind::AdamW, |p| p.optimizer.kind = OptimizerKind::AdamW8bit)
    }),
    ("zero.grad_accum_dtype = \"bf16\"", |plan| {
        changed(plan, plan.zero.grad_accum_dtype == GradAccumDtype::F32, |p| {
            p.zero.grad_accum_dtype = GradAccumDtype::Bf16
        })
    }),
    ("optimizer.master_dtype = \"bf16\"", |plan| {
        changed(plan, plan.optimizer.master_dtype == MasterDtype::F32, |p| p.optimizer.master_dtype = MasterDtype::Bf16)
    }),
];

fn changed(plan: &RunPlan, applies: bool, change: impl FnOnce(&mut RunPlan)) -> Option<RunPlan> {
    applies.then(|| {
        let mut plan = plan.clone();
        change(&mut plan);
        plan
    })
}

/// The refusal of a run for which nothing fits; `nearest` is what came nearest.
pub fn refusal(
    plan: &RunPlan,
    facts: &Facts,
    world_size: usize,
    machine: &Machine,
    nearest: &Decision,
) -> anyhow::Error {
    let bytes = &nearest.prediction.bytes;
    let budgets = Budgets::of(plan, machine, world_size);
    let over = |what: &str, key: &str, bytes: usize, budget: Option<u64>| {
        let budget = budget.filter(|&budget| bytes as u64 > budget)?;
        Some(format!("{what} would hold {} of {} ({key})", size(bytes), size(budget as usize)))
    };
    let (device, host) = (bytes.device.room, bytes.host.room);
    let why = [
        over("the device", "memory.vram, or what there is", device, budgets.device),
        over("the host", "memory.ram for all ranks, or what there is", host, budgets.host),
        over(
            "device and host together",
            "nine tenths of the machine's memory for all ranks",
            device + host,
            budgets.together,
        ),
    ];
    let why: Vec<String> = why.into_iter().flatten().collect();
    let mut remedies: Vec<String> = CHANGES
        .iter()
        .filter_map(|(what, change)| {
            let plan = change(plan)?;
            let fits =
                Question { terms: Terms::of(&plan, world_size, !machine.shared), plan: &plan, facts, budgets, machine }
                    .answer();
            matches!(fits, Ok(Answer::Fits(_))).then(|| what.to_string())
        })
        .take(3)
        .collect();
    if remedies.is_empty() {
        remedies.extend(all_together(plan, facts, world_size, machine, budgets));
    }
    remedies.push(raise(plan, &budgets, device, host, world_size));
    if facts.rows > 1 {
        remedies.push(
            "a smaller train.batch_size with more gradient_accumulation_steps, or a smaller data.resolution"
                .to_string(),
        );
    }
    if 2 * facts.decoding > if machine.shared { device } else { host } {
        remedies.push(format!("smaller pictures: decoding the largest takes {}", size(facts.decoding)));
    }
    let place = nearest.placement;
    Refusal::error(format!(
        "no way to run this fits the memory: at best (stage {}, parameters on {}, gradients on {}, optimizer state on {}; \
         fullest in the {}) {}, per rank. The smallest change that would do: {}",
        nearest.stage,
        place.parameters,
        place.gradients,
        place.optimizer,
        bytes.fullest,
        why.join(" and "),
        remedies.join("; or ")
    ))
}

/// Every change at once, where no single one is enough.
fn all_together(
    plan: &RunPlan,
    facts: &Facts,
    world_size: usize,
    machine: &Machine,
    budgets: Budgets,
) -> Option<String> {
    let mut all = plan.clone();
    let mut written = Vec::new();
    for (what, change) in CHANGES {
        let Some(next) = change(&all) else { continue };
        all = next;
        written.push(what);
        let terms = Terms::of(&all, world_size, !machine.shared);
        let question = Question { terms, plan: &all, facts, budgets, machine };
        if matches!(question.answer(), Ok(Answer::Fits(_))) {
            return Some(written.join(" and "));
        }
    }
    None
}

/// Budgets with which the nearest choice would fit.
fn raise(plan: &RunPlan, budgets: &Budgets, device: usize, host: usize, world_size: usize) -> String {
    let mib = |bytes: usize| format!("\"{}MiB\"", bytes.div_ceil(1 << 20));
    let device_short = budgets.device.is_some_and(|budget| device as u64 > budget);
    let host_short = budgets.host.is_some_and(|budget| host as u64 > budget);
    let more = |key: &str, set: bool| if set { format!("memory.{key}") } else { format!("a machine with {key}") };
    let mut parts = Vec::new();
    if device_short {
        parts.push(format!("{} of {} or more", more("vram", plan.memory.vram.is_some()), mib(device)));
    }
    if host_short {
        parts.push(format!("{} of {} or more", more("ram", plan.memory.ram.is_some()), mib(host * world_size)));
    }
    if parts.is_empty() {
        parts.push(format!("a machine with {} of memory for each rank", size(device + host)));
    }
    parts.join(" and ")
}
