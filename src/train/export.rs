//! What a run leaves behind: the trained pipeline, and in a replay the gradients of its first step.

use std::fs;
use std::path::Path;

use anyhow::{Context, Result, bail, ensure};
use candle_core::DType;
use half::{bf16, f16};
use serde_json::{Map, json};

use super::network::Network;
use crate::checkpoint::all_finite;
use crate::comm::{Communicator, CommunicatorExt};
use crate::config::{OutputPlan, SaveDtype};
use crate::model::{Component, ComponentWriter, PipelineExport};
use crate::pipeline::PipelineWeights;

/// Which pipeline is written where, and how.
pub struct Export<'a> {
    pub model_dir: &'a Path,
    pub variant: &'a str,
    pub trained: &'a [Component],
    pub output: &'a OutputPlan,
}

impl Export<'_> {
    /// What is trained and written.
    fn saved(&self) -> Vec<Component> {
        let left_out =
            |&component: &Component| self.output.skip_save_text_encoder && matches!(component, Component::TextEncoder);
        self.trained.iter().copied().filter(|component| !left_out(component)).collect()
    }
}

/// Writes the pipeline folder; a collective. Everything is written aside first, so an interruption leaves no folder
/// that looks like a pipeline and is none.
pub fn export(network: &Network, weights: &PipelineWeights, comm: &dyn Communicator, export: &Export) -> Result<()> {
    let aside = export.output.dir.join(".writing-pipeline");
    let written = write(network, weights, comm, export, &aside);
    if written.is_err() && comm.rank() == 0 {
        // Best effort: the error that led here is the one to report.
        let _ = fs::remove_dir_all(&aside);
    }
    written
}

fn write(
    network: &Network,
    weights: &PipelineWeights,
    comm: &dyn Communicator,
    export: &Export,
    aside: &Path,
) -> Result<()> {
    let writers = match comm.rank() {
        0 => start(weights, export, aside).map(Some),
        _ => Ok(None),
    };
    let mut result = comm.agree(writers)?;
    for i in 0..network.store.len() {
        if !network.store.trains(i) {
            continue;
        }
        let whole = network.store.whole_master(i)?;
        let written = match &mut result {
            Some(writers) => write_segment(writers, network, i, whole.as_slice(), export),
            None => Ok(()),
        };
        comm.agree(written)?;
    }
    let finished = match result {
        Some(writers) => finish(writers, export, aside),
        None => Ok(()),
    };
    comm.agree(finished)
}

type Writers = Vec<(Component, ComponentWriter)>;

fn start(weights: &PipelineWeights, export: &Export, aside: &Path) -> Result<Writers> {
    if aside.exists() {
        fs::remove_dir_all(aside).with_context(|| format!("removing {}", aside.display()))?;
    }
    let dtype = match export.output.save_dtype {
        SaveDtype::F32 => DType::F32,
        SaveDtype::F16 => DType::F16,
        SaveDtype::Bf16 => DType::BF16,
    };
    let writer = |component: Component| {
        let writer = ComponentWriter::create(&aside.join(component.name()), weights.component(component), dtype)?;
        Ok((component, writer))
    };
    export.saved().into_iter().map(writer).collect()
}

fn write_segment(writers: &mut Writers, network: &Network, i: usize, whole: &[f32], export: &Export) -> Result<()> {
    for entry in &network.store.layout(i).entries {
        let component = Component::of(&entry.name).filter(|component| export.trained.contains(component));
        let component = component.with_context(|| format!("{} belongs to no trained component", entry.name))?;
        let Some((_, writer)) = writers.iter_mut().find(|(written, _)| *written == component) else { continue };
        let values = &whole[entry.offset..entry.offset + entry.len];
        ensure!(
            all_finite(values),
            "{} is not finite after the last step: lower optimizer.learning_rate, or add warm-up (lr_schedule.warmup_steps)",
            entry.name
        );
        check_range(&entry.name, values, export.output.save_dtype)?;
        writer.write(&entry.name, 0, values)?;
    }
    Ok(())
}

