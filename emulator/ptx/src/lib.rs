//! A parser and checking interpreter of the PTX that NVRTC writes for tilefold's kernels.
//!
//! [`Module::parse`] reads a text and refuses, by name and line, whatever it does not understand. [`run`] executes a
//! [`Launch`] on a [`Memory`], blocks in parallel, and gives [`Statistics`] or the [`Fault`] of the first block that has
//! one, with PTX line, instruction, block and thread.
//!
//! # What is checked
//!
//! * **Bounds and life.** Every allocation has 64 GiB of addresses to itself, every static shared variable a guard zone
//!   behind it; freed addresses are not given out again for long. An offset cut to 32 bits misses every allocation.
//! * **Alignment** of each access to its whole size.
//! * **Uninitialised values.** Bytes of global and shared memory must have been written before they are loaded.
//!   Undefined registers may be moved about; an address, a branch, a store to global or shared memory, a vote or a matrix
//!   product that depends on one is a fault. Local memory passes undefined values on.
//! * **Asynchronous copies.** Between `cp.async` and its thread's wait nobody may touch the destination; after the wait
//!   it counts as just written by that thread, so that others need a barrier.
//! * **Races in shared memory.** Two threads, one byte, at least one write, no barrier between: by vector clocks of the
//!   warps, which `bar`/`barrier` join. Inside a warp only `bar.warp.sync` orders memory, as PTX says: neither the order
//!   of instructions nor shuffles, votes, `ldmatrix` or `mma` do (a partial mask counts as the whole warp). Lanes of one
//!   store may write one value to one place. Two of the readers of a byte are remembered: with barriers of the whole
//!   block nothing goes unseen; where named barriers join some warps, a third reader's race may. After two million
//!   barriers of one worker's blocks the evidence starts anew.
//! * **Races in global memory** between blocks of a launch: a byte written by one and touched by another. Atomics (and
//!   volatile or ordered accesses) may meet each other, but not plain accesses of other blocks: a hand-over between
//!   blocks by flags is reported. Races inside a block on global memory are not looked for.
//! * **Partial warps.** A `.sync` instruction makes its lanes wait for those of its mask; lanes that have left, do not
//!   exist or wait elsewhere are a fault. `mma` and `ldmatrix` need all 32 lanes, block barriers all that have not left.
//! * **Barriers** that never complete; integer division by zero; `trap`; a budget of instructions for each block.
//!
//! # How it runs
//!
//! Warps execute 32 lanes together, each from barrier to barrier. Diverged lanes follow a min-PC scheme (the reason
//! is told in `warp.rs`): the group with the lowest program counter runs, groups that meet become one.
//!
//! # Numerics
//!
//! Arithmetic rounds as PTX says, with the NaN of NVIDIA hardware, `.ftz` and `.sat`. `.approx` instructions give the
//! correctly rounded value (hardware: a few units off). `mma` forms exact products and cuts the sum of every eight of
//! them (four for tf32) and the accumulator towards zero, as A100 tensor cores were measured to do.
//!
//! # What it cannot show
//!
//! Timing, the memory model beyond races, the loads of `.nc` from memory that the same kernel writes, and whatever
//! ptxas does to the PTX.

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
