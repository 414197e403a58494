//! Single ops on recorded inputs, forward and backward: what `benches/half_torch.py` compares with the same ops of PyTorch.

use std::collections::HashMap;
use std::path::Path;
use std::sync::Arc;

use anyhow::{Context, Result};
use candle_core::{DType, Device, Tensor};
use safetensors::SafeTensors;
use serde::Deserialize;

use crate::device::{Arena, BucketLayout, GradSlot, Hardware, ParamSlot, WeightRef, bulk, on_host};
use crate::ops::{self, Activation, Conv2d, Mask};
use crate::segment::Forward;

/// An op and what it takes beside tensors.
#[derive(Deserialize)]
#[serde(tag = "op", rename_all = "snake_case", deny_unknown_fields)]
enum Op {
    Attention { heads: usize, causal: bool },
    Conv2d { stride: usize, padding: usize },
    Linear,
    GroupNorm { groups: usize, silu: bool },
    LayerNorm,
    Geglu,
    Silu,
    Gelu,
    AddChannels,
    Upsample { height: usize, width: usize },
}

/// Norms add it to the variance.
const EPSILON: f64 = 1e-5;

/// Reads `from`, a safetensors file whose metadata has under `ops` a JSON object `{"NAME": {"op": ..}}` and which has for
/// each NAME its activations `NAME/x0`, .., its weights `NAME/w0`, .. and the gradient `NAME/dy` of its result, all of one
/// dtype. Writes `into` with `NAME/y`, `NAME/dx0`, .., and in fp32 `NAME/dw0`, ...
pub fn ops(hardware: &Hardware, from: &Path, into: &Path) -> Result<()> {
    let bytes = std::fs::read(from).with_context(|| format!("reading {}", from.display()))?;
    let (_, metadata) = SafeTensors::read_metadata(&bytes)?;
    let listed = metadata.metadata().as_ref().and_then(|metadata| metadata.get("ops"));
    let listed: HashMap<String, Op> =
        serde_json::from_str(listed.with_context(|| format!("{} lists no ops", from.display()))?)?;
    let given = candle_core::safetensors::load_buffer(&bytes, &Device::Cpu)?;
    let arena = hardware.memory(None, None).device;
    let mut results = HashMap::new();
    for (name, op) in &listed {
        let of =
            |kind: &str| (0..).map_while(|i| given.get(&format!("{name}/{kind}{i}"))).cloned().collect::<Vec<Tensor>>();
        let dy = given.get(&format!("{name}/dy")).with_context(|| format!("{name} has no dy"))?;
        let case = Case { op, activations: of("x"), weights: of("w"), dy };
        let done = case.run(hardware.device(), &arena).with_context(|| name.clone())?;
        results.extend(done.into_iter().map(|(part, tensor)| (format!("{name}/{part}"), tensor)));
    }
    candle_core::safetensors::save(&results, into).with_context(|| format!("writing {}", into.display()))
}

struct Case<'a> {
    op: &'a Op,
    activations: Vec<Tensor>,
    weights: Vec<Tensor>,
    dy: &'a Tensor,
}

/// A weight, and where its gradient is summed up.
struct Weight {
    weight: WeightRef,
    grads: Arc<GradSlot>,
}

impl Case<'_> {
    fn run(&self, device: &Device, arena: &Arena) -> Result<Vec<(String, Tensor)>> {
        let there = |tensor: &Tensor| tensor.to_device(device);
        let inputs = self.activations.iter().map(there).collect::<candle_core::Result<Vec<_>>>()?;
        let weights = self.weights.iter().map(|values| Weight::new(values, arena)).collect::<Result<Vec<_>>>()?;
        let forward = Forward::of(inputs, std::iter::repeat(true), |inputs| Ok(vec![self.forward(inputs, &weights)?]))?;
        let mut results = vec![("y".to_string(), on_host(&forward.outputs[0])?)];
        let dy = self.dy.to_device(device)?;
        for (i, grad) in forward.pull(vec![Some(dy)])?.into_iter().enumerate() {
            let grad = grad.with_context(|| format!("activation {i} has no gradient"))?;
            results.push((format!("dx{i}"), on_host(&grad)?));
        }
        for (i, (weight, values)) in weights.iter().zip(&self.weights).enumerate() {
            results.push((format!("dw{i}"), weight.gradient(values)?));
        }
        Ok(results)
    }

    fn forward(&self, x: &[Tensor], w: &[Weight]) -> candle_core::Result<Tensor> {
        let w: Vec<&WeightRef> = w.iter().map(|w| &w.weight).collect();
        match (self.op, x, &w[..]) {
            (&Op::Attention { heads, causal }, [q, k, v], []) => {
                ops::attention(q, k, v, heads, &Mask { causal, key_lengths: None })
            }
            (&Op::Conv2d { stride, padding }, [x], [w, b]) => ops::conv2d(x, w, Some(b), Conv2d::new(stride, padding)),
            (Op::Linear, [x], [w, b]) => ops::linear(x, w, Some(b)),
            (&Op::GroupNorm { groups, silu }, [x], [w, b]) => ops::group_norm(x, w, b, groups, EPSILON, silu),
            (Op::LayerNorm, [x], [w, b]) => ops::layer_norm(x, w, b, EPSILON),
            (Op::Geglu, [x], []) => ops::geglu(x),
            (Op::Silu, [x], []) => ops::activation(x, Activation::Silu),
            (Op::Gelu, [x], []) => ops::activation(x, Activation::Gelu),
            (Op::AddChannels, [x, t], []) => ops::add_channels(x, t),
            (&Op::Upsample { height, width }, [x], []) => ops::upsample_nearest(x, height, width),
            (_, x, w) => candle_core::bail!("the op does not take {} activations and {} weights", x.len(), w.len()),
        }
    }
}

impl Weight {
    fn new(values: &Tensor, arena: &Arena) -> Result<Weight> {
        let layout = BucketLayout::new(vec![("weight".to_string(), values.dims().to_vec())]);
        let mut buffer = arena.alloc(values.dtype(), layout.len, "a weight")?;
        let numbers: Vec<f32> = values.flatten_all()?.to_dtype(DType::F32)?.to_vec1()?;
        bulk::round(&numbers, &mut buffer, 0..numbers.len())?;
        let (slot, grads) = (ParamSlot::new("weight"), GradSlot::new("weight"));
        grads.fill(arena.alloc(DType::F32, layout.len, "a weight's gradient")?);
        slot.lay_out(layout);
        slot.fill(Arc::new(buffer));
        Ok(Weight { weight: WeightRef::new(slot, Some(grads.clone()), 0), grads })
    }

    /// In the shape of its `values`.
    fn gradient(&self, values: &Tensor) -> Result<Tensor> {
        let sum = self.grads.empty().context("the gradient was taken before")?;
        let mut numbers = vec![0f32; values.elem_count()];
        bulk::widen(&sum, 0..numbers.len(), &mut numbers)?;
        Ok(Tensor::from_vec(numbers, values.dims(), &Device::Cpu)?)
    }
}