/// Numbers of fp32 that become infinities in the type they are saved in.
fn check_range(name: &str, values: &[f32], save_dtype: SaveDtype) -> Result<()> {
    let beyond = |fits: fn(f32) -> bool| values.iter().find(|&&x| !fits(x));
    let (beyond, dtype, others) = match save_dtype {
        SaveDtype::F32 => return Ok(()),
        SaveDtype::F16 => (beyond(|x| f16::from_f32(x).is_finite()), "fp16", "\"fp32\" or \"bf16\""),
        SaveDtype::Bf16 => (beyond(|x| bf16::from_f32(x).is_finite()), "bf16", "\"fp32\""),
    };
    match beyond {
        None => Ok(()),
        Some(x) => bail!(
            "{name} has a number that {dtype} cannot hold ({x:e}): set output.save_dtype = {others}, and go on from the \
             newest checkpoint if there is one (checkpoint.resume = \"latest\")"
        ),
    }
}

fn finish(writers: Writers, export: &Export, aside: &Path) -> Result<()> {
    for (_, writer) in writers {
        writer.finish()?;
    }
    let skeleton = PipelineExport {
        model_dir: export.model_dir,
        variant: export.variant,
        trained: &export.saved(),
        skip_text_encoder: export.output.skip_save_text_encoder,
    };
    skeleton.write_skeleton(aside)?;
    let mut entries: Vec<_> = fs::read_dir(aside)?.collect::<Result<_, _>>()?;
    // The index last: with it the folder is a pipeline.
    entries.sort_by_key(|entry| entry.file_name() == "model_index.json");
    for entry in entries {
        let target = export.output.dir.join(entry.file_name());
        if target.is_dir() {
            fs::remove_dir_all(&target).with_context(|| format!("replacing {}", target.display()))?;
        }
        fs::rename(entry.path(), &target).with_context(|| format!("writing {}", target.display()))?;
    }
    fs::remove_dir(aside).with_context(|| format!("removing {}", aside.display()))
}

/// Writes the reduced gradients, divided by `scale`, as fp32 safetensors, by their names in the model's own files; a
/// collective.
pub fn save_gradients(
    network: &Network,
    scale: f64,
    weights: &PipelineWeights,
    comm: &dyn Communicator,
    path: &Path,
) -> Result<()> {
    let mut header = Map::new();
    let mut data: Vec<u8> = Vec::new();
    for i in 0..network.store.len() {
        let Some(mut whole) = network.reducer.whole(i)? else { continue };
        if comm.rank() > 0 {
            continue;
        }
        whole.iter_mut().for_each(|x| *x = (f64::from(*x) / scale) as f32);
        for entry in &network.store.layout(i).entries {
            let component = Component::of(&entry.name).context("a trained tensor of no component")?;
            let own = weights.component(component).name_in_file(&entry.name).unwrap_or(&entry.name);
            let start = data.len();
            let values = &whole[entry.offset..entry.offset + entry.len];
            data.extend(values.iter().flat_map(|x| x.to_le_bytes()));
            let place = json!({ "dtype": "F32", "shape": entry.shape, "data_offsets": [start, data.len()] });
            header.insert(format!("{}.{own}", component.name()), place);
        }
    }
    let written = match comm.rank() {
        0 => write_safetensors(path, header, &data),
        _ => Ok(()),
    };
    comm.agree(written)
}

fn write_safetensors(path: &Path, header: Map<String, serde_json::Value>, data: &[u8]) -> Result<()> {
    let mut header = serde_json::to_vec(&header)?;
    header.resize(header.len().next_multiple_of(8), b' ');
    let bytes = [&(header.len() as u64).to_le_bytes()[..], &header, data].concat();
    if let Some(parent) = path.parent() {
        fs::create_dir_all(parent).with_context(|| format!("creating {}", parent.display()))?;
    }
    fs::write(path, bytes).with_context(|| format!("writing {}", path.display()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_would_be_saved_as_an_infinity_is_named() {
        let told = |values: &[f32], dtype| check_range("unet.conv_in.bias", values, dtype).map_err(|e| e.to_string());
        // 65519.99 rounds to fp16's largest number, 65520 to infinity; fp32's largest number is beyond bf16's.
        assert_eq!(told(&[0.0, -65519.99], SaveDtype::F16), Ok(()));
        let error = told(&[0.0, -65520.0], SaveDtype::F16).unwrap_err();
        for piece in ["unet.conv_in.bias", "fp16", "-6.552e4", "save_dtype = \"fp32\" or \"bf16\""] {
            assert!(error.contains(piece), "{error}\nlacks {piece}");
        }
        assert_eq!(told(&[65520.0, 3e38], SaveDtype::Bf16), Ok(()));
        assert!(told(&[f32::MAX], SaveDtype::Bf16).unwrap_err().contains("bf16"));
        assert_eq!(told(&[f32::MAX, f32::MIN], SaveDtype::F32), Ok(()));
    }
}
