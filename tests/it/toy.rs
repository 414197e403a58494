//! A toy network with what matters of a UNet: a slot that many segments read, a skip, frozen parts. Once as segments,
//! once as one plain expression: the reference that every way of sharing must follow.

use std::ops::Range;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use anyhow::Result;
use candle_core::{D, DType, Device, Tensor, Var};
use dblaunch::comm::Communicator;
use dblaunch::device::threads::with_threads;
use dblaunch::device::{Arena, Delays, Memory, StateFile, StateFileOptions, WeightRef};
use dblaunch::ops::{Activation, activation, add, layer_norm, linear};
use dblaunch::optim::{AdamW, StateKind};
use dblaunch::segment::{GraphBuilder, Keep, Params, Segment, SegmentGraph, SlotId};
use dblaunch::train::network::{Build, Network};
use dblaunch::train::optimizer::StepScale;
use dblaunch::train::step::{Group, Inputs, Then, clip_factor};
use dblaunch::zero::{Partition, Placement, Ranks, Stage, Tiers, WeightSource};

const FEATURES: usize = 6;
const CONDITION: usize = 4;
// Wide enough that one tensor passes the threshold of large ones.
pub const WIDTH: usize = 72;
const OUT: usize = 3;

struct Layer {
    weight: WeightRef,
    bias: WeightRef,
}

impl Layer {
    fn new(p: &Params, input: usize, output: usize) -> Self {
        Layer { weight: p.get("weight", &[output, input]), bias: p.get("bias", &[output]) }
    }

    fn forward(&self, x: &Tensor) -> candle_core::Result<Tensor> {
        linear(x, &self.weight, Some(&self.bias))
    }
}

struct Stem(Layer, Layer);
impl Segment for Stem {
    fn forward(&self, inputs: &[Tensor]) -> candle_core::Result<Vec<Tensor>> {
        let t = activation(&self.1.forward(&inputs[1])?, Activation::Silu)?;
        Ok(vec![self.0.forward(&inputs[0])?, t])
    }
}

struct Middle {
    gamma: WeightRef,
    beta: WeightRef,
    layer: Layer,
}
impl Segment for Middle {
    fn forward(&self, inputs: &[Tensor]) -> candle_core::Result<Vec<Tensor>> {
        let h = add(&layer_norm(&inputs[0], &self.gamma, &self.beta, 1e-5)?, &inputs[1])?;
        Ok(vec![activation(&self.layer.forward(&h)?, Activation::Silu)?])
    }
}

struct Up(Layer);
impl Segment for Up {
    fn forward(&self, inputs: &[Tensor]) -> candle_core::Result<Vec<Tensor>> {
        Ok(vec![add(&add(&self.0.forward(&inputs[0])?, &inputs[1])?, &inputs[2])?])
    }
}

struct Head(Layer);
impl Segment for Head {
    fn forward(&self, inputs: &[Tensor]) -> candle_core::Result<Vec<Tensor>> {
        Ok(vec![self.0.forward(&inputs[0])?])
    }
}

pub struct Toy {
    pub graph: SegmentGraph,
    x: SlotId,
    condition: SlotId,
    prediction: SlotId,
}

pub fn toy() -> Toy {
    toy_of(WIDTH)
}

fn toy_of(width: usize) -> Toy {
    let mut g = GraphBuilder::new();
    let (x, condition) = (g.input("x"), g.input("condition"));
    let [a, t] = g.segment("stem", "toy", true, &[x, condition], ["a", "t"], |p| {
        Box::new(Stem(Layer::new(&p.pp("stem"), FEATURES, width), Layer::new(&p.pp("time"), CONDITION, width)))
    });
    let [b] = g.segment("middle", "toy", true, &[a, t], ["b"], |p| {
        Box::new(Middle {
            gamma: p.get("norm.weight", &[width]),
            beta: p.get("norm.bias", &[width]),
            layer: Layer::new(&p.pp("middle"), width, width),
        })
    });
    let [c] = g.segment("up", "toy", true, &[b, a, t], ["c"], |p| Box::new(Up(Layer::new(&p.pp("up"), width, width))));
    let [prediction] =
        g.segment("head", "toy", true, &[c], ["prediction"], |p| Box::new(Head(Layer::new(&p.pp("head"), width, OUT))));
    Toy { graph: g.finish(), x, condition, prediction }
}

/// Weights that depend on the name and the place alone.
pub struct Made;
impl WeightSource for Made {
    fn read(&self, name: &str, range: Range<usize>, into: &mut [f32]) -> Result<()> {
        let seed: usize = name.bytes().map(usize::from).sum();
        let wave = |i: usize| ((seed * 31 + i * 7) as f32 * 0.37).sin() * 0.25;
        into.iter_mut().zip(range).for_each(|(to, i)| *to = wave(i) + if name.contains("norm.w") { 1.0 } else { 0.0 });
        Ok(())
    }
}

