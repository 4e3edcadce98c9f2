//! Dynamic axial parallelism: ranks share out the rows of an axial attention, and turn to columns by one all-to-all.
//!
//! The MSA `[batch, n_seq, n_res, ..]` and the pair representation `[batch, n_res, n_res, ..]` are split along one axis. An
//! attention along the other axis has whole rows on each rank, and nothing travels but what is shared by rows: the pair bias,
//! of which each rank has made its queries' part. Attention along the first axis comes after a
//! [`Switch`](super::maps::Switch) of axes 1 and 2, and is the same function.
//!
//! ```text
//! rank 0: rows 0..a   |-- attention over columns, bias gathered or travelling --| Switch |-- over rows --| Switch back
//! rank 1: rows a..b   |   dbias: reduce-scatter, or travels with the bias       |        |               |
//! ```
//!
//! Source: Cheng et al., "FastFold: Optimizing AlphaFold Training and Inference on GPU Clusters", 2022.

use std::ops::Range;
use std::sync::Arc;

use tilefold_core::{
    AttentionProblem, AttentionSpec, BackwardArgs, BackwardOperands, BiasSpec, DType, ForwardArgs, ForwardOperands,
    ProblemError, Tensor, TensorView, TensorViewMut,
};

use super::local::{self, Operands};
use super::maps::{AllGather, Map, Reduce, ReduceScatter, Split};
use super::ring::{Shard, ShardBackward, ShardForward, check_operands, check_outputs};
use super::travelling::{pass_on, received, round};
use crate::error::{CommError, Result};
use crate::partition::{Partition, check_alike};
use crate::rank::{Rank, along, along_mut};
use crate::shape::with_axis;

/// What it is called in errors.
const NAME: &str = "axial_attention";
/// What biases are called on their way.
const BIASES: &str = "axial_attention biases";
/// What their gradients are called.
const GRADIENTS: &str = "axial_attention gradients";

/// The axis of rows.
const ROWS: usize = 1;
/// The axis of queries in q and out.
const QUERIES: usize = 2;
/// The axis of queries in a bias.
const BIAS_QUERIES: usize = 3;

/// How a bias that all rows share reaches the ranks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SharedBias {
    /// Whole on every rank while it computes: one launch, `heads · seqlen_q · seqlen_k` numbers a rank.
    Gathered,
    /// A rank's queries of it at a time, round the ring: as many launches as ranks, two parts of it a rank.
    Travelling,
}

/// One attention whose rows are split over ranks.
///
/// *Shapes*: the problem is that of all rows. A rank passes its rows of q, k, v, gate and masks ([`Shard`], where "of this rank"
/// now means rows). Of the biases: its rows of one that has a row axis; else its queries of one that has a query axis
/// `[batch or 1, 1, heads or 1, queries of this rank, seqlen_k or 1]`; else all of it. *Numerics*: those of the device, except
/// that gradients of shared biases, and with travelling biases of k and v, are summed in f32 over parts. *Determinism*: the same
/// bits on every run.
#[derive(Clone, Debug)]
pub struct AxialAttention {
    problem: AttentionProblem,
    rows: Partition,
    queries: Partition,
    shared: SharedBias,
}

/// Where a bias is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Place {
    /// Each rank has that of its rows.
    Rows,
    /// Rows share it, and each rank has a part of its queries.
    Queries,
    /// Every rank has it.
    Everywhere,
}

/// Gradients that stay on a rank.
struct Sums {
    dq: Option<Tensor>,
    d_gate: Option<Tensor>,
    /// f32.
    dk: Option<Tensor>,
    /// f32.
    dv: Option<Tensor>,
    /// Of biases that do not travel; f32 without a query axis.
    resident: Vec<Option<Tensor>>,
}

/// Queries for which the shared biases are here.
struct QueryPart<'b> {
    /// Those biases, of all queries of the rank they come from.
    block: &'b [Arc<Tensor>],
    /// Which queries.
    queries: Range<usize>,
    /// Where they are in the block.
    local: Range<usize>,
}

impl Place {
    fn of(bias: &BiasSpec) -> Self {
        match bias.shape {
            [_, 1, _, 1, _] => Self::Everywhere,
            [_, 1, ..] => Self::Queries,
            _ => Self::Rows,
        }
    }
}

