//! Wrong requests, through the program: exit status 2, a paragraph for each problem that names the place, the value and
//! the remedy, the same from one rank as from several, and nothing written.

use std::fs;
use std::path::Path;

use serde_json::{Value, json};

use crate::harness::{Home, PLAIN, copy_folder, data, listing, rows};

const UNET: &str = "model/unet/diffusion_pytorch_model.safetensors";

/// One wrong request.
pub struct Case {
    /// What is wrong in the files of its folder.
    pub prepare: fn(&Home),
    /// What is wrong with the configuration: overrides.
    pub sets: &'static [&'static str],
    /// For each problem that must be told, pieces of its paragraph.
    pub told: &'static [&'static [&'static str]],
}

pub fn nothing(_: &Home) {}

/// A folder with a model and photographs of its own, to be spoilt, and the configuration that uses them.
pub fn spoilt(prepare: fn(&Home)) -> (Home, String) {
    let home = Home::new();
    home.copy("models/sd15", "model");
    home.copy("images/square/instance", "photos");
    home.copy("images/square/class", "class");
    prepare(&home);
    let config = PLAIN.replace("DATA/models/sd15", "HOME/model").replace("DATA/images/square/instance", "HOME/photos");
    (home, config)
}

/// Without how much room a disk has, which changes while tests run.
fn timeless(said: &str) -> String {
    match (said.find(", and "), said.find(" are free")) {
        (Some(from), Some(to)) if from < to => format!("{}{}", &said[..from], &said[to..]),
        _ => said.to_string(),
    }
}

#[track_caller]
pub fn each_is_refused(cases: &[Case]) {
    for case in cases {
        let (home, config) = spoilt(case.prepare);
        let before = listing(&home.path(""));
        let [one, two] = [1, 2].map(|ranks| home.job(&config).sets(case.sets).ranks(ranks).run());
        assert_eq!(timeless(&one.stderr), timeless(&two.stderr), "two ranks say it as one does");
        two.refused();
        let problems = one.refused();
        assert_eq!(problems.len(), case.told.len(), "{problems:#?}");
        for pieces in case.told {
            let told = problems.iter().any(|problem| pieces.iter().all(|piece| problem.contains(&home.filled(piece))));
            assert!(told, "{problems:#?}\nlacks {pieces:?}");
        }
        assert_eq!(listing(&home.path("")), before, "something was written");
    }
}

/// A file of the folder, cut to a part of it.
fn cut(home: &Home, name: &str, keep: impl Fn(usize) -> usize) {
    let bytes = fs::read(home.path(name)).unwrap();
    fs::write(home.path(name), &bytes[..keep(bytes.len())]).unwrap();
}

/// A picture of tests/data among the photographs, changed on the way.
pub fn picture(home: &Home, from: &str, name: &str, change: impl Fn(&mut Vec<u8>)) {
    let mut bytes = fs::read(data(from)).unwrap();
    change(&mut bytes);
    fs::write(home.path("photos").join(name), bytes).unwrap();
}

fn halved(bytes: &mut Vec<u8>) {
    bytes.truncate(bytes.len() / 2);
}

/// A JSON file, changed.
pub fn edit(home: &Home, name: &str, change: impl Fn(&mut Value)) {
    let mut value = serde_json::from_slice(&fs::read(home.path(name)).unwrap()).unwrap();
    change(&mut value);
    fs::write(home.path(name), value.to_string()).unwrap();
}

/// The header of the UNet's weight file, changed; the tensors' bytes stay.
fn reheader(home: &Home, change: impl Fn(&mut Value, &mut Vec<u8>)) {
    let path = home.path(UNET);
    let bytes = fs::read(&path).unwrap();
    let length = u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
    let mut header = serde_json::from_slice(&bytes[8..8 + length]).unwrap();
    let mut tensors = bytes[8 + length..].to_vec();
    change(&mut header, &mut tensors);
    let header = header.to_string();
    fs::write(path, [&(header.len() as u64).to_le_bytes(), header.as_bytes(), &tensors].concat()).unwrap();
}

