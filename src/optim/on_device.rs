//! The update of a chunk whose weights, gradients and record are in the compute device's memory: the same bits as
//! [`AdamW::update_chunk`], by the kernels of [`crate::kernels::optimizer`].

use anyhow::Result;

use super::adamw::AdamW;
use super::code_book::Book;
use super::record::{Part, RecordLayout};
use super::rounding::StochasticRounding;
use crate::kernels::optimizer::{Coefficients, Draws, Grads, Moments, Rounded, Tables, Weights, adamw};
use crate::kernels::{Address, Launcher};

#[cfg(all(test, any(feature = "cuda", feature = "emulate")))]
mod tests;

/// The master weights that are updated.
#[derive(Clone, Copy, Debug)]
pub enum DeviceWeights {
    F32(Address),
    Bf16 { values: Address, rounding: StochasticRounding },
}

/// The words of the code books' tables, as they are to be copied to the device once, for [`tables_at`].
pub fn table_words() -> Vec<u32> {
    let [m, v] = [Book::Signed, Book::Unsigned].map(Book::codes);
    let values = m.values.iter().chain(&v.values).map(|x| x.to_bits());
    values.chain(m.steps_below().iter().copied()).chain(v.steps_below().iter().copied()).collect()
}

/// The tables, once [`table_words`] are at this address.
pub fn tables_at(at: Address) -> Tables {
    let books = [Book::Signed, Book::Unsigned].map(Book::codes);
    Tables { at, runs: books.map(|b| b.steps_below().len() as u32), lowest: books.map(|b| b.lowest) }
}

impl AdamW {
    /// As [`AdamW::update_chunk`], on the device: launched, not waited for. The record lies at `record`, a multiple of 64,
    /// as `layout` says; gradients and the half-precision copy begin with the chunk. The u32 at `overflow` becomes 1 if a
    /// gradient is not finite, and is left alone otherwise.
    #[allow(clippy::too_many_arguments, reason = "what a step is made of; a struct would only repeat the names")]
    pub fn launch_chunk(
        &self,
        launcher: &dyn Launcher,
        tables: &Tables,
        step: u64,
        rate: f64,
        grad_scale: f32,
        layout: &RecordLayout,
        record: Address,
        weights: DeviceWeights,
        rounded: Rounded,
        grads: Grads,
        overflow: Address,
    ) -> Result<()> {
        let c = self.device_coefficients(step, rate, grad_scale);
        let (coded, parts) = (layout.coded(), layout.parts());
        let part = |name: &str| {
            let found = parts.iter().find(|part: &&Part| part.name == name);
            found.map_or(Address::NULL, |part| record.at(part.bytes.start))
        };
        let eight = Moments::Bits8 {
            m: part("m8"),
            v: part("v8"),
            m_absmax: part("m_absmax"),
            v_absmax: part("v_absmax"),
            tables,
        };
        let full = Moments::F32 { m: part("m"), v: part("v") };
        for (from, len, moments) in [(0, coded, eight), (coded, layout.elements() - coded, full)] {
            let (weights, rounded, grads) = (weights.from(from), after(rounded, from), gradients(grads, from));
            adamw(launcher, &c, len, moments, weights, rounded, grads, overflow)?;
        }
        Ok(())
    }

    fn device_coefficients(&self, step: u64, rate: f64, grad_scale: f32) -> Coefficients {
        let c = self.coefficients(step, rate, grad_scale);
        Coefficients {
            decay: c.decay,
            beta1: c.beta1,
            one_minus_beta1: c.one_minus_beta1,
            beta2: c.beta2,
            one_minus_beta2: c.one_minus_beta2,
            correction2_root: c.correction2_root.value,
            epsilon: c.epsilon,
            step_size: c.step_size,
            grad_scale: c.grad_scale,
        }
    }
}

impl DeviceWeights {
    /// Those from element `from` on.
    fn from(self, from: usize) -> Weights {
        match self {
            DeviceWeights::F32(values) => Weights::F32(values.at(4 * from)),
            DeviceWeights::Bf16 { values, rounding } => {
                let keys = rounding.keys();
                let element = (rounding.start as u32).wrapping_add(from as u32);
                let draws = Draws { first: keys.first, second: keys.second, element };
                Weights::Bf16 { values: values.at(2 * from), draws }
            }
        }
    }
}

/// The copy from element `from` on.
fn after(rounded: Rounded, from: usize) -> Rounded {
    match rounded {
        Rounded::None => Rounded::None,
        Rounded::Bf16(copy) => Rounded::Bf16(copy.at(2 * from)),
        Rounded::F16(copy) => Rounded::F16(copy.at(2 * from)),
    }
}

fn gradients(grads: Grads, from: usize) -> Grads {
    match grads {
        Grads::F32(values) => Grads::F32(values.at(4 * from)),
        Grads::Bf16(values) => Grads::Bf16(values.at(2 * from)),
    }
}
