//! The class images that prior preservation lacks, made by the model as it is before training, by all ranks together.
//!
//! Files are named as the peer names them: number, SHA-1 of the pixels. A picture is a function of (seed, number), each
//! file is whole or absent, and what is missing is found by looking: so a run that was killed at any moment goes on
//! with just the missing ones.

use std::collections::HashSet;
use std::fs::{self, File};
use std::io::{BufWriter, Write};
use std::path::Path;

use anyhow::{Context, Result};
use candle_core::DType;
use image::RgbImage;
use image::codecs::jpeg::JpegEncoder;
use sha1::{Digest, Sha1};

use super::arrange::{self, Formats};
use super::setup;
use crate::comm::{Communicator, CommunicatorExt, SliceMut};
use crate::config::{PriorPlan, RunPlan};
use crate::data::{self, ClipTokenizer};
use crate::device::Hardware;
use crate::diffusion::sampler::SamplerConfig;
use crate::launch::{Event, Rank};
use crate::model;
use crate::optim::StateKind;
use crate::pipeline::{Configs, Frozen, PipelineWeights, Prompts};
use crate::plan::Decision;
use crate::sample::{Decoder, Ending, Noise, Picture, Request, Sampling, Settings, Tiling};
use crate::segment::SegmentGraph;
use crate::zero::{ParamStore, Placement, Ranks, Tiers};

/// Of the JPEG files: what they lose is below what the VAE does.
const QUALITY: u8 = 95;
/// What a file is called while it is written; hidden, so that no data set takes it for a picture.
const ASIDE: &str = ".writing-";

/// Makes the class images that are missing, if any. A collective.
pub fn complete(
    plan: &RunPlan,
    decision: &Decision,
    model_dir: &Path,
    rank: &Rank,
    hardware: &Hardware,
) -> Result<Ending> {
    let Some(prior) = &plan.prior else { return Ok(Ending::Done) };
    let comm = &*rank.communicator;
    let missing = agree_on_missing(prior, comm)?;
    if missing.is_empty() {
        return Ok(Ending::Done);
    }
    let dir = prior.class_dir.display();
    let said = format!("making {} pictures of {:?} in {dir}", missing.len(), prior.class_prompt);
    rank.events.send(&Event::Message(said));
    let ending = make(plan, decision, &missing, model_dir, rank, hardware).context("making the class images")?;
    if ending == Ending::Done {
        // What a rank of a killed run may still have begun meanwhile.
        let cleared = if comm.rank() == 0 { clear_aside(&prior.class_dir) } else { Ok(()) };
        comm.agree(cleared)?;
        rank.events.send(&Event::Message(format!("{} class images are in {dir}", prior.num_class_images)));
    }
    Ok(ending)
}

/// The numbers of the pictures to make, as rank 0 sees the folder; it also clears away what was being written when
/// another run was killed. A collective.
fn agree_on_missing(prior: &PriorPlan, comm: &dyn Communicator) -> Result<Vec<u64>> {
    let mut there = vec![0u8; prior.num_class_images];
    let looked = if comm.rank() == 0 { look(prior, &mut there) } else { Ok(()) };
    comm.agree(looked)?;
    comm.broadcast(SliceMut::U8(&mut there), 0)?;
    Ok((0..).zip(&there).filter(|(_, there)| **there == 0).map(|(number, _)| number).collect())
}

/// Removes what was being written.
fn clear_aside(dir: &Path) -> Result<()> {
    for entry in fs::read_dir(dir).with_context(|| dir.display().to_string())?.flatten() {
        if entry.file_name().to_string_lossy().starts_with(ASIDE) {
            let _ = fs::remove_file(entry.path());
        }
    }
    Ok(())
}

/// Marks the numbers whose pictures are there. Pictures of other names stand for the first numbers.
fn look(prior: &PriorPlan, there: &mut [u8]) -> Result<()> {
    let dir = &prior.class_dir;
    fs::create_dir_all(dir).with_context(|| format!("creating {}", dir.display()))?;
    clear_aside(dir)?;
    let pictures = data::list_pictures(dir, false).with_context(|| dir.display().to_string())?;
    let numbers: Vec<Option<u64>> = pictures.iter().map(|path| number(path)).collect();
    let mut seen = HashSet::new();
    let own: Vec<u64> = numbers.iter().flatten().copied().filter(|n| seen.insert(*n)).collect();
    let mut marked = 0;
    for number in own {
        if let Some(mark) = there.get_mut(number as usize) {
            *mark = 1;
            marked += 1;
        }
    }
    // As many more as there are pictures that have none of these numbers.
    let others = pictures.len() - marked;
    there.iter_mut().filter(|mark| **mark == 0).take(others).for_each(|mark| *mark = 1);
    Ok(())
}

