//! The memory of a rank's tiers, and the way between them.

use std::sync::Arc;

use anyhow::{Context, Result};
use candle_core::DType;

use super::Placement;
use super::rest::{Copies, Staging};
use crate::device::{Arena, Delays, Hardware, Memory, Place, Queue, StateFile, Usage};

/// The arenas of the three states that ZeRO partitions, in one tier. What a stage's collectives and copies hold for a
/// moment is charged to the arena of what they carry.
#[derive(Clone, Debug)]
pub struct States {
    pub parameters: Arena,
    pub gradients: Arena,
    pub optimizer: Arena,
    /// Inputs of segments that wait here for the way back. (On the device activations are the ops' own.)
    pub activations: Arena,
}

impl States {
    /// Below a tier's arena, whose limit binds them together.
    pub fn within(tier: &Arena) -> Self {
        let [parameters, gradients, optimizer, activations] =
            ["parameters", "gradients", "optimizer", "activations"].map(|state| tier.child(state));
        States { parameters, gradients, optimizer, activations }
    }

    /// Bytes now and at most: of parameters, gradients, optimizer state.
    pub fn usage(&self) -> [Usage; 3] {
        [&self.parameters, &self.gradients, &self.optimizer].map(Arena::usage)
    }
}

/// Where a rank's states rest, in what precision, and the queue on which they travel.
#[derive(Clone)]
pub struct Tiers {
    pub placement: Placement,
    /// bf16: parameters rest in bf16 and are their own master copy. fp32: the usual.
    pub master: DType,
    /// What sums of gradients rest in between micro-batches: fp32 or bf16.
    pub gradients: DType,
    /// Bring the next segment's parameters while one computes.
    pub prefetch: bool,
    pub memory: Memory,
    pub device: States,
    pub host: States,
    /// The run's file on a drive, if anything rests there.
    pub drive: Option<Arc<StateFile>>,
    /// Copies and collectives, in the order in which they were asked for.
    pub traffic: Arc<Queue>,
    /// Activations on their way to the host and back.
    pub activations: Arc<Queue>,
    /// Parameters that are read for the backward before it begins.
    pub ahead: Arc<Queue>,
    /// Of the optimizer's pieces, where the device's memory is not the host's.
    pub copies: Option<Arc<Copies>>,
}

impl Tiers {
    /// Everything in the processor's memory, without limits.
    pub fn on_device() -> Result<Self> {
        Self::unlimited(Placement::DEVICE, None, None)
    }

    /// Everything in the device's memory, without limits.
    pub fn on(hardware: &Hardware) -> Result<Self> {
        Self::within(hardware.memory(None, None), Placement::DEVICE, None, None)
    }

    /// Without limits. `delays`: copies and collectives are late now and then.
    pub fn unlimited(placement: Placement, drive: Option<Arc<StateFile>>, delays: Option<Arc<Delays>>) -> Result<Self> {
        let memory = Memory { device: Arena::new("device", None), host: Arena::new("host", None) };
        Self::within(memory, placement, drive, delays)
    }

    /// Within a rank's memory; fp32 masters and sums, with prefetch.
    pub fn within(
        memory: Memory,
        placement: Placement,
        drive: Option<Arc<StateFile>>,
        delays: Option<Arc<Delays>>,
    ) -> Result<Self> {
        Ok(Tiers {
            device: States::within(&memory.device),
            host: States::within(&memory.host),
            placement,
            master: DType::F32,
            gradients: DType::F32,
            prefetch: true,
            drive,
            copies: match memory.device.accelerator() {
                Some(_) => Some(Arc::new(Copies::new(delays.clone())?)),
                None => None,
            },
            memory,
            traffic: Arc::new(Queue::late("traffic", delays.clone())?),
            activations: Arc::new(Queue::late("activations", delays.clone())?),
            ahead: Arc::new(Queue::late("read ahead", delays)?),
        })
    }

    /// The same memory for networks that do not train and rest on the device.
    pub fn frozen(&self) -> Self {
        Tiers { placement: Placement::DEVICE, master: DType::F32, drive: None, ..self.clone() }
    }

    /// The arenas of a tier in memory; what rests on a drive passes through the host's.
    pub fn states(&self, place: Place) -> &States {
        match place {
            Place::Device => &self.device,
            Place::Host | Place::Nvme => &self.host,
        }
    }

    /// Where the optimizer computes: where its state rests, but for what is on a drive, which it finds on the host. (Where
    /// the processor computes, its pieces are the host's.)
    pub fn optimizer_states(&self) -> &States {
        match self.device_is_apart() {
            true => self.states(self.placement.optimizer),
            false => &self.host,
        }
    }

    /// Elements that the optimizer updates at a time.
    pub fn optimizer_piece(&self) -> usize {
        self.placement.optimizer_piece(self.device_is_apart())
    }

    /// Whether the device's memory is not the host's.
    fn device_is_apart(&self) -> bool {
        self.memory.device.accelerator().is_some()
    }

    /// A side for the optimizer's pieces, in this memory.
    pub fn staging(&self, arena: Arena) -> Staging {
        Staging::new(arena, self.copies.clone())
    }

    pub fn drive(&self) -> Result<&Arc<StateFile>> {
        self.drive.as_ref().context("something rests on a drive, and no file was opened there")
    }
}
