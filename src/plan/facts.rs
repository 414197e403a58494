//! What the planner knows of a run before it begins: its segments with their sizes, what they take and compute, and the
//! networks beside them. From configurations alone; no weight is read.

use std::sync::Arc;

use anyhow::Result;
use candle_core::DType;

use super::dry::{self, Given, Measured};
use crate::config::{MixedPrecision, RunPlan};
use crate::device::Tally;
use crate::kernels::{Dry, product};
use crate::model::{self, Conditioning, Denoiser};
use crate::pipeline::Configs;
use crate::segment::{SegmentGraph, SlotId, compute_on};

/// A segment that trains, or is in front of one that does.
#[derive(Clone, Debug)]
pub struct SegmentFacts {
    pub name: String,
    /// Elements of its bucket before padding to the ranks.
    pub len: usize,
    /// Where its small tensors begin.
    pub small_from: usize,
    pub trains: bool,
    pub inputs: Vec<SlotId>,
    pub outputs: Vec<SlotId>,
    pub measured: Measured,
}

impl SegmentFacts {
    /// Elements with the padding for so many ranks.
    pub fn padded_len(&self, world_size: usize) -> usize {
        self.len.next_multiple_of(crate::device::BLOCK * world_size)
    }
}

/// A network that is only run.
#[derive(Clone, Debug, Default)]
pub struct FrozenFacts {
    /// Of its weights at rest, in bytes.
    pub weights: usize,
    /// For each segment: bytes of its weights, and of the next one's, where they are read from their files as they are used;
    /// and the most that activations take meanwhile.
    pub turns: Vec<[usize; 3]>,
    pub flops: f64,
}

/// A run's graph and surroundings, for one rank.
#[derive(Clone, Debug)]
pub struct Facts {
    pub dtype: DType,
    /// Parameters that train, without padding.
    pub parameters: usize,
    /// Rows of a micro-batch on the rank that has most.
    pub rows: usize,
    pub segments: Vec<SegmentFacts>,
    /// Bytes of the value of each slot.
    pub slots: Vec<usize>,
    /// Slots that the caller fills.
    pub given: Vec<SlotId>,
    pub prediction: SlotId,
    /// Bytes that the compute threads keep as scratch, beside what is counted as activations.
    pub scratch: usize,
    /// Bytes of what a micro-batch holds beside its tensors: rows, targets.
    pub around: usize,
    /// Bytes of the latents and pictures that are kept from their first use on.
    pub kept: usize,
    /// Bytes that reading, decoding and resizing the largest picture takes.
    pub decoding: usize,
    pub encoder: FrozenFacts,
    /// Making a picture in the course of the run: bytes of the decoder's weights, and activations at most.
    pub validation: Option<[usize; 2]>,
}

/// What a rank has on the heap beside tensors, in bytes: buffers of the files that it writes, tables, messages. Seen to
/// be 40 to 60 KiB in small networks, which alone would notice.
const BOOKKEEPING: usize = 48 << 10;

/// What is known of a run beside its configuration.
#[derive(Clone, Copy, Debug)]
pub struct Surroundings {
    /// Tokens of a prompt.
    pub tokens: usize,
    /// The most items that one rank gets of a micro-batch, however large `batch_size` is: there are no more.
    pub items: usize,
    /// Pictures whose latents are kept, and bytes of the pictures that are kept.
    pub latents_kept: usize,
    pub pictures_bytes: usize,
    /// Bytes that decoding the largest of the pictures takes.
    pub decoding: usize,
}

/// What a plan computes in.
pub fn compute_dtype(plan: &RunPlan) -> DType {
    match plan.train.mixed_precision {
        MixedPrecision::No => DType::F32,
        MixedPrecision::Bf16 => DType::BF16,
        MixedPrecision::Fp16 => DType::F16,
    }
}

impl Facts {
    /// Runs every segment dry at the run's own batch and resolution, on the kind of GPU that ops launch kernels on, if they
    /// do.
    pub fn of(plan: &RunPlan, configs: &Configs, around: Surroundings, kernels: Option<Dry>) -> Result<Facts> {
        let facts = || Facts::here(plan, configs, around);
        let Some(gpu) = kernels else { return facts() };
        let facts = compute_on(Arc::new(gpu), facts)?;
        Ok(Facts { scratch: facts.scratch + product::scratch_bytes(gpu.capability), ..facts })
    }

