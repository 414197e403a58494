//! The validation pictures as markup: before and after, and a strip over time. The same number is the same prompt and
//! the same noise at every step, so pictures beside each other differ by training alone.

use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;

use maud::{Markup, html};

use super::curves::swatch;
use super::number;
use super::pictures::{Shot, Shots};
use super::run::{Picture, Run};

/// Pictures up to this many pixels a side are enlarged with hard edges: blurred they would look like another picture.
const HARD_EDGES: u32 = 128;

/// A picture that is shown, with what it is.
#[derive(Clone, Copy)]
struct Taken<'a> {
    picture: &'a Picture,
    shot: &'a Shot,
}

/// A run's shown pictures by number, each in order of steps.
fn by_number<'a>(i: usize, run: &'a Run, shots: &'a Shots) -> BTreeMap<u64, Vec<Taken<'a>>> {
    let mut found: BTreeMap<u64, Vec<Taken>> = BTreeMap::new();
    for picture in &run.pictures {
        if let Some(shot) = shots.get(i, picture) {
            found.entry(picture.number).or_default().push(Taken { picture, shot });
        }
    }
    found
}

/// What came of one request: of every run that made it the run's place, the first and the last picture.
struct Card<'a> {
    picture: &'a Picture,
    pairs: Vec<(usize, Taken<'a>, Taken<'a>)>,
}

/// First and last picture of every prompt, the runs' under each other.
pub fn before_after(runs: &[Run], shots: &Shots) -> Markup {
    let mut cards: Vec<Card> = Vec::new();
    for (i, run) in runs.iter().enumerate() {
        for pictures in by_number(i, run, shots).values() {
            let (Some(first), Some(last)) = (pictures.first(), pictures.last()) else { continue };
            if first.picture.step == last.picture.step {
                continue;
            }
            match cards.iter_mut().find(|card| is_comparable(card.picture, last.picture)) {
                Some(card) => card.pairs.push((i, *first, *last)),
                None => cards.push(Card { picture: last.picture, pairs: vec![(i, *first, *last)] }),
            }
        }
    }
    html! {
        @if !cards.is_empty() {
            section #before-after {
                div.heading { h2 { "Before and after" } p.aside { "Same prompt, same noise." } }
                @if !has_strip(&rows(runs, shots), shots) { (note(shots)) }
                div.cards {
                    @for card in &cards {
                        article.card {
                            @for (i, first, last) in &card.pairs {
                                @if runs.len() > 1 { p.run-name { (swatch(*i)) (runs[*i].name) } }
                                div.pair data-row { (figure(first)) (figure(last)) }
                            }
                            (prompt(card.picture))
                        }
                    }
                }
            }
        }
    }
}

/// Whether both come of the same request.
fn is_comparable(a: &Picture, b: &Picture) -> bool {
    let request = |p: &Picture| (p.number, p.prompt.clone(), p.negative_prompt.clone(), p.seed.clone());
    request(a) == request(b)
}

fn rows<'a>(runs: &'a [Run], shots: &'a Shots) -> Vec<BTreeMap<u64, Vec<Taken<'a>>>> {
    runs.iter().enumerate().map(|(i, run)| by_number(i, run, shots)).collect()
}

/// Whether there is a strip. Two steps are all there in before and after, and their pictures are not put into a file twice.
fn has_strip(rows: &[BTreeMap<u64, Vec<Taken>>], shots: &Shots) -> bool {
    rows.iter().map(|rows| columns(rows).len()).any(|columns| columns > 0 && !(columns == 2 && shots.in_page))
}

/// The steps with pictures, in order.
fn columns(rows: &BTreeMap<u64, Vec<Taken>>) -> BTreeSet<u64> {
    rows.values().flatten().map(|taken| taken.picture.step).collect()
}

fn note(shots: &Shots) -> Markup {
    html! { @if let Some(note) = &shots.note { p.aside { (note) } } }
}

/// All pictures: rows are prompts, columns are steps.
pub fn strip(runs: &[Run], shots: &Shots) -> Markup {
    let rows = rows(runs, shots);
    html! {
        @if has_strip(&rows, shots) {
            section #strip {
                div.heading { h2 { "Pictures over time" } (note(shots)) }
                @for (i, rows) in rows.iter().enumerate().filter(|(_, rows)| !rows.is_empty()) {
                    @if runs.len() > 1 { h3.run-name { (swatch(i)) (runs[i].name) } }
                    div.strip id=(format!("strip-{i}")) tabindex="0" role="group" aria-label={ "Pictures of " (runs[i].name) ", scrolls sideways" } {
                        @for (pictures, is_new) in with_new_requests(rows) {
                            div.strip-row {
                                @if let Some(first) = pictures.first().filter(|_| is_new) { (prompt(first.picture)) }
                                (steps(pictures, rows))
                            }
                        }
                    }
                }
            }
        }
    }
}

