//! Entropy-coded data: bits, Huffman codes, and the coefficients of a block in sequential and progressive scans
//! (ITU-T T.81, F.2 and G.2).

/// From a coefficient's place in the file to its place in the block.
pub(super) const ZIGZAG: [usize; 64] = [
    0, 1, 8, 16, 9, 2, 3, 10, 17, 24, 32, 25, 18, 11, 4, 5, 12, 19, 26, 33, 40, 48, 41, 34, 27, 20, 13, 6, 7, 14, 21,
    28, 35, 42, 49, 56, 57, 50, 43, 36, 29, 22, 15, 23, 30, 37, 44, 51, 58, 59, 52, 45, 38, 31, 39, 46, 53, 60, 61, 54,
    47, 55, 62, 63,
];

/// A component's blocks, row by row, each 64 quantised coefficients in natural order.
pub(super) struct Coefficients {
    blocks_wide: usize,
    blocks: usize,
    values: Vec<[i16; 64]>,
}

impl Coefficients {
    /// None yet: [`Self::zero`] makes them.
    pub(super) fn new(blocks_wide: usize, blocks_high: usize) -> Self {
        Coefficients { blocks_wide, blocks: blocks_wide * blocks_high, values: Vec::new() }
    }

    pub(super) fn zero(&mut self) {
        self.values = vec![[0; 64]; self.blocks];
    }

    pub(super) fn bytes(&self) -> usize {
        size_of::<[i16; 64]>() * self.blocks
    }

    pub(super) fn block(&self, x: usize, y: usize) -> &[i16; 64] {
        &self.values[y * self.blocks_wide + x]
    }

    pub(super) fn block_mut(&mut self, x: usize, y: usize) -> &mut [i16; 64] {
        &mut self.values[y * self.blocks_wide + x]
    }
}

/// Reads bits, undoing byte stuffing; beyond a marker or the end there are zeros, as for libjpeg.
pub(super) struct Bits<'a> {
    data: &'a [u8],
    at: usize,
    /// The next bits, from the top; `held` of them are valid.
    window: u64,
    held: u32,
}

impl<'a> Bits<'a> {
    pub(super) fn new(data: &'a [u8]) -> Self {
        Bits { data, at: 0, window: 0, held: 0 }
    }

    fn fill(&mut self) {
        while self.held <= 56 {
            let byte = match self.data[self.at.min(self.data.len())..] {
                [0xFF, 0x00, ..] => {
                    self.at += 2;
                    0xFF
                }
                [0xFF, ..] | [] => 0,
                [byte, ..] => {
                    self.at += 1;
                    byte
                }
            };
            self.window |= u64::from(byte) << (56 - self.held);
            self.held += 8;
        }
    }

    /// The next `n` bits, 1 … 16, without taking them.
    fn peek(&mut self, n: u32) -> usize {
        if self.held < n {
            self.fill();
        }
        (self.window >> (64 - n)) as usize
    }

    fn take(&mut self, n: u32) {
        self.window <<= n;
        self.held -= n;
    }

    fn bits(&mut self, n: u32) -> i32 {
        if n == 0 {
            return 0;
        }
        let value = self.peek(n);
        self.take(n);
        value as i32
    }

    /// A number of `n` bits whose first bit says its sign (T.81, F.2.2.1).
    fn signed(&mut self, n: u32) -> i32 {
        let value = self.bits(n);
        if n > 0 && value < 1 << (n - 1) { value - (1 << n) + 1 } else { value }
    }

    /// Goes behind the restart marker that must be next.
    pub(super) fn restart(&mut self) -> Option<()> {
        (self.window, self.held) = (0, 0);
        while self.data.get(self.at..)?.starts_with(&[0xFF, 0xFF]) {
            self.at += 1;
        }
        match self.data.get(self.at..)? {
            [0xFF, 0xD0..=0xD7, ..] => {
                self.at += 2;
                Some(())
            }
            _ => None,
        }
    }