    fn here(plan: &RunPlan, configs: &Configs, around: Surroundings) -> Result<Facts> {
        let dtype = compute_dtype(plan);
        let text = plan.model.train_text_encoder.then_some(&configs.text);
        let mask = plan.data.text_encoder_use_attention_mask;
        let Denoiser { graph, slots } = model::denoiser(&configs.unet, text, mask, dtype);
        let rows = plan.train.batch_size.min(around.items) * if plan.prior.is_some() { 2 } else { 1 };
        let side = plan.data.resolution / configs.vae.downscale();
        let latent = configs.unet.in_channels * side * side;
        let given = |rows: usize| {
            let mut given = vec![
                Given { slot: slots.sample, shape: vec![rows, configs.unet.in_channels, side, side], dtype },
                Given { slot: slots.time_features, shape: vec![rows, configs.unet.levels[0].channels], dtype },
            ];
            given.extend(text_given(plan, configs, &slots.conditioning, around.tokens, rows, dtype));
            given
        };
        let (measured, mut scratch) = dry::forward_and_back_of(&graph, dtype, rows, given, slots.prediction)?;
        let given = given(rows);
        let (encoder, left_out) = encoder(plan, configs)?;
        scratch.join_scratch(&left_out);
        let validation = match &plan.validation {
            Some(_) => Some(self::validation(plan, configs, &graph, &slots, around.tokens, dtype)?),
            None => None,
        };
        let mut sizes = vec![0; graph.slot_names.len()];
        for input in &given {
            sizes[input.slot] = input.bytes();
        }
        let segments: Vec<SegmentFacts> = graph.nodes.iter().zip(measured).map(|(n, m)| segment(n, m)).collect();
        for segment in &segments {
            segment.outputs.iter().zip(&segment.measured.outputs).for_each(|(&slot, &bytes)| sizes[slot] = bytes);
        }
        let moments = 8 * configs.vae.latent_channels * side * side;
        Ok(Facts {
            dtype,
            parameters: graph.nodes.iter().filter(|n| n.grads.is_some()).map(|n| n.params.layout().parameters()).sum(),
            rows,
            segments,
            slots: sizes,
            given: given.iter().map(|input| input.slot).collect(),
            prediction: slots.prediction,
            scratch: scratch.scratch_bytes(),
            // Samples and targets as fp32, and the sample's copy on its way into a tensor.
            around: 12 * rows * latent + BOOKKEEPING,
            kept: around.latents_kept * moments + around.pictures_bytes,
            decoding: around.decoding,
            encoder,
            validation,
        })
    }

    /// Parameters and padding, of all segments that train.
    pub fn trained(&self) -> usize {
        self.segments.iter().filter(|s| s.trains).map(|s| s.len).sum()
    }

    /// Floating-point operations of one micro-batch: forward, and backward without running anything again.
    pub fn flops(&self) -> [f64; 2] {
        let sum = |of: fn(&Measured) -> f64| self.segments.iter().map(|s| of(&s.measured)).sum();
        [sum(|m| m.plain.flops), sum(|m| m.pull.flops)]
    }
}

fn segment(node: &crate::segment::Node, measured: Measured) -> SegmentFacts {
    let layout = node.params.layout();
    SegmentFacts {
        name: node.name.clone(),
        len: layout.len,
        small_from: layout.small_from,
        trains: node.grads.is_some(),
        inputs: node.inputs.clone(),
        outputs: node.outputs.clone(),
        measured,
    }
}

