//! How memory is counted, and the masks whose memory it is.

use std::time::Instant;

use peak_alloc::PeakAlloc;
use rayon::prelude::*;
use tilefold::{DType, Device, Mask, MaskForm, MaskOptions, MaskSource, StructuralMask, build_mask};

#[global_allocator]
static MEMORY: PeakAlloc = PeakAlloc;

/// Tiles of the threads, and what the test runner holds meanwhile.
pub(crate) const SLACK_BYTES: usize = 1 << 20;

pub(crate) const FORMS: [MaskForm; 4] =
    [MaskForm::Bool, MaskForm::Additive(DType::F32), MaskForm::Additive(DType::BF16), MaskForm::BitPacked];

/// Most bytes held while `build` runs, beyond those held before, and its seconds.
pub(crate) fn measured<T>(build: impl FnOnce() -> T) -> (usize, f64, T) {
    let before = MEMORY.current_usage();
    MEMORY.reset_peak_usage();
    let start = Instant::now();
    let built = build();
    (MEMORY.peak_usage() - before, start.elapsed().as_secs_f64(), built)
}

/// As `torch.tril(torch.ones(s, s)) < 0.5`, whose operations each have an output of their own; then -inf where it holds.
pub(crate) fn naive(seqlen: usize) -> (Vec<u8>, Vec<f32>) {
    let (ones, mut lower, mut hidden, mut added) = (vec![1.0_f32; seqlen * seqlen], vec![], vec![], vec![]);
    let below = |(i, &one): (usize, &f32)| if i % seqlen <= i / seqlen { one } else { 0.0 };
    ones.par_iter().enumerate().map(below).collect_into_vec(&mut lower);
    drop(ones);
    lower.par_iter().map(|&one| u8::from(one < 0.5)).collect_into_vec(&mut hidden);
    drop(lower);
    hidden.par_iter().map(|&hidden| if hidden == 1 { f32::NEG_INFINITY } else { 0.0 }).collect_into_vec(&mut added);
    (hidden, added)
}

pub(crate) fn causal() -> StructuralMask {
    StructuralMask { causal: true, ..StructuralMask::default() }
}

pub(crate) fn build(source: MaskSource<'_>, seqlen: usize, form: MaskForm, threshold: Option<u64>) -> Mask {
    let options = MaskOptions { form, device_threshold_bytes: threshold, ..MaskOptions::default() };
    build_mask(&Device::cpu().unwrap(), source, seqlen, seqlen, &options).unwrap()
}

pub(crate) fn bytes(seqlen: usize, form: MaskForm) -> usize {
    let pairs = seqlen * seqlen;
    match form {
        MaskForm::Additive(dtype) => pairs * dtype.size_bytes(),
        MaskForm::BitPacked => pairs / 8,
        _ => pairs,
    }
}

/// The threads start, and devices are found, before anything is counted.
pub(crate) fn warm_up() {
    build((&causal()).into(), 256, MaskForm::Bool, None);
}