#[test]
fn pictures_that_cannot_be_used_are_named() {
    each_is_refused(&[
        Case {
            prepare: |home| picture(home, "images/kinds/rgba.png", "cut.png", halved),
            sets: &[],
            told: &[&["data.instance_dir", "HOME/photos/cut.png", "truncated", "take it out"]],
        },
        Case {
            prepare: |home| picture(home, "images/kinds/grey.jpg", "cut.jpg", halved),
            sets: &[],
            told: &[&["HOME/photos/cut.jpg", "truncated", "take it out"]],
        },
        Case {
            // Decoders fill in what is missing.
            prepare: |home| picture(home, "images/kinds/progressive.jpg", "cut.jpg", |b| b.truncate(b.len() - 2)),
            sets: &[],
            told: &[&["HOME/photos/cut.jpg", "truncated"]],
        },
        Case {
            prepare: |home| picture(home, "images/kinds/lossy.webp", "cut.webp", halved),
            sets: &[],
            told: &[&["HOME/photos/cut.webp", "WebP", "truncated"]],
        },
        Case {
            prepare: |home| {
                picture(home, "images/square/instance/00.png", "damaged.png", |b| {
                    let middle = b.len() / 2;
                    b[middle..middle + 64].fill(0x55);
                });
            },
            sets: &[],
            told: &[&["HOME/photos/damaged.png", "damaged", "take it out"]],
        },
        Case {
            prepare: |home| fs::write(home.path("photos/notes.png"), "buy milk").unwrap(),
            sets: &[],
            told: &[&["HOME/photos/notes.png", "not those of an image", "take it out"]],
        },
        Case {
            // As a telephone sends it.
            prepare: |home| fs::write(home.path("photos/me.jpg"), b"\0\0\0\x18ftypheic\0\0\0\0mif1heic").unwrap(),
            sets: &[],
            told: &[&["HOME/photos/me.jpg", "HEIC", "Replace the file by a whole PNG, JPEG or WebP"]],
        },
        Case {
            // All of them at once.
            prepare: |home| {
                fs::write(home.path("photos/empty.jpg"), "").unwrap();
                fs::write(home.path("photos/01.png"), "GIF89a").unwrap();
                fs::write(home.path("class/00.png"), "x").unwrap();
            },
            sets: &["prior.class_dir=HOME/class", "prior.class_prompt=coffee", "prior.num_class_images=6"],
            told: &[
                &["data.instance_dir", "HOME/photos/empty.jpg", "empty"],
                &["data.instance_dir", "HOME/photos/01.png"],
                &["prior.class_dir", "HOME/class/00.png"],
            ],
        },
        Case {
            prepare: |home| {
                fs::remove_dir_all(home.path("photos")).unwrap();
                fs::create_dir_all(home.path("photos/more")).unwrap();
            },
            sets: &[],
            told: &[&["data.instance_dir", "no pictures", "put some there"]],
        },
        Case {
            prepare: nothing,
            sets: &["data.instance_dir=HOME/nowhere"],
            told: &[&["--set: data.instance_dir", "HOME/nowhere", "no such folder"]],
        },
        Case {
            prepare: |home| fs::write(home.path("file"), "x").unwrap(),
            sets: &["prior.class_dir=HOME/file", "prior.class_prompt=coffee"],
            told: &[&["prior.class_dir", "HOME/file", "not a folder"]],
        },
    ]);
}

#[test]
fn weight_files_that_do_not_fit_are_named() {
    each_is_refused(&[
        Case {
            prepare: |home| cut(home, UNET, |length| length - 1000),
            sets: &[],
            told: &[&["model.path", "HOME/model/unet/diffusion_pytorch_model.safetensors", "truncated", "download"]],
        },
        Case {
            prepare: |home| cut(home, "model/vae/diffusion_pytorch_model.safetensors", |_| 0),
            sets: &[],
            told: &[&["HOME/model/vae/diffusion_pytorch_model.safetensors", "truncated: 0 bytes"]],
        },
        Case {
            prepare: |home| {
                fs::write(home.path("model/text_encoder/model.safetensors"), "\u{7f}ELF and so on").unwrap()
            },
            sets: &[],
            told: &[&["HOME/model/text_encoder/model.safetensors", "not a safetensors file", "download"]],
        },
        Case {
            prepare: |home| reheader(home, |header, _| header["conv_in.bias"]["shape"] = json!([2, 8])),
            sets: &[],
            told: &[&["diffusion_pytorch_model.safetensors", "conv_in.bias", "[2, 8]", "[16]", "config.json"]],
        },
        Case {
            prepare: |home| {
                reheader(home, |header, _| {
                    let header = header.as_object_mut().unwrap();
                    let bias = header.remove("conv_in.bias").unwrap();
                    header.insert("conv_in.sabi".into(), bias);
                });
            },
            sets: &[],
            told: &[&["unet.conv_in.bias", "missing"], &["conv_in.sabi", "not part of the network"]],
        },
        Case {
            prepare: |home| {
                reheader(home, |header, tensors| {
                    let begin = tensors.len();
                    tensors.extend([0; 8]);
                    header["lora.up"] = json!({"dtype": "F32", "shape": [2], "data_offsets": [begin, begin + 8]});
                });
            },
            sets: &[],
            told: &[&["diffusion_pytorch_model.safetensors", "lora.up", "not part of the network"]],
        },
        Case {
            prepare: |home| fs::rename(home.path(UNET), home.path(UNET).with_extension("bin")).unwrap(),
            sets: &[],
            told: &[&[
                "HOME/model/unet",
                "diffusion_pytorch_model.bin",
                "pickle",
                "UNet2DConditionModel",
                "save_pretrained",
            ]],
        },
    ]);
}

