//! Ring attention: each rank keeps its queries, and keys and values go round.
//!
//! ```text
//! forward, on every rank:                      backward, on every rank:
//!   acc = nothing                                for step in 0..p:
//!   for step in 0..p:                              send k, v on            (while computing)
//!     send k, v on         (while computing)       dq += ..., dbias = ...
//!     acc = merge(acc, attention(q, k, v))         dk, dv of this block += ...; send them on
//!     k, v = what the previous rank sent           k, v = what the previous rank sent
//!   out = acc                                    dk, dv come home after p steps
//! ```
//!
//! Source: Liu, Zaharia and Abbeel, "Ring Attention with Blockwise Transformers for Near-Infinite Context", 2023; the two
//! chunks of a rank that balance a causal mask: Zhu, "zigzag ring attention", 2024.

use std::ops::Range;
use std::sync::Arc;

use tilefold_core::attention::Cover;
use tilefold_core::{
    AttentionProblem, AttentionSpec, BiasSpec, DType, EmptyRows, Gradients, MAX_BIASES, MergeArgs, MergeOperands,
    ProblemError, Tensor, TensorView,
};

use super::local::{self, Operands};
use super::travelling::round;
use crate::communicator::Communicator;
use crate::error::{CommError, Result};
use crate::partition::{Partition, check_alike};
use crate::rank::{Rank, along};
use crate::shape::{exact, optional, with_axis};
use crate::transport::Parcel;

/// What it is called in errors.
pub(super) const NAME: &str = "ring_attention";
/// What keys and values are called on their way.
pub(super) const KEYS: &str = "ring_attention keys";
/// Names of biases in errors.
pub(super) const BIAS_NAMES: [&str; MAX_BIASES] = ["bias0", "bias1", "bias2", "bias3"];

/// One attention over a sequence that is split over ranks.
///
/// *Shapes*: the problem is that of the whole sequence; each rank passes its shard ([`Shard`]). *Numerics*: blocks as the
/// device computes them; they are merged, and gradients summed, in f32 whatever the dtype, and rounded once at the end.
/// *Determinism*: the same bits on every run with the same partition. *Memory*: of keys and values, two blocks at a time;
/// nothing of size seqlen × seqlen. *Traffic*: docs/sequence-parallel.md.
#[derive(Clone, Debug)]
pub struct RingAttention {
    pub(super) problem: AttentionProblem,
    pub(super) queries: Partition,
    pub(super) keys: Partition,
}

/// One rank's part of the operands.
#[derive(Clone, Debug)]
pub struct Shard<'a> {
    /// `[batch, rows, queries of this rank, heads, head_dim]`
    pub q: TensorView<'a>,
    /// `[batch, rows, keys of this rank, kv_heads, head_dim]`; shared, since it travels.
    pub k: Arc<Tensor>,
    /// `[batch, rows, keys of this rank, kv_heads, head_dim_v]`; shared, since it travels.
    pub v: Arc<Tensor>,
    /// Biases of the whole problem, of which this rank holds, where there is a query axis, its queries against all keys in
    /// their order `[.., queries of this rank, seqlen_k or 1]`; else, where there is a key axis, its keys
    /// `[.., 1, keys of this rank]`, which travel; else all of it, the same on every rank.
    pub biases: Vec<TensorView<'a>>,
    /// Bool, broadcastable to `[batch, rows, keys of this rank]`.
    pub key_mask: Option<TensorView<'a>>,
    /// i32, broadcastable to `[batch, rows, queries of this rank]`.
    pub q_segments: Option<TensorView<'a>>,
    /// i32, broadcastable to `[batch, rows, keys of this rank]`.
    pub k_segments: Option<TensorView<'a>>,
    /// `[batch, rows, queries of this rank, heads, head_dim_v]`, before the sigmoid.
    pub gate: Option<TensorView<'a>>,
}

