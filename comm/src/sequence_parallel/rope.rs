//! Rotary position embedding of a shard, by its positions in the whole sequence.

use tilefold_core::{RopeArgs, RopeSpec, Tensor, TensorView};

use crate::error::{CommError, Result};
use crate::partition::Partition;
use crate::rank::Rank;
use crate::shape::{exact, with_axis};

/// The axis of `[batch, rows, seqlen, heads, head_dim]` that is split.
const SEQLEN: usize = 2;

/// This rank's positions of q or k, `[batch, rows, positions of this rank, heads, head_dim]`, turned; with
/// [`RopeSpec::inverse`] the gradient. No rank needs another.
///
/// `spec.offset` is the position of the whole sequence's first entry. *Numerics*: those of the device's `rope`, the same bits as
/// if the whole sequence were turned at once.
///
/// # Errors
/// [`CommError::WorldSize`] for a partition over other ranks; a [`tilefold_core::ProblemError`] for a tensor or options that do not
/// fit; what the device reports.
pub fn rope(rank: &Rank<'_>, spec: &RopeSpec, partition: &Partition, x: &TensorView<'_>) -> Result<Tensor> {
    let (here, got, expected) = (rank.comm.rank(), rank.comm.world_size(), partition.ranks());
    if got != expected {
        return Err(CommError::WorldSize { what: "partition", expected, got }.into());
    }
    if let Ok(shape) = <[usize; 5]>::try_from(x.shape()) {
        exact("x", x, &with_axis(shape, SEQLEN, partition.count(here)), x.dtype())?;
    }
    let mut turned = rank.zeros(x.dtype(), x.shape())?;
    for (local, start) in partition.places(here) {
        let offset = spec.offset.saturating_add(i64::try_from(start).unwrap_or(i64::MAX));
        let source = x.slice(SEQLEN, local.clone(), 1)?;
        let destination = turned.view_mut().slice(SEQLEN, local, 1)?;
        let args = RopeArgs::new(&RopeSpec { offset, ..spec.clone() }, source, destination)?;
        rank.device.rope(rank.stream, args)?;
    }
    Ok(turned)
}