/// Item `i` of the toy data: features, condition, target.
fn item(i: usize) -> (Vec<f32>, Vec<f32>, Vec<f32>) {
    let wave = |n: usize, f: f32| (0..n).map(|j| ((i * 13 + j * 5) as f32 * f).sin()).collect();
    (wave(FEATURES, 0.71), wave(CONDITION, 1.3), wave(OUT, 0.23))
}

fn stack(rows: Vec<Vec<f32>>, device: &Device) -> Tensor {
    let n = rows.len();
    let width = rows.first().map_or(0, Vec::len);
    Tensor::from_vec(rows.concat(), (n, width), device).unwrap()
}

/// A training run: which items each micro-batch has, and how it is shared.
#[derive(Clone)]
pub struct Run {
    pub stage: Stage,
    pub keep: Keep,
    /// steps[s][m]: the items of micro-batch m of step s.
    pub steps: Vec<Vec<Vec<usize>>>,
    pub reduce_dtype: DType,
    pub dtype: DType,
    pub storage: Storage,
    /// Of hidden layers.
    pub width: usize,
    /// Bound on the gradients' norm; 0: none, and every segment is updated as soon as its gradients are there.
    pub max_norm: f64,
    /// Of each rank, where not all cores.
    pub threads: Option<usize>,
}

/// Where a run's states rest, and in what.
#[derive(Clone)]
pub struct Storage {
    pub placement: Placement,
    pub state: StateKind,
    pub master: DType,
    pub gradients: DType,
    pub prefetch: bool,
    /// Copies, collectives and disk requests are late now and then.
    pub delays: bool,
    /// For what rests on a drive.
    pub folder: Option<PathBuf>,
    /// The device in the processor's place, with a memory of its own.
    pub accelerator: Option<Beside>,
}

/// A device that is not the processor.
#[derive(Clone)]
pub enum Beside {
    /// Its tensors are the processor's.
    #[cfg(feature = "emulate")]
    Emulated(Arc<dblaunch::kernels::emulated::Emulated>),
    #[cfg(feature = "cuda")]
    Gpu(Arc<dblaunch::device::cuda::Gpu>),
}

impl Beside {
    fn memory(&self) -> Memory {
        match self {
            #[cfg(feature = "emulate")]
            Beside::Emulated(emulated) => Memory::beside(emulated.clone(), None, None),
            #[cfg(feature = "cuda")]
            Beside::Gpu(gpu) => Memory::beside(gpu.clone(), None, None),
            #[allow(unreachable_patterns, reason = "there is none without these features")]
            _ => unreachable!(),
        }
    }

    /// Where candle's tensors are.
    fn device(&self) -> Device {
        match self {
            #[cfg(feature = "cuda")]
            Beside::Gpu(gpu) => gpu.device().clone(),
            #[allow(unreachable_patterns, reason = "all others are not candle's")]
            _ => Device::Cpu,
        }
    }

    fn compute<R>(&self, work: impl FnOnce() -> R) -> R {
        match self {
            #[cfg(feature = "emulate")]
            Beside::Emulated(emulated) => dblaunch::ops::compute_on(emulated.clone(), work),
            #[allow(unreachable_patterns, reason = "all others compute where their tensors are")]
            _ => work(),
        }
    }
}

impl Storage {
    pub fn on_device() -> Self {
        Storage {
            placement: Placement::DEVICE,
            state: StateKind::F32,
            master: DType::F32,
            gradients: DType::F32,
            prefetch: true,
            delays: false,
            folder: None,
            accelerator: None,
        }
    }

    fn memory(&self) -> Memory {
        let here = || Memory { device: Arena::new("device", None), host: Arena::new("host", None) };
        self.accelerator.as_ref().map_or_else(here, Beside::memory)
    }

    fn device(&self) -> Device {
        self.accelerator.as_ref().map_or(Device::Cpu, Beside::device)
    }

    fn tiers(&self, rank: usize, bytes: u64) -> Tiers {
        let delays = |seed: u64| self.delays.then(|| Delays::new(seed + rank as u64, Duration::from_millis(2)));
        let drive = self.placement.uses_drive().then(|| {
            let dir = self.folder.clone().expect("a folder for what rests on a drive");
            let options = StateFileOptions { dir, rank, bytes, delays: delays(100), direct: None, ring: None };
            StateFile::create(options).unwrap()
        });
        let tiers = Tiers::within(self.memory(), self.placement, drive, delays(0)).unwrap();
        Tiers { master: self.master, gradients: self.gradients, prefetch: self.prefetch, ..tiers }
    }
}

