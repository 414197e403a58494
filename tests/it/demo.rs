//! The demo, shortened: the subject is learned, the class is kept, and neither number says so by itself.

use std::fs;
use std::path::Path;

use serde_json::Value;

use crate::harness::Home;

/// The demo's configuration with its results in this test's folder.
fn demo() -> String {
    let root = env!("CARGO_MANIFEST_DIR");
    let config = fs::read_to_string(Path::new(root).join("configs/demo.toml")).unwrap();
    config.replace("\"demo/", &format!("\"{root}/demo/")).replace("\"runs/demo", "\"HOME/out")
}

/// Likeness before and after, and the class's drift.
fn scores(home: &Home) -> (f64, f64, f64) {
    let text = fs::read_to_string(home.out().join("samples/scores.jsonl")).unwrap();
    let rows: Vec<Value> = text.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    let number = |row: Option<&Value>, key: &str| row.unwrap()[key].as_f64().unwrap();
    (number(rows.first(), "likeness"), number(rows.last(), "likeness"), number(rows.last(), "drift"))
}

/// Whether the subject was learned, by a margin.
fn learned((before, after, _): (f64, f64, f64)) -> bool {
    after > before + 0.1
}

#[test]
fn the_subject_is_learned_only_by_training() {
    let home = Home::new();
    let short = ["train.max_steps=50", "prior.num_class_images=8", "validation.num_images=4", "checkpoint.every=1000"];
    let ran = home.job(&demo()).ranks(2).sets(&short).run().done();
    ran.says("before training the likeness was");
    ran.says("before-after.png");
    let trained = scores(&home);
    assert!(learned(trained), "{trained:?}");
    assert!(trained.2 > 0.0 && trained.2 < 60.0, "{trained:?}");
    home.job(&demo()).ranks(2).sets(&short).set("optimizer.learning_rate=1e-30").run().done();
    let off = scores(&home);
    assert!(!learned(off), "{off:?}");
}