impl AxialAttention {
    /// Checks a problem of all rows against how rows, and the queries of shared biases, are split.
    ///
    /// # Errors
    /// That of the problem; [`CommError::Counts`] when a partition is one of another length or number of ranks; one entry of
    /// `kv_lengths` for each row is refused with [`ProblemError::Length`]: use a key mask.
    pub fn new(spec: AttentionSpec, rows: Partition, queries: Partition, shared: SharedBias) -> Result<Self> {
        check_alike([("rows", &rows, spec.rows), ("queries", &queries, spec.seqlen_q)])?;
        let problem = AttentionProblem::new(spec)?;
        let spec = problem.spec();
        if let Some(lengths) = spec.kv_lengths.as_ref().filter(|lengths| lengths.len() > spec.batch) {
            let expected = format!("1 or {}, for rows are split (a key mask can differ by row)", spec.batch);
            return Err(ProblemError::Length { list: "kv_lengths", expected, got: lengths.len() }.into());
        }
        Ok(Self { problem, rows, queries, shared })
    }

    /// Attention of this rank's rows. Called by all ranks.
    ///
    /// # Errors
    /// A [`ProblemError`] for a shard that does not fit, which the other ranks see as [`CommError::Refused`];
    /// [`CommError::Mismatch`] when ranks have different problems or partitions; what the device reports, which the others see
    /// as [`CommError::Refused`], and the communicator is unusable then.
    pub fn forward(&self, rank: &Rank<'_>, shard: &Shard<'_>) -> Result<ShardForward> {
        self.agree(rank, shard, "forward")?;
        rank.comm.checked(NAME, self.attend(rank, shard))
    }

    fn attend(&self, rank: &Rank<'_>, shard: &Shard<'_>) -> Result<ShardForward> {
        let here = rank.comm.rank();
        let problem = self.local_problem(here, None)?;
        if self.shared == SharedBias::Gathered {
            let gathered = self.gathered(rank, shard)?;
            return local::forward(rank, &problem, operands(shard, &gathered));
        }
        let mut whole = ShardForward {
            out: rank.zeros(problem.spec().dtype, &problem.out_shape())?,
            lse: rank.zeros(DType::F32, &problem.lse_shape())?,
            lse_low: rank.zeros(DType::F32, &problem.lse_shape())?,
        };
        self.for_each_part(rank, shard, |owner, block| {
            for (local, start) in self.queries.places(owner) {
                let part = QueryPart { block, queries: start..start + local.len(), local };
                let queries = part.queries.clone();
                let problem = self.local_problem(here, Some((queries.start, queries.len())))?;
                let plan = rank.device.plan_attention(&problem)?;
                let inputs = self.query_part(shard, &part)?;
                let Operands { q, k, v, biases, key_mask, q_segments, k_segments, gate } = inputs;
                #[rustfmt::skip]
                let operands = ForwardOperands {
                    q, k, v, biases, key_mask, q_segments, k_segments, gate,
                    out: whole.out.view_mut().slice(QUERIES, queries.clone(), 1)?,
                    lse: Some(whole.lse.view_mut().slice(3, queries.clone(), 1)?),
                    lse_low: Some(whole.lse_low.view_mut().slice(3, queries.clone(), 1)?),
                };
                rank.device.attention_forward(rank.stream, ForwardArgs::new(&plan, operands)?)?;
            }
            Ok(())
        })?;
        Ok(whole)
    }

    /// Gradients of this rank's operands; of a bias that every rank has, the sum over all ranks. Called by all ranks.
    ///
    /// # Errors
    /// As [`AxialAttention::forward`].
    pub fn backward(
        &self,
        rank: &Rank<'_>,
        shard: &Shard<'_>,
        forward: &ShardForward,
        d_out: &TensorView<'_>,
    ) -> Result<ShardBackward> {
        let checked = self.check(rank, shard).and_then(|()| {
            let problem = self.local_problem(rank.comm.rank(), None)?;
            check_outputs(problem.spec(), problem.out_shape(), forward, d_out)
        });
        rank.comm.agree(NAME, checked.map(|()| format!("backward {self:?}")))?;
        let work = || {
            let problem = self.local_problem(rank.comm.rank(), None)?;
            let mut gradients = match self.shared {
                SharedBias::Gathered => {
                    let gathered = self.gathered(rank, shard)?;
                    let mut all = local::backward(rank, &problem, operands(shard, &gathered), forward, d_out.clone())?;
                    drop(gathered);
                    for (bias, gradient) in self.problem.spec().biases.iter().zip(&mut all.dbiases) {
                        if let (Place::Queries, Some(whole)) = (Place::of(bias), &gradient) {
                            *gradient = Some(ReduceScatter(self.query_split()).apply(rank, &whole.view())?);
                        }
                    }
                    all
                }
                SharedBias::Travelling => self.backward_travelling(rank, shard, forward, d_out)?,
            };
            for (bias, gradient) in self.problem.spec().biases.iter().zip(&mut gradients.dbiases) {
                if let (Place::Everywhere, Some(own)) = (Place::of(bias), &gradient) {
                    *gradient = Some(Reduce.apply(rank, &own.view())?);
                }
            }
            Ok(gradients)
        };
        rank.comm.checked(NAME, work())
    }

