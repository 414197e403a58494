//! What a data set's pictures take in memory, from their files' headers: what is kept of each, and what making that of it
//! takes meanwhile.

use super::crop::{center, fit};
use super::decode;
use super::header::Header;
use super::resize;
use super::{DatasetOptions, Row};
use std::ops::Range;
use std::path::Path;

/// Of one picture.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Footprint {
    /// (width, height) of the resized picture.
    pub resized: (usize, usize),
    /// Bytes of the part that crops are taken from.
    pub kept: usize,
    /// Bytes at most while the file is read, decoded and resized.
    pub decoding: usize,
}

/// The part of a picture that crops are taken from: the resized picture's (width, height), and the columns and rows of it.
#[derive(Clone, Debug)]
pub(super) struct Part {
    pub resized: (usize, usize),
    pub columns: Range<usize>,
    pub rows: Range<usize>,
}

impl Part {
    pub(super) fn of(size: (usize, usize), options: &DatasetOptions, row: Row) -> Part {
        let r = options.resolution;
        let (width, height) = fit(size, r);
        let (mut columns, mut rows) = (0..width, 0..height);
        if options.center_crop {
            let (top, left) = (center(height - r), center(width - r));
            rows = top..top + r;
            // The middle of a mirrored picture of even width over an odd one begins a column further.
            let mirrored = if options.random_flip && row == Row::Instance { width - r - left } else { left };
            columns = left.min(mirrored)..left.max(mirrored) + r;
        }
        Part { resized: (width, height), columns, rows }
    }

    pub(super) fn bytes(&self) -> usize {
        3 * self.columns.len() * self.rows.len()
    }
}

impl Footprint {
    /// Nothing if the file cannot be read as a picture: what is wrong with it is told where it is decoded.
    pub fn read(path: &Path, options: &DatasetOptions, row: Row) -> Option<Footprint> {
        let bytes = decode::read(path).ok()?;
        Some(Self::of(&Header::read(&bytes)?, options, row))
    }

    pub(super) fn of(header: &Header, options: &DatasetOptions, row: Row) -> Footprint {
        let size = header.size();
        let part = Part::of(size, options, row);
        let Part { resized, columns, rows } = part.clone();
        let resizing = resize::bytes_at_most(size, resized, columns, rows, options.interpolation);
        let decoding = header.decoding_bytes().max(header.decoded_bytes() + resizing);
        Footprint { resized, kept: part.bytes(), decoding }
    }

    /// Of a photograph that is not there yet, by its upright size.
    pub fn of_photograph(size: (usize, usize), options: &DatasetOptions, row: Row) -> Footprint {
        Self::of(&Header::photograph(size), options, row)
    }

    /// Of a picture that the run itself will make, of the run's resolution.
    pub fn of_made(options: &DatasetOptions, row: Row) -> Footprint {
        Self::of(&Header::made((options.resolution, options.resolution)), options, row)
    }
}
