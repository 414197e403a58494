//! dblaunch fine-tunes diffusion models on one device or many.
#![deny(unsafe_op_in_unsafe_fn)]

pub mod checkpoint;
pub mod cli;
pub mod comm;
pub mod config;
pub mod data;
pub mod device;
pub mod diffusion;
pub mod hub;
pub mod launch;
pub mod model;
pub mod ops;
pub mod optim;
mod refusal;
pub mod segment;
pub mod train;
pub mod zero;

pub use refusal::Refusal;
