//! The page: one HTML document with its style and script in it. It is written or served; what is served differs by
//! where its pictures come from and by asking for news.

use maud::{DOCTYPE, Markup, PreEscaped, html};

use super::pictures::Shots;
use super::run::Run;
use super::{configuration, curves, gallery, number, summary};

const STYLE: &str = include_str!("page/style.css");
const SCRIPT: &str = include_str!("page/script.js");
const POLICY: &str = include_str!("page/policy.txt");
/// Before anything is painted.
const THEME: &str = "try{document.documentElement.dataset.theme=localStorage.getItem('dblaunch-theme')||''}catch{}";

pub struct Page<'a> {
    pub runs: &'a [Run],
    pub shots: &'a Shots,
    /// Served, and asks for news.
    pub live: bool,
}

impl Page<'_> {
    pub fn html(&self) -> String {
        let title = match self.runs {
            [run] => format!("{} · dblaunch", run.name),
            runs => format!("{} runs · dblaunch", runs.len()),
        };
        let runs = self.runs;
        html! {
            (DOCTYPE)
            html lang="en" data-made-by="dblaunch" data-live[self.live] {
                head {
                    meta charset="utf-8";
                    meta name="viewport" content="width=device-width, initial-scale=1";
                    meta name="color-scheme" content="light dark";
                    meta http-equiv="Content-Security-Policy" content=(self.policy());
                    title { (title) }
                    link rel="icon" href="data:,";
                    script { (PreEscaped(THEME)) }
                    style { (PreEscaped(STYLE)) (PreEscaped(hidden_runs(runs.len()))) }
                }
                body {
                    header {
                        (heading(runs, self.live))
                        div.theme role="group" aria-label="Colours" {
                            @for (value, name) in [("", "Auto"), ("light", "Light"), ("dark", "Dark")] {
                                button type="button" data-theme-value=(value) aria-pressed=(if value.is_empty() { "true" } else { "false" }) { (name) }
                            }
                        }
                    }
                    main {
                        @if runs.iter().all(|run| run.steps().is_empty()) { section #waiting { p { "No step is done yet." } } }
                        (summary::summary(runs))
                        (gallery::before_after(runs, self.shots))
                        (gallery::strip(runs, self.shots))
                        (curves::scores(runs))
                        (curves::training(runs))
                        (configuration::configuration(runs))
                        (summary::values(runs))
                    }
                    footer { "dblaunch " (env!("CARGO_PKG_VERSION")) @if !self.live { ". This file holds all it shows." } }
                    (viewer())
                    script { (PreEscaped(SCRIPT)) }
                }
            }
        }
        .into_string()
    }

    /// What the page may load: nothing but what is in it, and when it is served its pictures and its news.
    fn policy(&self) -> String {
        let policy = POLICY.trim().replace('\n', " ");
        if self.live { format!("{policy} 'self'; connect-src 'self'") } else { policy }
    }
}

/// Name and state.
fn heading(runs: &[Run], live: bool) -> Markup {
    html! {
        div.title #title {
            @match runs {
                [run] => {
                    h1 { (run.name) }
                    p.state {
                        @if live { span.live #live { "Live" } " " }
                        (state(run))
                        @if live { @if let Some(written) = run.rows.written() { " · last row " time data-at=(written) { "just now" } } }
                    }
                },
                runs => {
                    h1 { (runs.len()) " runs" }
                    p.state { @for (i, run) in runs.iter().enumerate() { @if i > 0 { ", " } (run.name) } }
                },
            }
        }
    }
}

fn state(run: &Run) -> String {
    let done = number::count(run.last_step());
    let mut parts = vec![match run.total_steps() {
        Some(total) => format!("step {done} of {}", number::count(total)),
        None => format!("step {done}"),
    }];
    let text = |section: &str, key: &str| run.setting(section, key).and_then(toml::Value::as_str).map(str::to_string);
    parts.extend(text("model", "path"));
    parts.extend(text("data", "instance_prompt").map(|prompt| format!("“{prompt}”")));
    parts.join(" · ")
}

/// A picture at its full size, with its neighbours in time.
fn viewer() -> Markup {
    html! {
        dialog #viewer aria-label="Picture" {
            img alt="" width="1" height="1" hidden;
            p.caption aria-live="polite" {}
            div.viewer-buttons {
                button type="button" data-move="-1" { "Earlier" }
                button type="button" data-move="1" { "Later" }
                button type="button" data-move="0" { "Close" }
            }
        }
    }
}

/// Rules by which a run's lines go when its switch is off.
fn hidden_runs(runs: usize) -> String {
    (0..runs).map(|run| format!(".off-{run} .r{run}{{display:none}}")).collect()
}

#[cfg(test)]
mod tests {
    use super::super::testing::{Forged, well_formed};
    use super::*;

    fn page(runs: &[Run], live: bool) -> String {
        let shots = if live { Shots::linked(runs) } else { Shots::embedded(runs) };
        Page { runs, shots: &shots, live }.html()
    }

    #[test]
    fn the_page_is_well_formed_and_asks_for_nothing() {
        let forged = Forged::new("run <b>&\"", 30);
        forged.pictures(&[0, 10, 20, 30], 2, 32);
        forged.scores();
        let runs = [Run::open(forged.dir()).unwrap()];
        let html = page(&runs, false);
        well_formed(&html);
        assert!(html.starts_with(super::super::BEGINNING));
        assert!(html.contains("script-src 'unsafe-inline'; img-src data:\">"), "{html}");
        for address in ["://", "src=\"/", "href=\"/", "@import", "url("] {
            assert!(!html.contains(address), "{address}");
        }
        let sources = |html: &str| html.matches("src=\"").count();
        assert_eq!(sources(&html), html.matches("src=\"data:image/png;base64,").count());
        assert_eq!(sources(&html), 2 * 2 + 2 * 4);
        // Its own two scripts, and the data of seven charts, all of which nothing in the run has ended or added to.
        assert_eq!(html.matches("<script").count(), 2 + 7, "{html}");
        assert!(html.contains("run &lt;b&gt;&amp;&quot;</h1>"));
    }

    #[test]
    fn a_live_page_takes_its_pictures_from_the_server_alone() {
        let forged = Forged::new("run", 30);
        forged.pictures(&[0, 30], 1, 32);
        let html = page(&[Run::open(forged.dir()).unwrap()], true);
        assert!(html.contains("src=\"/pictures/30/0?") && html.contains("data-live") && html.contains("<time data-at"));
        assert!(!html.contains("://") && !html.contains("base64"));
        assert!(html.contains("img-src data: 'self'; connect-src 'self'\">"));
        well_formed(&html);
    }

    #[test]
    fn a_run_without_a_step_has_a_page() {
        let html = page(&[Run::open(Forged::new("run", 0).dir()).unwrap()], false);
        assert!(html.contains("No step is done yet."));
        well_formed(&html);
    }

    #[test]
    fn three_runs_share_a_page() {
        let forged = ["a", "b", "c"].map(|name| Forged::new(name, 10));
        let runs: Vec<Run> = forged.iter().map(|forged| Run::open(forged.dir()).unwrap()).collect();
        let html = page(&runs, false);
        assert!(html.contains("<h1>3 runs</h1>") && html.contains(".off-2 .r2{display:none}"));
        well_formed(&html);
    }
}
