//! What ranks as threads cost: ring attention over two ranks of one thread each against one rank with two threads, in turns.
//!
//! `cargo bench -p tilefold-comm --bench ring` prints medians and ratios, and `-- --json FILE` writes them to a file as well. Causal,
//! 16 384 positions, 8 heads of 64 channels, zigzag.

#![allow(clippy::unwrap_used, clippy::print_stdout, reason = "a program that stops where something fails")]

use std::sync::{Arc, Barrier};
use std::time::Instant;

use tilefold_backend_cpu::CpuBackend;
use tilefold_comm::{Partition, Rank, RingAttention, Shard, on_threads};
use tilefold_core::{
    AttentionProblem, AttentionSpec, Backend, BackwardArgs, BackwardOperands, DType, ForwardArgs, ForwardOperands,
    StructuralMask, Tensor,
};

const SEQLEN: usize = 16_384;
const HEADS: usize = 8;
const HEAD_DIM: usize = 64;
const RANKS: usize = 2;
/// Timed turns; the median counts.
const TURNS: usize = 5;

fn main() {
    let mut rows = Vec::new();
    println!("dtype  pass               one rank ms  {RANKS} ranks ms  ratio");
    for dtype in [DType::F32, DType::BF16] {
        let mut seconds = [const { Vec::new() }; 4];
        for turn in 0..=TURNS {
            let times = [alone(dtype), ranks(dtype)].concat();
            // The first turn warms up.
            if turn > 0 {
                seconds.iter_mut().zip(times).for_each(|(all, time)| all.push(time));
            }
        }
        let [alone_forward, alone_both, ranks_forward, ranks_both] = seconds.map(median);
        for (pass, alone, ranks) in
            [("forward", alone_forward, ranks_forward), ("forward, backward", alone_both, ranks_both)]
        {
            println!("{dtype:<5}  {pass:<17} {:>12.1} {:>11.1}  {:.3}", 1e3 * alone, 1e3 * ranks, ranks / alone);
            rows.push(serde_json::json!({
                "dtype": dtype.to_string(), "pass": pass, "one_rank_ms": 1e3 * alone, "ranks_ms": 1e3 * ranks,
                "ratio": ranks / alone,
            }));
        }
    }
    let file = std::env::args().skip_while(|argument| argument != "--json").nth(1);
    if let Some(file) = file {
        let record = serde_json::json!({
            "workload": "causal, 16384 positions, 8 heads of 64 channels", "ranks": RANKS, "turns": TURNS, "rows": rows,
        });
        std::fs::write(file, format!("{}\n", serde_json::to_string_pretty(&record).unwrap())).unwrap();
    }
}

fn spec(dtype: DType) -> AttentionSpec {
    let mask = StructuralMask { causal: true, ..StructuralMask::default() };
    AttentionSpec { mask, ..AttentionSpec::new(dtype, 1, 1, SEQLEN, HEADS, HEAD_DIM) }.with_all_gradients()
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}

/// Some numbers, the same on each run.
fn numbers(dtype: DType, seqlen: usize, seed: usize) -> Tensor {
    let count = seqlen * HEADS * HEAD_DIM;
    let values: Vec<f64> = (0..count).map(|i| (((i * 7919 + seed * 104_729) % 2003) as f64 - 1001.0) / 600.0).collect();
    Tensor::from_f64(&values, dtype, &[1, 1, seqlen, HEADS, HEAD_DIM]).unwrap()
}

/// Seconds of a forward pass, and of both, on all threads of one rank.
fn alone(dtype: DType) -> Vec<f64> {
    let device = CpuBackend::new().unwrap().with_threads(RANKS).unwrap();
    let stream = device.stream().unwrap();
    let problem = AttentionProblem::new(spec(dtype)).unwrap();
    let plan = device.plan_attention(&problem).unwrap();
    let [q, k, v, d_out] = [0, 1, 2, 3].map(|seed| numbers(dtype, SEQLEN, seed));
    let zeros = |dtype, shape: &[usize]| Tensor::zeros(dtype, shape).unwrap();
    let started = Instant::now();
    let mut out = zeros(dtype, &problem.out_shape());
    let [mut lse, mut lse_low] = [(); 2].map(|()| zeros(DType::F32, &problem.lse_shape()));
    #[rustfmt::skip]
    let operands = ForwardOperands {
        q: q.view(), k: k.view(), v: v.view(), biases: Vec::new(),
        key_mask: None, q_segments: None, k_segments: None, gate: None,
        out: out.view_mut(), lse: Some(lse.view_mut()), lse_low: Some(lse_low.view_mut()),
    };
    device.attention_forward(&stream, ForwardArgs::new(&plan, operands).unwrap()).unwrap();
    let forward = started.elapsed().as_secs_f64();
    let [mut dq, mut dk, mut dv] = [(); 3].map(|()| zeros(dtype, &problem.q_shape()));
    #[rustfmt::skip]
    let operands = BackwardOperands {
        q: q.view(), k: k.view(), v: v.view(), biases: Vec::new(),
        key_mask: None, q_segments: None, k_segments: None, gate: None,
        out: out.view(), lse: lse.view(), lse_low: lse_low.view(), d_out: d_out.view(),
        dq: Some(dq.view_mut()), dk: Some(dk.view_mut()), dv: Some(dv.view_mut()), dbiases: Vec::new(), d_gate: None,
    };
    device.attention_backward(&stream, BackwardArgs::new(&plan, operands).unwrap()).unwrap();
    vec![forward, started.elapsed().as_secs_f64()]
}

/// The same over ranks, until the last one is done.
fn ranks(dtype: DType) -> Vec<f64> {
    let partition = Partition::zigzag(SEQLEN, RANKS).unwrap();
    let ring = RingAttention::new(spec(dtype), partition.clone(), partition.clone()).unwrap();
    let start = Barrier::new(RANKS);
    let times = on_threads(RANKS, |comm| {
        let device = CpuBackend::new().unwrap().with_threads(1).unwrap();
        let stream = device.stream().unwrap();
        let rank = Rank { comm: &comm, device: &device, stream: &stream };
        let [q, k, v, d_out] = [0, 1, 2, 3].map(|seed| numbers(dtype, partition.count(comm.rank()), seed));
        let shard = Shard::new(q.view(), Arc::new(k), Arc::new(v));
        start.wait();
        let started = Instant::now();
        let forward = ring.forward(&rank, &shard).unwrap();
        let seconds = started.elapsed().as_secs_f64();
        ring.backward(&rank, &shard, &forward, &d_out.view()).unwrap();
        [seconds, started.elapsed().as_secs_f64()]
    });
    let times: Vec<[f64; 2]> = times.into_iter().map(Result::unwrap).collect();
    (0..2).map(|pass| times.iter().map(|times| times[pass]).fold(0.0, f64::max)).collect()
}
