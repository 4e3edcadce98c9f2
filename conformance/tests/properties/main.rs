//! Random valid problems against the oracle: what the table of cases did not think of.
//!
//! `TILEFOLD_SEED=7` chooses another sequence of problems; a failure prints the seed and the smallest problem found.
//! Problems run on every instruction set of the CPU in turn, or on what `TILEFOLD_DEVICE` and `TILEFOLD_CPU_ARCH` name.

#![allow(clippy::unwrap_used, clippy::panic, reason = "a panic in a test is a failed test")]

mod draw;

use std::cell::Cell;
use std::time::{Duration, Instant};

use proptest::prelude::*;
use proptest::strategy::ValueTree;
use proptest::test_runner::{Config, RngAlgorithm, TestError, TestRng, TestRunner};
use tilefold::{Arch, CpuBackend, Device};
use tilefold_conformance::case::{Case, Place, Poison};
use tilefold_conformance::oracle::check_case;
use tilefold_core::{AttentionProblem, EmptyRows};

/// Problems that are tried however long they take.
const MINIMUM: u32 = 100;

/// Problems that are tried where they take no longer than [`BUDGET`].
const MAXIMUM: u32 = 600;

/// Time after which no further problem is tried, once there were enough.
const BUDGET: Duration = Duration::from_secs(20);

/// The environment variable that chooses the sequence of problems.
const SEED_VARIABLE: &str = "TILEFOLD_SEED";

/// 0 without the variable.
fn seed(setting: Option<&str>) -> Result<u64, String> {
    let parse = |text: &str| text.parse().map_err(|_| format!("{SEED_VARIABLE}: expected a number, got `{text}`"));
    setting.map_or(Ok(0), parse)
}

fn runner(seed: u64) -> TestRunner {
    let mut bytes = [0_u8; 32];
    bytes[..8].copy_from_slice(&seed.to_le_bytes());
    let config = Config { cases: MAXIMUM, max_shrink_time: 30_000, failure_persistence: None, ..Config::default() };
    TestRunner::new_with_rng(config, TestRng::from_seed(RngAlgorithm::ChaCha, &bytes))
}

/// The best device; the CPU once for each instruction set, the fastest first, unless one is asked for.
fn devices() -> Vec<Device> {
    let best = Device::best().unwrap();
    if !matches!(best, Device::Cpu(_)) || std::env::var_os("TILEFOLD_CPU_ARCH").is_some() {
        return vec![best];
    }
    let with_arch = |arch| Device::Cpu(CpuBackend::with_arch(arch).unwrap());
    Arch::available().into_iter().rev().map(with_arch).collect()
}

#[test]
fn random_problems() {
    let setting = std::env::var_os(SEED_VARIABLE).map(|value| value.to_string_lossy().into_owned());
    let seed = seed(setting.as_deref()).unwrap();
    let devices = devices();
    let (start, count) = (Instant::now(), Cell::new(0_u32));
    let result = runner(seed).run(&draw::draw(), |draw| {
        if start.elapsed() > BUDGET && count.get() >= MINIMUM {
            return Ok(());
        }
        count.set(count.get() + 1);
        let device = &devices[draw.device % devices.len()];
        check_case(device, &draw.case()).map(drop).map_err(TestCaseError::fail)
    });
    println!("{} problems in {:.1?}, {SEED_VARIABLE}={seed}", count.get(), start.elapsed());
    match result {
        Err(TestError::Fail(why, draw)) => panic!("{SEED_VARIABLE}={seed}: {why}\n{draw:#?}\n{:#?}", draw.case()),
        other => other.unwrap(),
    }
    assert!(count.get() >= MINIMUM, "only {} problems were tried", count.get());
}

#[test]
fn a_seed_is_a_number() {
    assert_eq!((seed(None), seed(Some("7"))), (Ok(0), Ok(7)));
    for bad in ["", "seven", "-1", "0x7", "99999999999999999999"] {
        assert!(seed(Some(bad)).unwrap_err().contains(&format!("TILEFOLD_SEED: expected a number, got `{bad}`")));
    }
}

/// What a problem has, by name.
fn features(case: &Case) -> Vec<(&'static str, bool)> {
    let (s, fill, places) = (&case.spec, &case.fill, &case.places);
    let repeats = |repeated: &[usize]| !repeated.is_empty();
    let lengths = s.kv_lengths.as_ref().map(Vec::len);
    vec![
        ("plain", s.biases.is_empty() && !s.gate && !s.key_mask && s.mask.window.is_none() && !s.mask.causal),
        ("scale", s.softmax_scale.is_some()),
        ("scale of 0", s.softmax_scale == Some(0.0)),
        ("negative scale", s.softmax_scale.is_some_and(|scale| scale < 0.0)),
        ("magnitude", [fill.q, fill.v, fill.d_out].iter().any(|&values| values != fill.gate)),
        ("wide heads", s.head_dim > 200),
        ("grouped queries", s.kv_heads > 1 && s.heads > s.kv_heads),
        ("repeated q", repeats(&places.q.repeated)),
        ("repeated d_out", repeats(&places.d_out.repeated)),
        ("repeated mask", s.key_mask && repeats(&places.masks.repeated)),
        ("strided lse", places.lse != Place::default()),
        ("strided mask", s.key_mask && places.masks.skip > 0),
        ("f32 gradient of a bias", places.f32_dbiases && !s.biases.is_empty()),
        ("segments of size 1", s.segments && fill.segment_axes.contains(&false)),
        ("NaN in keys", case.poison == Poison::ExcludedKeys),
        ("NaN in a bias", case.poison == Poison::BiasOfExcludedKeys),
        ("one length", lengths == Some(1) && s.batch * s.rows > 1),
        ("lengths of batches", lengths == Some(s.batch) && s.rows > 1 && s.batch > 1),
        ("lengths of rows", lengths == Some(s.batch * s.rows) && s.rows > 1),
        ("mean of empty rows", s.empty_rows == EmptyRows::Uniform && s.mask.window.is_some()),
    ]
}

/// The draw is only as wide as what it really gives.
#[test]
fn random_problems_are_valid_and_have_every_feature() {
    let (mut runner, strategy) = (runner(0), draw::draw());
    let mut counts: Vec<(&str, u32)> = Vec::new();
    for _ in 0..300 {
        let case = strategy.new_tree(&mut runner).unwrap().current().case();
        let problem = AttentionProblem::new(case.spec.clone());
        assert!(problem.is_ok(), "{problem:?}");
        counts.resize(features(&case).len(), ("", 0));
        for (count, (name, has)) in counts.iter_mut().zip(features(&case)) {
            *count = (name, count.1 + u32::from(has));
        }
    }
    assert!(counts.iter().all(|&(_, count)| count > 0), "{counts:?}");
}
