//! A picture's file: PNG with what made it in a text chunk, whole or absent.

use std::fs::{self, File};
use std::io::BufWriter;
use std::path::Path;

use anyhow::{Context, Result};
use image::RgbImage;

/// The text chunk's key, under which other programs look for the parameters, too.
const KEY: &str = "parameters";

/// Writes `image` to `path`, with `text` in an iTXt chunk named `parameters`. The file is written beside under another
/// name first, so that it is never there in part.
pub fn write_png(path: &Path, image: &RgbImage, text: Option<&str>) -> Result<()> {
    let name = path.file_name().context("a picture's path has a file name")?.to_string_lossy();
    let aside = path.with_file_name(format!(".writing-{name}"));
    let written = encode(&aside, image, text)
        .and_then(|()| fs::rename(&aside, path).map_err(anyhow::Error::from))
        .with_context(|| format!("writing {}", path.display()));
    if written.is_err() {
        // Best effort: the error that led here is the one to report.
        let _ = fs::remove_file(&aside);
    }
    written
}

fn encode(path: &Path, image: &RgbImage, text: Option<&str>) -> Result<()> {
    let mut out = BufWriter::new(File::create(path)?);
    let mut encoder = png::Encoder::new(&mut out, image.width(), image.height());
    encoder.set_color(png::ColorType::Rgb);
    encoder.set_depth(png::BitDepth::Eight);
    if let Some(text) = text {
        encoder.add_itxt_chunk(KEY.to_string(), text.to_string())?;
    }
    let mut writer = encoder.write_header()?;
    writer.write_image_data(image.as_raw())?;
    writer.finish()?;
    let file = out.into_inner().map_err(|error| error.into_error())?;
    Ok(file.sync_all()?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_picture_comes_back_with_its_text() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("00000.png");
        let image = RgbImage::from_fn(5, 3, |x, y| image::Rgb([x as u8 * 50, y as u8 * 80, 7]));
        write_png(&path, &image, Some("ein Bär\nSteps: 20")).unwrap();
        assert_eq!(image::open(&path).unwrap().into_rgb8(), image);
        let reader = png::Decoder::new(std::io::BufReader::new(File::open(&path).unwrap())).read_info().unwrap();
        let chunk = &reader.info().utf8_text[0];
        assert_eq!((chunk.keyword.as_str(), chunk.get_text().unwrap().as_str()), (KEY, "ein Bär\nSteps: 20"));
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1);
        assert!(write_png(&dir.path().join("no/where.png"), &image, None).is_err());
    }
}
