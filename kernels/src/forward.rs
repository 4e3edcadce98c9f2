//! The plan of a forward launch: constants, tile sizes, shared memory and grid of `attention/forward.cu`.

use tilefold_core::{AttentionProblem, DType, Products};

use crate::constants::{AttentionConstants, BiasKind, constant};
use crate::kernel::{Kernel, KernelError, Launch};
use crate::operands::AttentionOperands;
use crate::params::{ForwardParams, Operand};
use crate::tile::{lds_bytes, tile_bytes};
use crate::vendor::Vendor;

/// What the forward pass writes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ForwardOutputs {
    /// The output.
    pub out: Operand,
    /// Log-sum-exp, where it is asked for.
    pub lse: Option<Operand>,
    /// Its low part, where it is asked for.
    pub lse_low: Option<Operand>,
}

/// Sizes of a block's work.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct ForwardTile {
    /// What it is for.
    pub vendor: Vendor,
    /// Tiles of 16 queries of a warp, of 32 on AMD.
    pub query_tiles: usize,
    /// Warps of a block.
    pub warps: usize,
    /// Keys of a tile.
    pub tile_k: usize,
    /// Buffers of keys and values.
    pub stages: usize,
    /// Whether queries stay in registers.
    pub queries_in_registers: bool,
    /// Waves (warps) that registers leave room for on a SIMD (sub-partition). Left to itself, NVIDIA's compiler spills for
    /// more of them.
    pub simd_waves: usize,
}

impl ForwardTile {
    /// The tile for a problem's sizes. Wide heads take fewer queries and keys, so that S, O and q fit the registers, and k
    /// and v the shared memory; short sequences take fewer warps.
    #[must_use]
    pub fn new(vendor: Vendor, dtype: DType, head_dim: usize, head_dim_v: usize, seqlen_q: usize) -> Self {
        match vendor {
            Vendor::Nvidia => Self::nvidia(dtype, head_dim, head_dim_v, seqlen_q),
            Vendor::Amd => Self::amd(dtype, head_dim, head_dim_v, seqlen_q),
        }
    }

    fn nvidia(dtype: DType, head_dim: usize, head_dim_v: usize, seqlen_q: usize) -> Self {
        let widest = head_dim.max(head_dim_v);
        let (query_tiles, tile_k, stages, most_warps) = match (dtype, widest) {
            (DType::F32, 0..=32) => (1, 64, 2, 4),
            (DType::F32, 33..=128) => (1, 32, 2, 4),
            (DType::F32, _) => (1, 16, 1, 4),
            (_, 0..=32) => (2, 64, 2, 4),
            (_, 33..=128) => (1, 64, 2, 4),
            (..) => (1, 32, 2, 4),
        };
        let query_tiles = if seqlen_q <= 16 { 1 } else { query_tiles };
        let warps = seqlen_q.div_ceil(16 * query_tiles).next_power_of_two().min(most_warps);
        let queries_in_registers = head_dim * dtype.size_bytes() <= 256;
        Self { vendor: Vendor::Nvidia, query_tiles, warps, tile_k, stages, queries_in_registers, simd_waves: 2 }
    }

    fn amd(dtype: DType, head_dim: usize, head_dim_v: usize, seqlen_q: usize) -> Self {
        let (tile_k, stages, simd_waves) = match (dtype, head_dim.max(head_dim_v)) {
            (DType::F32, 0..=64) => (32, 1, 2),
            (DType::F32, _) => (32, 1, 1),
            (_, 0..=32) => (64, 2, 2),
            (_, 33..=64) => (64, 1, 1),
            (..) => (32, 1, 1),
        };
        let warps = seqlen_q.div_ceil(32).next_power_of_two().min(4);
        let vendor = Vendor::Amd;
        let queries_in_registers = head_dim * dtype.size_bytes() <= 512;
        Self { vendor, query_tiles: 1, warps, tile_k, stages, queries_in_registers, simd_waves }
    }

    /// Queries of a block.
    #[must_use]
    pub fn tile_q(&self) -> usize {
        self.vendor.product_rows() * self.query_tiles * self.warps
    }

    /// Threads of a block.
    #[must_use]
    pub fn threads(&self) -> usize {
        self.vendor.warp_threads() * self.warps
    }
}

