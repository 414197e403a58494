//! The images of a run: a folder of instance images and, under prior preservation, one of class images, and how an item
//! of the data set becomes pixels. Order, crops and flips are drawn elsewhere and come in as values.

use super::decode::{Picture, decode};
use super::resize::{Interpolation, resize};
use crate::Refusal;
use crate::diffusion::Row;
use anyhow::Result;
use rayon::prelude::*;
use std::path::{Path, PathBuf};
use std::sync::OnceLock;
use std::sync::atomic::{AtomicUsize, Ordering};

/// What a data set is made from.
#[derive(Clone, Debug)]
pub struct DatasetOptions {
    pub instance_dir: PathBuf,
    /// The folder of class images and how many of them to use at most; there must be as many.
    pub class: Option<(PathBuf, usize)>,
    /// The side r of the square that is trained on, in pixels.
    pub resolution: usize,
    /// Whether crops are taken from the middle instead of at random.
    pub center_crop: bool,
    /// Whether instance images may be mirrored; class images never are, as in the peer.
    pub random_flip: bool,
    pub interpolation: Interpolation,
    /// Bytes of decoded, resized pictures to keep; others are decoded again at every use.
    pub keep_bytes: usize,
    /// Whether opening decodes every picture to find damaged ones; without, they are found when they are used.
    pub verify: bool,
}

/// [`DatasetOptions::keep_bytes`] unless there is a reason.
pub const KEEP_BYTES: usize = 1 << 30;

/// Where an item's crop comes from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Crop {
    /// A recorded offset in the resized picture, in pixels; never mirrored.
    At { top: usize, left: usize },
    /// Uniform 64-bit numbers for a random crop's offsets (not used with `center_crop`), and whether to mirror.
    Drawn { top: u64, left: u64, flip: bool },
}

/// One row's pixels and what SDXL is told about them.
#[derive(Clone, Debug, PartialEq)]
pub struct Prepared {
    /// (3, r, r), in −1 … 1.
    pub pixels: Vec<f32>,
    /// (height, width) of the upright picture before resizing.
    pub original_size: (usize, usize),
    /// (top, left) of the crop in the resized (and mirrored) picture.
    pub crop_top_left: (usize, usize),
}

/// An opened data set; all methods may be called from several threads at once.
#[derive(Debug)]
pub struct Dataset {
    options: DatasetOptions,
    instances: Vec<Image>,
    classes: Vec<Image>,
    kept: AtomicUsize,
}

#[derive(Debug)]
struct Image {
    path: PathBuf,
    /// (width, height) of the upright picture, once it was decoded.
    size: OnceLock<(usize, usize)>,
    kept: OnceLock<Window>,
}

/// A part of a resized picture that holds every crop that can be asked for.
#[derive(Debug)]
struct Window {
    picture: Picture,
    top: usize,
    left: usize,
}

impl Dataset {
    /// Lists the folders (files sorted by name; hidden files and sub-folders are passed over) and decodes every picture once.
    ///
    /// # Errors
    /// A [`Refusal`] with a paragraph per problem: a missing or empty folder, too few class images, files that are no
    /// images or damaged ones.
    pub fn open(options: &DatasetOptions) -> Result<Dataset> {
        let mut problems = Vec::new();
        let mut listed = |dir: &Path, key: &str| {
            list(dir, key).unwrap_or_else(|problem| {
                problems.push(problem);
                Vec::new()
            })
        };
        let instances = listed(&options.instance_dir, "data.instance_dir");
        let mut classes = Vec::new();
        if let Some((dir, wanted)) = &options.class {
            classes = listed(dir, "prior.class_dir");
            if !classes.is_empty() && classes.len() < *wanted {
                problems.push(format!(
                    "{} holds {} class images and prior.num_class_images = {wanted}: {} are missing. Add them, or lower prior.num_class_images.",
                    dir.display(),
                    classes.len(),
                    wanted - classes.len()
                ));
            }
            classes.truncate(*wanted);
        }
        let dataset = Dataset { options: options.clone(), instances, classes, kept: AtomicUsize::new(0) };
        if options.verify {
            let images: Vec<(&Image, Row)> = dataset.images().collect();
            let found: Vec<Option<String>> =
                images.par_iter().map(|(image, row)| dataset.load(image, *row).err().map(|e| e.to_string())).collect();
            problems.extend(found.into_iter().flatten());
        }
        if problems.is_empty() { Ok(dataset) } else { Err(Refusal { problems }.into()) }
    }

