//! Checkpoints against keeping everything: the same bits of outputs and gradients, wherever activations are kept, with layers
//! that are themselves spread over ranks; what is kept is counted.

#![allow(clippy::unwrap_used, reason = "a panic in a test is a failed test")]

mod ranks;

use std::cell::Cell;
use std::sync::Arc;
use std::time::Duration;

use ranks::on_ranks;
use tilefold_comm::activation::{Checkpoints, Keep, Layer};
use tilefold_comm::{CommError, Communicator, Error, Partition, Rank, Result, RingAttention, Shard, ShardForward};
use tilefold_core::{AttentionSpec, DType, Gradients, Tensor};

const DEADLINE: Duration = Duration::from_secs(120);
const LAYERS: usize = 5;
const SEQLEN: usize = 11;
const HEADS: usize = 2;
const HEAD_DIM: usize = 8;

/// `x + weight · attention(x, x, x)` over the ranks that share a sequence.
struct Block<'a> {
    /// Those ranks.
    comm: &'a Communicator,
    attention: RingAttention,
    weight: f32,
    count: &'a Count,
}

/// What all layers of a rank save.
#[derive(Default)]
struct Count {
    now: Cell<usize>,
    most: Cell<usize>,
    forwards: Cell<usize>,
}

/// What a layer saves, counted as long as it lives.
struct Saved<'a> {
    x: Arc<Tensor>,
    forward: ShardForward,
    count: &'a Count,
}

impl Drop for Saved<'_> {
    fn drop(&mut self) {
        self.count.now.set(self.count.now.get() - 1);
    }
}

fn shard(x: &Arc<Tensor>) -> Shard<'_> {
    let (k, v) = (Arc::clone(x), Arc::clone(x));
    Shard { q: x.view(), k, v, biases: vec![], key_mask: None, q_segments: None, k_segments: None, gate: None }
}

/// `a + weight · b`, element by element.
fn added(a: &Tensor, weight: f32, b: &Tensor) -> Result<Tensor> {
    let sum = a.as_slice::<f32>()?.iter().zip(b.as_slice::<f32>()?).map(|(a, b)| a + weight * b).collect();
    Ok(Tensor::from_vec(sum, a.shape())?)
}

impl<'a> Layer for Block<'a> {
    type Saved = Saved<'a>;
    type Gradients = f32;

    fn forward(&self, rank: &Rank<'_>, x: &Arc<Tensor>) -> Result<(Tensor, Saved<'a>)> {
        let forward = self.attention.forward(&Rank { comm: self.comm, ..*rank }, &shard(x))?;
        let out = added(x, self.weight, &forward.out)?;
        let count = self.count;
        count.forwards.set(count.forwards.get() + 1);
        count.now.set(count.now.get() + 1);
        count.most.set(count.most.get().max(count.now.get()));
        Ok((out, Saved { x: Arc::clone(x), forward, count }))
    }

    fn backward(&self, rank: &Rank<'_>, saved: Saved<'a>, d_out: Tensor) -> Result<(Tensor, f32)> {
        let out = saved.forward.out.as_slice::<f32>()?;
        let d_weight = out.iter().zip(d_out.as_slice::<f32>()?).map(|(out, d_out)| out * d_out).sum();
        let scaled = added(&Tensor::zeros(DType::F32, d_out.shape())?, self.weight, &d_out)?;
        let rank = Rank { comm: self.comm, ..*rank };
        let inner = self.attention.backward(&rank, &shard(&saved.x), &saved.forward, &scaled.view())?;
        let mut d_in = d_out;
        for gradient in [inner.dq, inner.dk, inner.dv].into_iter().flatten() {
            d_in = added(&d_in, 1.0, &gradient)?;
        }
        Ok((d_in, d_weight))
    }
}

fn layers<'a>(comm: &'a Communicator, count: &'a Count) -> Result<Vec<Block<'a>>> {
    let partition = Partition::zigzag(SEQLEN, comm.world_size())?;
    let mut spec = AttentionSpec::new(DType::F32, 1, 1, SEQLEN, HEADS, HEAD_DIM);
    spec.mask.causal = true;
    spec.gradients = Gradients { q: true, k: true, v: true, ..Gradients::default() };
    let attention = RingAttention::new(spec, partition.clone(), partition)?;
    let block = |number| Block { comm, attention: attention.clone(), weight: 0.5 + 0.25 * number as f32, count };
    Ok((0..LAYERS).map(block).collect())
}

