//! Every sampler against recorded trajectories of diffusers (tests/data/samplers, made by make.py there), and requests
//! that are wrong.

use super::{LatentShape, Sampler, SamplerConfig, SamplerKind};
use crate::Refusal;
use safetensors::SafeTensors;
use serde_json::{Value, json};
use std::path::{Path, PathBuf};

const SHAPE: LatentShape = LatentShape { pictures: 2, channels: 3, area: 12 };

/// Largest difference allowed of a latent, as a share of the root mean square of all latents of its call. Some 2e-6 is
/// the most that was seen.
const TOLERANCE: f64 = 1e-5;

fn data(file: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data/samplers").join(file)
}

fn floats(tensors: &SafeTensors, name: &str) -> Vec<f32> {
    let view = tensors.tensor(name).unwrap();
    view.data().chunks_exact(4).map(|b| f32::from_le_bytes(b.try_into().unwrap())).collect()
}

fn cases() -> Vec<Value> {
    serde_json::from_slice(&std::fs::read(data("cases.json")).unwrap()).unwrap()
}

fn sampler_of(case: &Value) -> Box<dyn Sampler> {
    let config = SamplerConfig::from_value(case["config"].clone()).unwrap();
    let config = config.with_eta(case["eta"].as_f64().unwrap()).unwrap();
    let kind: SamplerKind = case["kind"].as_str().unwrap().parse().unwrap();
    config.build(kind, case["steps"].as_u64().unwrap() as usize).unwrap()
}

/// The closed form that make.py has for a network: C channels, or 2C where the variance is learned.
fn network(sample: &[f32], t: f64, variance: &str, shape: LatentShape) -> Vec<f32> {
    let mut out = Vec::new();
    for picture in sample.chunks_exact(shape.picture()) {
        let channels = || picture.iter().enumerate().map(|(i, &x)| (f64::from(x), (i / shape.area) as f64));
        let wave = |(x, c): (f64, f64)| (0.9 * x + 0.003 * t - 0.3 * c).sin();
        out.extend(channels().map(|(x, c)| (0.7 * x + 0.5 * (1.3 * x + 0.002 * t + 0.4 * c).sin()) as f32));
        match variance {
            "learned_range" => out.extend(channels().map(|at| wave(at) as f32)),
            "learned" => out.extend(channels().map(|at| (0.02 + 0.01 * wave(at)) as f32)),
            _ => {}
        }
    }
    out
}

/// The sample after every call.
fn trajectory(case: &Value, start: &[f32], noises: &[&[f32]], shape: LatentShape) -> Vec<Vec<f32>> {
    let mut sampler = sampler_of(case);
    let variance = case["config"]["variance_type"].as_str().unwrap_or_default();
    let mut sample: Vec<f32> = start.iter().map(|x| x * sampler.initial_scale()).collect();
    let mut noises = noises.iter();
    let times = sampler.timesteps().to_vec();
    let mut states = Vec::new();
    for (call, &t) in times.iter().enumerate() {
        let prediction = network(&sampler.network_input(call, &sample), t, variance, shape);
        let noise = if sampler.wants_noise(call) { noises.next().copied() } else { None };
        sampler.step(call, &prediction, noise, shape, &mut sample).unwrap();
        states.push(sample.clone());
    }
    states
}

fn relative_difference(ours: &[f32], theirs: &[f32]) -> f64 {
    let square: f64 = theirs.iter().map(|&x| f64::from(x).powi(2)).sum();
    let scale = (square / theirs.len() as f64).sqrt();
    ours.iter().zip(theirs).map(|(&a, &b)| (f64::from(a) - f64::from(b)).abs() / scale).fold(0.0, f64::max)
}

#[test]
fn every_trajectory_is_diffusers() {
    let bytes = std::fs::read(data("trajectories.safetensors")).unwrap();
    let tensors = SafeTensors::deserialize(&bytes).unwrap();
    let (start, noise) = (floats(&tensors, "start"), floats(&tensors, "noise"));
    let noises: Vec<&[f32]> = noise.chunks_exact(SHAPE.numbers()).collect();
    let mut wrong = Vec::new();
    for case in &cases() {
        let name = case["name"].as_str().unwrap();
        let sampler = sampler_of(case);
        let times: Vec<f64> = case["timesteps"].as_array().unwrap().iter().map(|t| t.as_f64().unwrap()).collect();
        let same = |(a, b): (&f64, &f64)| (a - b).abs() <= 1e-6 * b.abs().max(1.0);
        assert_eq!(sampler.timesteps().len(), times.len(), "{name}");
        assert!(sampler.timesteps().iter().zip(&times).all(same), "{name}: {:?} {times:?}", sampler.timesteps());
        let scale = case["initial_scale"].as_f64().unwrap();
        assert!((f64::from(sampler.initial_scale()) / scale - 1.0).abs() < 1e-6, "{name}");
        let wanted = (0..times.len()).filter(|&call| sampler.wants_noise(call)).count();
        assert_eq!(wanted as u64, case["noises"].as_u64().unwrap(), "{name}");
        let ours = trajectory(case, &start, &noises, SHAPE);
        let theirs = floats(&tensors, name);
        let pairs = ours.iter().zip(theirs.chunks_exact(SHAPE.numbers()));
        let worst = pairs.map(|(ours, theirs)| relative_difference(ours, theirs)).fold(0.0, f64::max);
        println!("{worst:9.1e}  {name}");
        if worst.is_nan() || worst > TOLERANCE {
            wrong.push((name.to_owned(), worst));
        }
    }
    assert!(wrong.is_empty(), "{wrong:?}");
}