/// The text's part of a micro-batch.
fn text_given(
    plan: &RunPlan,
    configs: &Configs,
    conditioning: &Conditioning,
    tokens: usize,
    rows: usize,
    dtype: DType,
) -> Vec<Given> {
    match conditioning {
        Conditioning::Context(slot) => {
            vec![Given { slot: *slot, shape: vec![rows, tokens, configs.unet.cross_attention_dim], dtype }]
        }
        Conditioning::Prompts(slots) => {
            let own = if plan.data.captions { plan.train.batch_size } else { 1 };
            let dropped = usize::from(plan.data.captions && plan.data.caption_dropout > 0.0 && own < rows);
            let unique = own + usize::from(plan.prior.is_some()) + dropped;
            let mut given = vec![
                Given { slot: slots.token_ids, shape: vec![unique, tokens], dtype: DType::U32 },
                Given { slot: slots.rows, shape: vec![rows], dtype: DType::U32 },
            ];
            given.extend(slots.key_lengths.map(|slot| Given { slot, shape: vec![unique], dtype: DType::U32 }));
            given
        }
    }
}

fn weights(graph: &SegmentGraph, dtype: DType) -> usize {
    let len = |n: &crate::segment::Node| n.params.layout().padded_len(1);
    graph.nodes.iter().map(len).sum::<usize>() * dtype.size_in_bytes()
}

/// The VAE's encoder, one picture at a time, in the run's precision.
fn encoder(plan: &RunPlan, configs: &Configs) -> Result<(FrozenFacts, Tally)> {
    let encoder = model::vae_encoder(&configs.vae);
    let side = plan.data.resolution;
    let dtype = compute_dtype(plan);
    let pixels = Given { slot: encoder.pixels, shape: vec![1, 3, side, side], dtype };
    let (activations, tally) = dry::forward_only(&encoder.graph, dtype, &[pixels])?;
    let bytes = dtype.size_in_bytes();
    let size = |i: usize| encoder.graph.nodes.get(i).map_or(0, |n| bytes * n.params.layout().padded_len(1));
    let turns = activations.iter().enumerate().map(|(i, &activations)| [size(i), size(i + 1), activations]).collect();
    Ok((FrozenFacts { weights: weights(&encoder.graph, dtype), turns, flops: tally.flops }, tally))
}

/// The most that making a picture takes: with guidance the network runs over two rows for each picture; then the
/// decoder, whose weights are there meanwhile.
fn validation(
    plan: &RunPlan,
    configs: &Configs,
    graph: &SegmentGraph,
    slots: &model::DenoiserSlots,
    tokens: usize,
    dtype: DType,
) -> Result<[usize; 2]> {
    let side = plan.data.resolution / configs.vae.downscale();
    let prompts =
        plan.validation.as_ref().map_or(1, |v| (v.prompts.len() + usize::from(v.scores.is_some())) * v.num_images);
    let rows = 2 * plan.train.batch_size.min(prompts);
    let mut given = vec![
        Given { slot: slots.sample, shape: vec![rows, configs.unet.in_channels, side, side], dtype },
        Given { slot: slots.time_features, shape: vec![rows, configs.unet.levels[0].channels], dtype },
    ];
    given.extend(match &slots.conditioning {
        Conditioning::Context(slot) => {
            vec![Given { slot: *slot, shape: vec![rows, tokens, configs.unet.cross_attention_dim], dtype }]
        }
        Conditioning::Prompts(slots) => vec![
            Given { slot: slots.token_ids, shape: vec![rows, tokens], dtype: DType::U32 },
            Given { slot: slots.rows, shape: vec![rows], dtype: DType::U32 },
        ],
    });
    if let Conditioning::Prompts(model::TextSlots { key_lengths: Some(slot), .. }) = slots.conditioning {
        given.push(Given { slot, shape: vec![rows], dtype: DType::U32 });
    }
    let (denoising, _) = dry::forward_only(graph, dtype, &given)?;
    let decoder = model::vae_decoder(&configs.vae);
    let decoder_dtype = if configs.vae.force_upcast { DType::F32 } else { dtype };
    let latents =
        Given { slot: decoder.latents, shape: vec![1, configs.vae.latent_channels, side, side], dtype: decoder_dtype };
    let (decoding, _) = dry::forward_only(&decoder.graph, decoder_dtype, &[latents])?;
    let activations = denoising.into_iter().chain(decoding).max().unwrap_or(0);
    Ok([weights(&decoder.graph, decoder_dtype), activations])
}
