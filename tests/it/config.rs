//! What is said about wrong requests: all of it at once, each with its place and remedy, and nothing is written.

use std::fs;
use std::path::{Path, PathBuf};

use dblaunch::Refusal;
use dblaunch::config::{self, Report};

/// A folder with a model, photographs and a configuration that has nothing wrong.
struct Home {
    dir: tempfile::TempDir,
}

impl Home {
    fn new() -> Self {
        let home = Home { dir: tempfile::tempdir().unwrap() };
        copy(&data("models/sd15"), &home.path("model"));
        fs::copy(data("parity/sd15_offset_snr/draws.safetensors"), home.path("draws.safetensors")).unwrap();
        for (folder, count) in [("photos", 3), ("class", 4), ("runs", 0)] {
            fs::create_dir(home.path(folder)).unwrap();
            for number in 0..count {
                image::RgbImage::new(8, 8).save(home.path(folder).join(format!("{number}.png"))).unwrap();
            }
        }
        home
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn write(&self, name: &str, contents: impl AsRef<[u8]>) {
        let path = self.path(name);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, contents).unwrap();
    }

    /// The configuration, `HOME` being this folder. `sections` replace or add to the ones that are right.
    fn config(&self, sections: &str) -> PathBuf {
        let mut text = String::new();
        for (name, keys) in [
            ("model", "path = \"HOME/model\"\n"),
            ("data", "instance_dir = \"HOME/photos\"\ninstance_prompt = \"a sks cat\"\nresolution = 64\n"),
            ("output", "dir = \"HOME/runs/out\"\n"),
        ] {
            if !sections.contains(&format!("[{name}]")) {
                text += &format!("[{name}]\n{keys}");
            }
        }
        // First, so that lines are counted from the case's own first line.
        let text = format!("{sections}\n{text}").replace("HOME", &self.dir.path().display().to_string());
        let path = self.path("train.toml");
        fs::write(&path, text).unwrap();
        path
    }

    fn check(&self, sections: &str, overrides: &[&str], ranks: usize) -> Result<Report, Vec<String>> {
        let overrides: Vec<String> = overrides.iter().map(|item| item.to_string()).collect();
        let before = listing(self.dir.path());
        let config = self.config(sections);
        let result = config::check(&config, &overrides, ranks).map_err(|error| {
            error.downcast::<Refusal>().unwrap_or_else(|error| panic!("not a refusal: {error:#}")).problems
        });
        fs::remove_file(config).unwrap();
        assert_eq!(listing(self.dir.path()), before, "a check has written something");
        result
    }
}

/// A path in tests/data.
fn data(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data").join(name)
}

fn copy(from: &Path, to: &Path) {
    fs::create_dir(to).unwrap();
    for entry in fs::read_dir(from).unwrap() {
        let (path, to) = (entry.as_ref().unwrap().path(), to.join(entry.unwrap().file_name()));
        if path.is_dir() {
            copy(&path, &to);
        } else {
            fs::copy(&path, &to).unwrap();
        }
    }
}

fn listing(dir: &Path) -> Vec<PathBuf> {
    let mut found: Vec<PathBuf> = fs::read_dir(dir).unwrap().map(|entry| entry.unwrap().path()).collect();
    for folder in found.clone().iter().filter(|path| path.is_dir()) {
        found.extend(listing(folder));
    }
    found.sort();
    found
}

/// Each case: sections, then pieces of which every one stands in one and the same problem.
#[track_caller]
fn each_is_told(cases: &[(&str, &[&str])]) {
    let home = Home::new();
    for (sections, pieces) in cases {
        let problems = home.check(sections, &[], 1).expect_err(sections);
        let told = problems.iter().any(|problem| pieces.iter().all(|piece| problem.contains(piece)));
        assert!(told, "{sections}\n=> {problems:#?}\nlacks {pieces:?}");
        assert!(problems.iter().all(|problem| problem.contains("train.toml")), "{problems:#?}");
    }
}

