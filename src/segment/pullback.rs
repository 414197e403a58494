//! Gradients of one segment.
