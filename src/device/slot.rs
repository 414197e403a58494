//! The two places of a segment that ops know: where its parameters are while it is fetched, and where the gradients
//! of its parameters are summed up while it runs backward. Both are empty in between.

use std::marker::PhantomData;
use std::ops::Deref;
use std::sync::{Arc, Mutex, OnceLock, RwLock};

use candle_core::{DType, Error, Result, bail};

use super::{BucketLayout, Buffer, Element};
use crate::kernels::Address;

/// A segment's parameters: one flat buffer while fetched, nothing otherwise.
#[derive(Debug)]
pub struct ParamSlot {
    name: String,
    /// Set once, when all the segment's layers have declared their tensors.
    layout: OnceLock<BucketLayout>,
    held: RwLock<Option<Arc<Buffer>>>,
}

impl ParamSlot {
    pub fn new(name: impl Into<String>) -> Arc<Self> {
        Arc::new(ParamSlot { name: name.into(), layout: OnceLock::new(), held: RwLock::new(None) })
    }

    /// Fixes where the tensors lie; once, after the layers were built and before anything is fetched.
    pub fn lay_out(&self, layout: BucketLayout) {
        assert!(self.layout.set(layout).is_ok(), "{}: laid out twice", self.name);
    }

    pub fn name(&self) -> &str {
        &self.name
    }

    pub fn layout(&self) -> &BucketLayout {
        self.layout.get().expect("a segment is laid out before it is used")
    }

    /// Puts fetched parameters in; the buffer is at least as long as the layout.
    pub fn fill(&self, buffer: Arc<Buffer>) {
        assert!(buffer.len() >= self.layout().len, "{}: buffer shorter than the layout", self.name);
        *self.held.write().unwrap_or_else(|e| e.into_inner()) = Some(buffer);
    }

    /// Takes the parameters out; ops fail until the slot is filled again.
    pub fn empty(&self) -> Option<Arc<Buffer>> {
        self.held.write().unwrap_or_else(|e| e.into_inner()).take()
    }

    pub fn get(&self) -> Result<Arc<Buffer>> {
        match self.held.read().unwrap_or_else(|e| e.into_inner()).as_ref() {
            Some(buffer) => Ok(buffer.clone()),
            None => Err(Error::msg(format!("{}: its parameters are not fetched", self.name))),
        }
    }

    /// Changes resident parameters in place (the optimizer's update, a published shard).
    pub fn update<R>(&self, change: impl FnOnce(&mut Buffer) -> R) -> Result<R> {
        let mut held = self.held.write().unwrap_or_else(|e| e.into_inner());
        let Some(shared) = held.as_mut() else { bail!("{}: its parameters are not fetched", self.name) };
        match Arc::get_mut(shared) {
            Some(buffer) => Ok(change(buffer)),
            None => bail!("{}: its parameters are in use while they are to be changed", self.name),
        }
    }
}

/// A segment's gradients, fp32, laid out as its parameters. Ops add; nobody overwrites.
#[derive(Debug)]
pub struct GradSlot {
    name: String,
    held: Mutex<Option<Buffer>>,
    /// How often each tensor's range was added to, for the test that a backward visits every one once.
    visits: Mutex<Vec<u32>>,
}

impl GradSlot {
    pub fn new(name: impl Into<String>) -> Arc<Self> {
        Arc::new(GradSlot { name: name.into(), held: Mutex::new(None), visits: Mutex::new(Vec::new()) })
    }

    pub fn fill(&self, buffer: Buffer) {
        assert_eq!(buffer.dtype(), DType::F32, "{}: gradients are summed in fp32", self.name);
        *self.held.lock().unwrap_or_else(|e| e.into_inner()) = Some(buffer);
    }

    pub fn empty(&self) -> Option<Buffer> {
        self.held.lock().unwrap_or_else(|e| e.into_inner()).take()
    }

    /// Visits per tensor since the last call, which starts them anew; tensors after the last one visited are left out.
    pub fn take_visits(&self) -> Vec<u32> {
        std::mem::take(&mut self.visits.lock().unwrap_or_else(|e| e.into_inner()))
    }

    fn count_visit(&self, index: usize) {
        let mut visits = self.visits.lock().unwrap_or_else(|e| e.into_inner());
        if visits.len() <= index {
            visits.resize(index + 1, 0);
        }
        visits[index] += 1;
    }
}

/// One tensor of a segment, as an op holds it: a range of the slot, whose memory comes and goes.
#[derive(Clone, Debug)]
pub struct WeightRef {
    slot: Arc<ParamSlot>,
    grads: Option<Arc<GradSlot>>,
    index: usize,
}

impl WeightRef {
    /// `index` counts the layout's entries. No `grads`: the weight is frozen.
    pub fn new(slot: Arc<ParamSlot>, grads: Option<Arc<GradSlot>>, index: usize) -> Self {
        WeightRef { slot, grads, index }
    }

    pub fn name(&self) -> &str {
        &self.slot.layout().entries[self.index].name
    }

    pub fn shape(&self) -> &[usize] {
        &self.slot.layout().entries[self.index].shape
    }

    pub fn trainable(&self) -> bool {
        self.grads.is_some()
    }

    fn range(&self) -> std::ops::Range<usize> {
        let entry = &self.slot.layout().entries[self.index];
        entry.offset..entry.offset + entry.len
    }

