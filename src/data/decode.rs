//! Image files to upright 8-bit RGB pictures, as Pillow's `open`, `exif_transpose` and `convert("RGB")` make them: PNG,
//! JPEG and WebP, told apart by their contents, not their names. Resizing and cropping are elsewhere.

use super::orientation::{self, Orientation};
use anyhow::{Context, Result, bail};
use image::{ColorType, ImageDecoder, ImageFormat, Limits};
use std::io::Cursor;
use std::path::Path;

/// An 8-bit RGB picture, rows from top to bottom.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Picture {
    pub width: usize,
    pub height: usize,
    /// (height, width, 3).
    pub rgb: Vec<u8>,
}

/// No picture may take more memory than this while it is decoded; a larger one is damaged or not a photograph.
const LARGEST: u64 = 2 << 30;

const DAMAGED_JPEG: &str = "it is a damaged JPEG file";
const DAMAGED_WEBP: &str = "it is a WebP file that is damaged or truncated";

/// A whole file. An error's text says what is wrong with it, without naming it.
pub(super) fn read(path: &Path) -> Result<Vec<u8>> {
    let unreadable = |e| anyhow::anyhow!("it cannot be read: {e}");
    // A pipe would be waited for.
    if !std::fs::metadata(path).map_err(unreadable)?.is_file() {
        bail!("it is not a file");
    }
    std::fs::read(path).map_err(unreadable)
}

/// Decodes a file's contents, which go before the picture is turned upright: [`super::header`] tells beforehand what all of
/// this takes, and has to follow what is done here. Errors as those of [`read`].
pub(super) fn decode(bytes: Vec<u8>) -> Result<Picture> {
    let (picture, orientation) = match image::guess_format(&bytes) {
        Ok(ImageFormat::Png) => png(&bytes).context("it is a PNG file that is damaged or truncated")?,
        Ok(ImageFormat::Jpeg) => {
            if !jpeg_is_whole(&bytes) {
                bail!("it is a JPEG file that is truncated");
            }
            let decoder = image::codecs::jpeg::JpegDecoder::new(Cursor::new(&bytes[..])).context(DAMAGED_JPEG)?;
            // Coefficients of two bytes if the file is progressive, and the pixels.
            fits(&decoder, 3)?;
            jpeg(&bytes, decoder).context(DAMAGED_JPEG)?
        }
        Ok(ImageFormat::WebP) => {
            if !riff_is_whole(&bytes) {
                bail!("it is a WebP file that is truncated");
            }
            let decoder = image::codecs::webp::WebPDecoder::new(Cursor::new(&bytes)).context(DAMAGED_WEBP)?;
            // The pixels, and those of a frame or of planes that they are made of.
            fits(&decoder, 2)?;
            through_image(decoder).context(DAMAGED_WEBP)?
        }
        // As telephones keep their photographs, often under a name that ends in .jpg.
        Ok(ImageFormat::Avif) => bail!("it is an AVIF file, not PNG, JPEG or WebP"),
        _ if is_heif(&bytes) => bail!("it is a HEIC file, not PNG, JPEG or WebP"),
        Ok(other) => {
            bail!("it is a {} file, not PNG, JPEG or WebP", other.extensions_str().first().unwrap_or(&"foreign"))
        }
        Err(_) if bytes.is_empty() => bail!("it is empty"),
        Err(_) => bail!("its contents are not those of an image"),
    };
    drop(bytes);
    Ok(orientation.upright(picture))
}

/// Whether a file is a picture in HEIF's container (ISO/IEC 23008-12): a box "ftyp" with one of its brands comes first.
fn is_heif(bytes: &[u8]) -> bool {
    bytes.get(4..8) == Some(b"ftyp")
        && matches!(bytes.get(8..12), Some(b"heic" | b"heix" | b"hevc" | b"mif1" | b"msf1"))
}

/// Refuses a picture whose header asks for more than [`LARGEST`], before anything is made room for. `times`: as many of
/// its pixels' bytes are held at once. What our own JPEG decoder takes, at four bytes a sample, is never refused.
fn fits(decoder: &impl ImageDecoder, times: u64) -> Result<()> {
    let (width, height) = decoder.dimensions();
    let needed = decoder.total_bytes().saturating_mul(times);
    if needed > LARGEST {
        let size = |bytes: u64| bytesize::ByteSize(bytes).display().iec();
        bail!(
            "its header says {width}x{height} pixels, which would take {} of memory, and no picture may take more than {}",
            size(needed),
            size(LARGEST)
        );
    }
    Ok(())
}

