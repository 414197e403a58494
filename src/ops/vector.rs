//! The inner loops' ground: functions of one f32 that a compiler turns into vector code, the choice of the processor's
//! widest vectors at run time, and half-precision numbers read and written in pieces. No tensors, no threads.
//!
//! Note: one result on every processor. Every function here is a fixed sequence of IEEE operations with explicit fused
//! multiply-adds and without branches, so vectors of 4, 8 or 16 give the same bits as one number at a time. Sums have
//! a fixed number of lanes for the same reason.

use half::slice::HalfFloatSliceExt;
use half::{bf16, f16};

use super::transpose::{SQUARE, transpose};
use crate::device::Element;

/// How many numbers an op holds as f32 at a time, between reading and writing the activations' dtype.
pub const PIECE: usize = 1024;

/// Runs `work` compiled for the widest vectors of this processor. `work` and all it calls must be `inline(always)`.
#[inline(always)]
pub fn simd<R>(work: impl FnOnce() -> R) -> R {
    #[cfg(target_arch = "x86_64")]
    {
        if is_x86_feature_detected!("avx512f")
            && is_x86_feature_detected!("avx512bw")
            && is_x86_feature_detected!("avx512dq")
            && is_x86_feature_detected!("avx512vl")
        {
            // SAFETY: the processor has just been asked for each of the features.
            return unsafe { with_avx512(work) };
        }
        if is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma") {
            // SAFETY: as above.
            return unsafe { with_avx2(work) };
        }
    }
    work()
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,fma,f16c")]
fn with_avx512<R>(work: impl FnOnce() -> R) -> R {
    work()
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,fma")]
fn with_avx2<R>(work: impl FnOnce() -> R) -> R {
    work()
}

/// Memory for `len` results whose values are arbitrary until written: an op writes every one before anyone reads.
/// (Zeroing first would cost a pass over memory, as much as a pointwise op itself.)
pub fn unwritten<T: Element>(len: usize) -> Vec<T> {
    let mut values = std::mem::ManuallyDrop::new(Vec::<T>::with_capacity(len));
    // SAFETY: pointer and capacity are this vector's own, which is not used again; every bit pattern is a valid
    // float, and each op writes all `len` elements before it hands the vector out.
    unsafe { Vec::from_raw_parts(values.as_mut_ptr(), len, values.capacity()) }
}

/// An activation dtype whose numbers can be read and written as f32 in pieces.
pub trait Real: Element {
    /// `source` as f32: itself if it is, else converted into `scratch`, which is at least as long.
    fn read<'a>(source: &'a [Self], scratch: &'a mut [f32]) -> &'a [f32];
    /// `source` itself if it is f32.
    fn direct(source: &[Self]) -> Option<&[f32]>;
    /// to[column][row] = from[row][column], rows of `from` and of `to` being that many numbers apart.
    fn transpose(from: &[Self], from_stride: usize, size: (usize, usize), to: &mut [Self], to_stride: usize) {
        let (rows, columns) = size;
        for row in (0..rows).step_by(SQUARE) {
            let high = SQUARE.min(rows - row);
            for column in 0..columns {
                let from = from[row * from_stride + column..].iter().step_by(from_stride);
                to[column * to_stride + row..][..high].iter_mut().zip(from).for_each(|(to, &from)| *to = from);
            }
        }
    }
    /// Lets `fill` write all of `target` as f32, directly or by way of `scratch`, rounding to nearest even.
    fn write(target: &mut [Self], scratch: &mut [f32], fill: impl FnOnce(&mut [f32]));
}

impl Real for f32 {
    #[inline(always)]
    fn read<'a>(source: &'a [Self], _scratch: &'a mut [f32]) -> &'a [f32] {
        source
    }
    #[inline(always)]
    fn direct(source: &[Self]) -> Option<&[f32]> {
        Some(source)
    }
    fn transpose(from: &[Self], from_stride: usize, size: (usize, usize), to: &mut [Self], to_stride: usize) {
        transpose(from, from_stride, size, to, to_stride)
    }
    #[inline(always)]
    fn write(target: &mut [Self], _scratch: &mut [f32], fill: impl FnOnce(&mut [f32])) {
        fill(target)
    }
}

impl Real for bf16 {
    #[inline(always)]
    fn read<'a>(source: &'a [Self], scratch: &'a mut [f32]) -> &'a [f32] {
        let scratch = &mut scratch[..source.len()];
        for (to, from) in scratch.iter_mut().zip(source) {
            *to = f32::from_bits((from.to_bits() as u32) << 16);
        }
        scratch
    }
    #[inline(always)]
    fn direct(_source: &[Self]) -> Option<&[f32]> {
        None
    }
    #[inline(always)]
    fn write(target: &mut [Self], scratch: &mut [f32], fill: impl FnOnce(&mut [f32])) {
        let scratch = &mut scratch[..target.len()];
        fill(scratch);
        for (to, from) in target.iter_mut().zip(scratch.iter()) {
            let bits = from.to_bits();
            let rounded = bits.wrapping_add(0x7fff + ((bits >> 16) & 1)) >> 16;
            // A NaN must not be rounded up to infinity.
            *to = bf16::from_bits(if from.is_nan() { (bits >> 16) | 0x40 } else { rounded } as u16);
        }
    }
}

impl Real for f16 {
    #[inline(always)]
    fn read<'a>(source: &'a [Self], scratch: &'a mut [f32]) -> &'a [f32] {
        let scratch = &mut scratch[..source.len()];
        source.convert_to_f32_slice(scratch);
        scratch
    }
    #[inline(always)]
    fn direct(_source: &[Self]) -> Option<&[f32]> {
        None
    }
    #[inline(always)]
    fn write(target: &mut [Self], scratch: &mut [f32], fill: impl FnOnce(&mut [f32])) {
        let scratch = &mut scratch[..target.len()];
        fill(scratch);
        target.convert_from_f32_slice(scratch);
    }
}

/// e^x to 1.1 ulp, with the right infinities, zeros and subnormals.
///
/// x = n ln 2 + r with |r| <= ln(2)/2; e^r by a polynomial of degree 6 (minimax, relative error 3e-9).
#[inline(always)]
pub fn exp(x: f32) -> f32 {
    /// 1.5 * 2^23: adding it rounds to an integer, which then stands in the low bits.
    const ROUND: f32 = 12_582_912.0;
    const LN2_HIGH: f32 = std::f32::consts::LN_2;
    const LN2_LOW: f32 = -1.904_654_3e-9;
    let x = x.clamp(-104.0, 89.0);
    let shifted = x.mul_add(std::f32::consts::LOG2_E, ROUND);
    let n = shifted - ROUND;
    let r = n.mul_add(-LN2_LOW, n.mul_add(-LN2_HIGH, x));
    let mut p = 0.001_381_446_7f32;
    p = p.mul_add(r, 0.008_368_781);
    p = p.mul_add(r, 0.041_668_393);
    p = p.mul_add(r, 0.166_665_2);
    p = p.mul_add(r, 0.499_999_94);
    let p = (r * r).mul_add(p, r) + 1.0;
    // Two factors, as 2^n itself may be out of range.
    let n = (shifted.to_bits() as i32).wrapping_sub(ROUND.to_bits() as i32);
    let half = n >> 1;
    p * power_of_two(half) * power_of_two(n.wrapping_sub(half))
}

#[inline(always)]
fn power_of_two(n: i32) -> f32 {
    f32::from_bits((n.wrapping_add(127) << 23) as u32)
}

/// 1 / (1 + e^-x).
#[inline(always)]
pub fn sigmoid(x: f32) -> f32 {
    1.0 / (1.0 + exp(-x))
}

/// The normal distribution's integral up to x and its density at x, each with a small *relative* error in both tails.
///
/// The tail is erfc(z)/2 with z = |x|/sqrt(2), and erfc(z) = e^(-z^2) t P(t) with t = 1/(1 + 0.35 z); P is a minimax
/// polynomial of degree 9 on z <= 10 (relative error 1e-8).
#[inline(always)]
pub fn normal(x: f32) -> (f32, f32) {
    const P: [f32; 10] = [
        0.038_401_056,
        -0.158_928_29,
        0.181_461_22,
        -0.027_705_591,
        0.087_018_67,
        0.146_042_26,
        0.151_186_15,
        0.187_902_4,
        0.197_138_35,
        0.197_483_78,
    ];
    // Beyond, both are zero in f32; the clamp keeps the square finite.
    let a = x.abs().min(15.0);
    let square = a * a;
    let lost = a.mul_add(a, -square);
    let e = exp(-0.5 * square);
    let e = e.mul_add(-0.5 * lost, e);
    let t = 1.0 / (0.35 * std::f32::consts::FRAC_1_SQRT_2).mul_add(a, 1.0);
    let mut p = P[0];
    for &c in &P[1..] {
        p = p.mul_add(t, c);
    }
    let tail = 0.5 * e * (p * t);
    let below = if x < 0.0 { tail } else { 1.0 - tail };
    (below, e * 0.398_942_3)
}

/// Lanes of a sum: few enough for short rows, too many to be unrolled into single numbers, which LLVM would not turn
/// into vectors again.
const LANES: usize = 64;

/// N sums over equally long inputs at once: each adds up its part of `f` of the M numbers at a place. 64 f32 lanes within
/// each piece of 1,024, the pieces in f64.
#[inline(always)]
pub fn sums<const M: usize, const N: usize>(inputs: [&[f32]; M], f: impl Fn([f32; M]) -> [f32; N]) -> [f64; N] {
    let len = inputs[0].len();
    let inputs = inputs.map(
        #[inline(always)]
        |x| &x[..len],
    );
    let mut totals = [0f64; N];
    for start in (0..len).step_by(PIECE) {
        let pieces = inputs.map(
            #[inline(always)]
            |x| x[start..(start + PIECE).min(len)].as_chunks::<LANES>(),
        );
        let mut lanes = [[0f32; LANES]; N];
        for i in 0..pieces[0].0.len() {
            let chunks = pieces.map(
                #[inline(always)]
                |(whole, _)| &whole[i],
            );
            for j in 0..LANES {
                let terms = f(chunks.map(
                    #[inline(always)]
                    |chunk| chunk[j],
                ));
                for n in 0..N {
                    lanes[n][j] += terms[n];
                }
            }
        }
        for j in 0..pieces[0].1.len() {
            let terms = f(pieces.map(
                #[inline(always)]
                |(_, rest)| rest[j],
            ));
            for n in 0..N {
                lanes[n][j] += terms[n];
            }
        }
        for (total, lanes) in totals.iter_mut().zip(lanes) {
            *total += fold(lanes) as f64;
        }
    }
    totals
}

/// The lanes' sum, in a tree.
#[inline(always)]
fn fold(mut lanes: [f32; LANES]) -> f32 {
    let mut width = LANES / 2;
    while width > 0 {
        for j in 0..width {
            lanes[j] += lanes[j + width];
        }
        width /= 2;
    }
    lanes[0]
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Distance in units of the last place of the right result.
    fn ulps(got: f32, want: f64) -> f64 {
        let unit = (want.abs().max(f32::MIN_POSITIVE as f64)).log2().floor() - 23.0;
        (got as f64 - want).abs() / unit.exp2()
    }

    #[test]
    fn exp_is_right_to_an_ulp_and_at_the_ends() {
        let mut worst = 0f64;
        for i in 0..2_000_000 {
            let x = -104.0 + i as f32 * (192.7 / 2e6);
            worst = worst.max(ulps(exp(x), (x as f64).exp()));
        }
        assert!(worst < 1.1, "{worst} ulp");
        assert_eq!(exp(0.0), 1.0);
        assert_eq!((exp(f32::NEG_INFINITY), exp(-110.0)), (0.0, 0.0));
        assert_eq!((exp(f32::INFINITY), exp(88.8)), (f32::INFINITY, f32::INFINITY));
        assert!(exp(f32::NAN).is_nan());
    }

    /// erfc by its continued fraction or its series, in f64.
    fn erfc(z: f64) -> f64 {
        if z < 2.5 {
            let (mut term, mut sum) = (z, z);
            for n in 1..200 {
                term *= -z * z / n as f64;
                sum += term / (2 * n + 1) as f64;
            }
            return 1.0 - sum * 2.0 / std::f64::consts::PI.sqrt();
        }
        let mut tail = 0.0;
        for k in (1..200).rev() {
            tail = k as f64 / 2.0 / (z + tail);
        }
        (-z * z).exp() / std::f64::consts::PI.sqrt() / (z + tail)
    }

    #[test]
    fn the_normal_distribution_is_right_in_both_tails() {
        for i in 0..=200_000 {
            let x = -10.0 + i as f32 * 1e-4;
            let (below, density) = normal(x);
            let z = x as f64 / std::f64::consts::SQRT_2;
            let want = if z < 0.0 { 0.5 * erfc(-z) } else { 1.0 - 0.5 * erfc(z) };
            assert!((below as f64 - want).abs() <= 4e-7 * want, "Phi({x}) = {below}, not {want}");
            let want = (-0.5 * (x as f64).powi(2)).exp() / (2.0 * std::f64::consts::PI).sqrt();
            assert!((density as f64 - want).abs() <= 2e-7 * want, "phi({x}) = {density}, not {want}");
        }
        assert_eq!((normal(40.0), normal(-1e30)), ((1.0, 0.0), (0.0, 0.0)));
    }

    #[test]
    fn vectors_and_single_numbers_give_the_same_bits() {
        let x: Vec<f32> = (0..1000).map(|i| (i as f32 - 500.0) * 0.173).collect();
        let mut wide = vec![0f32; x.len()];
        simd(
            #[inline(always)]
            || {
                for (y, &x) in wide.iter_mut().zip(&x) {
                    *y = exp(x) + normal(x).0;
                }
            },
        );
        let narrow: Vec<f32> = x.iter().map(|&x| std::hint::black_box(exp(x)) + normal(x).0).collect();
        assert_eq!(wide, narrow);
        let sum = simd(
            #[inline(always)]
            || sums([&x, &wide], |[x, y]| [x * 0.1, x.mul_add(y, 1.0)]),
        );
        assert_eq!(sum, sums([&x, &wide], |[x, y]| [std::hint::black_box(x) * 0.1, x.mul_add(y, 1.0)]));
    }

    #[test]
    fn halves_round_as_their_crate_does() {
        let x: Vec<f32> =
            (0..3000).map(|i| (i as f32 - 1500.0).powi(3) * 1.234e-3).chain([f32::NAN, f32::MAX]).collect();
        let (mut scratch, mut brain, mut half) =
            (vec![0f32; x.len()], vec![bf16::ZERO; x.len()], vec![f16::ZERO; x.len()]);
        bf16::write(&mut brain, &mut scratch, |to| to.copy_from_slice(&x));
        f16::write(&mut half, &mut scratch, |to| to.copy_from_slice(&x));
        for (i, &x) in x.iter().enumerate() {
            assert_eq!(brain[i].to_bits(), bf16::from_f32(x).to_bits());
            assert_eq!(half[i].to_bits(), f16::from_f32(x).to_bits());
        }
        assert_eq!(bf16::read(&brain, &mut scratch)[7], brain[7].to_f32());
        assert_eq!(f16::read(&half, &mut scratch)[7], half[7].to_f32());
    }
}
