//! Data, tensor and sequence parallelism at once: an attention block over a mesh of ranks has the loss and gradients of one
//! device.
//!
//! Ranks of a data group have other sequences, those of a sequence group other positions, those of a tensor group other heads:
//! columns of the weights of q, k and v, and rows of the output's. The reference is the block in f64, its gradients by central
//! differences.

#![allow(clippy::unwrap_used, reason = "a panic is a failed test")]

mod ranks;

use std::sync::Arc;
use std::time::Duration;

use ranks::on_ranks;
use tilefold_comm::sequence_parallel::maps::{Copy, Gather, Map, Reduce, Split};
use tilefold_comm::{Partition, Rank, RingAttention, Shard};
use tilefold_core::{AttentionSpec, DType, StructuralMask, Tensor};

const BATCH: usize = 4;
const SEQLEN: usize = 7;
const HEADS: usize = 4;
const HEAD_DIM: usize = 3;
const HIDDEN: usize = HEADS * HEAD_DIM;
/// Where dx, the gradients of the weights of q, k and v, and that of the output's stand in a list of gradients.
const NAMES: [&str; 5] = ["x", "w_q", "w_k", "w_v", "w_o"];

/// x, w_q, w_k, w_v, w_o, and what the output is weighted with in the loss.
fn inputs() -> [Vec<f64>; 6] {
    // Numbers of f32.
    let number = |seed: usize, i: usize| ((((i + 1) * (7919 + 104_729 * seed)) % 2003) as f64 - 1001.0) / 1024.0;
    let draw = |seed, count| (0..count).map(|i| number(seed, i)).collect();
    let (tokens, weights) = (BATCH * SEQLEN * HIDDEN, HIDDEN * HIDDEN);
    [draw(0, tokens), draw(1, weights), draw(2, weights), draw(3, weights), draw(4, weights), draw(5, tokens)]
}

/// `a · b`, or with either transposed; all row-major, `[rows, inner] · [inner, columns]`.
fn product(a: (&[f64], bool), b: (&[f64], bool), [rows, inner, columns]: [usize; 3]) -> Vec<f64> {
    let at = |(x, is_turned): (&[f64], bool), row, column, [rows, columns]: [usize; 2]| {
        if is_turned { x[column * rows + row] } else { x[row * columns + column] }
    };
    let entry = |i: usize| {
        let (row, column) = (i / columns, i % columns);
        (0..inner).map(|k| at(a, row, k, [rows, inner]) * at(b, k, column, [inner, columns])).sum()
    };
    (0..rows * columns).map(entry).collect()
}

/// The loss of the block in f64: causal attention of every sequence and head.
fn loss(inputs: &[Vec<f64>; 6]) -> f64 {
    let [x, w_q, w_k, w_v, w_o, c] = inputs;
    let project = |w: &[f64]| product((x, false), (w, false), [BATCH * SEQLEN, HIDDEN, HIDDEN]);
    let [q, k, v] = [w_q, w_k, w_v].map(|w| project(w));
    let row = |matrix: &[f64], batch: usize, position: usize, head: usize| {
        let start = (batch * SEQLEN + position) * HIDDEN + head * HEAD_DIM;
        matrix[start..start + HEAD_DIM].to_vec()
    };
    let mut out = vec![0.0; BATCH * SEQLEN * HIDDEN];
    for (i, out) in out.chunks_mut(HEAD_DIM).enumerate() {
        let (batch, query, head) = (i / HEADS / SEQLEN, i / HEADS % SEQLEN, i % HEADS);
        let logit = |key| {
            let pairs = row(&q, batch, query, head).into_iter().zip(row(&k, batch, key, head));
            pairs.map(|(q, k)| q * k).sum::<f64>() / (HEAD_DIM as f64).sqrt()
        };
        let weights: Vec<f64> = (0..=query).map(|key| f64::exp(logit(key))).collect();
        let sum: f64 = weights.iter().sum();
        for (key, weight) in weights.into_iter().enumerate() {
            out.iter_mut().zip(row(&v, batch, key, head)).for_each(|(out, v)| *out += weight / sum * v);
        }
    }
    let y = product((&out, false), (w_o, false), [BATCH * SEQLEN, HIDDEN, HIDDEN]);
    y.iter().zip(c).map(|(y, c)| y * c).sum::<f64>() / BATCH as f64
}

