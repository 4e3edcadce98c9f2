//! Merging (out, lse) pairs over disjoint keys.

use tilefold_core::{DType, MergeOperands, TensorView};

use crate::constants::{constant, element};
use crate::kernel::{Kernel, KernelError, Launch};
use crate::params::{MergeParams, Operand};

const BLOCK_THREADS: u32 = 128;
/// Lanes that may share a row; 32 are a warp.
const CHANNEL_LANES: [u32; 3] = [1, 8, 32];

/// The launch that adds a part into its accumulator; a [`tilefold_core::MergeArgs`] has checked the operands. Their
/// origins are addresses on the device.
///
/// # Errors
/// [`KernelError::Limit`] for sizes beyond 63 bits.
pub fn merge(operands: &MergeOperands<'_>) -> Result<Launch<MergeParams>, KernelError> {
    let limit = i64::MAX.unsigned_abs();
    let size = |what, axis: usize| {
        let got = operands.out.shape()[axis] as u64;
        i64::try_from(got).map_err(|_| KernelError::Limit { what, limit, got })
    };
    let acc_out = operands.acc_out.as_view();
    let params = MergeParams {
        out: Operand::of(&operands.out),
        lse: Operand::of(&operands.lse),
        lse_low: Operand::of(&operands.lse_low),
        acc_out: Operand::of(acc_out),
        acc_lse: Operand::of(operands.acc_lse.as_view()),
        acc_lse_low: Operand::of(operands.acc_lse_low.as_view()),
        batch: size("batch", 0)?,
        rows: size("rows", 1)?,
        seqlen_q: size("seqlen_q", 2)?,
        heads: size("heads", 3)?,
        head_dim_v: size("head_dim_v", 4)?,
        first_block: 0,
    };
    let lanes = channel_lanes(&operands.out);
    let rows = (params.batch * params.rows * params.seqlen_q * params.heads).unsigned_abs();
    let blocks = rows.div_ceil(u64::from(BLOCK_THREADS / lanes));
    Ok(Launch { kernel: kernel(operands.out.dtype(), acc_out.dtype(), lanes)?, blocks, params })
}

/// Lanes that share a row: no more than have a channel, but for the first.
fn channel_lanes(out: &TensorView<'_>) -> u32 {
    let channels = out.shape().last().copied().unwrap_or(1);
    let channels = u32::try_from(channels).unwrap_or(u32::MAX);
    CHANNEL_LANES.into_iter().rev().find(|&lanes| lanes <= channels).unwrap_or(CHANNEL_LANES[0])
}

/// All kernels that a merge can choose.
pub(crate) fn kernels() -> impl Iterator<Item = Result<Kernel, KernelError>> {
    let floats = [DType::F32, DType::F16, DType::BF16];
    let pairs = floats.into_iter().flat_map(move |out| floats.map(move |acc| (out, acc)));
    pairs.flat_map(|(out, acc)| CHANNEL_LANES.map(move |lanes| kernel(out, acc, lanes)))
}

fn kernel(out: DType, acc: DType, channel_lanes: u32) -> Result<Kernel, KernelError> {
    let constants = [
        constant("OUT", element(out)),
        constant("ACC", element(acc)),
        constant("CHANNEL_LANES", channel_lanes),
        constant("BLOCK_THREADS", BLOCK_THREADS),
    ];
    let name = format!("merge {out} into {acc} lanes={channel_lanes}");
    Kernel::new(name, "merge.cu", "merge", &constants, BLOCK_THREADS)
}
