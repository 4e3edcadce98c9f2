//! The suite can fail: each planted bug is found, and a backend without a bug passes.

#![allow(clippy::unwrap_used, reason = "a panic in a test is a failed test")]

use std::sync::Arc;

use tilefold::CpuBackend;
use tilefold_conformance::case::DTYPES;
use tilefold_conformance::planted::{Bug, Planted};
use tilefold_conformance::report::Report;
use tilefold_conformance::suite::{Filter, Subject, trials};
use tilefold_core::{Backend, DType, Precision};

/// Runs the trials whose names contain `part` on the oracle with a bug in it, but for those over ranks: the oracle's backward
/// pass takes the softmax from the keys it has, where theirs needs that of all ranks' keys.
fn report(bug: Option<Bug>, precision: impl Into<Precision>, part: &str) -> Report {
    report_of(bug, precision, part, |group| group != "sharded")
}

/// The same for groups of trials.
fn report_of(
    bug: Option<Bug>,
    precision: impl Into<Precision>,
    part: &str,
    has_group: impl Fn(&str) -> bool,
) -> Report {
    let inner: Arc<dyn Backend> = Arc::new(CpuBackend::new().unwrap());
    let device: Arc<dyn Backend> = Arc::new(Planted::new(inner, bug));
    let subject = Subject { device, twins: Vec::new() };
    let filter = Filter { precisions: vec![precision.into()], contains: Some(part.to_owned()), ..Filter::default() };
    let trials = trials(&subject, &filter).into_iter().filter(|trial| has_group(trial.group)).collect();
    Report::of(trials, |_| ())
}

/// Where a bug has to show: trials and what a failure names.
fn traces(bug: Bug) -> (&'static str, &'static str) {
    match bug {
        Bug::CausalOffByOne => ("structural/causal/square", "out["),
        Bug::WindowMirrored => ("window/3..64/0", "out["),
        Bug::OffsetsIgnored => ("structural/causal/first_queries", "out["),
        Bug::AlibiSign => ("structural/alibi", "out["),
        Bug::KeyMaskInverted => ("key_mask/random/zero", "out["),
        Bug::KeyLengthOffByOne => ("kv_lengths/one", "out["),
        Bug::SegmentsIgnored => ("segments/packed", "out["),
        Bug::WrongScale => ("head_dim/32-16", "out["),
        Bug::HeadsInTurn => ("gqa/4over2", "out["),
        Bug::HeadsSwapped => ("outer/1x2x16", "out["),
        Bug::TailUnwritten => ("seqlen/17", "out["),
        Bug::KeyTailUnwritten => ("gradients/k_of_plain", "dk["),
        Bug::EmptyRowsNan => ("key_mask/every_second_row/zero", "out["),
        Bug::EmptyRowsExchanged => ("window/0..0/90/uniform", "out["),
        Bug::LseRounded => ("extreme/uniform_-1e9/384", "dq["),
        Bug::LseBase2 => ("seqlen/33", "lse["),
        Bug::BiasGradientDropped => ("biases/mask_and_pair", "dbias1"),
        Bug::BiasGradientMissesRow => ("bias/11hqk_alone", "dbias0["),
        Bug::BiasGradientScaled => ("bias/bnhqk", "dbias0["),
        Bug::BiasGradientInHalf => ("outer/3x5600x4", "dbias0["),
        Bug::KeyGradientUnscaled => ("seqlen/33", "dk["),
        Bug::GateGradient => ("gate/normal", "d_gate["),
        Bug::GateForgottenInBackward => ("gate/normal", "dv["),
        Bug::Nondeterministic => ("determinism/seqlen/97/again", "out differs"),
        Bug::RoundedToTf32 | Bug::RoundedToBf16 => ("workload/triangle_starting", "out["),
        Bug::Inaccurate => ("workload/triangle_starting", "out"),
        Bug::PackedReadDense => ("layout/packed/21", "out["),
        Bug::ShortStrides => ("large/far_strides", "out["),
        Bug::FillMissesTail => ("relayout/fill", "element "),
        Bug::RelayoutForwards => ("_to_f32/backwards", "element "),
        Bug::RelayoutTruncates => ("relayout/f32_to_bf16/flat", "element "),
        Bug::MergeLowIgnored => ("merge/arithmetic", "row 4: out"),
        Bug::MergeEmptyPartCounts => ("merge/all_parts_empty", "expected exactly"),
        Bug::AccumulateOverwrites => ("accumulate/f32_to_f32/flat", "element "),
        Bug::RopePositionsInSingle => ("far/forward", "element "),
        Bug::RopeInverseForgotten => ("partial/adjoint", "<Rx, y>"),
    }
}

