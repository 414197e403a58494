//! One integration binary; modules are named by behaviour.

#[cfg(any(feature = "cuda", feature = "emulate"))]
mod accelerator;
mod bad_input;
mod bad_runs;
mod captions;
mod config;
mod demo;
mod equivalence;
mod faults;
mod half;
mod harness;
mod interrupt;
mod layers;
mod odd_files;
mod offload;
mod output_folder;
mod parity;
mod pictures;
mod plan;
mod processes;
mod profile;
mod ranks;
mod resume;
mod sample;
mod sharing;
mod tiers;
mod toy;
mod tracking;

/// The program's own, which counts what activations take.
#[global_allocator]
static ALLOCATOR: dblaunch::device::Keeping<std::alloc::System> = dblaunch::device::Keeping::over(std::alloc::System);
