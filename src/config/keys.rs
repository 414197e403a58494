//! Which sections and keys there are, and the nearest known one to a name that is not there.

use super::document::Document;

/// Every section with its keys, in the order in which `config.toml` is written.
pub(super) const SECTIONS: &[(&str, &[&str])] = &[
    ("model", &["path", "variant", "revision", "train_text_encoder", "device"]),
    (
        "data",
        &[
            "instance_dir",
            "instance_prompt",
            "captions",
            "caption_column",
            "caption_dropout",
            "resolution",
            "center_crop",
            "random_flip",
            "image_interpolation",
            "tokenizer_max_length",
            "precompute_text_embeddings",
            "text_encoder_use_attention_mask",
            "cache_latents",
        ],
    ),
    (
        "prior",
        &[
            "class_dir",
            "class_prompt",
            "num_class_images",
            "sample_batch_size",
            "loss_weight",
            "steps",
            "guidance_scale",
            "sampler",
        ],
    ),
    (
        "train",
        &[
            "max_steps",
            "epochs",
            "batch_size",
            "gradient_accumulation_steps",
            "max_grad_norm",
            "mixed_precision",
            "allow_tf32",
            "loss_scale",
            "initial_scale_power",
            "loss_scale_window",
            "min_loss_scale",
            "seed",
            "snr_gamma",
            "snr_gamma_v",
            "offset_noise",
            "recompute",
            "class_labels_conditioning",
        ],
    ),
    (
        "optimizer",
        &[
            "kind",
            "learning_rate",
            "text_encoder_learning_rate",
            "beta1",
            "beta2",
            "weight_decay",
            "text_encoder_weight_decay",
            "epsilon",
            "scale_lr",
            "master_dtype",
        ],
    ),
    ("lr_schedule", &["kind", "warmup_steps", "cycles", "power"]),
    ("lora", &["rank", "alpha", "dropout", "init", "target_modules"]),
    (
        "zero",
        &[
            "stage",
            "offload_params",
            "offload_optimizer",
            "offload_gradients",
            "nvme_dir",
            "reduce_dtype",
            "grad_accum_dtype",
            "collectives",
            "prefetch",
            "timeout_seconds",
        ],
    ),
    ("memory", &["vram", "ram"]),
    ("checkpoint", &["every", "keep", "resume", "on_interrupt"]),
    (
        "validation",
        &[
            "prompt",
            "negative_prompt",
            "num_images",
            "every",
            "steps",
            "guidance_scale",
            "seed",
            "sampler",
            "scores",
            "class_prompt",
            "images",
        ],
    ),
    ("output", &["dir", "overwrite", "save_dtype", "skip_save_text_encoder", "trackers", "push_to_hub"]),
    ("replay", &["draws", "pixels", "save_gradients"]),
];

/// What diffusers' flags and DeepSpeed's keys of another name are called here.
const ELSEWHERE: &[(&str, &str)] = &[
    ("pretrained_model_name_or_path", "model.path"),
    ("instance_data_dir", "data.instance_dir"),
    ("class_data_dir", "prior.class_dir"),
    ("train_data_dir", "data.instance_dir"),
    ("with_prior_preservation", "prior.class_dir"),
    ("prior_loss_weight", "prior.loss_weight"),
    ("image_interpolation_mode", "data.image_interpolation"),
    ("pre_compute_text_embeddings", "data.precompute_text_embeddings"),
    ("train_batch_size", "train.batch_size"),
    ("train_micro_batch_size_per_gpu", "train.batch_size"),
    ("num_train_epochs", "train.epochs"),
    ("max_train_steps", "train.max_steps"),
    ("gradient_checkpointing", "train.recompute"),
    ("gradient_clipping", "train.max_grad_norm"),
    ("lr", "optimizer.learning_rate"),
    ("text_encoder_lr", "optimizer.text_encoder_learning_rate"),
    ("optimizer", "optimizer.kind"),
    ("use_8bit_adam", "optimizer.kind"),
    ("adam_beta1", "optimizer.beta1"),
    ("adam_beta2", "optimizer.beta2"),
    ("adam_weight_decay", "optimizer.weight_decay"),
    ("adam_weight_decay_text_encoder", "optimizer.text_encoder_weight_decay"),
    ("adam_epsilon", "optimizer.epsilon"),
    ("lr_scheduler", "lr_schedule.kind"),
    ("lr_warmup_steps", "lr_schedule.warmup_steps"),
    ("lr_num_cycles", "lr_schedule.cycles"),
    ("lr_power", "lr_schedule.power"),
    ("zero_stage", "zero.stage"),
    ("offload_param", "zero.offload_params"),
    ("offload_param_device", "zero.offload_params"),
    ("offload_optimizer_device", "zero.offload_optimizer"),
    ("nvme_path", "zero.nvme_dir"),
    ("checkpointing_steps", "checkpoint.every"),
    ("checkpoints_total_limit", "checkpoint.keep"),
    ("resume_from_checkpoint", "checkpoint.resume"),
    ("validation_prompt", "validation.prompt"),
    ("num_validation_images", "validation.num_images"),
    ("validation_steps", "validation.every"),
    ("output_dir", "output.dir"),
    ("report_to", "output.trackers"),
];

