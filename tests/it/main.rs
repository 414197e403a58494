//! One integration binary; modules are named by behaviour.

mod bad_input;
mod captions;
mod config;
mod demo;
mod equivalence;
mod faults;
mod harness;
mod interrupt;
mod layers;
mod offload;
mod parity;
mod pictures;
mod processes;
mod profile;
mod ranks;
mod resume;
mod sample;
mod sharing;
mod tiers;
mod toy;
mod tracking;
