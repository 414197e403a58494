//! Makes what the embedded demo is made of: a drawn world of coloured shapes with captions, a small Stable Diffusion
//! pipeline with fresh weights, its autoencoder trained on that world, and pictures of a subject the world lacks.
//!
//! ```text
//! cargo run --release --example shapes -- pipeline FOLDER              fresh weights, all but the autoencoder's random
//! cargo run --release --example shapes -- autoencoder FOLDER [STEPS]   trains FOLDER/vae on drawings
//! cargo run --release --example shapes -- world FOLDER [PICTURES]      captioned drawings, to train the rest on
//! cargo run --release --example shapes -- subject FOLDER               five pictures of the demo's subject
//! ```
//!
//! `configs/shapes.toml` trains the UNet and the text encoder of the pipeline on the world; `docs/demo.md` tells how
//! long all of it took.

mod autoencoder;
mod draw;
mod pipeline;
mod world;

use std::path::Path;

use anyhow::{Context, Result, bail};

fn main() -> Result<()> {
    let words: Vec<String> = std::env::args().skip(1).collect();
    let words: Vec<&str> = words.iter().map(String::as_str).collect();
    let (what, folder, number) = match words[..] {
        [what, folder] => (what, Path::new(folder), None),
        [what, folder, number] => (what, Path::new(folder), Some(number.parse().context("the last word is a number")?)),
        _ => bail!("usage: shapes pipeline|autoencoder|world|subject FOLDER [NUMBER]"),
    };
    match what {
        "pipeline" => pipeline::write(folder),
        "autoencoder" => autoencoder::train(folder, number.unwrap_or(4000)),
        "world" => world::write(folder, number.unwrap_or(6000)),
        "subject" => world::write_subject(folder),
        other => bail!("there is no {other:?}; it is one of pipeline, autoencoder, world, subject"),
    }
}
