//! The denoising loop over ranks.

use anyhow::{Context, Result, bail, ensure};
use candle_core::{DType, Tensor};

use super::decode::Decoder;
use super::request::{Ending, Made, Picture, Request, Settings};
use crate::comm::CommunicatorExt;
use crate::data::Tokens;
use crate::device::Compute;
use crate::diffusion::sampler::{LatentShape, SamplerConfig};
use crate::launch::{Event, Rank};
use crate::model::{Conditioning, DenoiserSlots, UnetConfig, time_features};
use crate::pipeline::Prompts;
use crate::segment::{Keep, SegmentGraph, Tape};
use crate::zero::{ParamStore, Partition};

/// Prompts that go through a text encoder of the graph at a time.
const PROMPTS_AT_A_TIME: usize = 16;

/// A denoising network and what it takes to make pictures with it. Parameters stream segment by segment, so this takes
/// no more of them than training does; nothing is left behind.
pub struct Sampling<'a> {
    pub graph: &'a SegmentGraph,
    pub store: &'a ParamStore,
    pub slots: DenoiserSlots,
    pub unet: &'a UnetConfig,
    pub compute: &'a Compute,
    pub scheduler: &'a SamplerConfig,
    pub rank: &'a Rank,
}

/// The text as the UNet reads it, and where the UNet begins in the graph.
struct Text {
    /// (tokens, width) for each prompt.
    states: Vec<Tensor>,
    first_segment: usize,
}

/// One batch's pictures with their places in the request; empty: a rank that only keeps the others company.
type Batch<'r> = &'r [(usize, Picture)];

