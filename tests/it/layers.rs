//! The architecture's invariants that can be read off the source: who imports whom, who calls what.

use std::fs;
use std::path::{Path, PathBuf};

/// A source file of the library, without its tests.
struct Source {
    /// From src/.
    path: String,
    text: String,
}

fn sources() -> Vec<Source> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
    let mut files = Vec::new();
    collect(&root, &mut files);
    let mut sources: Vec<Source> = files
        .iter()
        .map(|file| {
            let path = file.strip_prefix(&root).unwrap().display().to_string();
            let text = fs::read_to_string(file).unwrap();
            let code = text.split("#[cfg(test)]\nmod tests {").next().unwrap_or_default();
            Source { path, text: code.to_string() }
        })
        .filter(|source| !is_test(&source.path))
        .collect();
    sources.sort_by(|a, b| a.path.cmp(&b.path));
    assert!(sources.len() > 50, "the sources were not found");
    sources
}

fn collect(dir: &Path, into: &mut Vec<PathBuf>) {
    for entry in fs::read_dir(dir).unwrap() {
        let path = entry.unwrap().path();
        match path.is_dir() {
            true => collect(&path, into),
            false if path.extension().is_some_and(|end| end == "rs") => into.push(path),
            false => {}
        }
    }
}

/// Files that are compiled for tests alone.
fn is_test(path: &str) -> bool {
    ["tests.rs", "testing.rs", "parity.rs"].iter().any(|name| path.ends_with(&format!("/{name}")))
}

/// Every line of code (comments aside) in the files that `within` chooses for which `wrong` holds.
fn lines(within: impl Fn(&str) -> bool, wrong: impl Fn(&str) -> bool) -> Vec<String> {
    let mut found = Vec::new();
    for source in sources().iter().filter(|source| within(&source.path)) {
        for (number, line) in source.text.lines().enumerate() {
            let code = line.split("//").next().unwrap_or_default();
            if wrong(code) {
                found.push(format!("src/{}:{}: {}", source.path, number + 1, line.trim()));
            }
        }
    }
    found
}

/// Whether a line names a module of the crate: `crate::comm…` or `use crate::{…comm…}`.
fn names(line: &str, module: &str) -> bool {
    let word =
        |text: &str| text.split(|c: char| !c.is_alphanumeric() && c != '_').next().is_some_and(|first| first == module);
    line.match_indices("crate::").any(|(at, found)| {
        let rest = &line[at + found.len()..];
        match rest.strip_prefix('{') {
            Some(list) => list.split([',', '}']).any(|item| word(item.trim())),
            None => word(rest),
        }
    })
}

fn under<'a>(folders: &'a [&'a str]) -> impl Fn(&str) -> bool + 'a {
    move |path| folders.iter().any(|folder| path.starts_with(&format!("{folder}/")) || path == format!("{folder}.rs"))
}

#[track_caller]
fn none(found: Vec<String>) {
    assert!(found.is_empty(), "\n{}", found.join("\n"));
}

/// What stands in a row of the picture imports what stands below it alone (invariants 1 and 2 among it).
#[test]
fn modules_import_what_lies_below_them() {
    let rows: [(&str, &[&str]); 15] = [
        ("device", &["kernels"]),
        ("kernels", &["device"]),
        ("ops", &["device", "kernels"]),
        ("comm", &["device", "kernels"]),
        ("segment", &["device", "ops"]),
        ("zero", &["device", "comm", "segment"]),
        ("data", &["device", "diffusion"]),
        ("diffusion", &["device"]),
        ("model", &["device", "ops", "segment"]),
        ("optim", &["device", "kernels"]),
        ("checkpoint", &["device", "comm", "zero", "optim", "segment"]),
        ("launch", &["comm", "device"]),
        (
            "plan",
            &["device", "kernels", "comm", "zero", "segment", "optim", "model", "data", "pipeline", "config", "hub"],
        ),
        ("track", &["comm", "device"]),
        ("report", &[]),
    ];
    let all = [
        "ops",
        "comm",
        "segment",
        "zero",
        "data",
        "diffusion",
        "model",
        "optim",
        "checkpoint",
        "train",
        "sample",
        "pipeline",
        "track",
        "report",
        "config",
        "launch",
        "cli",
        "hub",
        "device",
        "kernels",
    ];
    for (module, below) in rows {
        let above = all.iter().filter(|other| **other != module && !below.contains(other));
        for other in above {
            none(lines(under(&[module]), |line| names(line, other)));
        }
    }
}

#[test]
fn the_way_back_is_the_record_of_ops_and_not_candles() {
    none(lines(|_| true, |line| line.contains(".backward()?") || line.contains("GradStore")));
    // An op that is applied past the record would lose its gradients.
    none(lines(|path| path != "ops/record.rs", |line| line.contains(".apply_op")));
    let pulls = lines(|_| true, |line| line.contains("record.pull("));
    assert!(!pulls.is_empty());
    none(
        pulls
            .into_iter()
            .filter(|line| !line.starts_with("src/segment/pullback.rs:") && !line.starts_with("src/ops/record.rs:"))
            .collect(),
    );
}

#[test]
fn unsafe_stays_near_the_machine() {
    let word = |line: &str| line.split(|c: char| !c.is_alphanumeric() && c != '_').any(|word| word == "unsafe");
    none(lines(|path| !under(&["device", "kernels", "comm", "ops", "optim"])(path), word));
}

#[test]
fn nothing_is_left_to_do() {
    let marks = ["todo!", "unimplemented!", "dbg!", "allow(dead_code)", "#[ignore"];
    none(lines(|_| true, |line| marks.iter().any(|mark| line.contains(mark))));
}

/// Invariant 8: what trains is told everything by the plan.
#[test]
fn training_asks_neither_the_environment_nor_the_command_line() {
    let below = under(&["train", "checkpoint", "data", "diffusion", "model", "optim", "segment", "zero", "ops"]);
    none(lines(below, |line| line.contains("std::env") || line.contains("env::var")));
    none(lines(under(&["train"]), |line| names(line, "cli") || line.contains("config::load")));
}

/// Invariant 5: collectives stand in no branch that only some ranks take. Read roughly: no line has both.
#[test]
fn no_collective_is_behind_a_rank() {
    let calls = [".all_reduce(", ".all_gather(", ".reduce_scatter(", ".broadcast(", ".barrier(", ".agree("];
    none(lines(under(&["train", "checkpoint", "zero"]), |line| {
        line.contains("rank() ==") && calls.iter().any(|call| line.contains(call))
    }));
}