/// One problem for each section, key and homeless key of `document` that is not known.
pub(super) fn unknown(document: &Document) -> Vec<String> {
    let mut problems = Vec::new();
    for (key, entry) in &document.homeless {
        let place = &entry.place;
        let remedy = match elsewhere(key, None) {
            Some((section, known)) => format!("write {known} under [{section}]"),
            None => format!("every key stands in a section, and the sections are {}", section_names()),
        };
        problems.push(format!("{place}: {key} = {} is outside any section: {remedy}", entry.shown));
    }
    for (name, section) in &document.sections {
        let Some((_, keys)) = SECTIONS.iter().find(|(known, _)| known == name) else {
            let names = SECTIONS.iter().map(|(known, _)| *known);
            let remedy = match nearest(name, names) {
                Some(known) => format!("did you mean [{known}]?"),
                None => format!("the sections are {}", section_names()),
            };
            problems.push(format!("{}: there is no section [{name}]: {remedy}", section.place));
            continue;
        };
        for (key, entry) in section.entries.iter().filter(|(key, _)| !keys.contains(&key.as_str())) {
            let remedy = match (elsewhere(key, Some(name)), nearest(key, keys.iter().copied())) {
                (Some((section, known)), _) => format!("did you mean {known} in [{section}]?"),
                (None, Some(known)) => format!("did you mean {known}?"),
                (None, None) => format!("[{name}] has {}", keys.join(", ")),
            };
            problems.push(format!("{}: there is no key {name}.{key} (= {}): {remedy}", entry.place, entry.shown));
        }
    }
    problems
}

fn section_names() -> String {
    SECTIONS.iter().map(|(name, _)| format!("[{name}]")).collect::<Vec<_>>().join(", ")
}

/// The section and key that a key of another section or of another program goes by here.
fn elsewhere(key: &str, section: Option<&str>) -> Option<(&'static str, &'static str)> {
    let alias = ELSEWHERE.iter().find(|(theirs, _)| *theirs == key).and_then(|(_, ours)| ours.split_once('.'));
    let same = || {
        let mut homes = SECTIONS.iter().filter(|(_, keys)| keys.contains(&key));
        // A name that several sections have says nothing about which one was meant.
        homes.next().filter(|_| homes.next().is_none())
    };
    alias
        .or_else(|| same().and_then(|(name, keys)| Some((*name, *keys.iter().find(|known| **known == key)?))))
        .filter(|(home, known)| section != Some(home) || *known != key)
}

/// The known name most like `name`, if any is like it at all.
pub(super) fn nearest<'a>(name: &str, known: impl Iterator<Item = &'a str>) -> Option<&'a str> {
    let name = name.to_lowercase().replace('-', "_");
    known
        .map(|candidate| (strsim::normalized_damerau_levenshtein(&name, candidate), candidate))
        .filter(|(likeness, candidate)| *likeness >= 0.5 || (name.len() >= 4 && candidate.contains(&name)))
        .max_by(|a, b| a.0.total_cmp(&b.0))
        .map(|(_, candidate)| candidate)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_nearest_name_is_found_and_an_unlike_one_is_not() {
        let known = ["batch_size", "max_steps", "epochs", "gradient_accumulation_steps"];
        assert_eq!(nearest("bach_size", known.into_iter()), Some("batch_size"));
        assert_eq!(nearest("max-steps", known.into_iter()), Some("max_steps"));
        assert_eq!(nearest("accumulation", known.into_iter()), Some("gradient_accumulation_steps"));
        assert_eq!(nearest("zzz", known.into_iter()), None);
    }

    #[test]
    fn a_key_of_another_section_or_program_is_sent_home() {
        assert_eq!(elsewhere("resolution", Some("train")), Some(("data", "resolution")));
        assert_eq!(elsewhere("train_batch_size", Some("train")), Some(("train", "batch_size")));
        assert_eq!(elsewhere("max_train_steps", None), Some(("train", "max_steps")));
        // Two sections have it.
        assert_eq!(elsewhere("kind", Some("train")), None);
        assert!(ELSEWHERE.iter().all(|(_, ours)| {
            let (section, key) = ours.split_once('.').unwrap();
            SECTIONS.iter().any(|(name, keys)| *name == section && keys.contains(&key))
        }));
    }
}
