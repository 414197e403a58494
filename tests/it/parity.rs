//! Equal to the peer: recorded runs of diffusers' own training script, replayed. `tests/make_expected.py` thinned them.
//! On the CPU; with DBLAUNCH_TEST_GPU set, on a GPU. `tests/gpu.sh` runs them on another machine than they were built on:
//! DBLAUNCH_TEST_HOME is then the folder with the program and the data.

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::process::Command;

use safetensors::SafeTensors;
use serde_json::Value;

/// Elements kept of each tensor, evenly spaced.
const SAMPLES: usize = 16;

#[test]
fn sd15_full() {
    replay("sd15_full", "sd15");
}

#[test]
fn sd15_prior_te() {
    replay("sd15_prior_te", "sd15");
}

#[test]
fn sd15_rough() {
    replay("sd15_rough", "sd15");
}

#[test]
fn sd15_offset_snr() {
    replay("sd15_offset_snr", "sd15");
}

#[test]
fn sd21v_full() {
    replay("sd21v_full", "sd21v");
}

/// Where tests/data is, and the program.
fn places() -> (PathBuf, PathBuf) {
    match std::env::var_os("DBLAUNCH_TEST_HOME") {
        Some(home) => {
            let home = std::fs::canonicalize(home).unwrap();
            (home.clone(), home.join("dblaunch"))
        }
        None => (env!("CARGO_MANIFEST_DIR").into(), env!("CARGO_BIN_EXE_dblaunch").into()),
    }
}

fn replay(case: &str, model: &str) {
    let (root, program) = places();
    let recorded = root.join("tests/data/parity").join(case);
    let device = if std::env::var_os("DBLAUNCH_TEST_GPU").is_some() { "cuda" } else { "cpu" };
    let home = tempfile::tempdir().unwrap();
    let output = home.path().join("run");
    let gradients = output.join("gradients.safetensors");
    let run = Command::new(program)
        .current_dir(root)
        .arg(recorded.join("train.toml"))
        .args(["--set", &format!("output.dir={}", output.display()), "--set", &format!("model.device={device}")])
        .args(["--set", &format!("replay.save_gradients={}", gradients.display())])
        .output()
        .unwrap();
    assert!(run.status.success(), "{}", String::from_utf8_lossy(&run.stderr));

    compare_rows(&recorded, &output);
    let expected = std::fs::read(recorded.join("expected.safetensors")).unwrap();
    let expected = Expected::read(&expected);
    compare_gradients(&expected, &tensors(&gradients, ""));
    let mut finals = HashMap::new();
    for component in ["unet", "text_encoder"] {
        for file in weight_files(&output.join(component)) {
            finals.extend(tensors(&file, &format!("{component}.")));
        }
    }
    compare_weights(&expected, &finals);
    assert!(output.join("model_index.json").is_file() && weight_files(&output.join("vae")).len() == 1, "{model}");
}

/// Losses to 1e-5, norms to 1e-4, rates to 1e-9; images to the last bit, JPEGs within 4 levels and 0.5 on average.
fn compare_rows(recorded: &Path, output: &Path) {
    let log: Vec<Value> = serde_json::from_slice(&std::fs::read(recorded.join("log.json")).unwrap()).unwrap();
    let text = std::fs::read_to_string(output.join("metrics.jsonl")).unwrap();
    let rows: Vec<Value> = text.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    let numbers = |rows: &[Value], key: &str| rows.iter().filter_map(|r| r[key].as_f64()).collect::<Vec<_>>();
    let micro: Vec<Value> = rows.iter().filter(|r| r.get("micro_step").is_some()).cloned().collect();
    let steps: Vec<Value> = rows.iter().filter(|r| r.get("grad_norm").is_some()).cloned().collect();

    near(&numbers(&micro, "loss"), &numbers(&log, "loss"), 1e-5, "loss");
    near(&numbers(&steps, "grad_norm"), &numbers(&log, "grad_norm"), 1e-4, "grad_norm");
    // The peer logs the rate after its schedule has stepped: the rate of step s + 1 stands in the last row of step s.
    let mut after = HashMap::new();
    for row in log.iter().filter(|r| r.get("loss").is_some()) {
        after.insert(row["step"].as_u64().unwrap(), row["lr"].as_f64().unwrap());
    }
    for pair in steps.windows(2) {
        let rate = after[&pair[0]["step"].as_u64().unwrap()];
        assert!((pair[1]["lr"].as_f64().unwrap() - rate).abs() < 1e-9, "{} for {rate}", pair[1]["lr"]);
    }
    let lossless = !recorded.ends_with("sd15_rough");
    for row in &micro {
        let Some(most) = row["pixels_max_levels"].as_f64() else { continue };
        let mean = row["pixels_mean_levels"].as_f64().unwrap();
        assert!(if lossless { most == 0.0 } else { most <= 4.0 && mean <= 0.5 }, "images differ: {row}");
    }
}

fn near(got: &[f64], want: &[f64], bound: f64, what: &str) {
    assert_eq!(got.len(), want.len(), "{what}");
    for (i, (g, w)) in got.iter().zip(want).enumerate() {
        assert!((g - w).abs() <= bound * w.abs(), "{what} {i}: {g} for {w}");
    }
}

