//! Arguments of the kernels, the same structs as in `include/params.h`: sizes and offsets are asserted on both sides.

use bytemuck::{Pod, Zeroable};
use tilefold_core::{MAX_BIASES, MAX_HEAD_DIM};

/// An address on the device and strides in elements; axes that are broadcast or have one entry have stride 0.
///
/// Which axes it has, the operand's field says; unused strides are 0. An absent operand is all zero.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Pod, Zeroable)]
pub struct Operand {
    /// Address of the element with all indices 0.
    pub data: u64,
    /// Elements from one entry of an axis to the next.
    pub strides: [i64; 5],
}

impl Operand {
    /// An operand from the address of its first element, its shape and its strides in elements, at most five axes.
    ///
    /// Strides of axes with one entry become 0.
    #[must_use]
    pub fn new(data: u64, shape: &[usize], strides: &[i64]) -> Self {
        let mut operand = Self { data, strides: [0; 5] };
        for ((to, &size), &stride) in operand.strides.iter_mut().zip(shape).zip(strides) {
            *to = if size == 1 { 0 } else { stride };
        }
        operand
    }
}

/// What both attention passes read.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Pod, Zeroable)]
pub struct AttentionInputs {
    /// Axes batch, row, query, head, channel.
    pub q: Operand,
    /// Axes batch, row, key, key head, channel.
    pub k: Operand,
    /// Axes batch, row, key, key head, channel.
    pub v: Operand,
    /// Axes batch, row, head, query, key.
    pub biases: [Operand; MAX_BIASES],
    /// Bytes, 0 excludes; axes batch, row, key.
    pub key_mask: Operand,
    /// i32; axes batch, row, query.
    pub q_segments: Operand,
    /// i32; axes batch, row, key.
    pub k_segments: Operand,
    /// i64; axes batch, row.
    pub kv_lengths: Operand,
    /// Axes batch, row, query, head, channel.
    pub gate: Operand,
    /// Address of one f32 per head.
    pub alibi_slopes: u64,
    /// Size of the batch axis.
    pub batch: i64,
    /// Size of the row axis.
    pub rows: i64,
    /// Queries.
    pub seqlen_q: i64,
    /// Keys.
    pub seqlen_k: i64,
    /// Query heads.
    pub heads: i64,
    /// Query heads that share a key head.
    pub group: i64,
    /// Position of key 0 minus position of query 0.
    pub first_distance: i64,
    /// Least visible distance, key position minus query position.
    pub lowest_distance: i64,
    /// Greatest visible distance.
    pub highest_distance: i64,
    /// Softmax scale.
    pub scale: f32,
    /// Softmax scale times log2(e).
    pub scale_base2: f32,
}

/// Argument of `attention/forward.cu`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Pod, Zeroable)]
pub struct ForwardParams {
    /// What it reads.
    pub inputs: AttentionInputs,
    /// Axes batch, row, query, head, channel.
    pub out: Operand,
    /// f32; axes batch, row, head, query.
    pub lse: Operand,
    /// f32; axes batch, row, head, query.
    pub lse_low: Operand,
    /// Blocks launched before this launch.
    pub first_block: i64,
}

