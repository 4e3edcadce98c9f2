//! Attention along both axes of an MSA, and of the pairs of residues, that are split over ranks: rows, then columns behind a
//! switch, as one device computes them; gradients come back through the switch's adjoint.

#![allow(clippy::unwrap_used, reason = "a panic is a failed test")]

mod ranks;

use std::sync::Arc;
use std::time::Duration;

use ranks::on_ranks;
use tilefold_comm::sequence_parallel::maps::{Gather, Map, Split, Switch};
use tilefold_comm::{AxialAttention, Partition, Rank, Shard, SharedBias};
use tilefold_core::attention::reference::{self, ReferenceInputs};
use tilefold_core::{AttentionProblem, AttentionSpec, BiasSpec, DType, Tensor};

/// Sequences of the MSA, residues, heads, channels.
const ROWS: usize = 7;
const RESIDUES: usize = 9;
const HEADS: usize = 2;
const HEAD_DIM: usize = 4;
/// Rows become columns, and the other way round.
const TURNED: [usize; 5] = [0, 2, 1, 3, 4];

fn numbers(seed: usize, shape: &[usize]) -> Tensor {
    let number = |i: usize| (((i + 3) * (7919 + 104_729 * seed)) % 2003) as f64 / 1001.0 - 1.0;
    let values: Vec<f64> = (0..shape.iter().product()).map(number).collect();
    Tensor::from_f64(&values, DType::F32, shape).unwrap()
}

/// A rank's part of what every rank draws whole.
fn part(rank: &Rank<'_>, split: &Split, whole: &Tensor) -> Tensor {
    Gather(split.clone()).adjoint().apply(rank, &whole.view()).unwrap()
}

/// One attention along rows, q, k and v all `x`, and one along columns of what it gives: out, and the gradients of x and of the
/// biases, if there are any. The second sees columns as its rows; its bias is as it takes it.
fn along_both(
    rank: &Rank<'_>,
    [(first, first_bias), (second, second_bias)]: [(&AxialAttention, Option<&Tensor>); 2],
    switch: &Switch,
    x: Arc<Tensor>,
    d_out: &Tensor,
) -> (Tensor, Tensor, [Option<Tensor>; 2]) {
    let turn = |tensor: &Tensor| rank.dense(&tensor.view().permute(&TURNED).unwrap()).unwrap();
    let sum = |gradients: [Option<Tensor>; 3]| {
        let [mut sum, k, v] = gradients.map(Option::unwrap);
        [k, v].iter().for_each(|part| rank.add(part.view(), sum.view_mut()).unwrap());
        sum
    };
    let mut by_row = Shard::new(x.view(), Arc::clone(&x), Arc::clone(&x));
    by_row.biases.extend(first_bias.map(Tensor::view));
    let middle = first.forward(rank, &by_row).unwrap();
    let y = Arc::new(turn(&switch.apply(rank, &middle.out.view()).unwrap()));
    let mut by_column = Shard::new(y.view(), Arc::clone(&y), Arc::clone(&y));
    by_column.biases.extend(second_bias.map(Tensor::view));
    let last = second.forward(rank, &by_column).unwrap();

    let mut back = second.backward(rank, &by_column, &last, &turn(d_out).view()).unwrap();
    let d_second = back.dbiases.pop().flatten();
    let dy = turn(&sum([back.dq, back.dk, back.dv]));
    let dy = switch.adjoint().apply(rank, &dy.view()).unwrap();
    let mut back = first.backward(rank, &by_row, &middle, &dy.view()).unwrap();
    let d_first = back.dbiases.pop().flatten();
    (turn(&last.out), sum([back.dq, back.dk, back.dv]), [d_first, d_second])
}

