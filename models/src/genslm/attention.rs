//! Causal attention of this rank's tokens over the whole sequence; q and k are turned by their positions in it before anything
//! travels.

use std::collections::BTreeMap;
use std::sync::Arc;

use ndarray::Array2;
use tilefold::comm::sequence_parallel::{UlyssesForward, rope};
use tilefold::comm::{Communicator, Partition, Rank, RingAttention, Shard, ShardForward, Traffic, UlyssesAttention};
use tilefold::{ProblemError, RopePairs, RopeSpec, Tensor};

use super::config::{AttentionKind, Config, Positions};
use super::error::Result;
use super::host::{copy_to_host, to_device, to_host};

/// Attention as it goes over ranks.
#[derive(Debug)]
pub(super) struct Attention {
    way: Way,
    rope: Option<RopeSpec>,
    partition: Partition,
    /// `[batch, 1, tokens of this rank, heads, head_dim]`.
    shape: [usize; 5],
}

#[derive(Debug)]
enum Way {
    Ring(Box<RingAttention>),
    Ulysses(Box<UlyssesAttention>),
}

/// What the backward pass needs, on the device.
#[derive(Debug)]
pub(super) enum Kept {
    Ring { q: Arc<Tensor>, k: Arc<Tensor>, v: Arc<Tensor>, forward: Box<ShardForward> },
    Ulysses(Box<UlyssesForward>),
}

impl Attention {
    /// Called by all ranks.
    pub(super) fn new(rank: &Rank<'_>, config: &Config, partition: &Partition) -> Result<Self> {
        let (spec, queries, keys) = (config.attention_spec(), partition.clone(), partition.clone());
        let shape = [config.batch, 1, partition.count(rank.comm.rank()), config.heads, config.head_dim()];
        let way = match config.attention {
            AttentionKind::Ring => Way::Ring(Box::new(RingAttention::new(spec, queries, keys)?)),
            AttentionKind::Ulysses => {
                let group = rank.comm.world_size();
                Way::Ulysses(Box::new(UlyssesAttention::new(rank.comm, spec, queries, keys, group)?))
            }
        };
        let rope = (config.positions == Positions::Rope).then(|| RopeSpec::new(config.head_dim(), RopePairs::Halves));
        Ok(Self { way, rope, partition: partition.clone(), shape })
    }

    /// Attention, from and to rows `[batch · tokens of this rank, hidden]`.
    pub(super) fn forward(&self, rank: &Rank<'_>, qkv: [Array2<f32>; 3]) -> Result<(Array2<f32>, Kept)> {
        let [q, k, v] = qkv.map(|matrix| to_device(rank, matrix, &self.shape));
        let (q, k, v) = (self.turned(rank, q?, false)?, self.turned(rank, k?, false)?, v?);
        let shard = shard(&q, &k, &v);
        let kept = match &self.way {
            Way::Ring(ring) => {
                let forward = Box::new(ring.forward(rank, &shard)?);
                Kept::Ring { forward, q, k, v }
            }
            Way::Ulysses(ulysses) => Kept::Ulysses(Box::new(ulysses.forward(rank, &shard)?)),
        };
        Ok((self.out(rank, &kept)?, kept))
    }

    /// What the forward pass gave.
    pub(super) fn out(&self, rank: &Rank<'_>, kept: &Kept) -> Result<Array2<f32>> {
        let out = match kept {
            Kept::Ring { forward, .. } => &forward.out,
            Kept::Ulysses(forward) => &forward.out,
        };
        copy_to_host(rank, &out.view(), self.hidden())
    }

    /// Gradients of q, k and v.
    pub(super) fn backward(&self, rank: &Rank<'_>, kept: &Kept, d_out: Array2<f32>) -> Result<[Array2<f32>; 3]> {
        let d_out = to_device(rank, d_out, &self.shape)?;
        let gradients = match (&self.way, kept) {
            (Way::Ring(ring), Kept::Ring { q, k, v, forward }) => {
                ring.backward(rank, &shard(q, k, v), forward, &d_out.view())?
            }
            (Way::Ulysses(ulysses), Kept::Ulysses(forward)) => ulysses.backward(rank, forward, &d_out.view())?,
            _ => return Err(missing("forward").into()),
        };
        let gradient = |gradient: Option<Tensor>, name| gradient.map(Arc::new).ok_or_else(|| missing(name));
        let dq = self.turned(rank, gradient(gradients.dq, "dq")?, true)?;
        let dk = self.turned(rank, gradient(gradients.dk, "dk")?, true)?;
        let host = |gradient| to_host(rank, gradient, self.hidden());
        Ok([host(dq)?, host(dk)?, host(gradient(gradients.dv, "dv")?)?])
    }

    /// Rotary positions, or their adjoint.
    fn turned(&self, rank: &Rank<'_>, x: Arc<Tensor>, inverse: bool) -> Result<Arc<Tensor>> {
        let Some(spec) = &self.rope else { return Ok(x) };
        let spec = RopeSpec { inverse, ..spec.clone() };
        Ok(Arc::new(rope(rank, &spec, &self.partition, &x.view())?))
    }

    /// Bytes sent through groups of its own.
    pub(super) fn bytes_sent(&self) -> u64 {
        match &self.way {
            Way::Ring(_) => 0,
            Way::Ulysses(ulysses) => total(&ulysses.traffic()),
        }
    }

    fn hidden(&self) -> usize {
        self.shape[3] * self.shape[4]
    }
}

/// Bytes this rank has sent to others of a group.
pub(super) fn bytes_sent(comm: &Communicator) -> u64 {
    total(&comm.traffic())
}

fn total(traffic: &BTreeMap<&'static str, Traffic>) -> u64 {
    traffic.values().map(|traffic| traffic.bytes_sent).sum()
}

fn shard<'a>(q: &'a Tensor, k: &Arc<Tensor>, v: &Arc<Tensor>) -> Shard<'a> {
    Shard::new(q.view(), Arc::clone(k), Arc::clone(v))
}

fn missing(tensor: &'static str) -> ProblemError {
    ProblemError::Missing { tensor, reason: "attention of the same kind gives it" }
}
