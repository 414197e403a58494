//! The tiers.

use std::fmt;

use serde::{Deserialize, Serialize};

/// Where something is between uses.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Place {
    /// The compute device's own memory; the process's where the CPU computes.
    Device,
    /// The machine's memory (page-locked where there is a GPU).
    Host,
    /// A file of the run's own on a fast drive.
    Nvme,
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Place::Device => "device",
            Place::Host => "host",
            Place::Nvme => "nvme",
        })
    }
}