#[test]
fn models_that_cannot_be_trained_are_named() {
    each_is_refused(&[
        Case {
            prepare: nothing,
            sets: &["model.path=HOME/nowhere"],
            told: &[&["model.path = \"HOME/nowhere\"", "no such folder"]],
        },
        Case {
            prepare: nothing,
            sets: &["model.path=HOME/model/model_index.json"],
            told: &[&["model.path", "this is a file", "diffusers"]],
        },
        Case {
            prepare: nothing,
            sets: &["model.path=somebody/some-model"],
            told: &[&["model.path = \"somebody/some-model\"", "could not be fetched", "model.path"]],
        },
        Case {
            prepare: |home| {
                edit(home, "model/scheduler/scheduler_config.json", |c| c["prediction_type"] = json!("sample"))
            },
            sets: &[],
            told: &[&["scheduler_config.json", "prediction_type = \"sample\"", "v_prediction"]],
        },
        Case {
            prepare: |home| fs::write(home.path("model/scheduler/scheduler_config.json"), "[]").unwrap(),
            sets: &[],
            told: &[&["scheduler_config.json", "not a JSON object"]],
        },
        Case {
            prepare: |home| fs::write(home.path("model/unet/config.json"), "{").unwrap(),
            sets: &[],
            told: &[&["HOME/model/unet/config.json", "JSON", "Restore"]],
        },
        Case {
            // Nothing is built of what cannot be.
            prepare: |home| {
                edit(home, "model/unet/config.json", |c| c["transformer_layers_per_block"] = json!(1u64 << 62));
                edit(home, "model/text_encoder/config.json", |c| c["num_hidden_layers"] = json!(1u64 << 62));
                edit(home, "model/vae/config.json", |c| c["layers_per_block"] = json!(1u64 << 62));
            },
            sets: &[],
            told: &[
                &["unet/config.json", "transformer_layers_per_block = 4611686018427387904", "1 to 1000"],
                &["text_encoder/config.json", "num_hidden_layers", "1 to 1000"],
                &["vae/config.json", "layers_per_block", "1 to 1000"],
            ],
        },
        Case {
            prepare: nothing,
            sets: &["data.tokenizer_max_length=200"],
            told: &[&["HOME/model/tokenizer", "200", "tokenizer_max_length = 77"]],
        },
    ]);
}

#[test]
fn wrong_values_are_told_with_their_key() {
    each_is_refused(&[
        Case { prepare: nothing, sets: &["nonsense"], told: &[&["--set nonsense", "section.key=value"]] },
        Case { prepare: nothing, sets: &["seed=3"], told: &[&["--set seed=3", "names no section"]] },
        Case { prepare: nothing, sets: &["=", "train.="], told: &[&["--set ="], &["train."]] },
        Case { prepare: nothing, sets: &["trian.seed=3"], told: &[&["[trian]", "did you mean [train]"]] },
        Case {
            prepare: nothing,
            sets: &["train.bach_size=3"],
            told: &[&["train.bach_size", "did you mean batch_size"]],
        },
        Case {
            prepare: nothing,
            sets: &["data.resolution=100"],
            told: &[&["data.resolution = 100", "multiple of 8", "96"]],
        },
        Case { prepare: nothing, sets: &["train.seed=x"], told: &[&["train.seed = \"x\"", "whole number is wanted"]] },
        Case {
            // Everything that is wrong is told at once.
            prepare: |home| fs::write(home.path("photos/z.png"), "").unwrap(),
            sets: &[
                "train.batch_size=0",
                "optimizer.learning_rate=-1",
                "train.mixed_precision=bf61",
                "model.path=HOME/nowhere",
                "checkpoint.resume=checkpoint-7",
            ],
            told: &[
                &["train.batch_size = 0", "at least 1"],
                &["optimizer.learning_rate = -1", "at least 0"],
                &["train.mixed_precision = \"bf61\"", "did you mean \"bf16\""],
                &["model.path = \"HOME/nowhere\""],
                &["HOME/photos/z.png", "empty"],
                &["checkpoint.resume = \"checkpoint-7\"", "HOME/out/checkpoint-7", "\"latest\""],
            ],
        },
    ]);
}