/// out, and the gradients of the MSA that both attentions take for q, k and v, and of the pair bias.
fn msa(rank: &Rank<'_>, cut: fn(usize, usize) -> Partition, shared: SharedBias) -> [Vec<f64>; 3] {
    let ranks = rank.comm.world_size();
    let (rows, residues) = (cut(ROWS, ranks), cut(RESIDUES, ranks));
    let by_rows = Split { axis: 1, partition: rows.clone() };
    let by_residues = Split { axis: 2, partition: residues.clone() };
    let shape = [1, ROWS, RESIDUES, HEADS, HEAD_DIM];
    let x = Arc::new(part(rank, &by_rows, &numbers(0, &shape)));
    // A rank makes the pair bias of its own residues' queries.
    let by_queries = Split { axis: 3, partition: residues.clone() };
    let pair = part(rank, &by_queries, &numbers(1, &[1, 1, HEADS, RESIDUES, RESIDUES]));
    let bias = BiasSpec { shape: [1, 1, HEADS, RESIDUES, RESIDUES], dtype: DType::F32 };
    let spec = AttentionSpec::new(DType::F32, 1, ROWS, RESIDUES, HEADS, HEAD_DIM);
    let spec = AttentionSpec { biases: vec![bias], ..spec }.with_all_gradients();
    let row = AxialAttention::new(spec, rows.clone(), residues.clone(), shared).unwrap();
    let spec = AttentionSpec::new(DType::F32, 1, RESIDUES, ROWS, HEADS, HEAD_DIM).with_all_gradients();
    let column = AxialAttention::new(spec, residues, rows, shared).unwrap();
    let d_out = part(rank, &by_residues, &numbers(2, &shape));
    let switch = Switch { from: by_rows.clone(), to: by_residues.clone() };
    let (out, dx, [d_pair, _]) = along_both(rank, [(&row, Some(&pair)), (&column, None)], &switch, x, &d_out);
    let whole =
        |split: &Split, part: &Tensor| Gather(split.clone()).apply(rank, &part.view()).unwrap().to_f64().unwrap();
    [whole(&by_residues, &out), whole(&by_rows, &dx), whole(&by_queries, &d_pair.unwrap())]
}

/// Attention around the starting node, then around the ending node, of pairs `[1, n, n, heads, channels]` split by their first
/// residue: the ending node's is that of the turned pairs, whose bias of logits is turned as well. out, and the gradients of the
/// pairs and of both biases.
fn triangles(rank: &Rank<'_>, cut: fn(usize, usize) -> Partition, shared: SharedBias) -> [Vec<f64>; 4] {
    const N: usize = RESIDUES;
    let partition = cut(N, rank.comm.world_size());
    let (by_first, by_second) =
        (Split { axis: 1, partition: partition.clone() }, Split { axis: 2, partition: partition.clone() });
    let by_queries = Split { axis: 3, partition: partition.clone() };
    let shape = [1, N, N, HEADS, HEAD_DIM];
    let x = Arc::new(part(rank, &by_first, &numbers(3, &shape)));
    let starting_bias = part(rank, &by_queries, &numbers(4, &[1, 1, HEADS, N, N]));
    // Made of pairs as they lie, [first, second]; the ending node's logits have [query, key] = [second, first].
    let as_made = Split { axis: 4, partition: partition.clone() };
    let turned_bias = |tensor: &Tensor| rank.dense(&tensor.view().permute(&[0, 1, 2, 4, 3]).unwrap()).unwrap();
    let ending_bias = turned_bias(&part(rank, &as_made, &numbers(5, &[1, 1, HEADS, N, N])));
    let bias = BiasSpec { shape: [1, 1, HEADS, N, N], dtype: DType::F32 };
    let spec = AttentionSpec { biases: vec![bias], ..AttentionSpec::new(DType::F32, 1, N, N, HEADS, HEAD_DIM) };
    let axial = AxialAttention::new(spec.with_all_gradients(), partition.clone(), partition, shared).unwrap();
    let d_out = part(rank, &by_second, &numbers(6, &shape));
    let switch = Switch { from: by_first.clone(), to: by_second.clone() };
    let both = [(&axial, Some(&starting_bias)), (&axial, Some(&ending_bias))];
    let (out, dx, [d_starting, d_ending]) = along_both(rank, both, &switch, x, &d_out);
    let (d_starting, d_ending) = (d_starting.unwrap(), turned_bias(&d_ending.unwrap()));
    let whole =
        |split: &Split, part: &Tensor| Gather(split.clone()).apply(rank, &part.view()).unwrap().to_f64().unwrap();
    [whole(&by_second, &out), whole(&by_first, &dx), whole(&by_queries, &d_starting), whole(&as_made, &d_ending)]
}