    fn backward_travelling(
        &self,
        rank: &Rank<'_>,
        shard: &Shard<'_>,
        forward: &ShardForward,
        d_out: &TensorView<'_>,
    ) -> Result<ShardBackward> {
        let problem = self.local_problem(rank.comm.rank(), None)?;
        let spec = problem.spec();
        let mut sums = self.zero_sums(rank, &problem)?;
        self.for_each_part(rank, shard, |owner, block| {
            let mut travelling = self.travelling_zeros(rank, owner)?;
            for (local, start) in self.queries.places(owner) {
                let part = QueryPart { block, queries: start..start + local.len(), local };
                self.add_queries(rank, shard, &part, (forward, d_out), &mut sums, &mut travelling)?;
            }
            pass_on(rank, GRADIENTS, owner, travelling)
        })?;
        let mut home = received(rank, GRADIENTS)?.into_iter();
        let mut dbiases = Vec::new();
        let wanted = self.places().zip(spec.gradients.biases);
        for ((bias, (place, wanted)), gradient) in spec.biases.iter().zip(wanted).zip(sums.resident) {
            let sum = if wanted && place == Place::Queries { home.next() } else { gradient };
            dbiases.push(sum.map(|sum| rank.rounded(sum, bias.dtype)).transpose()?);
        }
        let rounded = |sum: Option<Tensor>| sum.map(|sum| rank.rounded(sum, spec.dtype)).transpose();
        let (dk, dv) = (rounded(sums.dk)?, rounded(sums.dv)?);
        Ok(ShardBackward { dq: sums.dq, dk, dv, d_gate: sums.d_gate, dbiases })
    }

    fn zero_sums(&self, rank: &Rank<'_>, problem: &AttentionProblem) -> Result<Sums> {
        let spec = problem.spec();
        let zeros = |wanted: bool, dtype, shape: &[usize]| wanted.then(|| rank.zeros(dtype, shape)).transpose();
        let mut resident = Vec::new();
        for ((bias, wanted), place) in spec.biases.iter().zip(spec.gradients.biases).zip(self.places()) {
            // A query axis is written part by part; without one, parts add up.
            let dtype = if bias.shape[BIAS_QUERIES] == 1 { DType::F32 } else { bias.dtype };
            resident.push(zeros(wanted && place != Place::Queries, dtype, &bias.shape)?);
        }
        Ok(Sums {
            dq: zeros(spec.gradients.q, spec.dtype, &problem.q_shape())?,
            d_gate: zeros(spec.gradients.gate, spec.dtype, &problem.out_shape())?,
            dk: zeros(spec.gradients.k, DType::F32, &problem.k_shape())?,
            dv: zeros(spec.gradients.v, DType::F32, &problem.v_shape())?,
            resident,
        })
    }