#[test]
fn places_where_nothing_can_be_written_are_told() {
    each_is_refused(&[
        Case {
            prepare: |home| fs::write(home.path("out"), "a file").unwrap(),
            sets: &[],
            told: &[&["output.dir = \"HOME/out\"", "is not a folder", "name a folder"]],
        },
        Case {
            prepare: |home| fs::write(home.path("file"), "").unwrap(),
            sets: &["output.dir=HOME/file/deep/out"],
            told: &[&["output.dir", "HOME/file is not a folder"]],
        },
        Case {
            prepare: |home| {
                fs::create_dir_all(home.path("out/checkpoint-3")).unwrap();
                fs::write(home.path("out/metrics.jsonl"), "{}\n").unwrap();
            },
            sets: &[],
            told: &[&["output.dir", "another run (checkpoint-3, metrics.jsonl)", "overwrite = true"]],
        },
        Case {
            // Checkpoints that no disk holds.
            prepare: nothing,
            sets: &["checkpoint.every=1", "train.max_steps=9007199254740992"],
            told: &[&["output.dir", "9007199254740992 checkpoints", "are free", "keep fewer checkpoints"]],
        },
        Case {
            prepare: nothing,
            sets: &["output.dir=HOME/model"],
            told: &[&["output.dir", "also model.path"], &["output.dir", "another run (model_index.json"]],
        },
    ]);
    // Whom no permissions hold back can write everywhere.
    let (home, config) = spoilt(nothing);
    fs::create_dir(home.path("locked")).unwrap();
    set_mode(&home.path("locked"), 0o555);
    if fs::write(home.path("locked/probe"), "").is_err() {
        let problems = home.job(&config).set("output.dir=HOME/locked/out").run().refused();
        assert!(
            problems[0].contains("nothing can be written in") && problems[0].contains("name another"),
            "{problems:?}"
        );
    }
    set_mode(&home.path("locked"), 0o755);
}

fn set_mode(path: &Path, mode: u32) {
    use std::os::unix::fs::PermissionsExt;
    fs::set_permissions(path, fs::Permissions::from_mode(mode)).unwrap();
}

#[test]
fn more_ranks_than_images_are_refused() {
    let (home, config) = spoilt(nothing);
    let problems = home.job(&config).ranks(6).run().refused();
    assert_eq!(problems.len(), 1, "{problems:#?}");
    assert!(problems[0].contains("5 items") && problems[0].contains("at most 5 ranks"), "{problems:#?}");
    assert!(!home.out().exists());
}

#[test]
fn records_of_other_runs_are_refused() {
    let record = |name: &str| format!("replay.draws=DATA/parity/{name}/draws.safetensors");
    let refused = |sets: &[&str], pieces: &[&str]| {
        let (home, config) = spoilt(|home| {
            let bytes = fs::read(data("parity/sd15_full/draws.safetensors")).unwrap();
            fs::write(home.path("cut.safetensors"), &bytes[..bytes.len() / 2]).unwrap();
        });
        let problems = home.job(&config).sets(sets).run().refused();
        let told = problems.iter().any(|problem| pieces.iter().all(|piece| problem.contains(piece)));
        assert!(problems.len() == 1 && told, "{problems:#?}\nlacks {pieces:?}");
        assert!(!home.out().exists());
    };
    let full = record("sd15_full");
    refused(&[&record("sd15_prior_te")], &["replay.draws", "000000.noise", "without prior preservation"]);
    refused(&[&full, "data.resolution=72"], &["000000.noise", "[2, 4, 9, 9]"]);
    refused(&[&full, "train.offset_noise=0.1"], &["000000.offset_noise", "train.offset_noise"]);
    refused(&[&full, "train.max_steps=60"], &["6 micro-batches", "6 optimizer steps", "max_steps = 6"]);
    refused(&["replay.draws=HOME/cut.safetensors"], &["cut.safetensors", "truncated", "Set replay.draws"]);
    refused(&["replay.draws=HOME/nothing"], &["replay.draws", "no such file"]);
}

