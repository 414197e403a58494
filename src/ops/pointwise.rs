//! Loops over whole tensors, one number at a time: in pieces, as f32, on all threads.

use super::cpu::for_parts;
use super::vector::{PIECE, Real, simd, unwritten};

/// Elements a thread takes at a time.
const PART: usize = 1 << 14;

/// y[i] = f(x[i]). `f` is `inline(always)` and without branches.
pub fn map<T: Real>(x: &[T], f: impl Fn(f32) -> f32 + Sync + Send) -> Vec<T> {
    let mut y = unwritten::<T>(x.len());
    let parts: Vec<_> = y.chunks_mut(PART).zip(x.chunks(PART)).collect();
    for_parts(parts, x.len(), |_, (y, x)| {
        simd(
            #[inline(always)]
            || {
                let (mut s, mut t) = ([0f32; PIECE], [0f32; PIECE]);
                for (y, x) in y.chunks_mut(PIECE).zip(x.chunks(PIECE)) {
                    let x = T::read(x, &mut s);
                    T::write(
                        y,
                        &mut t,
                        #[inline(always)]
                        |y| y.iter_mut().zip(x).for_each(|(y, &x)| *y = f(x)),
                    );
                }
            },
        );
    });
    y
}

/// y[i] = f(a[i], b[i]); `a` and `b` are equally long. `f` as in [`map`].
pub fn map2<T: Real>(a: &[T], b: &[T], f: impl Fn(f32, f32) -> f32 + Sync + Send) -> Vec<T> {
    assert_eq!(a.len(), b.len(), "operands of different length");
    let mut y = unwritten::<T>(a.len());
    let parts: Vec<_> = y.chunks_mut(PART).zip(a.chunks(PART)).zip(b.chunks(PART)).collect();
    for_parts(parts, a.len(), |_, ((y, a), b)| {
        simd(
            #[inline(always)]
            || {
                let (mut s, mut t, mut u) = ([0f32; PIECE], [0f32; PIECE], [0f32; PIECE]);
                for ((y, a), b) in y.chunks_mut(PIECE).zip(a.chunks(PIECE)).zip(b.chunks(PIECE)) {
                    let (a, b) = (T::read(a, &mut s), T::read(b, &mut t));
                    T::write(
                        y,
                        &mut u,
                        #[inline(always)]
                        |y| y.iter_mut().zip(a.iter().zip(b)).for_each(|(y, (&a, &b))| *y = f(a, b)),
                    );
                }
            },
        );
    });
    y
}