    fn add_queries(
        &self,
        rank: &Rank<'_>,
        shard: &Shard<'_>,
        part: &QueryPart<'_>,
        (forward, d_out): (&ShardForward, &TensorView<'_>),
        sums: &mut Sums,
        travelling: &mut [Tensor],
    ) -> Result<()> {
        let QueryPart { queries, local, .. } = part;
        let problem = self.local_problem(rank.comm.rank(), Some((queries.start, queries.len())))?;
        let (plan, spec) = (rank.device.plan_attention(&problem)?, problem.spec());
        let wanted = spec.gradients;
        let zeros = |wanted: bool, dtype, shape: &[usize]| wanted.then(|| rank.zeros(dtype, shape)).transpose();
        let mut dk = zeros(wanted.k, spec.dtype, &problem.k_shape())?;
        let mut dv = zeros(wanted.v, spec.dtype, &problem.v_shape())?;
        let mut added = Vec::new();
        for ((bias, whole), global) in spec.biases.iter().zip(&sums.resident).zip(&self.problem.spec().biases) {
            let is_sum = global.shape[BIAS_QUERIES] == 1 && whole.is_some();
            added.push(zeros(is_sum, DType::F32, &bias.shape)?);
        }
        let mut shared = travelling.iter_mut();
        let mut dbiases: Vec<Option<TensorViewMut<'_>>> = Vec::new();
        let places = self.places().zip(wanted.biases).zip(sums.resident.iter_mut().zip(&mut added));
        for ((place, wanted), (whole, added)) in places {
            dbiases.push(match (whole, added) {
                _ if !wanted => None,
                (_, Some(added)) => Some(added.view_mut()),
                (Some(whole), None) => Some(along_mut(whole.view_mut(), BIAS_QUERIES, queries.clone())?),
                (None, None) if place == Place::Queries => {
                    let block = shared.next().map(|block| block.view_mut().slice(BIAS_QUERIES, local.clone(), 1));
                    block.transpose()?
                }
                (None, None) => None,
            });
        }
        let inputs = self.query_part(shard, part)?;
        let Operands { q, k, v, biases, key_mask, q_segments, k_segments, gate } = inputs;
        let [dq, d_gate] = [&mut sums.dq, &mut sums.d_gate].map(|whole| whole.as_mut().map(Tensor::view_mut));
        #[rustfmt::skip]
        let operands = BackwardOperands {
            q, k, v, biases, key_mask, q_segments, k_segments, gate,
            out: forward.out.view().slice(QUERIES, queries.clone(), 1)?,
            lse: forward.lse.view().slice(3, queries.clone(), 1)?,
            lse_low: forward.lse_low.view().slice(3, queries.clone(), 1)?,
            d_out: d_out.slice(QUERIES, queries.clone(), 1)?,
            dq: dq.map(|whole| whole.slice(QUERIES, queries.clone(), 1)).transpose()?,
            dk: dk.as_mut().map(Tensor::view_mut),
            dv: dv.as_mut().map(Tensor::view_mut),
            dbiases,
            d_gate: d_gate.map(|whole| whole.slice(QUERIES, queries.clone(), 1)).transpose()?,
        };
        rank.device.attention_backward(rank.stream, BackwardArgs::new(&plan, operands)?)?;
        let parts =
            [(dk, &mut sums.dk), (dv, &mut sums.dv)].into_iter().chain(added.into_iter().zip(&mut sums.resident));
        for (part, sum) in parts {
            if let (Some(part), Some(sum)) = (part, sum) {
                rank.add(part.view(), sum.view_mut())?;
            }
        }
        Ok(())
    }

    /// Zeros in f32 for the gradients of a rank's part of the shared biases.
    fn travelling_zeros(&self, rank: &Rank<'_>, owner: usize) -> Result<Vec<Tensor>> {
        let spec = self.problem.spec();
        let wanted = spec.biases.iter().zip(spec.gradients.biases);
        let shared = wanted.filter(|&(bias, wanted)| wanted && Place::of(bias) == Place::Queries);
        let queries = self.queries.count(owner);
        shared.map(|(bias, _)| rank.zeros(DType::F32, &with_axis(bias.shape, BIAS_QUERIES, queries))).collect()
    }

    /// Calls `work` with each rank's part of the shared biases, its own first, while the next part is on its way.
    fn for_each_part(
        &self,
        rank: &Rank<'_>,
        shard: &Shard<'_>,
        mut work: impl FnMut(usize, &[Arc<Tensor>]) -> Result<()>,
    ) -> Result<()> {
        let shared = self.problem.spec().biases.iter().zip(&shard.biases);
        let shared = shared.filter(|(bias, _)| Place::of(bias) == Place::Queries);
        let own = shared.map(|(_, view)| rank.pack(view)).collect::<Result<_>>()?;
        round(rank, BIASES, own, |owner, parcel| {
            let block = parcel.into_iter().map(|bias| rank.unpack(bias)).collect::<Result<Vec<_>>>()?;
            work(owner, &block)
        })
    }

    /// The problem of a rank's rows, of all queries or of some: their first and how many.
    fn local_problem(&self, rank: usize, queries: Option<(usize, usize)>) -> Result<AttentionProblem> {
        let mut spec = self.problem.spec().clone();
        spec.rows = self.rows.count(rank);
        for bias in &mut spec.biases {
            if bias.shape[ROWS] != 1 {
                bias.shape[ROWS] = spec.rows;
            }
        }
        if let Some((first, count)) = queries {
            spec.seqlen_q = count;
            spec.mask.q_offset = spec.mask.q_offset.saturating_add(i64::try_from(first).unwrap_or(i64::MAX));
            for bias in &mut spec.biases {
                if bias.shape[BIAS_QUERIES] != 1 {
                    bias.shape[BIAS_QUERIES] = count;
                }
            }
        }
        Ok(AttentionProblem::new(spec)?)
    }

    /// Where each bias is: told by the shapes of the whole problem, not by those of one row.
    fn places(&self) -> impl Iterator<Item = Place> + '_ {
        self.problem.spec().biases.iter().map(Place::of)
    }

