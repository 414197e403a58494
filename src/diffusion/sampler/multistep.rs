//! What DPM-Solver and UniPC share: the plan of their time steps and noise levels, a level's α, σ and λ, and the
//! network's earlier answers.

use super::output::{Limit, Output};
use super::sigmas::{Bounds, FinalSigma, SigmaTable, Spread};
use super::spacing::{Spacing, Time, linspace};
use crate::Refusal;
use crate::diffusion::scheduler_file::{count, flag, limit, text};
use anyhow::Result;
use serde_json::Value;
use std::collections::VecDeque;

/// Which of the two classes' ways of rounding and bounding.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Family {
    DpmSolver,
    UniPc,
}

/// Time steps and levels, and the keys that both classes know.
pub(super) struct Plan {
    /// What the network is told, one a call.
    pub calls: Vec<f64>,
    /// A level for every call, and the last one's goal.
    pub levels: Vec<Level>,
    pub output: Output,
    pub limit: Limit,
    pub order: usize,
    pub lower_order_final: bool,
    pub final_sigma: FinalSigma,
}

impl Plan {
    /// # Errors
    /// A [`Refusal`]: settings of flow matching, orders beyond 3, more steps than there are different time steps.
    pub(super) fn read(config: &Value, n: usize, family: Family) -> Result<Self> {
        for key in ["use_flow_sigmas", "use_dynamic_shifting"] {
            if flag(config, key, false)? {
                return Err(Refusal::error(format!(
                    "{key} is for flow matching models, whose samplers are not here. Choose a model that diffuses by a noise schedule."
                )));
            }
        }
        let order = count(config, "solver_order", 2)?;
        if !(1..=3).contains(&order) {
            return Err(Refusal::error(format!("solver_order = {order} must be 1, 2 or 3. Change the file.")));
        }
        let mut time = Time::read(config, "linspace", true)?;
        time.keep_sigmas_finite();
        let spread = Spread::read(config, family == Family::DpmSolver)?;
        let final_sigma = FinalSigma::read(config)?;
        let table = SigmaTable::new(&time);
        let (calls, mut sigmas) = match spread {
            Spread::OfTime => {
                let calls = time_steps(config, &time, n, family)?;
                let sigmas = calls.iter().map(|&t| table.at(t)).collect();
                (calls, sigmas)
            }
            _ => spread_levels(config, &table, spread, n, family)?,
        };
        sigmas.push(match (final_sigma, family, spread) {
            (FinalSigma::Zero, ..) => 0.0,
            (FinalSigma::Min, Family::DpmSolver, _) | (_, _, Spread::OfTime) => f64::from(table.first()),
            (FinalSigma::Min, Family::UniPc, _) => sigmas[sigmas.len() - 1],
        });
        refuse_standstill(&sigmas, n)?;
        Ok(Plan {
            calls,
            levels: sigmas.into_iter().map(|sigma| Level::new(sigma as f32)).collect(),
            output: Output::read(config, true)?,
            limit: Limit::read(config, false)?,
            order,
            lower_order_final: flag(config, "lower_order_final", true)?,
            final_sigma,
        })
    }
}

impl Plan {
    /// Whether a call's step goes nowhere, which the last one does where the levels already end at the final one. The
    /// higher orders divide by its length.
    pub(super) fn stands_still(&self, call: usize) -> bool {
        self.levels[call].lambda == self.levels[call + 1].lambda
    }
}

/// The n time steps above the last one, which the final level stands for.
fn time_steps(config: &Value, time: &Time, n: usize, family: Family) -> Result<Vec<f64>> {
    let last = match family {
        Family::UniPc => time.train_steps,
        Family::DpmSolver => time.train_steps.saturating_sub(clipped_steps(config, time)?),
    };
    if last == 0 {
        return Err(Refusal::error("lambda_min_clipped leaves no time steps. Lower it, or remove the key."));
    }
    let rising: Vec<f64> = match time.spacing {
        Spacing::Linspace => linspace(0.0, (last - 1) as f64, n + 1).into_iter().map(f64::round_ties_even).collect(),
        Spacing::Leading => (0..=n).map(|i| (i * (last / (n + 1)) + time.offset) as f64).collect(),
        Spacing::Trailing => return Ok(time.trailing(last, n)),
    };
    Ok(rising.into_iter().skip(1).rev().collect())
}