#[test]
fn unknown_names_are_told_with_the_nearest_known_one() {
    each_is_told(&[
        ("[train]\nbach_size = 2", &["train.toml:2", "train.bach_size", "= 2", "batch_size"]),
        ("[trian]\nseed = 2", &["train.toml:1", "[trian]", "[train]"]),
        ("[train]\nlearning_rate = 1", &["train.toml:2", "learning_rate in [optimizer]"]),
        ("[train]\ntrain_batch_size = 1", &["did you mean batch_size in [train]"]),
        ("[optimizer]\nzzz = 1", &["optimizer.zzz", "[optimizer] has kind, learning_rate"]),
        ("max_train_steps = 3", &["train.toml:1", "outside any section", "max_steps under [train]"]),
        ("[[train]]\nseed = 1", &["train.toml:1", "write [train]"]),
        ("[train.more]\nseed = 1", &["train.toml:1", "train.more"]),
        ("[train]\nseed = \nx = y", &["train.toml:2", "not valid TOML"]),
        ("[train]\nseed = 1\nseed = 2", &["train.toml:3", "not valid TOML", "duplicate"]),
    ]);
}

#[test]
fn wrong_types_and_ranges_are_told_with_what_is_wanted() {
    each_is_told(&[
        ("[train]\nbatch_size = 0", &["train.toml:2", "train.batch_size = 0", "at least 1"]),
        ("[train]\nbatch_size = -3", &["train.batch_size = -3", "at least 1"]),
        ("[train]\nbatch_size = 1.5", &["a float", "a whole number is wanted"]),
        ("[train]\nbatch_size = 99999999999999999999999", &["beyond 64 bits"]),
        ("[train]\nepochs = \"3\"", &["a string", "a whole number is wanted"]),
        ("[train]\nmax_steps = 0", &["max_steps", "at least 1"]),
        (
            "[prior]\nclass_dir = \"HOME/class\"\nclass_prompt = \"x\"\nnum_class_images = 999999999999",
            &["num_class_images = 999999999999", "at most 1000000"],
        ),
        ("[validation]\nprompt = \"a\"\nnum_images = 1000000000", &["num_images = 1000000000", "at most 1000"]),
        (
            "[validation]\nprompt = [\"a\", \"b\", \"c\"]\nnum_images = 400",
            &["3 prompts have 1200 pictures", "1000 are the most"],
        ),
        ("[train]\ngradient_accumulation_steps = 0", &["at least 1"]),
        ("[train]\nseed = -1", &["train.seed = -1", "at least 0"]),
        ("[train]\nmax_grad_norm = -1", &["max_grad_norm", "at least 0"]),
        ("[train]\nsnr_gamma = 0", &["snr_gamma", "above 0"]),
        ("[train]\noffset_noise = -0.1", &["offset_noise = -0.1", "at least 0"]),
        ("[train]\nrecompute = \"yes\"", &["\"auto\", true or false"]),
        ("[train]\nmixed_precision = \"bf61\"", &["did you mean \"bf16\"", "\"no\", \"bf16\", \"fp16\""]),
        ("[optimizer]\nlearning_rate = -1e-5", &["learning_rate = -1e-5", "at least 0"]),
        ("[optimizer]\nlearning_rate = nan", &["learning_rate = nan", "finite"]),
        ("[optimizer]\nbeta1 = 1.0", &["beta1 = 1.0", "below 1"]),
        ("[optimizer]\nepsilon = 0", &["epsilon = 0", "above 0"]),
        ("[optimizer]\nepsilon = 1e-50", &["epsilon = 1e-50", "from 1e-45 to 3.4e38", "fp32"]),
        ("[optimizer]\nlearning_rate = 1e39", &["learning_rate = 1e39", "from 1e-45 to 3.4e38"]),
        ("[train]\nmax_grad_norm = 1e-50", &["max_grad_norm = 1e-50", "if it is not 0, from 1e-45"]),
        ("[train]\nmax_steps = 9223372036854775807", &["at least 1 and at most 9007199254740992"]),
        ("[lr_schedule]\nwarmup_steps = 9007199254740993", &["at least 0 and at most 9007199254740992"]),
        ("[optimizer]\nscale_lr = 1", &["true or false"]),
        ("[lr_schedule]\nkind = \"cosin\"", &["did you mean \"cosine\""]),
        ("[lr_schedule]\ncycles = 0", &["cycles = 0"]),
        ("[zero]\nstage = 4", &["zero.stage = 4", "0, 1, 2, 3 or \"auto\""]),
        ("[zero]\nstage = \"2\"", &["a string", "without quotes"]),
        ("[zero]\ntimeout_seconds = 0", &["timeout_seconds = 0", "above 0"]),
        ("[zero]\nreduce_dtype = \"f32\"", &["\"fp32\""]),
        ("[zero]\ncollectives = \"mpi\"", &["collectives = \"mpi\"", "\"host\""]),
        ("[zero]\noffload_gradients = \"nvme\"", &["offload_gradients = \"nvme\"", "wear", "\"host\""]),
        ("[zero]\noffload_optimizer = \"cpu\"", &["called \"host\""]),
        ("[zero]\ngrad_accum_dtype = \"fp16\"", &["fp16's range", "\"bf16\""]),
        ("[zero]\nzero_stage = 1", &["did you mean stage"]),
        ("[optimizer]\nkind = \"adam8bit\"", &["did you mean \"adamw8bit\""]),
        ("[optimizer]\nmaster_dtype = \"fp16\"", &["smallest steps", "\"bf16\""]),
        ("[memory]\nvram = \"eight\"", &["memory.vram = \"eight\"", "no size", "\"8GiB\""]),
        ("[memory]\nram = \"0GiB\"", &["memory.ram", "leave it out"]),
        ("[memory]\nram = 24", &["memory.ram = 24", "a string in quotes"]),
        ("[checkpoint]\nevery = 0", &["checkpoint.every = 0", "at least 1"]),
        ("[checkpoint]\nkeep = 0", &["checkpoint.keep = 0", "at least 1"]),
        (
            "[data]\nresolution = 100\ninstance_dir = \"HOME/photos\"\ninstance_prompt = \"x\"",
            &["train.toml:2", "data.resolution = 100", "multiple of 8", "96"],
        ),
        (
            "[data]\nresolution = 4\ninstance_dir = \"HOME/photos\"\ninstance_prompt = \"x\"",
            &["data.resolution = 4", "at least 8"],
        ),
        ("[model]\npath = 3", &["model.path = 3", "a string in quotes is wanted"]),
        ("[model]\npath = \"\"", &["model.path = \"\"", "empty"]),
        (
            "[replay]\ndraws = \"HOME/draws.safetensors\"\npixels = \"mine\"",
            &["replay.pixels = \"mine\"", "\"own\", \"recorded\""],
        ),
    ]);
}