/// What a forward pass leaves on a rank, on its device.
#[derive(Debug)]
pub struct ShardForward {
    /// `[batch, rows, queries of this rank, heads, head_dim_v]` in the dtype of q.
    pub out: Tensor,
    /// Natural log of the sum of exponentials over all keys, f32 `[batch, rows, heads, queries of this rank]`.
    pub lse: Tensor,
    /// What f32 rounding took from `lse`.
    pub lse_low: Tensor,
}

/// Gradients of a rank's part of the operands, in their shapes and dtypes.
#[derive(Debug)]
pub struct ShardBackward {
    /// Gradient of q.
    pub dq: Option<Tensor>,
    /// Gradient of k.
    pub dk: Option<Tensor>,
    /// Gradient of v.
    pub dv: Option<Tensor>,
    /// Gradient of the gate.
    pub d_gate: Option<Tensor>,
    /// One entry for each bias; of one without query and key axes the sum over all ranks, on each of them.
    pub dbiases: Vec<Option<Tensor>>,
}

impl<'a> Shard<'a> {
    /// Plain attention: no bias, mask or gate.
    #[must_use]
    pub fn new(q: TensorView<'a>, k: Arc<Tensor>, v: Arc<Tensor>) -> Self {
        Self { q, k, v, biases: Vec::new(), key_mask: None, q_segments: None, k_segments: None, gate: None }
    }
}

/// Which axis of the logits a bias is split along.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum SplitAlong {
    /// It stays where its queries are.
    Queries,
    /// It travels with its keys.
    Keys,
    /// Every rank has it.
    Nothing,
}

impl SplitAlong {
    pub(super) fn of(bias: &BiasSpec) -> Self {
        match bias.shape {
            [.., 1, 1] => Self::Nothing,
            [.., 1, _] => Self::Keys,
            _ => Self::Queries,
        }
    }
}

/// A chunk of this rank's queries against a chunk of another's keys.
pub(super) struct Pair {
    pub(super) problem: AttentionProblem,
    /// Where the queries lie in this rank's shard.
    pub(super) q: Range<usize>,
    /// Where the keys lie in their rank's shard.
    pub(super) k: Range<usize>,
    /// Where the keys lie in the sequence.
    pub(super) k_global: Range<usize>,
}

/// Keys, values and what goes with them, as they travel.
pub(super) struct Block {
    pub(super) k: Arc<Tensor>,
    pub(super) v: Arc<Tensor>,
    pub(super) key_mask: Option<Arc<Tensor>>,
    pub(super) k_segments: Option<Arc<Tensor>>,
    /// Those split along keys, in their order.
    pub(super) biases: Vec<Arc<Tensor>>,
}

impl RingAttention {
    /// Checks a problem of the whole sequence against its partitions; `mask` offsets count from the sequence's start.
    ///
    /// # Errors
    /// [`ProblemError`]: that of the problem; `Unexpected` for a gate or [`EmptyRows::Uniform`], which have to come after the
    /// last merge. [`CommError::Counts`] when a partition is one of another length or number of ranks.
    pub fn new(spec: AttentionSpec, queries: Partition, keys: Partition) -> Result<Self> {
        if spec.gate {
            let reason = "a gate comes after the last merge: multiply by its sigmoid yourself";
            return Err(ProblemError::Unexpected { tensor: "gate", reason }.into());
        }
        if spec.empty_rows == EmptyRows::Uniform {
            let reason = "the mean of v for rows without keys is not known before the last merge; use EmptyRows::Zero";
            return Err(ProblemError::Unexpected { tensor: "empty_rows", reason }.into());
        }
        check_partitions(&spec, &queries, &keys)?;
        Ok(Self { problem: AttentionProblem::new(spec)?, queries, keys })
    }

    /// Attention of this rank's queries over all keys. Called by all ranks.
    ///
    /// # Errors
    /// A [`ProblemError`] for a shard that does not fit, which the other ranks see as [`CommError::Refused`];
    /// [`CommError::Mismatch`] when ranks have different problems or partitions; what the device reports, which the others see
    /// as [`CommError::Refused`], and the communicator is unusable then.
    pub fn forward(&self, rank: &Rank<'_>, shard: &Shard<'_>) -> Result<ShardForward> {
        self.agree(rank, shard, None)?;
        // What goes wrong from here on leaves blocks on their way: others wait for them, and a later pass would take them.
        rank.comm.checked(NAME, self.attend(rank, shard))
    }

