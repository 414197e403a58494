//! The update of one piece, where its optimizer computes: by the processor in the host's memory, or by kernels in an
//! accelerator's. The same bits.

use std::ops::Range;
use std::sync::Arc;

use anyhow::{Result, bail};
use candle_core::DType;

use super::optimizer::StepScale;
use super::step::Group;
use crate::device::{Accelerator, Arena, Buffer, bulk};
use crate::kernels::optimizer as launched;
use crate::optim::{self, DeviceWeights, RecordLayout, Rounded, StateKind, StochasticRounding};
use crate::zero::Weights;

/// How a piece is updated.
pub(super) struct Step<'a> {
    pub scale: StepScale,
    pub group: Group,
    pub layout: &'a RecordLayout,
    pub rounding: StochasticRounding,
}

/// What updates on an accelerator need beside the pieces.
pub(super) struct OnAccelerator {
    on: Arc<dyn Accelerator>,
    /// The code books of 8-bit state.
    tables: Option<Buffer>,
    /// A u32 for every segment: 1 if one of its gradients was not finite.
    flags: Buffer,
}

impl OnAccelerator {
    /// In the accelerator's memory that `arena` hands out; none if that is the host's.
    pub fn new(arena: &Arena, kind: StateKind, segments: usize) -> Result<Option<Self>> {
        let Some(on) = arena.accelerator().cloned() else { return Ok(None) };
        let tables = match kind {
            StateKind::F32 => None,
            StateKind::Bits8 => {
                let words = optim::table_words();
                let mut tables = arena.alloc_dirty(DType::U8, 4 * words.len(), "the optimizer's code books")?;
                bulk::write_bytes(bytemuck::cast_slice(&words), &mut tables, 0)?;
                Some(tables)
            }
        };
        let flags = arena.alloc(DType::U8, 4 * segments, "the optimizer's flags")?;
        Ok(Some(OnAccelerator { on, tables, flags }))
    }

    /// Lowers segment `i`'s flag.
    pub fn begin(&self, i: u64) -> Result<()> {
        self.on.zero(self.flags.address().at(4 * i as usize), 4)
    }

    /// Whether all gradients of segment `i` were finite; waits for what was launched.
    pub fn was_finite(&self, i: u64) -> Result<bool> {
        let mut flag = [0u8; 4];
        bulk::read_bytes(&self.flags, 4 * i as usize, &mut flag)?;
        Ok(flag == [0; 4])
    }

    /// Launches the update of a piece of segment `i`.
    pub fn launch(
        &self,
        i: u64,
        step: &Step,
        record: &Buffer,
        weights: Weights,
        (grads, from): (&Buffer, Range<usize>),
    ) -> Result<()> {
        let place = |buffer: &Buffer, at: &Range<usize>| buffer.address().at(at.start * buffer.dtype().size_in_bytes());
        let values = place(weights.values, &weights.at);
        let master = match weights.values.dtype() {
            DType::BF16 => DeviceWeights::Bf16 { values, rounding: step.rounding },
            _ => DeviceWeights::F32(values),
        };
        let rounded = match &weights.rounded {
            None => launched::Rounded::None,
            Some((copy, at)) if copy.dtype() == DType::BF16 => launched::Rounded::Bf16(place(copy, at)),
            Some((copy, at)) => launched::Rounded::F16(place(copy, at)),
        };
        let grads = match grads.dtype() {
            DType::BF16 => launched::Grads::Bf16(place(grads, &from)),
            _ => launched::Grads::F32(place(grads, &from)),
        };
        let none = crate::kernels::Address::NULL;
        let tables = optim::tables_at(self.tables.as_ref().map_or(none, Buffer::address));
        let flag = self.flags.address().at(4 * i as usize);
        let StepScale { step: number, grad_scale } = step.scale;
        let Group { adamw, rate } = step.group;
        let (on, layout) = (&*self.on, step.layout);
        adamw.launch_chunk(
            on,
            &tables,
            number,
            rate,
            grad_scale,
            layout,
            record.address(),
            master,
            rounded,
            grads,
            flag,
        )
    }
}

/// Updates a piece in the host's memory; an error if a gradient is not finite.
pub(super) fn update_here(
    step: &Step,
    record: &mut Buffer,
    weights: Weights,
    (grads, from): (&Buffer, Range<usize>),
) -> Result<()> {
    let grads = match grads.dtype() {
        DType::BF16 => optim::Grads::Bf16(&grads.as_slice()[from]),
        _ => optim::Grads::F32(&grads.as_slice()[from]),
    };
    let Weights { values, at, rounded } = weights;
    let values = match values.dtype() {
        DType::BF16 => optim::Weights::Bf16 { values: &mut values.as_mut_slice()[at], rounding: step.rounding },
        _ => optim::Weights::F32(&mut values.as_mut_slice()[at]),
    };
    let rounded = match rounded {
        None => Rounded::None,
        Some((copy, to)) if copy.dtype() == DType::BF16 => Rounded::Bf16(&mut copy.as_mut_slice()[to]),
        Some((copy, to)) => Rounded::F16(&mut copy.as_mut_slice()[to]),
    };
    let StepScale { step: number, grad_scale } = step.scale;
    let Group { adamw, rate } = step.group;
    let bytes = record.bytes_mut();
    let finite = adamw.update_chunk(number, rate, grad_scale, step.layout, bytes, values, rounded, grads);
    if finite { Ok(()) } else { bail!("a gradient is not finite") }
}
