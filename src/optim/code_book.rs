//! The 256 numbers that 8-bit moments are made of, bitsandbytes' dynamic maps to the bit, and a table that finds the
//! nearest one in one look.

use std::sync::LazyLock;

/// The code of 0.0 in the signed book; in the unsigned one it is 0.
pub const ZERO_OF_M: u8 = 127;

/// Which code book: that of first moments or that of second ones.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Book {
    Signed,
    Unsigned,
}

/// A code book and how to find its numbers.
pub struct CodeBook {
    /// What each code stands for, ascending.
    pub values: [f32; 256],
    /// See [`CodeBook::steps_below`].
    table: Vec<u32>,
    /// The bits of the smallest f32 that the table knows; there are no steps below it.
    pub lowest: u32,
}

static SIGNED: LazyLock<CodeBook> = LazyLock::new(|| CodeBook::dynamic(true));
static UNSIGNED: LazyLock<CodeBook> = LazyLock::new(|| CodeBook::dynamic(false));

impl Book {
    pub fn codes(self) -> &'static CodeBook {
        match self {
            Book::Signed => &SIGNED,
            Book::Unsigned => &UNSIGNED,
        }
    }
}

/// Magnitudes that share their upper bits are looked up together: sign, exponent and seven bits of the fraction.
pub const SHARED: i32 = 16;
/// The bits of 1.0, the largest magnitude of a scaled number.
pub const ONE: u32 = 0x3f80_0000;

impl CodeBook {
    /// The dynamic map (Dettmers, "8-Bit Approximations for Parallelism in Deep Learning", 2016): seven decades up to 1,
    /// each cut into twice as many equal steps as the one below, of which the middles are the numbers; and 0 and 1.
    fn dynamic(signed: bool) -> Self {
        let mut numbers = vec![0.0, 1.0];
        for decade in 0..7 {
            let steps = if signed { 1 << decade } else { 2 << decade };
            let scale = 10f64.powi(decade - 6) as f32;
            let middle = |i: usize| (evenly(i, steps) + evenly(i + 1, steps)) / 2.0;
            for number in (0..steps).map(|i| scale * middle(i)) {
                numbers.push(number);
                if signed {
                    numbers.push(-number);
                }
            }
        }
        numbers.sort_unstable_by(f32::total_cmp);
        let zero = if signed { usize::from(ZERO_OF_M) } else { 0 };
        // The negative half mirrors the positive one.
        let borders = numbers[zero..].windows(2).map(|pair| ((pair[0] + pair[1]) / 2.0).to_bits());
        let (lowest, table) = table(&borders.collect::<Vec<_>>());
        CodeBook { values: std::array::from_fn(|i| numbers[i]), table, lowest }
    }

    /// For each run of magnitudes with the same upper bits, from `lowest` to 1.0: below, in 8 bits, how many borders
    /// between neighbouring numbers lie below the run; above, the lower bits of the one border in it, or those that no
    /// number lies above.
    pub fn steps_below(&self) -> &[u32] {
        &self.table
    }
}

/// The table for ascending borders (bits of f32), and its lowest number.
fn table(borders: &[u32]) -> (u32, Vec<u32>) {
    const LOWER: u32 = (1 << SHARED) - 1;
    let runs = borders[0] >> SHARED..=ONE >> SHARED;
    let entry = |run: u32| {
        let below = borders.iter().filter(|&&border| border >> SHARED < run).count() as u32;
        let border = borders.iter().find(|&&border| border >> SHARED == run);
        border.map_or(LOWER, |border| border & LOWER) << 8 | below
    };
    (borders[0] & !LOWER, runs.map(entry).collect())
}

/// Point `i` of `0.1..=1` cut into `steps`, with the rounding of `torch.linspace` in f32: a multiple of the rounded step
/// from the nearer end, rounded once.
fn evenly(i: usize, steps: usize) -> f32 {
    let (start, end) = (0.1f32, 1.0f32);
    let step = f64::from((end - start) / steps as f32);
    // The products are exact in f64, and so are the sums.
    if i < steps.div_ceil(2) {
        (f64::from(start) + step * i as f64) as f32
    } else {
        (f64::from(end) - step * (steps - i) as f64) as f32
    }
}
