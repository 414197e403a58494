//! DPM-Solver and DPM-Solver++, multistep, orders 1 to 3, for the ordinary and the stochastic differential equation:
//! diffusers' `DPMSolverMultistepScheduler`. Lu et al. 2022, <https://arxiv.org/abs/2206.00927> and
//! <https://arxiv.org/abs/2211.01095>.

use super::multistep::{Family, History, Level, Plan, exp};
use super::output::{Output, mean_part};
use super::sigmas::FinalSigma;
use super::{LatentShape, Sampler, check_order, check_step};
use crate::Refusal;
use crate::diffusion::scheduler_file::{choice, flag};
use anyhow::{Context, Result};
use serde_json::Value;

pub(super) struct DpmSolver {
    plan: Plan,
    /// Solves for x0 ("++") rather than ε.
    clean: bool,
    stochastic: bool,
    /// The second order method: Heun's rather than the midpoint's.
    heun: bool,
    /// The last step is of first order.
    euler_at_final: bool,
    history: History,
    /// Number of the next call.
    next: usize,
}

impl DpmSolver {
    /// `stochastic` chooses the stochastic form of the configured algorithm, or the ordinary one.
    pub(super) fn new(config: &Value, n: usize, stochastic: bool) -> Result<Self> {
        let algorithms = [
            ("dpmsolver++", true),
            ("dpmsolver", false),
            ("sde-dpmsolver++", true),
            ("sde-dpmsolver", false),
            // Another class's, for which this class takes its own.
            ("deis", true),
        ];
        let clean = choice(config, "algorithm_type", "dpmsolver++", &algorithms)?;
        let solvers = [("midpoint", false), ("heun", true), ("logrho", false), ("bh1", false), ("bh2", false)];
        let heun = choice(config, "solver_type", "midpoint", &solvers)?;
        let plan = Plan::read(config, n, Family::DpmSolver)?;
        if !clean && plan.final_sigma == FinalSigma::Zero {
            return Err(Refusal::error(
                "algorithm_type \"dpmsolver\" and \"sde-dpmsolver\" cannot end at noise level zero. Set final_sigmas_type to \"sigma_min\", or algorithm_type to \"dpmsolver++\".",
            ));
        }
        if !clean && stochastic && plan.order == 3 {
            return Err(Refusal::error(
                "algorithm_type \"sde-dpmsolver\" has no third order. Set solver_order to 2, or algorithm_type to \"sde-dpmsolver++\".",
            ));
        }
        let euler_at_final = flag(config, "euler_at_final", false)?;
        let history = History::new(plan.order);
        Ok(DpmSolver { plan, clean, stochastic, heun, euler_at_final, history, next: 0 })
    }

    /// The network's answer as what is solved for.
    fn convert(&self, call: usize, sample: &[f32], prediction: &[f32], shape: LatentShape) -> Vec<f32> {
        let Level { alpha, sigma, .. } = self.plan.levels[call];
        let (output, limit) = (self.plan.output, self.plan.limit);
        if self.clean {
            let mut clean = output.clean(sample, prediction, alpha, sigma);
            limit.apply(&mut clean, shape);
            return clean;
        }
        let eps = output.noise(sample, prediction, alpha, sigma);
        if limit == super::output::Limit::None {
            return eps;
        }
        let mut clean = Output::Noise.clean(sample, &eps, alpha, sigma);
        limit.apply(&mut clean, shape);
        Output::Clean.noise(sample, &clean, alpha, sigma)
    }

    /// The order of a call's step: as configured, but no higher than the history allows, and lower at the end.
    fn order(&self, call: usize) -> usize {
        let left = self.plan.calls.len() - call;
        let few = self.plan.lower_order_final && self.plan.calls.len() < 15;
        let allowed = match left {
            _ if self.plan.stands_still(call) => 1,
            1 if self.euler_at_final || few || self.plan.final_sigma == FinalSigma::Zero => 1,
            2 if few => 2,
            _ => 3,
        };
        self.plan.order.min(self.history.len()).min(allowed)
    }

