//! The numbers that sum up a run, and its values as a table.

use maud::{Markup, html};

use super::curves::{Pick, points, span, swatch};
use super::number;
use super::rows::StepRow;
use super::run::Run;
use super::series::{Point, smoothed};

/// One number with its name, what it is, and what to hold it against.
struct Fact {
    name: &'static str,
    what: &'static str,
    value: String,
    beside: String,
}

/// Tiles for one run, a table for several.
pub fn summary(runs: &[Run]) -> Markup {
    let facts: Vec<Vec<Fact>> = runs.iter().map(|run| facts(run, span(runs))).collect();
    html! {
        section #summary aria-label="Summary" {
            @for run in runs {
                @if run.rows.unreadable > 0 {
                    p.warning { (run.name) ": " (number::count(run.rows.unreadable as u64)) " lines of metrics.jsonl could not be read." }
                }
            }
            @if let [facts] = &facts[..] {
                dl.tiles {
                    @for fact in facts {
                        div.tile {
                            dt { (fact.name) }
                            dd { (fact.value) }
                            @for words in [fact.what, &fact.beside].into_iter().filter(|words| !words.is_empty()) { dd.beside { (words) } }
                        }
                    }
                }
            } @else {
                (table(runs, &facts))
            }
        }
    }
}

/// Rows are the facts that any run has, columns are runs.
fn table(runs: &[Run], facts: &[Vec<Fact>]) -> Markup {
    let mut names: Vec<(&str, &str)> = Vec::new();
    for fact in facts.iter().flatten() {
        if !names.contains(&(fact.name, fact.what)) {
            names.push((fact.name, fact.what));
        }
    }
    html! {
        div.scroll tabindex="0" role="group" aria-label="Summary of the runs" {
            table.summary {
                thead { tr { td {} @for (i, run) in runs.iter().enumerate() { th scope="col" { (swatch(i)) (run.name) } } } }
                tbody {
                    @for (name, what) in names {
                        tr {
                            th scope="row" { (name) @if !what.is_empty() { span.beside { (what) } } }
                            @for facts in facts {
                                td {
                                    @match facts.iter().find(|fact| fact.name == name) {
                                        Some(fact) => { (fact.value) @if !fact.beside.is_empty() { span.beside { (fact.beside) } } },
                                        None => "–",
                                    }
                                }
                            }
                        }
                    }
                }
            }
        }
    }
}

fn facts(run: &Run, span: usize) -> Vec<Fact> {
    let mut facts = Vec::new();
    let mut add = |name, what, value: Option<String>, beside: Option<String>| {
        facts.extend(value.map(|value| Fact { name, what, value, beside: beside.unwrap_or_default() }));
    };
    let done = run.last_step();
    let of = run.total_steps().filter(|total| *total != done).map(|total| format!("of {}", number::count(total)));
    add("Steps", "", Some(number::count(done)), of);
    let losses = points(run, |row| row.loss);
    let end = |part: &[Point]| (!part.is_empty()).then(|| mean(part.iter().map(|point| point.value)));
    let length = span.min(losses.len() / 2).max(losses.len().min(1));
    let (first, last) = (end(&losses[..length]), end(&losses[losses.len() - length..]));
    let from = first.filter(|_| losses.len() > 1).map(|first| format!("from {}", number::value(first)));
    add("Loss", "", last.map(number::value), from.map(|from| with_length(&from, length)));
    let scored: Vec<f64> = run.scores.iter().filter_map(|scores| scores.likeness).collect();
    let before = scored.first().filter(|_| scored.len() > 1).map(|first| format!("from {}", number::value(*first)));
    add("Likeness", "", scored.last().copied().map(number::value), before);
    let drift = run.scores.iter().rev().find_map(|scores| scores.drift);
    add("Drift", "8-bit levels of the class", drift.map(number::value), None);
    let speeds: Vec<f64> = run.steps().iter().filter_map(|row| row.images_per_second).collect();
    add("Throughput", "images per second, median", median(speeds).map(number::value), None);
    let seconds: f64 = run.steps().iter().filter_map(|row| row.seconds).sum();
    add("Time", "in steps", (done > 0).then(|| number::duration(seconds)), None);
    let most = |pick: Pick| run.steps().iter().filter_map(pick).fold(0.0, f64::max);
    let (vram, rss) = (most(|row| row.peak_vram_bytes), most(|row| row.peak_rss_bytes));
    add("GPU memory", "peak", (vram > 0.0).then(|| number::bytes(vram)), None);
    add("Host memory", "peak of rank 0", (rss > 0.0).then(|| number::bytes(rss)), None);
    let skipped = run.skipped();
    add("Skipped", "steps, for overflow", (skipped > 0).then(|| number::count(skipped)), None);
    facts
}

