//! The folder that pictures go to: what it may hold before, how files are called, and what is written in them.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use image::RgbImage;
use image::imageops::replace;

use super::plan::Plan;
use crate::sample::{Picture, write_png};
use crate::{Refusal, config};

pub const GRID: &str = "grid.png";
pub const LATENTS: &str = "latents.safetensors";
/// Sides of a PNG are 31-bit numbers; viewers give up long before.
const WIDEST_GRID: u64 = 1 << 16;

/// Refuses a folder that holds pictures unless these may be replaced, and one that cannot be written.
pub fn check(dir: &Path, overwrite: bool) -> Result<()> {
    let names = fs::read_dir(dir).into_iter().flatten().flatten();
    let mut found: Vec<String> =
        names.map(|entry| entry.file_name().to_string_lossy().into_owned()).filter(|name| is_ours(name)).collect();
    found.sort();
    if !overwrite && let Some(first) = found.first() {
        let more = if found.len() > 1 { format!(" and {} more", found.len() - 1) } else { String::new() };
        return Err(Refusal::error(format!(
            "--out {}: the folder holds pictures ({first}{more}): name another one, or let them be replaced (--overwrite)",
            dir.display()
        )));
    }
    config::can_write(dir).map_err(|error| Refusal::error(format!("--out {}: {error}", dir.display())))
}

/// What this command leaves.
fn is_ours(name: &str) -> bool {
    let number = name.strip_suffix(".png").filter(|stem| stem.len() == 5);
    name == GRID || name == LATENTS || number.is_some_and(|stem| stem.bytes().all(|b| b.is_ascii_digit()))
}

/// `00000.png` and so on.
pub fn file(dir: &Path, picture: &Picture) -> PathBuf {
    dir.join(format!("{:05}.png", picture.number))
}

/// What made a picture, in the form that other programs look for under this name.
pub fn parameters(plan: &Plan, picture: &Picture, seed: u64) -> String {
    let settings = &plan.settings;
    let (height, width) = plan.size;
    let mut text = plan.prompts.texts[picture.prompt].clone();
    let negative = &plan.prompts.texts[picture.negative];
    if settings.guided() && !negative.is_empty() {
        text.push_str(&format!("\nNegative prompt: {negative}"));
    }
    let seed = match &plan.given {
        Some(_) => format!("Start: {}", plan.latents_name()),
        None => format!("Seed: {seed}"),
    };
    text.push_str(&format!(
        "\nSteps: {}, Sampler: {}, CFG scale: {}, {seed}, Picture: {}, Size: {width}x{height}, ",
        settings.steps, settings.sampler, settings.guidance_scale, picture.number
    ));
    if settings.guidance_rescale > 0.0 {
        text.push_str(&format!("CFG rescale: {}, ", settings.guidance_rescale));
    }
    text.push_str(&format!("Precision: {}, Model: {}, ", plan.dtype_name(), plan.model.name));
    text.push_str(concat!("Version: dblaunch ", env!("CARGO_PKG_VERSION")));
    text
}

/// Puts all pictures into one: a row for each prompt, or nearly as many rows as columns if there is only one.
pub fn write_grid(dir: &Path, pictures: &[Picture], prompts: usize) -> Result<()> {
    let columns = match prompts {
        1 => pictures.len().isqrt() + usize::from(pictures.len().isqrt().pow(2) < pictures.len()),
        prompts => pictures.len() / prompts,
    };
    let mut grid = RgbImage::new(0, 0);
    for (i, picture) in pictures.iter().enumerate() {
        let path = file(dir, picture);
        let image = image::open(&path).with_context(|| path.display().to_string())?.into_rgb8();
        if i == 0 {
            let (columns, rows) = (columns as u32, pictures.len().div_ceil(columns) as u32);
            grid = RgbImage::new(columns * image.width(), rows * image.height());
        }
        let (x, y) = ((i % columns) as u32 * image.width(), (i / columns) as u32 * image.height());
        replace(&mut grid, &image, x.into(), y.into());
    }
    write_png(&dir.join(GRID), &grid, None)
}

/// Refuses grids that no program would show.
pub fn check_grid(pictures: usize, prompts: usize, (height, width): (usize, usize)) -> Result<()> {
    let columns = if prompts == 1 { pictures.isqrt() + 1 } else { pictures / prompts };
    let rows = pictures.div_ceil(columns.max(1));
    let (height, width) = ((rows * height) as u64, (columns * width) as u64);
    if height <= WIDEST_GRID && width <= WIDEST_GRID {
        return Ok(());
    }
    Err(Refusal::error(format!(
        "--grid: {pictures} pictures would make a grid of {width} x {height} pixels: leave --grid out, or ask for fewer"
    )))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pictures_of_an_earlier_time_are_not_replaced_unasked() {
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join("notes.png"), "").unwrap();
        check(dir.path(), false).unwrap();
        for name in ["00017.png", GRID, LATENTS] {
            fs::write(dir.path().join(name), "").unwrap();
            let error = check(dir.path(), false).unwrap_err();
            assert!(error.is::<Refusal>() && error.to_string().contains("--overwrite"), "{error}");
            check(dir.path(), true).unwrap();
            fs::remove_file(dir.path().join(name)).unwrap();
        }
    }

    #[test]
    fn a_grid_has_a_row_for_each_prompt_or_is_nearly_square() {
        let dir = tempfile::tempdir().unwrap();
        let pictures: Vec<Picture> = (0..6).map(|number| Picture { number, prompt: 0, negative: 0 }).collect();
        for picture in &pictures {
            let image = RgbImage::from_pixel(4, 2, image::Rgb([picture.number as u8; 3]));
            write_png(&file(dir.path(), picture), &image, None).unwrap();
        }
        let grid = |pictures: &[Picture], prompts| {
            write_grid(dir.path(), pictures, prompts).unwrap();
            image::open(dir.path().join(GRID)).unwrap().into_rgb8()
        };
        let rows = grid(&pictures, 3);
        assert_eq!((rows.dimensions(), rows.get_pixel(4, 2)[0]), ((8, 6), 3));
        assert_eq!(grid(&pictures[..5], 1).dimensions(), (12, 4));
        assert_eq!(grid(&pictures[..4], 1).dimensions(), (8, 4));
        assert!(check_grid(100_000, 1, (512, 512)).is_err() && check_grid(16, 1, (512, 512)).is_ok());
    }
}