    fn attend(&self, rank: &Rank<'_>, shard: &Shard<'_>) -> Result<ShardForward> {
        let spec = self.problem.spec();
        let here = rank.comm.rank();
        let shape = with_axis(self.problem.out_shape(), 2, self.queries.count(here));
        let lse_shape = with_axis(self.problem.lse_shape(), 3, self.queries.count(here));
        let mut acc = ShardForward {
            out: rank.zeros(DType::F32, &shape)?,
            lse: rank.zeros(DType::F32, &lse_shape)?,
            lse_low: rank.zeros(DType::F32, &lse_shape)?,
        };
        rank.device.fill(rank.stream, acc.lse.view_mut(), f64::NEG_INFINITY)?;
        round(rank, KEYS, self.outgoing(rank, shard)?, |owner, parcel| {
            let block = self.incoming(rank, parcel)?;
            for pair in self.pairs(here, owner, Gradients::default())? {
                self.merge_pair(rank, shard, &block, &pair, &mut acc)?;
            }
            Ok(())
        })?;
        acc.out = rank.rounded(acc.out, spec.dtype)?;
        Ok(acc)
    }

    /// What all ranks must have alike; `outputs` are those of a forward pass, with the gradient of the first.
    pub(super) fn agree(
        &self,
        rank: &Rank<'_>,
        shard: &Shard<'_>,
        outputs: Option<(&ShardForward, &TensorView<'_>)>,
    ) -> Result<()> {
        let checked = check_shard(&self.problem, &self.queries, &self.keys, rank.comm, shard).and_then(|()| {
            let Some((forward, d_out)) = outputs else { return Ok(()) };
            let shape = with_axis(self.problem.out_shape(), 2, self.queries.count(rank.comm.rank()));
            check_outputs(self.problem.spec(), shape, forward, d_out)
        });
        let pass = if outputs.is_some() { "backward" } else { "forward" };
        rank.comm.agree(NAME, checked.map(|()| format!("{pass} {self:?}")))
    }

    /// This rank's keys and what goes with them.
    pub(super) fn outgoing(&self, rank: &Rank<'_>, shard: &Shard<'_>) -> Result<Parcel> {
        let mut parcel = vec![rank.pack_shared(&shard.k)?, rank.pack_shared(&shard.v)?];
        for view in [&shard.key_mask, &shard.k_segments].into_iter().flatten() {
            parcel.push(rank.pack(view)?);
        }
        for (bias, view) in self.problem.spec().biases.iter().zip(&shard.biases) {
            if SplitAlong::of(bias) == SplitAlong::Keys {
                parcel.push(rank.pack(view)?);
            }
        }
        Ok(parcel)
    }

    pub(super) fn incoming(&self, rank: &Rank<'_>, parcel: Parcel) -> Result<Block> {
        let spec = self.problem.spec();
        let mut tensors = parcel.into_iter();
        let mut next = |tensor| {
            let packed = tensors.next().ok_or(ProblemError::Missing { tensor, reason: "it travels with k and v" })?;
            rank.unpack(packed)
        };
        let (k, v) = (next("k")?, next("v")?);
        let key_mask = spec.key_mask.then(|| next("key_mask")).transpose()?;
        let k_segments = spec.segments.then(|| next("k_segments")).transpose()?;
        let split = spec.biases.iter().filter(|bias| SplitAlong::of(bias) == SplitAlong::Keys);
        let biases = split.map(|_| next("bias")).collect::<Result<_>>()?;
        Ok(Block { k, v, key_mask, k_segments, biases })
    }

    /// Chunks of this rank's queries and of another's keys between which there is anything to attend.
    pub(super) fn pairs(&self, here: usize, owner: usize, gradients: Gradients) -> Result<Vec<Pair>> {
        let mut pairs = Vec::new();
        for (q, q_start) in self.queries.places(here) {
            for (k, k_start) in self.keys.places(owner) {
                let Some(spec) = self.pair_spec(q.len(), q_start, k.len(), k_start) else { continue };
                let problem = AttentionProblem::new(AttentionSpec { gradients, ..spec })?;
                pairs.push(Pair { problem, q: q.clone(), k_global: k_start..k_start + k.len(), k });
            }
        }
        Ok(pairs)
    }

    fn pair_spec(&self, queries: usize, q_start: usize, keys: usize, k_start: usize) -> Option<AttentionSpec> {
        let mut spec = self.problem.spec().clone();
        let shifted = |offset: i64, by: usize| offset.saturating_add(i64::try_from(by).unwrap_or(i64::MAX));
        spec.mask.q_offset = shifted(spec.mask.q_offset, q_start);
        spec.mask.k_offset = shifted(spec.mask.k_offset, k_start);
        if spec.mask.cover(&(0..queries), &(0..keys)) == Cover::Empty {
            return None;
        }
        if let Some(lengths) = &mut spec.kv_lengths {
            let (first, count) = (shifted(0, k_start), shifted(0, keys));
            lengths.iter_mut().for_each(|length| *length = (*length - first).clamp(0, count));
            if lengths.iter().all(|&length| length == 0) {
                return None;
            }
        }
        for bias in &mut spec.biases {
            for (axis, size) in [(3, queries), (4, keys)] {
                if bias.shape[axis] != 1 {
                    bias.shape[axis] = size;
                }
            }
        }
        Some(AttentionSpec { seqlen_q: queries, seqlen_k: keys, ..spec })
    }

    fn merge_pair(
        &self,
        rank: &Rank<'_>,
        shard: &Shard<'_>,
        block: &Block,
        pair: &Pair,
        acc: &mut ShardForward,
    ) -> Result<()> {
        let part = local::forward(rank, &pair.problem, self.inputs(shard, block, pair)?)?;
        let merge = MergeOperands {
            out: part.out.view(),
            lse: part.lse.view(),
            lse_low: part.lse_low.view(),
            acc_out: acc.out.view_mut().slice(2, pair.q.clone(), 1)?,
            acc_lse: acc.lse.view_mut().slice(3, pair.q.clone(), 1)?,
            acc_lse_low: acc.lse_low.view_mut().slice(3, pair.q.clone(), 1)?,
        };
        Ok(rank.device.merge(rank.stream, MergeArgs::new(merge)?)?)
    }

    pub(super) fn inputs<'s>(&self, shard: &'s Shard<'_>, block: &'s Block, pair: &Pair) -> Result<Operands<'s>> {
        let mut travelling = block.biases.iter();
        let biases =
            self.problem.spec().biases.iter().zip(&shard.biases).map(|(bias, view)| match SplitAlong::of(bias) {
                SplitAlong::Queries => along(&along(view, 3, pair.q.clone())?, 4, pair.k_global.clone()),
                SplitAlong::Keys => {
                    travelling.next().map_or(Ok(view.clone()), |view| along(&view.view(), 4, pair.k.clone()))
                }
                SplitAlong::Nothing => Ok(view.clone()),
            });
        let keys = |tensor: &'s Option<Arc<Tensor>>| {
            tensor.as_ref().map(|tensor| along(&tensor.view(), 2, pair.k.clone())).transpose()
        };
        Ok(Operands {
            q: shard.q.slice(2, pair.q.clone(), 1)?,
            k: block.k.view().slice(2, pair.k.clone(), 1)?,
            v: block.v.view().slice(2, pair.k.clone(), 1)?,
            biases: biases.collect::<Result<_>>()?,
            key_mask: keys(&block.key_mask)?,
            q_segments: shard.q_segments.as_ref().map(|view| along(view, 2, pair.q.clone())).transpose()?,
            k_segments: keys(&block.k_segments)?,
            gate: None,
        })
    }
}