    /// The number of items, max(instance images, class images): one epoch.
    pub fn len(&self) -> usize {
        self.instances.len().max(self.classes.len())
    }

    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    pub fn instance_count(&self) -> usize {
        self.instances.len()
    }

    pub fn class_count(&self) -> usize {
        self.classes.len()
    }

    pub fn has_classes(&self) -> bool {
        self.options.class.is_some()
    }

    /// The file behind a row of an item.
    pub fn path(&self, row: Row, item: u64) -> &Path {
        &self.image(row, item).path
    }

    /// The largest offsets (top, left) that a crop of this row can have.
    pub fn crop_range(&self, row: Row, item: u64) -> Result<(usize, usize)> {
        let image = self.image(row, item);
        let size = match image.size.get() {
            Some(size) => *size,
            None => {
                self.load(image, row)?;
                image.size.get().copied().unwrap_or_default()
            }
        };
        let (width, height) = resized(size, self.options.resolution);
        Ok((height - self.options.resolution, width - self.options.resolution))
    }

    /// Whether a row has the same pixels every time, so that what is computed from them may be kept.
    pub fn is_deterministic(&self, row: Row, item: u64) -> Result<bool> {
        let mirrored = self.options.random_flip && row == Row::Instance;
        Ok(!mirrored && (self.options.center_crop || self.crop_range(row, item)? == (0, 0)))
    }

    /// The pixels of a row of an item, which counts in the data set (modulo the number of images).
    ///
    /// # Errors
    /// A [`Refusal`] if the file is no image any more, or a recorded crop lies outside the picture.
    pub fn prepare(&self, row: Row, item: u64, crop: Crop) -> Result<Prepared> {
        let image = self.image(row, item);
        let (max_top, max_left) = self.crop_range(row, item)?;
        let (top, left, flip) = match crop {
            Crop::At { top, left } if top <= max_top && left <= max_left => (top, left, false),
            Crop::At { top, left } => {
                return Err(Refusal::error(format!(
                    "the recorded crop at ({top}, {left}) lies outside {}, whose crops begin at ({max_top}, {max_left}) at most. Replay with the images and the resolution that were recorded.",
                    image.path.display()
                )));
            }
            Crop::Drawn { flip, .. } if self.options.center_crop => (half(max_top), half(max_left), flip),
            Crop::Drawn { top, left, flip } => (scaled(top, max_top), scaled(left, max_left), flip),
        };
        let flip = flip && self.options.random_flip && row == Row::Instance;
        // The column of the picture as it was before mirroring.
        let column = if flip { max_left - left } else { left };
        let r = self.options.resolution;
        let part;
        let window = match image.kept.get() {
            Some(window) => window,
            None => match self.load(image, row)? {
                Loaded::Kept(window) => window,
                Loaded::Passing(picture) => {
                    let full = resized((picture.width, picture.height), r);
                    let filter = self.options.interpolation;
                    let picture = resize(&picture, full, column..column + r, top..top + r, filter);
                    part = Window { picture, top, left: column };
                    &part
                }
            },
        };
        let (width, height) = image.size.get().copied().unwrap_or_default();
        Ok(Prepared {
            pixels: window.pixels(top, column, r, flip),
            original_size: (height, width),
            crop_top_left: (top, left),
        })
    }

    fn images(&self) -> impl Iterator<Item = (&Image, Row)> {
        let instances = self.instances.iter().map(|i| (i, Row::Instance));
        instances.chain(self.classes.iter().map(|i| (i, Row::Class)))
    }

    fn image(&self, row: Row, item: u64) -> &Image {
        let images = match row {
            Row::Instance => &self.instances,
            Row::Class => &self.classes,
        };
        assert!(!images.is_empty(), "a row of a kind that the data set lacks");
        &images[(item % images.len() as u64) as usize]
    }

