//! Linear maps between tensors on ranks, each with its adjoint in the types: what Megatron-LM calls copy, reduce, scatter,
//! gather and reduce-scatter.
//!
//! A map takes tensors of one kind to tensors of another, and its adjoint goes back: with
//!
//! * *replicated*: every rank holds the same tensor; it counts once,
//! * *varying*: every rank holds a tensor of its own, which counts for itself,
//! * *sharded*: every rank holds a part of one tensor,
//!
//! ⟨A x, y⟩ = ⟨x, Aᵀ y⟩ holds for all x and y, where a product of varying or sharded tensors is summed over ranks. A backward
//! pass applies adjoints in reverse order.
//!
//! | map | from | to | backward |
//! |---|---|---|---|
//! | [`Copy`](struct@Copy) | replicated | varying | [`Reduce`] |
//! | [`Reduce`] | varying | replicated | [`Copy`](struct@Copy) |
//! | [`Scatter`] | replicated | sharded | [`Gather`] |
//! | [`Gather`] | sharded | replicated | [`Scatter`] |
//! | [`AllGather`] | sharded | varying | [`ReduceScatter`] |
//! | [`ReduceScatter`] | varying | sharded | [`AllGather`] |
//! | [`Switch`] | sharded along one axis | sharded along another | [`Switch`] the other way |
//!
//! *Shapes*: any; views may have any strides. *Numerics*: copies are exact; sums are taken in f32 in the order of ranks and
//! rounded once. Source: Shoeybi et al., "Megatron-LM", 2019; Korthikanti et al., "Reducing Activation Recomputation in Large
//! Transformer Models", 2022.

use std::sync::Arc;

use tilefold_core::{ProblemError, Tensor, TensorView};

use crate::error::{CommError, Result};
use crate::host;
use crate::partition::Partition;
use crate::rank::Rank;
use crate::reduce::Reduction;
use crate::transport::Parcel;

/// A linear map between tensors on ranks.
pub trait Map {
    /// The type of its adjoint.
    type Adjoint: Map<Adjoint = Self>;

    /// The map's value on this rank's device. Called by all ranks.
    ///
    /// # Errors
    /// A [`ProblemError`] when `x` has not the shape that the map takes; a [`CommError`]; what the device reports.
    fn apply(&self, rank: &Rank<'_>, x: &TensorView<'_>) -> Result<Tensor>;

    /// The map that takes gradients of its values to gradients of its arguments.
    fn adjoint(&self) -> Self::Adjoint;
}

/// The same tensor on every rank, used by each for itself: forward nothing, backward a sum.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Copy;

/// The sum of all ranks' tensors, on every rank: forward a sum, backward nothing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Reduce;

/// An axis and which rank holds which of its positions.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Split {
    /// The axis.
    pub axis: usize,
    /// Who holds what of it.
    pub partition: Partition,
}

/// This rank's part of a tensor that every rank has.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Scatter(pub Split);

/// The whole tensor, of which every rank has a part, to be used alike by all of them.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Gather(pub Split);

/// The whole tensor, of which every rank has a part, to be used by each rank in its own way.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct AllGather(pub Split);

/// This rank's part of the sum of all ranks' tensors.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ReduceScatter(pub Split);

/// A tensor that is split along one axis becomes one that is split along another: rows to columns, sequence to heads.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Switch {
    /// The axis of which this rank has a part, before.
    pub from: Split,
    /// The axis of which this rank has a part, after.
    pub to: Split,
}

impl Map for Copy {
    type Adjoint = Reduce;

    fn apply(&self, rank: &Rank<'_>, x: &TensorView<'_>) -> Result<Tensor> {
        rank.dense(x)
    }

    fn adjoint(&self) -> Reduce {
        Reduce
    }
}

impl Map for Reduce {
    type Adjoint = Copy;

    fn apply(&self, rank: &Rank<'_>, x: &TensorView<'_>) -> Result<Tensor> {
        let sum = if host::dense("x", x).is_ok() {
            rank.comm.all_reduce(x, Reduction::Sum)?
        } else {
            let packed = rank.comm.checked("all_reduce", rank.pack(x))?;
            rank.comm.all_reduce(&packed.view(), Reduction::Sum)?
        };
        rank.own(rank.unpack(Arc::new(sum))?)
    }

    fn adjoint(&self) -> Copy {
        Copy
    }
}

impl Map for Scatter {
    type Adjoint = Gather;

    fn apply(&self, rank: &Rank<'_>, x: &TensorView<'_>) -> Result<Tensor> {
        self.0.check_whole(rank, x)?;
        self.0.part(rank, x, rank.comm.rank())
    }

    fn adjoint(&self) -> Gather {
        Gather(self.0.clone())
    }
}

impl Map for Gather {
    type Adjoint = Scatter;

    fn apply(&self, rank: &Rank<'_>, x: &TensorView<'_>) -> Result<Tensor> {
        self.0.gather(rank, x)
    }

    fn adjoint(&self) -> Scatter {
        Scatter(self.0.clone())
    }
}

impl Map for AllGather {
    type Adjoint = ReduceScatter;

    fn apply(&self, rank: &Rank<'_>, x: &TensorView<'_>) -> Result<Tensor> {
        self.0.gather(rank, x)
    }

    fn adjoint(&self) -> ReduceScatter {
        ReduceScatter(self.0.clone())
    }
}

impl Map for ReduceScatter {
    type Adjoint = AllGather;

