//! dblaunch fine-tunes diffusion models (DreamBooth) over one or many ranks, sharded as in ZeRO.
//!
//! This is the map. Read [`train::step`] first: one optimizer step, top to bottom. How things work is in
//! `docs/architecture.md`, what a run can be told in `docs/configuration.md`.
//!
//! ```text
//!                 forward: no graph                          backward: reverse order, with graph
//! segment     0     1     2   ...   N                   N   ...   2     1     0
//! fetch       F     F     F         F                   F         F     F     F
//! run         y     y     y         y -> loss, dpred -> recompute, pull gradients back
//! release     R     R     R         R                   R         R     R     R     by going out of scope
//! slots       inputs kept  ------------------------->   inputs taken, dropped
//! reduce                                                S         S     S     S     sum over ranks, add to what is owned
//! repeated per micro-batch; then the global norm (one all-reduce) -> clip factor
//!                         then per segment: update the owned range -> publish
//! ```
//!
//! A model is a list of **segments** wired by **slots** ([`segment`]). A segment's parameters are one flat **bucket**
//! ([`device::BucketLayout`]): it is what is fetched, recomputed, released, reduced and saved.
//!
//! # Rows
//!
//! ```text
//!     5  asked for    main  cli  config  launch  hub
//!     4  together     train  plan  sample  pipeline  checkpoint  bench  report  the only place where all the others meet
//!     3  content      data  diffusion  model  optim  track
//!     2  machinery    segment (layers, no ranks)    zero (ranks, no layers)
//!     1  ground       ops  comm
//!     0  hardware     device  kernels                     candle-core, cudarc below
//! ```
//!
//! A module imports from rows below it; but `train` takes `config::RunPlan` and `launch::Rank` as values.
//!
//! # Invariants
//!
//! 1. `ops`, `segment`, `model` import neither `comm` nor `zero`: layers know no ranks.
//! 2. `zero` knows segments by index and parameters by name and shape; it imports neither `model` nor `ops`.
//! 3. The way back is `ops/record.rs`, and only `segment/pullback.rs` takes it; nothing calls candle's. `unsafe` only in
//!    `device/`, `comm/`, `kernels/` and the SIMD files of `ops/` and `optim/`, each block with its reason.
//! 4. A segment is a pure function: no randomness, no state, no I/O. So recompute equals compute.
//! 5. Every rank issues the same collectives in the same order; every decision to skip, stop or save is itself one.
//! 6. Randomness is stateless: a draw is a function of (seed, purpose, row, running number of the item).
//! 7. Padding is zero in parameters, gradients and moments, always.
//! 8. Nothing under `train` reads flags, configuration files or the environment.
//! 9. At most one gathered segment is alive at a time in stage 3.
//! 10. *Recompute* is about activations, *checkpoint* about files, *stage* about ZeRO.
#![deny(unsafe_op_in_unsafe_fn)]

pub mod bench;
pub mod checkpoint;
pub mod cli;
pub mod comm;
pub mod config;
pub mod data;
pub mod device;
pub mod diffusion;
pub mod hub;
mod input_file;
pub mod kernels;
pub mod launch;
pub mod model;
pub mod ops;
pub mod optim;
pub mod pipeline;
pub mod plan;
mod refusal;
pub mod report;
pub mod sample;
pub mod segment;
pub mod track;
pub mod train;
pub mod zero;

pub use refusal::Refusal;