/// Argument of the kernels of the backward pass.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Pod, Zeroable)]
pub struct BackwardParams {
    /// What forward read.
    pub inputs: AttentionInputs,
    /// What forward wrote.
    pub out: Operand,
    /// What forward wrote.
    pub lse: Operand,
    /// What forward wrote.
    pub lse_low: Operand,
    /// Gradient of out, with its axes.
    pub d_out: Operand,
    /// Gradient of the output before the gate: `d_out`, or in the workspace.
    pub d_o: Operand,
    /// Gradient of q, with its axes.
    pub dq: Operand,
    /// Gradient of k, with its axes.
    pub dk: Operand,
    /// Gradient of v, with its axes.
    pub dv: Operand,
    /// Gradients of the biases, in their own shapes.
    pub dbiases: [Operand; MAX_BIASES],
    /// Gradient of the gate, with its axes.
    pub d_gate: Operand,
    /// Address of f32 `[3, batch, rows, heads, padded_queries]`: lse, its low part in base 2, -delta.
    pub statistics: u64,
    /// Address of f32 `[batch, rows, kv_heads, head_dim_v]`: what empty rows give every dV.
    pub uniform_sums: u64,
    /// Address of f32 `[query_chunks, batch, rows, heads, seqlen_k]`: sums of dS over queries.
    pub key_sums: u64,
    /// Address of f32 `[batch, rows, heads, seqlen_q]`: sums of dS over keys.
    pub query_sums: u64,
    /// Address of f32 `[key parts, batch, rows, heads, seqlen_q, head_dim]`.
    pub dq_partials: u64,
    /// Address of f32 `[query_chunks, batch, rows, kv_heads, seqlen_k, head_dim]`.
    pub dk_partials: u64,
    /// Address of f32 `[query_chunks, batch, rows, kv_heads, seqlen_k, head_dim_v]`.
    pub dv_partials: u64,
    /// Address of f32 `[term_chunks, batch, rows, heads, seqlen_q, seqlen_k]`, where axes that are summed have one entry.
    pub dbias_partials: u64,
    /// `seqlen_q` rounded up to 64.
    pub padded_queries: i64,
    /// `heads * padded_queries`.
    pub row_statistics: i64,
    /// `heads * seqlen_q`.
    pub row_queries: i64,
    /// Tiles of a part of the walk over queries.
    pub query_chunk: i64,
    /// Entries of a part of the walk over what shares a bias.
    pub term_chunk: i64,
    /// Blocks launched before this launch.
    pub first_block: i64,
}

/// Argument of `attention/sums.cu`: `to[i] = factor · Σ from[i, r]` over r.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Pod, Zeroable)]
pub struct SumParams {
    /// The result.
    pub to: Operand,
    /// Address of f32.
    pub from: u64,
    /// Sizes of the result.
    pub sizes: [i64; 5],
    /// Strides of `from` along the axes of the result.
    pub from_strides: [i64; 5],
    /// Sizes of the axes that are summed, the last one fastest.
    pub summed: [i64; 4],
    /// Strides of `from` along them.
    pub summed_strides: [i64; 4],
    /// Factor of the sums.
    pub factor: f32,
    /// Zero.
    pub padding: f32,
    /// Blocks launched before this launch.
    pub first_block: i64,
}

/// Argument of `merge.cu`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Pod, Zeroable)]
pub struct MergeParams {
    /// The part to add.
    pub out: Operand,
    /// Its log-sum-exp.
    pub lse: Operand,
    /// The low part of its log-sum-exp.
    pub lse_low: Operand,
    /// The accumulator.
    pub acc_out: Operand,
    /// Its log-sum-exp.
    pub acc_lse: Operand,
    /// The low part of its log-sum-exp.
    pub acc_lse_low: Operand,
    /// Size of the batch axis.
    pub batch: i64,
    /// Size of the row axis.
    pub rows: i64,
    /// Queries.
    pub seqlen_q: i64,
    /// Query heads.
    pub heads: i64,
    /// Channels of out.
    pub head_dim_v: i64,
    /// Blocks launched before this launch.
    pub first_block: i64,
}

/// Pairs of channels that `rope.cu` can turn.
pub const MAX_ROPE_PAIRS: usize = 128;

/// The angle of a pair of channels, where 2^64 is one turn.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Pod, Zeroable)]
pub struct Angle {
    /// At the first position.
    pub first: u64,
    /// From one position to the next.
    pub step: u64,
}

