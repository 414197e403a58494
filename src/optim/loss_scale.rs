//! Loss scaling for fp16: the gradient that enters the backward pass is multiplied by a scale, so that small gradients
//! do not vanish, and what comes out is divided by it. Where something overflows, the step is skipped and the scale
//! backs off. As PyTorch's `torch.amp.GradScaler`, with DeepSpeed's minimum. Pure state: it sees no gradients.

use serde::{Deserialize, Serialize};

/// How a run's scale behaves.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum ScalePolicy {
    Dynamic {
        start: f64,
        /// Steps in a row without overflow after which the scale doubles.
        window: u64,
        /// The scale does not fall below; an overflow there ends the run.
        minimum: f64,
    },
    Fixed(f64),
}

/// Steps in a row that a run with a fixed scale may skip: as many as a dynamic one takes from 2^16 to 1.
const FIXED_SKIPS: u64 = 16;
const GROWTH: f64 = 2.0;
const BACK_OFF: f64 = 0.5;

/// What a checkpoint keeps.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct ScaleState {
    pub scale: f64,
    /// Steps without overflow since the scale last changed.
    pub good_steps: u64,
    /// Steps of the run so far that were skipped.
    pub skipped: u64,
    /// The last so many steps were all skipped.
    pub skipped_in_a_row: u64,
}

/// What follows from a step that overflowed.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Overflow {
    /// It is skipped; the next one has this scale.
    Skip(f64),
    /// The scale cannot go lower, or skipping has not helped.
    GiveUp,
}

/// The scale of a run.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct LossScale {
    policy: ScalePolicy,
    state: ScaleState,
}

impl LossScale {
    /// At the beginning, or as a checkpoint kept it. A fixed scale is the policy's, whatever was kept.
    pub fn new(policy: ScalePolicy, kept: Option<ScaleState>) -> Self {
        let start = match policy {
            ScalePolicy::Dynamic { start, .. } => start,
            ScalePolicy::Fixed(scale) => scale,
        };
        let fresh = ScaleState { scale: start, good_steps: 0, skipped: 0, skipped_in_a_row: 0 };
        let mut state = kept.unwrap_or(fresh);
        match policy {
            ScalePolicy::Dynamic { minimum, .. } => state.scale = state.scale.max(minimum),
            ScalePolicy::Fixed(scale) => state.scale = scale,
        }
        LossScale { policy, state }
    }

    /// By which the coming step's gradients are multiplied.
    pub fn scale(&self) -> f64 {
        self.state.scale
    }

    pub fn state(&self) -> ScaleState {
        self.state
    }

    /// The step's gradients were all finite.
    pub fn good_step(&mut self) {
        self.state.skipped_in_a_row = 0;
        self.state.good_steps += 1;
        if let ScalePolicy::Dynamic { window, .. } = self.policy
            && self.state.good_steps >= window
        {
            let grown = self.state.scale * GROWTH;
            // Kernels see it as f32.
            if (grown as f32).is_finite() {
                self.state.scale = grown;
            }
            self.state.good_steps = 0;
        }
    }

