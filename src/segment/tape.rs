//! What a pass over a graph remembers.
