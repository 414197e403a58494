//! Pictures that a run makes: class images that are missing, and those of its validations.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use crate::harness::{Home, PLAIN, rows, weights};

const PRIOR: &str = r#"
[prior]
class_dir = "HOME/class"
class_prompt = "a cat"
num_class_images = 12
sample_batch_size = 2
steps = 3
sampler = "ddim"
"#;

const VALIDATION: &str = r#"
[validation]
prompt = ["a photo of sks cat", "a chair"]
negative_prompt = "rain"
num_images = 2
every = 3
steps = 3
sampler = "euler-a"
scores = true
class_prompt = "a cat"
"#;

/// Name -> bytes of the files in a folder.
fn files(dir: &Path) -> BTreeMap<String, Vec<u8>> {
    let entries = fs::read_dir(dir).unwrap().map(|entry| entry.unwrap());
    entries.map(|e| (e.file_name().into_string().unwrap(), fs::read(e.path()).unwrap())).collect()
}

#[test]
fn missing_class_images_are_made_by_any_ranks_alike() {
    let home = Home::new();
    let config = format!("{PLAIN}{PRIOR}");
    let mut first = None;
    for ranks in [1, 2, 3] {
        let job = home.job(&config).ranks(ranks).sets(&["train.max_steps=1", "zero.stage=3", "train.batch_size=1"]);
        job.run().done().says("12 class images are in");
        let made = files(&home.path("class"));
        assert_eq!(made.len(), 12);
        for (name, bytes) in &made {
            assert!(name.ends_with(".jpg") && name.split_once('-').unwrap().1.len() == 44, "{name}");
            assert_eq!(image::load_from_memory(bytes).unwrap().width(), 64);
        }
        assert!(*first.get_or_insert(made.clone()) == made, "{ranks} ranks");
        fs::remove_dir_all(home.path("class")).unwrap();
        fs::remove_dir_all(home.out()).unwrap();
    }
}

#[test]
fn killed_at_any_moment_it_makes_just_the_missing_ones() {
    let whole = Home::new();
    let config = format!("{PLAIN}{PRIOR}");
    let sets = ["train.max_steps=1", "train.batch_size=2"];
    whole.job(&config).ranks(2).sets(&sets).run().done();
    let wanted = files(&whole.path("class"));
    let home = Home::new();
    // A moment is when so many files are there; what is being written then is lost.
    for moment in [1, 2, 5, 6, 9, 11] {
        let mut run = home.job(&config).ranks(2).sets(&sets).start();
        let enough = |dir: &Path| fs::read_dir(dir).is_ok_and(|found| found.count() >= moment);
        while !enough(&home.path("class")) && run.child.try_wait().unwrap().is_none() {
            std::thread::yield_now();
        }
        run.child.kill().unwrap();
        run.end();
        let left = files(&home.path("class"));
        for (name, bytes) in left.iter().filter(|(name, _)| !name.starts_with('.')) {
            assert!(wanted.get(name) == Some(bytes), "{name} is not whole");
        }
    }
    home.job(&config).ranks(2).sets(&sets).run().done();
    let made = files(&home.path("class"));
    assert_eq!(made.keys().collect::<Vec<_>>(), wanted.keys().collect::<Vec<_>>());
    assert!(made == wanted);
    // Nothing is missing now, so nothing is made; and pictures of the user's own count.
    let ran = home.job(&config).sets(&["train.max_steps=1", "output.overwrite=true"]).run().done();
    assert!(!ran.stderr.contains("making"), "{}", ran.stderr);
    let (first, _) = wanted.first_key_value().unwrap();
    fs::rename(home.path("class").join(first), home.path("class/own.jpg")).unwrap();
    let ran = home.job(&config).sets(&["train.max_steps=1", "output.overwrite=true"]).run().done();
    assert!(!ran.stderr.contains("making"), "{}", ran.stderr);
}

#[test]
fn validations_are_the_same_for_any_ranks_and_change_nothing_else() {
    let home = Home::new();
    let mut first = None;
    let train = "model.train_text_encoder=true";
    for (ranks, batch) in [(1, 6), (2, 3), (3, 2)] {
        let config = format!("{PLAIN}{VALIDATION}");
        let batch = format!("train.batch_size={batch}");
        home.job(&config).ranks(ranks).sets(&["zero.stage=3", &batch, train]).run().done().says("likeness");
        // Before training only: later the ranks' sums differ in the last bits.
        let made = files(&home.out().join("samples/step-000000"));
        assert_eq!(made.len(), 6);
        assert!(*first.get_or_insert(made.clone()) == made, "{ranks} ranks");
        for step in ["step-000003", "step-000004"] {
            let later = files(&home.out().join("samples").join(step));
            assert!(later.keys().eq(made.keys()) && later != made);
        }
        let left = (rows(&home.out()), weights(&home.out()));
        fs::remove_dir_all(home.out()).unwrap();
        home.job(PLAIN).ranks(ranks).sets(&["zero.stage=3", &batch, train]).run().done();
        assert!((rows(&home.out()), weights(&home.out())) == left, "{ranks} ranks");
        fs::remove_dir_all(home.out()).unwrap();
    }
}

#[test]
fn a_resumed_run_has_the_pictures_of_one_that_ran_through() {
    let (through, halves) = (Home::new(), Home::new());
    let config = format!("{PLAIN}{VALIDATION}");
    through.job(&config).run().done();
    let save = ["checkpoint.every=2"];
    halves.job(&config).sets(&save).set("train.max_steps=3").run().done();
    // It goes on from step 2, and what it made after step 3 with another last step is made again.
    halves.job(&config).sets(&["checkpoint.resume=latest", "checkpoint.every=2"]).run().done();
    for step in [0, 3, 4] {
        let folder = format!("samples/step-{step:06}");
        assert!(files(&halves.out().join(&folder)) == files(&through.out().join(&folder)), "{step}");
    }
    for table in ["samples/index.jsonl", "samples/scores.jsonl"] {
        assert!(fs::read(halves.out().join(table)).unwrap() == fs::read(through.out().join(table)).unwrap());
    }
    let text = fs::read_to_string(through.out().join("samples/scores.jsonl")).unwrap();
    let scores: Vec<serde_json::Value> = text.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    assert_eq!(scores.len(), 3);
    assert_eq!(scores[0]["drift"], 0.0);
    assert!(scores[2]["drift"].as_f64().unwrap() > 0.0);
}

#[test]
fn what_cannot_be_made_is_told_beforehand() {
    let home = Home::new();
    let told = |more: &str, sets: &[&str], pieces: &[&str]| {
        let problems = home.job(&format!("{PLAIN}{more}")).sets(sets).run().refused().join("\n");
        assert!(pieces.iter().all(|piece| problems.contains(piece)), "{problems}\nlacks one of {pieces:?}");
        assert!(!home.out().exists() && !home.path("class").exists());
    };
    told(PRIOR, &["prior.sampler=\"heun\""], &["prior.sampler", "heun"]);
    told(PRIOR, &["prior.steps=0"], &["prior.steps"]);
    told(VALIDATION, &["validation.sampler=\"dmp++2m\""], &["validation.sampler", "dpm++2m"]);
    told("[validation]\nnum_images = 3\n", &[], &["no prompt"]);
    told("[validation]\nprompt = \"x\"\nscores = true\n", &[], &["class_prompt"]);
    told("[validation]\nprompt = \"x\"\nclass_prompt = \"y\"\n", &[], &["scores = true"]);
    told("[validation]\nprompt = \"x\"\nimages = [\"y\"]\n", &[], &["validation.images"]);
}
