//! The kernels for AMD on the host, lane by lane, against the f64 oracle: what they compute, not how fast.
//!
//! The same source that is compiled for gfx90a and gfx942 runs with a host compiler and the few builtins it uses.
#![cfg(all(target_os = "linux", target_arch = "x86_64"))]
#![allow(clippy::unwrap_used, clippy::panic, reason = "a test fails by panicking")]
#![allow(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "small numbers of a test")]

mod cases;
mod device;
mod host;
mod tensor;

use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};

use cases::{Case, cases};
use tensor::Tensor;
use tilefold_conformance::case::DTYPES;
use tilefold_conformance::tolerance::{self, Stored};
use tilefold_conformance::{self as conformance, plain, values::round_to};
use tilefold_core::attention::reference::{self, ReferenceInputs};
use tilefold_core::{AttentionProblem, BiasSpec, DType, Gradients};
use tilefold_kernels::params::{MergeParams, Operand};
use tilefold_kernels::{AttentionOperands, ForwardOutputs, Launch, Vendor, catalogue, forward, kv_lengths_strides};

/// Uniform numbers with a seed.
struct Random(u64);

impl Random {
    /// From 0 to 1.
    fn next(&mut self) -> f64 {
        // SplitMix64.
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        ((z ^ (z >> 31)) >> 11) as f64 / (1_u64 << 53) as f64
    }

    /// So many from -1.7 to 1.7, of variance 1, that a dtype holds.
    fn numbers(&mut self, dtype: DType, count: usize) -> Vec<f64> {
        (0..count).map(|_| round_to(dtype, (2.0 * self.next() - 1.0) * 3.0_f64.sqrt())).collect()
    }
}

/// Checks all, as many at a time as there are processors.
fn check_all<T: Sync>(cases: &[T], check: impl Fn(usize, &T) -> Result<(), String> + Sync) {
    let (next, wrong) = (AtomicUsize::new(0), Mutex::new(Vec::new()));
    let work = || {
        loop {
            let number = next.fetch_add(1, Relaxed);
            let Some(case) = cases.get(number) else { return };
            if let Err(what) = check(number, case) {
                wrong.lock().unwrap().push(what);
            }
        }
    };
    let workers = std::thread::available_parallelism().map_or(1, usize::from);
    std::thread::scope(|scope| (0..workers).for_each(|_| drop(scope.spawn(work))));
    let wrong = wrong.into_inner().unwrap();
    assert!(wrong.is_empty(), "{} of {} cases:\n{}", wrong.len(), cases.len(), wrong.join("\n"));
}

#[test]
fn forward_is_the_oracles() {
    check_all(&cases(), |number, case| {
        let seed = number as u64;
        check_forward(case, seed).map_err(|what| format!("{}, seed {seed}: {what}", case.name()))
    });
}

/// Tiles of 64 queries by 64 keys of a case of the conformance suite; more take the lanes too long.
const MOST_TILES: usize = 48;

/// The conformance suite's cases, with dK, dV and the gradients of biases without a query axis; and that of the gate, from the
/// preparation.
#[test]
fn gradients_by_keys_are_the_oracles() {
    check_gradients(&|wanted, biases| {
        wanted.q = false;
        for (wanted, bias) in wanted.biases.iter_mut().zip(biases) {
            *wanted = *wanted && bias.shape[3] == 1 && bias.shape[4] > 1;
        }
    });
}

/// The same with dQ and the gradients of other biases.
#[test]
fn gradients_by_queries_are_the_oracles() {
    check_gradients(&|wanted, biases| {
        (wanted.k, wanted.v, wanted.gate) = (false, false, false);
        for (wanted, bias) in wanted.biases.iter_mut().zip(biases) {
            *wanted = *wanted && (bias.shape[3] > 1 || bias.shape[4] == 1);
        }
    });
}

/// Checks the suite's cases with those of their gradients that `keep` leaves.
fn check_gradients(keep: &dyn Fn(&mut Gradients, &[BiasSpec])) {
    let mut cases = Vec::new();
    for (turn, dtype) in DTYPES.into_iter().enumerate() {
        for (number, mut case) in conformance::cases::all(dtype, &[32, 256]).into_iter().enumerate() {
            keep(&mut case.spec.gradients, &case.spec.biases);
            let wanted = &case.spec.gradients;
            let any = wanted.q || wanted.k || wanted.v || wanted.biases.contains(&true);
            // The types differ in loads, products and rounding: of most cases every second runs, in one of them in turn.
            let has_turn = ALL_TYPES.contains(&case.group) || number % (2 * DTYPES.len()) == 2 * turn;
            if any && has_turn && case.tiles() <= MOST_TILES {
                cases.push(case);
            }
        }
    }
    let device = device::Lanes::new();
    check_all(&cases, |_, case| conformance::oracle::check_case(&device, case).map(drop));
}

/// Groups of the conformance suite whose cases run in every dtype.
const ALL_TYPES: [&str; 2] = ["head_dim", "everything"];