struct Expected {
    gradients: Vec<String>,
    finals: Vec<String>,
    gradient_norms: Vec<f64>,
    gradient_samples: Vec<f64>,
    final_samples: Vec<f64>,
    movement_norms: Vec<f64>,
    elements: Vec<f64>,
}

impl Expected {
    fn read(bytes: &[u8]) -> Self {
        let (_, metadata) = SafeTensors::read_metadata(bytes).unwrap();
        let names = |key: &str| serde_json::from_str(&metadata.metadata().as_ref().unwrap()[key]).unwrap();
        let file = SafeTensors::deserialize(bytes).unwrap();
        let get = |name: &str| {
            let tensor = file.tensor(name).unwrap();
            let wide = tensor.data().chunks_exact(8).map(|b| b.try_into().unwrap());
            match tensor.dtype() {
                safetensors::Dtype::F64 => wide.map(f64::from_le_bytes).collect(),
                safetensors::Dtype::I64 => wide.map(|b| i64::from_le_bytes(b) as f64).collect(),
                _ => floats(tensor.data()).into_iter().map(f64::from).collect::<Vec<_>>(),
            }
        };
        Expected {
            gradients: names("gradients"),
            finals: names("finals"),
            gradient_norms: get("gradient_norms"),
            gradient_samples: get("gradient_samples"),
            final_samples: get("final_samples"),
            movement_norms: get("movement_norms"),
            elements: get("elements"),
        }
    }
}

/// Sampled elements to 1e-4 of all and 1e-3 of the worst tensor; norms likewise.
fn compare_gradients(expected: &Expected, ours: &HashMap<String, Vec<f32>>) {
    let total: f64 = expected.gradient_norms.iter().map(|n| n * n).sum::<f64>().sqrt();
    let (mut difference, mut norm) = (0.0, 0.0);
    for (i, name) in expected.gradients.iter().enumerate() {
        let ours = ours.get(name).unwrap_or_else(|| panic!("no gradient of {name}"));
        let want = &expected.gradient_samples[i * SAMPLES..(i + 1) * SAMPLES];
        let (d, n) = distance(&sample(ours), want);
        (difference, norm) = (difference + d * d, norm + n * n);
        let own_norm = ours.iter().map(|x| f64::from(*x).powi(2)).sum::<f64>().sqrt();
        if expected.gradient_norms[i] > 1e-5 * total {
            // The root mean square of the whole tensor stands in where the samples happen to be small.
            let typical = expected.gradient_norms[i] * (SAMPLES as f64 / ours.len() as f64).min(1.0).sqrt();
            assert!(d <= 1e-3 * n.max(typical), "gradient of {name}: {d:e} of {n:e}");
            assert!((own_norm / expected.gradient_norms[i] - 1.0).abs() < 1e-3, "gradient of {name}: norm {own_norm}");
        }
    }
    assert!((difference / norm).sqrt() < 1e-4, "gradients: {:e}", (difference / norm).sqrt());
}

/// Final weights to 0.5 % of how far they moved.
fn compare_weights(expected: &Expected, ours: &HashMap<String, Vec<f32>>) {
    let (mut difference, mut movement) = (0.0, 0.0);
    for (i, name) in expected.finals.iter().enumerate() {
        let ours = ours.get(name).unwrap_or_else(|| panic!("no weights {name}"));
        assert_eq!(ours.len() as f64, expected.elements[i], "{name}");
        let (d, _) = distance(&sample(ours), &expected.final_samples[i * SAMPLES..(i + 1) * SAMPLES]);
        // What the samples' share of the whole tensor's movement is, on average.
        let share = (SAMPLES as f64 / expected.elements[i]).min(1.0);
        (difference, movement) = (difference + d * d, movement + expected.movement_norms[i].powi(2) * share);
    }
    assert!((difference / movement).sqrt() < 5e-3, "weights: {:e} of the movement", (difference / movement).sqrt());
}

fn distance(got: &[f64], want: &[f64]) -> (f64, f64) {
    let norm = |f: &dyn Fn(usize) -> f64| (0..want.len()).map(|i| f(i).powi(2)).sum::<f64>().sqrt();
    (norm(&|i| got[i] - want[i]), norm(&|i| want[i]))
}

fn sample(values: &[f32]) -> Vec<f64> {
    (0..SAMPLES).map(|j| f64::from(values[j * values.len() / SAMPLES])).collect()
}

fn floats(bytes: &[u8]) -> Vec<f32> {
    bytes.chunks_exact(4).map(|b| f32::from_le_bytes(b.try_into().unwrap())).collect()
}

/// All fp32 tensors of a file by name, without `text_model.`, which some versions of the peer leave out.
fn tensors(path: &Path, prefix: &str) -> HashMap<String, Vec<f32>> {
    let bytes = std::fs::read(path).unwrap();
    let file = SafeTensors::deserialize(&bytes).unwrap();
    let tensors = file.tensors().into_iter().filter(|(_, t)| t.dtype() == safetensors::Dtype::F32);
    tensors.map(|(name, t)| (format!("{prefix}{name}").replace(".text_model.", "."), floats(t.data()))).collect()
}

fn weight_files(dir: &Path) -> Vec<PathBuf> {
    let Ok(entries) = std::fs::read_dir(dir) else { return Vec::new() };
    let files = entries.map(|e| e.unwrap().path());
    files.filter(|p| p.extension().is_some_and(|e| e == "safetensors")).collect()
}
