//! Whether a part of the demonstration fits this machine's memory, asked before it starts.

use crate::output::{as_f64, bytes};
use crate::system::Machine;

/// What must be free for each byte that is counted: small tables and the check come on top.
const MARGIN: f64 = 1.1;

/// A part that does not fit.
#[derive(Debug, thiserror::Error)]
#[error("{part} needs {} of memory, and {} are available; {fix}", bytes(*needed_bytes), bytes(*available_bytes))]
pub(super) struct TooLittleMemory {
    part: String,
    needed_bytes: f64,
    available_bytes: f64,
    fix: &'static str,
}

/// Holds what a part takes against what is available now; a system that does not tell refuses nothing.
pub(super) fn check(part: &str, counted_bytes: f64, fix: &'static str) -> Result<(), TooLittleMemory> {
    fits(part, counted_bytes, Machine::now().memory_available_bytes, fix)
}

fn fits(part: &str, counted_bytes: f64, available: u64, fix: &'static str) -> Result<(), TooLittleMemory> {
    let (needed_bytes, available_bytes) = (counted_bytes * MARGIN, as_f64(available));
    if available == 0 || needed_bytes <= available_bytes {
        return Ok(());
    }
    Err(TooLittleMemory { part: part.to_owned(), needed_bytes, available_bytes, fix })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_does_not_fit_is_named_with_both_sizes() {
        assert!(fits("it", 100.0, 111, "").is_ok() && fits("it", 1e20, 0, "").is_ok());
        let message = fits("it", 2e9, 1_000_000_000, "give it less").unwrap_err().to_string();
        assert_eq!(message, "it needs 2.20 GB of memory, and 1.00 GB are available; give it less");
    }
}