/// How many of the noisiest training steps have log(α/σ) below `lambda_min_clipped`.
fn clipped_steps(config: &Value, time: &Time) -> Result<usize> {
    let least = limit(config, "lambda_min_clipped", f64::NEG_INFINITY)? as f32;
    let lambda = |signal: f32| ln(signal.sqrt()) - ln((1.0 - signal).sqrt());
    Ok(time.signal.iter().filter(|&&signal| lambda(signal) < least).count())
}

/// Levels that do not follow time steps, and the time steps nearest to them.
fn spread_levels(
    config: &Value,
    table: &SigmaTable,
    spread: Spread,
    n: usize,
    family: Family,
) -> Result<(Vec<f64>, Vec<f64>)> {
    // DPM-Solver's class does not declare the bounds but looks for them, and finds them in any class's file.
    let bounds = if spread == Spread::Lambda { Bounds::default() } else { Bounds::read(config)? };
    let (max, min) = (bounds.max.unwrap_or(table.last().into()), bounds.min.unwrap_or(table.first().into()));
    let sigmas = spread.levels(max, min, n);
    let cosine = text(config, "beta_schedule", "linear")? == "squaredcos_cap_v2";
    let rounds = match (family, spread) {
        (Family::DpmSolver, Spread::Karras | Spread::Lambda) => !cosine,
        (Family::UniPc, Spread::Karras) => true,
        _ => false,
    };
    let whole = |t: f64| if rounds { t.round_ties_even() } else { t.trunc() };
    Ok((sigmas.iter().map(|&sigma| whole(table.time_of(sigma))).collect(), sigmas))
}

/// Two equal levels one after the other, the final one aside, make these methods divide by zero.
fn refuse_standstill(sigmas: &[f64], n: usize) -> Result<()> {
    if sigmas[..sigmas.len() - 1].windows(2).any(|pair| pair[1] as f32 >= pair[0] as f32) {
        return Err(Refusal::error(format!(
            "{n} sampling steps are more than this schedule has different noise levels for. Ask for fewer."
        )));
    }
    Ok(())
}

/// A noise level σ/α as the pair (α, σ) with α² + σ² = 1, and λ = log α − log σ.
#[derive(Clone, Copy, Debug)]
pub(super) struct Level {
    pub alpha: f32,
    pub sigma: f32,
    pub lambda: f32,
}

impl Level {
    fn new(sigma: f32) -> Self {
        let alpha = 1.0 / (sigma * sigma + 1.0).sqrt();
        let sigma = sigma * alpha;
        Level { alpha, sigma, lambda: ln(alpha) - ln(sigma) }
    }
}

// Rounded from f64, so as to be the nearest f32 whatever the platform's own f32 functions do.

pub(super) fn ln(x: f32) -> f32 {
    f64::from(x).ln() as f32
}

pub(super) fn exp(x: f32) -> f32 {
    f64::from(x).exp() as f32
}

pub(super) fn exp_m1(x: f32) -> f32 {
    f64::from(x).exp_m1() as f32
}

/// The network's last answers as x0 or ε, newest first.
pub(super) struct History {
    answers: VecDeque<Vec<f32>>,
    most: usize,
}

impl History {
    pub(super) fn new(most: usize) -> Self {
        History { answers: VecDeque::new(), most }
    }

    pub(super) fn push(&mut self, answer: Vec<f32>) {
        self.answers.truncate(self.most - 1);
        self.answers.push_front(answer);
    }

    pub(super) fn len(&self) -> usize {
        self.answers.len()
    }

    /// The answer `age` calls before the newest.
    pub(super) fn get(&self, age: usize) -> &[f32] {
        &self.answers[age]
    }
}