/// Everything a forward kernel is specialised for.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct ForwardKernel {
    /// What it shares with the backward kernels.
    pub attention: AttentionConstants,
    /// Sizes of a block's work.
    pub tile: ForwardTile,
    /// Whether tiles where nothing is hidden may start the product with the biases.
    pub preload: bool,
    /// Whether blocks that differ in their rows alone run together, so that they share a bias in cache.
    pub rows_first: bool,
    /// Whether rows of q, k and v move in pieces of 16 bytes.
    pub pieces: [bool; 3],
    /// Whether pairs of channels of out are neighbours, and aligned.
    pub out_pairs: bool,
    /// Whether lse and lse_low are written.
    pub lse: [bool; 2],
}

impl ForwardKernel {
    /// What a problem and the layout of its operands ask for.
    #[must_use]
    pub fn new(
        vendor: Vendor,
        problem: &AttentionProblem,
        operands: &AttentionOperands,
        outputs: &ForwardOutputs,
    ) -> Self {
        let spec = problem.spec();
        let attention = AttentionConstants::new(vendor, problem, operands);
        let (dtype, products) = (spec.dtype, attention.products);
        let in_pieces = |operand: &Operand, channels: usize| channels.is_multiple_of(8) && operand.in_pieces(5, dtype);
        // Scores times a positive scale, over which biases are divided.
        let scale = problem.softmax_scale();
        let divisible = (1e-9..=1e9).contains(&scale);
        let mut kinds = attention.biases.iter().map(|(kind, _)| *kind);
        let preloaded = match (dtype, products) {
            // Dividing by the scale costs roundings that f32 would show, but for those of tf32.
            (DType::F32, Products::Exact) => kinds.all(|kind| kind == BiasKind::Absent),
            _ => kinds.all(|kind| kind != BiasKind::Strided),
        };
        let size = dtype.size_bytes();
        let pair_strides = outputs.out.strides[..4].iter().all(|stride| stride % 2 == 0);
        let out_pairs = spec.head_dim_v.is_multiple_of(2)
            && outputs.out.strides[4] == 1
            && pair_strides
            && outputs.out.data.is_multiple_of(2 * size as u64);
        let shared_by_rows = |(bias, (kind, _)): (&Operand, &(BiasKind, DType))| {
            spec.rows > 1 && bias.strides[1] == 0 && bias.strides[3] != 0 && *kind != BiasKind::Absent
        };
        let mut tile = ForwardTile::new(vendor, dtype, spec.head_dim, spec.head_dim_v, spec.seqlen_q);
        if attention.biases.contains(&(BiasKind::Pieces, DType::F32)) {
            // Read ahead for two tiles of queries, such a bias would take 64 registers.
            tile.query_tiles = 1;
        }
        // Of two paths through a tile each has its own copy of O, for which AMD's registers have no room twice beyond 128 channels.
        let room = vendor == Vendor::Nvidia || spec.head_dim_v <= 128;
        // Rows of a bias are addressed with 32 bits from the block's first, of 4 bytes an element at most.
        let bias_span = tile.tile_q() as u64 * 4;
        let narrow = |bias: &Operand| bias.strides[3].unsigned_abs() < (1 << 31) / bias_span;
        Self {
            tile,
            preload: divisible && preloaded && room && !attention.alibi && operands.biases.iter().all(narrow),
            rows_first: operands.biases.iter().zip(&attention.biases).any(shared_by_rows),
            pieces: [
                in_pieces(&operands.q, spec.head_dim),
                in_pieces(&operands.k, spec.head_dim),
                in_pieces(&operands.v, spec.head_dim_v),
            ],
            out_pairs,
            lse: [outputs.lse.is_some(), outputs.lse_low.is_some()],
            attention,
        }
    }

    /// Shared memory of a block.
    #[must_use]
    pub fn shared_bytes(&self) -> usize {
        let (tile, attention) = (&self.tile, &self.attention);
        let (dtype, head_dim, head_dim_v) = (attention.dtype, attention.head_dim, attention.head_dim_v);
        let tiles = match tile.vendor {
            Vendor::Nvidia => {
                let bytes = |rows, channels| tile_bytes(dtype, rows, channels);
                let keys = bytes(tile.tile_k, head_dim) + bytes(tile.tile_k, head_dim_v);
                bytes(tile.tile_q(), head_dim) + tile.stages * keys
            }
            Vendor::Amd => tile.stages * lds_bytes(dtype, tile.tile_k, head_dim, head_dim_v),
        };
        // The mean of v and the sums it is made of.
        let mean = if attention.uniform_rows { 4 * (attention.head_dim_v + 2 * tile.threads()) } else { 0 };
        tiles.max(mean)
    }