    /// The values, while the segment is fetched. Errors name the segment otherwise, or if `T` is not its dtype.
    pub fn view<T: Element>(&self) -> Result<WeightView<T>> {
        let buffer = self.slot.get()?;
        if buffer.dtype() != T::DTYPE {
            bail!("{}: weights are {:?}, activations {:?}", self.name(), buffer.dtype(), T::DTYPE);
        }
        Ok(WeightView { buffer, range: self.range(), of: PhantomData })
    }

    /// Hands the tensor's fp32 gradient range to `add`, which adds to it; does nothing if the weight is frozen.
    pub fn add_grad(&self, add: impl FnOnce(&mut [f32])) -> Result<()> {
        let Some(grads) = &self.grads else { return Ok(()) };
        let mut held = grads.held.lock().unwrap_or_else(|e| e.into_inner());
        let Some(buffer) = held.as_mut() else { bail!("{}: no gradient bucket is open", grads.name) };
        grads.count_visit(self.index);
        add(&mut buffer.as_mut_slice::<f32>()[self.range()]);
        Ok(())
    }

    /// The same as an address, for kernels.
    pub fn at(&self, dtype: DType) -> Result<WeightAt> {
        let buffer = self.slot.get()?;
        if buffer.dtype() != dtype {
            bail!("{}: weights are {:?}, activations {dtype:?}", self.name(), buffer.dtype());
        }
        let offset = self.range().start * dtype.size_in_bytes();
        Ok(WeightAt { buffer, offset })
    }

    /// As [`Self::add_grad`], for kernels: where the range begins that they add to, as long as the bucket is open.
    /// [`Address::NULL`] if the weight is frozen.
    pub fn grad_at(&self) -> Result<Address> {
        let Some(grads) = &self.grads else { return Ok(Address::NULL) };
        let mut held = grads.held.lock().unwrap_or_else(|e| e.into_inner());
        let Some(buffer) = held.as_mut() else { bail!("{}: no gradient bucket is open", grads.name) };
        grads.count_visit(self.index);
        Ok(buffer.address_mut().at(4 * self.range().start))
    }

    /// A weight of its own for tests: its parameters are `values`, its gradients start at zero.
    pub fn alone<T: Element>(name: &str, shape: &[usize], values: &[T], trainable: bool) -> Result<Self> {
        let layout = BucketLayout::new(vec![(name.to_string(), shape.to_vec())]);
        let mut buffer = Buffer::unbudgeted(T::DTYPE, layout.len).map_err(Error::msg)?;
        buffer.as_mut_slice::<T>()[..values.len()].copy_from_slice(values);
        let grads = trainable.then(|| GradSlot::new(name));
        if let Some(grads) = &grads {
            grads.fill(Buffer::unbudgeted(DType::F32, layout.len).map_err(Error::msg)?);
        }
        let slot = ParamSlot::new(name);
        slot.lay_out(layout);
        slot.fill(Arc::new(buffer));
        Ok(WeightRef::new(slot, grads, 0))
    }

    /// What was added to the gradient so far (a copy); empty if frozen or not open.
    pub fn grad(&self) -> Vec<f32> {
        let Some(grads) = &self.grads else { return Vec::new() };
        let held = grads.held.lock().unwrap_or_else(|e| e.into_inner());
        held.as_ref().map_or(Vec::new(), |b| b.as_slice::<f32>()[self.range()].to_vec())
    }
}

/// A borrowed look at a weight; keeps the fetched buffer alive, so drop it when the op is done.
pub struct WeightView<T> {
    buffer: Arc<Buffer>,
    range: std::ops::Range<usize>,
    of: PhantomData<T>,
}

impl<T: Element> Deref for WeightView<T> {
    type Target = [T];
    fn deref(&self) -> &[T] {
        &self.buffer.as_slice::<T>()[self.range.clone()]
    }
}

/// A weight's memory; keeps the fetched buffer alive, so drop it when the kernels that read it are launched.
pub struct WeightAt {
    buffer: Arc<Buffer>,
    offset: usize,
}

impl WeightAt {
    pub fn address(&self) -> Address {
        self.buffer.address().at(self.offset)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_weight_reads_while_filled_and_collects_gradients() {
        let weight = WeightRef::alone("w", &[2, 2], &[1f32, 2.0, 3.0, 4.0], true).unwrap();
        assert_eq!(&*weight.view::<f32>().unwrap(), [1.0, 2.0, 3.0, 4.0]);
        weight.add_grad(|g| g[1] += 2.0).unwrap();
        weight.add_grad(|g| g[1] += 1.0).unwrap();
        assert_eq!(weight.grad(), [0.0, 3.0, 0.0, 0.0]);
        weight.slot.empty();
        assert!(weight.view::<f32>().err().unwrap().to_string().contains("not fetched"));
    }

    #[test]
    fn resident_parameters_change_only_when_nobody_reads() {
        let weight = WeightRef::alone("w", &[1], &[1f32], false).unwrap();
        let view = weight.view::<f32>().unwrap();
        assert!(weight.slot.update(|_| ()).is_err());
        drop(view);
        weight.slot.update(|b| b.as_mut_slice::<f32>()[0] = 5.0).unwrap();
        assert_eq!(weight.view::<f32>().unwrap()[0], 5.0);
        assert!(weight.add_grad(|_| unreachable!("frozen")).is_ok());
    }
}
