//! `dblaunch sample`: the peer's pictures from the same noise, the same bytes whoever shares the work, checkpoints as
//! good as pipelines, and requests that are wrong.

use std::fs;
use std::path::Path;
use std::process::Command;

use image::RgbImage;
use serde_json::Value;

use crate::harness::{EVERYTHING, Home, PLAIN, Ran, data, listing, tensors};

/// `dblaunch sample`; `HOME` and `DATA` stand for folders.
fn command(home: &Home, words: &[&str]) -> Command {
    let mut command = home.program();
    command.arg("sample").args(words.iter().map(|word| home.filled(word)));
    command
}

fn sample(home: &Home, words: &[&str]) -> Ran {
    home.start(command(home, words)).end()
}

fn picture(path: &Path) -> RgbImage {
    image::open(path).unwrap_or_else(|error| panic!("{}: {error}", path.display())).into_rgb8()
}

/// The text in a picture.
fn parameters(path: &Path) -> String {
    let reader = png::Decoder::new(std::io::BufReader::new(fs::File::open(path).unwrap())).read_info().unwrap();
    let texts = &reader.info().utf8_text;
    assert_eq!((texts.len(), texts[0].keyword.as_str()), (1, "parameters"));
    texts[0].get_text().unwrap()
}

/// Names and contents of a folder's files.
fn contents(dir: &Path) -> Vec<(String, Vec<u8>)> {
    let name = |path: &Path| path.file_name().unwrap().to_string_lossy().into_owned();
    listing(dir).iter().map(|path| (name(path), fs::read(path).unwrap())).collect()
}

/// The largest difference in 8-bit levels.
fn levels(got: &RgbImage, want: &RgbImage) -> u8 {
    assert_eq!(got.dimensions(), want.dimensions());
    got.as_raw().iter().zip(want.as_raw()).map(|(a, b)| a.abs_diff(*b)).max().unwrap()
}

/// Every folder of tests/data/sample is pictures that diffusers made of given noise.
#[test]
fn pictures_are_the_peers() {
    let home = Home::new();
    let mut cases = 0;
    for entry in fs::read_dir(data("sample")).unwrap() {
        let folder = entry.unwrap().path();
        let Ok(text) = fs::read_to_string(folder.join("case.json")) else { continue };
        let case: Value = serde_json::from_str(&text).unwrap();
        let name = folder.file_name().unwrap().to_str().unwrap();
        let (model, out) = (format!("DATA/models/{}", case["model"].as_str().unwrap()), format!("HOME/{name}"));
        let latents = format!("DATA/sample/{name}/latents.safetensors");
        let options = case["options"].as_array().unwrap().iter().map(|word| word.as_str().unwrap());
        let mut words = vec![model.as_str(), "--out", &out, "--latents", &latents, "--batch-size", "2"];
        words.extend(options);
        sample(&home, &words).done();
        let mut pictures = 0;
        for path in listing(&folder).iter().filter(|path| path.extension().is_some_and(|end| end == "png")) {
            let got = picture(&home.path(name).join(path.file_name().unwrap()));
            let apart = levels(&got, &picture(path));
            println!("{name} {}: {apart}", path.display());
            assert!(apart <= 2, "{name}: {} differs by {apart} levels", path.display());
            pictures += 1;
        }
        assert_eq!(contents(&home.path(name)).len(), pictures);
        cases += 1;
    }
    assert!(cases >= 9, "{cases} cases");
}

const TWO_PROMPTS: [&str; 12] = [
    "DATA/models/sd15",
    "--prompt",
    "a photo of sks cat",
    "--prompt",
    "a cup of coffee",
    "--negative-prompt",
    "blurry",
    "--num=3",
    "--steps=4",
    "--seed=11",
    "--grid",
    "--save-latents",
];

