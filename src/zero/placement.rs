//! Where the three states of training rest between uses.

use serde::{Deserialize, Serialize};

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

    /// Whether anything rests on a drive.
    pub fn uses_drive(&self) -> bool {
        [self.parameters, self.gradients, self.optimizer].contains(&Place::Nvme)
    }
}
