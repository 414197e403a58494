//! What a batch is made of: the images of a data set, prepared as the peer prepares them, and tokenised prompts.
//! Drawing crops and noise is `diffusion`'s; encoding prompts and images is `model`'s.

mod captions;
mod crop;
mod dataset;
mod decode;
mod footprint;
mod header;
mod jpeg;
mod orientation;
mod resize;
mod tokenizer;

pub use crate::diffusion::Row;
pub use captions::{CaptionOptions, is_caption_file};
pub use crop::Crop;
pub use dataset::{Dataset, DatasetOptions, KEEP_BYTES, Prepared, list_pictures};
use decode::Picture;
pub use footprint::Footprint;
pub use resize::Interpolation;
pub use tokenizer::{ClipTokenizer, Tokens};
