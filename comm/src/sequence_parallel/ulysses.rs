//! Ulysses: sequence shards become head shards by one all-to-all, and go back by another; alone, or with a ring of groups.
//!
//! Ranks stand in a grid: `group` neighbours split the heads of what they hold together, and the groups stand in a ring,
//! around which keys travel. With one group this is DeepSpeed-Ulysses; with groups of one rank it is a ring.
//!
//! Source: Jacobs et al., "DeepSpeed Ulysses", 2023; the hybrid: Fang and Zhao, "USP: A Unified Sequence Parallelism
//! Approach for Long Context Generative AI", 2024.

use std::collections::BTreeMap;
use std::sync::Arc;

use tilefold_core::{AttentionProblem, AttentionSpec, BiasSpec, DType, Tensor, TensorView};

use super::local::{self, Operands};
use super::maps::{AllGather, Gather, Map, Reduce, ReduceScatter, Scatter, Split, Switch};
use super::ring::{RingAttention, Shard, ShardBackward, ShardForward, SplitAlong, check_partitions, check_shard};
use crate::communicator::{Communicator, Traffic};
use crate::error::{CommError, Result};
use crate::partition::Partition;
use crate::rank::Rank;
use crate::shape::{exact, with_axis};

/// What it is called in errors.
const NAME: &str = "ulysses_attention";
/// The axis of `[batch, rows, seqlen, heads, head_dim]` that ranks hold parts of before the switch.
const SEQLEN: usize = 2;
/// The axis they hold parts of after it.
const HEADS: usize = 3;

/// One attention over a sequence that is split over ranks, by heads within a group and round a ring between groups.
///
/// *Shapes*, *determinism*: as [`RingAttention`]. *Heads*: any number not below the group's size, divided or not; key heads
/// that are fewer than the group are sent to each rank that needs them. *Numerics*: with one group as the device computes it,
/// with several as in a ring. *Memory*: the operands once more; a bias without a head axis whole on every rank. *Traffic*:
/// docs/sequence-parallel.md.
#[derive(Debug)]
pub struct UlyssesAttention {
    problem: AttentionProblem,
    queries: Partition,
    keys: Partition,
    /// This rank and those it splits heads with.
    group: Communicator,
    /// This rank and those with its heads in the other groups.
    ring: Communicator,
    heads: Heads,
    inner: Inner,
}

/// Which heads each rank of a group computes.
#[derive(Clone, Debug)]
struct Heads {
    /// Query heads.
    q: Partition,
    /// Key heads, where they are shared out; else each rank's, one after the other.
    kv: Partition,
    /// The key head behind each position of `kv`, when some are sent to several ranks.
    copies: Option<Vec<usize>>,
}

/// What a rank computes by itself.
#[derive(Clone, Debug)]
enum Inner {
    /// The whole sequence.
    Whole(Box<AttentionProblem>),
    /// Its group's part of it.
    Ring(Box<RingAttention>),
}

/// What a forward pass leaves on a rank, on its device.
#[derive(Debug)]
pub struct UlyssesForward {
    /// `[batch, rows, queries of this rank, heads, head_dim_v]` in the dtype of q.
    pub out: Tensor,
    /// Operands of this rank's heads, kept for the backward pass.
    kept: Kept,
    inner: ShardForward,
}

/// Operands after the switch.
#[derive(Debug)]
struct Kept {
    q: Tensor,
    k: Arc<Tensor>,
    v: Arc<Tensor>,
    biases: Vec<Tensor>,
    key_mask: Option<Tensor>,
    q_segments: Option<Tensor>,
    k_segments: Option<Tensor>,
    gate: Option<Tensor>,
}

