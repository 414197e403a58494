//! One integration binary; modules are named by behaviour.

mod config;
mod equivalence;
mod parity;
mod ranks;
mod toy;
