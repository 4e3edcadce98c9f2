//! Scratch memory of work items: sized before launch, kept between launches.

use std::sync::{Mutex, PoisonError};

use tilefold_core::DeviceResult;

use super::product::Matrix;
use crate::memory::Block;

/// f32 in one cache line: every piece starts on one.
const LINE: usize = 16;

/// Cuts one block of memory into pieces; without memory it only counts.
#[derive(Debug)]
pub(crate) struct Carver {
    base: *mut f32,
    used: usize,
}

impl Carver {
    /// Counts what would be taken.
    pub(crate) fn counting() -> Self {
        Self { base: std::ptr::null_mut(), used: 0 }
    }

    /// Cuts up a block, whose size a counting run has found.
    pub(crate) fn over(block: &mut Block) -> Self {
        Self { base: block.address().cast(), used: 0 }
    }

    /// The next `count` elements.
    pub(crate) fn floats(&mut self, count: usize) -> *mut f32 {
        let piece = self.base.wrapping_add(self.used);
        self.used += count.next_multiple_of(LINE);
        piece
    }

    /// The next `rows` rows of `stride` elements.
    pub(crate) fn matrix(&mut self, rows: usize, stride: usize) -> Matrix {
        Matrix { data: self.floats(rows * stride), stride }
    }

    /// Bytes taken so far.
    pub(crate) fn bytes(&self) -> usize {
        self.used * size_of::<f32>()
    }
}

/// Blocks kept from earlier launches, so that small problems do not pay for fresh pages.
#[derive(Debug, Default)]
pub(crate) struct BlockCache(Mutex<Vec<Block>>);

/// Larger blocks go back to the system.
const KEPT_BYTES: usize = 32 << 20;

impl BlockCache {
    /// As many blocks as there can be workers, each at least `bytes` large.
    ///
    /// # Errors
    /// [`tilefold_core::DeviceError::OutOfMemory`].
    pub(crate) fn lease(&self, workers: usize, bytes: usize) -> DeviceResult<Lease<'_>> {
        let mut blocks = std::mem::take(&mut *self.0.lock().unwrap_or_else(PoisonError::into_inner));
        blocks.retain(|block| block.bytes() >= bytes);
        blocks.truncate(workers);
        while blocks.len() < workers {
            blocks.push(Block::zeroed(bytes)?);
        }
        Ok(Lease { cache: self, blocks: Mutex::new(blocks) })
    }
}

/// Blocks of one launch.
#[derive(Debug)]
pub(crate) struct Lease<'c> {
    cache: &'c BlockCache,
    blocks: Mutex<Vec<Block>>,
}

impl Lease<'_> {
    /// Runs `work` on a block that nobody else uses meanwhile.
    ///
    /// # Errors
    /// [`tilefold_core::DeviceError::OutOfMemory`] when more run at once than were leased and memory is gone.
    pub(crate) fn with<T>(&self, bytes: usize, work: impl FnOnce(&mut Block) -> T) -> DeviceResult<T> {
        let block = self.blocks.lock().unwrap_or_else(PoisonError::into_inner).pop();
        let mut block = block.map_or_else(|| Block::zeroed(bytes), Ok)?;
        let result = work(&mut block);
        self.blocks.lock().unwrap_or_else(PoisonError::into_inner).push(block);
        Ok(result)
    }
}

impl Drop for Lease<'_> {
    fn drop(&mut self) {
        let blocks = std::mem::take(&mut *self.blocks.lock().unwrap_or_else(PoisonError::into_inner));
        let kept = blocks.into_iter().filter(|block| block.bytes() <= KEPT_BYTES);
        self.cache.0.lock().unwrap_or_else(PoisonError::into_inner).extend(kept);
    }
}
