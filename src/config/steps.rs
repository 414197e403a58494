//! How many micro-batches and optimizer steps a run has (training contract 4.8).

use anyhow::Result;

use super::plan::TrainPlan;
use crate::Refusal;
use crate::diffusion::Record;

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

    /// The same where a record says how many items each micro-batch has. `per_epoch` is then the first epoch's.
    ///
    /// # Errors
    /// A [`Refusal`] if the record ends before the run does.
    pub fn replayed(record: &Record, items: usize, train: &TrainPlan) -> Result<Steps> {
        let batches = (0..record.len()).map(|k| record.items(k));
        let (walked, done) = Steps::walk(batches, items, train);
        if done {
            return Ok(walked);
        }
        let remedy = match walked.total {
            0 => "name a longer one, or lower train.gradient_accumulation_steps".to_string(),
            steps => format!("write max_steps = {steps} under [train], or name a longer one"),
        };
        Err(Refusal::error(format!(
            "the record holds {} micro-batches, which make {} optimizer steps here, and the run is longer: {remedy}",
            record.len(),
            walked.total
        )))
    }

    /// Walks through batches until the run is over; whether it came to its end.
    fn walk(batches: impl Iterator<Item = usize>, items: usize, train: &TrainPlan) -> (Steps, bool) {
        let mut steps = Steps { items, micro_batches_per_epoch: 0, per_epoch: 0, total: 0, epochs: 0 };
        let (mut in_epoch, mut in_step, mut whole_epochs) = (0, 0, 0);
        for batch in batches {
            if in_epoch == 0 {
                steps.epochs += 1;
            }
            (in_epoch, in_step) = (in_epoch + batch, in_step + 1);
            let first = steps.epochs == 1;
            steps.micro_batches_per_epoch += usize::from(first);
            let ends_epoch = in_epoch >= items;
            if ends_epoch || in_step == train.accumulation {
                in_step = 0;
                steps.total += 1;
                steps.per_epoch += usize::from(first);
            }
            if ends_epoch {
                (in_epoch, whole_epochs) = (0, whole_epochs + 1);
            }
            let done = match train.max_steps {
                Some(most) => steps.total == most,
                None => whole_epochs == train.epochs,
            };
            if done {
                return (steps, true);
            }
        }
        (steps, false)
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
    fn a_record_s_batches_are_walked_through() {
        let walk = |batches: &[usize], items, train: &str| {
            let draft = Draft::parse("t.toml", &format!("[train]\n{train}"), &[], 1).unwrap();
            let (steps, done) = Steps::walk(batches.iter().copied(), items, &draft.plan.train);
            (steps.micro_batches_per_epoch, steps.per_epoch, steps.total, steps.epochs, done)
        };
        let batches = [2, 2, 1, 2, 2, 1];
        assert_eq!(walk(&batches, 5, "max_steps = 6"), (3, 3, 6, 2, true));
        assert_eq!(walk(&batches, 5, "epochs = 2\ngradient_accumulation_steps = 2"), (3, 2, 4, 2, true));
        assert_eq!(walk(&batches, 5, ""), (3, 3, 3, 1, true));
        assert_eq!(walk(&batches, 5, "epochs = 3"), (3, 3, 6, 2, false));
        assert_eq!(walk(&batches, 50, "gradient_accumulation_steps = 9"), (6, 0, 0, 1, false));
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