impl Kept {
    fn shard(&self) -> Shard<'_> {
        Shard {
            q: self.q.view(),
            k: Arc::clone(&self.k),
            v: Arc::clone(&self.v),
            biases: self.biases.iter().map(Tensor::view).collect(),
            key_mask: self.key_mask.as_ref().map(Tensor::view),
            q_segments: self.q_segments.as_ref().map(Tensor::view),
            k_segments: self.k_segments.as_ref().map(Tensor::view),
            gate: self.gate.as_ref().map(Tensor::view),
        }
    }

    fn operands(&self) -> Operands<'_> {
        let Shard { q, biases, key_mask, q_segments, k_segments, gate, .. } = self.shard();
        Operands { q, k: self.k.view(), v: self.v.view(), biases, key_mask, q_segments, k_segments, gate }
    }
}

impl Heads {
    fn of(spec: &AttentionSpec, group: usize) -> Result<Self> {
        let (heads, kv_heads) = (spec.heads, spec.kv_heads);
        if group == 0 || group > heads {
            let (expected, got) = (format!("1 to {heads} ranks, the number of heads"), group.to_string());
            return Err(CommError::Counts { list: "group", expected, got }.into());
        }
        let shared = heads / kv_heads.max(1);
        if kv_heads >= group {
            let kv = Partition::contiguous(kv_heads, group)?;
            let q = (0..group)
                .map(|rank| kv.chunks(rank).iter().map(|chunk| chunk.start * shared..chunk.end * shared).collect());
            return Ok(Self { q: Partition::new(heads, q.collect())?, kv, copies: None });
        }
        let q = Partition::contiguous(heads, group)?;
        let (mut copies, mut kv) = (Vec::new(), Vec::new());
        for rank in 0..group {
            let first = copies.len();
            let mut needed: Vec<usize> = q.positions(rank).map(|head| head / shared).collect();
            if needed.first() == needed.last() {
                needed.truncate(1);
            }
            // With more than one, a key head for each query head: groups of different sizes are none.
            copies.extend(needed);
            kv.push(std::iter::once(first..copies.len()).collect());
        }
        Ok(Self { q, kv: Partition::new(copies.len(), kv)?, copies: Some(copies) })
    }

    /// Key heads as they are sent: copies next to each other.
    fn spread(&self, rank: &Rank<'_>, x: &TensorView<'_>) -> Result<Option<Tensor>> {
        let Some(copies) = &self.copies else { return Ok(None) };
        let mut shape = x.shape().to_vec();
        shape[HEADS] = copies.len();
        let mut spread = rank.zeros(x.dtype(), &shape)?;
        for (place, &head) in copies.iter().enumerate() {
            let place = spread.view_mut().slice(HEADS, place..place + 1, 1)?;
            rank.copy(x.slice(HEADS, head..head + 1, 1)?, place)?;
        }
        Ok(Some(spread))
    }

    /// The adjoint: gradients of copies added up, in f32, in their order.
    fn collect(&self, rank: &Rank<'_>, gradient: Tensor, kv_heads: usize) -> Result<Tensor> {
        let Some(copies) = &self.copies else { return Ok(gradient) };
        let mut shape = gradient.shape().to_vec();
        shape[HEADS] = kv_heads;
        let mut sum = rank.zeros(DType::F32, &shape)?;
        for (place, &head) in copies.iter().enumerate() {
            let part = gradient.view().slice(HEADS, place..place + 1, 1)?;
            rank.add(part, sum.view_mut().slice(HEADS, head..head + 1, 1)?)?;
        }
        rank.rounded(sum, gradient.dtype())
    }
}

impl UlyssesAttention {
    /// Checks a problem of the whole sequence, and makes the groups. Called by all ranks; `group` divides their number and is
    /// at most the number of heads.
    ///
    /// # Errors
    /// As [`RingAttention::new`]; [`CommError::Counts`] for a group that does not fit; [`CommError::Mismatch`] when ranks
    /// differ.
    pub fn new(
        comm: &Communicator,
        spec: AttentionSpec,
        queries: Partition,
        keys: Partition,
        group: usize,
    ) -> Result<Self> {
        let parts = Self::parts(comm, &spec, &queries, &keys, group);
        let text = format!("{spec:?} {queries:?} {keys:?} {group}");
        comm.agree(NAME, parts.as_ref().map(|_| text).map_err(Clone::clone))?;
        let (problem, heads, inner) = parts?;
        let number = |number: usize| u32::try_from(number).unwrap_or(u32::MAX);
        let (row, column) = (comm.rank() / group, comm.rank() % group);
        let (group, ring) = (comm.split(number(row), 0)?, comm.split(number(column), 0)?);
        Ok(Self { problem, queries, keys, group, ring, heads, inner })
    }

