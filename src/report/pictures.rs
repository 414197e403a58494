//! Which validation pictures are shown, and how they get into the page: within it as data, scaled down where they are
//! many, or from the server that watches the run.

use std::collections::{BTreeSet, HashMap};
use std::fs;
use std::io::Cursor;
use std::path::Path;
use std::time::UNIX_EPOCH;

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use image::codecs::jpeg::JpegEncoder;
use image::imageops::FilterType;
use image::{ImageFormat, ImageReader};
use rayon::prelude::*;

use super::number;
use super::run::{Picture, Run};

/// Steps of a run whose pictures are shown.
const MOST_COLUMNS: usize = 40;
/// Files that are no more than this together are taken as they are.
const AS_THEY_ARE: u64 = 12 << 20;
/// Pixels of all pictures together when they are scaled: about 10 MB as JPEG.
const PIXELS: f64 = 40e6;
/// Longest sides that pictures are scaled to.
const SIDES: std::ops::RangeInclusive<f64> = 96.0..=512.0;
const JPEG_QUALITY: u8 = 85;

/// A picture as the page has it.
pub struct Shot {
    /// An address for an `img`.
    pub src: String,
    pub width: u32,
    pub height: u32,
}

/// The pictures of all runs of a page, by run, step and number.
pub struct Shots {
    shots: HashMap<(usize, u64, u64), Shot>,
    /// Whether each showing of a picture makes the page larger.
    pub in_page: bool,
    /// What was done to them.
    pub note: Option<String>,
}

impl Shots {
    /// As data in the page. What cannot be read as a picture is left out.
    pub fn embedded(runs: &[Run]) -> Shots {
        let chosen = chosen(runs);
        let bytes: u64 = chosen.iter().map(|(_, run, picture)| size(&run.picture_path(picture))).sum();
        let side = (bytes > AS_THEY_ARE).then(|| {
            let each = (PIXELS / chosen.len() as f64).sqrt();
            each.clamp(*SIDES.start(), *SIDES.end()) as u32
        });
        let shot = |(i, run, picture): &(usize, &Run, &Picture)| {
            let shot = embedded(&run.picture_path(picture), side)?;
            Some(((*i, picture.step, picture.number), shot))
        };
        let shots: HashMap<_, _> = chosen.par_iter().filter_map(shot).collect();
        let mut note = thinned(runs);
        if let Some(side) = side {
            note.push(format!(
                "{} pictures, scaled to at most {side} pixels a side to keep this file small; the originals are in samples/.",
                number::count(shots.len() as u64)
            ));
        }
        Shots { shots, in_page: true, note: (!note.is_empty()).then(|| note.join(" ")) }
    }

    /// As addresses below `/pictures/`, of a page with one run.
    pub fn linked(runs: &[Run]) -> Shots {
        let shot = |(i, run, picture): &(usize, &Run, &Picture)| {
            let path = run.picture_path(picture);
            let (width, height) = reader(&path)?.into_dimensions().ok()?;
            // Another file of the same name has another address, so that addresses can be cached.
            let src = format!("/pictures/{}/{}?{}", picture.step, picture.number, stamp(&path));
            Some(((*i, picture.step, picture.number), Shot { src, width, height }))
        };
        let note = thinned(runs);
        let shots = chosen(runs).iter().filter_map(shot).collect();
        Shots { shots, in_page: false, note: (!note.is_empty()).then(|| note.join(" ")) }
    }

    pub fn get(&self, run: usize, picture: &Picture) -> Option<&Shot> {
        self.shots.get(&(run, picture.step, picture.number))
    }
}

/// The pictures of the steps that are shown, with the places of their runs.
fn chosen(runs: &[Run]) -> Vec<(usize, &Run, &Picture)> {
    let mut chosen = Vec::new();
    for (i, run) in runs.iter().enumerate() {
        let columns = columns(run);
        let shown = run.pictures.iter().filter(|picture| columns.contains(&picture.step));
        chosen.extend(shown.map(|picture| (i, run, picture)));
    }
    chosen
}

/// The steps of a run whose pictures are shown: all, or where there are too many an even choice with first and last.
fn columns(run: &Run) -> BTreeSet<u64> {
    let all: Vec<u64> = run.pictures.iter().map(|picture| picture.step).collect::<BTreeSet<_>>().into_iter().collect();
    match all.len() {
        0..=MOST_COLUMNS => all.into_iter().collect(),
        many => (0..MOST_COLUMNS).map(|i| all[i * (many - 1) / (MOST_COLUMNS - 1)]).collect(),
    }
}

/// Of which runs not all steps are shown.
fn thinned(runs: &[Run]) -> Vec<String> {
    let all = |run: &Run| run.pictures.iter().map(|picture| picture.step).collect::<BTreeSet<_>>().len();
    let many = runs.iter().filter(|run| all(run) > MOST_COLUMNS);
    many.map(|run| format!("{}: {MOST_COLUMNS} of the {} steps with pictures are shown.", run.name, all(run))).collect()
}

fn size(path: &Path) -> u64 {
    fs::metadata(path).map_or(0, |there| there.len())
}

