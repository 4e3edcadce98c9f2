//! The forward kernel, compiled by NVRTC and interpreted, against the f64 oracle: small cases of every feature.
//!
//! `TILEFOLD_CASES=substring` picks cases; `TILEFOLD_CASES=all` takes the whole table.
#![cfg(all(target_os = "linux", target_arch = "x86_64"))]
#![allow(clippy::unwrap_used, clippy::panic, clippy::print_stdout, reason = "a test fails by panicking")]

mod interpreted;

use std::time::Instant;

use interpreted::Interpreted;
use tilefold_conformance::case::Case;
use tilefold_conformance::{cases, oracle};
use tilefold_core::{DType, Gradients};
use tilefold_emulator_nvrtc::Release;

/// Logits a case may have: the interpreter takes milliseconds for a thousand.
const MOST_LOGITS: f64 = 40_000.0;

fn small(dtype: DType) -> Vec<Case> {
    let wanted = std::env::var("TILEFOLD_CASES").unwrap_or_default();
    let problem = |case: &Case| tilefold_core::AttentionProblem::new(case.spec.clone()).unwrap();
    let cases = cases::all(dtype, &[64]).into_iter().map(|mut case| {
        case.spec.gradients = Gradients::default();
        case
    });
    cases
        .filter(|case| wanted == "all" || (case.title().contains(&wanted) && problem(case).logits() <= MOST_LOGITS))
        .collect()
}

/// To compile a case takes longer than to run it.
fn one_of_each_group(dtype: DType) -> Vec<Case> {
    let mut cases = small(dtype);
    cases.dedup_by_key(|case| case.group);
    cases
}

fn check(dtype: DType) {
    check_cases(Release::Newest, &small(dtype));
}

fn check_cases(release: Release, cases: &[Case]) {
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
fn single_agrees_with_the_oracle() {
    check(DType::F32);
}

/// What bf16 does not share with it: conversions, the type of the products.
#[test]
fn half_agrees_with_the_oracle() {
    check_cases(Release::Newest, &one_of_each_group(DType::F16));
}

#[test]
fn brain_agrees_with_the_oracle() {
    check(DType::BF16);
}

#[test]
fn the_oldest_compiler_agrees_as_well() {
    check_cases(Release::Oldest, &one_of_each_group(DType::BF16));
}
