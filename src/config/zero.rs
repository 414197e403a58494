//! `[zero]` and `[memory]`: how the run is spread over ranks.

use super::plan::Writer;
use super::reader::Reader;

#[derive(Clone, Debug, PartialEq)]
pub struct ZeroPlan {
    /// 0 to 3: nothing, optimizer state, also gradients, also parameters are partitioned.
    pub stage: u8,
    /// What gradients travel as; sums are taken in fp32.
    pub reduce_dtype: ReduceDtype,
    /// Fetch the next segment's parameters while this one computes.
    pub prefetch: bool,
    /// How long a collective waits for a rank that does not join.
    pub timeout_seconds: f64,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ReduceDtype {
    F32,
    Bf16,
    F16,
}

const DTYPES: [(&str, ReduceDtype); 3] =
    [("fp32", ReduceDtype::F32), ("bf16", ReduceDtype::Bf16), ("fp16", ReduceDtype::F16)];

impl ZeroPlan {
    /// Stage "auto" is 2 with more than one rank, else 0.
    pub(super) fn read(section: &Reader, world_size: usize) -> Self {
        let not_there =
            Err("offloading is not there yet: use \"none\" or \"auto\", or a higher [zero] stage over more ranks");
        for key in ["offload_params", "offload_optimizer"] {
            section.choice(key, (), &[("auto", Ok(())), ("none", Ok(())), ("host", not_there), ("nvme", not_there)]);
        }
        section.choice("offload_gradients", (), &[("auto", Ok(())), ("none", Ok(())), ("host", not_there)]);
        section.not_yet("nvme_dir", "only offloading to disk uses it, which is not there yet: leave this key out");
        Self {
            stage: stage(section, if world_size > 1 { 2 } else { 0 }),
            reduce_dtype: section.choice(
                "reduce_dtype",
                ReduceDtype::F32,
                &DTYPES.map(|(name, dtype)| (name, Ok(dtype))),
            ),
            prefetch: section.flag("prefetch", true),
            timeout_seconds: section
                .number("timeout_seconds", "above 0 and at most 1e9", |seconds| seconds > 0.0 && seconds <= 1e9)
                .unwrap_or(600.0),
        }
    }

    pub(super) fn write(&self) -> toml::Table {
        let dtype = DTYPES.iter().find(|(_, dtype)| *dtype == self.reduce_dtype).map(|(name, _)| *name);
        Writer::default()
            .put("stage", i64::from(self.stage))
            .put("offload_params", "none")
            .put("offload_optimizer", "none")
            .put("offload_gradients", "none")
            .put_some("reduce_dtype", dtype)
            .put("prefetch", self.prefetch)
            .put("timeout_seconds", self.timeout_seconds)
            .finish()
    }
}

fn stage(section: &Reader, auto: u8) -> u8 {
    match section.integer_or_auto("stage", "0, 1, 2, 3 (without quotes) or \"auto\"") {
        Some(stage @ 0..=3) => stage as u8,
        Some(_) => {
            section.reject("stage", "this is out of range: it must be 0, 1, 2, 3 or \"auto\"");
            auto
        }
        None => auto,
    }
}

/// Budgets need the planner; naming one without it would promise what nobody keeps.
pub(super) fn refuse_memory(section: &Reader) {
    let why = "budgets need the memory planner, which is not there yet: leave this key out, and lower [train] batch_size, \
               set recompute = true or raise the [zero] stage if memory is short";
    for key in ["vram", "ram"] {
        if section.text(key).is_some() {
            section.reject(key, why);
        }
    }
}
