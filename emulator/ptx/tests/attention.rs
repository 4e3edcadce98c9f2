//! A whole kernel as NVRTC writes it, right against f64; then the same with one bug planted, which has to be found.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    reason = "a test that stops has failed; its numbers are small"
)]

use half::bf16;
use tilefold_emulator_ptx::{Fault, FaultKind, Launch, Memory, Module, Statistics, run};

const PTX: &str = include_str!("attention.ptx");
const LENGTH: usize = 96;
const DEPTH: usize = 16;
const SCALE: f32 = 0.25;

/// Numbers in [-1, 1) that are the same on every machine.
fn numbers(seed: u64, count: usize) -> Vec<f32> {
    let mut state = seed;
    (0..count)
        .map(|_| {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            bf16::from_f32((state >> 40) as f32 / (1u64 << 23) as f32 - 1.0).to_f32()
        })
        .collect()
}

struct Inputs {
    q: Vec<f32>,
    k: Vec<f32>,
    v: Vec<f32>,
    bias: Vec<f32>,
}

fn inputs() -> Inputs {
    let size = LENGTH * DEPTH;
    Inputs { q: numbers(1, size), k: numbers(2, size), v: numbers(3, size), bias: numbers(4, LENGTH * LENGTH) }
}

fn execute(ptx: &str, blocks: u32) -> Result<(Vec<f32>, Statistics), Fault> {
    let module = Module::parse(ptx).unwrap();
    let memory = Memory::new(1 << 24);
    let upload = |bytes: Vec<u8>| {
        let address = memory.allocate(bytes.len() as u64).unwrap();
        memory.write(address, &bytes).unwrap();
        address
    };
    let narrow =
        |values: &[f32]| upload(values.iter().flat_map(|&x| bf16::from_f32(x).to_bits().to_le_bytes()).collect());
    let Inputs { q, k, v, bias } = inputs();
    let bias = upload(bias.iter().flat_map(|x| x.to_le_bytes()).collect());
    let bytes = 2 * LENGTH * DEPTH;
    let out = memory.allocate(bytes as u64).unwrap();
    let mut parameters: Vec<u8> = [narrow(&q), narrow(&k), narrow(&v), bias, out].map(u64::to_le_bytes).concat();
    parameters.extend((LENGTH as i32).to_le_bytes());
    parameters.extend(SCALE.to_le_bytes());
    let launch = Launch {
        kernel: module.kernel("attention").unwrap(),
        module: &module,
        grid: [blocks, 1, 1],
        block: [64, 1, 1],
        dynamic_shared_bytes: 0,
        parameters: &parameters,
    };
    let statistics = run(&memory, &launch)?;
    let mut found = vec![0; bytes];
    memory.read(out, &mut found).unwrap();
    let values = found.as_chunks::<2>().0.iter().map(|bits| bf16::from_bits(u16::from_le_bytes(*bits)).to_f32());
    Ok((values.collect(), statistics))
}

fn worst(found: &[f32]) -> f64 {
    let Inputs { q, k, v, bias } = inputs();
    let mut worst = 0f64;
    for row in 0..LENGTH {
        let dot = |key: usize| -> f64 {
            (0..DEPTH).map(|d| f64::from(q[row * DEPTH + d]) * f64::from(k[key * DEPTH + d])).sum()
        };
        let weights: Vec<f64> =
            (0..LENGTH).map(|key| (f64::from(SCALE) * dot(key) + f64::from(bias[row * LENGTH + key])).exp()).collect();
        let sum: f64 = weights.iter().sum();
        for d in 0..DEPTH {
            let due: f64 =
                weights.iter().enumerate().map(|(key, w)| w * f64::from(v[key * DEPTH + d])).sum::<f64>() / sum;
            worst = worst.max((f64::from(found[row * DEPTH + d]) - due).abs());
        }
    }
    worst
}

/// Values of at most 1, weights and result rounded to bf16 (2^-9 each), and a margin for the f32 sums.
const TOLERANCE: f64 = 2.5 / 512.0;
const BLOCKS: u32 = (LENGTH / 32) as u32;

/// The text with the `nth` occurrence of `from` replaced.
fn planted(from: &str, nth: usize, to: &str) -> String {
    let (at, _) = PTX.match_indices(from).nth(nth).unwrap();
    format!("{}{to}{}", &PTX[..at], &PTX[at + from.len()..])
}

#[test]
fn the_kernel_is_right() {
    let (found, statistics) = execute(PTX, BLOCKS).unwrap();
    let worst = worst(&found);
    assert!(worst < TOLERANCE, "{worst:e}");
    // Four products a tile and warp.
    assert_eq!(statistics.matrix_instructions, u64::from(BLOCKS) * 2 * 4 * (LENGTH as u64 / 16));
}

#[test]
fn a_dropped_barrier_is_found() {
    for nth in 0..2 {
        let found = execute(&planted("bar.sync \t0;", nth, ""), BLOCKS).unwrap_err();
        let kind = &found.kind;
        assert!(
            matches!(
                kind,
                FaultKind::SharedRace { .. } | FaultKind::PendingCopy { .. } | FaultKind::Uninitialised { .. }
            ),
            "{found}"
        );
    }
}

#[test]
fn a_wrong_wait_is_found() {
    for (from, to) in [("wait_group 1;", "wait_group 2;"), ("wait_group 0;", "wait_group 1;")] {
        let found = execute(&planted(from, 0, to), BLOCKS).unwrap_err();
        assert!(matches!(found.kind, FaultKind::PendingCopy { .. }), "{found}");
    }
    let found = execute(&planted("cp.async.commit_group;", 0, ""), BLOCKS).unwrap_err();
    assert!(matches!(found.kind, FaultKind::PendingCopy { .. }), "{found}");
}

#[test]
fn shifted_fragments_give_wrong_numbers() {
    let start = PTX.find("ldmatrix.sync.aligned.m8n8.x4.shared").unwrap();
    let list = &PTX[start..][PTX[start..].find('{').unwrap()..]
        [..=PTX[start..].find('}').unwrap() - PTX[start..].find('{').unwrap()];
    let names: Vec<&str> = list.trim_matches(['{', '}']).split(',').collect();
    let swapped = format!("{{{},{},{},{}}}", names[1], names[0], names[2], names[3]);
    let (found, _) = execute(&planted(list, 0, &swapped), BLOCKS).unwrap();
    assert!(worst(&found) > 4.0 * TOLERANCE);
    let (found, _) = execute(&planted("x4.trans.shared", 0, "x4.shared"), BLOCKS).unwrap();
    assert!(worst(&found) > 4.0 * TOLERANCE);
}

#[test]
fn one_block_too_many_is_out_of_bounds() {
    let found = execute(PTX, BLOCKS + 1).unwrap_err();
    assert!(matches!(found.kind, FaultKind::OutOfBounds { space: "global", .. }), "{found}");
    assert_eq!(found.block, [BLOCKS, 0, 0]);
}