/// Gradients of the loss, by name.
fn gradients(inputs: &[Vec<f64>; 6]) -> [Vec<f64>; 5] {
    const STEP: f64 = 1e-4;
    std::array::from_fn(|which| {
        let slope = |i: usize| {
            let moved = |by: f64| {
                let mut inputs = inputs.clone();
                inputs[which][i] += by;
                loss(&inputs)
            };
            (moved(STEP) - moved(-STEP)) / (2.0 * STEP)
        };
        (0..inputs[which].len()).map(slope).collect()
    })
}

/// How many ranks share out sequences, positions and heads.
#[derive(Clone, Copy, Debug)]
struct Mesh {
    data: usize,
    sequence: usize,
    tensor: usize,
}

/// This rank's loss and gradients, the gradients put together to whole ones: the same on every rank.
fn block(rank: &Rank<'_>, mesh: Mesh, inputs: &[Vec<f64>; 6]) -> (f64, Vec<Vec<f64>>) {
    let number = rank.comm.rank();
    let (d, s, t) = (number / mesh.tensor / mesh.sequence, number / mesh.tensor % mesh.sequence, number % mesh.tensor);
    let group = |colour: usize| rank.comm.split(u32::try_from(colour).unwrap(), 0).unwrap();
    let data = group(s * mesh.tensor + t);
    let sequence = group(d * mesh.tensor + t);
    let tensor = group(d * mesh.sequence + s);
    let on = |comm| Rank { comm, ..*rank };
    let (over_data, over_sequence, over_tensor) = (on(&data), on(&sequence), on(&tensor));
    // This rank's part of everything.
    let batches = Split::contiguous(0, BATCH, mesh.data).unwrap();
    let positions = Split { axis: 1, partition: Partition::zigzag(SEQLEN, mesh.sequence).unwrap() };
    let columns = Split::contiguous(1, HIDDEN, mesh.tensor).unwrap();
    let rows = Split { axis: 0, ..columns.clone() };
    let scatter =
        |rank: &Rank<'_>, split: &Split, x: &Tensor| Gather(split.clone()).adjoint().apply(rank, &x.view()).unwrap();
    let gather = |rank: &Rank<'_>, split: &Split, x: &Tensor| Gather(split.clone()).apply(rank, &x.view()).unwrap();
    let f32s = |values: &[f64], shape: &[usize]| Tensor::from_f64(values, DType::F32, shape).unwrap();
    let f64s = |tensor: &Tensor| tensor.to_f64().unwrap();
    let tokens = |values: &[f64]| {
        let own = scatter(&over_data, &batches, &f32s(values, &[BATCH, SEQLEN, HIDDEN]));
        scatter(&over_sequence, &positions, &own)
    };
    let [x, w_q, w_k, w_v, w_o, c] = inputs;
    let x = Copy.apply(&over_tensor, &tokens(x).view()).unwrap();
    let (batch, seqlen, heads) = (x.shape()[0], x.shape()[1], HEADS / mesh.tensor);
    let (count, part, shape) = (batch * seqlen, heads * HEAD_DIM, [batch, 1, seqlen, heads, HEAD_DIM]);
    let w = [w_q, w_k, w_v].map(|w| f64s(&scatter(&over_tensor, &columns, &f32s(w, &[HIDDEN, HIDDEN]))));
    let w_o = f64s(&scatter(&over_tensor, &rows, &f32s(w_o, &[HIDDEN, HIDDEN])));
    // Forward.
    let x64 = f64s(&x);
    let [q, k, v] = [0, 1, 2].map(|i| f32s(&product((&x64, false), (&w[i], false), [count, HIDDEN, part]), &shape));
    let mask = StructuralMask { causal: true, ..StructuralMask::default() };
    let spec = AttentionSpec { mask, ..AttentionSpec::new(DType::F32, batch, 1, SEQLEN, heads, HEAD_DIM) };
    let ring = RingAttention::new(spec.with_all_gradients(), positions.partition.clone(), positions.partition.clone());
    let (ring, shard) = (ring.unwrap(), Shard::new(q.view(), Arc::new(k), Arc::new(v)));
    let forward = ring.forward(&over_sequence, &shard).unwrap();
    let out = f64s(&forward.out);
    let y = f32s(&product((&out, false), (&w_o, false), [count, part, HIDDEN]), &[batch, seqlen, HIDDEN]);
    let y = Reduce.apply(&over_tensor, &y.view()).unwrap();
    let dy: Vec<f64> = f64s(&tokens(c)).iter().map(|c| c / BATCH as f64).collect();
    let loss = f32s(&[f64s(&y).iter().zip(&dy).map(|(y, dy)| y * dy).sum()], &[1]);
    let loss = Reduce.apply(&over_sequence, &loss.view()).unwrap();
    let loss = f64s(&Reduce.apply(&over_data, &loss.view()).unwrap())[0];
    // Backward, each map by its adjoint.
    let dy = f32s(&dy, &[batch, seqlen, HIDDEN]);
    let dy = f64s(&Reduce.adjoint().apply(&over_tensor, &dy.view()).unwrap());
    let d_w_o = product((&out, true), (&dy, false), [part, count, HIDDEN]);
    let d_out = f32s(&product((&dy, false), (&w_o, true), [count, HIDDEN, part]), &shape);
    let backward = ring.backward(&over_sequence, &shard, &forward, &d_out.view()).unwrap();
    let d = [backward.dq, backward.dk, backward.dv].map(|gradient| f64s(&gradient.unwrap()));
    let mut dx = vec![0.0; count * HIDDEN];
    for (d, w) in d.iter().zip(&w) {
        dx.iter_mut().zip(product((d, false), (w, true), [count, part, HIDDEN])).for_each(|(dx, part)| *dx += part);
    }
    let dx = f32s(&dx, &[batch, seqlen, HIDDEN]);
    let dx = Copy.adjoint().apply(&over_tensor, &dx.view()).unwrap();
    let dx = gather(&over_data, &batches, &gather(&over_sequence, &positions, &dx));
    // Every rank of a sequence or data group uses the same weights.
    let summed = |gradient: Vec<f64>, shape: [usize; 2], split: &Split| {
        let sum = Reduce.apply(&over_sequence, &f32s(&gradient, &shape).view()).unwrap();
        f64s(&gather(&over_tensor, split, &Reduce.apply(&over_data, &sum.view()).unwrap()))
    };
    let d_w = d.iter().map(|d| product((&x64, true), (d, false), [HIDDEN, count, part]));
    let mut all = vec![f64s(&dx)];
    all.extend(d_w.map(|d_w| summed(d_w, [HIDDEN, part], &columns)));
    all.push(summed(d_w_o, [part, HIDDEN], &rows));
    (loss, all)
}

