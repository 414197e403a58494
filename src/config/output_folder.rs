//! Whether a run may write where it is told to: the output folder holds no other run, can be written, and has room
//! for what will come.

use std::fs;
use std::io::Write;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use anyhow::Result;

use super::check::Inspection;
use super::{OptimizerKind, Resume, SaveDtype};
use crate::device::free_disk_bytes;
use crate::{Refusal, checkpoint};

/// Bytes that a checkpoint takes for so many trained parameters: of each the fp32 master weight and AdamW's two moments; in 8
/// bits these share scales by blocks of 256.
fn checkpoint_bytes(kind: OptimizerKind, trained: u64) -> u64 {
    match kind {
        OptimizerKind::AdamW => 12 * trained,
        OptimizerKind::AdamW8bit => 6 * trained + trained / 32,
    }
}

/// The output folder, and where recorded gradients go.
pub(super) fn inspect(inspection: &mut Inspection) {
    let plan = inspection.plan.clone();
    let dir = plan.output.dir.as_path();
    if dir.as_os_str().is_empty() {
        return;
    }
    for (section, key, input) in inputs(inspection) {
        if is_same(dir, &input) {
            let what = format!("this is also {section}.{key}, which the run must leave as it is: name another folder");
            inspection.problem("output", "dir", &what);
        } else if let Some(own) = own_folder_around(dir, &input, inspection.facts.model_dir.as_deref()) {
            let what = format!(
                "{section}.{key} lies in {own} of this folder, which the run would replace: name another folder, or move \
                 what is there"
            );
            inspection.problem("output", "dir", &what);
        }
    }
    if checkpoint::is_held(dir) {
        inspection.problem("output", "dir", checkpoint::TAKEN);
    } else if !plan.output.overwrite {
        another_run(inspection, dir, &plan.checkpoint.resume);
    }
    inspection.absorb("output", "dir", can_write(dir).and_then(|()| can_replace(dir)));
    let gradients = plan.replay.and_then(|replay| replay.save_gradients);
    if let Some(file) = gradients {
        if file.is_dir() {
            inspection.problem(
                "replay",
                "save_gradients",
                "this is a folder: name a file in it, such as gradients.safetensors",
            );
        } else if let Some(parent) = file.parent().filter(|parent| *parent != dir) {
            inspection.absorb("replay", "save_gradients", can_write(parent));
        }
    }
}

/// Refuses a folder in which there is a run that this one does not go on with.
fn another_run(inspection: &mut Inspection, dir: &Path, resume: &Resume) {
    let goes_on = checkpoint::latest(dir).is_ok_and(|found| found.is_some());
    let mut found = run_files(dir);
    match resume {
        Resume::No => {}
        Resume::Latest if goes_on => return,
        // One that was stopped before its first checkpoint is begun anew; what another one has made stays.
        Resume::Latest => found.retain(|name| !LOGS.contains(&name.as_str())),
        Resume::Folder(from) if from.parent().is_some_and(|parent| is_same(parent, dir)) => return,
        Resume::Folder(_) => {}
    }
    if found.is_empty() {
        return;
    }
    let going_on = match goes_on {
        true => " go on with that run (resume = \"latest\" under [checkpoint]),",
        false => "",
    };
    let what = format!(
        "this folder holds another run ({}): name another folder,{going_on} or let its files be replaced (overwrite = true \
         under [output])",
        few(found).join(", ")
    );
    inspection.problem("output", "dir", &what);
}

/// The folder in `dir` that a run writes, or replaces by what a model consists of, in which `input` lies.
fn own_folder_around(dir: &Path, input: &Path, model_dir: Option<&Path>) -> Option<String> {
    let (dir, input) = (dir.canonicalize().ok()?, input.canonicalize().ok()?);
    let name = input.strip_prefix(dir).ok()?.components().next()?.as_os_str().to_string_lossy().into_owned();
    // A model in the output folder itself would be found in each of its parts.
    let of_model = model_dir.is_some_and(|model| model.join(&name).exists());
    (is_of_a_run(&name) || SHOWN.contains(&name.as_str()) || of_model).then_some(name)
}

