//! An op's way to a GPU: tensors as addresses, fresh memory for results, kernels launched in between. The device is a
//! tensor's own, or, for tests, the emulated one of [`crate::kernels`], whose tensors are the processor's. No arithmetic.

use std::cell::RefCell;
use std::sync::Arc;

use candle_core::op::BackpropOp;
use candle_core::{CpuStorage, DType, Device, Error, Layout, Result, Shape, Storage, StorageRef, Tensor, bail};
use half::{bf16, f16};

use super::vector;
use crate::device::is_dry;
use crate::kernels::{Address, Launcher};

/// The device that computes, where that is not the processor.
pub(super) struct Gpu {
    launcher: Arc<dyn Launcher>,
    device: Device,
}

/// A contiguous tensor as kernels see it; alive as long as this is.
pub(super) struct Operand<'a> {
    pub at: Address,
    pub dtype: DType,
    pub dims: &'a [usize],
    _held: Option<StorageRef<'a>>,
}

impl Operand<'_> {
    pub fn len(&self) -> usize {
        self.dims.iter().product()
    }
}

/// A result: memory that a kernel is about to write whole.
pub(super) struct Fresh {
    storage: Storage,
    shape: Shape,
    pub at: Address,
}

impl Fresh {
    pub fn tensor(self) -> Tensor {
        Tensor::from_storage(self.storage, self.shape, BackpropOp::none(), false)
    }
}

thread_local! {
    static INSTEAD: RefCell<Option<Arc<dyn Launcher>>> = const { RefCell::new(None) };
}

/// Runs `work` with another device in the processor's place: ops on this thread launch kernels there. It takes the
/// processor's tensors: the emulated device, or none in a dry run.
pub fn compute_on<R>(device: Arc<dyn Launcher>, work: impl FnOnce() -> R) -> R {
    let before = INSTEAD.replace(Some(device));
    let result = work();
    INSTEAD.set(before);
    result
}

/// What a launch said, as candle's error.
fn told<T>(result: anyhow::Result<T>) -> Result<T> {
    result.map_err(|error| Error::Msg(format!("{error:#}")))
}

impl Gpu {
    /// The device that computes in the processor's place, if one does.
    pub fn emulated() -> Option<Gpu> {
        INSTEAD.with_borrow(|device| device.clone()).map(|launcher| Gpu { launcher, device: Device::Cpu })
    }

    /// The device of a tensor; none if that is the processor.
    pub fn of(tensor: &Tensor) -> Result<Option<Gpu>> {
        Self::on(tensor.device())
    }

    /// The same of a device.
    pub fn on(device: &Device) -> Result<Option<Gpu>> {
        match device {
            Device::Cpu => Ok(Self::emulated()),
            #[cfg(feature = "cuda")]
            Device::Cuda(device) => Self::cuda(device).map(Some),
            other => bail!("no kernels for {other:?}"),
        }
    }

    #[cfg(feature = "cuda")]
    pub fn cuda(device: &candle_core::CudaDevice) -> Result<Gpu> {
        let launcher = told(crate::device::cuda::Gpu::of(device))?;
        Ok(Gpu { launcher, device: Device::Cuda(device.clone()) })
    }

    /// Launches kernels.
    pub fn run(&self, launch: impl FnOnce(&dyn Launcher) -> anyhow::Result<()>) -> Result<()> {
        told(launch(&*self.launcher))
    }

    /// Memory for a result, which kernels write whole.
    pub fn fresh(&self, dtype: DType, shape: impl Into<Shape>) -> Result<Fresh> {
        let shape = shape.into();
        let (storage, at) = match &self.device {
            Device::Cpu => {
                let mut storage = unwritten(dtype, shape.elem_count())?;
                let at = start_mut(&mut storage)?;
                (Storage::Cpu(storage), at)
            }
            #[cfg(feature = "cuda")]
            Device::Cuda(device) => {
                let storage = crate::device::cuda::uninitialised(device, &shape, dtype)?;
                let at = crate::device::cuda::address_of(&storage, &Layout::contiguous(&shape))?;
                (Storage::Cuda(storage), at)
            }
            other => bail!("no kernels for {other:?}"),
        };
        Ok(Fresh { storage, shape, at })
    }

