//! The backward pass of ring attention: what stays on a rank, and what travels with the keys.

use tilefold_core::{BackwardArgs, BackwardOperands, DType, Tensor, TensorView, TensorViewMut};

use super::local::Operands;
use super::maps::{Map, Reduce};
use super::ring::{KEYS, NAME, Pair, RingAttention, Shard, ShardBackward, ShardForward, SplitAlong, bias_shape};
use super::travelling::{pass_on, received, round};
use crate::error::Result;
use crate::rank::{Rank, along_mut};
use crate::shape::with_axis;

/// What gradients of keys are called on their way.
const GRADIENTS: &str = "ring_attention gradients";

/// Gradients that stay on a rank, while pairs are added.
struct Resident {
    /// f32.
    dq: Option<Tensor>,
    dbiases: Vec<DBias>,
}

/// The gradient of one bias on a rank.
enum DBias {
    /// Not asked for.
    None,
    /// Each pair writes its own rectangle of queries and keys, in the bias's dtype.
    Rectangles(Tensor),
    /// f32: pairs add up.
    Sum(Tensor),
    /// f32, one of those that travel.
    Travelling(usize),
}

/// Sums in f32 that travel with a block of keys: dk, dv, then biases split along keys, as far as they are asked for.
type Travelling = Vec<Tensor>;

impl RingAttention {
    /// Gradients of this rank's operands, as the problem asks for them; `forward` is what [`RingAttention::forward`] gave,
    /// `d_out` the gradient of the loss with respect to this rank's part of the output. Called by all ranks.
    ///
    /// # Errors
    /// As [`RingAttention::forward`].
    pub fn backward(
        &self,
        rank: &Rank<'_>,
        shard: &Shard<'_>,
        forward: &ShardForward,
        d_out: &TensorView<'_>,
    ) -> Result<ShardBackward> {
        self.agree(rank, shard, Some((forward, d_out)))?;
        let work = || {
            let here = rank.comm.rank();
            let mut resident = self.resident(rank, here)?;
            round(rank, KEYS, self.outgoing(rank, shard)?, |owner, parcel| {
                let block = self.incoming(rank, parcel)?;
                let mut sums = self.travelling(rank, owner)?;
                for pair in self.pairs(here, owner, self.problem.spec().gradients)? {
                    let inputs = self.inputs(shard, &block, &pair)?;
                    self.add_pair(rank, &pair, inputs, (forward, d_out), &mut resident, &mut sums)?;
                }
                pass_on(rank, GRADIENTS, owner, sums)
            })?;
            self.finish(rank, resident, received(rank, GRADIENTS)?)
        };
        rank.comm.checked(NAME, work())
    }

    fn resident(&self, rank: &Rank<'_>, here: usize) -> Result<Resident> {
        let spec = self.problem.spec();
        let (queries, wanted) = (self.queries.count(here), spec.gradients);
        let dq = wanted.q.then(|| rank.zeros(DType::F32, &with_axis(self.problem.q_shape(), 2, queries)));
        let mut dbiases = Vec::new();
        let mut travelling = usize::from(wanted.k) + usize::from(wanted.v);
        for (bias, wanted) in spec.biases.iter().zip(wanted.biases) {
            let shape = bias_shape(bias, queries, 1);
            dbiases.push(match SplitAlong::of(bias) {
                _ if !wanted => DBias::None,
                SplitAlong::Queries if bias.shape[4] > 1 => DBias::Rectangles(rank.zeros(bias.dtype, &shape)?),
                SplitAlong::Queries | SplitAlong::Nothing => DBias::Sum(rank.zeros(DType::F32, &shape)?),
                SplitAlong::Keys => {
                    travelling += 1;
                    DBias::Travelling(travelling - 1)
                }
            });
        }
        Ok(Resident { dq: dq.transpose()?, dbiases })
    }

    /// Zeros for the gradients that travel with a rank's keys.
    fn travelling(&self, rank: &Rank<'_>, owner: usize) -> Result<Travelling> {
        let spec = self.problem.spec();
        let keys = self.keys.count(owner);
        let mut shapes: Vec<[usize; 5]> = Vec::new();
        shapes.extend(spec.gradients.k.then(|| with_axis(self.problem.k_shape(), 2, keys)));
        shapes.extend(spec.gradients.v.then(|| with_axis(self.problem.v_shape(), 2, keys)));
        for (bias, wanted) in spec.biases.iter().zip(spec.gradients.biases) {
            if wanted && SplitAlong::of(bias) == SplitAlong::Keys {
                shapes.push(bias_shape(bias, 1, keys));
            }
        }
        shapes.iter().map(|shape| rank.zeros(DType::F32, shape)).collect()
    }

