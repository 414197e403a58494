//! Pictures made in the course of a run, by the network as it is at that step: before the first step, every so many,
//! after the last one. The noise is the same every time, so that what changes is the network.

use anyhow::{Context, Result};
use serde_json::json;

use super::samples::Samples;
use super::scores;
use super::trainer::Trainer;
use crate::comm::CommunicatorExt;
use crate::config::ValidationPlan;
use crate::data::{Crop, Row};
use crate::diffusion::sampler::SamplerConfig;
use crate::launch::Event;
use crate::model::VaeConfig;
use crate::pipeline::Prompts;
use crate::sample::{self, Decoder, Noise, Picture, Request, Sampling, Settings, Tiling};
use crate::track;

/// What a run's validations have in common.
pub struct Validation {
    /// What is shown, then (with scores) the class prompt, then what is not to be shown; by number.
    pub texts: Vec<String>,
    pub prompts: Prompts,
    pub vae: VaeConfig,
    pub scheduler: SamplerConfig,
    pub settings: Settings,
    pub seed: u64,
}

impl Validation {
    /// The prompts in the order of their numbers.
    pub fn texts(plan: &ValidationPlan) -> Vec<String> {
        let class = plan.scores.iter().map(|scores| &scores.class_prompt);
        plan.prompts.iter().chain(class).chain([&plan.negative_prompt]).cloned().collect()
    }
}

/// The pictures of every validation: `num_images` of each prompt.
fn pictures(validation: &Validation, plan: &ValidationPlan) -> Vec<Picture> {
    let negative = validation.texts.len() - 1;
    let each = plan.num_images;
    (0..negative * each).map(|number| Picture { number: number as u64, prompt: number / each, negative }).collect()
}

