//! Row 4: making pictures. [`Sampling`] runs a denoising network (the one in training, or one loaded for it) over the
//! ranks' shares of the pictures asked for; [`Decoder`] makes pixels of latents, [`write_png`] files of pictures;
//! [`command`] is `dblaunch sample`.
//!
//! ```text
//! per round (the same number on every rank):   this rank's pictures of it, or none
//!   per call of the sampler:   segments 0..N:  fetch -> run -> release      both halves of guidance in one batch
//!   each picture:              decode -> hand over
//! ```
//!
//! Every draw is a function of (seed, picture number, step), and no op mixes the pictures of a batch: so a picture's
//! bits depend neither on the number of ranks nor on which pictures are made along with it.

pub mod command;
mod decode;
mod noise;
mod png;
mod request;
mod sampling;
mod tiles;

pub use decode::{Decoder, LARGE_ACTIVATION, Tiling, check_weights};
pub use noise::{GivenNoise, Noise};
pub use png::write_png;
pub use request::{Ending, Made, Picture, Request, Settings};
pub use sampling::Sampling;
pub use tiles::Plane;