/// Whether the files and folders of a run that are there can be replaced when it has ended.
fn can_replace(dir: &Path) -> Result<()> {
    for name in fs::read_dir(dir).into_iter().flatten().flatten().map(|entry| entry.file_name()) {
        let (name, path) = (name.to_string_lossy(), dir.join(&name));
        let wrong = match () {
            () if FOLDERS.contains(&&*name) && !path.is_dir() => "is no folder, and the run makes one of this name",
            () if FOLDERS.contains(&&*name) => {
                can_write(&path)?;
                continue;
            }
            () if FILES.contains(&&*name) && !path.is_file() => "is no file, and the run writes one of this name",
            () if LOGS.contains(&&*name) => match fs::OpenOptions::new().append(true).open(&path) {
                Ok(_) => continue,
                Err(_) => "cannot be written",
            },
            () => continue,
        };
        return Err(Refusal::error(format!("{} {wrong}: move it, or name another folder", path.display())));
    }
    Ok(())
}

/// Folders that a run reads from.
fn inputs(inspection: &Inspection) -> Vec<(&'static str, &'static str, PathBuf)> {
    let mut inputs = vec![("data", "instance_dir", inspection.plan.data.instance_dir.clone())];
    inputs.extend(inspection.plan.prior.iter().map(|prior| ("prior", "class_dir", prior.class_dir.clone())));
    inputs.extend(inspection.facts.model_dir.iter().map(|dir| ("model", "path", dir.clone())));
    inputs.retain(|(_, _, path)| !path.as_os_str().is_empty());
    inputs
}

/// Whether both are one folder that exists.
fn is_same(a: &Path, b: &Path) -> bool {
    a.canonicalize().is_ok_and(|a| b.canonicalize().is_ok_and(|b| a == b))
}

/// What in `dir` a run has left there.
fn run_files(dir: &Path) -> Vec<String> {
    let names = fs::read_dir(dir).into_iter().flatten().flatten();
    let mut found: Vec<String> =
        names.map(|entry| entry.file_name().to_string_lossy().into_owned()).filter(|name| is_of_a_run(name)).collect();
    found.sort();
    found
}

fn few(mut names: Vec<String>) -> Vec<String> {
    if names.len() > 4 {
        names.truncate(4);
        names.push("…".to_string());
    }
    names
}

/// What tells of a run from its first step on.
const LOGS: [&str; 2] = ["metrics.jsonl", "config.toml"];
const FILES: [&str; 4] = ["metrics.jsonl", "config.toml", "model_index.json", "pytorch_lora_weights.safetensors"];
const FOLDERS: [&str; 5] = ["unet", "vae", "text_encoder", "tokenizer", "scheduler"];
/// Folders that a run adds to.
const SHOWN: [&str; 2] = ["samples", "logs"];

/// What a run leaves, and what it would replace: a pipeline's folders may be somebody's own.
fn is_of_a_run(name: &str) -> bool {
    FILES.contains(&name) || FOLDERS.contains(&name) || checkpoint::number(name).is_some()
}

/// Whether two folders, or where they would be made, take their room from the same file system.
fn same_disk(a: &Path, b: &Path) -> bool {
    let device = |path| fs::metadata(nearest_existing(path)).map(|meta| meta.dev());
    matches!((device(a), device(b)), (Ok(a), Ok(b)) if a == b)
}

/// The longest beginning of `path` that exists.
fn nearest_existing(path: &Path) -> &Path {
    let there = path.ancestors().find(|part| part.symlink_metadata().is_ok());
    there.unwrap_or(Path::new("."))
}

/// Tries to write in `dir`, or where it would be made, and leaves nothing there.
pub(crate) fn can_write(dir: &Path) -> Result<()> {
    let there = nearest_existing(dir);
    if !there.is_dir() {
        let there = there.display();
        return Err(Refusal::error(format!("{there} is not a folder: name a folder, or one that can be made")));
    }
    // A file without a name, so that a run that is killed right here leaves nothing behind.
    let tried = tempfile::tempfile_in(there).and_then(|mut probe| probe.write_all(&[0; 4096]));
    tried.map_err(|error| {
        Refusal::error(format!(
            "nothing can be written in {} ({error}): make room or get leave to write there, or name another folder",
            there.display()
        ))
    })
}

