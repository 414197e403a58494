//! How many micro-batches and optimizer steps a run has (training contract 4.8).

use super::plan::TrainPlan;

/// The run's length. A micro-batch here is what all ranks take together.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Steps {
    /// Items of one epoch: the larger of instance images and class images.
    pub items: usize,
    /// Micro-batches in an epoch; the last may be smaller.
    pub micro_batches_per_epoch: usize,
    /// Optimizer steps in an epoch; the last may gather fewer micro-batches.
    pub per_epoch: usize,
    /// Optimizer steps in the run, which learning-rate schedules are stretched over.
    pub total: usize,
    /// Epochs that are begun.
    pub epochs: usize,
}

impl Steps {
    /// For `items` of at least 1. An epoch is ceil(items / (batch × ranks)) micro-batches and ceil of these /
    /// accumulation steps; `max_steps` wins over epochs.
    pub fn of(items: usize, train: &TrainPlan, world_size: usize) -> Steps {
        let micro_batches_per_epoch = items.div_ceil(train.batch_size.saturating_mul(world_size)).max(1);
        let per_epoch = micro_batches_per_epoch.div_ceil(train.accumulation);
        let total = train.max_steps.unwrap_or(train.epochs.saturating_mul(per_epoch));
        Steps { items, micro_batches_per_epoch, per_epoch, total, epochs: total.div_ceil(per_epoch) }
    }
}

#[cfg(test)]
mod tests {
    use super::super::Draft;
    use super::*;

    fn of(items: usize, train: &str, world_size: usize) -> (usize, usize, usize, usize) {
        let draft = Draft::parse("t.toml", &format!("[train]\n{train}"), &[], 1).unwrap();
        let steps = Steps::of(items, &draft.plan.train, world_size);
        (steps.micro_batches_per_epoch, steps.per_epoch, steps.total, steps.epochs)
    }

    #[test]
    fn epochs_end_with_what_is_left() {
        assert_eq!(of(5, "batch_size = 2", 1), (3, 3, 3, 1));
        assert_eq!(of(5, "batch_size = 2\ngradient_accumulation_steps = 2\nepochs = 4", 1), (3, 2, 8, 4));
        assert_eq!(of(5, "batch_size = 2\nepochs = 4", 3), (1, 1, 4, 4));
        assert_eq!(of(6, "batch_size = 2\ngradient_accumulation_steps = 2\nmax_steps = 5", 1), (3, 2, 5, 3));
        assert_eq!(of(1, "gradient_accumulation_steps = 8\nmax_steps = 1", 4), (1, 1, 1, 1));
    }
}