    /// The factors of the sample, of the answer, of its first and second differences, and of the noise.
    fn factors(&self, call: usize, order: usize) -> [f32; 5] {
        let (to, from) = (self.plan.levels[call + 1], self.plan.levels[call]);
        let h = to.lambda - from.lambda;
        // The second order's two methods; the third order has but one.
        let exact = self.heun || order == 3;
        if self.clean && !self.stochastic {
            let grown = exp(-h) - 1.0;
            let first = if exact { to.alpha * (grown / h + 1.0) } else { -(0.5 * (to.alpha * grown)) };
            let second = -(to.alpha * ((grown + h) / (h * h) - 0.5));
            return [to.sigma / from.sigma, -(to.alpha * grown), first, second, 0.0];
        }
        if self.clean {
            let grown = 1.0 - exp(-2.0 * h);
            let first = if exact { to.alpha * (grown / (-2.0 * h) + 1.0) } else { 0.5 * (to.alpha * grown) };
            let twice = 2.0 * h;
            let second = to.alpha * ((grown - twice) / (twice * twice) - 0.5);
            let noise = to.sigma * grown.sqrt();
            return [to.sigma / from.sigma * exp(-h), to.alpha * grown, first, second, noise];
        }
        let (grown, sample) = (exp(h) - 1.0, to.alpha / from.alpha);
        let first = if exact { to.sigma * (grown / h - 1.0) } else { 0.5 * (to.sigma * grown) };
        let second = -(to.sigma * ((grown - h) / (h * h) - 0.5));
        match self.stochastic {
            false => [sample, -(to.sigma * grown), -first, second, 0.0],
            true => {
                let noise = to.sigma * (exp(2.0 * h) - 1.0).sqrt();
                [sample, -2.0 * (to.sigma * grown), -2.0 * first, 0.0, noise]
            }
        }
    }

    /// The answers' first differences over λ (one, or in the third order the extrapolated one) and second ones.
    fn differences(&self, call: usize, order: usize) -> (Vec<f32>, Vec<f32>) {
        let lambda = |call: usize| self.plan.levels[call].lambda;
        let h = lambda(call + 1) - lambda(call);
        let slope = |age: usize, r: f32| {
            let (new, old) = (self.history.get(age).iter(), self.history.get(age + 1));
            let by = 1.0 / r;
            new.zip(old).map(move |(m0, m1)| by * (m0 - m1))
        };
        if order < 2 {
            return (Vec::new(), Vec::new());
        }
        let r0 = (lambda(call) - lambda(call - 1)) / h;
        if order == 2 {
            return (slope(0, r0).collect(), Vec::new());
        }
        let r1 = (lambda(call - 1) - lambda(call - 2)) / h;
        let (share, by) = (r0 / (r0 + r1), 1.0 / (r0 + r1));
        slope(0, r0).zip(slope(1, r1)).map(|(new, old)| (new + share * (new - old), by * (new - old))).unzip()
    }
}

impl Sampler for DpmSolver {
    fn timesteps(&self) -> &[f64] {
        &self.plan.calls
    }

    fn wants_noise(&self, _call: usize) -> bool {
        self.stochastic
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
        let answer = self.convert(call, sample, &mean_part(prediction, shape), shape);
        self.history.push(answer);
        let order = self.order(call);
        let [of_sample, of_answer, of_first, of_second, of_noise] = self.factors(call, order);
        let (first, second) = self.differences(call, order);
        sample.iter_mut().zip(self.history.get(0)).for_each(|(x, m)| *x = of_sample * *x + of_answer * m);
        sample.iter_mut().zip(&first).for_each(|(x, d)| *x += of_first * d);
        sample.iter_mut().zip(&second).for_each(|(x, d)| *x += of_second * d);
        if self.stochastic {
            let noise = noise.context("the step needs noise")?;
            sample.iter_mut().zip(noise).for_each(|(x, z)| *x += of_noise * z);
        }
        Ok(())
    }
}
