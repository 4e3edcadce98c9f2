//! The same at 16 384 and 32 768 positions: `cargo bench --bench mask_memory` prints the rows of the record as JSON lines; needs
//! 9 GB.

#![allow(clippy::unwrap_used, clippy::print_stdout, reason = "a program that stops where something fails")]

mod memory;

use memory::{FORMS, SLACK_BYTES, build, bytes, causal, measured, naive, warm_up};

fn main() {
    warm_up();
    for seqlen in [16_384, 32_768] {
        let (peak, seconds, (hidden, added)) = measured(|| naive(seqlen));
        row(seqlen, "naive, bool and f32", size_of_val(&hidden[..]) + size_of_val(&added[..]), peak, seconds);
        drop((hidden, added));
        for form in FORMS {
            let (peak, seconds, mask) = measured(|| build((&causal()).into(), seqlen, form, None));
            row(seqlen, &format!("{form:?}"), mask.tensor().storage().bytes(), peak, seconds);
            assert!(peak <= bytes(seqlen, form) + SLACK_BYTES);
        }
    }
}

fn row(seqlen: usize, built: &str, result_bytes: usize, peak_bytes: usize, seconds: f64) {
    println!(
        "{{\"seqlen\": {seqlen}, \"built\": \"{built}\", \"result_bytes\": {result_bytes}, \"peak_bytes\": {peak_bytes}, \
         \"seconds\": {seconds:.3}}}"
    );
}