/// The number in a file's name, if it is one of ours (or of the peer's).
fn number(path: &Path) -> Option<u64> {
    let name = path.file_name()?.to_str()?;
    let (number, hash) = name.strip_suffix(".jpg")?.split_once('-')?;
    let is_hash = hash.len() == 40 && hash.bytes().all(|b| b.is_ascii_hexdigit());
    is_hash.then(|| number.parse().ok()).flatten()
}

fn make(
    plan: &RunPlan,
    decision: &Decision,
    missing: &[u64],
    model_dir: &Path,
    rank: &Rank,
    hardware: &Hardware,
) -> Result<Ending> {
    let Some(prior) = &plan.prior else { return Ok(Ending::Done) };
    let configs = Configs::read(model_dir)?;
    let weights = PipelineWeights::open(model_dir, plan.model.variant.as_deref().unwrap_or(""))?;
    let compute = setup::compute(plan, hardware);
    let scheduler = SamplerConfig::read(&model_dir.join("scheduler/scheduler_config.json"))?;
    let prompts = {
        let tokenizer = ClipTokenizer::open(&model_dir.join("tokenizer"), None)?;
        let tokens = vec![tokenizer.encode(&prior.class_prompt)?, tokenizer.encode("")?];
        let encoder = model::text_encoder(&configs.text, false, DType::F32);
        let frozen = Frozen::load(encoder.graph, DType::F32, &Tiers::on(hardware)?, &weights)?;
        Prompts::encode(&frozen, &encoder.slots, &tokens, &compute)?
    };
    let denoiser = model::denoiser(&configs.unet, None, false, compute.dtype);
    let ranks = Ranks { comm: rank.communicator.clone(), stage: decision.zero_stage(), reduce_dtype: DType::F32 };
    let segments = denoiser.graph.nodes.iter().map(|n| (&n.params, None));
    let tiers = tiers(plan, decision, &denoiser.graph, &ranks, compute.dtype, hardware);
    let store = ParamStore::load(&ranks, compute.dtype, &rank.communicator.agree(tiers)?, segments, &weights)?;
    let mut decoder = Decoder::load(&configs.vae, &weights, &compute, Tiers::on(hardware)?, Tiling::Auto)?;
    let kind = match prior.sampler {
        Some(kind) => kind,
        None => scheduler.default_kind()?,
    };
    let side = plan.data.resolution;
    let settings = Settings {
        steps: prior.steps,
        guidance_scale: prior.guidance_scale,
        batch_size: prior.sample_batch_size,
        ..Settings::of(kind, &configs.unet).with_size(side, side, &configs.vae)?
    };
    let pictures: Vec<Picture> = missing.iter().map(|&number| Picture { number, prompt: 0, negative: 1 }).collect();
    let noise = Noise::from_seed(plan.train.seed.unwrap_or(0));
    let request = Request { pictures: &pictures, prompts: &prompts, settings, noise: &noise };
    let sampling = Sampling {
        graph: &denoiser.graph,
        store: &store,
        slots: denoiser.slots,
        unet: &configs.unet,
        compute: &compute,
        scheduler: &scheduler,
        rank,
    };
    sampling.pictures(&request, &mut decoder, |made| write(&prior.class_dir, made.picture.number, &made.image))
}

/// Parameters rest where the training's will.
fn tiers(
    plan: &RunPlan,
    decision: &Decision,
    graph: &SegmentGraph,
    ranks: &Ranks,
    compute: DType,
    hardware: &Hardware,
) -> Result<Tiers> {
    let placement = Placement { parameters: decision.placement.parameters, ..Placement::DEVICE };
    let limit = |bytes: Option<u64>| bytes.map(|bytes| bytes as usize);
    let memory = hardware.memory(limit(decision.device_limit), limit(decision.host_limit));
    let formats = Formats { compute, master: DType::F32, gradients: DType::F32, state: StateKind::F32 };
    arrange::tiers(graph, ranks, placement, formats, &memory, plan.zero.nvme_dir.as_deref())
}