    /// Whole numbers in the device's memory.
    pub fn numbers(&self, values: Vec<u32>) -> Result<Tensor> {
        let len = values.len();
        Tensor::from_vec(values, len, &self.device)
    }

    /// A contiguous tensor for a kernel to read.
    pub fn operand<'t>(&self, tensor: &'t Tensor) -> Result<Operand<'t>> {
        let (storage, layout) = tensor.storage_and_layout();
        let at = match &*storage {
            Storage::Cpu(storage) => start(storage, layout)?,
            #[cfg(feature = "cuda")]
            Storage::Cuda(storage) => crate::device::cuda::address_of(storage, layout)?,
            _ => bail!("a kernel was given memory of another device"),
        };
        Ok(Operand { at, dtype: tensor.dtype(), dims: layout.dims(), _held: Some(storage) })
    }
}

/// The forward of an op of one activation on the emulated device, if it computes.
pub(super) fn emulated1(
    storage: &CpuStorage,
    layout: &Layout,
    run: impl FnOnce(&Gpu, Operand) -> Result<Fresh>,
) -> Option<Result<(CpuStorage, Shape)>> {
    let gpu = Gpu::emulated()?;
    Some((|| cpu_result(run(&gpu, cpu_operand(storage, layout)?)?))())
}

/// The same with two.
pub(super) fn emulated2(
    (a, la): (&CpuStorage, &Layout),
    (b, lb): (&CpuStorage, &Layout),
    run: impl FnOnce(&Gpu, Operand, Operand) -> Result<Fresh>,
) -> Option<Result<(CpuStorage, Shape)>> {
    let gpu = Gpu::emulated()?;
    Some((|| cpu_result(run(&gpu, cpu_operand(a, la)?, cpu_operand(b, lb)?)?))())
}

/// The same with three.
pub(super) fn emulated3(
    [a, b, c]: [(&CpuStorage, &Layout); 3],
    run: impl FnOnce(&Gpu, [Operand; 3]) -> Result<Fresh>,
) -> Option<Result<(CpuStorage, Shape)>> {
    let gpu = Gpu::emulated()?;
    let operand = |(storage, layout)| cpu_operand(storage, layout);
    Some((|| cpu_result(run(&gpu, [operand(a)?, operand(b)?, operand(c)?])?))())
}

fn cpu_operand<'a>(storage: &CpuStorage, layout: &'a Layout) -> Result<Operand<'a>> {
    let dtype = candle_core::backend::BackendStorage::dtype(storage);
    Ok(Operand { at: start(storage, layout)?, dtype, dims: layout.dims(), _held: None })
}

fn cpu_result(fresh: Fresh) -> Result<(CpuStorage, Shape)> {
    match fresh.storage {
        Storage::Cpu(storage) => Ok((storage, fresh.shape)),
        _ => bail!("an op on the processor gave memory of another device"),
    }
}

