//! What building a mask takes beside the mask: in a binary of its own, since every allocation counts.

#![allow(clippy::unwrap_used, reason = "a panic in a test is a failed test")]

mod memory;

use std::ops::Range;

use memory::{FORMS, SLACK_BYTES, build, bytes, causal, measured, naive, warm_up};
use tilefold::{DType, MaskForm, MaskSource};

#[test]
fn building_takes_the_mask_and_no_copy_of_it() {
    const SEQLEN: usize = 4096;
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
