//! Training on captioned pictures: where all captions are alike it is training on one prompt, to the bit; captions come
//! from either kind of file; ranks share captioned pictures like any others.

use std::fs;
use std::path::Path;

use crate::harness::{EVERYTHING, Home, PLAIN, apart, column, rows, weights};

/// `config` on a copy of its photographs, with captions instead of the prompt.
fn captioned(home: &Home, config: &str, caption: impl Fn(usize) -> &'static str, in_one_file: bool) -> String {
    let photographs = match config.contains("images/rough") {
        true => "images/rough/instance",
        false => "images/square/instance",
    };
    let folder = home.copy(photographs, "captioned");
    let mut names: Vec<_> = fs::read_dir(&folder).unwrap().map(|entry| entry.unwrap().file_name()).collect();
    names.sort();
    let mut lines = String::new();
    for (i, name) in names.iter().enumerate() {
        let name = name.to_str().unwrap();
        lines += &format!("{}\n", serde_json::json!({ "file_name": name, "words": caption(i) }));
        if !in_one_file {
            fs::write(folder.join(name).with_extension("txt"), caption(i)).unwrap();
        }
    }
    let mut keys = "captions = true";
    if in_one_file {
        fs::write(folder.join("metadata.jsonl"), lines).unwrap();
        keys = "captions = true\ncaption_column = \"words\"";
    }
    let config = config.replace(&format!("DATA/{photographs}"), "HOME/captioned");
    config.replace("instance_prompt = \"a photo of sks cat\"", keys)
}

fn different(i: usize) -> &'static str {
    ["a photo of sks cat", "a cat on a chair", "", "two cats", "a cat on a chair"][i % 5]
}

fn run(home: &Home, config: &str, ranks: usize, sets: &[&str]) -> (Vec<serde_json::Value>, [Vec<u8>; 2]) {
    home.job(config).ranks(ranks).sets(sets).run().done();
    let left = (rows(&home.out()), weights(&home.out()));
    fs::remove_dir_all(home.out()).unwrap();
    left
}

#[test]
fn captions_that_are_all_alike_are_one_prompt() {
    for config in [EVERYTHING, PLAIN] {
        let home = Home::new();
        let prompt = run(&home, config, 1, &[]);
        let alike = captioned(&home, config, |_| "a photo of sks cat", true);
        assert!(run(&home, &alike, 1, &[]) == prompt, "{config}");
    }
}

#[test]
fn both_kinds_of_files_and_any_ranks_train_the_same() {
    let (one, each) = (Home::new(), Home::new());
    let from_one = run(&one, &captioned(&one, EVERYTHING, different, true), 1, &[]);
    let config = captioned(&each, EVERYTHING, different, false);
    assert!(run(&each, &config, 1, &[]) == from_one);
    let shared = run(&each, &config, 2, &["train.batch_size=1", "zero.stage=3"]);
    for key in ["loss", "grad_norm"] {
        assert!(apart(&column(&shared.0, key), &column(&from_one.0, key)) < 1e-5, "{key}");
    }
    assert!(run(&one, EVERYTHING, 1, &[]).1 != from_one.1, "captions change nothing");
}

#[test]
fn dropped_prompts_are_the_empty_one() {
    let home = Home::new();
    // At a rate of nearly one, all rows have the empty prompt.
    let dropped = run(&home, PLAIN, 1, &["data.caption_dropout=0.9999999"]);
    assert!(dropped == run(&home, PLAIN, 1, &["data.instance_prompt=\"\""]));
    let some = run(&home, PLAIN, 1, &["data.caption_dropout=0.5"]);
    assert!(some != dropped && some != run(&home, PLAIN, 1, &[]));
}

#[test]
fn a_picture_without_a_caption_is_told_before_anything_starts() {
    let home = Home::new();
    let config = captioned(&home, PLAIN, different, false);
    let first = fs::read_dir(home.path("captioned")).unwrap().map(|e| e.unwrap().path());
    let first = first.filter(|p| p.extension().is_some_and(|e| e == "txt")).min().unwrap();
    fs::remove_file(&first).unwrap();
    let problems = home.job(&config).run().refused();
    let name = Path::new(first.file_stem().unwrap()).display().to_string();
    assert!(problems[0].contains(&name) && problems[0].contains("has no caption"), "{problems:?}");
    assert!(!home.out().exists());
    home.job(&config).set("data.instance_prompt=\"a cat\"").set("train.max_steps=1").run().done();
    let problems = home.job(PLAIN).set("data.caption_column=\"x\"").run().refused();
    assert!(problems[0].contains("captions = true"), "{problems:?}");
}
