//! From items to this rank's rows of a micro-batch: images, latents, noise, time steps, targets and weights, drawn from
//! the seed or taken from a record.

use std::collections::HashMap;

use anyhow::{Context, Result};

use super::items::Item;
use super::prompts::PromptNumbers;
use super::step::listed;
use super::vae::Encoder;

use crate::config::ReplayPixels;
use crate::data::{Crop, Dataset};
use crate::device::{Arena, trace};
use crate::diffusion::{
    Draws, MicroRecord, NoiseSchedule, Purpose, Record, Row, RowShape, VelocityWeight, add_offset_noise,
    noisy_and_target, row_weights, sample_latent,
};

/// What the rows of a run have in common.
pub struct RowMaker {
    pub dataset: Dataset,
    pub(super) vae: Encoder,
    pub schedule: NoiseSchedule,
    pub draws: Draws,
    pub prompts: PromptNumbers,
    pub replay: Option<(Record, ReplayPixels)>,
    pub settings: RowSettings,
    /// Posteriors of images that are the same every time: (row, file number) -> means and log-variances.
    pub cached_moments: HashMap<(Row, u64), Vec<f32>>,
    /// Of the host's budget, for all of this and the pictures: it is on the heap, where nobody else counts it if an
    /// accelerator computes.
    pub(super) _room: Option<Arena>,
}

/// Settings of the objective that show in the rows.
#[derive(Clone, Copy, Debug)]
pub struct RowSettings {
    /// Prior preservation's weight; None without it.
    pub prior_weight: Option<f64>,
    pub snr_gamma: Option<f64>,
    pub snr_velocity: VelocityWeight,
    pub offset_noise: f64,
    pub resolution: usize,
    pub cache_latents: bool,
}

/// This rank's rows of a micro-batch: its items' instance rows, then their class rows.
pub struct Rows {
    /// (rows, C, h, w): the noisy latents.
    pub sample: Vec<f32>,
    /// (rows, C, h, w).
    pub targets: Vec<f32>,
    pub latent: (usize, usize, usize),
    pub timesteps: Vec<i64>,
    /// Of the loss, each divided by the number of items already.
    pub weights: Vec<f64>,
    /// The number of each row's prompt in the run's list.
    pub prompts: Vec<usize>,
    /// File of each row, for messages.
    pub images: Vec<String>,
    pub pixels: PixelDifference,
}

/// How far our images are from recorded ones, in 8-bit levels.
#[derive(Clone, Copy, Debug, Default)]
pub struct PixelDifference {
    pub max: f64,
    pub sum: f64,
    pub count: f64,
}

impl Rows {
    fn empty(side: usize, channels: usize) -> Self {
        Rows {
            sample: Vec::new(),
            targets: Vec::new(),
            latent: (channels, side, side),
            timesteps: Vec::new(),
            weights: Vec::new(),
            prompts: Vec::new(),
            images: Vec::new(),
            pixels: PixelDifference::default(),
        }
    }

    pub fn len(&self) -> usize {
        self.timesteps.len()
    }

    pub fn shape(&self, prediction_channels: usize) -> RowShape {
        let (target_channels, h, w) = self.latent;
        RowShape { target_channels, prediction_channels, plane: h * w }
    }

    /// What to tell when some of the rows came out wrong.
    pub fn describe(&self, bad: impl Iterator<Item = usize>) -> String {
        listed(bad.map(|r| format!("{} at time step {}", self.images[r], self.timesteps[r])).collect())
    }
}

/// Where one row's random numbers come from.
struct RowDraws<'a> {
    draws: Draws,
    kind: Row,
    item: Item,
    /// The record, and the row's number in it.
    recorded: Option<(&'a MicroRecord, usize)>,
}

impl RowDraws<'_> {
    fn normal(&self, purpose: Purpose, out: &mut [f32]) -> Result<()> {
        let Some((record, row)) = self.recorded else {
            self.draws.normal(purpose, self.kind, self.item.running, out);
            return Ok(());
        };
        let values = match purpose {
            Purpose::VaeSample => {
                record.vae_eps.as_ref().context("replay.draws holds no vae_eps, which this model needs")?
            }
            Purpose::OffsetNoise => {
                let offset = record.offset_noise.as_ref();
                offset.context("replay.draws holds no offset_noise, which train.offset_noise needs")?
            }
            _ => &record.noise,
        };
        let values = values.row(row)?;
        anyhow::ensure!(values.len() == out.len(), "replay.draws holds rows of another size than the run's latents");
        out.copy_from_slice(&values);
        Ok(())
    }

    fn timestep(&self, steps: usize) -> Result<usize> {
        let Some((record, row)) = self.recorded else {
            return Ok(self.draws.timestep(self.kind, self.item.running, steps));
        };
        let t = record.timesteps[row];
        anyhow::ensure!((0..steps as i64).contains(&t), "replay.draws holds time step {t}; the schedule has {steps}");
        Ok(t as usize)
    }
}