/// A rank's part of the input or of the output's gradient: the same on ranks that hold the same positions.
fn drawn(comm: &Communicator, seed: usize) -> Result<Tensor> {
    let partition = Partition::zigzag(SEQLEN, comm.world_size())?;
    let value = |i: usize| ((seed * 1000 + i) as f32 * 0.618_034).sin();
    let row = HEADS * HEAD_DIM;
    let values =
        partition.positions(comm.rank()).flat_map(|position| (position * row..(position + 1) * row).map(value));
    Ok(Tensor::from_vec(values.collect(), &[1, 1, partition.count(comm.rank()), HEADS, HEAD_DIM])?)
}

/// Bits of the output, the input's gradient and the weights' gradients.
type Outcome = (Vec<u8>, Vec<u8>, Vec<u32>);

fn outcome(out: &Tensor, d_in: &Tensor, d_weights: &[f32]) -> Outcome {
    let bytes = |tensor: &Tensor| tensor.storage().host_bytes().unwrap().to_vec();
    (bytes(out), bytes(d_in), d_weights.iter().map(|value| value.to_bits()).collect())
}

/// Everything is kept.
fn plain(rank: &Rank<'_>, comm: &Communicator) -> Result<Outcome> {
    let count = Count::default();
    let layers = layers(comm, &count)?;
    let (mut x, mut all) = (Arc::new(drawn(comm, 0)?), Vec::new());
    for layer in &layers {
        let (out, saved) = layer.forward(rank, &x)?;
        x = Arc::new(out);
        all.push(saved);
    }
    assert_eq!(count.most.get(), LAYERS);
    let (mut d_out, mut d_weights) = (drawn(comm, 1)?, Vec::new());
    for (layer, saved) in layers.iter().zip(all).rev() {
        let (d_in, d_weight) = layer.backward(rank, saved, d_out)?;
        d_out = d_in;
        d_weights.insert(0, d_weight);
    }
    Ok(outcome(&x, &d_out, &d_weights))
}

/// With checkpoints; gives the bytes that were kept too.
fn checkpointed(rank: &Rank<'_>, comm: &Communicator, segment: usize, keep: Keep<'_>) -> Result<(Outcome, usize)> {
    let count = Count::default();
    let (layers, checkpoints) = (layers(comm, &count)?, Checkpoints::new(segment, keep)?);
    let (out, kept) = checkpoints.forward(rank, &layers, Arc::new(drawn(comm, 0)?))?;
    assert_eq!((count.now.get(), count.most.get()), (0, 1), "what layers save is forgotten");
    let bytes = kept.bytes();
    let (d_in, d_weights) = checkpoints.backward(rank, &layers, kept, drawn(comm, 1)?)?;
    assert_eq!((count.now.get(), count.most.get()), (0, segment.min(LAYERS)), "one segment is saved at a time");
    assert_eq!(count.forwards.get(), 2 * LAYERS);
    Ok((outcome(&out, &d_in, &d_weights), bytes))
}

#[test]
fn recomputed_segments_give_the_same_bits() {
    for ranks in [1, 2, 3, 5] {
        let results = on_ranks(ranks, DEADLINE, |rank| {
            let expected = plain(rank, rank.comm)?;
            assert!(expected.2.iter().all(|&bits| f32::from_bits(bits).abs() > 1e-3), "gradients that say something");
            let whole = drawn(rank.comm, 0)?.storage().bytes();
            for (segment, keep) in (1..=LAYERS + 1).flat_map(|segment| [(segment, Keep::Device), (segment, Keep::Host)])
            {
                let (got, bytes) = checkpointed(rank, rank.comm, segment, keep)?;
                assert_eq!(got, expected, "{ranks} ranks, segments of {segment}, {keep:?}");
                assert_eq!(bytes, LAYERS.div_ceil(segment) * whole);
            }
            Ok::<_, Error>(())
        });
        for result in results {
            assert_eq!(result, Ok(()));
        }
    }
}

/// A grid of ranks: a sequence is split over some, and those that hold the same positions share what is kept.
#[test]
fn activations_in_parts_give_the_same_bits() {
    for (sequence, tensor) in [(1, 2), (1, 3), (2, 2), (3, 2), (2, 3), (1, 8)] {
        let results = on_ranks(sequence * tensor, DEADLINE, |rank| {
            let number = |number: usize| u32::try_from(number).unwrap();
            let alike = rank.comm.split(number(rank.comm.rank() / tensor), 0)?;
            let split = rank.comm.split(number(rank.comm.rank() % tensor), 0)?;
            let expected = plain(rank, &split)?;
            let shape = drawn(&split, 0)?.shape().to_vec();
            let (largest, all) = (shape.iter().copied().max().unwrap_or(0), shape.iter().product::<usize>());
            for segment in 1..=LAYERS {
                let (got, bytes) = checkpointed(rank, &split, segment, Keep::Partitioned(&alike))?;
                assert_eq!(got, expected, "{sequence} x {tensor} ranks, segments of {segment}");
                let part = all / largest * largest.div_ceil(tensor) * 4;
                assert!(bytes <= LAYERS.div_ceil(segment) * part, "{bytes} for parts of {part}");
            }
            Ok::<_, Error>(())
        });
        for result in results {
            assert_eq!(result, Ok(()));
        }
    }
}

