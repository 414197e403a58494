//! One chart as markup: an SVG that stretches with the page, labels in HTML around it so that they do not, and the
//! drawn values as JSON for the script that shows them under the pointer. It is whole without the script.

use std::fmt::Write;

use maud::{Markup, PreEscaped, html};
use serde_json::json;

use super::axis::Axis;
use super::number;
use super::series::{Extent, Point, decimated, extent};

/// The lowest and highest of so many equal ranges of steps are drawn: about two device pixels each.
const BUCKETS: usize = 500;
/// The SVG's own width and height; the page stretches it to what there is.
const SIDE: f64 = 1000.0;

pub struct Chart {
    /// A word that is unique on the page.
    pub id: &'static str,
    pub title: &'static str,
    pub unit: String,
    pub lines: Vec<Line>,
    pub scale: Scale,
    /// The value that stands beside the title.
    pub now: Option<String>,
    pub note: Option<String>,
}

pub struct Line {
    /// Which run it is of.
    pub run: usize,
    pub name: String,
    pub kind: Kind,
    pub points: Vec<Point>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// As it is.
    Plain,
    /// As it is, faintly, under a smoothed one.
    Raw,
    Smoothed,
    /// Few values, each of them marked.
    Marked,
}

impl Kind {
    fn class(self) -> &'static str {
        match self {
            Kind::Plain => "plain",
            Kind::Raw => "raw",
            Kind::Smoothed => "smoothed",
            Kind::Marked => "marked",
        }
    }
}

#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Scale {
    /// Around the values; by powers of ten if they span many.
    Fitted,
    FromZero,
    /// By powers of ten between these; what is lower, zero among it, lies below.
    Powers(f64, f64),
    /// Always these ends.
    Fixed(f64, f64),
}

/// The chart over `steps`, which all charts of a page share.
pub fn chart(chart: &Chart, steps: (f64, f64)) -> Markup {
    let x = Axis::steps(steps.0, steps.1);
    // A smoothed line lies within its values.
    let shown = chart.lines.iter().filter(|line| line.kind != Kind::Smoothed);
    let values = shown.flat_map(|line| line.points.iter().map(|point| point.value));
    let Some(extent) = extent(values) else { return html! {} };
    let is_marked = chart.lines.iter().any(|line| line.kind == Kind::Marked);
    let y = value_axis(chart.scale, extent);
    let drawn: Vec<Vec<Point>> = chart.lines.iter().map(|line| decimated(&line.points, BUCKETS)).collect();
    let data = json!({
        "x": [x.low, x.high],
        "y": [y.low, y.high],
        "log": y.logarithmic,
        "lines": chart.lines.iter().zip(&drawn).map(|(line, points)| json!({
            "run": line.run,
            "name": line.name,
            "kind": line.kind.class(),
            "at": points.iter().map(|point| point.step).collect::<Vec<_>>(),
            "is": points.iter().map(|point| rounded(point.value)).collect::<Vec<_>>(),
        })).collect::<Vec<_>>(),
    });
    html! {
        figure.chart id=(format!("chart-{}", chart.id)) {
            figcaption {
                h3 { (chart.title) @if !chart.unit.is_empty() { " " span.unit { (chart.unit) } } }
                @if let Some(now) = &chart.now { span.now { (now) } }
            }
            div.plot tabindex="0" role="group" aria-label=(description(chart)) {
                @for tick in &y.ticks {
                    span.y-label aria-hidden="true" style=(format!("top:{:.2}%", 100.0 - 100.0 * tick.place)) { (tick.label) }
                }
                svg viewBox="0 0 1000 1000" preserveAspectRatio="none" aria-hidden="true" class=[is_marked.then_some("whole-dots")] {
                    path.grid d=(grid(&y)) {}
                    @for (line, points) in chart.lines.iter().zip(&drawn) {
                        path class=(classes(line)) d=(path(points, &x, &y)) {}
                        @if line.kind == Kind::Marked { path class={ (classes(line)) " dots" } d=(dots(points, &x, &y)) {} }
                    }
                }
                @for tick in &x.ticks {
                    span.x-label.end[tick.place > 0.97] aria-hidden="true" style=(format!("left:{:.2}%", 100.0 * tick.place)) { (tick.label) }
                }
            }
            @for note in notes(chart, &y, extent) { p.note { (note) } }
            script type="application/json" { (PreEscaped(in_script(&data))) }
        }
    }
}

fn value_axis(scale: Scale, extent: Extent) -> Axis {
    match scale {
        Scale::Fixed(low, high) => Axis::values(low, high),
        Scale::Powers(low, high) => Axis::powers(low, high),
        Scale::FromZero => Axis::values(extent.low.min(0.0), extent.high.max(0.0)),
        Scale::Fitted if extent.low > 0.0 && extent.high > 50.0 * extent.low => Axis::powers(extent.low, extent.high),
        // Nearly from zero is from zero.
        Scale::Fitted if extent.low > 0.0 && extent.low < 0.3 * extent.high => Axis::values(0.0, extent.high),
        Scale::Fitted => Axis::values(extent.low, extent.high),
    }
}

fn classes(line: &Line) -> String {
    format!("line {} r{} c{}{}", line.kind.class(), line.run, line.run % 8, if line.run >= 8 { " dashed" } else { "" })
}

/// Where a point is drawn. What lies far outside is drawn just outside.
fn place(point: &Point, x: &Axis, y: &Axis) -> (f64, f64) {
    (x.place(point.step) * SIDE, (1.0 - y.place(point.value).clamp(-0.5, 1.5)) * SIDE)
}

