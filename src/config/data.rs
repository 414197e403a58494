//! `[data]` and `[prior]`: the photographs, their prompts and how they are prepared.

use std::path::PathBuf;

use super::plan::{Toggle, Writer};
use super::reader::Reader;
use super::validation::read_sampler;
use crate::data::Interpolation;
use crate::diffusion::sampler::SamplerKind;

#[derive(Clone, Debug, PartialEq)]
pub struct DataPlan {
    pub instance_dir: PathBuf,
    /// The prompt of every photograph; with captions, of those that have none. Empty with captions if not given.
    pub instance_prompt: String,
    /// Each photograph has a caption of its own, in `metadata.jsonl` or a text file beside it.
    pub captions: bool,
    /// The column of `metadata.jsonl` that holds the captions.
    pub caption_column: String,
    /// How often a row is trained with the empty prompt instead of its own, so that guidance has something to lead
    /// away from.
    pub caption_dropout: f64,
    /// Side of the square training images in pixels; a multiple of 8.
    pub resolution: usize,
    /// Crop the middle instead of at random.
    pub center_crop: bool,
    /// Mirror half of the images.
    pub random_flip: bool,
    pub interpolation: Interpolation,
    /// Token ids per prompt; the tokenizer's own maximum if none.
    pub tokenizer_max_length: Option<usize>,
    /// Encode the prompts once, before training.
    pub precompute_text_embeddings: bool,
    /// Give the text encoder the tokenizer's mask, so that padding is not attended to there.
    pub text_encoder_use_attention_mask: bool,
    /// Keep the VAE's posterior of images that come out the same every time (no random crop or flip).
    pub cache_latents: Toggle,
}

const FILTERS: [(&str, Interpolation); 7] = [
    ("bilinear", Interpolation::Bilinear),
    ("bicubic", Interpolation::Bicubic),
    ("box", Interpolation::Box),
    ("hamming", Interpolation::Hamming),
    ("lanczos", Interpolation::Lanczos),
    ("nearest", Interpolation::Nearest),
    // Pillow, which the peers resize with, has one nearest filter.
    ("nearest_exact", Interpolation::Nearest),
];

impl DataPlan {
    pub(super) fn read(section: &Reader) -> Self {
        let instance_dir = section
            .required_path("instance_dir", "write instance_dir = \"…\" under [data], the folder with your photographs");
        let captions = section.flag("captions", false);
        let instance_prompt = match captions {
            true => section.text("instance_prompt").unwrap_or_default(),
            false => section.required_text(
                "instance_prompt",
                "write instance_prompt = \"…\" under [data], with a rare word for your subject, as in \"a photo of sks dog\", \
                 or captions = true if the pictures have captions",
            ),
        };
        if !captions && section.is_set("caption_column") {
            section.reject("caption_column", "this is read with captions = true only: add that, or take this out");
        }
        let resolution = section.count("resolution", 8).unwrap_or(512);
        if !resolution.is_multiple_of(8) || resolution > 16384 {
            let lower = (resolution.min(16384) / 8) * 8;
            section.reject(
                "resolution",
                &format!(
                    "it must be a multiple of 8 from 8 to 16384, as latents have an eighth of the size: try {lower}"
                ),
            );
        }
        Self {
            instance_dir,
            instance_prompt,
            captions,
            caption_column: section.text("caption_column").unwrap_or_else(|| "text".to_string()),
            caption_dropout: section
                .number("caption_dropout", "at least 0 and below 1", |rate| (0.0..1.0).contains(&rate))
                .unwrap_or(0.0),
            resolution,
            center_crop: section.flag("center_crop", false),
            random_flip: section.flag("random_flip", false),
            interpolation: section.choice(
                "image_interpolation",
                Interpolation::Bilinear,
                &FILTERS.map(|(name, filter)| (name, Ok(filter))),
            ),
            // A begin and an end token at least.
            tokenizer_max_length: section.count("tokenizer_max_length", 2),
            precompute_text_embeddings: section.flag("precompute_text_embeddings", false),
            text_encoder_use_attention_mask: section.flag("text_encoder_use_attention_mask", false),
            cache_latents: section.toggle("cache_latents"),
        }
    }

    pub(super) fn write(&self) -> toml::Table {
        let filter = FILTERS.iter().find(|(_, filter)| *filter == self.interpolation).map(|(name, _)| *name);
        Writer::default()
            .put_path("instance_dir", &self.instance_dir)
            .put("instance_prompt", self.instance_prompt.clone())
            .put("captions", self.captions)
            .put_some("caption_column", self.captions.then(|| self.caption_column.clone()))
            .put("caption_dropout", self.caption_dropout)
            .put_count("resolution", self.resolution)
            .put("center_crop", self.center_crop)
            .put("random_flip", self.random_flip)
            .put_some("image_interpolation", filter)
            .put_some("tokenizer_max_length", self.tokenizer_max_length.map(|length| length as i64))
            .put("precompute_text_embeddings", self.precompute_text_embeddings)
            .put("text_encoder_use_attention_mask", self.text_encoder_use_attention_mask)
            .put("cache_latents", self.cache_latents.value())
            .finish()
    }
}

/// Prior preservation: images of the subject's class, so that the class is not forgotten.
#[derive(Clone, Debug, PartialEq)]
pub struct PriorPlan {
    pub class_dir: PathBuf,
    pub class_prompt: String,
    /// How many class images are wanted, and the most that are used.
    pub num_class_images: usize,
    /// Images at a time where missing ones are made.
    pub sample_batch_size: usize,
    /// Weight of the class images' loss.
    pub loss_weight: f64,
    /// How missing class images are made: steps of the sampler, guidance, and the sampler if not the model's own.
    pub steps: usize,
    pub guidance_scale: f64,
    pub sampler: Option<SamplerKind>,
}

/// More than anybody has, and few enough to be listed.
const MOST_CLASS_IMAGES: usize = 1_000_000;

impl PriorPlan {
    pub(super) fn read(section: &Reader) -> Option<Self> {
        let or_drop = "or leave out the whole section to train without prior preservation";
        section.present().then(|| Self {
            class_dir: section.required_path(
                "class_dir",
                &format!("write class_dir = \"…\" under [prior], the folder with pictures of the class, {or_drop}"),
            ),
            class_prompt: section.required_text(
                "class_prompt",
                &format!("write class_prompt = \"…\" under [prior], as in \"a photo of a dog\", {or_drop}"),
            ),
            num_class_images: section.count_within("num_class_images", 1, MOST_CLASS_IMAGES).unwrap_or(100),
            sample_batch_size: section.count("sample_batch_size", 1).unwrap_or(4),
            loss_weight: section.at_least_zero("loss_weight").unwrap_or(1.0),
            steps: section.count("steps", 1).unwrap_or(50),
            guidance_scale: section.at_least_zero("guidance_scale").unwrap_or(7.5),
            sampler: read_sampler(section),
        })
    }

    pub(super) fn write(&self) -> toml::Table {
        Writer::default()
            .put_path("class_dir", &self.class_dir)
            .put("class_prompt", self.class_prompt.clone())
            .put_count("num_class_images", self.num_class_images)
            .put_count("sample_batch_size", self.sample_batch_size)
            .put("loss_weight", self.loss_weight)
            .put_count("steps", self.steps)
            .put("guidance_scale", self.guidance_scale)
            .put_some("sampler", self.sampler.map(SamplerKind::name))
            .finish()
    }
}