/// How much the run will write, and whether there is room for it.
pub(super) fn disk_space(inspection: &mut Inspection) {
    let plan = &inspection.plan;
    if inspection.facts.model_dir.is_none() || plan.output.dir.as_os_str().is_empty() {
        return;
    }
    let model = &inspection.facts.model;
    let trained = model.unet_parameters + if plan.model.train_text_encoder { model.text_encoder_parameters } else { 0 };
    let one = checkpoint_bytes(plan.optimizer.kind, trained);
    let saved = match plan.output.save_dtype {
        SaveDtype::F32 => 4,
        SaveDtype::F16 | SaveDtype::Bf16 => 2,
    };
    let pipeline = trained * saved + model.frozen_bytes;
    let have = fs::read_dir(&plan.output.dir)
        .map(|entries| {
            entries.flatten().filter(|entry| checkpoint::number(&entry.file_name().to_string_lossy()).is_some()).count()
        })
        .unwrap_or(0) as u64;
    let checkpoints = most_checkpoints(inspection, have);
    let need = checkpoints.saturating_mul(one).saturating_add(pipeline);
    inspection.facts.checkpoint_bytes = one;
    inspection.facts.disk_bytes = need;
    let free = free_disk_bytes(&inspection.plan.output.dir);
    // State files are there first.
    let state = match &inspection.plan.zero.nvme_dir {
        Some(dir) if same_disk(dir, &inspection.plan.output.dir) => inspection.facts.state_bytes,
        _ => 0,
    };
    let need = need.saturating_add(state);
    if let Ok(free) = free
        && free < need
    {
        let size = |bytes: u64| bytesize::ByteSize(bytes).display().iec();
        let state = if state > 0 { format!(", state files of {}", size(state)) } else { String::new() };
        let what = format!(
            "the run will need {} on this disk ({checkpoints} checkpoints of {}{state} and a pipeline folder of {}), and {} are \
             free: make room, name a folder on another disk, or keep fewer checkpoints ([checkpoint] every, keep, \
             on_interrupt = false)",
            size(need),
            size(one),
            size(pipeline),
            size(free)
        );
        inspection.problem("output", "dir", &what);
    }
}

/// The most checkpoints that will be on disk at once beyond the `have` that are there: old ones go only after a new
/// one is whole.
fn most_checkpoints(inspection: &Inspection, have: u64) -> u64 {
    let plan = &inspection.plan.checkpoint;
    let total = inspection.facts.steps.map_or(inspection.plan.train.max_steps.unwrap_or(0), |steps| steps.total);
    let regular = plan.every.map_or(0, |every| (total / every) as u64);
    let written = regular.max(u64::from(plan.on_interrupt));
    match plan.keep {
        Some(keep) => written.min((keep as u64).saturating_add(1).saturating_sub(have).max(1)),
        None => written,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_probe_leaves_nothing_behind_and_names_what_is_not_a_folder() {
        let home = tempfile::tempdir().unwrap();
        can_write(&home.path().join("a/b/c")).unwrap();
        assert_eq!(fs::read_dir(home.path()).unwrap().count(), 0);
        let file = home.path().join("file");
        fs::write(&file, "x").unwrap();
        let error = can_write(&file.join("out")).unwrap_err().to_string();
        assert!(error.contains("file is not a folder"), "{error}");
    }

    #[test]
    fn only_a_runs_own_files_are_taken_for_one() {
        assert!(is_of_a_run("checkpoint-500") && is_of_a_run("metrics.jsonl") && is_of_a_run("model_index.json"));
        assert!(is_of_a_run("unet"));
        assert!(!is_of_a_run("checkpoint-notes") && !is_of_a_run("notes.txt"));
    }
}
