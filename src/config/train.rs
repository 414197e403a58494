//! `[train]`: how long, how much at a time, and the objective.

use anyhow::{Context, Result};

use super::loss_scale;
use super::plan::{Toggle, Writer};
use super::reader::Reader;
use crate::diffusion::VelocityWeight;
use crate::optim::ScalePolicy;

#[derive(Clone, Debug, PartialEq)]
pub struct TrainPlan {
    /// Optimizer steps; `epochs` counts only without it.
    pub max_steps: Option<usize>,
    pub epochs: usize,
    /// Items per micro-batch and rank; each is an instance image and, under prior preservation, a class image too.
    pub batch_size: usize,
    /// Micro-batches per optimizer step.
    pub accumulation: usize,
    /// Bound on the joint L2 norm of all gradients; none means no clipping.
    pub max_grad_norm: Option<f64>,
    pub mixed_precision: MixedPrecision,
    /// Lets GPUs round factors of fp32 products to tf32.
    pub allow_tf32: bool,
    /// How the loss is scaled; None but under fp16.
    pub loss_scale: Option<ScalePolicy>,
    /// Where unset, rank 0 draws one below 2^63 and everyone uses it.
    pub seed: Option<u64>,
    /// Min-SNR's gamma; none weighs all time steps alike.
    pub snr_gamma: Option<f64>,
    /// Min-SNR's weight under v-prediction.
    pub snr_velocity: VelocityWeight,
    /// Strength of the per-channel offset in the noise; 0 is off.
    pub offset_noise: f64,
    /// Run segments again in the backward pass instead of keeping their graphs.
    pub recompute: Toggle,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum MixedPrecision {
    /// Everything in fp32.
    No,
    /// Activations and gathered weights in bf16, master weights in fp32.
    Bf16,
    /// The same in fp16, with a scaled loss.
    Fp16,
}

impl TrainPlan {
    pub(super) fn read(section: &Reader) -> Self {
        section.not_yet(
            "class_labels_conditioning",
            "only DeepFloyd IF's stage II needs it, and that model is not there yet: leave this key out",
        );
        let snr_gamma = section.above_zero("snr_gamma");
        let snr_velocity = section.choice(
            "snr_gamma_v",
            VelocityWeight::OverSnrPlusOne,
            &[("standard", Ok(VelocityWeight::OverSnrPlusOne)), ("plus_one", Ok(VelocityWeight::PlusOne))],
        );
        if section.is_set("snr_gamma_v") && !section.is_set("snr_gamma") {
            section.reject(
                "snr_gamma_v",
                "without snr_gamma this does nothing: set snr_gamma (5.0 is usual), or leave this out",
            );
        }
        let mixed_precision = section.choice(
            "mixed_precision",
            MixedPrecision::No,
            &[("no", Ok(MixedPrecision::No)), ("bf16", Ok(MixedPrecision::Bf16)), ("fp16", Ok(MixedPrecision::Fp16))],
        );
        let max_grad_norm = section.at_least_zero("max_grad_norm").unwrap_or(1.0);
        Self {
            max_steps: section.count("max_steps", 1),
            epochs: section.count("epochs", 1).unwrap_or(1),
            batch_size: section.count("batch_size", 1).unwrap_or(4),
            accumulation: section.count("gradient_accumulation_steps", 1).unwrap_or(1),
            max_grad_norm: Some(max_grad_norm).filter(|norm| *norm > 0.0),
            mixed_precision,
            allow_tf32: section.flag("allow_tf32", false),
            loss_scale: loss_scale::read(section, mixed_precision),
            seed: section.seed("seed"),
            snr_gamma,
            snr_velocity,
            offset_noise: section.at_least_zero("offset_noise").unwrap_or(0.0),
            recompute: section.toggle("recompute"),
        }
    }

    pub(super) fn write(&self) -> Result<toml::Table> {
        let count = |value: Option<usize>| value.map(|value| value as i64);
        let seed = self.seed.map(i64::try_from).transpose().context("the seed does not fit TOML's integers")?;
        let velocity = match self.snr_velocity {
            VelocityWeight::OverSnrPlusOne => "standard",
            VelocityWeight::PlusOne => "plus_one",
        };
        let precision = match self.mixed_precision {
            MixedPrecision::No => "no",
            MixedPrecision::Bf16 => "bf16",
            MixedPrecision::Fp16 => "fp16",
        };
        let section = Writer::default()
            .put_some("max_steps", count(self.max_steps))
            .put_count("epochs", self.epochs)
            .put_count("batch_size", self.batch_size)
            .put_count("gradient_accumulation_steps", self.accumulation)
            .put("max_grad_norm", self.max_grad_norm.unwrap_or(0.0))
            .put("mixed_precision", precision)
            .put("allow_tf32", self.allow_tf32);
        Ok(loss_scale::write(self.loss_scale, section)
            .put_some("seed", seed)
            .put_some("snr_gamma", self.snr_gamma)
            .put_some("snr_gamma_v", self.snr_gamma.map(|_| velocity))
            .put("offset_noise", self.offset_noise)
            .put("recompute", self.recompute.value())
            .finish())
    }
}