/// What a run leaves: the loss of every micro-batch, every step's norm, the gradients of the first step, the weights.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Outcome {
    pub losses: Vec<f64>,
    pub norms: Vec<f64>,
    pub first_gradients: Vec<f32>,
    pub weights: Vec<f32>,
}

pub const ADAMW: AdamW = AdamW { beta1: 0.9, beta2: 0.999, epsilon: 1e-8, weight_decay: 0.01 };
const RATE: f64 = 1e-2;
pub const MAX_NORM: f64 = 0.5;

pub fn network(ranks: &Ranks, run: &Run, source: &dyn WeightSource) -> (Toy, Network) {
    let mut toy = toy_of(run.width);
    let graph = std::mem::replace(&mut toy.graph, GraphBuilder::new().finish());
    let build = Build {
        ranks: ranks.clone(),
        dtype: run.dtype,
        keep: vec![run.keep; graph.nodes.len()],
        // Enough for the weights and two moments of all.
        tiers: run.storage.tiers(ranks.comm.rank(), (1 << 20) + 28 * (run.width * run.width) as u64),
        state: run.storage.state,
        seed: 7,
    };
    let network = Network::load(graph, build, source).unwrap();
    (toy, network)
}

/// One rank's part of `run`.
pub fn train(comm: Arc<dyn Communicator>, run: &Run) -> Outcome {
    if let Some(accelerator) = &run.storage.accelerator {
        return accelerator.compute(|| train_here(comm, run));
    }
    match run.threads {
        Some(threads) => with_threads(threads, || train_here(comm, run)),
        None => train_here(comm, run),
    }
}

fn train_here(comm: Arc<dyn Communicator>, run: &Run) -> Outcome {
    let ranks = Ranks { comm, stage: run.stage, reduce_dtype: run.reduce_dtype };
    let partition = Partition::new(ranks.comm.rank(), ranks.comm.world_size());
    let (toy, mut network) = network(&ranks, run, &Made);
    let mut outcome = Outcome::default();
    let device = run.storage.device();
    let stack = |rows: Vec<Vec<f32>>| stack(rows, &device);
    let group = |_: &str| Group { adamw: ADAMW, rate: RATE };
    for (s, micro_batches) in run.steps.iter().enumerate() {
        for (m, items) in micro_batches.iter().enumerate() {
            // The first step's gradients are looked at before they are used.
            let at_once = run.max_norm == 0.0 && s > 0;
            let then = match m + 1 == micro_batches.len() {
                false => Then::Accumulate,
                true if at_once => Then::Update(StepScale { step: s as u64 + 1, grad_scale: 1.0 }, &group),
                true => Then::Norm,
            };
            let mine: Vec<_> = items[partition.items(items.len())].iter().map(|&i| item(i)).collect();
            let inputs = (!mine.is_empty()).then(|| Inputs {
                slots: vec![
                    (toy.x, stack(mine.iter().map(|m| m.0.clone()).collect()).to_dtype(run.dtype).unwrap()),
                    (toy.condition, stack(mine.iter().map(|m| m.1.clone()).collect()).to_dtype(run.dtype).unwrap()),
                ],
                prediction: toy.prediction,
            });
            let mut part = [0f64];
            let targets: Vec<_> = mine.into_iter().map(|m| m.2).collect();
            network
                .forward_backward(inputs, then, |prediction| {
                    let difference = (prediction.to_dtype(DType::F32)? - stack(targets.clone()))?;
                    let squares = difference.sqr()?.sum_all()?.to_scalar::<f32>()?;
                    part[0] = f64::from(squares) / (OUT * items.len()) as f64;
                    let scale = 2.0 / (OUT * items.len() * micro_batches.len()) as f64;
                    Ok((difference * scale)?.to_dtype(run.dtype)?)
                })
                .unwrap();
            ranks.comm.all_reduce(dblaunch::comm::SliceMut::F64(&mut part)).unwrap();
            outcome.losses.push(part[0]);
        }
        let norm = network.reduce().unwrap();
        outcome.norms.push(norm);
        if s == 0 {
            outcome.first_gradients = whole(&network, |n, i| n.reducer.whole(i).unwrap().unwrap());
        }
        if run.max_norm > 0.0 || s == 0 {
            network.update(s as u64 + 1, clip_factor(norm, run.max_norm), group).unwrap();
        }
    }
    outcome.weights = whole(&network, |n, i| n.store.whole_master(i).unwrap().as_slice().to_vec());
    outcome
}