#[test]
fn a_picture_has_the_same_bits_alone_and_in_a_batch() {
    let bytes = std::fs::read(data("trajectories.safetensors")).unwrap();
    let tensors = SafeTensors::deserialize(&bytes).unwrap();
    let (start, noise) = (floats(&tensors, "start"), floats(&tensors, "noise"));
    let noises: Vec<&[f32]> = noise.chunks_exact(SHAPE.numbers()).collect();
    let alone = LatentShape { pictures: 1, ..SHAPE };
    for case in &cases() {
        let both = trajectory(case, &start, &noises, SHAPE);
        for picture in 0..SHAPE.pictures {
            let range = picture * SHAPE.picture()..(picture + 1) * SHAPE.picture();
            let noises: Vec<&[f32]> = noises.iter().map(|noise| &noise[range.clone()]).collect();
            let one = trajectory(case, &start[range.clone()], &noises, alone);
            let same = one.iter().zip(&both).all(|(one, both)| one[..] == both[range.clone()]);
            assert!(same, "{}: picture {picture}", case["name"]);
        }
    }
}

#[test]
fn every_class_has_its_sampler_and_others_are_sent_to_the_option() {
    let kind = |config: Value| SamplerConfig::from_value(config).unwrap().default_kind();
    for expected in SamplerKind::ALL.into_iter().filter(|&kind| kind != SamplerKind::Dpmpp2mSde) {
        assert_eq!(kind(json!({"_class_name": expected.class_name()})).unwrap(), expected);
    }
    let stochastic = json!({"_class_name": "DPMSolverMultistepScheduler", "algorithm_type": "sde-dpmsolver++"});
    assert_eq!(kind(stochastic).unwrap(), SamplerKind::Dpmpp2mSde);
    for config in [json!({"_class_name": "HeunDiscreteScheduler"}), json!({})] {
        let error = kind(config).unwrap_err();
        assert!(error.is::<Refusal>() && error.to_string().contains("--sampler: ddpm, ddim"), "{error}");
    }
    assert!(SamplerConfig::from_value(json!([1])).is_err());
    assert!(SamplerConfig::from_value(json!({})).unwrap().with_eta(1.5).is_err());
}

#[test]
fn a_file_that_is_wrong_is_refused_by_name() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("scheduler_config.json");
    for text in [None, Some("{"), Some("[]")] {
        if let Some(text) = text {
            std::fs::write(&path, text).unwrap();
        }
        let error = SamplerConfig::read(&path).unwrap_err();
        assert!(error.is::<Refusal>() && error.to_string().contains("scheduler_config.json"), "{error}");
    }
    std::fs::write(&path, r#"{"beta_schedule": "odd", "lambda_min_clipped": -Infinity}"#).unwrap();
    let error = SamplerConfig::read(&path).unwrap().build(SamplerKind::Dpmpp2m, 5).err().unwrap();
    assert!(error.to_string().contains("scheduler_config.json: dpm++2m: beta_schedule = \"odd\""), "{error}");
}