fn check_forward(case: &Case, seed: u64) -> Result<(), String> {
    let problem = AttentionProblem::new(case.spec.clone()).map_err(|error| error.to_string())?;
    let spec = problem.spec();
    let mut random = Random(seed);
    let mut numbers = |dtype, shape: &[usize]| random.numbers(dtype, shape.iter().product());
    let dtype = spec.dtype;
    let mut inputs = ReferenceInputs {
        q: numbers(dtype, &problem.q_shape()),
        k: numbers(dtype, &problem.k_shape()),
        v: numbers(dtype, &problem.v_shape()),
        biases: spec.biases.iter().map(|bias| numbers(bias.dtype, &bias.shape)).collect(),
        gate: spec.gate.then(|| numbers(dtype, &problem.out_shape())),
        key_mask: None,
        q_segments: None,
        k_segments: None,
    };
    let rows = spec.batch * spec.rows;
    let key_width = spec.kv_heads * spec.head_dim;
    for (key, k) in inputs.k.chunks_mut(key_width).enumerate().filter(|(key, _)| key % spec.seqlen_k >= case.late) {
        k.iter_mut().for_each(|k| *k = round_to(dtype, (30.0 + (key % 7) as f64) * *k));
    }
    let keys = |keep: &dyn Fn(usize, usize) -> bool| -> Vec<bool> {
        (0..rows)
            .flat_map(|row| (0..spec.seqlen_k).map(move |key| (row, key)))
            .map(|(row, key)| keep(row, key))
            .collect()
    };
    inputs.key_mask = spec.key_mask.then(|| keys(&|row, key| case.keeps(row, key)));
    let ids = |length: usize| (0..rows * length).map(|at| (at % length / case.segment) as i32).collect();
    inputs.q_segments = spec.segments.then(|| ids(spec.seqlen_q));
    inputs.k_segments = spec.segments.then(|| ids(spec.seqlen_k));
    let expected = reference::forward(&problem, &inputs);
    // What excluded keys hold may not matter: NaN on the device.
    let mut device = inputs.clone();
    if let Some(mask) = &inputs.key_mask {
        let width = |channels| spec.kv_heads * channels;
        for (row, &keep) in mask.iter().enumerate().filter(|_| case.poisoned) {
            if !keep {
                device.k[row * width(spec.head_dim)..(row + 1) * width(spec.head_dim)].fill(f64::NAN);
                device.v[row * width(spec.head_dim_v)..(row + 1) * width(spec.head_dim_v)].fill(f64::NAN);
                // A bias of keys has a number for each of them.
                device.biases.iter_mut().filter(|bias| bias.len() == mask.len()).for_each(|bias| bias[row] = f64::NAN);
            }
        }
    }

    let step = case.step;
    let mut q = Tensor::of(dtype, &problem.q_shape(), step, &device.q);
    let mut k = Tensor::of(dtype, &problem.k_shape(), step, &device.k);
    let mut v = Tensor::of(dtype, &problem.v_shape(), step, &device.v);
    let mut gate = device.gate.as_ref().map(|gate| Tensor::of(dtype, &problem.out_shape(), step, gate));
    let mut biases: Vec<Tensor> = (spec.biases.iter().zip(&device.biases))
        .map(|(bias, values)| Tensor::of(bias.dtype, &bias.shape, case.bias_step, values))
        .collect();
    let of_rows =
        |length: usize, dtype, values: Vec<f64>| Tensor::of(dtype, &[spec.batch, spec.rows, length], 1, &values);
    let as_numbers = |ids: &Vec<i32>| ids.iter().map(|&id| f64::from(id)).collect::<Vec<f64>>();
    let mut mask = (inputs.key_mask.as_ref())
        .map(|mask| of_rows(spec.seqlen_k, DType::Bool, mask.iter().map(|&keep| f64::from(u8::from(keep))).collect()));
    let mut q_ids = inputs.q_segments.as_ref().map(|ids| of_rows(spec.seqlen_q, DType::I32, as_numbers(ids)));
    let mut k_ids = inputs.k_segments.as_ref().map(|ids| of_rows(spec.seqlen_k, DType::I32, as_numbers(ids)));
    let lengths = spec.kv_lengths.clone().unwrap_or_default();
    let slopes = spec.mask.alibi_slopes.clone();
    let mut out = Tensor::new(dtype, &problem.out_shape(), step);
    let mut lse = Tensor::new(DType::F32, &problem.lse_shape(), 1);
    let mut lse_low = Tensor::new(DType::F32, &problem.lse_shape(), 1);

    let [of_batch, of_row] = kv_lengths_strides(&problem);
    let lengths_operand = Operand { data: lengths.as_ptr().addr() as u64, strides: [of_batch, of_row, 0, 0, 0] };
    let operands = AttentionOperands {
        q: q.operand(),
        k: k.operand(),
        v: v.operand(),
        biases: biases.iter_mut().map(Tensor::operand).collect(),
        key_mask: mask.as_mut().map(Tensor::operand),
        segments: q_ids.as_mut().zip(k_ids.as_mut()).map(|(q, k)| [q.operand(), k.operand()]),
        kv_lengths: spec.kv_lengths.is_some().then_some(lengths_operand),
        alibi_slopes: slopes.as_ref().map(|slopes| slopes.as_ptr().addr() as u64),
        gate: gate.as_mut().map(Tensor::operand),
    };
    let outputs = ForwardOutputs { out: out.operand(), lse: Some(lse.operand()), lse_low: Some(lse_low.operand()) };
    let launch = forward(Vendor::Amd, &problem, &operands, &outputs).map_err(|error| error.to_string())?;
    host::run(&launch, "ForwardParams")?;

    for (name, tensor) in [("out", &out), ("lse", &lse), ("lse_low", &lse_low)] {
        if !tensor.guards_hold() {
            return Err(format!("{name}: something beside its elements was written"));
        }
    }
    let zeros = vec![0.0; expected.out.len()];
    let plain = plain::compute(&problem, &inputs, &zeros, false, &vec![DType::F32; spec.biases.len()]);
    let of = |name| plain.iter().find(|estimate| estimate.name == name).ok_or("no such result");
    let sums: Vec<f64> = lse.values().iter().zip(lse_low.values()).map(|(high, low)| high + low).collect();
    let both_parts = Stored { unit: 2_f64.powi(-46), ..DType::F32.into() };
    tolerance::check("out", &out.values(), &expected.out, of("out")?, dtype.into())?;
    tolerance::check("lse", &lse.values(), &expected.lse, of("lse")?, DType::F32.into())?;
    tolerance::check("lse + lse_low", &sums, &expected.lse, of("lse")?, both_parts)?;
    Ok(())
}