    fn apply(&self, rank: &Rank<'_>, x: &TensorView<'_>) -> Result<Tensor> {
        let name = "reduce_scatter";
        let parcels = self.0.check_whole(rank, x).and_then(|()| self.0.parcels(rank, x));
        let parcels = rank.comm.checked(name, parcels)?;
        let kind = format!("{:?} {} {:?}", self.0, x.dtype(), x.shape());
        let sum = rank.comm.reduce_parts(name, &kind, parcels, Reduction::Sum)?;
        rank.own(rank.unpack(Arc::new(sum))?)
    }

    fn adjoint(&self) -> AllGather {
        AllGather(self.0.clone())
    }
}

impl Map for Switch {
    type Adjoint = Self;

    fn apply(&self, rank: &Rank<'_>, x: &TensorView<'_>) -> Result<Tensor> {
        let (name, here) = ("switch", rank.comm.rank());
        let checked = self.from.check_part(rank, x, here).and_then(|()| self.to.check_whole(rank, x));
        let parcels = rank.comm.checked(name, checked.and_then(|()| self.to.parcels(rank, x)))?;
        let kind = format!("{self:?} {} {:?}", x.dtype(), shape_without(x.shape(), self.from.axis));
        let parcels = rank.comm.exchange(name, &kind, parcels)?;
        let mut shape = x.shape().to_vec();
        shape[self.from.axis] = self.from.partition.seqlen();
        shape[self.to.axis] = self.to.partition.count(here);
        self.from.assemble(rank, parcels, x, &shape)
    }

    fn adjoint(&self) -> Self {
        Self { from: self.to.clone(), to: self.from.clone() }
    }
}

impl Split {
    /// An axis cut into one run for each rank.
    ///
    /// # Errors
    /// Those of [`Partition::contiguous`].
    pub fn contiguous(axis: usize, size: usize, ranks: usize) -> Result<Self> {
        Ok(Self { axis, partition: Partition::contiguous(size, ranks)? })
    }

    /// A rank's part of a whole tensor, on the device.
    pub(crate) fn part(&self, rank: &Rank<'_>, whole: &TensorView<'_>, of: usize) -> Result<Tensor> {
        let mut shape = whole.shape().to_vec();
        shape[self.axis] = self.partition.count(of);
        let mut part = rank.zeros(whole.dtype(), &shape)?;
        for (local, start) in self.partition.places(of) {
            let chunk = whole.slice(self.axis, start..start + local.len(), 1)?;
            rank.copy(chunk, part.view_mut().slice(self.axis, local, 1)?)?;
        }
        Ok(part)
    }

    /// Each rank's part of a whole tensor, to be sent.
    fn parcels(&self, rank: &Rank<'_>, whole: &TensorView<'_>) -> Result<Vec<Parcel>> {
        let part = |to| Ok(vec![rank.pack_shared(&Arc::new(self.part(rank, whole, to)?))?]);
        (0..rank.comm.world_size()).map(part).collect()
    }

    /// The whole of a tensor from the parts of all ranks.
    pub(crate) fn gather(&self, rank: &Rank<'_>, x: &TensorView<'_>) -> Result<Tensor> {
        let parcel = self.check_part(rank, x, rank.comm.rank()).and_then(|()| Ok(vec![rank.pack(x)?]));
        let parcel = rank.comm.checked("gather", parcel)?;
        let kind = format!("{self:?} {} {:?}", x.dtype(), shape_without(x.shape(), self.axis));
        let parcels = rank.comm.exchange("gather", &kind, vec![parcel; rank.comm.world_size()])?;
        let mut shape = x.shape().to_vec();
        shape[self.axis] = self.partition.seqlen();
        self.assemble(rank, parcels, x, &shape)
    }

    /// Puts what each rank has sent to its positions.
    fn assemble(
        &self,
        rank: &Rank<'_>,
        parcels: Vec<Parcel>,
        like: &TensorView<'_>,
        shape: &[usize],
    ) -> Result<Tensor> {
        let mut whole = rank.zeros(like.dtype(), shape)?;
        for (from, tensor) in
            parcels.into_iter().enumerate().flat_map(|(from, parcel)| parcel.into_iter().map(move |t| (from, t)))
        {
            let part = rank.unpack(tensor)?;
            for (local, start) in self.partition.places(from) {
                let place = whole.view_mut().slice(self.axis, start..start + local.len(), 1)?;
                rank.copy(part.view().slice(self.axis, local, 1)?, place)?;
            }
        }
        Ok(whole)
    }

    fn check_whole(&self, rank: &Rank<'_>, x: &TensorView<'_>) -> Result<()> {
        self.check(rank, x, self.partition.seqlen())
    }

    fn check_part(&self, rank: &Rank<'_>, x: &TensorView<'_>, of: usize) -> Result<()> {
        self.check_ranks(rank)?;
        self.check(rank, x, self.partition.count(of))
    }

    fn check(&self, rank: &Rank<'_>, x: &TensorView<'_>, expected: usize) -> Result<()> {
        self.check_ranks(rank)?;
        let tensor = "x";
        let got = *x.shape().get(self.axis).ok_or(ProblemError::Rank {
            tensor,
            expected: self.axis + 1,
            got: x.shape().len(),
        })?;
        if got == expected {
            return Ok(());
        }
        Err(ProblemError::Shape { tensor, dimension: "the axis that is split", expected, got }.into())
    }

    fn check_ranks(&self, rank: &Rank<'_>) -> Result<()> {
        let (expected, got) = (self.partition.ranks(), rank.comm.world_size());
        if expected == got { Ok(()) } else { Err(CommError::WorldSize { what: "partition", expected, got }.into()) }
    }
}

/// What must be alike on all ranks, of which each has a part along `axis`.
fn shape_without(shape: &[usize], axis: usize) -> Vec<usize> {
    shape.iter().enumerate().filter(|&(other, _)| other != axis).map(|(_, &size)| size).collect()
}