#[test]
fn the_bytes_do_not_depend_on_ranks_stage_or_batches() {
    let home = Home::new();
    let make = |name: &str, more: &[&str]| {
        let out = format!("HOME/{name}");
        let words = [&TWO_PROMPTS[..], &["--sampler", "euler-a", "--out", &out], more].concat();
        let ran = sample(&home, &words).done();
        ran.says("seed 11");
        contents(&home.path(name))
    };
    let alone = make("alone", &[]);
    let names: Vec<&str> = alone.iter().map(|(name, _)| name.as_str()).collect();
    let pictures = ["00000.png", "00001.png", "00002.png", "00003.png", "00004.png", "00005.png"];
    assert_eq!(names, [&pictures[..], &["grid.png", "latents.safetensors"]].concat());
    assert!(make("one-of-three", &["--stage=3"]) == alone);
    for (ranks, stage, batch) in [(2, 3, 1), (3, 3, 1), (3, 3, 2), (2, 0, 4), (4, 3, 2)] {
        let [nproc, stage, batch] =
            [("nproc", ranks), ("stage", stage), ("batch-size", batch)].map(|(n, v)| format!("--{n}={v}"));
        let name = format!("{nproc}{stage}{batch}");
        assert!(make(&name, &[&nproc, &stage, &batch]) == alone, "{name}");
    }
    let grid = picture(&home.path("alone/grid.png"));
    assert_eq!(grid.dimensions(), (3 * 64, 2 * 64));
    assert_eq!(grid.get_pixel(64, 64), picture(&home.path("alone/00004.png")).get_pixel(0, 0));
    let text = parameters(&home.path("alone/00004.png"));
    assert!(
        text.starts_with("a cup of coffee\nNegative prompt: blurry\nSteps: 4, Sampler: euler-a, CFG scale: 7.5, "),
        "{text}"
    );
    assert!(
        text.contains("Seed: 11, Picture: 4, Size: 64x64, Precision: fp32, Model: ") && text.contains("dblaunch"),
        "{text}"
    );
    assert_eq!(tensors(&home.path("alone/latents.safetensors"))["latents"].len(), 6 * 4 * 8 * 8);
}

/// Ranks that another launcher started: no bar, no checks beforehand, the same pictures.
#[test]
fn ranks_of_another_launcher_make_the_same() {
    let home = Home::new();
    let words = |out: &'static str| [&TWO_PROMPTS[..], &["--out", out]].concat();
    sample(&home, &words("HOME/own")).done();
    let ranks: Vec<_> = (0..2)
        .map(|rank| {
            let mut command = command(&home, &words("HOME/theirs"));
            let number = rank.to_string();
            command.envs([
                ("RANK", number.as_str()),
                ("LOCAL_RANK", &number),
                ("WORLD_SIZE", "2"),
                ("LOCAL_WORLD_SIZE", "2"),
            ]);
            command.envs([
                ("MASTER_ADDR", "127.0.0.1"),
                ("MASTER_PORT", "29400"),
                ("TORCHELASTIC_RUN_ID", "sample-test"),
            ]);
            home.start(command)
        })
        .collect();
    let told: String = ranks.into_iter().map(|rank| rank.end().done().stderr).collect();
    assert_eq!(told.matches("6 pictures in").count(), 1, "{told}");
    assert!(contents(&home.path("own")) == contents(&home.path("theirs")));
}

/// A checkpoint of two ranks, the pipeline at the end and the checkpoint of the last step on other numbers of ranks.
#[test]
fn a_checkpoint_is_as_good_as_a_pipeline() {
    for config in [PLAIN, EVERYTHING] {
        let home = Home::new();
        home.job(config).ranks(2).sets(&["checkpoint.every=2", "zero.stage=3", "train.max_steps=4"]).run().done();
        let make = |model: &str, name: &str, more: &[&str]| {
            let out = format!("HOME/{name}");
            let words = [model, "--prompt", "a photo of sks cat", "--num=2", "--steps=3", "--seed=1", "--out", &out];
            sample(&home, &[&words[..], more].concat()).done();
            [0, 1].map(|i| picture(&home.path(name).join(format!("{i:05}.png"))))
        };
        let pipeline = make("HOME/out", "a", &[]);
        assert!(make("HOME/out/checkpoint-4", "b", &[]) == pipeline);
        assert!(make("HOME/out/checkpoint-4", "c", &["--nproc=3", "--stage=3"]) == pipeline);
        let earlier = make("HOME/out/checkpoint-2", "d", &[]);
        assert!(earlier != pipeline && earlier != make("DATA/models/sd15", "e", &[]));
    }
}

