//! Where pictures' random numbers come from: drawn from the seed, or given in a file.

use std::collections::BTreeMap;

use anyhow::{Context, Result, ensure};

use super::request::Picture;
use crate::diffusion::{Draws, Purpose, Row};

/// The random numbers of a request.
pub enum Noise {
    /// Functions of (seed, picture number, step).
    Drawn(Draws),
    Given(GivenNoise),
}

/// Random numbers of all pictures of a request, in its order.
#[derive(Clone, Debug, Default)]
pub struct GivenNoise {
    /// (pictures, C, h, w), standard normal.
    pub start: Vec<f32>,
    /// The same for the K-th stochastic step, those that are given.
    pub steps: BTreeMap<usize, Vec<f32>>,
}

impl Noise {
    pub fn from_seed(seed: u64) -> Self {
        Noise::Drawn(Draws::new(seed))
    }

    /// The standard normal start of the picture at `index` of the request.
    pub(super) fn start(&self, picture: &Picture, index: usize, out: &mut [f32]) -> Result<()> {
        match self {
            Noise::Drawn(draws) => draws.normal(Purpose::SamplingStart, Row::Instance, picture.number, out),
            Noise::Given(given) => copy_picture(&given.start, index, out)?,
        }
        Ok(())
    }

    /// The numbers of stochastic step `step`, counted from 0 among those that take noise.
    pub(super) fn step(&self, picture: &Picture, index: usize, step: usize, out: &mut [f32]) -> Result<()> {
        match self {
            Noise::Drawn(draws) => {
                draws.normal(Purpose::SamplingStep { step: step as u32 }, Row::Instance, picture.number, out);
            }
            Noise::Given(given) => {
                let values = given.steps.get(&step).with_context(|| format!("no noise.{step} was given"))?;
                copy_picture(values, index, out)?;
            }
        }
        Ok(())
    }
}

fn copy_picture(values: &[f32], index: usize, out: &mut [f32]) -> Result<()> {
    let range = index * out.len()..(index + 1) * out.len();
    ensure!(range.end <= values.len(), "the given noise is not of the size of the latents");
    out.copy_from_slice(&values[range]);
    Ok(())
}
