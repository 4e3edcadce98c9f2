//! A kernel specialised for one problem, and one launch of it.

use crate::params::Params;
use crate::source::{Constant, Source};

/// Blocks one launch may have along x, on every GPU.
pub const MAX_GRID_BLOCKS: u64 = 0x7fff_ffff;

/// A kernel to be compiled: self-contained source and how to launch it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Kernel {
    /// What it is and was specialised for, for logs and tables: `forward bf16 32 bias0=tile`.
    pub name: String,
    /// Name of the `extern "C"` function.
    pub entry: &'static str,
    /// Source without includes, compiled as C++17.
    pub source: String,
    /// SHA-256 of the source in hexadecimal digits: the key of a cache, together with compiler and architecture.
    pub hash: String,
    /// Threads of a block.
    pub block_threads: u32,
    /// Shared memory the launch has to give each block, beside what the kernel declares.
    pub dynamic_shared_bytes: u32,
}

/// Why there is no kernel.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum KernelError {
    /// A source file is not part of this crate; its tests say that it never happens.
    #[error("the kernel source {file} is missing")]
    MissingSource {
        /// Its path.
        file: &'static str,
    },
    /// A number the kernels have no room for.
    #[error("{what} is {got}, and kernels take at most {limit}")]
    Limit {
        /// What has a limit.
        what: &'static str,
        /// The limit.
        limit: u64,
        /// The number.
        got: u64,
    },
}

impl Kernel {
    /// A kernel from its file and constants.
    ///
    /// # Errors
    /// [`KernelError::MissingSource`].
    pub fn new(
        name: String,
        file: &'static str,
        entry: &'static str,
        constants: &[Constant],
        block_threads: u32,
    ) -> Result<Self, KernelError> {
        let Source { text, hash } = Source::new(file, constants).ok_or(KernelError::MissingSource { file })?;
        Ok(Self { name, entry, source: text, hash, block_threads, dynamic_shared_bytes: 0 })
    }

    /// With shared memory that the launch gives.
    #[must_use]
    pub fn with_dynamic_shared_bytes(self, bytes: u32) -> Self {
        Self { dynamic_shared_bytes: bytes, ..self }
    }
}

/// One launch: the kernel, its blocks, its argument.
#[derive(Clone, Debug, PartialEq)]
pub struct Launch<P> {
    /// The kernel.
    pub kernel: Kernel,
    /// Blocks, along x alone. More than [`MAX_GRID_BLOCKS`] become several launches: see [`Launch::parts`].
    pub blocks: u64,
    /// Its argument, one struct by value.
    pub params: P,
}

impl<P: Params> Launch<P> {
    /// The launches that a grid allows: blocks along x and the argument of each, in order.
    pub fn parts(&self) -> impl Iterator<Item = (u32, P)> + '_ {
        let starts = (0..self.blocks.div_ceil(MAX_GRID_BLOCKS)).map(|part| part * MAX_GRID_BLOCKS);
        starts.filter_map(|start| {
            let mut params = self.params;
            params.set_first_block(i64::try_from(start).ok()?);
            Some((u32::try_from((self.blocks - start).min(MAX_GRID_BLOCKS)).ok()?, params))
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::params::FillParams;

    #[test]
    fn a_large_grid_becomes_parts() {
        let kernel = Kernel::new("fill".into(), "fill.cu", "fill", &[], 128).unwrap();
        let blocks = 2 * MAX_GRID_BLOCKS + 5;
        let launch = Launch { kernel, blocks, params: FillParams::default() };
        let parts: Vec<_> = launch.parts().map(|(blocks, params)| (u64::from(blocks), params.first_block)).collect();
        assert_eq!(parts, [(MAX_GRID_BLOCKS, 0), (MAX_GRID_BLOCKS, 0x7fff_ffff), (5, 0xffff_fffe)]);
    }
}
