//! The backward kernels, compiled by NVRTC and interpreted, against the f64 oracle: small cases of every feature.
//!
//! `TILEFOLD_CASES=substring` picks cases; `TILEFOLD_CASES=all` takes the whole table.
#![cfg(all(target_os = "linux", target_arch = "x86_64"))]
#![allow(clippy::unwrap_used, clippy::panic, clippy::print_stdout, reason = "a test fails by panicking")]

mod interpreted;

use std::time::Instant;

use interpreted::Interpreted;
use tilefold_conformance::case::Case;
use tilefold_conformance::{cases, oracle};
use tilefold_core::{AttentionProblem, AttentionSpec, BiasSpec, DType};
use tilefold_emulator_nvrtc::Release;

/// Logits a case may have: the interpreter takes milliseconds for a thousand.
const MOST_LOGITS: f64 = 40_000.0;

fn small(dtype: DType) -> Vec<Case> {
    let wanted = std::env::var("TILEFOLD_CASES").unwrap_or_default();
    let problem = |case: &Case| AttentionProblem::new(case.spec.clone()).unwrap();
    let asks = |case: &Case| {
        let g = case.spec.gradients;
        g.q || g.k || g.v || g.gate || g.biases.contains(&true)
    };
    (cases::all(dtype, &[64]).into_iter())
        .filter(asks)
        .filter(|case| wanted == "all" || (case.title().contains(&wanted) && problem(case).logits() <= MOST_LOGITS))
        .collect()
}

/// To compile a case takes longer than to run it. All of them where `TILEFOLD_CASES` picks cases.
fn one_of_each_group(dtype: DType) -> Vec<Case> {
    let mut cases = small(dtype);
    if std::env::var_os("TILEFOLD_CASES").is_none() {
        cases.dedup_by_key(|case| case.group);
    }
    cases
}

fn check(release: Release, cases: &[Case]) {
    let device = Interpreted::new(release);
    assert!(!cases.is_empty(), "no case");
    let mut failures = Vec::new();
    for case in cases {
        let start = Instant::now();
        let result = oracle::check_case(&device, case);
        println!("{:7.2} s  {}  {result:?}", start.elapsed().as_secs_f64(), case.title());
        failures.extend(result.err());
    }
    assert!(failures.is_empty(), "{} of {} cases: {}", failures.len(), cases.len(), failures.join("\n"));
}

#[test]
fn brain_agrees_with_the_oracle() {
    check(Release::Newest, &small(DType::BF16));
}

#[test]
fn single_and_half_agree_with_the_oracle() {
    for dtype in [DType::F32, DType::F16] {
        check(Release::Newest, &one_of_each_group(dtype));
    }
}

#[test]
fn the_oldest_compiler_agrees_as_well() {
    for dtype in [DType::F32, DType::BF16] {
        check(Release::Oldest, &one_of_each_group(dtype));
    }
}

/// A problem with a bias for all of `bias`'s axes (batch, rows, heads, queries, keys), and all gradients.
fn with_bias(dtype: DType, rows: usize, lengths: (usize, usize), head_dim: usize, bias: [bool; 5]) -> AttentionSpec {
    let mut spec = AttentionSpec::new(dtype, 2, rows, lengths.0, 2, head_dim);
    spec.seqlen_k = lengths.1;
    let full = [2, rows, 2, lengths.0, lengths.1];
    let shape = std::array::from_fn(|axis| if bias[axis] { full[axis] } else { 1 });
    spec.biases = vec![BiasSpec { shape, dtype }];
    spec.with_all_gradients()
}

/// What the plan decides by size: one pass or two by queries, walks whole or in chunks, dQ whole or in parts.
#[test]
fn every_choice_of_passes_agrees_with_the_oracle() {
    let (pair, per_head) = ([true, false, true, true, true], [false, false, true, true, true]);
    let mut cases = Vec::new();
    for (name, rows, lengths, head_dim, bias) in [
        ("whole_walks", 120, (9, 10), 8, pair),
        ("rows_and_batch_are_walked", 120, (9, 10), 32, per_head),
        ("parts_of_dq", 2, (5, 150), 32, pair),
        ("most_parts_of_dq", 1, (3, 760), 8, pair),
        ("two_passes", 1, (3, 780), 8, pair),
        ("two_passes_by_channels", 2, (20, 40), 33, pair),
        ("dk_and_dv_apart", 1, (18, 20), 136, pair),
    ] {
        for dtype in [DType::F32, DType::BF16] {
            cases.push(Case::new("passes", name, with_bias(dtype, rows, lengths, head_dim, bias)));
        }
    }
    check(Release::Newest, &cases);
}

/// Every broadcast pattern of a bias, both ways dQ may come about.
#[test]
fn every_broadcast_pattern_agrees_with_the_oracle() {
    let cases: Vec<Case> = (0..32_u32)
        .flat_map(|pattern| {
            let bias = std::array::from_fn(|axis| pattern >> axis & 1 == 1);
            [(DType::F16, 8), (DType::BF16, 40), (DType::F32, 8)].map(|(dtype, head_dim)| {
                Case::new("patterns", format!("{pattern:05b}"), with_bias(dtype, 3, (10, 21), head_dim, bias))
            })
        })
        .collect();
    check(Release::Newest, &cases);
}

/// The workspace is known before launch and does not grow with seqlen_q times seqlen_k.
#[test]
fn the_workspace_is_of_the_order_of_the_outputs() {
    let bytes = |length: usize| {
        let spec = with_bias(DType::BF16, 512, (length, length), 32, [true, false, true, true, true]);
        let gradients: usize =
            [3 * spec.batch * spec.rows * length * spec.heads * 32, spec.biases[0].shape.iter().product()].iter().sum();
        let workspace = tilefold_kernels::backward_workspace_bytes(&AttentionProblem::new(spec).unwrap());
        (workspace, 4 * u64::try_from(gradients).unwrap())
    };
    for length in [16, 256, 384, 1024, 4096] {
        let (workspace, gradients) = bytes(length);
        assert!(workspace <= 4 * gradients, "{length}: {workspace} bytes beside gradients of {gradients} in f32");
    }
}
