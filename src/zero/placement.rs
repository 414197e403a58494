//! Where the three states of training rest between uses.

use serde::{Deserialize, Serialize};

use super::rest::PIECE;
use crate::device::Place;

/// The tier of each state; independent of one another and of the stage.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Placement {
    pub parameters: Place,
    /// [`Place::Device`] or [`Place::Host`]: gradients are added to in every micro-batch.
    pub gradients: Place,
    /// Of optimizer state, and of master weights where these are a copy of their own.
    pub optimizer: Place,
}

impl Placement {
    /// Everything on the compute device.
    pub const DEVICE: Placement =
        Placement { parameters: Place::Device, gradients: Place::Device, optimizer: Place::Device };

    /// Elements that the optimizer updates at a time. `apart`: the device's memory is not the host's. Then, where nothing has
    /// to travel, an update is a launch, of which a GPU does one of [`PIECE`] elements faster than the host gives it the next.
    pub fn optimizer_piece(&self, apart: bool) -> usize {
        if apart && *self == Placement::DEVICE { 4 * PIECE } else { PIECE }
    }

    /// Whether anything rests on a drive.
    pub fn uses_drive(&self) -> bool {
        [self.parameters, self.gradients, self.optimizer].contains(&Place::Nvme)
    }
}