    /// A gradient, or the loss itself, was not finite.
    pub fn overflow(&mut self) -> Overflow {
        self.state.skipped += 1;
        self.state.skipped_in_a_row += 1;
        self.state.good_steps = 0;
        match self.policy {
            ScalePolicy::Dynamic { minimum, .. } if self.state.scale > minimum => {
                self.state.scale = (self.state.scale * BACK_OFF).max(minimum);
                Overflow::Skip(self.state.scale)
            }
            ScalePolicy::Fixed(scale) if self.state.skipped_in_a_row <= FIXED_SKIPS => Overflow::Skip(scale),
            _ => Overflow::GiveUp,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const DYNAMIC: ScalePolicy = ScalePolicy::Dynamic { start: 65536.0, window: 4, minimum: 1.0 };

    /// Scale and good steps after each step; x: one that overflowed.
    fn follow(policy: ScalePolicy, steps: &str) -> Vec<(f64, u64)> {
        let mut scale = LossScale::new(policy, None);
        let step = |kind| {
            match kind {
                'x' => assert!(matches!(scale.overflow(), Overflow::Skip(_))),
                _ => scale.good_step(),
            }
            (scale.scale(), scale.state().good_steps)
        };
        steps.chars().map(step).collect()
    }

    /// What torch.amp.GradScaler (torch 2.15, growth_interval=4) gave: get_scale() and _get_growth_tracker() after each
    /// update().
    #[test]
    fn it_follows_torch_s_grad_scaler() {
        let steps = "...x....xx......x.x.....................xxxxx.......x";
        #[rustfmt::skip]
        let want: [(u32, u64); 53] = [
            (65536, 1), (65536, 2), (65536, 3), (32768, 0), (32768, 1), (32768, 2), (32768, 3), (65536, 0), (32768, 0),
            (16384, 0), (16384, 1), (16384, 2), (16384, 3), (32768, 0), (32768, 1), (32768, 2), (16384, 0), (16384, 1),
            (8192, 0), (8192, 1), (8192, 2), (8192, 3), (16384, 0), (16384, 1), (16384, 2), (16384, 3), (32768, 0),
            (32768, 1), (32768, 2), (32768, 3), (65536, 0), (65536, 1), (65536, 2), (65536, 3), (131072, 0), (131072, 1),
            (131072, 2), (131072, 3), (262144, 0), (262144, 1), (131072, 0), (65536, 0), (32768, 0), (16384, 0),
            (8192, 0), (8192, 1), (8192, 2), (8192, 3), (16384, 0), (16384, 1), (16384, 2), (16384, 3), (8192, 0),
        ];
        assert_eq!(follow(DYNAMIC, steps), want.map(|(scale, good)| (f64::from(scale), good)));
        // init_scale=3, growth_interval=3; init_scale=2**126, growth_interval=1: it does not grow to infinity.
        let three = ScalePolicy::Dynamic { start: 3.0, window: 3, minimum: 1.0 };
        let scales: Vec<f64> = follow(three, "..x.....x").iter().map(|(scale, _)| *scale).collect();
        assert_eq!(scales, [3.0, 3.0, 1.5, 1.5, 1.5, 3.0, 3.0, 3.0, 1.5]);
        let huge = ScalePolicy::Dynamic { start: 126f64.exp2(), window: 1, minimum: 1.0 };
        assert_eq!(follow(huge, "....")[3].0, 127f64.exp2());
    }

    #[test]
    fn at_the_minimum_it_gives_up() {
        let policy = ScalePolicy::Dynamic { start: 8.0, window: 2, minimum: 3.0 };
        let mut scale = LossScale::new(policy, None);
        assert_eq!([scale.overflow(), scale.overflow()], [Overflow::Skip(4.0), Overflow::Skip(3.0)]);
        assert_eq!(scale.overflow(), Overflow::GiveUp);
        let mut scale = LossScale::new(policy, Some(ScaleState { scale: 3.0, ..scale.state() }));
        [(); 2].iter().for_each(|()| scale.good_step());
        assert_eq!((scale.scale(), scale.state().skipped), (6.0, 3), "it grows from the minimum, too");
    }

    #[test]
    fn a_fixed_scale_stays_and_skips_some_steps_in_a_row() {
        let mut scale = LossScale::new(ScalePolicy::Fixed(128.0), None);
        (0..5000).for_each(|_| scale.good_step());
        let skips = (0..100).take_while(|_| scale.overflow() == Overflow::Skip(128.0)).count();
        assert_eq!(skips, 16);
        scale.good_step();
        assert_eq!(scale.overflow(), Overflow::Skip(128.0));
        assert_eq!((scale.scale(), scale.state().skipped), (128.0, 18));
    }

    #[test]
    fn what_was_kept_goes_on() {
        let mut whole = LossScale::new(DYNAMIC, None);
        let mut stopped = whole;
        for i in 0..40 {
            for scale in [&mut whole, &mut stopped] {
                if i % 7 == 3 {
                    scale.overflow();
                } else {
                    scale.good_step();
                }
            }
            let text = serde_json::to_string(&stopped.state()).unwrap();
            stopped = LossScale::new(DYNAMIC, Some(serde_json::from_str(&text).unwrap()));
            assert_eq!(whole, stopped);
        }
        assert_eq!(LossScale::new(ScalePolicy::Fixed(2.0), Some(whole.state())).scale(), 2.0);
    }
}
