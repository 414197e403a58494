//! UniPC, orders 1 to 3, with either B(h): diffusers' `UniPCMultistepScheduler`. Each step first corrects the sample with
//! the answer just had, then predicts the next one. Zhao et al. 2023, <https://arxiv.org/abs/2302.04867>, algorithms 5 to 8.

use super::multistep::{Family, History, Level, Plan, exp_m1};
use super::output::mean_part;
use super::sigmas::FinalSigma;
use super::{LatentShape, Sampler, check_order, check_step};
use crate::Refusal;
use crate::diffusion::scheduler_file::{choice, flag};
use anyhow::Result;
use serde_json::Value;

pub(super) struct UniPc {
    plan: Plan,
    /// Solves for x0 rather than ε.
    clean: bool,
    /// B(h) = h rather than eʰ − 1.
    plain_b: bool,
    /// Calls after which the sample is not corrected.
    uncorrected: Vec<usize>,
    history: History,
    /// The order of the last step.
    order: usize,
    /// The sample that the last prediction started from.
    origin: Vec<f32>,
    /// Number of the next call.
    next: usize,
}

impl UniPc {
    pub(super) fn new(config: &Value, n: usize) -> Result<Self> {
        if config.get("solver_p").is_some_and(|solver| !solver.is_null()) {
            return Err(Refusal::error(
                "solver_p, another sampler inside this one, is not possible here. Remove the key.",
            ));
        }
        let solvers = [("bh2", false), ("bh1", true), ("midpoint", false), ("heun", false), ("logrho", false)];
        let plain_b = choice(config, "solver_type", "bh2", &solvers)?;
        let clean = flag(config, "predict_x0", true)?;
        let plan = Plan::read(config, n, Family::UniPc)?;
        let to_zero = plan.final_sigma == FinalSigma::Zero;
        if to_zero && (!clean || (!plan.lower_order_final && plan.order.min(n) > 1)) {
            return Err(Refusal::error(
                "predict_x0 = false and lower_order_final = false do not go with a last step to noise level zero. Set final_sigmas_type to \"sigma_min\".",
            ));
        }
        let history = History::new(plan.order);
        let uncorrected = uncorrected(config)?;
        Ok(UniPc { plan, clean, plain_b, uncorrected, history, order: 0, origin: Vec::new(), next: 0 })
    }

    /// Corrects `sample`, where the last step ended, with the network's answer there.
    fn correct(&self, call: usize, answer: &[f32], sample: &mut [f32]) {
        let step = Step::new(self, call - 1, call, self.order);
        let weights = if self.order == 1 { vec![0.5] } else { step.solve(self.order) };
        let (newest, earlier) = (weights[self.order - 1], &weights[..self.order - 1]);
        let slopes = self.mix(&step, earlier);
        let last = self.history.get(0);
        for (i, x) in sample.iter_mut().enumerate() {
            let follow = step.of_origin * self.origin[i] - step.of_answer * last[i];
            let slope = slopes.get(i).copied().unwrap_or(0.0) + newest * (answer[i] - last[i]);
            *x = follow - step.of_slope * slope;
        }
    }

    /// Takes `sample` to the next level by the answers so far, the newest among them.
    fn predict(&self, call: usize, sample: &mut [f32]) {
        let step = Step::new(self, call, call + 1, self.order);
        let weights = match self.order {
            1 => Vec::new(),
            2 => vec![0.5],
            order => step.solve(order - 1),
        };
        let slopes = self.mix(&step, &weights);
        for (x, m) in sample.iter_mut().zip(self.history.get(0)) {
            *x = step.of_origin * *x - step.of_answer * m;
        }
        sample.iter_mut().zip(slopes).for_each(|(x, slope)| *x -= step.of_slope * slope);
    }

    /// The weighted sum of the slopes from the newest answer to earlier ones; empty without weights.
    fn mix(&self, step: &Step, weights: &[f32]) -> Vec<f32> {
        let newest = self.history.get(0);
        let mut sum = Vec::new();
        for (age, (&weight, &r)) in weights.iter().zip(&step.ratios).enumerate() {
            let slopes = newest.iter().zip(self.history.get(age + 1)).map(|(m0, m)| weight * ((m - m0) / r));
            match age {
                0 => sum = slopes.collect(),
                _ => sum.iter_mut().zip(slopes).for_each(|(s, slope): (&mut f32, f32)| *s += slope),
            }
        }
        sum
    }
}