#[test]
fn every_planted_bug_is_found() {
    for bug in Bug::ALL {
        let (part, named) = traces(bug);
        let dtypes = match bug {
            // Copies, sums and rotations do not depend on the dtype of q.
            Bug::FillMissesTail
            | Bug::RelayoutForwards
            | Bug::RelayoutTruncates
            | Bug::AccumulateOverwrites
            | Bug::RopePositionsInSingle
            | Bug::RopeInverseForgotten => &DTYPES[..1],
            Bug::BiasGradientInHalf => &DTYPES[1..],
            Bug::RoundedToTf32 | Bug::RoundedToBf16 => &DTYPES[..1],
            _ => &DTYPES[..],
        };
        for &dtype in dtypes {
            let report = report(Some(bug), dtype, part);
            let failures: Vec<_> = report.failures().collect();
            if let Some((name, reason)) = report.skips().next() {
                println!("{bug:?}: {name} cannot run here: {reason}");
                continue;
            }
            assert!(!failures.is_empty(), "{bug:?} in {dtype} was not found by any of {} trials", report.results.len());
            let seen = failures.iter().any(|(_, message)| message.contains(named));
            assert!(seen, "{bug:?} in {dtype} shows elsewhere than in {named}: {:?}", failures[0]);
        }
    }
}

#[test]
fn offsets_that_are_ignored_show_over_ranks() {
    // Only outputs count: the oracle's gradients are not those of ranks, whatever the bug.
    let outputs_off = |bug| {
        let report = report_of(bug, DType::F32, "sharded/structural/causal", |group| group == "sharded");
        assert!(!report.results.is_empty());
        report.failures().filter(|(_, message)| message.contains(": out[")).count()
    };
    assert_eq!(outputs_off(None), 0);
    assert!(outputs_off(Some(Bug::OffsetsIgnored)) > 0);
}

#[test]
fn one_percent_shows_in_every_result_and_dtype() {
    for dtype in DTYPES {
        let report = report(Some(Bug::Inaccurate), dtype, "workload/triangle_starting");
        let (_, message) = report.failures().next().unwrap();
        for name in ["out", "dq", "dk", "dv", "d_gate", "dbias0", "dbias1"] {
            let named = message.split("; ").any(|part| part.starts_with(name) || part.contains(&format!(": {name}")));
            assert!(named, "{dtype}: {name} is 1 % off, and `{message}` does not say so");
        }
    }
}

#[test]
fn where_tf32_is_allowed_nothing_coarser_is() {
    let part = "workload/";
    let tf32 = report(Some(Bug::RoundedToTf32), Precision::TF32, part);
    assert!(tf32.is_success() && !tf32.results.is_empty(), "{:#?}", tf32.failures().collect::<Vec<_>>());
    let coarser = report(Some(Bug::RoundedToBf16), Precision::TF32, part);
    assert_eq!(coarser.failures().count(), tf32.results.len(), "{:#?}", coarser.results);
}

#[test]
fn failures_name_case_seed_tensor_index_and_numbers() {
    let report = report(Some(Bug::HeadsSwapped), DType::BF16, "outer/1x2x16");
    let (name, message) = report.failures().next().unwrap();
    for word in [name, "seed 0x", "out[", "expected ", "got ", "allowed error"] {
        assert!(message.contains(word), "`{message}` does not say `{word}`");
    }
}

#[test]
fn the_oracle_itself_passes() {
    for dtype in DTYPES {
        for part in [
            "extreme",
            "nan/",
            "kv_lengths",
            "structural",
            "gradients",
            "key_mask",
            "everything",
            "layout",
            "magnitude",
            "bias/b1hq1",
            "merge",
            "relayout",
            "accumulate",
            "rope",
            "window",
        ] {
            let report = report(None, dtype, part);
            assert!(!report.results.is_empty(), "{part} names no trial");
            let failures: Vec<_> = report.failures().collect();
            assert!(failures.is_empty(), "{dtype}/{part}: {failures:#?}");
        }
    }
}