    /// Decodes a picture, notes its size, and keeps the part of it that crops are taken from if there is room.
    fn load<'a>(&self, image: &'a Image, row: Row) -> Result<Loaded<'a>> {
        let picture = decode(&image.path).map_err(|e| {
            Refusal::error(format!(
                "{} cannot be used as a training image: {e:#}. Replace the file by a whole PNG, JPEG or WebP image, or take it out of the folder.",
                image.path.display()
            ))
        })?;
        image.size.get_or_init(|| (picture.width, picture.height));
        let r = self.options.resolution;
        let (width, height) = resized((picture.width, picture.height), r);
        let (mut columns, mut rows) = (0..width, 0..height);
        if self.options.center_crop {
            let (top, left) = (half(height - r), half(width - r));
            rows = top..top + r;
            // The middle of a mirrored picture of even width over an odd one begins a column further.
            let mirrored = if self.options.random_flip && row == Row::Instance { width - r - left } else { left };
            columns = left.min(mirrored)..left.max(mirrored) + r;
        }
        let bytes = columns.len() * rows.len() * 3;
        let room = |kept: usize| kept.checked_add(bytes).filter(|&sum| sum <= self.options.keep_bytes);
        if self.kept.fetch_update(Ordering::Relaxed, Ordering::Relaxed, room).is_err() {
            return Ok(Loaded::Passing(picture));
        }
        let (top, left) = (rows.start, columns.start);
        let picture = resize(&picture, (width, height), columns, rows, self.options.interpolation);
        // Not inside the closure: work on rayon's threads might come back to this very cell.
        let window = Window { picture, top, left };
        let mut first = false;
        let kept = image.kept.get_or_init(|| {
            first = true;
            window
        });
        if !first {
            // Another thread kept the same picture meanwhile.
            self.kept.fetch_sub(bytes, Ordering::Relaxed);
        }
        Ok(Loaded::Kept(kept))
    }
}

enum Loaded<'a> {
    Kept(&'a Window),
    /// There was no room: the picture as decoded.
    Passing(Picture),
}

impl Window {
    /// The r × r pixels from (top, left) as (3, r, r) in −1 … 1, rounded as `ToTensor` and `Normalize` round.
    fn pixels(&self, top: usize, left: usize, r: usize, flip: bool) -> Vec<f32> {
        let levels: [f32; 256] = std::array::from_fn(|v| (v as f32 / 255.0 - 0.5) / 0.5);
        let mut pixels = vec![0f32; 3 * r * r];
        for y in 0..r {
            let start = (top - self.top + y) * self.picture.width + (left - self.left);
            let line = &self.picture.rgb[start * 3..][..r * 3];
            for (x, pixel) in line.as_chunks::<3>().0.iter().enumerate() {
                let x = if flip { r - 1 - x } else { x };
                for (channel, &level) in pixel.iter().enumerate() {
                    pixels[(channel * r + y) * r + x] = levels[usize::from(level)];
                }
            }
        }
        pixels
    }
}

/// The size of a picture whose shorter side becomes `r`; the longer is rounded down, as in torchvision.
fn resized((width, height): (usize, usize), r: usize) -> (usize, usize) {
    if width <= height { (r, r * height / width) } else { (r * width / height, r) }
}

/// n/2, a half to the even neighbour, as Python's `round` does.
fn half(n: usize) -> usize {
    n / 2 + usize::from(n % 4 == 3)
}

/// A uniform 64-bit number as one of 0 … max.
fn scaled(draw: u64, max: usize) -> usize {
    ((u128::from(draw) * (max as u128 + 1)) >> 64) as usize
}

/// A folder's files by name. An error's text is a problem for a refusal.
fn list(dir: &Path, key: &str) -> std::result::Result<Vec<Image>, String> {
    let unreadable = |e: std::io::Error| match e.kind() {
        std::io::ErrorKind::NotFound => format!(
            "the folder {} ({key}) does not exist. Create it and put images into it, or correct the path.",
            dir.display()
        ),
        std::io::ErrorKind::NotADirectory => {
            format!("{} ({key}) is not a folder. Set it to the folder that holds the images.", dir.display())
        }
        _ => format!("the folder {} ({key}) cannot be read: {e}.", dir.display()),
    };
    let mut paths = Vec::new();
    for entry in std::fs::read_dir(dir).map_err(unreadable)? {
        let path = entry.map_err(unreadable)?.path();
        let hidden = path.file_name().is_some_and(|name| name.as_encoded_bytes().starts_with(b"."));
        if !hidden && !path.is_dir() {
            paths.push(path);
        }
    }
    if paths.is_empty() {
        return Err(format!(
            "the folder {} ({key}) holds no images. Put PNG, JPEG or WebP files into it.",
            dir.display()
        ));
    }
    paths.sort();
    Ok(paths.into_iter().map(|path| Image { path, size: OnceLock::new(), kept: OnceLock::new() }).collect())
}