fn through_image(mut decoder: impl ImageDecoder) -> Result<(Picture, Orientation)> {
    let mut limits = Limits::default();
    limits.max_alloc = Some(LARGEST);
    decoder.set_limits(limits)?;
    let (exif, xmp) = (decoder.exif_metadata()?, decoder.xmp_metadata()?);
    let orientation = orientation::find(exif.as_deref(), xmp.as_deref());
    let (width, height) = decoder.dimensions();
    let color = decoder.color_type();
    let mut bytes = vec![0u8; usize::try_from(decoder.total_bytes())?];
    decoder.read_image(&mut bytes)?;
    let channels = match color {
        ColorType::L8 => 1,
        ColorType::La8 => 2,
        ColorType::Rgb8 => 3,
        ColorType::Rgba8 => 4,
        other => bail!("pixels of type {other:?}"),
    };
    Ok((Picture::new(width as usize, height as usize, channels, bytes), orientation))
}

/// `of_metadata` has a copy of the file, and so is not kept while our own decoder works.
fn jpeg<'a>(
    bytes: &'a [u8],
    mut of_metadata: image::codecs::jpeg::JpegDecoder<Cursor<&'a [u8]>>,
) -> Result<(Picture, Orientation)> {
    let (exif, xmp) = (of_metadata.exif_metadata()?, of_metadata.xmp_metadata()?);
    drop(of_metadata);
    match super::jpeg::decode(bytes, LARGEST) {
        Some(picture) => Ok((picture, orientation::find(exif.as_deref(), xmp.as_deref()))),
        None => through_image(image::codecs::jpeg::JpegDecoder::new(Cursor::new(bytes))?),
    }
}

fn png(bytes: &[u8]) -> Result<(Picture, Orientation)> {
    let limits = png::Limits { bytes: usize::try_from(LARGEST)? };
    let mut decoder = png::Decoder::new_with_limits(Cursor::new(bytes), limits);
    decoder.set_transformations(png::Transformations::EXPAND);
    let mut reader = decoder.read_info()?;
    let size = reader.output_buffer_size().context("it is too large")?;
    anyhow::ensure!(size as u64 <= LARGEST, "it is too large");
    let mut data = vec![0u8; size];
    let frame = reader.next_frame(&mut data)?;
    data.truncate(frame.buffer_size());
    // The orientation may stand behind the pixels; what is wrong there does not touch them.
    let _ = reader.finish();
    let info = reader.info();
    if frame.bit_depth == png::BitDepth::Sixteen {
        // Pillow has no 16-bit colour and keeps the high byte; but 16-bit grey it holds as integers, and clips those.
        let grey = info.color_type == png::ColorType::Grayscale;
        for i in 0..data.len() / 2 {
            let (high, low) = (data[2 * i], data[2 * i + 1]);
            data[i] = if !grey {
                high
            } else if high > 0 {
                255
            } else {
                low
            };
        }
        data.truncate(data.len() / 2);
    }
    let picture = Picture::new(frame.width as usize, frame.height as usize, frame.color_type.samples(), data);
    Ok((picture, orientation::of_png(info)))
}

impl Picture {
    /// Drops alpha (in place) and repeats grey. `pixels`: (height, width, channels), grey, grey+alpha, RGB or RGBA.
    fn new(width: usize, height: usize, channels: usize, mut pixels: Vec<u8>) -> Self {
        let rgb = match channels {
            1 | 2 => pixels.chunks_exact(channels).flat_map(|p| [p[0]; 3]).collect(),
            3 => pixels,
            _ => {
                for i in 0..width * height {
                    pixels.copy_within(4 * i..4 * i + 3, 3 * i);
                }
                pixels.truncate(3 * width * height);
                pixels
            }
        };
        Picture { width, height, rgb }
    }
}

/// Whether a WebP file is as long as its RIFF header says; an animation's first picture would decode without the rest.
fn riff_is_whole(bytes: &[u8]) -> bool {
    let stated = bytes.get(4..8).map(|b| u32::from_le_bytes([b[0], b[1], b[2], b[3]]));
    stated.is_some_and(|length| bytes.len() as u64 >= u64::from(length) + 8)
}

/// Whether a JPEG file goes on to its end marker; decoders fill what is missing with grey instead of failing.
fn jpeg_is_whole(bytes: &[u8]) -> bool {
    const END: u8 = 0xD9;
    let mut at = 2;
    loop {
        // Up to the next marker: a byte 0xFF and one that is neither stuffing, a restart, nor fill.
        let Some(found) = bytes.get(at..).and_then(|rest| {
            rest.windows(2).position(|pair| pair[0] == 0xFF && !matches!(pair[1], 0x00 | 0xD0..=0xD7 | 0xFF))
        }) else {
            return false;
        };
        at += found + 2;
        match bytes[at - 1] {
            END => return true,
            0x01 | 0xD8 => {}
            _ => match bytes.get(at..at + 2) {
                Some(length) => at += usize::from(u16::from_be_bytes([length[0], length[1]])),
                None => return false,
            },
        }
    }
}