/// The shape of a rank's part of a bias.
pub(super) fn bias_shape(bias: &BiasSpec, queries: usize, keys: usize) -> [usize; 5] {
    match SplitAlong::of(bias) {
        SplitAlong::Queries => with_axis(bias.shape, 3, queries),
        SplitAlong::Keys => with_axis(bias.shape, 4, keys),
        SplitAlong::Nothing => bias.shape,
    }
}

/// Checks how a problem's sequence is split.
///
/// # Errors
/// [`CommError::Counts`] when a partition is one of another length or number of ranks.
pub(super) fn check_partitions(spec: &AttentionSpec, queries: &Partition, keys: &Partition) -> Result<()> {
    check_alike([("queries", queries, spec.seqlen_q), ("keys", keys, spec.seqlen_k)])
}

/// Checks a rank's part of a problem's operands.
///
/// # Errors
/// A [`ProblemError`] that names tensor and dimension; [`CommError::WorldSize`] for a partition over other ranks.
pub(super) fn check_shard(
    problem: &AttentionProblem,
    queries: &Partition,
    keys: &Partition,
    comm: &Communicator,
    shard: &Shard<'_>,
) -> Result<()> {
    let (here, got, expected) = (comm.rank(), comm.world_size(), queries.ranks());
    if got != expected {
        return Err(CommError::WorldSize { what: "partition", expected, got }.into());
    }
    let spec = problem.spec();
    let (queries, keys) = (queries.count(here), keys.count(here));
    let q = [problem.q_shape(), problem.out_shape()].map(|shape| with_axis(shape, 2, queries));
    let k = [problem.k_shape(), problem.v_shape()].map(|shape| with_axis(shape, 2, keys));
    let biases = spec.biases.iter().map(|bias| bias_shape(bias, queries, keys));
    check_operands(spec, q, k, biases, shard)
}