#[test]
fn what_is_missing_is_told_with_what_to_write() {
    each_is_told(&[
        ("[model]\nvariant = \"\"", &["train.toml:1: model.path", "missing", "under [model]"]),
        ("[data]\nresolution = 64", &["data.instance_dir", "missing", "instance_dir = "]),
        ("[data]\nresolution = 64", &["data.instance_prompt", "missing"]),
        ("[output]\noverwrite = true", &["output.dir", "missing"]),
        ("[prior]\nclass_prompt = \"a cat\"", &["prior.class_dir", "missing", "without prior preservation"]),
        ("[prior]\nclass_dir = \"HOME/class\"", &["prior.class_prompt", "missing"]),
        ("[replay]\npixels = \"own\"", &["replay.draws", "missing"]),
    ]);
}

#[test]
fn what_is_not_there_yet_is_told_with_what_to_use() {
    each_is_told(&[
        ("[lora]\nrank = 4", &["train.toml:1: [lora]", "not there yet", "leave the section out"]),
        ("[validation]\nprompt = \"x\"\nimages = [\"y\"]", &["validation.images", "not there yet"]),
        ("[train]\nclass_labels_conditioning = \"timesteps\"", &["stage II", "leave this key out"]),
        (
            "[output]\ndir = \"HOME/o\"\ntrackers = [\"jsonl\", \"wandb\"]",
            &["train.toml:3", "trackers", "\"wandb\" is no tracker", "\"tensorboard\""],
        ),
        ("[output]\ndir = \"HOME/o\"\npush_to_hub = true", &["push_to_hub = true", "not there yet"]),
        ("[lr_schedule]\nkind = \"piecewise_constant\"", &["list of steps", "\"linear\""]),
    ]);
    if let Err(why) = dblaunch::device::gpu(0) {
        each_is_told(&[("[model]\npath = \"HOME/model\"\ndevice = \"cuda\"", &["device = \"cuda\"", &why, "\"cpu\""])]);
    }
}