fn path(points: &[Point], x: &Axis, y: &Axis) -> String {
    let mut d = String::new();
    for (i, point) in points.iter().enumerate() {
        let (px, py) = place(point, x, y);
        // Writing to a string does not fail.
        let _ = write!(d, "{}{px:.1} {py:.1}", if i == 0 { 'M' } else { 'L' });
    }
    d
}

/// Lines without length, which round caps make dots that do not stretch.
fn dots(points: &[Point], x: &Axis, y: &Axis) -> String {
    let places = points.iter().map(|point| place(point, x, y));
    places.map(|(px, py)| format!("M{px:.1} {py:.1}h0.01")).collect()
}

fn grid(y: &Axis) -> String {
    y.ticks.iter().map(|tick| format!("M0 {:.1}H1000", (1.0 - tick.place) * SIDE)).collect()
}

/// What someone who does not see the chart is told.
fn description(chart: &Chart) -> String {
    let told = chart.lines.iter().filter(|line| line.kind != Kind::Raw).filter_map(|line| {
        let (first, last) = (line.points.first()?, line.points.last()?);
        let lowest = line.points.iter().min_by(|a, b| a.value.total_cmp(&b.value))?;
        let highest = line.points.iter().max_by(|a, b| a.value.total_cmp(&b.value))?;
        let at = |point: &Point| format!("{} at step {}", number::value(point.value), number::value(point.step));
        let name = &line.name;
        Some(format!("{name}: {}, {}; lowest {}, highest {}", at(first), at(last), at(lowest), at(highest)))
    });
    let unit = if chart.unit.is_empty() { String::new() } else { format!(" ({})", chart.unit) };
    format!("{}{unit} over steps. {}. Arrow keys read values.", chart.title, told.collect::<Vec<_>>().join(". "))
}

fn notes(chart: &Chart, y: &Axis, extent: Extent) -> Vec<String> {
    let mut notes: Vec<String> = chart.note.iter().cloned().collect();
    if y.logarithmic {
        notes.push("Logarithmic scale.".to_string());
    }
    let outside = [(extent.above, "above"), (extent.below, "below")];
    notes.extend(outside.into_iter().filter(|(count, _)| *count > 0).map(|(count, side)| {
        let values = if count == 1 { "value lies" } else { "values lie" };
        format!("{count} {values} far {side} what is shown.")
    }));
    notes
}

/// Six significant digits.
fn rounded(value: f64) -> f64 {
    format!("{value:.5e}").parse().unwrap_or(value)
}

/// JSON that cannot end the script element it stands in.
fn in_script(data: &serde_json::Value) -> String {
    data.to_string().replace('<', "\\u003c")
}

#[cfg(test)]
mod tests {
    use super::super::testing::well_formed;
    use super::*;

    fn line(name: &str, kind: Kind, values: &[f64]) -> Line {
        let points = values.iter().enumerate().map(|(i, value)| Point { step: i as f64 + 1.0, value: *value });
        Line { run: 0, name: name.to_string(), kind, points: points.collect() }
    }

    fn plain(lines: Vec<Line>, scale: Scale) -> Chart {
        Chart { id: "loss", title: "Loss", unit: String::new(), lines, scale, now: None, note: None }
    }

    #[test]
    fn a_line_goes_through_its_values() {
        let shown = plain(vec![line("demo", Kind::Plain, &[0.0, 2.0, 1.0])], Scale::FromZero);
        let markup = chart(&shown, (1.0, 3.0)).into_string();
        assert!(markup.contains("d=\"M0.0 1000.0L500.0 0.0L1000.0 500.0\""), "{markup}");
        assert!(
            markup.contains("class=\"line plain r0 c0\"") && markup.contains("top:50.00%\">1.0</span>"),
            "{markup}"
        );
        assert!(markup.contains("demo: 0 at step 1, 1 at step 3; lowest 0 at step 1, highest 2 at step 2"));
        well_formed(&markup);
    }

    #[test]
    fn names_cannot_break_out() {
        let name = "</script><script>alert('x')</script>\"&";
        let markup = chart(&plain(vec![line(name, Kind::Marked, &[1.0])], Scale::Fitted), (0.0, 1.0)).into_string();
        assert_eq!(markup.matches("<script").count(), 1, "{markup}");
        well_formed(&markup);
    }

    #[test]
    fn many_steps_stay_small_and_far_values_are_told() {
        let mut values: Vec<f64> = (0..100_000).map(|i| 1.0 + (i as f64).sin()).collect();
        values[70_000] = 1e9;
        let markup = chart(&plain(vec![line("long", Kind::Raw, &values)], Scale::Fitted), (1.0, 1e5)).into_string();
        assert!(markup.len() < 60_000, "{}", markup.len());
        assert!(markup.contains("1 value lies far above"));
        let wide: Vec<f64> = (0..100).map(|i| 10f64.powf(i as f64 / 20.0)).collect();
        let markup = chart(&plain(vec![line("wide", Kind::Plain, &wide)], Scale::Fitted), (1.0, 100.0)).into_string();
        assert!(markup.contains("Logarithmic scale") && markup.contains("\"log\":true"));
    }

    #[test]
    fn nothing_to_show_is_no_chart() {
        assert_eq!(
            chart(&plain(vec![line("x", Kind::Plain, &[f64::NAN])], Scale::Fitted), (0.0, 1.0)).into_string(),
            ""
        );
    }
}
