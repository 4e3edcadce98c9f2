//! A parser and checking interpreter of the PTX that NVRTC writes for tilefold's kernels.

#![allow(
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    reason = "registers hold bits: cutting and reinterpreting them is what instructions do"
)]

mod block;
mod decode;
mod execute;
mod fault;
mod global;
mod instruction;
mod launch;
mod layout;
mod lexer;
mod memory;
mod module;
mod parse;
mod parse_body;
mod parse_error;
mod registers;
mod shadow;
mod shared;
mod special;
mod syntax;
mod warp;

pub use fault::{Access, Fault, FaultKind, OtherBlock};
pub use launch::{Launch, Limits, Statistics, run, run_with};
pub use memory::{Memory, MemoryError};
pub use module::{Kernel, Module, Parameter};
pub use parse_error::ParseError;
