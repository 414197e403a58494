//! Which charts there are: what is measured, of every run, over steps.

use maud::{Markup, html};

use super::chart::{Chart, Kind, Line, Scale, chart};
use super::number;
use super::rows::StepRow;
use super::run::{Run, Scores};
use super::series::{Point, smoothed, smoothing_span};

/// A number of a row.
pub type Pick = fn(&StepRow) -> Option<f64>;

/// The section with the charts of training; nothing before the first step.
pub fn training(runs: &[Run]) -> Markup {
    let Some(steps) = steps(runs) else { return html! {} };
    let span = span(runs);
    let smooth = |id, title, unit: &str, pick: Pick| with_smoothed(id, title, unit, runs, pick, span);
    let mut rate = plain("lr", "Learning rate", "", runs, |row| row.lr);
    rate.scale = rate_scale(&rate.lines);
    let mut speed = smooth("speed", "Throughput", "images per second", |row| row.images_per_second);
    speed.scale = Scale::FromZero;
    let charts = [
        smooth("loss", "Loss", "", |row| row.loss),
        smooth("norm", "Gradient norm", "before clipping", |row| row.grad_norm),
        rate,
        speed,
        memory("vram", "GPU memory", "peak", runs, |row| row.peak_vram_bytes.filter(|bytes| *bytes > 0.0)),
        memory("rss", "Host memory", "peak of rank 0", runs, |row| row.peak_rss_bytes),
    ];
    let is_smoothed = runs.iter().any(|run| run.steps().len() > span);
    html! {
        section #training {
            div.heading {
                h2 { "Training" }
                @if is_smoothed { p.aside { "Faint: every step. Strong: moving average over " (span) " steps." } }
            }
            (legend(runs))
            div.charts { @for shown in &charts { (chart(shown, steps)) } }
        }
    }
}

/// The section with the scores of validation pictures, where there are some.
pub fn scores(runs: &[Run]) -> Markup {
    let all = || runs.iter().flat_map(|run| run.scores.iter());
    let (Some(first), Some(last)) = (all().map(|s| s.step).min(), all().map(|s| s.step).max()) else {
        return html! {};
    };
    let lines = |pick: fn(&Scores) -> Option<f64>| -> Vec<Line> {
        let line = |(i, run): (usize, &Run)| {
            let at = |scores: &Scores| Some(Point { step: scores.step as f64, value: pick(scores)? });
            let points = run.scores.iter().filter_map(at).collect();
            Line { run: i, name: run.name.clone(), kind: Kind::Marked, points }
        };
        runs.iter().enumerate().map(line).collect()
    };
    let one = |id, title, unit: &str, lines: Vec<Line>, scale, note: &str| Chart {
        id,
        title,
        unit: unit.to_string(),
        now: now(runs, &lines),
        lines,
        scale,
        note: Some(note.to_string()),
    };
    let likeness = "Higher is nearer: how much pictures with the new word are like the subject.";
    let drift = "Lower is better: mean change of the class's own pictures since before training.";
    let charts = [
        one("likeness", "Likeness", "0 to 1", lines(|s| s.likeness), Scale::Fixed(0.0, 1.0), likeness),
        one("drift", "Drift", "8-bit levels", lines(|s| s.drift), Scale::FromZero, drift),
    ];
    html! {
        section #scores {
            div.heading { h2 { "Scores" } p.aside { "Step 0 is from before training." } }
            (legend(runs))
            div.charts { @for shown in &charts { (chart(shown, (first as f64, last as f64))) } }
        }
    }
}

/// Several runs: their colours and names, each a switch.
fn legend(runs: &[Run]) -> Markup {
    html! {
        @if runs.len() > 1 {
            div.legend role="group" aria-label="Runs shown in the charts" {
                @for (i, run) in runs.iter().enumerate() {
                    button.run-switch type="button" data-run=(i) aria-pressed="true" { (swatch(i)) (run.name) }
                }
            }
        }
    }
}

/// The colour of a run.
pub fn swatch(run: usize) -> Markup {
    html! { span class={ "swatch c" (run % 8) @if run >= 8 { " dashed" } } aria-hidden="true" {} }
}

/// From the first step of any run to the last.
fn steps(runs: &[Run]) -> Option<(f64, f64)> {
    let first = runs.iter().filter_map(|run| run.steps().first()).map(|row| row.step).min()?;
    let last = runs.iter().map(Run::last_step).max()?;
    Some((first as f64, last as f64))
}

/// One for all runs, so that their lines are comparable.
pub fn span(runs: &[Run]) -> usize {
    smoothing_span(runs.iter().map(|run| run.steps().len()).max().unwrap_or(0))
}

pub fn points(run: &Run, pick: Pick) -> Vec<Point> {
    let at = |row: &StepRow| Some(Point { step: row.step as f64, value: pick(row)? });
    run.steps().iter().filter_map(at).collect()
}