/// Checks operands against the shapes that they have on this rank: of q and out, of k and v, and of each bias.
///
/// # Errors
/// A [`ProblemError`] that names tensor and dimension.
pub(super) fn check_operands(
    spec: &AttentionSpec,
    [q, out]: [[usize; 5]; 2],
    [k, v]: [[usize; 5]; 2],
    biases: impl Iterator<Item = [usize; 5]>,
    shard: &Shard<'_>,
) -> Result<()> {
    exact("q", &shard.q, &q, spec.dtype)?;
    exact("k", &shard.k.view(), &k, spec.dtype)?;
    exact("v", &shard.v.view(), &v, spec.dtype)?;
    if shard.biases.len() != spec.biases.len() {
        let (expected, got) = (spec.biases.len().to_string(), shard.biases.len());
        return Err(ProblemError::Length { list: "biases", expected, got }.into());
    }
    for (((bias, shape), view), name) in spec.biases.iter().zip(biases).zip(&shard.biases).zip(BIAS_NAMES) {
        exact(name, view, &shape, bias.dtype)?;
    }
    optional("key_mask", shard.key_mask.as_ref(), spec.key_mask, &k[..3], DType::Bool)?;
    optional("q_segments", shard.q_segments.as_ref(), spec.segments, &q[..3], DType::I32)?;
    optional("k_segments", shard.k_segments.as_ref(), spec.segments, &k[..3], DType::I32)?;
    match &shard.gate {
        Some(view) if spec.gate => exact("gate", view, &out, spec.dtype),
        view => optional("gate", view.as_ref(), spec.gate, &out, spec.dtype),
    }
}

/// Checks what a backward pass reads of a forward pass, whose output has this shape on this rank.
///
/// # Errors
/// As [`check_operands`].
pub(super) fn check_outputs(
    spec: &AttentionSpec,
    out: [usize; 5],
    forward: &ShardForward,
    d_out: &TensorView<'_>,
) -> Result<()> {
    let [batch, rows, queries, heads, _] = out;
    let lse = [batch, rows, heads, queries];
    exact("out", &forward.out.view(), &out, spec.dtype)?;
    exact("lse", &forward.lse.view(), &lse, DType::F32)?;
    exact("lse_low", &forward.lse_low.view(), &lse, DType::F32)?;
    exact("d_out", d_out, &out, spec.dtype)
}
