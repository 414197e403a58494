//! What a command line asks for, checked as a whole: nothing is started or written before.

use std::path::PathBuf;

use anyhow::Result;
use candle_core::DType;

use super::latents;
use super::model::{Model, Opened};
use super::output;
use super::prompts::Prompts;
use crate::Refusal;
use crate::cli::{SampleArgs, SampleDevice, SampleDtype, VaeTiling};
use crate::config::DeviceKind;
use crate::data::Tokens;
use crate::sample::{GivenNoise, Settings, Tiling};
use crate::zero::Stage;

/// Pictures to make, and everything it takes but the ranks.
pub struct Plan {
    pub model: Model,
    pub opened: Opened,
    pub prompts: Prompts,
    /// Of each of the prompts' texts.
    pub tokens: Vec<Tokens>,
    pub settings: Settings,
    /// In pixels: height, width.
    pub size: (usize, usize),
    pub seed: Option<u64>,
    /// In place of drawn numbers.
    pub given: Option<GivenNoise>,
    latents: Option<PathBuf>,
    pub device: DeviceKind,
    /// What the networks compute in.
    pub dtype: DType,
    pub stage: Stage,
    pub tiling: Tiling,
    pub out: PathBuf,
    pub grid: bool,
    pub save_latents: bool,
    /// What is not wrong but worth knowing.
    pub notes: Vec<String>,
}

/// Most of a picture's side, in pixels; beyond lies a slip of the finger.
const LONGEST_SIDE: usize = 1 << 14;

impl Plan {
    /// Checks the request for `world_size` ranks. Fetches the model if it is on the Hub, and writes nothing else; a
    /// request with anything wrong is a [`Refusal`] with what is wrong.
    pub fn check(args: &SampleArgs, world_size: usize) -> Result<Plan> {
        refuse_alone(args)?;
        let prompts = Prompts::read(args)?;
        output::check(&args.out, args.overwrite)?;
        let (device, dtype) = (device(args)?, dtype(args));
        let model = Model::find(&args.model, args.variant.as_deref(), args.revision.as_deref())?;
        let opened = model.open()?;
        let (settings, size) = settings(args, &opened)?;
        if args.grid {
            output::check_grid(prompts.pictures.len(), prompts.rows, size)?;
        }
        let (tokens, mut notes) = prompts.tokens(&opened.tokenizer, args.cut_prompts)?;
        if !settings.guided() && !args.negative_prompts.is_empty() {
            notes.push(format!(
                "--negative-prompt has no effect with --guidance {}: guidance begins above 1",
                settings.guidance_scale
            ));
        }
        let given = given(args, &opened, &prompts, &settings)?;
        Ok(Plan {
            model,
            prompts,
            tokens,
            settings,
            size,
            seed: args.seed,
            given,
            latents: args.latents.clone(),
            device,
            dtype,
            stage: stage(args, world_size),
            tiling: match args.vae_tiling {
                VaeTiling::Auto => Tiling::Auto,
                VaeTiling::On => Tiling::On,
                VaeTiling::Off => Tiling::Off,
            },
            out: args.out.clone(),
            grid: args.grid,
            save_latents: args.save_latents,
            notes,
            opened,
        })
    }

    /// The file that the start was read from.
    pub fn latents_name(&self) -> String {
        self.latents.as_ref().map_or(String::new(), |path| path.display().to_string())
    }

    pub fn dtype_name(&self) -> &'static str {
        match self.dtype {
            DType::BF16 => "bf16",
            DType::F16 => "fp16",
            _ => "fp32",
        }
    }
}

/// What can be refused without looking at any file.
fn refuse_alone(args: &SampleArgs) -> Result<()> {
    let mut problems = Vec::new();
    if args.lora.is_some() {
        problems.push("--lora: adding a LoRA to a model is not there yet: leave the option out".to_string());
    }
    if !args.guidance.is_finite() {
        problems.push(format!("--guidance {}: name a number, such as 7.5", args.guidance));
    }
    if !(0.0..=1.0).contains(&args.guidance_rescale) {
        problems.push(format!("--guidance-rescale {}: it must lie in 0 … 1, such as 0.7", args.guidance_rescale));
    }
    if let Some(Err(error)) = args.sampler.as_ref().map(|name| name.parse::<crate::diffusion::sampler::SamplerKind>()) {
        problems.push(format!("--sampler: {error}"));
    }
    for (option, side) in [("--height", args.height), ("--width", args.width)] {
        if let Some(side) = side
            && (side == 0 || !side.is_multiple_of(8) || side > LONGEST_SIDE)
        {
            let near = (side.min(LONGEST_SIDE) / 8 * 8).max(8);
            problems
                .push(format!("{option} {side}: it must be a multiple of 8, at most {LONGEST_SIDE}, such as {near}"));
        }
    }
    if problems.is_empty() { Ok(()) } else { Err(Refusal { problems }.into()) }
}

fn settings(args: &SampleArgs, opened: &Opened) -> Result<(Settings, (usize, usize))> {
    let (unet, vae) = (&opened.configs.unet, &opened.configs.vae);
    let sampler = match &args.sampler {
        Some(name) => name.parse()?,
        None => opened.scheduler.default_kind()?,
    };
    let own = Settings::of(sampler, unet);
    let side = |asked: Option<usize>, own: usize| asked.unwrap_or(own * vae.downscale());
    let size = (side(args.height, own.height), side(args.width, own.width));
    let settings = Settings {
        steps: args.steps.get(),
        guidance_scale: args.guidance,
        guidance_rescale: args.guidance_rescale,
        batch_size: args.batch_size.get(),
        ..own.with_size(size.0, size.1, vae)?
    };
    // What the sampler itself has against the request is said now.
    opened.scheduler.build(settings.sampler, settings.steps)?;
    Ok((settings, size))
}

/// `--latents`, read for the pictures that are asked for.
fn given(args: &SampleArgs, opened: &Opened, prompts: &Prompts, settings: &Settings) -> Result<Option<GivenNoise>> {
    let Some(file) = &args.latents else { return Ok(None) };
    let sampler = opened.scheduler.build(settings.sampler, settings.steps)?;
    let stochastic = (0..sampler.timesteps().len()).filter(|&call| sampler.wants_noise(call)).count();
    let shape = [prompts.pictures.len(), opened.configs.unet.in_channels, settings.height, settings.width];
    latents::read(file, shape, stochastic).map(Some)
}

fn stage(args: &SampleArgs, world_size: usize) -> Stage {
    let default = if world_size > 1 { Stage::Parameters } else { Stage::Replicated };
    args.stage.and_then(Stage::from_number).unwrap_or(default)
}

fn device(args: &SampleArgs) -> Result<DeviceKind> {
    Ok(match (args.device, crate::device::gpu(0)) {
        (SampleDevice::Cpu, _) | (SampleDevice::Auto, Err(_)) => DeviceKind::Cpu,
        (SampleDevice::Auto | SampleDevice::Cuda, Ok(_)) => DeviceKind::Cuda,
        (SampleDevice::Cuda, Err(why)) => {
            return Err(Refusal::error(format!("--device cuda: {why}. cpu and auto work everywhere")));
        }
    })
}

fn dtype(args: &SampleArgs) -> DType {
    match args.dtype {
        SampleDtype::Fp32 => DType::F32,
        SampleDtype::Bf16 => DType::BF16,
        SampleDtype::Fp16 => DType::F16,
    }
}