#[test]
fn checkpoints_that_cannot_be_resumed_are_refused() {
    let home = Home::new();
    home.job(PLAIN).sets(&["checkpoint.every=2", "train.max_steps=2"]).ranks(2).run().done();
    let shard = "rank-00001-of-00002.safetensors";
    let refused = |sets: &[&str], change: &dyn Fn(&Path), pieces: &[&str]| {
        let copy = home.path("copy");
        copy_folder(&home.path("out/checkpoint-2"), &copy);
        change(&copy);
        let before = listing(&home.path(""));
        let sets = [&["output.dir=HOME/new", "checkpoint.resume=HOME/copy"][..], sets].concat();
        let problems = home.job(PLAIN).sets(&sets).run().refused();
        let told = problems.iter().any(|problem| pieces.iter().all(|piece| problem.contains(piece)));
        assert!(problems.len() == 1 && told, "{problems:#?}\nlacks {pieces:?}");
        assert_eq!(listing(&home.path("")), before);
        fs::remove_dir_all(copy).unwrap();
    };
    let edit = |name: &'static str, change: fn(Vec<u8>) -> Vec<u8>| {
        move |dir: &Path| fs::write(dir.join(name), change(fs::read(dir.join(name)).unwrap())).unwrap()
    };
    let same = |_: &Path| {};
    let another = ["checkpoint.resume", "another model"];
    refused(&["model.path=DATA/models/sd21v"], &same, &another);
    refused(&["model.train_text_encoder=true"], &same, &another);
    let flip = |mut bytes: Vec<u8>| {
        let middle = bytes.len() / 2;
        bytes[middle] ^= 1;
        bytes
    };
    refused(&[], &edit(shard, flip), &["checkpoint.resume", shard, "damaged", "another checkpoint"]);
    refused(&[], &edit(shard, |bytes| bytes[..100].to_vec()), &[shard, "damaged"]);
    refused(&[], &edit(shard, |_| Vec::new()), &[shard, "damaged"]);
    refused(
        &[],
        &|dir: &Path| fs::remove_file(dir.join(shard)).unwrap(),
        &[shard, "no such file", "another checkpoint"],
    );
    let manifest = "manifest.json";
    refused(&[], &edit(manifest, |_| b"{".to_vec()), &[manifest, "not a checkpoint's manifest"]);
    let changed = |text: Vec<u8>| String::from_utf8(text).unwrap().replace("\"step\": 2", "\"step\": 0").into_bytes();
    refused(&[], &edit(manifest, changed), &[manifest, "damaged", "another checkpoint"]);
    refused(&[], &|dir: &Path| fs::remove_file(dir.join(manifest)).unwrap(), &[manifest, "no checkpoint"]);
    refused(&["checkpoint.resume=HOME/none"], &same, &["no checkpoint folder", "\"latest\""]);
}

#[test]
fn command_lines_that_make_no_sense_are_refused() {
    let home = Home::new();
    for words in
        [&["--nproc", "0"][..], &["--nprocs", "2"], &["--max-restarts", "-1"], &["--threads", "many"], &["twice.toml"]]
    {
        let ran = home.job(PLAIN).words(words).run();
        assert_eq!(ran.status, Some(2), "{words:?}: {}", ran.stderr);
        assert!(ran.stderr.contains("error: ") && !ran.stderr.contains("panicked"), "{}", ran.stderr);
    }
    let ran = home.job(PLAIN).run_after("set -- \"$(printf '\\377')\"");
    assert_eq!(ran.status, Some(2), "{}", ran.stderr);
    assert!(!ran.stderr.contains("panicked") && !home.out().exists(), "{}", ran.stderr);
}

/// What looks wrong and is not.
#[test]
fn odd_requests_are_served() {
    let (home, config) = spoilt(|home| picture(home, "images/sizes/1x1.png", "dot.png", |_| {}));
    home.job(&config).sets(&["data.instance_prompt=\"\"", "train.max_steps=1"]).run().done();
    assert_eq!(rows(&home.out()).len(), 2);
    let huge = ["train.batch_size=9007199254740992", "train.gradient_accumulation_steps=9007199254740992"];
    let job = home.job(&config).sets(&huge).sets(&["output.dir=HOME/huge", "train.max_steps=1"]);
    job.ranks(2).run().done().says("step 1/1");
}