/// Argument of `rope.cu`.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Pod, Zeroable)]
pub struct RopeParams {
    /// What is turned; axes batch, row, position, head, channel.
    pub source: Operand,
    /// The result, with its axes.
    pub destination: Operand,
    /// Size of the batch axis.
    pub batch: i64,
    /// Size of the row axis.
    pub rows: i64,
    /// Positions.
    pub seqlen: i64,
    /// Heads.
    pub heads: i64,
    /// Channels.
    pub head_dim: i64,
    /// Pairs of channels; those beyond are copied.
    pub pairs: i64,
    /// Angles of the pairs.
    pub angles: [Angle; MAX_ROPE_PAIRS],
    /// Blocks launched before this launch.
    pub first_block: i64,
}

impl Default for RopeParams {
    fn default() -> Self {
        Self::zeroed()
    }
}

/// Axes a relayout or a fill may have, once neighbouring axes are joined.
pub const MAX_LAYOUT_AXES: usize = 8;

/// Argument of `relayout.cu` and `accumulate.cu`; axes from the outermost to the innermost, 1 for sizes of those that are not there.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Pod, Zeroable)]
pub struct RelayoutParams {
    /// Address of the source's first element.
    pub source: u64,
    /// Address of the destination's first element.
    pub destination: u64,
    /// Sizes of the axes.
    pub sizes: [i64; MAX_LAYOUT_AXES],
    /// Strides of the source in elements.
    pub source_strides: [i64; MAX_LAYOUT_AXES],
    /// Strides of the destination in elements.
    pub destination_strides: [i64; MAX_LAYOUT_AXES],
    /// Elements.
    pub count: i64,
    /// Blocks launched before this launch.
    pub first_block: i64,
}

/// Argument of `fill.cu`; axes as in [`RelayoutParams`].
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Pod, Zeroable)]
pub struct FillParams {
    /// Address of the first element.
    pub data: u64,
    /// Bits of the value.
    pub value: u64,
    /// Sizes of the axes.
    pub sizes: [i64; MAX_LAYOUT_AXES],
    /// Strides in elements.
    pub strides: [i64; MAX_LAYOUT_AXES],
    /// Elements.
    pub count: i64,
    /// Blocks launched before this launch.
    pub first_block: i64,
}

/// A struct that a kernel takes as its argument.
pub trait Params: Pod + Default {
    /// Where a launch that is cut into several says how many blocks came before.
    fn set_first_block(&mut self, block: i64);
}

macro_rules! params {
    ($($name:ident),*) => {$(
        impl Params for $name {
            fn set_first_block(&mut self, block: i64) {
                self.first_block = block;
            }
        }
    )*};
}
params!(ForwardParams, BackwardParams, SumParams, MergeParams, RelayoutParams, FillParams, RopeParams);

const OPERAND: usize = 48;
const INPUTS: usize = size_of::<AttentionInputs>();
const _: () = {
    assert!(size_of::<Operand>() == OPERAND && MAX_BIASES == 4);
    assert!(INPUTS == 12 * OPERAND + 88);
    assert!(size_of::<ForwardParams>() == INPUTS + 3 * OPERAND + 8);
    assert!(size_of::<BackwardParams>() == INPUTS + 13 * OPERAND + 112);
    assert!(size_of::<SumParams>() == OPERAND + 8 + 10 * 8 + 8 * 8 + 16);
    assert!(size_of::<MergeParams>() == 6 * OPERAND + 48);
    assert!(size_of::<RopeParams>() == 2 * OPERAND + 48 + 16 * MAX_ROPE_PAIRS + 8);
    assert!(std::mem::offset_of!(RopeParams, angles) == 2 * OPERAND + 48);
    assert!(MAX_HEAD_DIM == 2 * MAX_ROPE_PAIRS);
    assert!(size_of::<RelayoutParams>() == 16 + 3 * 64 + 16);
    assert!(size_of::<FillParams>() == 16 + 2 * 64 + 16);
    assert!(std::mem::offset_of!(AttentionInputs, alibi_slopes) == 12 * OPERAND);
    assert!(std::mem::offset_of!(AttentionInputs, scale) == 12 * OPERAND + 80);
    assert!(std::mem::offset_of!(BackwardParams, statistics) == INPUTS + 13 * OPERAND);
};