/// Index-coded, with each axis the largest in turn, of any dtype; together the parts are the whole, once.
#[test]
fn parts_come_back_as_they_were() {
    for ranks in [1, 2, 3, 5, 8] {
        let results = on_ranks(ranks, DEADLINE, |rank| {
            let mut held = Vec::new();
            for (axis, dtype) in (0..4).flat_map(|axis| [DType::F32, DType::F16, DType::I32].map(|dtype| (axis, dtype)))
            {
                let mut shape = vec![2, 1, 3, 2];
                shape[axis] = 11;
                let values: Vec<f64> = (0..shape.iter().product()).map(|code: usize| code as f64).collect();
                let whole = Arc::new(Tensor::from_f64(&values, dtype, &shape)?);
                for keep in [Keep::Device, Keep::Host, Keep::Partitioned(rank.comm)] {
                    let kept = keep.keep(rank, Arc::clone(&whole))?;
                    if let Keep::Partitioned(_) = keep {
                        held.push((kept.bytes(), whole.storage().bytes()));
                    }
                    let back = kept.restore(rank)?;
                    assert_eq!((back.shape(), back.dtype()), (shape.as_slice(), dtype));
                    assert_eq!(back.to_f64()?, values, "{keep:?}");
                }
            }
            Ok::<_, Error>(held)
        });
        let held: Vec<_> = results.into_iter().map(Result::unwrap).collect();
        for number in 0..held[0].len() {
            let parts: usize = held.iter().map(|of_rank| of_rank[number].0).sum();
            assert_eq!(parts, held[0][number].1, "{ranks} ranks");
        }
    }
}

#[test]
fn what_is_smaller_than_the_group_is_kept_whole() {
    let results = on_ranks(5, DEADLINE, |rank| {
        let small = Arc::new(Tensor::from_f64(&[1.0, 2.0, 3.0, 4.0], DType::F32, &[2, 2])?);
        let kept = Keep::Partitioned(rank.comm).keep(rank, Arc::clone(&small))?;
        assert_eq!(kept.bytes(), 16);
        Ok::<_, Error>(Arc::ptr_eq(&kept.restore(rank)?, &small))
    });
    assert!(results.into_iter().all(|result| result == Ok(true)));
}

#[test]
fn host_tensors_are_not_copied() {
    let results = on_ranks(1, DEADLINE, |rank| {
        let tensor = Arc::new(Tensor::zeros(DType::F32, &[4])?);
        Ok::<_, Error>(Arc::ptr_eq(&Keep::Host.keep(rank, Arc::clone(&tensor))?.restore(rank)?, &tensor))
    });
    assert_eq!(results, [Ok(true)]);
}

#[test]
fn bad_input_is_an_error_on_every_rank() {
    assert!(matches!(Checkpoints::new(0, Keep::Device), Err(Error::Comm(CommError::Counts { list: "segment", .. }))));
    let results = on_ranks(2, DEADLINE, |rank| {
        let count = Count::default();
        let (layers, checkpoints) = (layers(rank.comm, &count)?, Checkpoints::new(2, Keep::Device)?);
        let (_, kept) = checkpoints.forward(rank, &layers, Arc::new(drawn(rank.comm, 0)?))?;
        checkpoints.backward(rank, &layers[..2], kept, drawn(rank.comm, 1)?).map(|_| ())
    });
    for result in results {
        assert!(matches!(result, Err(Error::Comm(CommError::Counts { list: "layers", .. }))), "{result:?}");
    }
    // Tensors of one group that are not alike.
    let results = on_ranks(3, DEADLINE, |rank| {
        let width = if rank.comm.rank() == 1 { 4 } else { 5 };
        let kept = Keep::Partitioned(rank.comm).keep(rank, Arc::new(Tensor::zeros(DType::F32, &[9, width])?))?;
        kept.restore(rank)
    });
    for result in results {
        assert!(matches!(result, Err(Error::Comm(CommError::Mismatch { .. }))), "{result:?}");
    }
}