#[test]
fn keys_that_do_not_go_together_are_told() {
    let data = "[data]\ninstance_dir = \"HOME/photos\"\ninstance_prompt = \"x\"\nresolution = 64\n";
    each_is_told(&[
        (
            &format!(
                "{data}precompute_text_embeddings = true\n[model]\npath = \"HOME/model\"\ntrain_text_encoder = true"
            ),
            &["train.toml:5", "precompute_text_embeddings = true", "train_text_encoder"],
        ),
        (
            "[lr_schedule]\nkind = \"polynomial\"\n[optimizer]\nlearning_rate = 1e-7",
            &["train.toml:2", "1e-7", "raise it"],
        ),
        ("[train]\nsnr_gamma_v = \"plus_one\"", &["snr_gamma_v", "set snr_gamma"]),
        (
            "[optimizer]\ntext_encoder_learning_rate = 1e-6",
            &["text_encoder_learning_rate", "train_text_encoder = true"],
        ),
        ("[optimizer]\ntext_encoder_weight_decay = 0", &["text_encoder_weight_decay", "train_text_encoder = true"]),
        ("[zero]\noffload_params = \"nvme\"", &["offload_params = \"nvme\"", "nvme_dir = ", "\"host\""]),
        ("[output]\ndir = \"HOME/model\"", &["also model.path"]),
        ("[output]\ndir = \"HOME/photos/../photos\"", &["also data.instance_dir"]),
    ]);
}

#[test]
fn folders_and_files_that_are_not_there_are_told() {
    let photos = |dir: &str| format!("[data]\ninstance_dir = \"{dir}\"\ninstance_prompt = \"x\"\nresolution = 64");
    each_is_told(&[
        ("[model]\npath = \"HOME/nowhere\"", &["train.toml:2: model.path = ", "nowhere", "no such folder"]),
        ("[model]\npath = \"HOME/draws.safetensors\"", &["this is a file"]),
        ("[model]\npath = \"HOME/photos\"", &["model_index.json", "no such file", "diffusers' layout"]),
        (&photos("HOME/nowhere"), &["train.toml:2: data.instance_dir", "no such folder"]),
        (&photos("HOME/draws.safetensors"), &["data.instance_dir", "not a folder"]),
        (&photos("HOME/runs"), &["data.instance_dir", "no pictures"]),
        ("[prior]\nclass_dir = \"HOME/photos/0.png\"\nclass_prompt = \"a cat\"", &["prior.class_dir", "not a folder"]),
        ("[replay]\ndraws = \"HOME/nothing\"", &["replay.draws", "no such file"]),
        (
            "[replay]\ndraws = \"HOME/draws.safetensors\"\nsave_gradients = \"HOME/photos\"",
            &["save_gradients", "this is a folder"],
        ),
        ("[checkpoint]\nresume = \"checkpoint-5\"", &["checkpoint.resume", "runs/out/checkpoint-5", "\"latest\""]),
        ("[output]\ndir = \"HOME/draws.safetensors/out\"", &["output.dir", "is not a folder"]),
        ("[zero]\nnvme_dir = \"HOME/nowhere\"", &["zero.nvme_dir", "no such folder", "fast drive"]),
        ("[zero]\nnvme_dir = \"HOME/draws.safetensors\"", &["zero.nvme_dir", "not a folder"]),
    ]);
}