    fn add_pair(
        &self,
        rank: &Rank<'_>,
        pair: &Pair,
        inputs: Operands<'_>,
        (forward, d_out): (&ShardForward, &TensorView<'_>),
        resident: &mut Resident,
        sums: &mut Travelling,
    ) -> Result<()> {
        let (spec, problem) = (pair.problem.spec(), &pair.problem);
        let wanted = spec.gradients;
        let plan = rank.device.plan_attention(problem)?;
        let zeros = |wanted: bool, dtype, shape: &[usize]| wanted.then(|| rank.zeros(dtype, shape)).transpose();
        let mut dq = zeros(wanted.q, spec.dtype, &problem.q_shape())?;
        let mut dk = zeros(wanted.k, spec.dtype, &problem.k_shape())?;
        let mut dv = zeros(wanted.v, spec.dtype, &problem.v_shape())?;
        let mut parts = Vec::new();
        for (bias, dbias) in spec.biases.iter().zip(&resident.dbiases) {
            let is_sum = matches!(dbias, DBias::Sum(_) | DBias::Travelling(_));
            parts.push(zeros(is_sum, DType::F32, &bias.shape)?);
        }
        let mut dbiases: Vec<Option<TensorViewMut<'_>>> = Vec::new();
        for (dbias, part) in resident.dbiases.iter_mut().zip(&mut parts) {
            dbiases.push(match (dbias, part) {
                (DBias::Rectangles(whole), _) => {
                    let queries = along_mut(whole.view_mut(), 3, pair.q.clone())?;
                    Some(along_mut(queries, 4, pair.k_global.clone())?)
                }
                (_, part) => part.as_mut().map(Tensor::view_mut),
            });
        }
        let Operands { q, k, v, biases, key_mask, q_segments, k_segments, gate } = inputs;
        let operands = BackwardOperands {
            q,
            k,
            v,
            biases,
            key_mask,
            q_segments,
            k_segments,
            gate,
            out: forward.out.view().slice(2, pair.q.clone(), 1)?,
            lse: forward.lse.view().slice(3, pair.q.clone(), 1)?,
            lse_low: forward.lse_low.view().slice(3, pair.q.clone(), 1)?,
            d_out: d_out.slice(2, pair.q.clone(), 1)?,
            dq: dq.as_mut().map(Tensor::view_mut),
            dk: dk.as_mut().map(Tensor::view_mut),
            dv: dv.as_mut().map(Tensor::view_mut),
            dbiases,
            d_gate: None,
        };
        rank.device.attention_backward(rank.stream, BackwardArgs::new(&plan, operands)?)?;
        if let (Some(part), Some(dq)) = (&dq, &mut resident.dq) {
            rank.add(part.view(), dq.view_mut().slice(2, pair.q.clone(), 1)?)?;
        }
        let mut travelling = sums.iter_mut();
        for part in [&dk, &dv].into_iter().flatten() {
            if let Some(sum) = travelling.next() {
                rank.add(part.view(), sum.view_mut().slice(2, pair.k.clone(), 1)?)?;
            }
        }
        for (dbias, part) in resident.dbiases.iter_mut().zip(&parts) {
            let Some(part) = part else { continue };
            match dbias {
                DBias::Sum(sum) => rank.add(part.view(), along_mut(sum.view_mut(), 3, pair.q.clone())?)?,
                DBias::Travelling(number) => {
                    let sum = sums[*number].view_mut();
                    rank.add(part.view(), along_mut(sum, 4, pair.k.clone())?)?;
                }
                DBias::None | DBias::Rectangles(_) => {}
            }
        }
        Ok(())
    }

    fn finish(&self, rank: &Rank<'_>, resident: Resident, home: Travelling) -> Result<ShardBackward> {
        let spec = self.problem.spec();
        let mut home: Vec<Option<Tensor>> = home.into_iter().map(Some).collect();
        let mut dbiases = Vec::new();
        for (bias, dbias) in spec.biases.iter().zip(resident.dbiases) {
            dbiases.push(match dbias {
                DBias::None => None,
                DBias::Rectangles(whole) => Some(whole),
                DBias::Sum(sum) if SplitAlong::of(bias) == SplitAlong::Nothing => {
                    Some(rank.rounded(Reduce.apply(rank, &sum.view())?, bias.dtype)?)
                }
                DBias::Sum(sum) => Some(rank.rounded(sum, bias.dtype)?),
                DBias::Travelling(number) => {
                    home[number].take().map(|sum| rank.rounded(sum, bias.dtype)).transpose()?
                }
            });
        }
        let mut home = home.into_iter().flatten();
        let mut next = |wanted: bool| {
            let sum = if wanted { home.next() } else { None };
            sum.map(|sum| rank.rounded(sum, spec.dtype)).transpose()
        };
        let (dk, dv) = (next(spec.gradients.k)?, next(spec.gradients.v)?);
        let dq = resident.dq.map(|dq| rank.rounded(dq, spec.dtype)).transpose()?;
        Ok(ShardBackward { dq, dk, dv, d_gate: None, dbiases })
    }
}
