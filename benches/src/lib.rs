//! Named attention workloads, ready to run and to time.
//!
//! `definitions/workloads.toml` is the one list of workloads: the criterion benches (`benches/attention.rs`), the side-by-side
//! runner (`peers/`) and `tilefold bench` read the same file. A [`Launch`] owns the operands and results of one attention,
//! so that a timing holds the kernels and nothing else.

mod input;
mod launch;
mod memory;
mod operands;
mod pass;
mod rank;
mod workload;

pub use input::{filled_by_rows, normal, random_bools};
pub use launch::Launch;
pub use memory::{peak_rss_bytes, reset_peak_rss, rss_bytes};
pub use operands::Operands;
pub use pass::Pass;
pub use rank::Omitted;
pub use workload::{DefinitionError, Workload, definitions, find};