#[test]
fn bf16_and_fp16_and_tiles_come_near() {
    let home = Home::new();
    let make = |name: &str, more: &[&str]| {
        let out = format!("HOME/{name}");
        let words =
            ["DATA/models/sd15", "--prompt", "a cup of coffee", "--steps=3", "--seed=1", "--guidance=2", "--out", &out];
        sample(&home, &[&words[..], more].concat()).done();
        picture(&home.path(name).join("00000.png"))
    };
    let full = make("full", &[]);
    for (name, most) in [("bf16", 40), ("fp16", 8)] {
        let apart = levels(&make(name, &["--dtype", name]), &full);
        assert!((1..=most).contains(&apart), "{name}: {apart}");
        assert!(parameters(&home.path(name).join("00000.png")).contains(&format!("Precision: {name}")));
    }
    assert!(make("same", &["--vae-tiling"]) == full, "a tile is no smaller than this picture");
    let large = ["--height=72", "--width=120"];
    let apart = levels(&make("tiles", &[&large[..], &["--vae-tiling=on"]].concat()), &make("whole", &large));
    assert!((1..=150).contains(&apart), "tiles: {apart}");
}

#[test]
fn an_interrupt_leaves_whole_pictures() {
    let home = Home::new();
    let words =
        ["DATA/models/sd15", "--prompt", "a cup of coffee", "--num=500", "--steps=20", "--nproc=2", "--out=HOME/s"];
    let mut running = home.start(command(&home, &words));
    running.wait_for_words("picture 0/500");
    while !home.path("s/00003.png").exists() {
        assert!(running.child.try_wait().unwrap().is_none(), "it ended by itself");
        std::thread::sleep(std::time::Duration::from_millis(5));
    }
    assert!(Command::new("kill").args(["-INT", &running.child.id().to_string()]).status().unwrap().success());
    assert_eq!(running.end().status, Some(130));
    let left = contents(&home.path("s"));
    assert!((2..500).contains(&left.len()), "{}", left.len());
    for (name, _) in left {
        assert_eq!(picture(&home.path("s").join(&name)).dimensions(), (64, 64), "{name}");
    }
}

#[test]
fn prompts_come_from_a_file_too_and_long_ones_are_cut_only_when_told() {
    let home = Home::new();
    fs::write(home.path("prompts.txt"), "\u{feff}a cup of coffee\r\n\n  a photo of sks cat\n").unwrap();
    let words = ["DATA/models/sd15", "--steps=2", "--guidance=1", "--out=HOME/s"];
    sample(&home, &[&words[..], &["--prompt", "a dog", "--prompt-file=HOME/prompts.txt"]].concat()).done();
    let first = |i: usize| parameters(&home.path(&format!("s/{i:05}.png"))).lines().next().unwrap().to_string();
    assert_eq!([0, 1, 2].map(first), ["a dog", "a cup of coffee", "a photo of sks cat"]);
    let long = format!("{}the very end", "a ".repeat(75));
    let words = ["DATA/models/sd15", "--steps=2", "--out=HOME/t", "--prompt", &long];
    let problems = sample(&home, &words).refused();
    assert!(
        problems.len() == 1
            && problems[0].contains("cut off: \"the very end\"")
            && problems[0].contains("--cut-prompts"),
        "{problems:?}"
    );
    assert!(!home.path("t").exists());
    sample(&home, &[&words[..], &["--cut-prompts"]].concat()).done().says("cut off: \"the very end\"");
}

/// What is wrong, and pieces of what must be told.
type Case = (fn(&Home), &'static [&'static str], &'static [&'static str]);

fn nothing(_: &Home) {}