/// Writes a class image under the peer's name, whole or not at all.
fn write(dir: &Path, number: u64, image: &RgbImage) -> Result<()> {
    let hash: String = Sha1::digest(image.as_raw()).iter().map(|byte| format!("{byte:02x}")).collect();
    let path = dir.join(format!("{number}-{hash}.jpg"));
    let aside = dir.join(format!("{ASIDE}{number}-{hash}.jpg"));
    let write = || -> Result<()> {
        let mut out = BufWriter::new(File::create(&aside)?);
        JpegEncoder::new_with_quality(&mut out, QUALITY).encode_image(image)?;
        out.flush()?;
        out.into_inner().map_err(|error| error.into_error())?.sync_all()?;
        Ok(fs::rename(&aside, &path)?)
    };
    write().with_context(|| format!("writing {}", path.display()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::data::{DatasetOptions, Footprint, Interpolation, Row};
    use std::path::PathBuf;

    fn missing(files: &[&str], wanted: usize) -> Vec<u64> {
        let home = tempfile::tempdir().unwrap();
        files.iter().for_each(|name| fs::write(home.path().join(name), "x").unwrap());
        let prior = PriorPlan {
            class_dir: home.path().to_path_buf(),
            class_prompt: String::new(),
            num_class_images: wanted,
            sample_batch_size: 1,
            loss_weight: 1.0,
            steps: 1,
            guidance_scale: 1.0,
            sampler: None,
        };
        agree_on_missing(&prior, &crate::comm::Solo).unwrap()
    }

    #[test]
    fn what_is_missing_is_found_by_looking() {
        let hash = "0123456789012345678901234567890123456789";
        let named = |n: u64| format!("{n}-{hash}.jpg");
        assert_eq!(missing(&[], 3), [0, 1, 2]);
        assert_eq!(missing(&[&named(1)], 3), [0, 2]);
        assert_eq!(missing(&[&named(2), "a.png"], 4), [1, 3]);
        assert_eq!(missing(&["a.png", "b.png", "c.png"], 2), [0u64; 0]);
        // More than wanted, of a run that wanted more.
        assert_eq!(missing(&[&named(7), &named(0)], 3), [2]);
        assert_eq!(missing(&[&format!("{ASIDE}{}", named(0))], 1), [0]);
        assert_eq!(number(Path::new(&format!("x/12-{hash}.jpg"))), Some(12));
        assert_eq!(number(Path::new("x/12-photo.jpg")), None);
    }

    #[test]
    fn a_file_is_named_by_its_pixels() {
        let home = tempfile::tempdir().unwrap();
        write(home.path(), 3, &RgbImage::new(1, 1)).unwrap();
        let name = fs::read_dir(home.path()).unwrap().next().unwrap().unwrap().file_name();
        assert_eq!(name.to_str(), Some("3-29e2dcfbb16f63bb0254df7585a15bb6fb5e927d.jpg"));
        assert_eq!(image::open(home.path().join(name)).unwrap().width(), 1);
    }

    /// Or a run would refuse pictures that it has just made.
    #[test]
    fn no_file_takes_more_than_was_planned_before_it_was_made() {
        for side in [8, 64, 256] {
            let options = DatasetOptions {
                instance_dir: PathBuf::new(),
                captions: None,
                class: None,
                resolution: side,
                center_crop: false,
                random_flip: false,
                interpolation: Interpolation::Bilinear,
                keep_bytes: 0,
                verify: false,
                decode_bytes: None,
            };
            let planned = Footprint::of_made(&options, Row::Class);
            let mut state = 1u64;
            // Nothing but black and white: no picture's file is larger.
            let mut noise = |_, _| {
                image::Rgb([0u8; 3].map(|_| {
                    state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
                    if state >> 63 == 0 { 0 } else { 255 }
                }))
            };
            let pictures =
                [RgbImage::new(side as u32, side as u32), RgbImage::from_fn(side as u32, side as u32, &mut noise)];
            for picture in pictures {
                let home = tempfile::tempdir().unwrap();
                write(home.path(), 0, &picture).unwrap();
                let path = fs::read_dir(home.path()).unwrap().next().unwrap().unwrap().path();
                let held = Footprint::read(&path, &options, Row::Class).unwrap();
                assert!(held.decoding <= planned.decoding, "{side}: {held:?}, {planned:?}");
                assert_eq!((held.resized, held.kept), (planned.resized, planned.kept));
            }
        }
    }
}
