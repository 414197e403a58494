//! `[optimizer]` and `[lr_schedule]`: names and numbers only; the arithmetic is in `optim`.

use super::plan::Writer;
use super::reader::{Choice, Reader};

#[derive(Clone, Debug, PartialEq)]
pub struct OptimizerPlan {
    pub kind: OptimizerKind,
    /// Of the UNet, already scaled where `scale_lr` asks for it.
    pub learning_rate: f64,
    pub text_encoder_learning_rate: f64,
    pub beta1: f64,
    pub beta2: f64,
    pub weight_decay: f64,
    pub text_encoder_weight_decay: f64,
    pub epsilon: f64,
    pub master_dtype: MasterDtype,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum OptimizerKind {
    /// Decoupled weight decay, state in fp32.
    AdamW,
    /// The same with blockwise 8-bit state, as bitsandbytes defines it.
    AdamW8bit,
}

/// What the weights that the optimizer changes are kept in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum MasterDtype {
    F32,
    /// With stochastic rounding: no second copy of the weights at all.
    Bf16,
}

const OPTIMIZERS: [Choice<OptimizerKind>; 2] =
    [("adamw", Ok(OptimizerKind::AdamW)), ("adamw8bit", Ok(OptimizerKind::AdamW8bit))];

const MASTERS: [Choice<MasterDtype>; 3] = [
    ("fp32", Ok(MasterDtype::F32)),
    ("bf16", Ok(MasterDtype::Bf16)),
    (
        "fp16",
        Err("updates would fall below fp16's smallest steps: use \"bf16\", which is rounded at random, or \"fp32\""),
    ),
];

impl OptimizerPlan {
    /// `images_per_step` is batch size × accumulation × ranks: what `scale_lr` multiplies the learning rate by. A
    /// text encoder's own rate is not scaled, as in the peer that has one.
    pub(super) fn read(section: &Reader, images_per_step: usize) -> Self {
        let scale = if section.flag("scale_lr", false) { images_per_step as f64 } else { 1.0 };
        let learning_rate = section.at_least_zero("learning_rate").unwrap_or(5e-6) * scale;
        let weight_decay = section.at_least_zero("weight_decay").unwrap_or(0.01);
        let beta = |key: &str, default: f64| {
            section.number(key, "at least 0 and below 1", |beta| (0.0..1.0).contains(&beta)).unwrap_or(default)
        };
        Self {
            kind: section.choice("kind", OptimizerKind::AdamW, &OPTIMIZERS),
            learning_rate,
            text_encoder_learning_rate: section.at_least_zero("text_encoder_learning_rate").unwrap_or(learning_rate),
            beta1: beta("beta1", 0.9),
            beta2: beta("beta2", 0.999),
            weight_decay,
            text_encoder_weight_decay: section.at_least_zero("text_encoder_weight_decay").unwrap_or(weight_decay),
            epsilon: section.above_zero("epsilon").unwrap_or(1e-8),
            master_dtype: section.choice("master_dtype", MasterDtype::F32, &MASTERS),
        }
    }

    pub(super) fn write(&self) -> toml::Table {
        Writer::default()
            .put("kind", self.kind.name())
            .put("learning_rate", self.learning_rate)
            .put("text_encoder_learning_rate", self.text_encoder_learning_rate)
            .put("beta1", self.beta1)
            .put("beta2", self.beta2)
            .put("weight_decay", self.weight_decay)
            .put("text_encoder_weight_decay", self.text_encoder_weight_decay)
            .put("epsilon", self.epsilon)
            // The rates above are scaled already.
            .put("scale_lr", false)
            .put_some("master_dtype", MASTERS.iter().find(|(_, dtype)| *dtype == Ok(self.master_dtype)).map(|m| m.0))
            .finish()
    }
}

impl OptimizerKind {
    /// The optimizer's name in the configuration.
    pub fn name(self) -> &'static str {
        OPTIMIZERS.iter().find(|(_, kind)| *kind == Ok(self)).map_or("adamw", |(name, _)| name)
    }
}

#[derive(Clone, Debug, PartialEq)]
pub struct LrSchedulePlan {
    pub kind: LrKind,
    /// Optimizer steps over which the rate rises from 0; `Constant` ignores it, as the peer does.
    pub warmup_steps: usize,
    /// Cosines in a run, with restarts.
    pub cycles: usize,
    /// Of the polynomial.
    pub power: f64,
}

/// Diffusers' schedules, by its names.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LrKind {
    Constant,
    ConstantWithWarmup,
    Linear,
    Cosine,
    CosineWithRestarts,
    Polynomial,
}

const KINDS: [Choice<LrKind>; 7] = [
    ("constant", Ok(LrKind::Constant)),
    ("constant_with_warmup", Ok(LrKind::ConstantWithWarmup)),
    ("linear", Ok(LrKind::Linear)),
    ("cosine", Ok(LrKind::Cosine)),
    ("cosine_with_restarts", Ok(LrKind::CosineWithRestarts)),
    ("polynomial", Ok(LrKind::Polynomial)),
    (
        "piecewise_constant",
        Err("this schedule needs a list of steps and rates, for which there is no key (the peer's scripts have none \
             either, and fail): use \"constant\" or \"linear\", or train in several runs that resume one another"),
    ),
];

impl LrSchedulePlan {
    pub(super) fn read(section: &Reader) -> Self {
        Self {
            kind: section.choice("kind", LrKind::Constant, &KINDS),
            warmup_steps: section.count("warmup_steps", 0).unwrap_or(0),
            cycles: section.count("cycles", 1).unwrap_or(1),
            power: section.above_zero("power").unwrap_or(1.0),
        }
    }

    pub(super) fn write(&self) -> toml::Table {
        Writer::default()
            .put("kind", self.kind.name())
            .put_count("warmup_steps", self.warmup_steps)
            .put_count("cycles", self.cycles)
            .put("power", self.power)
            .finish()
    }
}

impl LrKind {
    /// The schedule's name in the configuration.
    pub fn name(self) -> &'static str {
        KINDS.iter().find(|(_, kind)| *kind == Ok(self)).map_or("constant", |(name, _)| name)
    }
}
