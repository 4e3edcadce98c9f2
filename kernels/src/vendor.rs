//! Who made the GPU: one source for all, with other tile sizes.

use tilefold_core::Products;

/// Maker of a GPU, as far as kernels and their plans differ.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Vendor {
    /// CUDA from compute capability 8.0: warps of 32 threads, tensor cores with tiles of 16 rows.
    #[default]
    Nvidia,
    /// HIP on gfx90a and gfx942: waves of 64 threads, matrix cores with tiles of 32 rows.
    Amd,
}

impl Vendor {
    /// Threads of a warp (a wave).
    #[must_use]
    pub fn warp_threads(self) -> usize {
        match self {
            Self::Nvidia => 32,
            Self::Amd => 64,
        }
    }

    /// Rows of a matrix product: queries that a warp takes at least.
    #[must_use]
    pub fn product_rows(self) -> usize {
        match self {
            Self::Nvidia => 16,
            Self::Amd => 32,
        }
    }

    /// How its kernels multiply where `allowed` is all that is: AMD's have no tf32, and multiply f32 in f32.
    #[must_use]
    pub fn products(self, allowed: Products) -> Products {
        match self {
            Self::Nvidia => allowed,
            Self::Amd => Products::Exact,
        }
    }

    /// Shared memory a block may have on every supported device: 99 KiB (sm_86, sm_89), of which 1 KiB is kept back; the
    /// LDS of a compute unit.
    #[must_use]
    pub fn max_shared_bytes(self) -> usize {
        match self {
            Self::Nvidia => crate::tile::MAX_SHARED_BYTES,
            Self::Amd => 64 * 1024,
        }
    }
}
