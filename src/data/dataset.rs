//! The images of a run: a folder of instance images and, under prior preservation, one of class images, and how an item
//! of the data set becomes pixels. Order, crops and flips are drawn elsewhere and come in as values.

use super::captions::{CaptionOptions, captions, is_caption_file};
use super::crop::{Crop, Window, center, fit, scale_draw};
use super::decode::{self, Picture};
use super::footprint::{Footprint, Part};
use super::header::Header;
use super::resize::{Interpolation, resize};
use crate::Refusal;
use crate::device;
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
    /// How the instance images' captions are found; None where one prompt is for all of them.
    pub captions: Option<CaptionOptions>,
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
    /// Bytes that decoding one may take, as [`Footprint::decoding`] counts them.
    pub decode_bytes: Option<usize>,
}

/// Bytes that verifying may take for several pictures at a time.
const VERIFY_BYTES: usize = 1 << 30;

/// [`DatasetOptions::keep_bytes`] unless there is a reason.
pub const KEEP_BYTES: usize = 1 << 30;

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
    /// Of each instance image; empty without captions.
    captions: Vec<String>,
    /// How many of them are the fallback.
    without_caption: usize,
    kept: AtomicUsize,
}

#[derive(Debug)]
struct Image {
    path: PathBuf,
    /// (width, height) of the upright picture, once it was decoded.
    size: OnceLock<(usize, usize)>,
    kept: OnceLock<Window>,
}

impl Image {
    fn at(path: PathBuf) -> Self {
        Image { path, size: OnceLock::new(), kept: OnceLock::new() }
    }
}

