//! The world: one shape of one colour on a ground of another, with a caption that says all of it or less. And what it
//! lacks: the subject of the demo.

use std::fs;
use std::path::Path;

use anyhow::{Context, Result};
use dblaunch::diffusion::{Draws, Purpose, Row, Stream};
use image::RgbImage;

use super::draw::{Figure, SIDE, Shape, draw};

const COLOURS: [(&str, [u8; 3]); 10] = [
    ("red", [214, 40, 40]),
    ("green", [46, 160, 67]),
    ("blue", [38, 84, 214]),
    ("yellow", [250, 210, 40]),
    ("orange", [245, 130, 32]),
    ("purple", [128, 60, 180]),
    ("pink", [246, 150, 190]),
    ("white", [245, 245, 245]),
    ("black", [24, 24, 24]),
    ("grey", [140, 140, 140]),
];

/// The words that captions are made of, for the tokenizer.
pub fn words() -> Vec<&'static str> {
    let colours = COLOURS.iter().map(|(name, _)| *name);
    let shapes = Shape::ALL.iter().map(|(_, name)| *name);
    ["a", "on", "background", "picture", "of", "and", "the", "with"].into_iter().chain(colours).chain(shapes).collect()
}

/// Random choices of picture number `item`.
struct Chance(Stream);

impl Chance {
    fn of(seed: u64, item: u64) -> Self {
        Chance(Draws::new(seed).stream(Purpose::Crop, Row::Instance, item))
    }

    fn pick<T: Copy>(&mut self, from: &[T]) -> T {
        from[self.0.below(from.len() as u64) as usize]
    }

    fn between(&mut self, low: f32, high: f32) -> f32 {
        low + (high - low) * self.0.below(1 << 20) as f32 / (1 << 20) as f32
    }

    fn figure(&mut self, shape: Shape, colour: [u8; 3]) -> Figure {
        let size = self.between(13.0, 22.0);
        let centre = (self.place(size), self.place(size));
        Figure { shape, colour, centre, size, turn: self.between(-0.25, 0.25) }
    }

    /// A coordinate that leaves room for the figure.
    fn place(&mut self, size: f32) -> f32 {
        let side = SIDE as f32;
        self.between(size + 2.0, side - size - 2.0)
    }
}

/// Picture number `item` and its caption.
fn captioned(item: u64) -> (RgbImage, String) {
    let mut chance = Chance::of(1, item);
    let (shape, name) = chance.pick(&Shape::ALL);
    let (colour, paint) = chance.pick(&COLOURS);
    let others: Vec<_> = COLOURS.into_iter().filter(|(other, _)| *other != colour).collect();
    let (ground, ground_paint) = chance.pick(&others);
    let picture = draw(ground_paint, &[chance.figure(shape, paint)]);
    let caption = match chance.0.below(10) {
        0 | 1 => format!("a {name}"),
        2 => format!("a {colour} {name}"),
        3 => format!("a {name} on a {ground} background"),
        _ => format!("a {colour} {name} on a {ground} background"),
    };
    (picture, caption)
}

/// Picture number `item` for the autoencoder: any colours, and shapes upon shapes, so that it can show what the
/// captioned world lacks.
pub fn any(item: u64) -> RgbImage {
    let mut chance = Chance::of(2, item);
    let colour = |chance: &mut Chance| match chance.0.below(2) {
        0 => chance.pick(&COLOURS).1,
        _ => [0, 1, 2].map(|_| chance.0.below(256) as u8),
    };
    let ground = colour(&mut chance);
    let mut figures = Vec::new();
    for _ in 0..=chance.0.below(2) {
        let (shape, _) = chance.pick(&Shape::ALL);
        let paint = colour(&mut chance);
        let outer = chance.figure(shape, paint);
        figures.push(outer);
        if chance.0.below(2) == 0 {
            let (shape, _) = chance.pick(&Shape::ALL);
            let paint = colour(&mut chance);
            figures.push(Figure { shape, colour: paint, size: outer.size * chance.between(0.35, 0.7), ..outer });
        }
    }
    draw(ground, &figures)
}

/// `number` captioned pictures and their `metadata.jsonl`.
pub fn write(folder: &Path, number: u64) -> Result<()> {
    fs::create_dir_all(folder).with_context(|| folder.display().to_string())?;
    let mut lines = String::new();
    for item in 0..number {
        let (picture, caption) = captioned(item);
        let file = format!("{item:05}.png");
        picture.save(folder.join(&file))?;
        lines += &format!("{}\n", serde_json::json!({ "file_name": file, "text": caption }));
    }
    fs::write(folder.join("metadata.jsonl"), lines)?;
    println!("{number} captioned pictures in {}", folder.display());
    Ok(())
}

/// Five pictures of the subject, a turquoise disc with a yellow star in it, on grounds that the world has.
pub fn write_subject(folder: &Path) -> Result<()> {
    fs::create_dir_all(folder).with_context(|| folder.display().to_string())?;
    let grounds = ["white", "red", "grey", "purple", "black"];
    for (i, ground) in grounds.into_iter().enumerate() {
        let (_, paint) = COLOURS.into_iter().find(|(name, _)| *name == ground).context("a ground of the world")?;
        let mut chance = Chance::of(3, i as u64);
        let disc = chance.figure(Shape::Circle, [20, 190, 180]);
        let disc = Figure {
            size: chance.between(18.0, 22.0),
            centre: (chance.between(25.0, 39.0), chance.between(25.0, 39.0)),
            ..disc
        };
        let star = Figure { shape: Shape::Star, colour: [252, 224, 60], size: disc.size * 0.62, ..disc };
        draw(paint, &[disc, star]).save(folder.join(format!("{ground}.png")))?;
    }
    println!("{} pictures in {}", grounds.len(), folder.display());
    Ok(())
}