    fn parts(
        comm: &Communicator,
        spec: &AttentionSpec,
        queries: &Partition,
        keys: &Partition,
        group: usize,
    ) -> Result<(AttentionProblem, Heads, Inner)> {
        let (got, expected) = (comm.world_size(), queries.ranks());
        if got != expected {
            return Err(CommError::WorldSize { what: "partition", expected, got }.into());
        }
        check_partitions(spec, queries, keys)?;
        let problem = AttentionProblem::new(spec.clone())?;
        let heads = Heads::of(spec, group)?;
        let (rings, rank) = (queries.grouped(group)?, comm.rank() % group);
        let own: Vec<usize> = heads.q.positions(rank).collect();
        let mut inner = spec.clone();
        (inner.heads, inner.kv_heads) = (own.len(), heads.kv.count(rank));
        if let Some(slopes) = &spec.mask.alibi_slopes {
            inner.mask.alibi_slopes = Some(own.iter().filter_map(|&head| slopes.get(head).copied()).collect());
        }
        for bias in &mut inner.biases {
            if bias.shape[2] != 1 {
                bias.shape[2] = own.len();
            }
        }
        // A bias without heads is summed over the heads of this rank in its own dtype, and over ranks after that.
        let inner = if rings.ranks() == 1 {
            Inner::Whole(Box::new(AttentionProblem::new(inner)?))
        } else {
            Inner::Ring(Box::new(RingAttention::new(inner, rings, keys.grouped(group)?)?))
        };
        Ok((problem, heads, inner))
    }

