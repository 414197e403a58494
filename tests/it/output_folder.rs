//! The folder that a run writes to: what else may be in it, and who else may use it.

use std::fs;

use crate::harness::{Home, PLAIN, copy_folder, data, listing, rows};

/// What a run reads stays, also where it would write: in a folder of its pipeline, or of a checkpoint.
#[test]
fn what_a_run_reads_from_its_own_folder_is_refused_and_stays() {
    let home = Home::new();
    let (photographs, model) = (data("images/square/instance"), data("models/sd15"));
    let cases = [
        ("data.instance_dir", "unet", &photographs),
        ("data.instance_dir", "checkpoint-1", &photographs),
        ("data.instance_dir", "samples/mine", &photographs),
        ("prior.class_dir", "vae", &photographs),
        ("model.path", "tokenizer", &model),
    ];
    for (key, folder, from) in cases {
        let out = home.path(&format!("of-{key}-{}", folder.replace('/', "-")));
        copy_folder(from, &out.join(folder));
        let before = listing(&out);
        let own = [
            format!("output.dir={}", out.display()),
            format!("{key}={}", out.join(folder).display()),
            "output.overwrite=true".to_string(),
            "checkpoint.resume=latest".to_string(),
        ];
        let job = own.iter().fold(home.job(PLAIN), |job, set| job.set(set));
        let job = if key.starts_with("prior") {
            job.sets(&["prior.class_prompt=a photo of a cat", "prior.num_class_images=4"])
        } else {
            job
        };
        let problems = job.run().refused();
        let own = format!("{key} lies in {}", folder.split('/').next().unwrap());
        assert!(problems.iter().any(|problem| problem.contains(&own)), "{problems:?}");
        assert_eq!(listing(&out), before);
    }
}

#[test]
fn a_folder_is_one_runs_at_a_time() {
    let home = Home::new();
    let mut first = home.job(PLAIN).set("train.max_steps=4000").start();
    first.wait_for_step(1);
    for more in [&["output.overwrite=true"][..], &["checkpoint.resume=latest"]] {
        let problems = home.job(PLAIN).sets(more).run().refused();
        assert!(problems[0].contains("another run that is under way writes into this folder"), "{problems:?}");
    }
    first.child.kill().unwrap();
    first.end();
    // The ranks of a launcher that was killed are gone soon after it.
    let again = || home.job(PLAIN).set("output.overwrite=true").run();
    let since = std::time::Instant::now();
    while again().status != Some(0) {
        assert!(since.elapsed().as_secs() < 20);
    }
    assert_eq!(rows(&home.out()).iter().filter(|row| row.get("grad_norm").is_some()).count(), 4);
}

/// `resume = "latest"` goes on with what there is, begins anew what never came to a checkpoint, and takes nobody's results.
#[test]
fn going_on_does_not_mean_to_replace() {
    let home = Home::new();
    home.job(PLAIN).run().done();
    let before = listing(&home.out());
    let written = || fs::read(home.out().join("config.toml")).unwrap();
    let config = written();
    for more in [&[][..], &["checkpoint.resume=latest"]] {
        let problems = home.job(PLAIN).set("optimizer.learning_rate=1e-3").sets(more).run().refused();
        let advice = &problems[0];
        assert!(advice.contains("this folder holds another run") && !advice.contains("resume"), "{advice}");
    }
    assert!(listing(&home.out()) == before && written() == config);
    // A checkpoint of a run elsewhere does not allow it, either.
    home.job(PLAIN).sets(&["output.dir=HOME/other", "checkpoint.every=2"]).run().done();
    let problems = home.job(PLAIN).set("checkpoint.resume=HOME/other/checkpoint-2").run().refused();
    assert!(problems[0].contains("this folder holds another run"), "{problems:?}");
    assert!(listing(&home.out()) == before && written() == config);
    // Where there is one to go on with it is said.
    let problems = home.job(PLAIN).set("output.dir=HOME/other").run().refused();
    assert!(problems[0].contains("resume = \"latest\""), "{problems:?}");
    // Stopped before its first checkpoint, a run begins anew.
    for file in ["config.toml", "metrics.jsonl"] {
        fs::create_dir_all(home.path("young")).unwrap();
        fs::copy(home.out().join(file), home.path("young").join(file)).unwrap();
    }
    home.job(PLAIN).sets(&["output.dir=HOME/young", "checkpoint.resume=latest"]).run().done();
}

/// What would only be found at the end of the run.
#[test]
fn what_cannot_be_replaced_is_found_before_the_run() {
    let home = Home::new();
    fs::create_dir_all(home.out().join("config.toml")).unwrap();
    let problems = home.job(PLAIN).set("output.overwrite=true").run().refused();
    assert!(problems[0].contains("config.toml is no file"), "{problems:?}");
    fs::remove_dir(home.out().join("config.toml")).unwrap();
    fs::write(home.out().join("unet"), "notes").unwrap();
    let problems = home.job(PLAIN).set("output.overwrite=true").run().refused();
    assert!(problems[0].contains("unet is no folder"), "{problems:?}");
    assert_eq!(listing(&home.out()), [home.out().join("unet")]);
}

/// Also if it has trained: then there is neither its folder nor a name for it.
#[test]
fn a_text_encoder_that_is_to_be_left_out_is_left_out() {
    for trains in ["true", "false"] {
        let home = Home::new();
        let train = format!("model.train_text_encoder={trains}");
        home.job(PLAIN).sets(&[&train, "output.skip_save_text_encoder=true", "train.max_steps=1"]).run().done();
        let index = fs::read_to_string(home.out().join("model_index.json")).unwrap();
        let index: serde_json::Value = serde_json::from_str(&index).unwrap();
        assert_eq!(index["text_encoder"], serde_json::json!([null, null]));
        assert!(home.out().join("unet").is_dir() && !home.out().join("text_encoder").exists(), "{trains}");
    }
}
