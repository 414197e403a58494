//! What a picture is and what decoding it takes, from its file, before anything is decoded. Plans count on these numbers:
//! a photograph of 24 megapixels takes more than many a small network.

use super::jpeg;
use super::orientation::{self, Orientation};
use image::{ImageDecoder, ImageFormat};
use std::io::Cursor;

/// Decoders' own small things: tables, lines. Of a JPEG or WebP file.
const SMALL: usize = 16 << 10;
/// The same of a PNG file.
const INFLATING: usize = 20 << 10;
/// What a JPEG file has beside its coded pixels, and a small one's share of uneven noise.
const MADE: usize = 1 << 10;

/// A picture that is not decoded yet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Header {
    /// As stored.
    width: usize,
    height: usize,
    orientation: Orientation,
    /// Bytes at most while it is decoded, the file's own among them.
    decoding: usize,
    /// Bytes that it then has, as stored.
    decoded: usize,
}

impl Header {
    /// `bytes`: the whole file, since orientations may stand at its end. Nothing if it is none that [`super::decode`] knows.
    pub(super) fn read(bytes: &[u8]) -> Option<Header> {
        match image::guess_format(bytes).ok()? {
            ImageFormat::Png => png(bytes),
            ImageFormat::Jpeg => jpeg(bytes),
            ImageFormat::WebP => webp(bytes),
            _ => None,
        }
    }

    /// A photograph that is not there yet, by its upright size: JPEG with colours at half the resolution, turned as cameras
    /// leave one for which they were held upright, in a file of a quarter of its pixels.
    pub(super) fn photograph((width, height): (usize, usize)) -> Header {
        let stored = (height, width);
        Self::of_jpeg(stored, Orientation::QUARTER, 3 * width * height / 4, jpeg::bytes_of_frame(stored, 2))
    }

    /// A picture that the run itself will make: JPEG with all its colours. Noise of nothing but black and white fills such
    /// a file with as many bytes as it has itself (1.02 times as many at 64², 0.97 at 512²).
    pub(super) fn made(size: (usize, usize)) -> Header {
        Self::of_jpeg(size, Orientation::UPRIGHT, 3 * size.0 * size.1 + MADE, jpeg::bytes_of_frame(size, 1))
    }

    /// `frame`: what decoding takes beside the `file`, if the decoder of this crate does it.
    fn of_jpeg((width, height): (usize, usize), orientation: Orientation, file: usize, frame: Option<usize>) -> Header {
        let rgb = 3 * width * height;
        let decoding = match frame {
            Some(bytes) => file + bytes.max(file),
            // The other decoder keeps its copy, has coefficients of two bytes if the file is progressive, and the pixels.
            None => 2 * file + 3 * rgb,
        };
        Header { width, height, orientation, decoding: decoding + SMALL, decoded: rgb }
    }

    /// (width, height) of the upright picture.
    pub(super) fn size(&self) -> (usize, usize) {
        if self.orientation.swaps_sides() { (self.height, self.width) } else { (self.width, self.height) }
    }

    /// The most bytes that are in use at a time until there is an upright picture.
    pub(super) fn decoding_bytes(&self) -> usize {
        let turning = if self.orientation.is_upright() { 0 } else { self.decoded + self.rgb() };
        self.decoding.max(turning)
    }

    /// Bytes that the upright picture has.
    pub(super) fn decoded_bytes(&self) -> usize {
        if self.orientation.is_upright() { self.decoded } else { self.rgb() }
    }

    fn rgb(&self) -> usize {
        3 * self.width * self.height
    }
}

fn jpeg(bytes: &[u8]) -> Option<Header> {
    // Has its own copy of the file, and is gone before the pixels come.
    let mut decoder = image::codecs::jpeg::JpegDecoder::new(Cursor::new(bytes)).ok()?;
    let (width, height) = decoder.dimensions();
    let orientation = of(&mut decoder)?;
    Some(Header::of_jpeg((width as usize, height as usize), orientation, bytes.len(), jpeg::bytes_at_most(bytes)))
}