impl Sampling<'_> {
    /// Makes the pictures that the request asks for, every rank its share, and hands each one over on the rank that
    /// made it, in the request's order there. A collective.
    ///
    /// # Errors
    /// Also those of `on_done`, on all ranks.
    pub fn pictures(
        &self,
        request: &Request,
        decoder: &mut Decoder,
        mut on_done: impl FnMut(Made) -> Result<()>,
    ) -> Result<Ending> {
        let comm = &*self.rank.communicator;
        let settings = &request.settings;
        ensure!(settings.batch_size > 0, "pictures are made at least one at a time");
        let Some(text) = self.text(request.prompts)? else { return Ok(Ending::Interrupted) };
        let everyone: Vec<(usize, Picture)> = request.pictures.iter().copied().enumerate().collect();
        let per_round = settings.batch_size.saturating_mul(comm.world_size());
        let mut done = 0;
        for round in everyone.chunks(per_round) {
            let local = Partition::new(comm.rank(), comm.world_size()).items(round.len());
            let batch = &round[local];
            let told = Told { done, total: everyone.len() };
            let Some(latents) = self.denoise(request, &text, batch, told)? else { return Ok(Ending::Interrupted) };
            let decoded = batch.iter().zip(latents).try_for_each(|(&(index, picture), latents)| {
                let size = (settings.height, settings.width);
                let image = decoder
                    .picture(&latents, size)
                    .with_context(|| format!("picture {} cannot be decoded", picture.number))?;
                on_done(Made { picture, index, image, latents })
            });
            comm.agree(decoded)?;
            done += round.len();
            self.rank.events.send(&Event::Pictures {
                done: done as u64,
                total: everyone.len() as u64,
                call: 0,
                calls: 0,
            });
        }
        Ok(Ending::Done)
    }

    /// The final latents of a batch, picture by picture; None if a rank was told to stop. A collective: every rank calls
    /// the network equally often.
    fn denoise(&self, request: &Request, text: &Text, batch: Batch, told: Told) -> Result<Option<Vec<Vec<f32>>>> {
        let settings = &request.settings;
        let mut sampler = self.scheduler.build(settings.sampler, settings.steps)?;
        let area = settings.height * settings.width;
        let shape = LatentShape { pictures: batch.len(), channels: self.unet.in_channels, area };
        let mut sample = vec![0f32; shape.numbers()];
        fill(&mut sample, batch, |picture, index, out| request.noise.start(picture, index, out))?;
        let scale = sampler.initial_scale();
        sample.iter_mut().for_each(|x| *x *= scale);
        let context = self.context(text, batch, settings)?;
        let calls = sampler.timesteps().len();
        let mut stochastic = 0;
        for call in 0..calls {
            if self.rank.communicator.any(self.rank.interrupt.interrupted())? {
                return Ok(None);
            }
            self.rank.events.send(&told.call(call, calls));
            let time = sampler.timesteps()[call];
            let noise = match sampler.wants_noise(call) {
                true => {
                    let mut noise = vec![0f32; sample.len()];
                    fill(&mut noise, batch, |picture, index, out| request.noise.step(picture, index, stochastic, out))?;
                    stochastic += 1;
                    Some(noise)
                }
                false => None,
            };
            let Some(context) = &context else {
                self.keep_company(text.first_segment)?;
                continue;
            };
            let input = sampler.network_input(call, &sample);
            let prediction = self
                .predict(text.first_segment, settings, &input, time as f32, context)
                .with_context(|| format!("denoising at time step {time}"))?;
            sampler.step(call, &prediction, noise.as_deref(), shape, &mut sample)?;
        }
        Ok(Some(sample.chunks(shape.picture().max(1)).map(<[f32]>::to_vec).collect()))
    }

    /// The network's answer for a batch, after guidance. A collective in stage 3.
    fn predict(
        &self,
        first: usize,
        settings: &Settings,
        input: &[f32],
        time: f32,
        context: &Tensor,
    ) -> Result<Vec<f32>> {
        let (rows, _, _) = context.dims3()?;
        let copies = if settings.guided() { 2 } else { 1 };
        let device = &self.compute.device;
        let shape = (rows, self.unet.in_channels, settings.height, settings.width);
        let sample = Tensor::from_vec(input.repeat(copies), shape, device)?.to_dtype(self.compute.dtype)?;
        let features = time_features(std::iter::repeat_n(time, rows), self.unet);
        let features = Tensor::from_vec(features, (rows, self.unet.levels[0].channels), device)?;
        let mut tape = Tape::new(self.graph, Keep::Nothing);
        tape.set(self.slots.sample, sample);
        tape.set(self.slots.time_features, features.to_dtype(self.compute.dtype)?);
        tape.set(context_slot(&self.slots), context.clone());
        for (i, node) in self.graph.nodes.iter().enumerate().skip(first) {
            let _fetched = self.store.fetch(i)?;
            tape.run(i).with_context(|| format!("running {}", node.name))?;
        }
        let prediction = tape.take(self.slots.prediction)?.to_dtype(DType::F32)?.flatten_all()?.to_vec1::<f32>()?;
        if !settings.guided() {
            return Ok(prediction);
        }
        let (without, with) = prediction.split_at(prediction.len() / 2);
        let scale = settings.guidance_scale as f32;
        Ok(without.iter().zip(with).map(|(u, c)| u + scale * (c - u)).collect())
    }

    /// The same collectives in the same order, without pictures.
    fn keep_company(&self, first: usize) -> Result<()> {
        (first..self.graph.nodes.len()).try_for_each(|i| self.store.fetch(i).map(drop))
    }

    /// (rows, tokens, width): what the batch's pictures do not show if there is guidance, then what they show. None
    /// without pictures.
    fn context(&self, text: &Text, batch: Batch, settings: &Settings) -> Result<Option<Tensor>> {
        let negatives = batch.iter().filter(|_| settings.guided()).map(|(_, picture)| picture.negative);
        let prompts: Vec<usize> = negatives.chain(batch.iter().map(|(_, picture)| picture.prompt)).collect();
        let state = |&i: &usize| text.states.get(i).with_context(|| format!("there is no prompt number {i}"));
        let states = prompts.iter().map(state).collect::<Result<Vec<_>>>()?;
        if states.is_empty() { Ok(None) } else { Ok(Some(Tensor::stack(&states, 0)?)) }
    }

    /// The prompts' states: those that were given, or from the text encoder in front of the UNet, which runs over them
    /// once here and not at every call. A collective in stage 3. None if a rank was told to stop.
    fn text(&self, prompts: &Prompts) -> Result<Option<Text>> {
        let (tokens, slots) = match (prompts, &self.slots.conditioning) {
            (Prompts::Encoded(states), Conditioning::Context(_)) => {
                return Ok(Some(Text { states: states.clone(), first_segment: 0 }));
            }
            (Prompts::Tokens(tokens), Conditioning::Prompts(slots)) => (tokens, slots),
            _ => bail!("encoded prompts for a graph with a text encoder, or the reverse"),
        };
        let last = self.graph.nodes.iter().position(|node| node.outputs.contains(&slots.context));
        let first_segment = last.context("no segment of the graph writes the text's states")? + 1;
        let mut states = Vec::with_capacity(tokens.len());
        for tokens in tokens.chunks(PROMPTS_AT_A_TIME) {
            if self.rank.communicator.any(self.rank.interrupt.interrupted())? {
                return Ok(None);
            }
            // A pipeline shows its text encoder the padding, whatever the training did.
            let whole = |tokens: &Tokens| Tokens { length: tokens.ids.len(), ..tokens.clone() };
            let prompts = Prompts::Tokens(tokens.iter().map(whole).collect());
            let rows: Vec<usize> = (0..tokens.len()).collect();
            let mut tape = Tape::new(self.graph, Keep::Nothing);
            for (slot, value) in prompts.slots(&self.slots.conditioning, &rows, &self.compute.device)? {
                tape.set(slot, value);
            }
            for (i, node) in self.graph.nodes.iter().enumerate().take(first_segment) {
                let _fetched = self.store.fetch(i)?;
                tape.run(i).with_context(|| format!("running {}", node.name))?;
            }
            let context = tape.take(slots.context)?;
            states.extend((0..tokens.len()).map(|i| context.get(i)).collect::<Result<Vec<_>, _>>()?);
        }
        Ok(Some(Text { states, first_segment }))
    }
}

/// Where the UNet reads the text.
fn context_slot(slots: &DenoiserSlots) -> crate::segment::SlotId {
    match &slots.conditioning {
        Conditioning::Context(slot) => *slot,
        Conditioning::Prompts(text) => text.context,
    }
}

/// Fills a batch's numbers picture by picture.
fn fill(
    values: &mut [f32],
    batch: Batch,
    mut draw: impl FnMut(&Picture, usize, &mut [f32]) -> Result<()>,
) -> Result<()> {
    let picture_len = values.len() / batch.len().max(1);
    let parts = values.chunks_mut(picture_len.max(1));
    batch.iter().zip(parts).try_for_each(|((index, picture), out)| draw(picture, *index, out))
}

/// How far the request is, for the launcher.
#[derive(Clone, Copy)]
struct Told {
    done: usize,
    total: usize,
}

impl Told {
    fn call(self, call: usize, calls: usize) -> Event {
        let [done, total, call, calls] = [self.done, self.total, call, calls].map(|n| n as u64);
        Event::Pictures { done, total, call, calls }
    }
}