fn stamp(path: &Path) -> String {
    let there = fs::metadata(path).ok();
    let modified = there.as_ref().and_then(|there| there.modified().ok()?.duration_since(UNIX_EPOCH).ok());
    format!("{:x}-{:x}", modified.map_or(0, |time| time.as_nanos()), there.map_or(0, |there| there.len()))
}

/// The file's pictures, if it begins as one of the kinds that every browser shows.
fn reader(path: &Path) -> Option<ImageReader<std::io::BufReader<fs::File>>> {
    let reader = ImageReader::open(path).ok()?.with_guessed_format().ok()?;
    reader.format().and_then(media_type).is_some().then_some(reader)
}

/// What a browser is told that the file is.
pub fn media_type(format: ImageFormat) -> Option<&'static str> {
    let shown = [ImageFormat::Png, ImageFormat::Jpeg, ImageFormat::WebP];
    shown.contains(&format).then(|| format.to_mime_type())
}

/// The file as it is, or as JPEG of at most `side` pixels a side if that is less.
fn embedded(path: &Path, side: Option<u32>) -> Option<Shot> {
    let reader = reader(path)?;
    let kind = reader.format().and_then(media_type)?;
    let whole = fs::read(path).ok()?;
    let Some(side) = side else {
        // A file that is still being written has a size but no end.
        let (width, height) = reader.decode().ok().map(|picture| (picture.width(), picture.height()))?;
        return Some(Shot { src: data(kind, &whole), width, height });
    };
    let picture = reader.decode().ok()?;
    let (width, height) = (picture.width(), picture.height());
    let small = match width.max(height) > side {
        true => picture.resize(side, side, FilterType::CatmullRom),
        false => picture,
    };
    let mut jpeg = Cursor::new(Vec::new());
    small.to_rgb8().write_with_encoder(JpegEncoder::new_with_quality(&mut jpeg, JPEG_QUALITY)).ok()?;
    let jpeg = jpeg.into_inner();
    let src = if jpeg.len() < whole.len() { data("image/jpeg", &jpeg) } else { data(kind, &whole) };
    Some(Shot { src, width, height })
}

fn data(kind: &str, bytes: &[u8]) -> String {
    format!("data:{kind};base64,{}", STANDARD.encode(bytes))
}

#[cfg(test)]
mod tests {
    use super::super::testing::Forged;
    use super::*;

    #[test]
    fn few_pictures_are_taken_to_the_byte() {
        let forged = Forged::new("run", 20);
        forged.pictures(&[0, 10, 20], 2, 64);
        let runs = [Run::open(forged.dir()).unwrap()];
        let shots = Shots::embedded(&runs);
        let picture = &runs[0].pictures[0];
        let shot = shots.get(0, picture).unwrap();
        let bytes = fs::read(runs[0].picture_path(picture)).unwrap();
        assert_eq!(shot.src, format!("data:image/png;base64,{}", STANDARD.encode(bytes)));
        assert!((shot.width, shot.height) == (64, 64) && shots.note.is_none() && shots.shots.len() == 6);
        let linked = Shots::linked(&runs);
        assert!(linked.get(0, &runs[0].pictures[3]).unwrap().src.starts_with("/pictures/10/1?"));
    }

    #[test]
    fn of_many_steps_an_even_choice_is_shown_with_both_ends() {
        let forged = Forged::new("run", 400);
        let steps: Vec<u64> = (0..=50).map(|i| i * 8).collect();
        forged.pictures(&steps, 1, 8);
        let run = Run::open(forged.dir()).unwrap();
        let columns = columns(&run);
        assert!(columns.len() == 40 && columns.contains(&0) && columns.contains(&400));
        let shots = Shots::embedded(&[run]);
        assert_eq!(shots.note.as_deref(), Some("run: 40 of the 51 steps with pictures are shown."));
    }

    #[test]
    fn scaling_keeps_the_shape_and_what_is_no_picture_is_left_out() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("x.png");
        // Noise, which no PNG makes small.
        let noise = image::RgbImage::from_fn(400, 200, |x, y| {
            let v = (x * 7919 + y * 104_729 + x * y * 31) % 251;
            image::Rgb([v as u8, (v * 3 % 256) as u8, (v * 7 % 256) as u8])
        });
        noise.save(&path).unwrap();
        let shot = embedded(&path, Some(100)).unwrap();
        assert!(shot.src.starts_with("data:image/jpeg;base64,") && (shot.width, shot.height) == (400, 200));
        let jpeg = STANDARD.decode(shot.src.split_once(',').unwrap().1).unwrap();
        let small = image::load_from_memory(&jpeg).unwrap();
        assert_eq!((small.width(), small.height()), (100, 50));
        let whole = fs::read(&path).unwrap();
        fs::write(&path, &whole[..whole.len() / 2]).unwrap();
        assert!(embedded(&path, None).is_none());
        fs::write(&path, "<svg onload=\"alert(1)\"/>").unwrap();
        assert!(embedded(&path, None).is_none());
    }
}