/// The same by the oracle's plain sums over all pairs, in f64.
fn exact_triangles() -> [Vec<f64>; 4] {
    const N: usize = RESIDUES;
    let shape = [1, N, N, HEADS, HEAD_DIM];
    let bias = BiasSpec { shape: [1, 1, HEADS, N, N], dtype: DType::F32 };
    let spec = AttentionSpec { biases: vec![bias], ..AttentionSpec::new(DType::F32, 1, N, N, HEADS, HEAD_DIM) };
    let problem = AttentionProblem::new(spec.with_all_gradients()).unwrap();
    let of = |seed, shape: &[usize]| numbers(seed, shape).to_f64().unwrap();
    let turn = |x: &[f64]| -> Vec<f64> {
        let inner = HEADS * HEAD_DIM;
        let pairs = (0..N).flat_map(|j| (0..N).map(move |i| (i * N + j) * inner));
        pairs.flat_map(|at| x[at..at + inner].to_vec()).collect()
    };
    let turn_bias = |x: &[f64]| -> Vec<f64> {
        let places = (0..HEADS).flat_map(|h| (0..N).flat_map(move |i| (0..N).map(move |j| (h * N + j) * N + i)));
        places.map(|at| x[at]).collect()
    };
    let inputs = |x: &[f64], bias: Vec<f64>| ReferenceInputs {
        q: x.to_vec(),
        k: x.to_vec(),
        v: x.to_vec(),
        biases: vec![bias],
        key_mask: None,
        q_segments: None,
        k_segments: None,
        gate: None,
    };
    let sum = |[a, b, c]: [Vec<f64>; 3]| -> Vec<f64> { a.iter().zip(b).zip(c).map(|((a, b), c)| a + b + c).collect() };
    let bias_shape = [1, 1, HEADS, N, N];
    let starting = inputs(&of(3, &shape), of(4, &bias_shape));
    let y = turn(&reference::forward(&problem, &starting).out);
    let ending = inputs(&y, turn_bias(&of(5, &bias_shape)));
    let out = turn(&reference::forward(&problem, &ending).out);
    let back = reference::backward(&problem, &ending, &turn(&of(6, &shape)));
    let d_ending = turn_bias(&back.dbiases[0]);
    let back = reference::backward(&problem, &starting, &turn(&sum([back.dq, back.dk, back.dv])));
    let d_starting = back.dbiases[0].clone();
    [out, sum([back.dq, back.dk, back.dv]), d_starting, d_ending]
}

fn contiguous(size: usize, ranks: usize) -> Partition {
    Partition::contiguous(size, ranks).unwrap()
}

fn backwards(size: usize, ranks: usize) -> Partition {
    let partition = contiguous(size, ranks);
    Partition::new(size, (0..ranks).rev().map(|rank| partition.chunks(rank).to_vec()).collect()).unwrap()
}

#[test]
fn both_triangles_over_ranks_are_those_of_the_oracle() {
    let expected = exact_triangles();
    for ranks in [1, 2, 3, 5, 8] {
        let both = [SharedBias::Gathered, SharedBias::Travelling];
        let cuts: [fn(usize, usize) -> Partition; 2] = [contiguous, backwards];
        for (cut, shared) in both.into_iter().flat_map(|shared| cuts.map(|cut| (cut, shared))) {
            for got in on_ranks(ranks, Duration::from_secs(60), |rank| triangles(rank, cut, shared)) {
                let names = ["out", "dx", "d_starting", "d_ending"];
                for ((name, got), expected) in names.iter().zip(got).zip(&expected) {
                    let size = expected.iter().fold(0.0_f64, |max, x| max.max(x.abs()));
                    let error = got.iter().zip(expected).map(|(got, x)| (got - x).abs()).fold(0.0, f64::max);
                    assert_eq!(got.len(), expected.len());
                    assert!(size > 0.1, "nothing to compare: {expected:?}");
                    // Sums of 9 to 81 terms, four of them behind each other, each rounded to f32.
                    let allowed = 64.0 * f64::from(f32::EPSILON) * size;
                    assert!(error <= allowed, "{ranks} ranks, {shared:?}, {name}: {error:e} of {allowed:e}");
                }
            }
        }
    }
}

#[test]
fn rows_then_columns_over_ranks_are_those_of_one_device() {
    let soon = Duration::from_secs(60);
    let expected = on_ranks(1, soon, |rank| msa(rank, contiguous, SharedBias::Gathered)).remove(0);
    assert!(expected.iter().all(|values| values.iter().any(|x| x.abs() > 0.1)), "nothing to compare: {expected:?}");
    for ranks in [1, 2, 3, 5, 7] {
        let both = [SharedBias::Gathered, SharedBias::Travelling];
        let cuts: [fn(usize, usize) -> Partition; 2] = [contiguous, backwards];
        for (cut, shared) in both.into_iter().flat_map(|shared| cuts.map(|cut| (cut, shared))) {
            for got in on_ranks(ranks, soon, |rank| msa(rank, cut, shared)) {
                for ((name, got), expected) in ["out", "dx", "d_pair"].iter().zip(got).zip(&expected) {
                    // Only the order of sums over rows and parts differs: a few units in the last place of the largest.
                    let size = expected.iter().fold(0.0_f64, |max, x| max.max(x.abs()));
                    let error = got.iter().zip(expected).map(|(got, x)| (got - x).abs()).fold(0.0, f64::max);
                    assert_eq!(got.len(), expected.len());
                    assert!(
                        error <= 16.0 * f64::from(f32::EPSILON) * size,
                        "{ranks} ranks, {shared:?}, {name}: {error:e}"
                    );
                }
            }
        }
    }
}