/// Every tensor in order of declaration, without padding.
pub fn whole(network: &Network, bucket: impl Fn(&Network, usize) -> Vec<f32>) -> Vec<f32> {
    let segments = 0..network.store.len();
    let tensors = segments.flat_map(|i| {
        let values = bucket(network, i);
        let entries = network.store.layout(i).entries.clone();
        entries.into_iter().map(move |e| values[e.offset..e.offset + e.len].to_vec()).collect::<Vec<_>>()
    });
    tensors.flatten().collect()
}

/// The same training by candle's own autograd, on one device, one expression, and AdamW written out in f64.
pub fn reference(steps: &[Vec<Vec<usize>>]) -> Outcome {
    let layouts: Vec<_> = toy().graph.nodes.iter().flat_map(|n| n.params.layout().entries.clone()).collect();
    let vars: Vec<Var> = layouts
        .iter()
        .map(|e| {
            let mut values = vec![0f32; e.len];
            Made.read(&e.name, 0..e.len, &mut values).unwrap();
            Var::from_tensor(&Tensor::from_vec(values, e.shape.clone(), &Device::Cpu).unwrap()).unwrap()
        })
        .collect();
    let get = |name: &str| vars[layouts.iter().position(|e| e.name == format!("toy.{name}")).unwrap()].as_tensor();
    let dense = |x: &Tensor, name: &str| {
        let y = x.matmul(&get(&format!("{name}.weight")).t().unwrap()).unwrap();
        y.broadcast_add(get(&format!("{name}.bias"))).unwrap()
    };
    let stack = |rows: Vec<Vec<f32>>| stack(rows, &Device::Cpu);
    let n: usize = layouts.iter().map(|e| e.len).sum();
    let (mut m, mut v) = (vec![0f64; n], vec![0f64; n]);
    let mut outcome = Outcome::default();
    for (s, micro_batches) in steps.iter().enumerate() {
        let mut sum = vec![0f64; n];
        for items in micro_batches {
            let rows: Vec<_> = items.iter().map(|&i| item(i)).collect();
            let x = stack(rows.iter().map(|r| r.0.clone()).collect());
            let condition = stack(rows.iter().map(|r| r.1.clone()).collect());
            let target = stack(rows.iter().map(|r| r.2.clone()).collect());
            let a = dense(&x, "stem");
            let t = dense(&condition, "time").silu().unwrap();
            let centred = a.broadcast_sub(&a.mean_keepdim(D::Minus1).unwrap()).unwrap();
            let variance = (centred.sqr().unwrap().mean_keepdim(D::Minus1).unwrap() + 1e-5).unwrap();
            let normed = centred.broadcast_div(&variance.sqrt().unwrap()).unwrap();
            let normed = normed.broadcast_mul(get("norm.weight")).unwrap().broadcast_add(get("norm.bias")).unwrap();
            let b = dense(&(normed + &t).unwrap(), "middle").silu().unwrap();
            let c = ((dense(&b, "up") + &a).unwrap() + &t).unwrap();
            let loss = (dense(&c, "head") - target).unwrap().sqr().unwrap().mean_all().unwrap();
            outcome.losses.push(f64::from(loss.to_scalar::<f32>().unwrap()));
            let grads = (loss / micro_batches.len() as f64).unwrap().backward().unwrap();
            let flat =
                vars.iter().flat_map(|var| grads.get(var).unwrap().flatten_all().unwrap().to_vec1::<f32>().unwrap());
            sum.iter_mut().zip(flat).for_each(|(to, g)| *to += f64::from(g));
        }
        let norm = sum.iter().map(|g| g * g).sum::<f64>().sqrt();
        outcome.norms.push(norm);
        if s == 0 {
            outcome.first_gradients = sum.iter().map(|&g| g as f32).collect();
        }
        let clip = (MAX_NORM / (norm + 1e-6)).min(1.0);
        let (c1, c2) = (1.0 - 0.9f64.powi(s as i32 + 1), 1.0 - 0.999f64.powi(s as i32 + 1));
        let mut at = 0;
        for var in &vars {
            let mut values = var.flatten_all().unwrap().to_vec1::<f32>().unwrap();
            for w in &mut values {
                let g = sum[at] * clip;
                m[at] = 0.9 * m[at] + 0.1 * g;
                v[at] = 0.999 * v[at] + 0.001 * g * g;
                let step = RATE * (m[at] / c1) / ((v[at] / c2).sqrt() + 1e-8);
                *w = (f64::from(*w) * (1.0 - RATE * 0.01) - step) as f32;
                at += 1;
            }
            var.set(&Tensor::from_vec(values, var.shape().clone(), &Device::Cpu).unwrap()).unwrap();
        }
    }
    outcome.weights = vars.iter().flat_map(|v| v.flatten_all().unwrap().to_vec1::<f32>().unwrap()).collect();
    outcome
}