#[test]
fn a_broken_model_is_told_part_by_part() {
    let told = |home: &Home, pieces: &[&str]| {
        let problems = home.check("", &[], 1).unwrap_err();
        let told = problems.iter().any(|problem| pieces.iter().all(|piece| problem.contains(piece)));
        assert!(told, "{problems:#?}\nlacks {pieces:?}");
    };
    let home = Home::new();
    let unet = home.path("model/unet/diffusion_pytorch_model.safetensors");
    let weights = fs::read(&unet).unwrap();
    fs::rename(&unet, unet.with_extension("bin")).unwrap();
    told(&home, &["model/unet", "diffusion_pytorch_model.bin", "pickle", "save_pretrained"]);
    fs::rename(unet.with_extension("bin"), unet.with_extension("fp16.safetensors")).unwrap();
    told(&home, &["model/unet", "fp16", "variant"]);

    // All at once: a file cut short, a configuration that the weights do not fit, parts that are not there.
    fs::write(&unet, &weights[..weights.len() - 4]).unwrap();
    let config = home.path("model/text_encoder/config.json");
    let text = fs::read_to_string(&config).unwrap();
    fs::write(&config, text.replace("\"vocab_size\": ", "\"vocab_size\": 1")).unwrap();
    fs::remove_file(home.path("model/vae/config.json")).unwrap();
    fs::remove_dir_all(home.path("model/tokenizer")).unwrap();
    told(&home, &["unet/diffusion_pytorch_model.safetensors", "truncated"]);
    told(&home, &["text_encoder/model.safetensors", "token_embedding", "has shape"]);
    told(&home, &["vae/config.json", "no such file"]);
    told(&home, &["model/tokenizer"]);

    let home = Home::new();
    let index = home.path("model/model_index.json");
    let text = fs::read_to_string(&index).unwrap();
    fs::write(&index, text.replace("CLIPTextModel", "T5EncoderModel")).unwrap();
    told(&home, &["text_encoder is T5EncoderModel", "CLIPTextModel"]);
    fs::write(&index, text.replace("StableDiffusionPipeline", "StableDiffusionXLPipeline")).unwrap();
    told(&home, &["_class_name is StableDiffusionXLPipeline", "only StableDiffusionPipeline"]);
    fs::write(&index, "{").unwrap();
    told(&home, &["model_index.json", "not JSON"]);
}

#[test]
fn pictures_that_are_none_are_told_by_name() {
    let home = Home::new();
    let whole = fs::read(home.path("photos/0.png")).unwrap();
    home.write("photos/1.png", &whole[..whole.len() / 2]);
    home.write("class/notes.png", "not a picture");
    home.write("photos/.hidden", "passed over");
    let sections = "[prior]\nclass_dir = \"HOME/class\"\nclass_prompt = \"a cat\"\nnum_class_images = 9";
    let problems = home.check(sections, &[], 1).unwrap_err();
    assert_eq!(problems.len(), 2, "{problems:#?}");
    for pieces in [["data.instance_dir", "photos/1.png"], ["prior.class_dir", "class/notes.png"]] {
        assert!(problems.iter().any(|problem| pieces.iter().all(|piece| problem.contains(piece))), "{problems:#?}");
    }
}

#[test]
fn a_folder_with_another_run_is_kept_unless_the_run_goes_on_or_replaces_it() {
    let home = Home::new();
    home.write("runs/out/metrics.jsonl", "");
    home.write("runs/out/checkpoint-5/manifest.json", "{}");
    let problems = home.check("", &[], 1).unwrap_err();
    assert_eq!(problems.len(), 1);
    assert!(
        problems[0].contains("checkpoint-5, metrics.jsonl") && problems[0].contains("overwrite = true"),
        "{problems:?}"
    );
    assert!(home.check("", &["output.overwrite=true"], 1).is_ok());
    for resume in ["checkpoint.resume=latest", "checkpoint.resume=checkpoint-5"] {
        let problems = home.check("", &[resume], 1).unwrap_err();
        assert!(problems.len() == 1 && problems[0].contains("checkpoint-5/manifest.json"), "{problems:?}");
    }
    fs::remove_dir_all(home.path("runs/out/checkpoint-5")).unwrap();
    assert!(home.check("", &["checkpoint.resume=latest"], 1).is_ok(), "a run without a checkpoint begins afresh");
}

#[test]
fn more_ranks_than_items_are_refused_but_a_record_may_be_replayed_by_any_number() {
    let home = Home::new();
    assert!(home.check("", &[], 3).is_ok());
    let problems = home.check("", &[], 4).unwrap_err();
    assert!(problems[0].contains("3 items") && problems[0].contains("at most 3 ranks"), "{problems:?}");
    let replay = "[replay]\ndraws = \"HOME/draws.safetensors\"\n[train]\nmax_steps = 2";
    assert!(home.check(replay, &[], 4).is_ok());
}

