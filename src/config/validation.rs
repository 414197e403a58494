//! `[validation]`: pictures made during the run, to see how it goes.

use super::plan::Writer;
use super::reader::Reader;
use crate::diffusion::sampler::SamplerKind;

#[derive(Clone, Debug, PartialEq)]
pub struct ValidationPlan {
    /// What the pictures show; each prompt gets `num_images`.
    pub prompts: Vec<String>,
    pub negative_prompt: String,
    pub num_images: usize,
    /// Optimizer steps between validations; none has one before the first and one after the last step only.
    pub every: Option<usize>,
    /// Steps of the sampler.
    pub steps: usize,
    pub guidance_scale: f64,
    /// Of the pictures' noise, the same every time; the run's own seed if none.
    pub seed: Option<u64>,
    /// The model's own if none.
    pub sampler: Option<SamplerKind>,
    /// Measure how near the pictures come to the subject and how far the class drifts from what it was.
    pub scores: Option<ScoresPlan>,
}

#[derive(Clone, Debug, PartialEq)]
pub struct ScoresPlan {
    /// The class without the new word; its pictures are to stay as they were.
    pub class_prompt: String,
}

/// Of a validation: they are shown on one sheet in the end, which has to fit the memory.
const MOST_PICTURES: usize = 1000;

impl ValidationPlan {
    /// `class_prompt`: of prior preservation, if that is on.
    pub(super) fn read(section: &Reader, class_prompt: Option<&str>) -> Option<Self> {
        section.not_yet("images", "models that start from a picture are not there yet: leave this out");
        if !section.present() {
            return None;
        }
        let remedy = "write prompt = \"…\" under [validation], what the pictures are to show, or leave the section out";
        let prompts = section.one_or_more("prompt").unwrap_or_default();
        if !section.is_set("prompt") {
            section.reject_section(&format!("there is no prompt: {remedy}"));
        } else if prompts.is_empty() {
            section.reject("prompt", &format!("this is empty: {remedy}"));
        }
        let class = section.text("class_prompt");
        let wanted = section.flag("scores", false);
        if class.is_some() && !wanted {
            section.reject("class_prompt", "this is for the scores: add scores = true, or take it out");
        }
        let class = class.or(class_prompt.map(str::to_string));
        if wanted && class.is_none() {
            section.reject(
                "scores",
                "the drift of the class is measured on its pictures: write class_prompt = \"…\" under [validation], as in \"a dog\"",
            );
        }
        let num_images = section.count_within("num_images", 1, MOST_PICTURES).unwrap_or(4);
        let shown = prompts.len() + usize::from(wanted);
        if shown * num_images > MOST_PICTURES {
            section.reject(
                "num_images",
                &format!(
                    "{shown} prompts have {} pictures, and {MOST_PICTURES} are the most: lower it",
                    shown * num_images
                ),
            );
        }
        Some(Self {
            prompts,
            negative_prompt: section.text("negative_prompt").unwrap_or_default(),
            num_images,
            every: section.count("every", 1),
            steps: section.count("steps", 1).unwrap_or(25),
            guidance_scale: section.at_least_zero("guidance_scale").unwrap_or(7.5),
            seed: section.seed("seed"),
            sampler: read_sampler(section),
            scores: class.filter(|_| wanted).map(|class_prompt| ScoresPlan { class_prompt }),
        })
    }

    pub(super) fn write(&self) -> anyhow::Result<toml::Table> {
        let prompts: Vec<toml::Value> = self.prompts.iter().map(|p| p.as_str().into()).collect();
        let seed = self.seed.map(i64::try_from).transpose()?;
        Ok(Writer::default()
            .put("prompt", prompts)
            .put("negative_prompt", self.negative_prompt.clone())
            .put_count("num_images", self.num_images)
            .put_some("every", self.every.map(|n| n as i64))
            .put_count("steps", self.steps)
            .put("guidance_scale", self.guidance_scale)
            .put_some("seed", seed)
            .put_some("sampler", self.sampler.map(SamplerKind::name))
            .put("scores", self.scores.is_some())
            .put_some("class_prompt", self.scores.as_ref().map(|s| s.class_prompt.clone()))
            .finish())
    }
}

/// `sampler`, in whatever section it stands.
pub(super) fn read_sampler(section: &Reader) -> Option<SamplerKind> {
    match section.text("sampler")?.parse() {
        Ok(kind) => Some(kind),
        Err(error) => {
            section.reject("sampler", &format!("{error}"));
            None
        }
    }
}
