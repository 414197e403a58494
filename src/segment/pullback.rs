//! The gradient of one segment: the only place that calls candle's `backward`.

use candle_core::{CpuStorage, CustomOp1, DType, Layout, Result, Shape, Tensor, Var};

/// A scalar whose gradient with respect to its argument is `dy`: cheaper than `sum(y * dy)`.
struct Seed {
    dy: Tensor,
}

impl CustomOp1 for Seed {
    fn name(&self) -> &'static str {
        "seed"
    }

    fn cpu_fwd(&self, _: &CpuStorage, _: &Layout) -> Result<(CpuStorage, Shape)> {
        Ok((CpuStorage::F32(vec![0.0]), Shape::from(())))
    }

    #[cfg(feature = "cuda")]
    fn cuda_fwd(&self, y: &candle_core::CudaStorage, _: &Layout) -> Result<(candle_core::CudaStorage, Shape)> {
        use candle_core::backend::{BackendDevice, BackendStorage};
        let scalar = Shape::from(());
        Ok((y.device().zeros_impl(&scalar, DType::F32)?, scalar))
    }

    fn bwd(&self, _: &Tensor, _: &Tensor, _: &Tensor) -> Result<Option<Tensor>> {
        Ok(Some(self.dy.clone()))
    }
}

/// Pulls the gradients `dys` of `outputs` back to `inputs`. None for an input that no output depends on. Weight
/// gradients land in the gradient bucket on the way.
pub fn pullback(outputs: &[Tensor], dys: &[Option<Tensor>], inputs: &[Var]) -> Result<Vec<Option<Tensor>>> {
    let mut seeds: Option<Tensor> = None;
    for (output, dy) in outputs.iter().zip(dys) {
        let Some(dy) = dy else { continue };
        debug_assert_eq!(output.shape(), dy.shape());
        let seed = output.apply_op1(Seed { dy: dy.clone() })?;
        seeds = Some(match seeds {
            Some(sum) => (sum + seed)?,
            None => seed,
        });
    }
    let Some(seeds) = seeds else { return Ok(inputs.iter().map(|_| None).collect()) };
    let mut grads = seeds.backward()?;
    // Detached at once: a gradient may still hold the whole graph.
    Ok(inputs.iter().map(|input| grads.remove(input).map(|g| g.detach())).collect())
}

/// A leaf that candle tracks. Every input of a segment becomes one, token ids too, since an op's `bwd` never runs for
/// an argument that does not descend from a `Var`, and then its weights would get no gradient.
pub fn leaf(tensor: &Tensor) -> Result<Var> {
    Var::from_tensor(tensor)
}

/// Whether gradients flow through tensors of this dtype.
pub fn carries_gradient(dtype: DType) -> bool {
    dtype.is_float()
}

#[cfg(test)]
mod tests {
    use super::*;
    use candle_core::Device;

    #[test]
    fn gradients_of_two_outputs_add_up() {
        let x = leaf(&Tensor::new(&[1f32, 2.0, 3.0], &Device::Cpu).unwrap()).unwrap();
        let unused = leaf(&Tensor::new(&[7u32], &Device::Cpu).unwrap()).unwrap();
        let (a, b) = (x.sqr().unwrap(), (x.as_tensor() * 5.0).unwrap());
        let dy = |v: [f32; 3]| Some(Tensor::new(&v, &Device::Cpu).unwrap());
        let grads = pullback(&[a, b], &[dy([1.0, 10.0, 100.0]), dy([1.0, 1.0, 0.0])], &[x.clone(), unused]).unwrap();
        assert_eq!(grads[0].as_ref().unwrap().to_vec1::<f32>().unwrap(), [7.0, 45.0, 600.0]);
        assert!(grads[1].is_none());
    }
}
