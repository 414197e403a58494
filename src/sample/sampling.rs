//! The denoising loop over ranks.

use anyhow::{Context, Result, ensure};
use candle_core::{DType, Tensor};

use super::decode::Decoder;
use super::request::{Ending, Made, Picture, Request, Settings};
use crate::comm::CommunicatorExt;
use crate::data::Tokens;
use crate::device::{Compute, on_host};
use crate::diffusion::guide;
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
enum Text<'p> {
    Given(&'p Prompts),
    /// From the text encoder in front of the UNet.
    InFront {
        encoded: Prompts,
        first_segment: usize,
    },
}

impl Text<'_> {
    fn prompts(&self) -> &Prompts {
        match self {
            Text::Given(prompts) => prompts,
            Text::InFront { encoded, .. } => encoded,
        }
    }

    fn first_segment(&self) -> usize {
        match self {
            Text::Given(_) => 0,
            Text::InFront { first_segment, .. } => *first_segment,
        }
    }
}

/// What a call of the network is told besides the latents.
struct Call<'t> {
    time: f32,
    /// (rows, tokens, width), rows being the pictures, or twice as many under guidance.
    context: &'t Tensor,
    shape: LatentShape,
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
                self.keep_company(text.first_segment())?;
                continue;
            };
            let input = sampler.network_input(call, &sample);
            let asked = Call { time: time as f32, context, shape };
            let prediction = self
                .predict(text, settings, &asked, &input)
                .with_context(|| format!("denoising at time step {time}"))?;
            sampler.step(call, &prediction, noise.as_deref(), shape, &mut sample)?;
        }
        Ok(Some(sample.chunks(shape.picture().max(1)).map(<[f32]>::to_vec).collect()))
    }

    /// The network's answer for a batch, after guidance. A collective in stage 3.
    fn predict(&self, text: &Text, settings: &Settings, call: &Call, input: &[f32]) -> Result<Vec<f32>> {
        let (rows, _, _) = call.context.dims3()?;
        let copies = if settings.guided() { 2 } else { 1 };
        let device = &self.compute.device;
        let dims = (rows, self.unet.in_channels, settings.height, settings.width);
        let sample = Tensor::from_vec(input.repeat(copies), dims, device)?.to_dtype(self.compute.dtype)?;
        let features = time_features(std::iter::repeat_n(call.time, rows), self.unet);
        let features = Tensor::from_vec(features, (rows, self.unet.levels[0].channels), device)?;
        let mut tape = Tape::new(self.graph, Keep::Nothing);
        tape.set(self.slots.sample, sample);
        tape.set(self.slots.time_features, features.to_dtype(self.compute.dtype)?);
        tape.set(context_slot(&self.slots), call.context.clone());
        let mut parameters = self.store.walk(text.first_segment()..self.graph.nodes.len());
        for (i, node) in self.graph.nodes.iter().enumerate().skip(text.first_segment()) {
            let _fetched = parameters.fetch()?;
            tape.run(i).with_context(|| format!("running {}", node.name))?;
        }
        let prediction =
            on_host(&tape.take(self.slots.prediction)?)?.to_dtype(DType::F32)?.flatten_all()?.to_vec1::<f32>()?;
        if !settings.guided() {
            return Ok(prediction);
        }
        let (without, with) = prediction.split_at(prediction.len() / 2);
        guide(without, with, settings.guidance_scale as f32, settings.guidance_rescale as f32, call.shape)
    }

    /// The same collectives in the same order, without pictures.
    fn keep_company(&self, first: usize) -> Result<()> {
        let mut parameters = self.store.walk(first..self.graph.nodes.len());
        (first..self.graph.nodes.len()).try_for_each(|_| parameters.fetch().map(drop))
    }

    /// (rows, tokens, width): what the batch's pictures do not show if there is guidance, then what they show. None
    /// without pictures.
    fn context(&self, text: &Text, batch: Batch, settings: &Settings) -> Result<Option<Tensor>> {
        if batch.is_empty() {
            return Ok(None);
        }
        let negatives = batch.iter().filter(|_| settings.guided()).map(|(_, picture)| picture.negative);
        let prompts: Vec<usize> = negatives.chain(batch.iter().map(|(_, picture)| picture.prompt)).collect();
        let most = prompts.iter().copied().max().unwrap_or(0);
        ensure!(most < text.prompts().len(), "there is no prompt number {most}");
        let slot = Conditioning::Context(context_slot(&self.slots));
        let filled = text.prompts().slots(&slot, &prompts, &self.compute.device)?;
        Ok(filled.into_iter().next().map(|(_, context)| context))
    }

    /// The prompts' states: those that were given, or from the text encoder in front of the UNet, which runs over them
    /// once here and not at every call. A collective in stage 3. None if a rank was told to stop.
    fn text<'p>(&self, prompts: &'p Prompts) -> Result<Option<Text<'p>>> {
        let (tokens, slots) = match (prompts, &self.slots.conditioning) {
            (Prompts::Tokens(tokens), Conditioning::Prompts(slots)) => (tokens, slots),
            _ => return Ok(Some(Text::Given(prompts))),
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
            let mut parameters = self.store.walk(0..first_segment);
            for (i, node) in self.graph.nodes.iter().enumerate().take(first_segment) {
                let _fetched = parameters.fetch()?;
                tape.run(i).with_context(|| format!("running {}", node.name))?;
            }
            let context = tape.take(slots.context)?;
            for i in 0..tokens.len() {
                states.push(context.get(i)?);
            }
        }
        Ok(Some(Text::InFront { encoded: Prompts::Encoded(states), first_segment }))
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