impl Dataset {
    /// Lists the folders (files sorted by name; hidden files and sub-folders are passed over) and decodes every picture once.
    ///
    /// # Errors
    /// A [`Refusal`] with a paragraph per problem: a missing or empty folder, too few class images, files that are no
    /// images or damaged ones.
    pub fn open(options: &DatasetOptions) -> Result<Dataset> {
        let mut problems = Vec::new();
        let mut listed = |dir: &Path, key: &str, captioned: bool| {
            list(dir, key, captioned).unwrap_or_else(|problem| {
                problems.push(problem);
                Vec::new()
            })
        };
        let instances = listed(&options.instance_dir, "data.instance_dir", options.captions.is_some());
        let mut classes = Vec::new();
        if let Some((dir, wanted)) = &options.class {
            classes = listed(dir, "prior.class_dir", false);
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
        let mut own_captions = Vec::new();
        let mut fallback = String::new();
        if let Some(captioned) = options.captions.as_ref().filter(|_| !instances.is_empty()) {
            own_captions = captions(&options.instance_dir, &instances, captioned).unwrap_or_else(|told| {
                problems.extend(told);
                Vec::new()
            });
            fallback = captioned.fallback.clone().unwrap_or_default();
        }
        let images = |paths: Vec<PathBuf>| paths.into_iter().map(Image::at).collect();
        let dataset = Dataset {
            options: options.clone(),
            instances: images(instances),
            classes: images(classes),
            without_caption: own_captions.iter().filter(|caption| caption.is_none()).count(),
            captions: own_captions.into_iter().map(|own| own.unwrap_or_else(|| fallback.clone())).collect(),
            kept: AtomicUsize::new(0),
        };
        if options.verify {
            problems.extend(dataset.verify());
        }
        if problems.is_empty() { Ok(dataset) } else { Err(Refusal { problems }.into()) }
    }

    /// What is wrong with the pictures. As many at a time as there are threads, but not more than there is memory for.
    fn verify(&self) -> Vec<String> {
        let images: Vec<(&Image, Row)> = self.images().collect();
        let taken = |(image, row): &(&Image, Row)| {
            Footprint::read(&image.path, &self.options, *row).map_or(0, |footprint| footprint.decoding)
        };
        let taken: Vec<usize> = images.par_iter().map(taken).collect();
        let (mut problems, mut from) = (Vec::new(), 0);
        while from < images.len() {
            let mut sum = 0;
            let fits = taken[from..].iter().take_while(|&&bytes| {
                sum += bytes;
                sum <= VERIFY_BYTES
            });
            let to = from + fits.count().max(1);
            let found = images[from..to].par_iter().map(|(image, row)| self.load(image, *row).err());
            problems.extend(found.collect::<Vec<_>>().into_iter().flatten().map(|error| error.to_string()));
            from = to;
        }
        problems
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

    /// The instance images' captions, file by file; empty where they have none.
    pub fn captions(&self) -> &[String] {
        &self.captions
    }

    /// How many instance images have the fallback for a caption; 0 where there are no captions.
    pub fn without_caption(&self) -> usize {
        self.without_caption
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
        let (width, height) = fit(size, self.options.resolution);
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
            Crop::Drawn { flip, .. } if self.options.center_crop => (center(max_top), center(max_left), flip),
            Crop::Drawn { top, left, flip } => (scale_draw(top, max_top), scale_draw(left, max_left), flip),
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
                    let full = fit((picture.width, picture.height), r);
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

    /// The number of the file behind a row of an item.
    pub fn file_number(&self, row: Row, item: u64) -> u64 {
        let files = match row {
            Row::Instance => self.instances.len(),
            Row::Class => self.classes.len(),
        };
        item % files.max(1) as u64
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
        let picture = self.decode(image, row)?;
        image.size.get_or_init(|| (picture.width, picture.height));
        let part = Part::of((picture.width, picture.height), &self.options, row);
        let bytes = part.bytes();
        let room = |kept: usize| kept.checked_add(bytes).filter(|&sum| sum <= self.options.keep_bytes);
        if self.kept.fetch_update(Ordering::Relaxed, Ordering::Relaxed, room).is_err() {
            return Ok(Loaded::Passing(picture));
        }
        let Part { resized, columns, rows } = part;
        let (top, left) = (rows.start, columns.start);
        let picture = resize(&picture, resized, columns, rows, self.options.interpolation);
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

    /// The whole picture, if it takes no more than is allowed.
    fn decode(&self, image: &Image, row: Row) -> Result<Picture> {
        let path = image.path.display();
        let unusable = |e: anyhow::Error| {
            Refusal::error(format!(
                "{path} cannot be used as a training image: {e:#}. Replace the file by a whole PNG, JPEG or WebP image, or take it out of the folder."
            ))
        };
        let bytes = decode::read(&image.path).map_err(unusable)?;
        if let (Some(most), Some(header)) = (self.options.decode_bytes, Header::read(&bytes))
            && let taken = Footprint::of(&header, &self.options, row).decoding
            && taken > most
        {
            return Err(Refusal::error(format!(
                "decoding {path} takes {taken} bytes, and when the run was planned none of its pictures took more than {most}: \
                 the file has changed since. Start the run again; checkpoint.resume = \"latest\" goes on where it stands."
            )));
        }
        let picture = decode::decode(bytes).map_err(unusable)?;
        device::within_budget()?;
        Ok(picture)
    }
}

enum Loaded<'a> {
    Kept(&'a Window),
    /// There was no room: the picture as decoded.
    Passing(Picture),
}

/// A folder's pictures by name: all its files but hidden ones and, with captions, those that hold these. An error's text
/// is a problem for a refusal.
fn list(dir: &Path, key: &str, captioned: bool) -> std::result::Result<Vec<PathBuf>, String> {
    let paths = list_pictures(dir, captioned).map_err(|e| match e.kind() {
        std::io::ErrorKind::NotFound => format!(
            "the folder {} ({key}) does not exist. Create it and put images into it, or correct the path.",
            dir.display()
        ),
        std::io::ErrorKind::NotADirectory => {
            format!("{} ({key}) is not a folder. Set it to the folder that holds the images.", dir.display())
        }
        _ => format!("the folder {} ({key}) cannot be read: {e}.", dir.display()),
    })?;
    if paths.is_empty() {
        return Err(format!(
            "the folder {} ({key}) holds no images. Put PNG, JPEG or WebP files into it.",
            dir.display()
        ));
    }
    Ok(paths)
}

/// What a data set takes for pictures in `dir`, sorted by name: files that are not hidden and, if the folder has
/// captions, do not hold these.
pub fn list_pictures(dir: &Path, captioned: bool) -> std::io::Result<Vec<PathBuf>> {
    let mut paths = Vec::new();
    for entry in std::fs::read_dir(dir)? {
        let path = entry?.path();
        let hidden = path.file_name().is_some_and(|name| name.as_encoded_bytes().starts_with(b"."));
        let of_captions = captioned && is_caption_file(&path);
        if !hidden && !of_captions && !path.is_dir() {
            paths.push(path);
        }
    }
    paths.sort();
    Ok(paths)
}

#[cfg(test)]
mod tests;
