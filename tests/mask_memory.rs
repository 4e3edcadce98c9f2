//! What building a mask takes beside the mask: in a binary of its own, since every allocation counts.

#![allow(clippy::unwrap_used, reason = "a panic in a test is a failed test")]
#![allow(clippy::print_stdout, reason = "the rows of the record")]

use std::ops::Range;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use peak_alloc::PeakAlloc;
use rayon::prelude::*;
use tilefold::{DType, Device, Mask, MaskForm, MaskOptions, MaskSource, StructuralMask, build_mask};

#[global_allocator]
static MEMORY: PeakAlloc = PeakAlloc;

/// Tiles of the threads, and what the test runner holds meanwhile.
const SLACK_BYTES: usize = 1 << 20;

const FORMS: [MaskForm; 4] =
    [MaskForm::Bool, MaskForm::Additive(DType::F32), MaskForm::Additive(DType::BF16), MaskForm::BitPacked];

/// One measurement at a time.
fn alone() -> MutexGuard<'static, ()> {
    static ALONE: Mutex<()> = Mutex::new(());
    ALONE.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Most bytes held while `build` runs, beyond those held before, and its seconds.
fn measured<T>(build: impl FnOnce() -> T) -> (usize, f64, T) {
    let before = MEMORY.current_usage();
    MEMORY.reset_peak_usage();
    let start = Instant::now();
    let built = build();
    (MEMORY.peak_usage() - before, start.elapsed().as_secs_f64(), built)
}

/// As `torch.tril(torch.ones(s, s)) < 0.5`, whose operations each have an output of their own; then -inf where it holds.
fn naive(seqlen: usize) -> (Vec<u8>, Vec<f32>) {
    let (ones, mut lower, mut hidden, mut added) = (vec![1.0_f32; seqlen * seqlen], vec![], vec![], vec![]);
    let below = |(i, &one): (usize, &f32)| if i % seqlen <= i / seqlen { one } else { 0.0 };
    ones.par_iter().enumerate().map(below).collect_into_vec(&mut lower);
    drop(ones);
    lower.par_iter().map(|&one| u8::from(one < 0.5)).collect_into_vec(&mut hidden);
    drop(lower);
    hidden.par_iter().map(|&hidden| if hidden == 1 { f32::NEG_INFINITY } else { 0.0 }).collect_into_vec(&mut added);
    (hidden, added)
}

fn causal() -> StructuralMask {
    StructuralMask { causal: true, ..StructuralMask::default() }
}

fn build(source: MaskSource<'_>, seqlen: usize, form: MaskForm, threshold: Option<u64>) -> Mask {
    let options = MaskOptions { form, device_threshold_bytes: threshold, ..MaskOptions::default() };
    build_mask(&Device::cpu().unwrap(), source, seqlen, seqlen, &options).unwrap()
}

fn bytes(seqlen: usize, form: MaskForm) -> usize {
    let pairs = seqlen * seqlen;
    match form {
        MaskForm::Additive(dtype) => pairs * dtype.size_bytes(),
        MaskForm::BitPacked => pairs / 8,
        _ => pairs,
    }
}

/// The threads start, and devices are found, before anything is counted.
fn warm_up() {
    build((&causal()).into(), 256, MaskForm::Bool, None);
}

#[test]
fn building_takes_the_mask_and_no_copy_of_it() {
    const SEQLEN: usize = 4096;
    let _alone = alone();
    warm_up();
    let (naive_peak, _, (_, expected)) = measured(|| naive(SEQLEN));
    assert!(naive_peak >= 8 * SEQLEN * SEQLEN, "{naive_peak}");
    let keep = |queries: Range<usize>, keys: Range<usize>, tile: &mut [bool]| {
        let pairs = queries.flat_map(|q| keys.clone().map(move |k| k <= q));
        tile.iter_mut().zip(pairs).for_each(|(keep, sees)| *keep = sees);
    };
    let causal = causal();
    for form in FORMS {
        let bytes = bytes(SEQLEN, form);
        for source in [MaskSource::from(&causal), MaskSource::Keep(&keep)] {
            for threshold in [None, Some(0)] {
                let (peak, _, mask) = measured(|| build(source, SEQLEN, form, threshold));
                assert!((bytes..=bytes + SLACK_BYTES).contains(&peak), "{form:?} {source:?}: {peak} for {bytes}");
                if form == MaskForm::Additive(DType::F32) {
                    assert_eq!(mask.tensor().as_slice::<f32>().unwrap(), expected);
                }
            }
        }
    }
}

/// `cargo test --release --test mask_memory -- --ignored --nocapture` prints the rows of the record as JSON lines; needs 9 GB.
#[test]
#[ignore = "holds 9 GB; run it by name to measure"]
fn measure_16k_and_32k() {
    let _alone = alone();
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
