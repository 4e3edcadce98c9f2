//! What both attention passes read, as addresses and strides, and what the layout allows.

use tilefold_core::{AttentionProblem, DType, ForwardOperands, TensorView};

use crate::forward::ForwardOutputs;
use crate::kernel::KernelError;
use crate::params::{AttentionInputs, Operand};

/// Inputs of an attention on a device. What the problem does not have stays `None`.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct AttentionOperands {
    /// Queries.
    pub q: Operand,
    /// Keys.
    pub k: Operand,
    /// Values.
    pub v: Operand,
    /// One for each bias of the problem.
    pub biases: Vec<Operand>,
    /// Bytes, 0 excludes the key.
    pub key_mask: Option<Operand>,
    /// Segments of queries and keys.
    pub segments: Option<[Operand; 2]>,
    /// The problem's `kv_lengths` on the device, i64 by batch and row: see [`kv_lengths_strides`].
    pub kv_lengths: Option<Operand>,
    /// Address of the problem's slopes on the device, one f32 per head.
    pub alibi_slopes: Option<u64>,
    /// The gate before the sigmoid.
    pub gate: Option<Operand>,
}

/// Lists of a problem, uploaded by a backend.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct DeviceLists {
    /// `kv_lengths` by batch and row: see [`kv_lengths_strides`].
    pub kv_lengths: Option<Operand>,
    /// Address of the slopes.
    pub alibi_slopes: Option<u64>,
}

impl AttentionOperands {
    /// Inputs and outputs of a forward pass, whose origins are addresses on the device.
    #[must_use]
    pub fn of_forward(operands: &ForwardOperands<'_>, lists: DeviceLists) -> (Self, ForwardOutputs) {
        let ForwardOperands { q, k, v, biases, key_mask, q_segments, k_segments, gate, out, lse, lse_low } = operands;
        let of = |view: &Option<TensorView<'_>>| view.as_ref().map(Operand::of);
        let inputs = Self {
            q: Operand::of(q),
            k: Operand::of(k),
            v: Operand::of(v),
            biases: biases.iter().map(Operand::of).collect(),
            key_mask: of(key_mask),
            segments: of(q_segments).zip(of(k_segments)).map(<[Operand; 2]>::from),
            kv_lengths: lists.kv_lengths,
            alibi_slopes: lists.alibi_slopes,
            gate: of(gate),
        };
        let outputs = ForwardOutputs {
            out: Operand::of(out.as_view()),
            lse: lse.as_ref().map(|lse| Operand::of(lse.as_view())),
            lse_low: lse_low.as_ref().map(|lse_low| Operand::of(lse_low.as_view())),
        };
        (inputs, outputs)
    }
}

impl Operand {
    /// The operand a view describes; its origin is an address on the view's device.
    #[must_use]
    pub fn of(view: &TensorView<'_>) -> Self {
        Self::new(view.origin().addr() as u64, view.shape(), view.layout().strides())
    }

    /// Whether rows of the last axis can be moved in pieces of 16 bytes: they start at multiples of 16 bytes and their
    /// elements are neighbours.
    #[must_use]
    pub fn in_pieces(&self, axes: usize, dtype: DType) -> bool {
        let size = dtype.size_bytes() as i64;
        let Some((&last, outer)) = self.strides[..axes].split_last() else { return false };
        last == 1 && self.data.is_multiple_of(16) && outer.iter().all(|stride| stride.wrapping_mul(size) % 16 == 0)
    }
}

/// Strides by batch and row of the problem's list of key lengths, uploaded as it is.
#[must_use]
pub fn kv_lengths_strides(problem: &AttentionProblem) -> [i64; 2] {
    let spec = problem.spec();
    let entries = spec.kv_lengths.as_ref().map_or(0, Vec::len);
    if entries <= 1 {
        [0, 0]
    } else if entries == spec.batch {
        [1, 0]
    } else {
        [i64::try_from(spec.rows).unwrap_or(i64::MAX), 1]
    }
}

impl AttentionOperands {
    /// The argument's part that both passes share.
    ///
    /// # Errors
    /// [`KernelError::Limit`] for sizes beyond 63 bits.
    pub fn inputs(&self, problem: &AttentionProblem) -> Result<AttentionInputs, KernelError> {
        let spec = problem.spec();
        let size = |what, size: usize| {
            let limit = i64::MAX.unsigned_abs();
            i64::try_from(size).map_err(|_| KernelError::Limit { what, limit, got: size as u64 })
        };
        let (lowest_distance, highest_distance) = spec.mask.visible_distances();
        let [q_segments, k_segments] = self.segments.unwrap_or_default();
        #[allow(clippy::cast_possible_truncation, reason = "kernels compute in f32; the problem checked the range")]
        let in_f32 = |value: f64| value as f32;
        let mut biases = [Operand::default(); 4];
        biases.iter_mut().zip(&self.biases).for_each(|(to, &from)| *to = from);
        Ok(AttentionInputs {
            q: self.q,
            k: self.k,
            v: self.v,
            biases,
            key_mask: self.key_mask.unwrap_or_default(),
            q_segments,
            k_segments,
            kv_lengths: self.kv_lengths.unwrap_or_default(),
            gate: self.gate.unwrap_or_default(),
            alibi_slopes: self.alibi_slopes.unwrap_or_default(),
            batch: size("batch", spec.batch)?,
            rows: size("rows", spec.rows)?,
            seqlen_q: size("seqlen_q", spec.seqlen_q)?,
            seqlen_k: size("seqlen_k", spec.seqlen_k)?,
            heads: size("heads", spec.heads)?,
            group: size("heads", problem.group())?,
            first_distance: spec.mask.k_offset.saturating_sub(spec.mask.q_offset),
            lowest_distance,
            highest_distance,
            scale: in_f32(problem.softmax_scale()),
            scale_base2: in_f32(problem.softmax_scale() * std::f64::consts::LOG2_E),
        })
    }
}