#[test]
fn settings_that_cannot_be_are_refused() {
    use SamplerKind::*;
    let zero_snr = json!({"rescale_betas_zero_snr": true, "timestep_spacing": "trailing", "clip_sample": false});
    let cases = [
        (Ddim, json!({}), 0, "0 sampling steps"),
        (Ddim, json!({}), 1001, "1001 sampling steps"),
        (Pndm, json!({}), 1001, "num_train_timesteps"),
        (Euler, json!({"timestep_spacing": "leading"}), 1001, "num_train_timesteps"),
        (Dpmpp2m, json!({}), 1001, "Ask for fewer"),
        (Euler, json!({}), 1_000_000_000_000, "Ask for 100000 at most"),
        (UniPc, json!({"timestep_spacing": "leading"}), 1000, "Ask for fewer"),
        (Ddpm, json!({"steps_offset": 1}), 1000, "steps_offset"),
        (Pndm, json!({}), 3, "skip_prk_steps"),
        (Pndm, json!({"prediction_type": "sample"}), 5, "\"sample\""),
        (EulerAncestral, json!({"prediction_type": "sample"}), 5, "\"sample\""),
        (Ddim, json!({"prediction_type": "flow_prediction"}), 5, "flow_prediction"),
        (Ddpm, zero_snr.clone(), 5, "rescale_betas_zero_snr"),
        (Ddim, zero_snr, 5, "rescale_betas_zero_snr"),
        (Ddpm, json!({"variance_type": "fixed_large_log"}), 5, "fixed_large_log"),
        (Ddpm, json!({"thresholding": true, "sample_max_value": 0}), 5, "sample_max_value"),
        (Ddpm, json!({"clip_sample": "yes"}), 5, "clip_sample"),
        (Ddpm, json!({"trained_betas": [0.1, 0.2]}), 2, "trained_betas"),
        (Euler, json!({"timestep_spacing": "even"}), 5, "\"trailing\""),
        (Euler, json!({"use_karras_sigmas": true, "use_beta_sigmas": true}), 5, "use_beta_sigmas"),
        (Euler, json!({"use_karras_sigmas": true, "sigma_min": 0}), 5, "sigma_min"),
        (Dpmpp2m, json!({"algorithm_type": "dpmsolver"}), 5, "final_sigmas_type"),
        (Dpmpp2m, json!({"use_flow_sigmas": true}), 5, "use_flow_sigmas"),
        (Dpmpp2m, json!({"solver_order": 4}), 5, "solver_order"),
        (Dpmpp2m, json!({"lambda_min_clipped": 99}), 5, "lambda_min_clipped"),
        (
            Dpmpp2mSde,
            json!({"algorithm_type": "dpmsolver", "solver_order": 3, "final_sigmas_type": "sigma_min"}),
            5,
            "third order",
        ),
        (UniPc, json!({"predict_x0": false}), 5, "final_sigmas_type"),
        (UniPc, json!({"lower_order_final": false}), 5, "final_sigmas_type"),
        (UniPc, json!({"solver_p": {}}), 5, "solver_p"),
        (UniPc, json!({"disable_corrector": 3}), 5, "disable_corrector"),
    ];
    for (kind, config, steps, named) in cases {
        let text = format!("{kind} {config} {steps}");
        let error = SamplerConfig::from_value(config).unwrap().build(kind, steps).err().expect(&text);
        assert!(error.is::<Refusal>() && error.to_string().contains(named), "{text}: {error}");
    }
}

#[test]
fn as_many_steps_as_training_had_can_be_asked_for() {
    for kind in SamplerKind::ALL {
        let config = SamplerConfig::from_value(json!({"skip_prk_steps": true})).unwrap();
        for steps in [61, 999] {
            let sampler = config.build(kind, steps).unwrap();
            let more = usize::from(kind == SamplerKind::Pndm);
            assert_eq!(sampler.timesteps().len(), steps + more, "{kind}");
            assert!(sampler.timesteps().iter().all(|t| (0.0..1000.0).contains(t)), "{kind}");
        }
    }
}

#[test]
fn wrong_arguments_of_a_step_are_errors() {
    let config = SamplerConfig::from_value(json!({"variance_type": "learned_range"})).unwrap();
    let values = vec![0.1; 2 * SHAPE.numbers()];
    let mut sampler = config.build(SamplerKind::Ddpm, 3).unwrap();
    let full = SHAPE.numbers();
    // call, numbers in the prediction, in the noise and in the sample, what the error speaks of
    for (call, prediction, noise, numbers, named) in [
        (3, 2 * full, full, full, "call 3"),
        (0, full - 1, full, full, "prediction"),
        (0, full, full, full, "variance_type"),
        (0, 2 * full, 0, full, "needs noise"),
        (0, 2 * full, 5, full, "noise"),
        (0, 2 * full, full, 4, "latents"),
    ] {
        let noise = (noise > 0).then(|| &values[..noise]);
        let mut sample = values[..numbers].to_vec();
        let error = sampler.step(call, &values[..prediction], noise, SHAPE, &mut sample).unwrap_err();
        assert!(error.to_string().contains(named), "{error}");
    }
    for kind in [SamplerKind::Pndm, SamplerKind::Dpmpp2m, SamplerKind::UniPc] {
        let mut sampler = config.build(kind, 5).unwrap();
        let mut sample = values[..full].to_vec();
        assert!(sampler.step(1, &values[..full], None, SHAPE, &mut sample).is_err(), "{kind}");
    }
}