fn png(bytes: &[u8]) -> Option<Header> {
    let mut decoder = png::Decoder::new(Cursor::new(bytes));
    decoder.set_transformations(png::Transformations::EXPAND);
    let mut reader = decoder.read_info().ok()?;
    let raw = reader.output_buffer_size()?;
    let (color, _) = reader.output_color_type();
    // Pixels may be damaged; that is told where they are decoded.
    let _ = reader.finish();
    let info = reader.info();
    let (width, height) = (info.width as usize, info.height as usize);
    let (file, rgb) = (bytes.len() + INFLATING, 3 * width * height);
    let (stays, most) = inflated(info.raw_row_length(), height);
    let grey = color.samples() < 3;
    let inflating = file + raw + most;
    let (decoding, decoded) = if grey { (inflating.max(file + raw + stays + rgb), rgb) } else { (inflating, raw) };
    Some(Header { width, height, orientation: orientation::of_png(info), decoding, decoded })
}

/// What has been inflated of a PNG file's `height` rows of `row` bytes and waits for its turn, in the memory of the crate
/// `png`, which doubles: at the end, and at most, while there are the old and the new.
fn inflated(row: usize, height: usize) -> (usize, usize) {
    const KEPT: usize = 128 << 10;
    let begin = (row * height.min(128)).next_multiple_of(256).min(KEPT);
    // Rows that are done are dropped once they are so many; inflating looks back 32 KiB and goes on 8 KiB at a time.
    let needed = (KEPT.max((4 * row).next_multiple_of(64)) + row + (40 << 10)).min(row * height);
    let (mut capacity, mut most) = (begin, begin);
    while capacity < needed {
        (capacity, most) = (2 * capacity, 3 * capacity);
    }
    (capacity, most)
}

fn webp(bytes: &[u8]) -> Option<Header> {
    let mut decoder = image::codecs::webp::WebPDecoder::new(Cursor::new(bytes)).ok()?;
    let (width, height) = decoder.dimensions();
    let (width, height) = (width as usize, height as usize);
    let pixels = width * height;
    let file = bytes.len();
    let decoded = pixels * usize::from(decoder.color_type().bytes_per_pixel());
    let alpha = decoded == 4 * pixels;
    // Macroblocks of 16 pixels with two planes of a quarter of their size.
    let blocks = width.div_ceil(16) * height.div_ceil(16);
    let planes = 384 * blocks;
    // The coded part is read into memory that doubles, and copied; then comes a growing list of what each block is.
    let lossy = |coded: usize| planes + coded + coded.next_power_of_two().max(45 * blocks.next_power_of_two());
    let mut around = 0;
    for (name, chunk) in chunks(bytes) {
        around = around.max(match name {
            b"VP8 " => lossy(chunk.len()),
            b"VP8L" => {
                if alpha {
                    0
                } else {
                    4 * pixels
                }
            }
            // Decoded as a picture of its own, if it is coded at all, while the planes are there.
            b"ALPH" => planes + pixels + if chunk.first().is_some_and(|kind| kind & 3 == 1) { 4 * pixels } else { 0 },
            // A frame that may be as large as the whole, and the canvas it is put on.
            b"ANMF" => lossy(chunk.len()) + 8 * pixels,
            _ => 0,
        });
    }
    let orientation = of(&mut decoder)?;
    Some(Header { width, height, orientation, decoding: file + decoded + around + SMALL, decoded })
}

fn of(decoder: &mut impl ImageDecoder) -> Option<Orientation> {
    let (exif, xmp) = (decoder.exif_metadata().ok()?, decoder.xmp_metadata().ok()?);
    Some(orientation::find(exif.as_deref(), xmp.as_deref()))
}

/// The chunks of a WebP file: names and contents.
fn chunks(bytes: &[u8]) -> impl Iterator<Item = (&[u8; 4], &[u8])> {
    let mut at = 12;
    std::iter::from_fn(move || {
        let (name, rest) = bytes.get(at..)?.split_first_chunk::<4>()?;
        let (length, rest) = rest.split_first_chunk::<4>()?;
        let length = u32::from_le_bytes(*length) as usize;
        // Chunks are padded to even lengths.
        at += 8 + length.next_multiple_of(2);
        Some((name, rest.get(..length)?))
    })
}
