//! One integration binary; modules are named by behaviour.

mod equivalence;
mod toy;