fn with_length(from: &str, length: usize) -> String {
    if length > 1 { format!("{from}; means of {length} steps") } else { from.to_string() }
}

fn mean(values: impl ExactSizeIterator<Item = f64>) -> f64 {
    let count = values.len() as f64;
    values.sum::<f64>() / count
}

fn median(mut values: Vec<f64>) -> Option<f64> {
    values.sort_by(f64::total_cmp);
    values.get(values.len() / 2).copied()
}

/// The values at some evenly spaced steps, for those who do not see charts or want numbers.
pub fn values(runs: &[Run]) -> Markup {
    const ROWS: usize = 20;
    let span = span(runs);
    let columns: [(&str, Pick); 5] = [
        ("Loss", |row| row.loss),
        ("Gradient norm", |row| row.grad_norm),
        ("Learning rate", |row| row.lr),
        ("Images/s", |row| row.images_per_second),
        ("Seconds", |row| row.seconds),
    ];
    html! {
        section #values {
            details {
                summary { h2 { "Values" } }
                @for (i, run) in runs.iter().enumerate().filter(|(_, run)| !run.steps().is_empty()) {
                    @if runs.len() > 1 { h3.run-name { (swatch(i)) (run.name) } }
                    @let smooth = smoothed(&points(run, |row| row.loss), span);
                    div.scroll tabindex="0" role="group" aria-label={ "Values of " (run.name) } {
                        table {
                            thead { tr {
                                th scope="col" { "Step" } th scope="col" { "Loss, smoothed" }
                                @for (name, _) in &columns { th scope="col" { (name) } }
                            } }
                            tbody {
                                @for row in evenly(run.steps(), ROWS) {
                                    tr {
                                        th scope="row" { (number::count(row.step)) }
                                        td { (at(&smooth, row.step)) }
                                        @for (_, pick) in &columns { td { (pick(row).map_or("–".to_string(), number::value)) } }
                                    }
                                }
                            }
                        }
                    }
                }
                p.note { "Up to " (ROWS) " steps, evenly spaced; all of them are in metrics.jsonl." }
            }
        }
    }
}

fn at(smooth: &[Point], step: u64) -> String {
    let found = smooth.binary_search_by(|point| point.step.total_cmp(&(step as f64)));
    found.map_or("–".to_string(), |i| number::value(smooth[i].value))
}

/// `count` of `rows` (all if there are no more) with the first and the last.
fn evenly(rows: &[StepRow], count: usize) -> Vec<&StepRow> {
    match rows.len() {
        few if few <= count => rows.iter().collect(),
        many => (0..count).map(|i| &rows[i * (many - 1) / (count - 1)]).collect(),
    }
}

#[cfg(test)]
mod tests {
    use super::super::testing::{Forged, well_formed};
    use super::*;

    #[test]
    fn one_run_has_tiles_with_what_there_is() {
        let forged = Forged::new("run", 30);
        forged.scores();
        let markup = summary(&[Run::open(forged.dir()).unwrap()]).into_string();
        for part in
            ["<dt>Steps</dt><dd>30</dd>", "<dt>Likeness</dt><dd>0.8</dd>", "from 0.3", "<dt>Time</dt><dd>15 s</dd>"]
        {
            assert!(markup.contains(part), "{part}: {markup}");
        }
        assert!(!markup.contains("GPU memory") && !markup.contains("Skipped"));
        well_formed(&markup);
    }

    #[test]
    fn several_runs_share_a_table_with_holes() {
        let (one, two) = (Forged::new("one", 30), Forged::new("two", 0));
        one.scores();
        let runs = [Run::open(one.dir()).unwrap(), Run::open(two.dir()).unwrap()];
        let markup = summary(&runs).into_string() + &values(&runs).into_string();
        assert!(markup.contains("<th scope=\"row\">Drift<span") && markup.contains("<td>–</td>"), "{markup}");
        assert_eq!(markup.matches("<th scope=\"row\">").count(), 7 + 20);
        well_formed(&markup);
    }
}