    /// Bytes read, at most up to the next marker.
    pub(super) fn position(&self) -> usize {
        self.at
    }
}

/// A Huffman code with a table for its short words.
pub(super) struct Huffman {
    /// By the next `FAST` bits: (value, length), or length 0 for a longer word.
    fast: Vec<(u8, u8)>,
    /// By length: one more than the largest code, and what to add to a code for its place in `values`.
    limits: [i32; 17],
    offsets: [i32; 17],
    values: Vec<u8>,
}

const FAST: u32 = 9;

impl Huffman {
    /// `counts`: the number of words of each length 1 … 16; nothing if they are not those of a code.
    pub(super) fn new(counts: &[u8; 16], values: &[u8]) -> Option<Self> {
        let mut table =
            Huffman { fast: vec![(0, 0); 1 << FAST], limits: [0; 17], offsets: [0; 17], values: values.to_vec() };
        let (mut code, mut place) = (0i32, 0i32);
        for (length, &count) in (1u32..).zip(counts) {
            table.offsets[length as usize] = place - code;
            for _ in 0..count {
                if code >> length != 0 {
                    return None;
                }
                if length <= FAST {
                    let first = (code as usize) << (FAST - length);
                    let word = (values[place as usize], length as u8);
                    table.fast[first..first + (1 << (FAST - length))].fill(word);
                }
                (code, place) = (code + 1, place + 1);
            }
            table.limits[length as usize] = code;
            code <<= 1;
        }
        Some(table)
    }

    fn decode(&self, bits: &mut Bits) -> Option<u8> {
        let next = bits.peek(16);
        let (value, length) = self.fast[next >> (16 - FAST)];
        if length > 0 {
            bits.take(u32::from(length));
            return Some(value);
        }
        for length in FAST + 1..=16 {
            let code = (next >> (16 - length)) as i32;
            if code < self.limits[length as usize] {
                bits.take(length);
                return self.values.get((code + self.offsets[length as usize]) as usize).copied();
            }
        }
        None
    }
}

/// A scan under way.
pub(super) struct Scan<'a> {
    pub bits: Bits<'a>,
    pub progressive: bool,
    /// The band of coefficients, in the file's order.
    pub start: usize,
    pub end: usize,
    /// Successive approximation: the bit before (0 in a first scan) and this one.
    pub high: u8,
    pub low: u8,
    /// Blocks left in a run of ends of band.
    pub end_of_band: u32,
}