#[test]
fn all_problems_are_told_at_once_and_overrides_are_named() {
    let home = Home::new();
    let sections =
        "[train]\nbach_size = 2\nmax_steps = 0\n[optimizer]\nkind = \"adamw9bit\"\n[model]\npath = \"HOME/nowhere\"";
    let overrides = ["data.instance_dir=/nowhere/at/all", "zero.stage=7", "train.sed=1", "nonsense"];
    let problems = home.check(sections, &overrides, 1).unwrap_err();
    assert_eq!(problems.len(), 8, "{problems:#?}");
    for (begin, piece) in [
        ("--set: data.instance_dir = \"/nowhere/at/all\"", "no such folder"),
        ("--set: zero.stage = 7", "out of range"),
        ("--set: there is no key train.sed", "seed"),
        ("--set nonsense", "section.key=value"),
    ] {
        assert!(problems.iter().any(|problem| problem.starts_with(begin) && problem.contains(piece)), "{problems:#?}");
    }
}

#[test]
fn a_configuration_that_cannot_be_read_is_told() {
    let home = Home::new();
    home.write("latin.toml", [b'#', 0xe4]);
    for (name, why) in [("none.toml", "no such file"), ("photos", "folder"), ("latin.toml", "UTF-8")] {
        let error = config::check(&home.path(name), &[], 1).unwrap_err();
        let refusal = error.downcast_ref::<Refusal>().unwrap();
        assert!(refusal.problems[0].contains(why), "{refusal}");
    }
}

#[test]
fn a_request_with_nothing_wrong_is_summed_up() {
    let home = Home::new();
    let sections = "[prior]\nclass_dir = \"HOME/class\"\nclass_prompt = \"a cat\"\nnum_class_images = 4\n\
                    [train]\nbatch_size = 1\ngradient_accumulation_steps = 2\nepochs = 5\n[checkpoint]\nevery = 2\nkeep = 2\n\
                    [lr_schedule]\nkind = \"linear\"\nwarmup_steps = 50\n\
                    [zero]\nnvme_dir = \"HOME/nowhere\"\noffload_params = \"none\"\noffload_optimizer = \"host\"\noffload_gradients = \"none\"";
    let report = home.check(sections, &["optimizer.learning_rate=1e-4"], 2).unwrap();
    let steps = report.facts.steps.unwrap();
    assert_eq!((steps.items, steps.micro_batches_per_epoch, steps.per_epoch, steps.total), (4, 2, 1, 5));
    // Three fp32 words a parameter; two regular checkpoints, and a pipeline folder with copies of the frozen parts.
    let trained = report.facts.model.unet_parameters;
    assert_eq!(report.facts.checkpoint_bytes, 12 * trained);
    let size = |name: &str| fs::metadata(home.path(name)).unwrap().len();
    let frozen = size("model/vae/diffusion_pytorch_model.safetensors") + size("model/text_encoder/model.safetensors");
    assert_eq!(report.facts.disk_bytes, 2 * 12 * trained + 4 * trained + frozen);
    let summary = report.to_string();
    for piece in [
        "StableDiffusionPipeline",
        "3 in ",
        "4 of ",
        "\"a sks cat\"",
        "5 of 4 images (1 a rank x 2 ranks x 2 micro-batches)",
        "1e-4 (linear)",
        "2 on the CPU, ZeRO stage 2",
        "a checkpoint every 2 steps",
        "warmup_steps is 50",
        "nothing goes there",
    ] {
        assert!(summary.contains(piece), "{summary}\nlacks {piece}");
    }
}

#[test]
fn the_recipes_in_configs_load() {
    for recipe in fs::read_dir(Path::new(env!("CARGO_MANIFEST_DIR")).join("configs")).unwrap() {
        let path = recipe.unwrap().path();
        let plan = config::load(&path, &[], 2).unwrap_or_else(|error| panic!("{}: {error:#}", path.display()));
        assert!(plan.output.dir.starts_with("runs"), "{}", path.display());
    }
}