/// The numbers of one step between two levels.
struct Step {
    /// (λ of earlier answers − λ of the start)/h, and 1 for the goal.
    ratios: Vec<f32>,
    /// The right side of the equations for the weights.
    right: Vec<f32>,
    of_origin: f32,
    of_answer: f32,
    /// The factor of the weighted slopes.
    of_slope: f32,
}

impl Step {
    fn new(sampler: &UniPc, from: usize, to: usize, order: usize) -> Self {
        let levels = &sampler.plan.levels;
        let (start, goal): (Level, Level) = (levels[from], levels[to]);
        let h = goal.lambda - start.lambda;
        let mut ratios: Vec<f32> = (1..order).map(|age| (levels[from - age].lambda - start.lambda) / h).collect();
        ratios.push(1.0);
        let h = if sampler.clean { -h } else { h };
        let grown = exp_m1(h);
        let b = if sampler.plain_b { h } else { grown };
        let (mut phi, mut factorial) = (grown / h - 1.0, 1.0f32);
        let mut right = Vec::with_capacity(order);
        for i in 1..=order {
            right.push(phi * factorial / b);
            factorial *= (i + 1) as f32;
            phi = phi / h - 1.0 / factorial;
        }
        let (of_origin, scale) = match sampler.clean {
            true => (goal.sigma / start.sigma, goal.alpha),
            false => (goal.alpha / start.alpha, goal.sigma),
        };
        Step { ratios, right, of_origin, of_answer: scale * grown, of_slope: scale * b }
    }

    /// The first `n` weights ρ: Σₖ ratioₖⁱ ρₖ = rightᵢ for i = 0 … n−1, by elimination with the largest pivots.
    fn solve(&self, n: usize) -> Vec<f32> {
        let power = |r: f32, i: usize| (0..i).fold(1.0f32, |product, _| product * r);
        let mut rows: Vec<Vec<f32>> =
            (0..n).map(|i| self.ratios[..n].iter().map(|&r| power(r, i)).chain([self.right[i]]).collect()).collect();
        for column in 0..n {
            let largest = (column..n).max_by(|&a, &b| rows[a][column].abs().total_cmp(&rows[b][column].abs()));
            rows.swap(column, largest.unwrap_or(column));
            let (done, below) = rows.split_at_mut(column + 1);
            let pivot = &done[column];
            for row in below {
                let factor = row[column] / pivot[column];
                row.iter_mut().zip(pivot).skip(column).for_each(|(value, p)| *value -= factor * p);
            }
        }
        let mut weights = vec![0.0; n];
        for row in (0..n).rev() {
            let known: f32 = (row + 1..n).map(|k| rows[row][k] * weights[k]).sum();
            weights[row] = (rows[row][n] - known) / rows[row][row];
        }
        weights
    }
}

fn uncorrected(config: &Value) -> Result<Vec<usize>> {
    let Some(list) = config.get("disable_corrector").filter(|list| !list.is_null()) else { return Ok(Vec::new()) };
    let calls = list.as_array().and_then(|list| list.iter().map(|v| Some(v.as_u64()? as usize)).collect());
    calls.ok_or_else(|| {
        Refusal::error(format!("disable_corrector = {list} is not a list of numbers of steps. Restore the file."))
    })
}

impl Sampler for UniPc {
    fn timesteps(&self) -> &[f64] {
        &self.plan.calls
    }

    fn step(
        &mut self,
        call: usize,
        prediction: &[f32],
        noise: Option<&[f32]>,
        shape: LatentShape,
        sample: &mut Vec<f32>,
    ) -> Result<()> {
        check_step(self, call, prediction, noise, shape, sample)?;
        check_order(call, self.next)?;
        self.next += 1;
        let Level { alpha, sigma, .. } = self.plan.levels[call];
        let prediction = mean_part(prediction, shape);
        let answer = if self.clean {
            let mut clean = self.plan.output.clean(sample, &prediction, alpha, sigma);
            self.plan.limit.apply(&mut clean, shape);
            clean
        } else {
            self.plan.output.noise(sample, &prediction, alpha, sigma)
        };
        if call > 0 && !self.uncorrected.contains(&(call - 1)) {
            self.correct(call, &answer, sample);
        }
        self.history.push(answer);
        let left = self.plan.calls.len() - call;
        let order = if self.plan.lower_order_final { self.plan.order.min(left) } else { self.plan.order };
        self.order = if self.plan.stands_still(call) { 1 } else { order.min(call + 1) };
        self.origin.clone_from(sample);
        self.predict(call, sample);
        Ok(())
    }
}
