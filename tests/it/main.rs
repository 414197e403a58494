//! Tests of whole behaviours, one module each; arithmetic is tested beside the code that does it.

mod config;
