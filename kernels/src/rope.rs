//! Rotary position embedding.

use tilefold_core::{DType, RopeAngle, RopePairs, RopeSpec, TensorView};

use crate::constants::{constant, element};
use crate::kernel::{Kernel, KernelError, Launch};
use crate::params::{Angle, MAX_ROPE_PAIRS, Operand, RopeParams};

const BLOCK_THREADS: u32 = 128;

/// The launch that turns `source` into `destination`, which a [`tilefold_core::RopeArgs`] has checked; `angles` are its
/// own. The origins are addresses on the device.
///
/// # Errors
/// [`KernelError::Limit`] for sizes beyond 63 bits, and more pairs than an argument has room for.
pub fn rope(
    spec: &RopeSpec,
    angles: &[RopeAngle],
    source: &TensorView<'_>,
    destination: &TensorView<'_>,
) -> Result<Launch<RopeParams>, KernelError> {
    let limit = i64::MAX.unsigned_abs();
    let size = |what, axis: usize| {
        let got = source.shape()[axis] as u64;
        i64::try_from(got).map_err(|_| KernelError::Limit { what, limit, got })
    };
    let mut room = [Angle::default(); MAX_ROPE_PAIRS];
    let (limit, got) = (MAX_ROPE_PAIRS as u64, angles.len() as u64);
    let Some(used) = room.get_mut(..angles.len()) else {
        return Err(KernelError::Limit { what: "the number of pairs of channels", limit, got });
    };
    for (to, angle) in used.iter_mut().zip(angles) {
        *to = Angle { first: angle.first, step: angle.step };
    }
    let params = RopeParams {
        source: Operand::of(source),
        destination: Operand::of(destination),
        batch: size("batch", 0)?,
        rows: size("rows", 1)?,
        seqlen: size("seqlen", 2)?,
        heads: size("heads", 3)?,
        head_dim: size("head_dim", 4)?,
        pairs: got.cast_signed(),
        angles: room,
        first_block: 0,
    };
    let slots = params.head_dim - params.pairs;
    let threads = (params.batch * params.rows * params.seqlen * slots).unsigned_abs();
    let blocks = threads.div_ceil(u64::from(BLOCK_THREADS));
    Ok(Launch { kernel: kernel(source.dtype(), spec.pairs)?, blocks, params })
}

/// All kernels that a rotation can choose.
pub(crate) fn kernels() -> impl Iterator<Item = Result<Kernel, KernelError>> {
    let floats = [DType::F32, DType::F16, DType::BF16];
    floats.into_iter().flat_map(|dtype| [RopePairs::Interleaved, RopePairs::Halves].map(|pairs| kernel(dtype, pairs)))
}

fn kernel(dtype: DType, pairs: RopePairs) -> Result<Kernel, KernelError> {
    let interleaved = pairs == RopePairs::Interleaved;
    let constants = [
        constant("ELEMENT", element(dtype)),
        constant("INTERLEAVED", u8::from(interleaved)),
        constant("BLOCK_THREADS", BLOCK_THREADS),
    ];
    let name = format!("rope {dtype} {}", if interleaved { "interleaved" } else { "halves" });
    Kernel::new(name, "rope.cu", "rope", &constants, BLOCK_THREADS)
}
