//! A scheduler's configuration file, and the sampler built from it.

use super::ddim::Ddim;
use super::ddpm::Ddpm;
use super::dpm_solver::DpmSolver;
use super::euler::Euler;
use super::pndm::Pndm;
use super::unipc::UniPc;
use super::{Sampler, SamplerKind};
use crate::Refusal;
use crate::diffusion::scheduler_file;
use anyhow::Result;
use serde_json::Value;
use std::path::Path;

/// `scheduler_config.json` of any of diffusers' classes. Each sampler reads the keys that its own class knows and takes
/// that class's defaults for absent ones, as `Class.from_config(other.config)` does.
#[derive(Clone, Debug)]
pub struct SamplerConfig {
    config: Value,
    /// What refusals begin with: the file, or nothing.
    place: String,
    eta: f64,
}

/// Far more than a schedule has noise levels for; some samplers would take any number, and room for it.
const MOST_STEPS: usize = 100_000;

impl SamplerConfig {
    /// Reads the file.
    ///
    /// # Errors
    /// A [`Refusal`] with the file's name: it cannot be read, or is not a JSON object.
    pub fn read(path: &Path) -> Result<Self> {
        let read = Self::from_value(scheduler_file::read(path)?);
        let place = format!("{}: ", path.display());
        read.map(|config| SamplerConfig { place: place.clone(), ..config })
            .map_err(|e| Refusal::error(format!("{place}{e}")))
    }

    /// The same from the parsed file.
    pub fn from_value(config: Value) -> Result<Self> {
        if !config.is_object() {
            return Err(Refusal::error("this is not a JSON object. Restore the file."));
        }
        Ok(SamplerConfig { config, place: String::new(), eta: 0.0 })
    }

    /// Sets DDIM's η: the share of ancestral noise, 0 (none, the default) to 1. Other samplers have no such number.
    ///
    /// # Errors
    /// A [`Refusal`] if it is not in 0 … 1.
    pub fn with_eta(mut self, eta: f64) -> Result<Self> {
        if !(0.0..=1.0).contains(&eta) {
            return Err(Refusal::error(format!("eta = {eta} must lie in 0 … 1.")));
        }
        self.eta = eta;
        Ok(self)
    }

    /// The sampler that the configuration was written for.
    ///
    /// # Errors
    /// A [`Refusal`] if the class is none of those that are here.
    pub fn default_kind(&self) -> Result<SamplerKind> {
        let class = self.config.get("_class_name").and_then(Value::as_str).unwrap_or_default();
        let stochastic = || {
            let algorithm = self.config.get("algorithm_type").and_then(Value::as_str).unwrap_or_default();
            algorithm.starts_with("sde-")
        };
        match SamplerKind::ALL.into_iter().find(|kind| kind.class_name() == class) {
            Some(SamplerKind::Dpmpp2m) if stochastic() => Ok(SamplerKind::Dpmpp2mSde),
            Some(kind) => Ok(kind),
            None => {
                let named = if class.is_empty() {
                    "no scheduler class is named".into()
                } else {
                    format!("the scheduler class {class} is not known here")
                };
                Err(Refusal::error(format!(
                    "{}{named} (_class_name). Choose a sampler with --sampler: {}.",
                    self.place,
                    SamplerKind::names()
                )))
            }
        }
    }

    /// Builds the sampler for one batch of pictures and `steps` sampling steps.
    ///
    /// # Errors
    /// A [`Refusal`]: no steps, more steps than the schedule can take, settings that the class does not know, that
    /// exclude each other or that are not here and would change the numbers.
    pub fn build(&self, kind: SamplerKind, steps: usize) -> Result<Box<dyn Sampler>> {
        if steps == 0 {
            return Err(Refusal::error("0 sampling steps make no picture. Ask for at least one."));
        }
        if steps > MOST_STEPS {
            return Err(Refusal::error(format!(
                "{steps} sampling steps are more than any picture gains by. Ask for {MOST_STEPS} at most."
            )));
        }
        self.build_sampler(kind, steps)
            .map_err(|e| if e.is::<Refusal>() { Refusal::error(format!("{}{kind}: {e}", self.place)) } else { e })
    }

    fn build_sampler(&self, kind: SamplerKind, steps: usize) -> Result<Box<dyn Sampler>> {
        let config = &self.config;
        Ok(match kind {
            SamplerKind::Ddpm => Box::new(Ddpm::new(config, steps)?),
            SamplerKind::Ddim => Box::new(Ddim::new(config, steps, self.eta)?),
            SamplerKind::Pndm => Box::new(Pndm::new(config, steps)?),
            SamplerKind::Euler => Box::new(Euler::new(config, steps)?),
            SamplerKind::EulerAncestral => Box::new(Euler::ancestral(config, steps)?),
            SamplerKind::Dpmpp2m => Box::new(DpmSolver::new(config, steps, false)?),
            SamplerKind::Dpmpp2mSde => Box::new(DpmSolver::new(config, steps, true)?),
            SamplerKind::UniPc => Box::new(UniPc::new(config, steps)?),
        })
    }
}
