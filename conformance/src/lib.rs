//! One table of cases that holds every backend of `tilefold` against one f64 oracle.
//!
//! [`cases`] is the table; [`values`] draws a case's inputs and rounds them to its dtype; [`buffer`] lays operands
//! out in device memory with garbage around and in them; [`exchange`] runs both passes; [`oracle`] compares every
//! result with the f64 reference; [`tolerance`] says how far a result may be off, from [`plain`], the same
//! computation unfused. [`suite`] makes the trials of a device, merging, relayout, accumulate, rope, determinism and memory included;
//! [`report`] sums up what came of them.
//!
//! Backends are reached through [`tilefold_core::Backend`] alone, so that the suite runs on a user's device, too.

pub mod buffer;
pub mod case;
pub mod cases;
mod determinism;
mod device_trials;
pub mod exchange;
mod hosted;
mod large;
mod merging;
pub mod oracle;
mod packed;
pub mod plain;
pub mod planted;
mod relayouts;
pub mod report;
mod ropes;
mod sharded;
pub mod subject;
pub mod suite;
mod sums;
pub mod tolerance;
pub mod values;