impl Trainer<'_> {
    /// Makes the pictures of this step if they are due and not there yet. A collective.
    pub(super) fn validate(&mut self) -> Result<sample::Ending> {
        let Some(plan) = &self.plan.validation else { return Ok(sample::Ending::Done) };
        let step = self.position.step;
        let due =
            step == 0 || step >= self.total_steps || plan.every.is_some_and(|every| step.is_multiple_of(every as u64));
        let samples = Samples::of(&self.plan.output.dir);
        if !self.comm.any(due && self.comm.rank() == 0 && !samples.has(step))? {
            return Ok(sample::Ending::Done);
        }
        let Some(validation) = self.validation.take() else { return Ok(sample::Ending::Done) };
        let ending = self.make(&validation, plan, &samples);
        self.validation = Some(validation);
        ending.with_context(|| format!("making the pictures of step {step}"))
    }

    fn make(&mut self, validation: &Validation, plan: &ValidationPlan, samples: &Samples) -> Result<sample::Ending> {
        let step = self.position.step;
        let folder = samples.folder(step);
        let made = match self.comm.rank() {
            0 => std::fs::create_dir_all(&folder).with_context(|| format!("creating {}", folder.display())),
            _ => Ok(()),
        };
        self.comm.agree(made)?;
        // Loaded for the moment: it would otherwise sit beside the training's states.
        let mut decoder = Decoder::load(
            &validation.vae,
            &self.weights,
            &self.compute,
            self.network.store.tiers().frozen(),
            Tiling::Auto,
        )?;
        let pictures = pictures(validation, plan);
        let noise = Noise::from_seed(validation.seed);
        let request =
            Request { pictures: &pictures, prompts: &validation.prompts, settings: validation.settings, noise: &noise };
        let sampling = Sampling {
            graph: &self.network.graph,
            store: &self.network.store,
            slots: self.slots,
            unet: &self.unet,
            compute: &self.compute,
            scheduler: &validation.scheduler,
            rank: self.rank,
        };
        let ending = sampling.pictures(&request, &mut decoder, |made| {
            let text = self.describe(validation, &made.picture);
            sample::write_png(&samples.file(step, made.picture.number), &made.image, Some(&text))
        })?;
        if ending == sample::Ending::Done {
            let noted = match self.comm.rank() {
                0 => self.note(validation, plan, samples, &pictures),
                _ => Ok(()),
            };
            self.comm.agree(noted)?;
        }
        Ok(ending)
    }

    /// What made a picture, for its file.
    fn describe(&self, validation: &Validation, picture: &Picture) -> String {
        let settings = &validation.settings;
        format!(
            "{}\nNegative prompt: {}\nSteps: {}, Sampler: {}, Guidance: {}, Seed: {}, Picture: {}, Training step: {}",
            validation.texts[picture.prompt],
            validation.texts[picture.negative],
            settings.steps,
            settings.sampler.name(),
            settings.guidance_scale,
            validation.seed,
            picture.number,
            self.position.step
        )
    }

    /// Rank 0's part once all pictures are there: their table and their scores.
    fn note(
        &mut self,
        validation: &Validation,
        plan: &ValidationPlan,
        samples: &Samples,
        pictures: &[Picture],
    ) -> Result<()> {
        let step = self.position.step;
        let rows = pictures.iter().map(|picture| {
            json!({
                "step": step,
                "number": picture.number,
                "prompt": validation.texts[picture.prompt],
                "negative_prompt": validation.texts[picture.negative],
                "seed": validation.seed,
                "file": format!("step-{step:06}/{:05}.png", picture.number),
            })
        });
        samples.note(step, &rows.collect::<Vec<_>>())?;
        self.track(validation, samples, pictures)?;
        if step >= self.total_steps && samples.has(0) {
            let path = samples.write_before_after(step, pictures.len() as u64)?;
            let said = format!("before and after, side by side: {}", path.display());
            self.rank.events.send(&Event::Message(said));
        }
        if plan.scores.is_none() {
            return Ok(());
        }
        let of_class = pictures.len() as u64 - plan.num_images as u64..pictures.len() as u64;
        let subject = self.subject()?;
        let likeness = scores::likeness(&samples.read(step, 0..of_class.start)?, &subject);
        let class = samples.read(step, of_class.clone())?;
        // Missing where the run goes on from a checkpoint of another folder.
        let before = samples.read(0, of_class).unwrap_or_default();
        let drift = scores::drift(&class, &before);
        samples.note_scores(step, json!({ "step": step, "likeness": likeness, "drift": drift }))?;
        let known = [("likeness", likeness), ("drift", drift)];
        let known: Vec<(&str, f64)> = known.into_iter().filter_map(|(name, score)| Some((name, score?))).collect();
        self.trackers.scalars(step, &known)?;
        let shown = |score: Option<f64>, digits: usize| score.map_or("-".to_string(), |s| format!("{s:.digits$}"));
        let mut told = format!(
            "after step {step}: likeness to the subject {} (0 to 1), drift of the class {} (levels of 255)",
            shown(likeness, 3),
            shown(drift, 1)
        );
        if step >= self.total_steps
            && let Some(before) = samples.scores(0)
        {
            told += &format!("; before training the likeness was {}", shown(before["likeness"].as_f64(), 3));
        }
        self.rank.events.send(&Event::Message(told));
        Ok(())
    }

    /// Tells the trackers of the pictures.
    fn track(&mut self, validation: &Validation, samples: &Samples, pictures: &[Picture]) -> Result<()> {
        let step = self.position.step;
        let side = self.plan.data.resolution as u32;
        for picture in pictures {
            let path = samples.file(step, picture.number);
            let png = std::fs::read(&path).with_context(|| format!("reading {}", path.display()))?;
            let prompt = &validation.texts[picture.prompt];
            let shown =
                track::Picture { number: picture.number as usize, prompt, png: &png, width: side, height: side };
            self.trackers.pictures(step, &[shown])?;
        }
        Ok(())
    }

    /// The photographs as the network sees them, cut in the middle.
    fn subject(&self) -> Result<Vec<image::RgbImage>> {
        let dataset = &self.rows.dataset;
        let side = self.plan.data.resolution;
        let photograph = |item: u64| -> Result<image::RgbImage> {
            let middle = 1u64 << 63;
            let crop = Crop::Drawn { top: middle, left: middle, flip: false };
            let pixels = dataset.prepare(Row::Instance, item, crop)?.pixels;
            let level = |x: f32| ((x * 0.5 + 0.5) * 255.0).round().clamp(0.0, 255.0) as u8;
            Ok(image::RgbImage::from_fn(side as u32, side as u32, |x, y| {
                let at = y as usize * side + x as usize;
                image::Rgb([0, 1, 2].map(|c| level(pixels[c * side * side + at])))
            }))
        };
        (0..dataset.instance_count() as u64).map(photograph).collect()
    }
}