    /// What this rank has sent to others of its group and its ring, by operation.
    #[must_use]
    pub fn traffic(&self) -> BTreeMap<&'static str, Traffic> {
        let mut all = self.group.traffic();
        for (name, ring) in self.ring.traffic() {
            let traffic = all.entry(name).or_default();
            traffic.calls += ring.calls;
            traffic.bytes_sent += ring.bytes_sent;
        }
        all
    }

    /// Attention of this rank's queries over all keys. Called by all ranks.
    ///
    /// # Errors
    /// As [`RingAttention::forward`].
    pub fn forward(&self, rank: &Rank<'_>, shard: &Shard<'_>) -> Result<UlyssesForward> {
        let checked = check_shard(&self.problem, &self.queries, &self.keys, rank.comm, shard);
        self.agree(rank, "forward", checked)?;
        self.checked(rank, self.attend(rank, shard))
    }

    fn attend(&self, rank: &Rank<'_>, shard: &Shard<'_>) -> Result<UlyssesForward> {
        let kept = self.switched(rank, shard)?;
        let inner = match &self.inner {
            Inner::Whole(problem) => local::forward(rank, problem, kept.operands())?,
            Inner::Ring(ring) => ring.forward(&on(rank, &self.ring), &kept.shard())?,
        };
        let out = self.q_switch(rank).adjoint().apply(&on(rank, &self.group), &inner.out.view())?;
        Ok(UlyssesForward { out, kept, inner })
    }

    /// Gradients of this rank's operands. Called by all ranks.
    ///
    /// # Errors
    /// As [`RingAttention::backward`].
    pub fn backward(&self, rank: &Rank<'_>, forward: &UlyssesForward, d_out: &TensorView<'_>) -> Result<ShardBackward> {
        self.agree(rank, "backward", self.check_outputs(rank, forward, d_out))?;
        self.checked(rank, self.differentiate(rank, forward, d_out))
    }

    fn differentiate(
        &self,
        rank: &Rank<'_>,
        forward: &UlyssesForward,
        d_out: &TensorView<'_>,
    ) -> Result<ShardBackward> {
        let group = on(rank, &self.group);
        let q_switch = self.q_switch(rank);
        let d_out = q_switch.apply(&group, d_out)?;
        let inner = match &self.inner {
            Inner::Whole(problem) => {
                local::backward(rank, problem, forward.kept.operands(), &forward.inner, d_out.view())?
            }
            Inner::Ring(ring) => {
                let ring_rank = on(rank, &self.ring);
                ring.backward(&ring_rank, &forward.kept.shard(), &forward.inner, &d_out.view())?
            }
        };
        let back = |gradient: Option<Tensor>| {
            gradient.map(|gradient| q_switch.adjoint().apply(&group, &gradient.view())).transpose()
        };
        let kv_switch = self.kv_switch(rank).adjoint();
        let kv_back = |gradient: Option<Tensor>| {
            let back = |gradient: Tensor| {
                let copies = kv_switch.apply(&group, &gradient.view())?;
                self.heads.collect(rank, copies, self.problem.spec().kv_heads)
            };
            gradient.map(back).transpose()
        };
        let (dq, d_gate) = (back(inner.dq)?, back(inner.d_gate)?);
        let (dk, dv) = (kv_back(inner.dk)?, kv_back(inner.dv)?);
        let mut dbiases = Vec::new();
        for (bias, gradient) in self.problem.spec().biases.iter().zip(inner.dbiases) {
            dbiases.push(gradient.map(|gradient| self.bias_back(rank, bias, &gradient)).transpose()?);
        }
        Ok(ShardBackward { dq, dk, dv, d_gate, dbiases })
    }

    /// What all ranks must have alike.
    fn agree(&self, rank: &Rank<'_>, pass: &str, checked: Result<()>) -> Result<()> {
        let Self { problem, queries, keys, group, .. } = self;
        let text = |()| format!("{pass} {problem:?} {queries:?} {keys:?} {}", group.world_size());
        rank.comm.agree(NAME, checked.map(text))
    }

    /// What went wrong on this rank, told to whoever may wait for it.
    fn checked<T>(&self, rank: &Rank<'_>, result: Result<T>) -> Result<T> {
        let result = self.ring.checked(NAME, self.group.checked(NAME, result));
        rank.comm.checked(NAME, result)
    }

    fn check_outputs(&self, rank: &Rank<'_>, forward: &UlyssesForward, d_out: &TensorView<'_>) -> Result<()> {
        let (here, got, expected) = (rank.comm.rank(), rank.comm.world_size(), self.queries.ranks());
        if got != expected {
            return Err(CommError::WorldSize { what: "partition", expected, got }.into());
        }
        let shape = with_axis(self.problem.out_shape(), SEQLEN, self.queries.count(here));
        exact("out", &forward.out.view(), &shape, self.problem.spec().dtype)?;
        exact("d_out", d_out, &shape, self.problem.spec().dtype)
    }

    /// Positions that the ranks of this group hold, as positions of what they hold together: of the whole sequence where
    /// there is one group, else of the group's part of it.
    fn held(&self, rank: &Rank<'_>, partition: &Partition) -> Partition {
        partition.within_group(rank.comm.rank() / self.group.world_size(), self.group.world_size())
    }

    fn q_switch(&self, rank: &Rank<'_>) -> Switch {
        let from = Split { axis: SEQLEN, partition: self.held(rank, &self.queries) };
        Switch { from, to: Split { axis: HEADS, partition: self.heads.q.clone() } }
    }

    fn kv_switch(&self, rank: &Rank<'_>) -> Switch {
        let from = Split { axis: SEQLEN, partition: self.held(rank, &self.keys) };
        Switch { from, to: Split { axis: HEADS, partition: self.heads.kv.clone() } }
    }

    fn switched(&self, rank: &Rank<'_>, shard: &Shard<'_>) -> Result<Kept> {
        let group = on(rank, &self.group);
        let (q_switch, kv_switch) = (self.q_switch(rank), self.kv_switch(rank));
        let keys = |tensor: &Tensor| {
            let spread = self.heads.spread(rank, &tensor.view())?;
            Ok::<_, crate::Error>(Arc::new(kv_switch.apply(&group, &spread.as_ref().unwrap_or(tensor).view())?))
        };
        let along = |view: &Option<TensorView<'_>>, partition: &Partition| {
            let gather = |view: &TensorView<'_>| {
                // Whether it is broadcast is the problem's, and the same on all ranks, unless a rank holds one position.
                let split = Split { axis: 2, partition: self.held(rank, partition) };
                AllGather(split).apply(&group, view)
            };
            view.as_ref().map(gather).transpose()
        };
        let biases = self.problem.spec().biases.iter().zip(&shard.biases);
        Ok(Kept {
            q: q_switch.apply(&group, &shard.q)?,
            k: keys(&shard.k)?,
            v: keys(&shard.v)?,
            biases: biases.map(|(bias, view)| self.bias_there(rank, bias, view)).collect::<Result<_>>()?,
            key_mask: along(&expanded(&shard.key_mask, self.keys.count(rank.comm.rank()))?, &self.keys)?,
            q_segments: along(&expanded(&shard.q_segments, self.queries.count(rank.comm.rank()))?, &self.queries)?,
            k_segments: along(&expanded(&shard.k_segments, self.keys.count(rank.comm.rank()))?, &self.keys)?,
            gate: shard.gate.as_ref().map(|gate| q_switch.apply(&group, gate)).transpose()?,
        })
    }

    /// The axis of a bias that is split over ranks, and how.
    fn bias_split(&self, rank: &Rank<'_>, bias: &BiasSpec) -> Option<Split> {
        match SplitAlong::of(bias) {
            SplitAlong::Queries => Some(Split { axis: 3, partition: self.held(rank, &self.queries) }),
            SplitAlong::Keys => Some(Split { axis: 4, partition: self.held(rank, &self.keys) }),
            SplitAlong::Nothing => None,
        }
    }

    /// A bias as this rank's heads need it.
    fn bias_there(&self, rank: &Rank<'_>, bias: &BiasSpec, view: &TensorView<'_>) -> Result<Tensor> {
        let (group, heads) = (on(rank, &self.group), Split { axis: 2, partition: self.heads.q.clone() });
        match (self.bias_split(rank, bias), bias.shape[2] == 1) {
            (Some(from), false) => Switch { from, to: heads }.apply(&group, view),
            (Some(from), true) => AllGather(from).apply(&group, view),
            (None, false) => Scatter(heads).apply(&group, view),
            (None, true) => rank.dense(view),
        }
    }

    /// The adjoint of [`Self::bias_there`].
    fn bias_back(&self, rank: &Rank<'_>, bias: &BiasSpec, gradient: &Tensor) -> Result<Tensor> {
        let (group, heads) = (on(rank, &self.group), Split { axis: 2, partition: self.heads.q.clone() });
        let gradient = gradient.view();
        match (self.bias_split(rank, bias), bias.shape[2] == 1) {
            (Some(from), false) => Switch { from, to: heads }.adjoint().apply(&group, &gradient),
            (Some(from), true) => ReduceScatter(from).apply(&group, &gradient),
            (None, false) => Gather(heads).apply(&group, &gradient),
            (None, true) => Reduce.apply(&group, &gradient),
        }
    }
}

/// The same rank in another group, where it waits for as long as in the first.
fn on<'r>(rank: &Rank<'r>, comm: &'r Communicator) -> Rank<'r> {
    comm.wait_as(rank.comm);
    Rank { comm, ..*rank }
}

/// A mask with all of its positions, where it is broadcast along them.
fn expanded<'a>(view: &Option<TensorView<'a>>, count: usize) -> Result<Option<TensorView<'a>>> {
    let Some(view) = view else { return Ok(None) };
    let mut shape = view.shape().to_vec();
    if let Some(size) = shape.get_mut(2) {
        *size = count;
    }
    Ok(Some(view.expand(&shape)?))
}
