//! Instructions against values worked out by hand from the PTX manual, and every kind of fault.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    reason = "a test that stops has failed; its numbers are small"
)]

mod conversions;
mod faults;
mod floats;
mod harness;
mod integers;
mod launches;
mod matrices;
mod memories;
mod refusals;
mod warps;
