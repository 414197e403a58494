//! A run that was stopped and resumed is the run that was not: its rows, its weights, to the bit; and what a checkpoint
//! folder may look like when it is.

use std::fs;
use std::path::Path;

use crate::harness::{EVERYTHING, Home, PLAIN, apart, column, rows, weights};

/// Rows and weights of a run of six steps, and of the same run stopped after three and resumed.
fn stopped_and_resumed(ranks: usize, stage: usize) {
    let home = Home::new();
    let stage = format!("zero.stage={stage}");
    let job = || home.job(EVERYTHING).ranks(ranks).sets(&[&stage, "checkpoint.every=3"]);
    job().run().done();
    let (whole, trained) = (rows(&home.out()), weights(&home.out()));
    let steps = column(&whole, "grad_norm").len();
    assert!(steps == 6 && whole.len() > 9, "{whole:#?}");
    let ran = job().set("checkpoint.resume=checkpoint-3").run().done();
    ran.says("going on from");
    // What came after the checkpoint was cut, and came again.
    assert_eq!(rows(&home.out()), whole);
    assert!(weights(&home.out()) == trained, "{ranks} ranks, {stage}: the weights differ");
}

#[test]
fn one_rank_resumes_to_the_bit() {
    stopped_and_resumed(1, 0);
    stopped_and_resumed(1, 3);
}

#[test]
fn two_replicated_ranks_resume_to_the_bit() {
    stopped_and_resumed(2, 0);
    stopped_and_resumed(2, 1);
}

#[test]
fn two_partitioned_ranks_resume_to_the_bit() {
    stopped_and_resumed(2, 2);
    stopped_and_resumed(2, 3);
}

#[test]
fn bf16_resumes_to_the_bit() {
    let home = Home::new();
    let sets = ["train.mixed_precision=bf16", "checkpoint.every=2", "zero.stage=3", "train.max_steps=4"];
    let job = || home.job(EVERYTHING).ranks(2).sets(&sets);
    job().run().done();
    let (whole, trained) = (rows(&home.out()), weights(&home.out()));
    job().set("checkpoint.resume=checkpoint-2").run().done();
    assert!(rows(&home.out()) == whole && weights(&home.out()) == trained);
}

/// Checkpoints do not change the run that writes them.
#[test]
fn writing_checkpoints_changes_nothing() {
    let home = Home::new();
    home.job(PLAIN).run().done();
    home.job(PLAIN).sets(&["checkpoint.every=1", "checkpoint.keep=1", "output.dir=HOME/with"]).run().done();
    assert_eq!(rows(&home.out()), rows(&home.path("with")));
    let unet = "unet/diffusion_pytorch_model.safetensors";
    assert!(fs::read(home.out().join(unet)).unwrap() == fs::read(home.path("with").join(unet)).unwrap());
}

/// Written by two ranks in stage 3, read by one to four in any stage, with the same items a step.
#[test]
fn other_ranks_and_stages_go_on_from_a_checkpoint() {
    let home = Home::new();
    let job = |ranks: usize, batch: usize| {
        let batch = format!("train.batch_size={batch}");
        home.job(EVERYTHING).ranks(ranks).set(&batch).set("train.gradient_accumulation_steps=1")
    };
    let written = ["zero.stage=3", "checkpoint.every=3"];
    job(2, 6).sets(&written).run().done();
    let whole = rows(&home.out());
    let after: Vec<_> = whole.iter().filter(|row| row["step"].as_u64() > Some(3)).cloned().collect();
    for (number, (ranks, batch, stage)) in [(1, 12, 0), (2, 6, 1), (3, 4, 2), (3, 4, 0), (4, 3, 3)].iter().enumerate() {
        let sets = [
            format!("output.dir=HOME/again-{number}"),
            format!("zero.stage={stage}"),
            "checkpoint.resume=HOME/out/checkpoint-3".to_string(),
        ];
        job(*ranks, *batch).sets(&sets.each_ref().map(String::as_str)).run().done();
        let resumed = rows(&home.path(&format!("again-{number}")));
        for key in ["micro_step", "step", "loss", "grad_norm", "lr"] {
            let (got, want) = (column(&resumed, key), column(&after, key));
            assert!(apart(&got, &want) < 1e-5, "{ranks} ranks, stage {stage}: {key} {got:?} for {want:?}");
        }
    }
}

#[test]
fn nothing_to_resume_begins_afresh_and_nothing_left_to_do_does_nothing() {
    let home = Home::new();
    let sets = ["checkpoint.resume=latest", "checkpoint.every=2", "zero.stage=2"];
    home.job(PLAIN).ranks(2).sets(&sets).run().done().says("begins at the first step");
    let (whole, files) = (rows(&home.out()), crate::harness::listing(&home.out()));
    assert_eq!(column(&whole, "grad_norm").len(), 4);
    home.job(PLAIN).ranks(2).sets(&sets).run().done().says("all 4 steps are done");
    assert_eq!(rows(&home.out()), whole);
    assert_eq!(crate::harness::listing(&home.out()), files);
}

#[test]
fn a_changed_learning_rate_is_used_and_said() {
    let home = Home::new();
    home.job(PLAIN).sets(&["checkpoint.every=2", "train.max_steps=2"]).run().done();
    let resumed = ["checkpoint.resume=latest", "optimizer.learning_rate=3e-4"];
    home.job(PLAIN).sets(&resumed).run().done().says("optimizer.learning_rate is 3e-4 from here on; it was 1e-4");
    assert_eq!(column(&rows(&home.out()), "lr")[4..], [3e-4; 4]);
    let again = home.job(PLAIN).sets(&["checkpoint.resume=latest", "train.seed=9"]).run().done();
    again.says("train.seed is 9 from here on; it was 3");
    assert!(!again.stderr.contains("learning_rate is"), "{}", again.stderr);
}