/// What the forward of a custom op of so many activations does on a GPU: its `forward_on`.
macro_rules! cuda_forward {
    (1) => {
        #[cfg(feature = "cuda")]
        fn cuda_fwd(
            &self,
            storage: &candle_core::CudaStorage,
            layout: &candle_core::Layout,
        ) -> candle_core::Result<(candle_core::CudaStorage, candle_core::Shape)> {
            crate::ops::gpu::on_cuda([(storage, layout)], |gpu, [x]| self.forward_on(gpu, x))
        }
    };
    (2) => {
        #[cfg(feature = "cuda")]
        fn cuda_fwd(
            &self,
            a: &candle_core::CudaStorage,
            la: &candle_core::Layout,
            b: &candle_core::CudaStorage,
            lb: &candle_core::Layout,
        ) -> candle_core::Result<(candle_core::CudaStorage, candle_core::Shape)> {
            crate::ops::gpu::on_cuda([(a, la), (b, lb)], |gpu, [a, b]| self.forward_on(gpu, a, b))
        }
    };
    (3) => {
        #[cfg(feature = "cuda")]
        fn cuda_fwd(
            &self,
            a: &candle_core::CudaStorage,
            la: &candle_core::Layout,
            b: &candle_core::CudaStorage,
            lb: &candle_core::Layout,
            c: &candle_core::CudaStorage,
            lc: &candle_core::Layout,
        ) -> candle_core::Result<(candle_core::CudaStorage, candle_core::Shape)> {
            crate::ops::gpu::on_cuda([(a, la), (b, lb), (c, lc)], |gpu, operands| self.forward_on(gpu, operands))
        }
    };
}
pub(super) use cuda_forward;

/// A forward over CUDA storages.
#[cfg(feature = "cuda")]
pub(super) fn on_cuda<const N: usize>(
    inputs: [(&candle_core::CudaStorage, &Layout); N],
    run: impl FnOnce(&Gpu, [Operand; N]) -> Result<Fresh>,
) -> Result<(candle_core::CudaStorage, Shape)> {
    use candle_core::backend::BackendStorage;
    let Some((first, _)) = inputs.first() else { bail!("an op of nothing") };
    let gpu = Gpu::cuda(first.device())?;
    let mut operands = Vec::with_capacity(N);
    for (storage, layout) in inputs {
        let at = crate::device::cuda::address_of(storage, layout)?;
        operands.push(Operand { at, dtype: storage.dtype(), dims: layout.dims(), _held: None });
    }
    let Ok(operands) = operands.try_into() else { bail!("an op lost an operand") };
    let fresh = run(&gpu, operands)?;
    match fresh.storage {
        Storage::Cuda(storage) => Ok((storage, fresh.shape)),
        _ => bail!("an op on a GPU gave memory of another device"),
    }
}

/// Where a contiguous tensor's elements begin.
fn start(storage: &CpuStorage, layout: &Layout) -> Result<Address> {
    let Some((first, _)) = layout.contiguous_offsets() else { bail!("an op was given strided memory") };
    let (at, size) = match storage {
        CpuStorage::F32(values) => (values.as_ptr() as u64, 4),
        CpuStorage::F64(values) => (values.as_ptr() as u64, 8),
        CpuStorage::BF16(values) => (values.as_ptr() as u64, 2),
        CpuStorage::F16(values) => (values.as_ptr() as u64, 2),
        CpuStorage::U32(values) => (values.as_ptr() as u64, 4),
        _ => bail!("no kernels for this dtype"),
    };
    Ok(Address(at).at(first * size))
}

fn start_mut(storage: &mut CpuStorage) -> Result<Address> {
    Ok(Address(match storage {
        CpuStorage::F32(values) => values.as_mut_ptr() as u64,
        CpuStorage::F64(values) => values.as_mut_ptr() as u64,
        CpuStorage::BF16(values) => values.as_mut_ptr() as u64,
        CpuStorage::F16(values) => values.as_mut_ptr() as u64,
        _ => bail!("no kernels for this dtype"),
    }))
}

/// NaNs: what a kernel leaves out shows. In a dry run, pages that nobody touches.
fn unwritten(dtype: DType, len: usize) -> Result<CpuStorage> {
    let dry = is_dry();
    Ok(match dtype {
        DType::F32 => CpuStorage::F32(if dry { vector::unwritten(len) } else { vec![f32::NAN; len] }),
        DType::F64 => CpuStorage::F64(vec![f64::NAN; len]),
        DType::BF16 => CpuStorage::BF16(if dry { vector::unwritten(len) } else { vec![bf16::NAN; len] }),
        DType::F16 => CpuStorage::F16(if dry { vector::unwritten(len) } else { vec![f16::NAN; len] }),
        other => bail!("no kernels for {other:?}"),
    })
}