impl RowMaker {
    /// The rows of `items[local]`, of a micro-batch with these items over all ranks. `micro_step` finds it in a record.
    pub fn rows(&mut self, items: &[Item], local: std::ops::Range<usize>, micro_step: u64) -> Result<Rows> {
        let micro = match &self.replay {
            Some((record, pixels)) => Some((record.micro(micro_step as usize)?, *pixels)),
            None => None,
        };
        let kinds: &[Row] =
            if self.settings.prior_weight.is_some() { &[Row::Instance, Row::Class] } else { &[Row::Instance] };
        let mut rows = Rows::empty(self.settings.resolution / self.vae.downscale, self.vae.latent_channels);
        for (half, &kind) in kinds.iter().enumerate() {
            for i in local.clone() {
                let recorded = micro.as_ref().map(|(record, _)| (record, half * items.len() + i));
                let pixels = micro.as_ref().map_or(ReplayPixels::Own, |(_, pixels)| *pixels);
                let draws = RowDraws { draws: self.draws, kind, item: items[i], recorded };
                self.push(&mut rows, &draws, pixels)?;
            }
        }
        rows.weights = self.weights(&rows.timesteps, local.len(), items.len());
        Ok(rows)
    }

    fn push(&mut self, rows: &mut Rows, draws: &RowDraws, pixels: ReplayPixels) -> Result<()> {
        let moments = self.moments(rows, draws, pixels)?;
        let n = moments.len() / 2;
        let mut eta = vec![0f32; n];
        draws.normal(Purpose::VaeSample, &mut eta)?;
        let mut x0 = vec![0f32; n];
        sample_latent(&moments, &eta, self.vae.scaling_factor, &mut x0);
        let mut noise = vec![0f32; n];
        draws.normal(Purpose::Noise, &mut noise)?;
        if self.settings.offset_noise > 0.0 {
            let mut offset = vec![0f32; self.vae.latent_channels];
            draws.normal(Purpose::OffsetNoise, &mut offset)?;
            add_offset_noise(&mut noise, &offset, self.settings.offset_noise as f32);
        }
        let t = draws.timestep(self.schedule.steps())?;
        let from = rows.sample.len();
        rows.sample.resize(from + n, 0.0);
        rows.targets.resize(from + n, 0.0);
        noisy_and_target(&self.schedule, t, &x0, &noise, &mut rows.sample[from..], &mut rows.targets[from..]);
        rows.timesteps.push(t as i64);
        let file = self.dataset.file_number(draws.kind, draws.item.index);
        let (kind, running) = (draws.kind, draws.item.running);
        rows.prompts.push(self.prompts.of(kind, file, |rate| self.draws.drops_prompt(kind, running, rate)));
        rows.images.push(self.dataset.path(draws.kind, draws.item.index).display().to_string());
        Ok(())
    }

    /// Means and log-variances of the row's latents, from the cache if its image is the same every time.
    fn moments(&mut self, rows: &mut Rows, draws: &RowDraws, pixels: ReplayPixels) -> Result<Vec<f32>> {
        let (kind, item) = (draws.kind, draws.item);
        let key = (kind, self.dataset.file_number(kind, item.index));
        let cacheable = self.settings.cache_latents
            && draws.recorded.is_none()
            && self.dataset.is_deterministic(kind, item.index)?;
        if cacheable && let Some(moments) = self.cached_moments.get(&key) {
            return Ok(moments.clone());
        }
        let crop = match draws.recorded.and_then(|(record, row)| Some(record.crop.as_ref()?[row])) {
            Some((top, left)) => Crop::At { top, left },
            None => {
                let (top, left) = self.draws.crop(kind, item.running);
                Crop::Drawn { top, left, flip: self.draws.flip(kind, item.running) }
            }
        };
        let preparing = trace::span(trace::Row::Compute, "pictures");
        let mut image = self.dataset.prepare(kind, item.index, crop)?.pixels;
        drop(preparing);
        if let Some((record, row)) = draws.recorded
            && let Some(recorded) = &record.pixel_values
        {
            let recorded = recorded.row(row)?;
            rows.pixels.add(&image, &recorded)?;
            if pixels == ReplayPixels::Recorded {
                image = recorded;
            }
        }
        let side = self.settings.resolution;
        let _span = trace::span(trace::Row::Compute, "latents");
        let moments = self.vae.moments(image, side)?;
        if cacheable {
            self.cached_moments.insert(key, moments.clone());
        }
        Ok(moments)
    }

    /// Min-SNR weighs the instance half by the instance half's time steps, never the class half.
    fn weights(&self, timesteps: &[i64], instances: usize, items: usize) -> Vec<f64> {
        let weight = |&t: &i64| match self.settings.snr_gamma {
            Some(gamma) => self.schedule.min_snr_weight(t as usize, gamma as f32, self.settings.snr_velocity),
            None => 1.0,
        };
        let weights: Vec<f32> = timesteps[..instances].iter().map(weight).collect();
        row_weights(&weights, timesteps.len() - instances, self.settings.prior_weight.unwrap_or(0.0), items)
    }
}

impl PixelDifference {
    fn add(&mut self, ours: &[f32], recorded: &[f32]) -> Result<()> {
        anyhow::ensure!(ours.len() == recorded.len(), "replay.draws holds images of another resolution");
        for (a, b) in ours.iter().zip(recorded) {
            // [-1, 1] spans 255 levels.
            let levels = f64::from((a - b).abs()) * 127.5;
            self.max = self.max.max(levels);
            self.sum += levels;
        }
        self.count += ours.len() as f64;
        Ok(())
    }
}