#[cfg(test)]
mod tests {
    use std::path::Path;
    use std::sync::Arc;

    use candle_core::Device;

    use super::*;
    use crate::comm::Solo;
    use crate::data::ClipTokenizer;
    use crate::diffusion::sampler::SamplerKind;
    use crate::launch::{EventSink, Interrupt, World};
    use crate::model;
    use crate::pipeline::{Configs, Frozen, PipelineWeights};
    use crate::sample::{Noise, Tiling};
    use crate::zero::Tiers;
    use crate::zero::{Ranks, Stage};

    struct Bench {
        configs: Configs,
        weights: PipelineWeights,
        tokens: Vec<Tokens>,
        scheduler: SamplerConfig,
        compute: Compute,
        rank: Rank,
    }

    impl Bench {
        fn new(dtype: DType) -> Bench {
            let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data/models/sd15");
            let tokenizer = ClipTokenizer::open(&dir.join("tokenizer"), None).unwrap();
            let encode = |text| tokenizer.encode(text).unwrap();
            Bench {
                configs: Configs::read(&dir).unwrap(),
                weights: PipelineWeights::open(&dir, "").unwrap(),
                tokens: ["", "a photo of sks cat", "a cup of coffee"].map(encode).to_vec(),
                scheduler: SamplerConfig::read(&dir.join("scheduler/scheduler_config.json")).unwrap(),
                compute: Compute { device: Device::Cpu, dtype },
                rank: Rank {
                    world: World::solo(),
                    communicator: Arc::new(Solo),
                    events: EventSink::none(),
                    threads: 1,
                    goes_on: false,
                    interrupt: Interrupt::default(),
                },
            }
        }

        fn encoded(&self) -> Prompts {
            let encoder = model::text_encoder(&self.configs.text, false, DType::F32);
            let frozen = Frozen::load(encoder.graph, DType::F32, &Tiers::on_device().unwrap(), &self.weights).unwrap();
            let width = self.configs.text.hidden_size;
            Prompts::frozen(frozen, encoder.slots, width, self.tokens.clone(), &self.compute).unwrap()
        }

