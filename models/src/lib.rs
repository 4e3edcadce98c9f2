//! Models written over tilefold's primitives: examples to read and to take from, not a framework.

pub mod genslm;