#[test]
fn a_longer_run_goes_on_where_the_shorter_one_ended() {
    let home = Home::new();
    let short = ["train.max_steps=3", "checkpoint.every=3"];
    home.job(PLAIN).sets(&short).run().done();
    home.job(PLAIN).sets(&["checkpoint.resume=latest", "train.max_steps=6"]).run().done();
    home.job(PLAIN).sets(&["train.max_steps=6", "output.dir=HOME/whole"]).run().done();
    assert_eq!(rows(&home.out()), rows(&home.path("whole")));
}

/// A seed that nobody chose is kept.
#[test]
fn a_drawn_seed_goes_on() {
    let home = Home::new();
    let config = PLAIN.replace("seed = 3\n", "");
    home.job(&config).ranks(2).set("checkpoint.every=2").run().done();
    let whole = rows(&home.out());
    home.job(&config).ranks(2).sets(&["checkpoint.every=2", "checkpoint.resume=checkpoint-2"]).run().done();
    assert_eq!(rows(&home.out()), whole);
    home.job(&config).ranks(2).set("output.dir=HOME/other").run().done();
    assert_ne!(column(&rows(&home.path("other")), "loss"), column(&whole, "loss"));
}

fn checkpoints(out: &Path) -> Vec<String> {
    let entries = fs::read_dir(out).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap());
    let mut names: Vec<String> = entries.filter(|name| name.contains("checkpoint")).collect();
    names.sort();
    names
}

#[test]
fn the_newest_few_are_kept() {
    let home = Home::new();
    home.job(PLAIN).ranks(2).sets(&["checkpoint.every=1", "checkpoint.keep=2"]).run().done();
    assert_eq!(checkpoints(&home.out()), ["checkpoint-3", "checkpoint-4"]);
}

#[test]
fn an_old_one_goes_only_after_a_new_one_is_whole() {
    let home = Home::new();
    fs::create_dir(home.out()).unwrap();
    // A file where the second checkpoint would be written.
    fs::write(home.out().join(".writing-checkpoint-2"), "").unwrap();
    let job = home.job(PLAIN).ranks(2).sets(&["checkpoint.every=1", "checkpoint.keep=1"]);
    let ran = job.run().failed(&["writing the checkpoint of step 2", ".writing-checkpoint-2"]);
    assert!(ran.stderr.contains("rank 0 of 2 failed"), "{}", ran.stderr);
    assert_eq!(checkpoints(&home.out()), [".writing-checkpoint-2", "checkpoint-1"]);
    fs::remove_file(home.out().join(".writing-checkpoint-2")).unwrap();
    home.job(PLAIN).ranks(2).set("checkpoint.resume=latest").run().done();
    assert_eq!(column(&rows(&home.out()), "grad_norm").len(), 4);
}

#[test]
fn what_a_killed_run_left_half_done_is_passed_over_and_cleared() {
    let home = Home::new();
    home.job(PLAIN).sets(&["checkpoint.every=2", "train.max_steps=2"]).run().done();
    for half in [".writing-checkpoint-4", ".deleting-checkpoint-1", ".writing-pipeline"] {
        crate::harness::copy_folder(&home.path("out/checkpoint-2"), &home.out().join(half));
    }
    // Folders that only look like checkpoints.
    fs::create_dir(home.path("out/checkpoint-3")).unwrap();
    fs::create_dir(home.path("out/checkpoint-notes")).unwrap();
    fs::write(home.path("out/metrics.jsonl.txt"), "mine").unwrap();
    home.job(PLAIN).set("checkpoint.resume=latest").run().done().says("after step 2");
    assert_eq!(checkpoints(&home.out()), ["checkpoint-2", "checkpoint-notes"]);
    assert!(home.path("out/metrics.jsonl.txt").is_file() && !home.path("out/.writing-pipeline").exists());
}

/// Going back discards the future: it would otherwise be taken for the newest, and the new one's be deleted for it.
#[test]
fn later_checkpoints_go_when_a_run_goes_back() {
    let home = Home::new();
    home.job(PLAIN).set("checkpoint.every=1").run().done();
    let sets = ["checkpoint.resume=checkpoint-1", "checkpoint.every=2", "train.max_steps=2", "checkpoint.keep=1"];
    home.job(PLAIN).sets(&sets).run().done().says("checkpoint-4");
    assert_eq!(checkpoints(&home.out()), ["checkpoint-2"]);
    assert_eq!(column(&rows(&home.out()), "grad_norm").len(), 2);
}

#[test]
fn overwriting_begins_afresh() {
    let home = Home::new();
    home.job(PLAIN).set("checkpoint.every=2").run().done();
    home.job(PLAIN).sets(&["output.overwrite=true", "train.max_steps=1"]).run().done();
    assert_eq!(checkpoints(&home.out()), Vec::<String>::new());
    assert_eq!(rows(&home.out()).len(), 2);
}

/// Fewer photographs than there were: what is left of the epoch is none, and the next one begins.
#[test]
fn a_shrunken_data_set_begins_its_next_epoch() {
    let home = Home::new();
    let photos = home.copy("images/square/instance", "photos");
    let config = PLAIN.replace("DATA/images/square/instance", "HOME/photos");
    home.job(&config).sets(&["checkpoint.every=2", "train.max_steps=2"]).run().done();
    for name in ["02.png", "03.png", "04.png"] {
        fs::remove_file(photos.join(name)).unwrap();
    }
    home.job(&config).set("checkpoint.resume=latest").run().done();
    assert!(column(&rows(&home.out()), "loss").iter().all(|loss| *loss > 0.0));
}
