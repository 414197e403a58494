//! `[zero]`: how the run is spread over ranks, and in which memory each state rests.

use std::path::PathBuf;

use super::plan::Writer;
use super::reader::{Choice, Reader};
use crate::comm::GpuCollectives;
use crate::device::Place;

/// Every `None` stands for "auto": the planner chooses.
#[derive(Clone, Debug, PartialEq)]
pub struct ZeroPlan {
    /// 0 to 3: nothing, optimizer state, also gradients, also parameters are partitioned.
    pub stage: Option<u8>,
    /// Where parameters rest between uses.
    pub offload_params: Option<Place>,
    /// Where optimizer state and separate master weights rest.
    pub offload_optimizer: Option<Place>,
    /// Where the sums of gradients rest; never on a drive.
    pub offload_gradients: Option<Place>,
    /// The folder for the run's state file, on a fast drive.
    pub nvme_dir: Option<PathBuf>,
    /// What gradients travel as; sums are taken in fp32.
    pub reduce_dtype: ReduceDtype,
    /// What gradients rest as between micro-batches and until the update.
    pub grad_accum_dtype: GradAccumDtype,
    /// By what several GPUs sum and gather.
    pub collectives: GpuCollectives,
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

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum GradAccumDtype {
    F32,
    Bf16,
}

const DTYPES: [Choice<ReduceDtype>; 3] =
    [("fp32", Ok(ReduceDtype::F32)), ("bf16", Ok(ReduceDtype::Bf16)), ("fp16", Ok(ReduceDtype::F16))];

const ACCUM_DTYPES: [Choice<GradAccumDtype>; 3] = [
    ("fp32", Ok(GradAccumDtype::F32)),
    ("bf16", Ok(GradAccumDtype::Bf16)),
    ("fp16", Err("sums of gradients leave fp16's range: use \"fp32\", or \"bf16\" to halve their memory")),
];

/// DeepSpeed calls the machine's memory "cpu".
const CPU: &str = "the machine's memory is called \"host\" here";

const PLACES: [Choice<Option<Place>>; 5] = [
    ("auto", Ok(None)),
    ("none", Ok(Some(Place::Device))),
    ("host", Ok(Some(Place::Host))),
    ("nvme", Ok(Some(Place::Nvme))),
    ("cpu", Err(CPU)),
];

const GRADIENT_PLACES: [Choice<Option<Place>>; 5] = [
    ("auto", Ok(None)),
    ("none", Ok(Some(Place::Device))),
    ("host", Ok(Some(Place::Host))),
    (
        "nvme",
        Err("gradients are added to in every micro-batch and would wear the drive out: use \"host\", with \
             grad_accum_dtype = \"bf16\" if memory is short"),
    ),
    ("cpu", Err(CPU)),
];

const COLLECTIVES: [Choice<GpuCollectives>; 4] = [
    ("auto", Ok(GpuCollectives::Auto)),
    ("nccl", Ok(GpuCollectives::Nccl)),
    ("host", Ok(GpuCollectives::Host)),
    ("mpi", Err("MPI moves what is in the host's memory: use \"host\"; ranks meet by themselves under mpirun, too")),
];

impl ZeroPlan {
    pub(super) fn read(section: &Reader) -> Self {
        let plan = Self {
            stage: stage(section),
            offload_params: section.choice("offload_params", None, &PLACES),
            offload_optimizer: section.choice("offload_optimizer", None, &PLACES),
            offload_gradients: section.choice("offload_gradients", None, &GRADIENT_PLACES),
            nvme_dir: section.path("nvme_dir"),
            reduce_dtype: section.choice("reduce_dtype", ReduceDtype::F32, &DTYPES),
            grad_accum_dtype: section.choice("grad_accum_dtype", GradAccumDtype::F32, &ACCUM_DTYPES),
            collectives: section.choice("collectives", GpuCollectives::Auto, &COLLECTIVES),
            prefetch: section.flag("prefetch", true),
            timeout_seconds: section
                .number("timeout_seconds", "above 0 and at most 1e9", |seconds| seconds > 0.0 && seconds <= 1e9)
                .unwrap_or(600.0),
        };
        if plan.nvme_dir.is_none() {
            for (key, _) in plan.places().into_iter().filter(|(_, place)| *place == Some(Place::Nvme)) {
                section.reject(
                    key,
                    "no folder is named for the state file: write nvme_dir = \"…\" under [zero], a folder on a fast \
                     drive, or use \"host\" or \"none\"",
                );
            }
        }
        plan
    }

    pub(super) fn write(&self) -> toml::Table {
        let stage: toml::Value = self.stage.map_or("auto".into(), |stage| i64::from(stage).into());
        Writer::default()
            .put("stage", stage)
            .put_some("offload_params", name(&PLACES, self.offload_params))
            .put_some("offload_optimizer", name(&PLACES, self.offload_optimizer))
            .put_some("offload_gradients", name(&PLACES, self.offload_gradients))
            .put_some("nvme_dir", self.nvme_dir.as_ref().map(|dir| dir.to_string_lossy().into_owned()))
            .put_some("reduce_dtype", name(&DTYPES, self.reduce_dtype))
            .put_some("grad_accum_dtype", name(&ACCUM_DTYPES, self.grad_accum_dtype))
            .put_some("collectives", name(&COLLECTIVES, self.collectives))
            .put("prefetch", self.prefetch)
            .put("timeout_seconds", self.timeout_seconds)
            .finish()
    }

    /// The keys that say where something rests, with what they say.
    pub fn places(&self) -> [(&'static str, Option<Place>); 3] {
        [
            ("offload_params", self.offload_params),
            ("offload_optimizer", self.offload_optimizer),
            ("offload_gradients", self.offload_gradients),
        ]
    }
}

/// What a value is called in the configuration.
fn name<T: PartialEq + Copy>(choices: &[Choice<T>], value: T) -> Option<&'static str> {
    choices.iter().find(|(_, meaning)| *meaning == Ok(value)).map(|(name, _)| *name)
}

fn stage(section: &Reader) -> Option<u8> {
    match section.integer_or_auto("stage", "0, 1, 2, 3 (without quotes) or \"auto\"") {
        Some(stage @ 0..=3) => Some(stage as u8),
        Some(_) => {
            section.reject("stage", "this is out of range: it must be 0, 1, 2, 3 or \"auto\"");
            None
        }
        None => None,
    }
}
