//! What goes round the ring of ranks: blocks that each passes on while it computes, and sums that travel with them.

use std::sync::Arc;

use tilefold_core::Tensor;

use crate::communicator::Shift;
use crate::error::Result;
use crate::rank::Rank;
use crate::transport::Parcel;

/// Calls `work` with each rank's block, this rank's own first, while the next one is on its way.
///
/// # Errors
/// Those of `work`; a [`crate::CommError`].
pub(super) fn round(
    rank: &Rank<'_>,
    name: &'static str,
    own: Parcel,
    mut work: impl FnMut(usize, Parcel) -> Result<()>,
) -> Result<()> {
    let (comm, mut block) = (rank.comm, own);
    let (here, ranks) = (comm.rank(), comm.world_size());
    for step in 0..ranks {
        let begin = || comm.begin_shift(name, comm.neighbour(1), block.clone(), comm.neighbour(-1));
        let shift = (step + 1 < ranks).then(begin).transpose()?;
        work((here + ranks - step) % ranks, block)?;
        block = shift.map_or(Ok(Vec::new()), Shift::finish)?;
    }
    Ok(())
}

/// Passes the sums of a block on, with this rank's part. They begin with the block's owner and come home to it, so a sum has
/// the order in which its block travels.
///
/// # Errors
/// A [`crate::CommError`]; what the device reports.
pub(super) fn pass_on(rank: &Rank<'_>, name: &'static str, owner: usize, part: Vec<Tensor>) -> Result<()> {
    let mut sums = part;
    if owner != rank.comm.rank() {
        let mut earlier = received(rank, name)?;
        for (part, sum) in sums.iter().zip(&mut earlier) {
            rank.add(part.view(), sum.view_mut())?;
        }
        sums = earlier;
    }
    let packed = sums.into_iter().map(|sum| rank.pack_shared(&Arc::new(sum)));
    rank.comm.send_as(name, rank.comm.neighbour(1), packed.collect::<Result<_>>()?)
}

/// Sums that the previous rank has passed on.
///
/// # Errors
/// As [`pass_on`].
pub(super) fn received(rank: &Rank<'_>, name: &'static str) -> Result<Vec<Tensor>> {
    let parcel = rank.comm.receive_as(name, rank.comm.neighbour(-1))?;
    parcel.into_iter().map(|sum| rank.unpack(sum).and_then(|sum| rank.own(sum))).collect()
}