    fn query_split(&self) -> Split {
        Split { axis: BIAS_QUERIES, partition: self.queries.clone() }
    }

    /// Shared biases, whole; none for the others.
    fn gathered(&self, rank: &Rank<'_>, shard: &Shard<'_>) -> Result<Vec<Option<Tensor>>> {
        let gather = |(bias, view): (&BiasSpec, &TensorView<'_>)| {
            let is_shared = Place::of(bias) == Place::Queries;
            is_shared.then(|| AllGather(self.query_split()).apply(rank, view)).transpose()
        };
        self.problem.spec().biases.iter().zip(&shard.biases).map(gather).collect()
    }

    /// Operands of some queries.
    fn query_part<'s>(&self, shard: &'s Shard<'_>, part: &QueryPart<'s>) -> Result<Operands<'s>> {
        let QueryPart { block, queries, local } = part;
        let mut shared = block.iter();
        let biases = self.problem.spec().biases.iter().zip(&shard.biases).map(|(bias, view)| {
            match (Place::of(bias), bias.shape[BIAS_QUERIES]) {
                (Place::Queries, _) => match shared.next() {
                    Some(block) => Ok(block.view().slice(BIAS_QUERIES, local.clone(), 1)?),
                    None => Err(ProblemError::Missing { tensor: "bias", reason: "it travels between ranks" }.into()),
                },
                (_, 1) => Ok(view.clone()),
                _ => Ok(view.slice(BIAS_QUERIES, queries.clone(), 1)?),
            }
        });
        let cut = |view: &TensorView<'s>| view.slice(QUERIES, queries.clone(), 1);
        Ok(Operands {
            q: cut(&shard.q)?,
            k: shard.k.view(),
            v: shard.v.view(),
            biases: biases.collect::<Result<_>>()?,
            key_mask: shard.key_mask.clone(),
            q_segments: shard.q_segments.as_ref().map(|view| along(view, QUERIES, queries.clone())).transpose()?,
            k_segments: shard.k_segments.clone(),
            gate: shard.gate.as_ref().map(cut).transpose()?,
        })
    }

    fn agree(&self, rank: &Rank<'_>, shard: &Shard<'_>, pass: &str) -> Result<()> {
        rank.comm.agree(NAME, self.check(rank, shard).map(|()| format!("{pass} {self:?}")))
    }

    fn check(&self, rank: &Rank<'_>, shard: &Shard<'_>) -> Result<()> {
        let (here, got, expected) = (rank.comm.rank(), rank.comm.world_size(), self.rows.ranks());
        if got != expected {
            return Err(CommError::WorldSize { what: "partition", expected, got }.into());
        }
        let problem = self.local_problem(here, None)?;
        let spec = problem.spec();
        let biases = spec.biases.iter().zip(self.places()).map(|(bias, place)| match place {
            Place::Queries => with_axis(bias.shape, BIAS_QUERIES, self.queries.count(here)),
            Place::Rows | Place::Everywhere => bias.shape,
        });
        let (q, k) = ([problem.q_shape(), problem.out_shape()], [problem.k_shape(), problem.v_shape()]);
        check_operands(spec, q, k, biases, shard)
    }
}

/// Operands of all queries, with shared biases whole.
fn operands<'s>(shard: &'s Shard<'_>, gathered: &'s [Option<Tensor>]) -> Operands<'s> {
    let biases = shard.biases.iter().zip(gathered);
    let biases = biases.map(|(view, whole)| whole.as_ref().map_or_else(|| view.clone(), Tensor::view)).collect();
    let Shard { q, key_mask, q_segments, k_segments, gate, .. } = shard.clone();
    Operands { q, k: shard.k.view(), v: shard.v.view(), biases, key_mask, q_segments, k_segments, gate }
}
