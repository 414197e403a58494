//! Runs that go wrong on their way: exit status 1, what and where, and nothing half-written.

use std::fs;
use std::path::Path;

use crate::harness::{EVERYTHING, Home, PLAIN};

/// A loss that is not finite ends the run on all ranks, and says where; what diverged is not kept.
#[test]
fn divergence_stops_the_run_and_names_step_and_images() {
    for ranks in [1, 2] {
        let home = Home::new();
        let job = home.job(EVERYTHING).sets(&["optimizer.learning_rate=1e20", "lr_schedule.kind=constant"]);
        let ran = job.set("checkpoint.every=3").ranks(ranks).run();
        let ran = ran.failed(&[
            "step 2",
            "loss of micro-batch",
            "NaN",
            "images/rough/instance/",
            "at time step ",
            "learning_rate",
        ]);
        assert_eq!(ran.stderr.matches("NaN").count(), 1, "{}", ran.stderr);
        assert_eq!(names(&home.out()), ["config.toml", "metrics.jsonl"]);
    }
    // The loss of the only step is fine; its update is not.
    for (set, what) in
        [("checkpoint.every=1", "writing the checkpoint of step 1"), ("checkpoint.every=9", "writing the pipeline")]
    {
        let home = Home::new();
        let sets = ["optimizer.learning_rate=1e30", "optimizer.weight_decay=1e30", "train.max_steps=1", set];
        home.job(PLAIN).sets(&sets).ranks(2).run().failed(&[what, "not finite"]);
        assert_eq!(names(&home.out()), ["config.toml", "metrics.jsonl"]);
    }
}

/// The disk is full in the middle of the run: no half checkpoint, and the file is named.
#[test]
fn a_checkpoint_that_cannot_be_written_leaves_nothing() {
    let home = Home::new();
    let job = home.job(PLAIN).set("checkpoint.every=1");
    // A file may have 2 MB (or 4, with some shells), and a checkpoint of one rank has more.
    let ran = job.run_after("trap '' XFSZ; ulimit -f 4000");
    ran.failed(&["writing the checkpoint of step 1", "checkpoint-1/rank-00000-of-00001.safetensors", "too large"]);
    assert_eq!(names(&home.out()), ["config.toml", "metrics.jsonl"]);
}

fn names(dir: &Path) -> Vec<String> {
    let mut names: Vec<String> =
        fs::read_dir(dir).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    names
}
