//! Against the ops on the CPU, and where the mean is large against f64.

use super::*;
use crate::kernels::testing::{DTYPES, Expected, Memory, devices, expected};
use crate::ops;
use crate::ops::testing::{close, numbers, weight};

const F32: DType = DType::F32;

fn values(seed: u64, len: usize) -> Vec<f64> {
    numbers(seed, len).iter().map(|&x| x.into()).collect()
}

/// Gamma and beta as `weight` makes them of seeds 11 and 12.
fn weights(len: usize) -> [Vec<f64>; 2] {
    [11, 12].map(|seed| values(seed, len).iter().map(|x| f64::from(*x as f32 + 0.5)).collect())
}

struct Run {
    y: Vec<f64>,
    dx: Vec<f64>,
    dgamma: Vec<f64>,
    dbeta: Vec<f64>,
}

/// Both directions by the wrappers; the gradients of the weights begin at 0.25.
fn run(
    dtype: DType,
    skip: usize,
    [x, dy]: [&[f64]; 2],
    [gamma, beta]: &[Vec<f64>; 2],
    moments: usize,
    forward: &dyn Fn(Forward) -> Result<()>,
    backward: &dyn Fn(Backward) -> Result<()>,
) -> Run {
    let [x, dy, gamma, beta] = [x, dy, gamma, beta].map(|numbers| Memory::new(dtype, numbers, skip));
    let len = x.get().len();
    let [y, dx, dx_frozen] = [(); 3].map(|()| Memory::unwritten(dtype, len, skip));
    let moments = Memory::unwritten(F32, moments / 4, 0);
    let [dgamma, dbeta] = [(); 2].map(|()| Memory::new(F32, &vec![0.25; gamma.get().len()], 1));
    let (x, gamma, beta, moments) = (x.address(), gamma.address(), beta.address(), moments.address());
    forward(Forward { x, gamma, beta, y: y.address(), moments }).unwrap();
    let on = Backward {
        x,
        dy: dy.address(),
        gamma,
        beta,
        moments,
        dx: dx.address(),
        dgamma: dgamma.address(),
        dbeta: dbeta.address(),
    };
    backward(on).unwrap();
    backward(Backward { dx: dx_frozen.address(), dgamma: Address::NULL, dbeta: Address::NULL, ..on }).unwrap();
    assert_eq!(dx.get(), dx_frozen.get());
    Run { y: y.get(), dx: dx.get(), dgamma: dgamma.get(), dbeta: dbeta.get() }
}

fn compare(run: &Run, want: &Expected, grads: [Vec<f32>; 2], tolerance: f64, what: &str) {
    close(&run.y, &want.y, tolerance, &format!("{what} y"));
    close(&run.dx, &want.gradients[0], tolerance, &format!("{what} dx"));
    // A sum of many numbers of both signs is much smaller than what it is rounded with.
    let terms = (want.y.len() / run.dgamma.len()) as f64;
    let tolerance = 1e-5 * (terms.sqrt() / 64.0).max(1.0);
    let [dgamma, dbeta] = grads.map(|grad| grad.iter().map(|&g| f64::from(g) + 0.25).collect::<Vec<_>>());
    close(&run.dgamma, &dgamma, tolerance, &format!("{what} dgamma"));
    close(&run.dbeta, &dbeta, tolerance, &format!("{what} dbeta"));
}

fn group(device: &dyn Launcher, dtype: DType, tolerance: f64, norm: GroupNorm, skip: usize) {
    let norm = GroupNorm { dtype, ..norm };
    let shape = [norm.batch, norm.channels, norm.pixels];
    let [gamma, beta] = [11, 12].map(|seed| weight(seed, &[norm.channels], dtype, 0.5).unwrap());
    let op =
        |x: &[candle_core::Tensor]| ops::group_norm(&x[0], &gamma, &beta, norm.groups, norm.eps, norm.silu).unwrap();
    let (inputs, want) = expected(dtype, &[&shape], &op);
    let forward = |on| norm.forward(device, on);
    let backward = |on| norm.backward(device, on);
    let x_dy = [&inputs[0][..], &want.dy];
    let run = run(dtype, skip, x_dy, &weights(norm.channels), norm.moments_bytes(), &forward, &backward);
    compare(&run, &want, [gamma.grad(), beta.grad()], tolerance, &format!("{norm:?} after {skip}"));
}

fn group_norm(batch: usize, channels: usize, groups: usize, pixels: usize, silu: bool) -> GroupNorm {
    GroupNorm { dtype: F32, batch, channels, groups, pixels, eps: 1e-5, silu }
}