impl Scan<'_> {
    /// Decodes what the scan holds of a block; nothing if the data is damaged.
    pub(super) fn block(
        &mut self,
        block: &mut [i16; 64],
        dc: Option<&Huffman>,
        ac: Option<&Huffman>,
        prediction: &mut i32,
    ) -> Option<()> {
        match (self.progressive, self.start, self.high) {
            (false, ..) => {
                self.first_dc(block, dc?, prediction)?;
                self.sequential(block, ac?)
            }
            (true, 0, 0) => self.first_dc(block, dc?, prediction),
            (true, 0, _) => {
                block[0] |= (self.bits.bits(1) << self.low) as i16;
                Some(())
            }
            (true, _, 0) => self.first_ac(block, ac?),
            (true, ..) => self.refine_ac(block, ac?),
        }
    }

    fn first_dc(&mut self, block: &mut [i16; 64], table: &Huffman, prediction: &mut i32) -> Option<()> {
        let size = u32::from(table.decode(&mut self.bits)?);
        if size > 15 {
            return None;
        }
        *prediction = prediction.wrapping_add(self.bits.signed(size));
        block[0] = (*prediction << self.low) as i16;
        Some(())
    }

    fn sequential(&mut self, block: &mut [i16; 64], table: &Huffman) -> Option<()> {
        let mut k = 1;
        while k < 64 {
            let symbol = table.decode(&mut self.bits)?;
            let (run, size) = (usize::from(symbol >> 4), u32::from(symbol & 15));
            if size == 0 {
                if run < 15 {
                    break;
                }
                k += 16;
                continue;
            }
            k += run;
            *block.get_mut(*ZIGZAG.get(k)?)? = self.bits.signed(size) as i16;
            k += 1;
        }
        Some(())
    }

    fn first_ac(&mut self, block: &mut [i16; 64], table: &Huffman) -> Option<()> {
        if self.end_of_band > 0 {
            self.end_of_band -= 1;
            return Some(());
        }
        let mut k = self.start;
        while k <= self.end {
            let symbol = table.decode(&mut self.bits)?;
            let (run, size) = (u32::from(symbol >> 4), u32::from(symbol & 15));
            if size == 0 {
                if run < 15 {
                    self.end_of_band = (1 << run) - 1 + self.bits.bits(run) as u32;
                    break;
                }
                k += 16;
                continue;
            }
            k += run as usize;
            *block.get_mut(*ZIGZAG.get(k)?)? = (self.bits.signed(size) << self.low) as i16;
            k += 1;
        }
        Some(())
    }

    /// G.1.2.3: every coefficient that is not zero yet gets one more bit, and new ones appear between them.
    fn refine_ac(&mut self, block: &mut [i16; 64], table: &Huffman) -> Option<()> {
        let bit = 1i16 << self.low;
        let mut k = self.start;
        if self.end_of_band == 0 {
            while k <= self.end {
                let symbol = table.decode(&mut self.bits)?;
                let (mut run, size) = (u32::from(symbol >> 4), symbol & 15);
                let mut new = 0;
                match size {
                    0 if run < 15 => {
                        self.end_of_band = (1 << run) + self.bits.bits(run) as u32;
                        break;
                    }
                    0 => {}
                    _ => new = if self.bits.bits(1) == 1 { bit } else { -bit },
                }
                while k <= self.end {
                    let value = &mut block[ZIGZAG[k]];
                    k += 1;
                    if *value != 0 {
                        self.refine(value, bit);
                    } else if run == 0 {
                        *value = new;
                        break;
                    } else {
                        run -= 1;
                    }
                }
            }
        }
        if self.end_of_band > 0 {
            for &place in &ZIGZAG[k..=self.end.max(k.saturating_sub(1))] {
                if block[place] != 0 {
                    let mut value = block[place];
                    self.refine(&mut value, bit);
                    block[place] = value;
                }
            }
            self.end_of_band -= 1;
        }
        Some(())
    }

    fn refine(&mut self, value: &mut i16, bit: i16) {
        if self.bits.bits(1) == 1 && *value & bit == 0 {
            *value = value.wrapping_add(if *value > 0 { bit } else { -bit });
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_short_and_long_are_decoded_and_impossible_codes_refused() {
        // One word of each length up to 12: 0, 10, 110, …
        let mut counts = [0u8; 16];
        counts[..12].fill(1);
        let values: Vec<u8> = (1..=12).collect();
        let table = Huffman::new(&counts, &values).unwrap();
        // 1110 (4), 0 (1), 111111111110 (12), then all ones, which is no word.
        let mut bits = Bits::new(&[0b1110_0111, 0b1111_1111, 0x00, 0b0111_1111, 0xFF, 0x00, 0xFF, 0x00]);
        assert_eq!(table.decode(&mut bits), Some(4));
        assert_eq!(table.decode(&mut bits), Some(1));
        assert_eq!(table.decode(&mut bits), Some(12));
        assert_eq!(table.decode(&mut bits), None);
        assert!(Huffman::new(&[3; 16], &[0; 48]).is_none());
    }

    #[test]
    fn signed_numbers_and_zeros_beyond_a_marker() {
        let mut bits = Bits::new(&[0b0110_1000, 0xFF, 0xD9]);
        assert_eq!((bits.signed(3), bits.signed(3), bits.signed(0)), (-4, -5, 0));
        assert_eq!((bits.signed(2), bits.bits(16)), (-3, 0));
        assert_eq!(bits.position(), 1);
    }
}
