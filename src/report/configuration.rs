//! The resolved configuration as markup, and what differs between runs.

use maud::{Markup, html};

use super::curves::swatch;
use super::run::Run;

/// Differences first where there are several runs.
pub fn configuration(runs: &[Run]) -> Markup {
    html! {
        @if runs.iter().any(|run| !run.config.is_empty()) {
            section #configuration {
                div.heading { h2 { "Configuration" } }
                @if let [run] = runs {
                    (sections(run))
                } @else {
                    (differences(runs))
                    @for (i, run) in runs.iter().enumerate() {
                        details id=(format!("configuration-{i}")) {
                            summary { (swatch(i)) "All of " (run.name) }
                            (sections(run))
                        }
                    }
                }
            }
        }
    }
}

fn sections(run: &Run) -> Markup {
    html! {
        div.config {
            @for (name, section) in &run.config {
                @if let Some(section) = section.as_table() {
                    div.config-section {
                        h3 { (name) }
                        dl { @for (key, value) in section { div.entry { dt { (key) } dd { (shown(value)) } } } }
                    }
                }
            }
        }
    }
}

/// Keys whose values are not the same in all runs. `output.dir` is what tells runs apart in any case.
fn differences(runs: &[Run]) -> Markup {
    let mut keys: Vec<(String, Vec<Option<String>>)> = Vec::new();
    for (name, section) in runs.iter().flat_map(|run| &run.config) {
        for key in section.as_table().into_iter().flat_map(|section| section.keys()) {
            let full = format!("{name}.{key}");
            if full == "output.dir" || keys.iter().any(|(known, _)| *known == full) {
                continue;
            }
            keys.push((full, runs.iter().map(|run| run.setting(name, key).map(shown)).collect()));
        }
    }
    keys.retain(|(_, values)| values.iter().any(|value| *value != values[0]));
    html! {
        @if keys.is_empty() {
            p { "The configurations are the same." }
        } @else {
            div.scroll tabindex="0" role="group" aria-label="What differs between the configurations" {
                table.differences {
                    thead { tr { th scope="col" { "What differs" } @for (i, run) in runs.iter().enumerate() { th scope="col" { (swatch(i)) (run.name) } } } }
                    tbody {
                        @for (key, values) in &keys {
                            tr { th scope="row" { (key) } @for value in values { td { (value.as_deref().unwrap_or("–")) } } }
                        }
                    }
                }
            }
        }
    }
}

/// As it is written in TOML.
fn shown(value: &toml::Value) -> String {
    value.to_string()
}

#[cfg(test)]
mod tests {
    use super::super::testing::{Forged, well_formed};
    use super::*;

    #[test]
    fn only_what_differs_is_held_against_each_other() {
        let (one, two) = (Forged::new("one", 3), Forged::new("two", 3));
        let changed = "[train]\nmax_steps = 3\nseed = 8\n[prior]\nloss_weight = 1.0\n[output]\ndir = \"<b>\"\n";
        std::fs::write(two.dir().join("config.toml"), changed).unwrap();
        let runs = [Run::open(one.dir()).unwrap(), Run::open(two.dir()).unwrap()];
        let markup = differences(&runs).into_string();
        assert!(markup.contains("<th scope=\"row\">train.seed</th><td>7</td><td>8</td>"), "{markup}");
        assert!(markup.contains("<th scope=\"row\">prior.loss_weight</th><td>–</td><td>1.0</td>"), "{markup}");
        assert!(!markup.contains("train.max_steps") && !markup.contains("output.dir"));
        let whole = configuration(&runs).into_string();
        assert!(whole.contains("&lt;b&gt;") && !whole.contains("<b>"));
        well_formed(&whole);
        assert!(differences(&[Run::open(one.dir()).unwrap()]).into_string().contains("the same"));
    }
}