/// What merging in f32 may miss of numbers up to 1.8: two exponentials off by 2^-22 each, four roundings.
const MERGE_TOLERANCE: f64 = 1.8 * (2.0 / 4_194_304.0 + 4.0 / 16_777_216.0);

fn close(name: &str, row: usize, got: &[f64], expected: &[f64], allowed: f64) -> Result<(), String> {
    for (channel, (&got, &expected)) in got.iter().zip(expected).enumerate() {
        if !(got == expected || (got - expected).abs() <= allowed) {
            return Err(format!("{name}[{row}][{channel}]: expected {expected}, got {got}, allowed {allowed:.2e}"));
        }
    }
    Ok(())
}

#[test]
fn merge_is_the_sum_over_both_sides() {
    for (lanes, channels) in [(1, 5), (8, 20), (32, 40)] {
        let name = format!("merge bf16 into f32 lanes={lanes}");
        let kernels = catalogue(Vendor::Amd).unwrap();
        let kernel = kernels.into_iter().map(|entry| entry.kernel).find(|kernel| kernel.name == name).unwrap();
        let (rows, mut random) = (37, Random(lanes));
        let (out_shape, lse_shape) = ([1, 1, rows, 1, channels], [1, 1, 1, rows]);
        let mut numbers = |dtype, count| random.numbers(dtype, count);
        let part = numbers(DType::BF16, rows * channels);
        let (acc, part_lse, mut acc_lse) =
            (numbers(DType::F32, rows * channels), numbers(DType::F32, rows), numbers(DType::F32, rows));
        acc_lse[3] = f64::NEG_INFINITY;
        let zeros = vec![0.0; rows];
        let mut tensors = [
            Tensor::of(DType::BF16, &out_shape, 1, &part),
            Tensor::of(DType::F32, &lse_shape, 1, &part_lse),
            Tensor::of(DType::F32, &lse_shape, 1, &zeros),
            Tensor::of(DType::F32, &out_shape, 1, &acc),
            Tensor::of(DType::F32, &lse_shape, 1, &acc_lse),
            Tensor::of(DType::F32, &lse_shape, 1, &zeros),
        ];
        let [out, lse, lse_low, acc_out, of_acc, of_acc_low] = tensors.each_mut().map(Tensor::operand);
        let params = MergeParams {
            out,
            lse,
            lse_low,
            acc_out,
            acc_lse: of_acc,
            acc_lse_low: of_acc_low,
            batch: 1,
            rows: 1,
            seqlen_q: rows as i64,
            heads: 1,
            head_dim_v: channels as i64,
            first_block: 0,
        };
        let blocks = (rows as u64).div_ceil(u64::from(kernel.block_threads) / lanes);
        host::run(&Launch { kernel, blocks, params }, "MergeParams").unwrap();
        assert!(tensors.iter().all(Tensor::guards_hold), "{name}");
        let (got, got_lse) = (tensors[3].values(), tensors[4].values());
        for row in 0..rows {
            let (a, b) = (acc_lse[row].exp(), part_lse[row].exp());
            close("lse", row, &got_lse[row..=row], &[(a + b).ln()], MERGE_TOLERANCE).unwrap();
            let range = row * channels..(row + 1) * channels;
            let mixed: Vec<f64> =
                acc[range.clone()].iter().zip(&part[range.clone()]).map(|(x, y)| (a * x + b * y) / (a + b)).collect();
            close("out", row, &got[range], &mixed, MERGE_TOLERANCE).unwrap();
        }
    }
}
