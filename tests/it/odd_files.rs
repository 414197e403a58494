//! Files that are not what they seem, through the program: refused at once, without a wait, without the memory that they
//! ask for.

use std::fs;
use std::process::Command;

use crate::bad_input::{Case, each_is_refused, edit, nothing, picture, spoilt};
use crate::harness::{Home, PLAIN};

/// A pipe that nobody writes to: whoever opens it waits.
fn pipe(home: &Home, name: &str) {
    assert!(Command::new("mkfifo").arg(home.path(name)).status().unwrap().success());
}

#[test]
fn pictures_and_models_of_absurd_sizes_are_refused() {
    each_is_refused(&[
        Case {
            prepare: |home| {
                picture(home, "images/rough/instance/b.JPG", "vast.jpg", |bytes| {
                    let frame = bytes.windows(2).position(|pair| pair == [0xFF, 0xC0]).unwrap();
                    bytes[frame + 5..frame + 9].fill(0xFF);
                });
            },
            sets: &[],
            told: &[&["HOME/photos/vast.jpg", "65535x65535 pixels", "36.0 GiB of memory", "2.0 GiB", "take it out"]],
        },
        Case {
            // A canvas of 65535 pixels a side, with a small picture on it.
            prepare: |home| {
                picture(home, "images/kinds/lossy.webp", "vast.webp", |bytes| {
                    let mut header = b"VP8X\x0a\0\0\0\0\0\0\0\xfe\xff\0\xfe\xff\0".to_vec();
                    header.extend(bytes.drain(12..));
                    bytes.extend(header);
                    let length = bytes.len() as u32 - 8;
                    bytes[4..8].copy_from_slice(&length.to_le_bytes());
                });
            },
            sets: &[],
            told: &[&["HOME/photos/vast.webp", "65535x65535 pixels", "24.0 GiB of memory", "take it out"]],
        },
        Case {
            prepare: |home| edit(home, "model/unet/config.json", |c| c["sample_size"] = 1_000_000_000_000u64.into()),
            sets: &[],
            told: &[&["unet/config.json", "sample_size = 1000000000000", "1 to 2048"]],
        },
    ]);
}

#[test]
fn what_can_be_read_only_once_is_refused_and_not_waited_for() {
    each_is_refused(&[
        Case {
            prepare: |home| pipe(home, "photos/00.txt"),
            sets: &["data.captions=true"],
            told: &[&["data.instance_dir", "HOME/photos/00.txt", "a pipe or a device", "into a file"]],
        },
        Case {
            prepare: |home| pipe(home, "photos/metadata.jsonl"),
            sets: &["data.captions=true"],
            told: &[&["data.instance_dir", "HOME/photos/metadata.jsonl", "a pipe or a device", "into a file"]],
        },
        Case {
            prepare: |home| {
                for name in ["scheduler/scheduler_config.json", "tokenizer/tokenizer_config.json"] {
                    fs::remove_file(home.path("model").join(name)).unwrap();
                    pipe(home, &format!("model/{name}"));
                }
                let weights = "model/unet/diffusion_pytorch_model.safetensors";
                fs::remove_file(home.path(weights)).unwrap();
                pipe(home, weights);
            },
            sets: &[],
            told: &[
                &["HOME/model/scheduler/scheduler_config.json", "a pipe or a device"],
                &["HOME/model/tokenizer/tokenizer_config.json", "a pipe or a device"],
                &["HOME/model/unet/diffusion_pytorch_model.safetensors", "a pipe or a device"],
            ],
        },
        Case {
            prepare: |home| {
                fs::create_dir(home.path("made")).unwrap();
                pipe(home, "made/manifest.json");
            },
            sets: &["checkpoint.resume=HOME/made"],
            told: &[&["checkpoint.resume", "HOME/made/manifest.json", "a pipe or a device"]],
        },
        Case {
            prepare: |home| fs::create_dir(home.path("photos/metadata.jsonl")).unwrap(),
            sets: &["data.captions=true"],
            told: &[&["data.instance_dir", "HOME/photos/metadata.jsonl", "a folder"]],
        },
        Case {
            prepare: nothing,
            sets: &["output.dir=\"a\\u0000b\"", "checkpoint.resume=\"a\\u0000b\""],
            told: &[&["output.dir = ", "NUL character", "take it out"], &["checkpoint.resume = ", "NUL character"]],
        },
    ]);
    let home = Home::new();
    pipe(&home, "train.toml");
    for words in [&["check"][..], &["plan"], &["--nproc", "2"]] {
        let mut command = home.program();
        command.args(words).arg(home.path("train.toml"));
        let problems = home.start(command).end().refused();
        assert!(problems.len() == 1 && problems[0].contains("a pipe or a device"), "{problems:?}");
    }
    pipe(&home, "prompts.txt");
    let mut command = home.program();
    command.arg("sample").arg(home.path("model")).arg("--prompt-file").arg(home.path("prompts.txt"));
    let problems = home.start(command).end().refused();
    assert!(problems.len() == 1 && problems[0].contains("prompts.txt") && problems[0].contains("into a file"));
}

#[test]
fn captions_that_are_not_there_are_not_spoken_of() {
    let (home, config) = spoilt(nothing);
    let job = |config: &str| home.job(config).set("data.captions=true").set("train.max_steps=1").run().done();
    job(&config).says("none of which has a caption: \"a photo of sks cat\"");
    fs::remove_dir_all(home.out()).unwrap();
    fs::write(home.path("photos/00.txt"), "a cat").unwrap();
    job(&config).says("with their captions, but 4 without: \"a photo of sks cat\"");
}

/// Numbers that fp32 has and fp16 has not are not saved as infinities, and what was there stays.
#[test]
fn a_type_that_cannot_hold_the_weights_keeps_the_old_pipeline() {
    let home = Home::new();
    home.job(PLAIN).set("train.max_steps=1").run().done();
    let unet = || fs::read(home.path("out/unet/diffusion_pytorch_model.safetensors")).unwrap();
    let before = unet();
    let sets = ["output.save_dtype=fp16", "output.overwrite=true", "train.max_steps=1", "optimizer.learning_rate=1e6"];
    home.job(PLAIN).sets(&sets).ranks(2).run().failed(&["writing the pipeline", "fp16", "\"fp32\" or \"bf16\""]);
    let names: Vec<_> = fs::read_dir(home.out()).unwrap().map(|entry| entry.unwrap().file_name()).collect();
    assert!(!names.iter().any(|name| name == ".writing-pipeline"), "{names:?}");
    assert!(unet() == before, "the old weights are gone");
}