#[test]
fn data_tensor_and_sequence_splits_have_the_loss_and_gradients_of_one_device() {
    let inputs = inputs();
    let (expected_loss, expected) = (loss(&inputs), gradients(&inputs));
    for (data, sequence, tensor) in
        [(1, 1, 1), (2, 1, 1), (1, 3, 1), (1, 1, 4), (2, 2, 2), (4, 3, 1), (1, 2, 4), (2, 3, 2)]
    {
        let mesh = Mesh { data, sequence, tensor };
        let results = on_ranks(data * sequence * tensor, Duration::from_secs(60), |rank| block(rank, mesh, &inputs));
        for (rank, (got_loss, got)) in results.into_iter().enumerate() {
            // Sums of some hundred products in f32, each rounded a few times: 64 units in the last place of the largest.
            let bound = 64.0 * f64::from(f32::EPSILON);
            assert!(
                (got_loss - expected_loss).abs() <= bound * expected_loss.abs().max(1.0),
                "{mesh:?}: {got_loss} for {expected_loss}"
            );
            for ((name, got), expected) in NAMES.iter().zip(&got).zip(&expected) {
                let size = expected.iter().fold(0.0_f64, |max, x| max.max(x.abs()));
                let error = got.iter().zip(expected).map(|(got, x)| (got - x).abs()).fold(0.0, f64::max);
                assert_eq!(got.len(), expected.len());
                assert!(error <= bound * size, "{mesh:?}, rank {rank}, {name}: {error:e} of {size:e}");
            }
        }
    }
}