fn plain(id: &'static str, title: &'static str, unit: &str, runs: &[Run], pick: Pick) -> Chart {
    let line =
        |(i, run): (usize, &Run)| Line { run: i, name: run.name.clone(), kind: Kind::Plain, points: points(run, pick) };
    let lines: Vec<Line> = runs.iter().enumerate().map(line).collect();
    Chart { id, title, unit: unit.to_string(), now: now(runs, &lines), lines, scale: Scale::Fitted, note: None }
}

/// Every value faintly, and the smoothed line over them where there are enough.
fn with_smoothed(id: &'static str, title: &'static str, unit: &str, runs: &[Run], pick: Pick, span: usize) -> Chart {
    let mut chart = plain(id, title, unit, runs, pick);
    if chart.lines.iter().all(|line| line.points.len() <= span) {
        return chart;
    }
    let mut over: Vec<Line> = Vec::new();
    for line in &mut chart.lines {
        line.kind = Kind::Raw;
        let points = smoothed(&line.points, span);
        over.push(Line { run: line.run, name: line.name.clone(), kind: Kind::Smoothed, points });
    }
    chart.now = now(runs, &over).map(|now| format!("{now} on average"));
    chart.lines.extend(over);
    chart
}

/// From zero, unless one run's rate would be flat beside another's.
fn rate_scale(lines: &[Line]) -> Scale {
    let highest = |line: &Line| line.points.iter().map(|point| point.value).fold(0.0, f64::max);
    let peaks: Vec<f64> = lines.iter().map(highest).filter(|peak| *peak > 0.0).collect();
    let (low, high) = (peaks.iter().copied().fold(f64::INFINITY, f64::min), peaks.iter().copied().fold(0.0, f64::max));
    if high > 20.0 * low && low.is_finite() { Scale::Powers(low / 100.0, high) } else { Scale::FromZero }
}

/// Bytes, in the unit that fits the largest.
fn memory(id: &'static str, title: &'static str, what: &str, runs: &[Run], pick: Pick) -> Chart {
    let mut chart = plain(id, title, "", runs, pick);
    let values = chart.lines.iter().flat_map(|line| line.points.iter().map(|point| point.value));
    let (unit, size) = number::byte_unit(values.fold(0.0, f64::max));
    chart.lines.iter_mut().flat_map(|line| &mut line.points).for_each(|point| point.value /= size);
    Chart { unit: format!("{unit}, {what}"), now: now(runs, &chart.lines), scale: Scale::FromZero, ..chart }
}

/// The last value, where there is one run only.
fn now(runs: &[Run], lines: &[Line]) -> Option<String> {
    match runs.len() {
        1 => Some(number::value(lines.first()?.points.last()?.value)),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::super::testing::{Forged, well_formed};
    use super::*;

    #[test]
    fn every_measure_has_its_chart_and_memory_its_unit() {
        let forged = Forged::new("run", 200);
        let runs = [Run::open(forged.dir()).unwrap()];
        let markup = training(&runs).into_string();
        for id in ["loss", "norm", "lr", "speed", "rss"] {
            assert!(markup.contains(&format!("id=\"chart-{id}\"")), "{id}");
        }
        // No GPU, no scores: no charts of them.
        assert!(!markup.contains("chart-vram") && scores(&runs).into_string().is_empty());
        assert!(markup.contains("GiB, peak of rank 0") && !markup.contains("run-switch"));
        assert!(markup.contains("moving average over 16 steps"));
        well_formed(&markup);
    }

    #[test]
    fn several_runs_share_axes_and_have_switches() {
        let (short, long) = (Forged::new("short", 20), Forged::new("long", 120));
        long.scores();
        let runs = [Run::open(short.dir()).unwrap(), Run::open(long.dir()).unwrap()];
        let markup = training(&runs).into_string();
        assert!(markup.contains("\"x\":[1.0,120.0]") && markup.matches("run-switch").count() == 2);
        assert!(markup.contains("line smoothed r1 c1"));
        let markup = scores(&runs).into_string();
        assert!(markup.contains("chart-likeness") && markup.contains("line marked r1 c1 dots"));
        well_formed(&markup);
    }

    #[test]
    fn rates_far_apart_are_shown_by_powers_of_ten() {
        let line = |rate: f64| Line {
            run: 0,
            name: String::new(),
            kind: Kind::Plain,
            points: vec![Point { step: 1.0, value: 0.0 }, Point { step: 2.0, value: rate }],
        };
        assert_eq!(rate_scale(&[line(5e-6), line(1e-5)]), Scale::FromZero);
        assert_eq!(rate_scale(&[line(1e-6), line(1e-4)]), Scale::Powers(1e-6 / 100.0, 1e-4));
        assert_eq!(rate_scale(&[line(0.0)]), Scale::FromZero);
    }

    #[test]
    fn before_the_first_step_there_are_no_charts() {
        let forged = Forged::new("run", 0);
        assert!(training(&[Run::open(forged.dir()).unwrap()]).into_string().is_empty());
    }
}