/// The rows, and of each whether it is of another request than the one above: what is the same is said once.
fn with_new_requests<'a, 'b>(rows: &'b BTreeMap<u64, Vec<Taken<'a>>>) -> Vec<(&'b [Taken<'a>], bool)> {
    let request = |row: &[Taken]| {
        row.first().map(|taken| Picture { number: 0, step: 0, file: PathBuf::new(), ..taken.picture.clone() })
    };
    let mut above = None;
    let mut marked = Vec::new();
    for row in rows.values() {
        let own = request(row);
        marked.push((row.as_slice(), own != above));
        above = own;
    }
    marked
}

/// A row's pictures, each in the column of its step.
fn steps(pictures: &[Taken], rows: &BTreeMap<u64, Vec<Taken>>) -> Markup {
    html! {
        div.shots data-row {
            @for step in &columns(rows) {
                @match pictures.iter().find(|taken| taken.picture.step == *step) {
                    Some(taken) => (figure(taken)),
                    None => div.missing { (step_name(*step)) },
                }
            }
        }
    }
}

fn figure(taken: &Taken) -> Markup {
    let Taken { picture, shot } = taken;
    let name = step_name(picture.step);
    let small = shot.width.max(shot.height) <= HARD_EDGES;
    html! {
        figure.shot {
            button type="button" data-caption=(format!("{} · {name}", picture.prompt)) {
                img src=(shot.src) width=(shot.width) height=(shot.height) decoding="async"
                    class=[small.then_some("hard-edges")] alt=(format!("{name}: {}", picture.prompt));
            }
            figcaption { (name) }
        }
    }
}

fn step_name(step: u64) -> String {
    match step {
        0 => "before".to_string(),
        step => format!("step {}", number::count(step)),
    }
}

fn prompt(picture: &Picture) -> Markup {
    html! {
        p.prompt {
            (picture.prompt)
            @if let Some(negative) = picture.negative_prompt.as_deref().filter(|text| !text.is_empty()) {
                span.without { " without “" (negative) "”" }
            }
            @if let Some(seed) = &picture.seed { span.seed { " seed " (seed.to_string()) } }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::testing::{Forged, well_formed};
    use super::*;

    #[test]
    fn prompts_are_escaped_and_rows_are_whole() {
        let forged = Forged::new("run", 20);
        forged.pictures(&[0, 10, 20], 2, 64);
        let runs = [Run::open(forged.dir()).unwrap()];
        let shots = Shots::embedded(&runs);
        let markup = before_after(&runs, &shots).into_string() + &strip(&runs, &shots).into_string();
        // The forged prompts hold a script and quotes.
        assert!(!markup.contains("<script>alert") && markup.contains("&lt;script&gt;"), "{markup}");
        assert_eq!(markup.matches("<figure").count(), 2 * 2 + 2 * 3);
        assert!(markup.contains("hard-edges") && markup.contains(">before<") && markup.contains(">step 20<"));
        well_formed(&markup);
    }

    #[test]
    fn a_hole_in_a_row_keeps_its_column() {
        let forged = Forged::new("run", 20);
        forged.pictures(&[0, 10, 20], 2, 16);
        std::fs::remove_file(forged.dir().join("samples/step-000010/00001.png")).unwrap();
        let runs = [Run::open(forged.dir()).unwrap()];
        let markup = strip(&runs, &Shots::embedded(&runs)).into_string();
        assert!(markup.contains("<div class=\"missing\">step 10</div>"), "{markup}");
    }

    #[test]
    fn runs_with_the_same_prompts_share_cards() {
        let (one, two) = (Forged::new("one", 10), Forged::new("two", 10));
        one.pictures(&[0, 10], 1, 16);
        two.pictures(&[0, 10], 1, 16);
        let runs = [Run::open(one.dir()).unwrap(), Run::open(two.dir()).unwrap()];
        let markup = before_after(&runs, &Shots::embedded(&runs)).into_string();
        assert_eq!((markup.matches("<article").count(), markup.matches("class=\"pair\"").count()), (1, 2));
        assert!(strip(&runs, &Shots::embedded(&runs)).into_string().is_empty());
        assert!(strip(&runs[..1], &Shots::linked(&runs[..1])).into_string().contains("/pictures/10/0"));
    }

    #[test]
    fn what_rows_have_in_common_is_said_once() {
        let forged = Forged::new("run", 20);
        forged.pictures(&[0, 10, 20], 3, 16);
        let index = forged.dir().join("samples/index.jsonl");
        // The first two of the same prompt.
        let text = std::fs::read_to_string(&index).unwrap().replace("alert(1)", "alert(0)");
        std::fs::write(index, text).unwrap();
        let runs = [Run::open(forged.dir()).unwrap()];
        let markup = strip(&runs, &Shots::embedded(&runs)).into_string();
        assert_eq!((markup.matches("class=\"strip-row\"").count(), markup.matches("class=\"prompt\"").count()), (3, 2));
    }

    #[test]
    fn without_pictures_there_is_no_gallery() {
        let runs = [Run::open(Forged::new("run", 3).dir()).unwrap()];
        let shots = Shots::embedded(&runs);
        assert!(before_after(&runs, &shots).into_string().is_empty() && strip(&runs, &shots).into_string().is_empty());
    }
}