#[test]
fn groups_of_all_shapes_and_alignments_are_the_cpus() {
    for device in devices() {
        for (dtype, tolerance) in DTYPES {
            for (norm, skip) in [
                (group_norm(2, 8, 2, 32, true), 0),
                (group_norm(2, 8, 2, 32, false), 0),
                (group_norm(2, 8, 2, 32, true), 1),
                (group_norm(1, 6, 3, 15, true), 0),
                (group_norm(3, 10, 5, 8, false), 0),
                (group_norm(2, 4, 1, 1, true), 0),
                (group_norm(2, 12, 2, 36, false), 0),
                // Teams of several warps and several turns.
                (group_norm(1, 42, 2, 1024, true), 0),
            ] {
                group(device, dtype, tolerance, norm, skip);
            }
        }
    }
}

/// More than the registers of a block hold, and more than a block should read.
#[test]
fn large_groups_are_the_cpus() {
    let Some(&device) = devices().first() else { return };
    for norm in [group_norm(2, 4, 4, 160 * 160, true), group_norm(1, 2, 1, 128 * 128 + 4, false)] {
        group(device, F32, 1e-5, norm, 0);
    }
    group(device, DType::F16, 1e-3, group_norm(1, 2, 1, 210 * 480, true), 0);
    group(device, DType::BF16, 8e-3, group_norm(1, 2, 1, 111 * 111, true), 0);
}

#[test]
fn a_large_mean_takes_no_digits_away() {
    let reference = |x: &[f64]| {
        let mean = x.iter().sum::<f64>() / x.len() as f64;
        let variance = x.iter().map(|x| (x - mean) * (x - mean)).sum::<f64>() / x.len() as f64;
        x.iter().map(|x| (x - mean) / (variance + 1e-5).sqrt()).collect::<Vec<_>>()
    };
    let Some(&device) = devices().first() else { return };
    for pixels in [320, 77, 128 * 128 * 2] {
        let x: Vec<f64> = values(3, pixels).iter().map(|x| f64::from(*x as f32 + 1000.0)).collect();
        let [x_memory, one, zero] = [(&x[..], 1.0), (&[1.0], 1.0), (&[0.0], 0.0)].map(|(x, _)| Memory::new(F32, x, 0));
        let (y, moments) = (Memory::unwritten(F32, pixels, 0), Memory::unwritten(F32, 2, 0));
        let on = Forward {
            x: x_memory.address(),
            gamma: one.address(),
            beta: zero.address(),
            y: y.address(),
            moments: moments.address(),
        };
        group_norm(1, 1, 1, pixels, false).forward(device, on).unwrap();
        close(&y.get(), &reference(&x), 2e-4, "group");
        let ones = Memory::new(F32, &vec![1.0; pixels], 0);
        let zeros = Memory::new(F32, &vec![0.0; pixels], 0);
        let on = Forward { gamma: ones.address(), beta: zeros.address(), ..on };
        LayerNorm { dtype: F32, rows: 1, width: pixels, eps: 1e-5 }.forward(device, on).unwrap();
        close(&y.get(), &reference(&x), 2e-4, "layer");
    }
}

fn layer(device: &dyn Launcher, dtype: DType, tolerance: f64, rows: usize, width: usize, skip: usize) {
    let norm = LayerNorm { dtype, rows, width, eps: 1e-5 };
    let [gamma, beta] = [11, 12].map(|seed| weight(seed, &[width], dtype, 0.5).unwrap());
    let op = |x: &[candle_core::Tensor]| ops::layer_norm(&x[0], &gamma, &beta, norm.eps).unwrap();
    let (inputs, want) = expected(dtype, &[&[rows, width]], &op);
    let forward = |on| norm.forward(device, on);
    let backward = |on| norm.backward(device, on);
    let run = run(dtype, skip, [&inputs[0], &want.dy], &weights(width), norm.moments_bytes(), &forward, &backward);
    compare(&run, &want, [gamma.grad(), beta.grad()], tolerance, &format!("{norm:?} after {skip}"));
}

#[test]
fn rows_of_all_widths_and_alignments_are_the_cpus() {
    for device in devices() {
        for (dtype, tolerance) in DTYPES {
            // Narrow, medium, wide, and what has no packs.
            for (rows, width, skip) in
                [(37, 320, 0), (1, 8, 0), (9, 768, 0), (5, 1280, 0), (3, 1288, 0), (70, 77, 0), (3, 5, 0), (3, 64, 1)]
            {
                layer(device, dtype, tolerance, rows, width, skip);
            }
        }
    }
    let Some(&device) = devices().first() else { return };
    layer(device, F32, 1e-5, 2, 7001, 0);
}

#[test]
fn teams_suit_the_shape() {
    let teams = |channels, pixels| GroupNorm { dtype: DType::BF16, ..group_norm(1, channels, 1, pixels, true) }.teams();
    // 64 pixels are 8 packs, 4096 are 512.
    assert_eq!(teams(40, 64).unwrap().team, 8);
    assert_eq!(teams(10, 4096), Some(Teams { threads: 512, team: 256 }));
    assert_eq!(teams(4, 512 * 512), None);
    assert!(group_norm(1, 5, 2, 3, false).check().is_err());
}
