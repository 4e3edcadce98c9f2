//! Attention along both axes of an MSA that is split over ranks: rows with a pair bias, then columns behind a switch, as one
//! device computes them; gradients come back through the switch's adjoint.

#![allow(clippy::unwrap_used, reason = "a panic is a failed test")]

mod ranks;

use std::sync::Arc;
use std::time::Duration;

use ranks::on_ranks;
use tilefold_comm::sequence_parallel::maps::{Gather, Map, Split, Switch};
use tilefold_comm::{AxialAttention, Partition, Rank, Shard, SharedBias};
use tilefold_core::{AttentionSpec, BiasSpec, DType, Tensor};

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
    let switch = Switch { from: by_rows.clone(), to: by_residues.clone() };
    let turn = |tensor: &Tensor| rank.dense(&tensor.view().permute(&TURNED).unwrap()).unwrap();

    let mut row_shard = Shard::new(x.view(), Arc::clone(&x), Arc::clone(&x));
    row_shard.biases.push(pair.view());
    let row_forward = row.forward(rank, &row_shard).unwrap();
    let y = Arc::new(turn(&switch.apply(rank, &row_forward.out.view()).unwrap()));
    let column_shard = Shard::new(y.view(), Arc::clone(&y), Arc::clone(&y));
    let column_forward = column.forward(rank, &column_shard).unwrap();
    let out = turn(&column_forward.out);

    let d_out = turn(&part(rank, &by_residues, &numbers(2, &shape)));
    let sum = |gradients: [Option<Tensor>; 3]| {
        let [mut sum, k, v] = gradients.map(Option::unwrap);
        [k, v].iter().for_each(|part| rank.add(part.view(), sum.view_mut()).unwrap());
        sum
    };
    let back = column.backward(rank, &column_shard, &column_forward, &d_out.view()).unwrap();
    let dy = turn(&sum([back.dq, back.dk, back.dv]));
    let dy = switch.adjoint().apply(rank, &dy.view()).unwrap();
    let mut back = row.backward(rank, &row_shard, &row_forward, &dy.view()).unwrap();
    let dx = sum([back.dq, back.dk, back.dv]);
    let d_pair = back.dbiases.pop().flatten().unwrap();
    let whole =
        |split: &Split, part: &Tensor| Gather(split.clone()).apply(rank, &part.view()).unwrap().to_f64().unwrap();
    [whole(&by_residues, &out), whole(&by_rows, &dx), whole(&by_queries, &d_pair)]
}

#[test]
fn rows_then_columns_over_ranks_are_those_of_one_device() {
    let soon = Duration::from_secs(60);
    let contiguous: fn(usize, usize) -> Partition = |size, ranks| Partition::contiguous(size, ranks).unwrap();
    let backwards: fn(usize, usize) -> Partition = |size, ranks| {
        let partition = Partition::contiguous(size, ranks).unwrap();
        Partition::new(size, (0..ranks).rev().map(|rank| partition.chunks(rank).to_vec()).collect()).unwrap()
    };
    let expected = on_ranks(1, soon, |rank| msa(rank, contiguous, SharedBias::Gathered)).remove(0);
    assert!(expected.iter().all(|values| values.iter().any(|x| x.abs() > 0.1)), "nothing to compare: {expected:?}");
    for ranks in [1, 2, 3, 5, 7] {
        let both = [SharedBias::Gathered, SharedBias::Travelling];
        for (cut, shared) in both.into_iter().flat_map(|shared| [(contiguous, shared), (backwards, shared)]) {
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