        /// Pixels and latents; `in_front`: with the text encoder in the graph.
        fn pictures(&self, pictures: &[Picture], batch_size: usize, in_front: bool) -> Vec<(Vec<u8>, Vec<f32>)> {
            let text = in_front.then_some(&self.configs.text);
            let denoiser = model::denoiser(&self.configs.unet, text, in_front, self.compute.dtype);
            let ranks = Ranks { comm: Arc::new(Solo), stage: Stage::Parameters, reduce_dtype: DType::F32 };
            let segments = denoiser.graph.nodes.iter().map(|n| (&n.params, None));
            let tiers = Tiers::on_device().unwrap();
            let store = ParamStore::load(&ranks, self.compute.dtype, &tiers, segments, &self.weights).unwrap();
            let sampling = Sampling {
                graph: &denoiser.graph,
                store: &store,
                slots: denoiser.slots,
                unet: &self.configs.unet,
                compute: &self.compute,
                scheduler: &self.scheduler,
                rank: &self.rank,
            };
            let prompts = if in_front { Prompts::Tokens(self.tokens.clone()) } else { self.encoded() };
            let settings = Settings { steps: 2, batch_size, ..Settings::of(SamplerKind::Ddim, &self.configs.unet) };
            let noise = Noise::from_seed(3);
            let request = Request { pictures, prompts: &prompts, settings, noise: &noise };
            let mut decoder = Decoder::load(
                &self.configs.vae,
                &self.weights,
                &self.compute,
                Tiers::on_device().unwrap(),
                Tiling::Auto,
            )
            .unwrap();
            let mut made = Vec::new();
            let ending = sampling.pictures(&request, &mut decoder, |picture| {
                assert_eq!(picture.index, made.len());
                made.push((picture.image.into_raw(), picture.latents));
                Ok(())
            });
            assert_eq!(ending.unwrap(), Ending::Done);
            // Nothing is left of the parameters but this rank's shards.
            assert_eq!(
                tiers.device.parameters.usage().used,
                (0..store.len()).map(|i| store.padded_len(i)).sum::<usize>() * self.compute.dtype.size_in_bytes()
            );
            made
        }
    }

    fn five() -> Vec<Picture> {
        let picture = |number| Picture { number, prompt: 1 + number as usize % 2, negative: 0 };
        [0, 1, 2, 3, 7].map(picture).to_vec()
    }

    #[test]
    fn a_pictures_bits_depend_on_its_number_alone() {
        for dtype in [DType::F32, DType::BF16] {
            let bench = Bench::new(dtype);
            let pictures = five();
            let all = bench.pictures(&pictures, 5, false);
            for batch_size in [1, 2, 3] {
                assert!(bench.pictures(&pictures, batch_size, false) == all, "{dtype:?}, batches of {batch_size}");
            }
            let (last, first) = (&pictures[4..], &pictures[..1]);
            assert!(bench.pictures(&[last, first].concat(), 2, false) == [all[4].clone(), all[0].clone()]);
            assert!(all[0].1 != all[2].1, "the same prompt, another number");
        }
    }

    #[test]
    fn a_text_encoder_in_the_graph_makes_the_same_pictures() {
        let bench = Bench::new(DType::F32);
        assert!(bench.pictures(&five(), 2, true) == bench.pictures(&five(), 2, false));
    }

    #[test]
    fn who_is_told_to_stop_stops_before_the_next_call() {
        let bench = Bench::new(DType::F32);
        bench.rank.interrupt.flag().store(true, std::sync::atomic::Ordering::Relaxed);
        let text = bench.encoded();
        let denoiser = model::denoiser(&bench.configs.unet, None, false, DType::F32);
        let ranks = Ranks { comm: Arc::new(Solo), stage: Stage::Replicated, reduce_dtype: DType::F32 };
        let segments = denoiser.graph.nodes.iter().map(|n| (&n.params, None));
        let store =
            ParamStore::load(&ranks, DType::F32, &Tiers::on_device().unwrap(), segments, &bench.weights).unwrap();
        let sampling = Sampling {
            graph: &denoiser.graph,
            store: &store,
            slots: denoiser.slots,
            unet: &bench.configs.unet,
            compute: &bench.compute,
            scheduler: &bench.scheduler,
            rank: &bench.rank,
        };
        let settings = Settings::of(SamplerKind::Ddim, &bench.configs.unet);
        let noise = Noise::from_seed(0);
        let request = Request { pictures: &five(), prompts: &text, settings, noise: &noise };
        let mut decoder =
            Decoder::load(&bench.configs.vae, &bench.weights, &bench.compute, Tiers::on_device().unwrap(), Tiling::Off)
                .unwrap();
        let ending = sampling.pictures(&request, &mut decoder, |_| anyhow::bail!("a picture was made"));
        assert_eq!(ending.unwrap(), Ending::Interrupted);
    }
}
