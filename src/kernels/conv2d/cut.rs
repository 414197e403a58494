//! How a convolution's products are cut into blocks' tiles, and their sums into parts.

use candle_core::DType;

/// Bytes of parts of sums that a convolution may have in scratch.
pub(super) const MOST_PARTS_BYTES: usize = 64 << 20;
/// Sums are cut into multiples of this.
pub(super) const DEPTH: usize = 32;
/// Parts are no shorter than this many times DEPTH.
const SHORTEST_PART: usize = 8;

/// What a kernel works on: a product of (rows, depth) and (depth, columns).
#[derive(Clone, Copy, Debug)]
pub(super) struct Product {
    pub rows: usize,
    pub columns: usize,
    pub depth: usize,
}

/// A block's part of the result, by the kernel whose name has this word in it.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Tile {
    pub name: &'static str,
    pub rows: usize,
    pub columns: usize,
    /// Multiply-adds that a busy multiprocessor of an A100 does with it in a cycle. Estimated from what the loops read of
    /// shared memory for each instruction of the tensor cores, which could do 1024; only ratios count.
    speed: usize,
}

const fn tile(name: &'static str, rows: usize, columns: usize, speed: usize) -> Tile {
    Tile { name, rows, columns, speed }
}

/// Of gathered products.
pub(super) const GATHERED: [Tile; 2] = [tile("large", 128, 128, 600), tile("small", 64, 64, 400)];
/// Of copied ones: pixels; weights of one tap; weights of nine taps, whose columns are sixteen channels'.
pub(super) const PIXELS: [Tile; 3] =
    [tile("large", 128, 128, 900), tile("wide", 64, 128, 800), tile("small", 64, 64, 600)];
pub(super) const COLUMNS: [Tile; 2] = [tile("large", 128, 128, 900), tile("small", 64, 64, 600)];
pub(super) const TAPS: [Tile; 2] = [tile("large", 128, 144, 850), tile("small", 64, 144, 750)];

/// Depths that a block's beginning and end take as long as.
const ENDS: usize = 96;
/// Cycles that adding up parts takes, in a launch of its own: at least, and of a multiprocessor for each number of each part.
const ADDING: [f64; 2] = [4000.0, 0.5];
/// A block that has a multiprocessor to itself waits more.
const ALONE: f64 = 1.3;

/// How a product is cut.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Cut {
    pub tile: Tile,
    pub parts: usize,
    /// Depth of a part.
    pub part: usize,
}

impl Product {
    fn tiles(&self, tile: Tile) -> usize {
        self.rows.div_ceil(tile.rows) * self.columns.div_ceil(tile.columns)
    }

    /// The most parts that are worth anything and fit into scratch.
    fn most_parts(&self) -> usize {
        let bytes = 4 * self.rows * self.columns;
        (self.depth / (SHORTEST_PART * DEPTH)).min(MOST_PARTS_BYTES / bytes.max(1)).max(1)
    }

    fn in_parts(&self, tile: Tile, wanted: usize) -> Cut {
        let part = self.depth.div_ceil(wanted).next_multiple_of(DEPTH).max(DEPTH);
        Cut { tile, parts: self.depth.div_ceil(part).max(1), part }
    }

    /// Of a gathered product: large tiles where there are enough of them for the device; parts where not even small ones are.
    pub fn cut_gathered(&self, dtype: DType, multiprocessors: usize) -> Cut {
        let [large, small] = GATHERED;
        let are_enough = self.rows > 64 && self.columns > 64 && self.tiles(large) >= multiprocessors;
        let tile = if dtype != DType::F32 && are_enough { large } else { small };
        let wanted = (2 * multiprocessors / self.tiles(tile).max(1)).clamp(1, self.most_parts());
        self.in_parts(tile, wanted)
    }

    /// The cut of these tiles, into so many parts, that should take least.
    pub fn cut(&self, tiles: &[Tile], multiprocessors: usize) -> Cut {
        // More parts than fill a device several times over gain nothing.
        let most = self.most_parts().min(8 * multiprocessors);
        let cuts = tiles.iter().flat_map(|&tile| (1..=most).map(move |parts| self.in_parts(tile, parts)));
        let cycles = |cut: &Cut| self.cycles(cut, multiprocessors);
        cuts.min_by(|a, b| cycles(a).total_cmp(&cycles(b))).unwrap_or_else(|| self.in_parts(tiles[0], 1))
    }

    /// About how many cycles a cut takes on a device of so many multiprocessors.
    fn cycles(&self, cut: &Cut, multiprocessors: usize) -> f64 {
        let Cut { tile, parts, part } = *cut;
        let each = (self.tiles(tile) * parts).div_ceil(multiprocessors);
        let waiting = if each == 1 { ALONE } else { 1.0 };
        let multiplying = (each * tile.rows * tile.columns * (part + ENDS)) as f64 / tile.speed as f64 * waiting;
        let [at_least, each_number] = ADDING;
        let numbers = (parts * self.rows * self.columns) as f64 / multiprocessors as f64;
        multiplying + if parts > 1 { at_least + each_number * numbers } else { 0.0 }
    }

    /// Scratch for the parts, none if there is one only.
    pub fn parts_bytes(&self, cut: Cut) -> usize {
        if cut.parts == 1 { 0 } else { 4 * cut.parts * self.rows * self.columns }
    }
}