    /// The kernel.
    ///
    /// # Errors
    /// [`KernelError::MissingSource`], which the crate's tests exclude.
    pub fn kernel(&self) -> Result<Kernel, KernelError> {
        let tile = &self.tile;
        let mut constants = self.attention.constants();
        constants.extend([
            constant("QUERY_TILES", tile.query_tiles),
            constant("WARPS", tile.warps),
            constant("TILE_K", tile.tile_k),
            constant("STAGES", tile.stages),
            constant("QUERIES_IN_REGISTERS", u8::from(tile.queries_in_registers)),
            constant("SIMD_WAVES", tile.simd_waves),
            constant("ROWS_FIRST", u8::from(self.rows_first)),
            constant("PRELOAD", u8::from(self.preload)),
            constant("Q_PIECES", u8::from(self.pieces[0])),
            constant("K_PIECES", u8::from(self.pieces[1])),
            constant("V_PIECES", u8::from(self.pieces[2])),
            constant("OUT_PAIRS", u8::from(self.out_pairs)),
            constant("LSE", u8::from(self.lse[0])),
            constant("LSE_LOW", u8::from(self.lse[1])),
        ]);
        let limit = |what, got: usize| KernelError::Limit { what, limit: u64::from(u32::MAX), got: got as u64 };
        let threads = u32::try_from(tile.threads()).map_err(|_| limit("threads", tile.threads()))?;
        let shared = u32::try_from(self.shared_bytes()).map_err(|_| limit("shared bytes", self.shared_bytes()))?;
        let name = format!("forward {} tile {}x{}", self.attention.name(), tile.tile_q(), tile.tile_k);
        let kernel = Kernel::new(name, "attention/forward.cu", "attention_forward", &constants, threads)?;
        Ok(kernel.with_dynamic_shared_bytes(shared))
    }
}

/// The launch that computes a forward pass.
///
/// # Errors
/// [`KernelError::Limit`] for sizes and grids beyond 63 bits.
pub fn forward(
    vendor: Vendor,
    problem: &AttentionProblem,
    operands: &AttentionOperands,
    outputs: &ForwardOutputs,
) -> Result<Launch<ForwardParams>, KernelError> {
    let spec = problem.spec();
    let plan = ForwardKernel::new(vendor, problem, operands, outputs);
    let factors = [spec.batch, spec.rows, spec.heads, spec.seqlen_q.div_ceil(plan.tile.tile_q())];
    let blocks = factors.iter().try_fold(1_u64, |blocks, &factor| blocks.checked_mul(factor as u64));
    let limit = i64::MAX.unsigned_abs();
    let blocks = blocks.filter(|&blocks| blocks <= limit);
    let params = ForwardParams {
        inputs: operands.inputs(problem)?,
        out: outputs.out,
        lse: outputs.lse.unwrap_or_default(),
        lse_low: outputs.lse_low.unwrap_or_default(),
        first_block: 0,
    };
    let blocks = blocks.ok_or(KernelError::Limit { what: "blocks", limit, got: u64::MAX })?;
    Ok(Launch { kernel: plan.kernel()?, blocks, params })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_head_dimension_fits_shared_memory() {
        for vendor in [Vendor::Nvidia, Vendor::Amd] {
            for dtype in [DType::F32, DType::F16, DType::BF16] {
                for (head_dim, head_dim_v) in (1..=256).flat_map(|d| [(d, d), (d, 256), (256, d)]) {
                    let bytes = uniform_kernel(vendor, dtype, head_dim, head_dim_v).shared_bytes();
                    assert!(bytes <= vendor.max_shared_bytes(), "{vendor:?} {dtype} {head_dim} {head_dim_v}: {bytes}");
                }
            }
        }
    }

    /// A kernel without biases and masks that takes the most shared memory.
    fn uniform_kernel(vendor: Vendor, dtype: DType, head_dim: usize, head_dim_v: usize) -> ForwardKernel {
        let attention = AttentionConstants {
            dtype,
            products: Products::Exact,
            head_dim,
            head_dim_v,
            biases: [(BiasKind::Absent, DType::F32); 4],
            key_mask: false,
            kv_lengths: false,
            segments: false,
            positions: false,
            alibi: false,
            gate: false,
            uniform_rows: true,
        };
        ForwardKernel {
            attention,
            tile: ForwardTile::new(vendor, dtype, head_dim, head_dim_v, 4096),
            preload: true,
            rows_first: false,
            pieces: [true; 3],
            out_pairs: true,
            lse: [true; 2],
        }
    }
}
