//! The ZeRO stage as three answers. Asked by the parameter store and the gradient reducer, nowhere else.

/// Which of a run's states are partitioned over the ranks (Rajbhandari et al., "ZeRO", 2020).
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Stage {
    Replicated = 0,
    OptimizerState = 1,
    Gradients = 2,
    Parameters = 3,
}

impl Stage {
    pub fn from_number(stage: u8) -> Option<Self> {
        [Stage::Replicated, Stage::OptimizerState, Stage::Gradients, Stage::Parameters].get(stage as usize).copied()
    }

    pub fn partitions_optimizer(self) -> bool {
        self >= Stage::OptimizerState
    }

    pub fn partitions_gradients(self) -> bool {
        self >= Stage::Gradients
    }

    pub fn partitions_parameters(self) -> bool {
        self >= Stage::Parameters
    }
}