#[test]
fn wrong_requests_are_refused_and_write_nothing() {
    let cases: &[Case] = &[
        (nothing, &["--sampler=eulr"], &["--sampler", "\"eulr\"", "Did you mean \"euler\"", "unipc"]),
        (nothing, &["--height=60"], &["--height 60", "multiple of 8", "56"]),
        (nothing, &["--width=0"], &["--width 0", "multiple of 8"]),
        (nothing, &["--guidance=nan"], &["--guidance"]),
        (nothing, &["--guidance-rescale=1.5"], &["--guidance-rescale 1.5", "0.7"]),
        (nothing, &["--lora=a.safetensors:0.5"], &["--lora", "not there yet"]),
        (nothing, &["--device=cuda"], &["--device cuda", "cpu"]),
        (nothing, &["--steps=2000"], &["2000", "scheduler_config.json"]),
        (nothing, &["--negative-prompt=a", "--negative-prompt=b"], &["2 negative prompts for"]),
        (nothing, &["--num=100001"], &["100001", "at most 100000"]),
        (nothing, &["--prompt-file=HOME/none.txt"], &["--prompt-file", "none.txt", "one prompt a line"]),
        (nothing, &["--latents=HOME/none"], &["--latents", "no such file"]),
        (nothing, &["--latents=HOME/model/model_index.json"], &["--latents", "no safetensors file"]),
        (
            nothing,
            &["--latents=DATA/sample/pndm/latents.safetensors"],
            &["latents has shape [2, 4, 8, 8]", "[1, 4, 8, 8] is wanted"],
        ),
        (
            nothing,
            &["--latents=DATA/sample/euler/latents.safetensors", "--sampler=euler-a", "--steps=3"],
            &["3 steps of this sampler take noise", "noise.0 … noise.2"],
        ),
        (nothing, &["--out=HOME/model/model_index.json"], &["--out", "not a folder"]),
        (|home| drop(fs::write(home.path("00003.png"), "x")), &["--out=HOME"], &["--out", "00003.png", "--overwrite"]),
        (|home| fs::remove_dir_all(home.path("model/unet")).unwrap(), &[], &["model/unet"]),
        (
            |home| fs::remove_file(home.path("model/vae/config.json")).unwrap(),
            &[],
            &["vae/config.json", "no such file"],
        ),
        (|home| fs::remove_dir_all(home.path("model/tokenizer")).unwrap(), &[], &["tokenizer", "merges.txt"]),
        (|home| fs::remove_dir_all(home.path("model/scheduler")).unwrap(), &[], &["scheduler_config.json"]),
        (|home| fs::remove_file(home.path("model/model_index.json")).unwrap(), &[], &["no model_index.json"]),
        (
            |home| {
                let file = home.path("model/vae/diffusion_pytorch_model.safetensors");
                let bytes = fs::read(&file).unwrap();
                fs::write(file, &bytes[..bytes.len() / 2]).unwrap();
            },
            &[],
            &["vae/diffusion_pytorch_model.safetensors", "truncated"],
        ),
    ];
    for (prepare, words, told) in cases {
        let home = Home::new();
        home.copy("models/sd15", "model");
        prepare(&home);
        let before = listing(&home.path(""));
        for nproc in ["--nproc=1", "--nproc=2"] {
            let words = [&["HOME/model", "--prompt=a cat", nproc], *words].concat();
            let out: &[&str] = if words.iter().any(|word| word.starts_with("--out")) { &[] } else { &["--out=HOME/s"] };
            let problems = sample(&home, &[&words[..], out].concat()).refused().join("\n");
            assert!(told.iter().all(|piece| problems.contains(piece)), "{problems}\nlacks one of {told:?}");
        }
        assert_eq!(listing(&home.path("")), before, "{words:?}: something was written");
    }
}

#[test]
fn a_folder_that_cannot_be_written_is_refused() {
    use std::os::unix::fs::PermissionsExt;
    let home = Home::new();
    let locked = home.path("locked");
    fs::create_dir(&locked).unwrap();
    fs::set_permissions(&locked, fs::Permissions::from_mode(0o555)).unwrap();
    // Whom no permissions hold back can write everywhere.
    if fs::write(locked.join("probe"), "").is_err() {
        let told = sample(&home, &["DATA/models/sd15", "--prompt=a", "--out=HOME/locked/out"]).refused().join("\n");
        assert!(told.contains("--out") && told.contains("nothing can be written in"), "{told}");
    }
    fs::set_permissions(&locked, fs::Permissions::from_mode(0o755)).unwrap();
}

#[test]
fn what_is_no_model_is_refused_with_a_hint() {
    let home = Home::new();
    let refused = |model: &str| sample(&home, &[model, "--prompt=a", "--out=HOME/s"]).refused().join("\n");
    assert!(refused("HOME/none").contains("no such folder"));
    assert!(refused("nobody/has-this").contains("HF_HUB_OFFLINE"));
    home.job(PLAIN).sets(&["checkpoint.every=1", "train.max_steps=1"]).run().done();
    fs::remove_file(home.path("out/model_index.json")).unwrap();
    assert!(refused("HOME/out").contains("checkpoint-1"));
    let shard = home.path("out/checkpoint-1/rank-00000-of-00001.safetensors");
    let bytes = fs::read(&shard).unwrap();
    fs::write(&shard, &bytes[..bytes.len() - 1]).unwrap();
    assert!(refused("HOME/out/checkpoint-1").contains("damaged"));
    fs::remove_file(home.path("out/config.toml")).unwrap();
    assert!(refused("HOME/out/checkpoint-1").contains("config.toml"));
    assert!(!home.path("s").exists());
}
