//! Row 4: what training and sampling both open of a pipeline's folder: its configurations, its weights as one source,
//! networks that are only run, and what prompts become. What trains is in `train`, how pictures are made in `sample`.

mod configs;
mod frozen;
mod text;
mod weights;

pub use configs::Configs;
pub use frozen::Frozen;
pub use text::Prompts;
pub use weights::PipelineWeights;
