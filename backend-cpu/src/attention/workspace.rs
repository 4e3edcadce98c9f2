//! Scratch memory of work items: sized before launch, kept between launches.

use std::sync::{Mutex, PoisonError};

use tilefold_core::DeviceResult;

use super::forward::Item;
use super::operands::Operand;
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
        self.used = self.used.saturating_add(count.checked_next_multiple_of(LINE).unwrap_or(usize::MAX));
        piece
    }

    /// The next `rows` rows of `stride` elements.
    pub(crate) fn matrix(&mut self, rows: usize, stride: usize) -> Matrix {
        Matrix { data: self.floats(rows.saturating_mul(stride)), stride }
    }

    /// A dense operand in the next memory.
    pub(crate) fn operand<const R: usize>(&mut self, shape: [usize; R]) -> Operand<R> {
        Operand::dense_f32(self.floats(shape.into_iter().fold(1, usize::saturating_mul)).cast(), shape)
    }

    /// The next `count` equal pieces; only one is made where all are only counted, however many.
    pub(crate) fn pieces<T>(&mut self, count: usize, mut piece: impl FnMut(&mut Self) -> T) -> Vec<T> {
        if !self.base.is_null() {
            return (0..count).map(|_| piece(self)).collect();
        }
        let before = self.used;
        let first = piece(self);
        self.used = before.saturating_add((self.used - before).saturating_mul(count));
        vec![first]
    }

    /// Bytes taken so far; saturates.
    pub(crate) fn bytes(&self) -> usize {
        self.used.saturating_mul(size_of::<f32>())
    }
}

/// Memory that launches share, one after the other.
#[derive(Debug, Default)]
pub(crate) struct Caches {
    /// Scratch of work items.
    pub(crate) scratch: BlockCache,
    /// Sums that items leave for a later step.
    pub(crate) sums: BlockCache,
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
        let blocks = blocks.into_iter().map(Leased::from).collect();
        Ok(Lease { cache: self, blocks: Mutex::new(blocks) })
    }

    /// Bytes kept.
    #[cfg(test)]
    pub(crate) fn bytes(&self) -> usize {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).iter().map(Block::bytes).sum()
    }
}

/// A block of one launch.
#[derive(Debug)]
pub(crate) struct Leased {
    pub(crate) block: Block,
    /// The item whose slab the block holds.
    slab: Option<Item>,
}

impl From<Block> for Leased {
    fn from(block: Block) -> Self {
        Self { block, slab: None }
    }
}

impl Leased {
    /// Whether the slab must be built for an item; afterwards the block counts as holding it.
    pub(crate) fn needs_slab(&mut self, item: &Item) -> bool {
        let held = self.slab.replace(item.clone());
        !held.is_some_and(|held| held.shares_slab(item))
    }
}

/// Blocks of one launch.
#[derive(Debug)]
pub(crate) struct Lease<'c> {
    cache: &'c BlockCache,
    blocks: Mutex<Vec<Leased>>,
}

impl Lease<'_> {
    /// Runs `work` on a block that nobody else uses meanwhile.
    ///
    /// # Errors
    /// [`tilefold_core::DeviceError::OutOfMemory`] when more run at once than were leased and memory is gone.
    pub(crate) fn with<T>(&self, bytes: usize, work: impl FnOnce(&mut Leased) -> T) -> DeviceResult<T> {
        let leased = self.blocks.lock().unwrap_or_else(PoisonError::into_inner).pop();
        let mut leased = leased.map_or_else(|| Block::zeroed(bytes).map(Leased::from), Ok)?;
        let result = work(&mut leased);
        self.blocks.lock().unwrap_or_else(PoisonError::into_inner).push(leased);
        Ok(result)
    }
}

impl Drop for Lease<'_> {
    fn drop(&mut self) {
        let blocks = std::mem::take(&mut *self.blocks.lock().unwrap_or_else(PoisonError::into_inner));
        let kept = blocks.into_iter().map(|leased| leased.block).filter(|block| block.bytes() <= KEPT_BYTES);
        self.cache.0.lock().unwrap_or_else(PoisonError::into_inner).extend(kept);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn carve(carver: &mut Carver) -> Vec<*mut f32> {
        let mut pieces = vec![carver.floats(3), carver.matrix(5, 7).data];
        pieces.extend(carver.pieces(4, |carver| carver.floats(17)));
        pieces.push(carver.floats(1));
        pieces
    }

    #[test]
    fn counting_finds_the_size_that_cutting_takes() {
        let mut counting = Carver::counting();
        carve(&mut counting);
        assert_eq!(counting.bytes(), (16 + 48 + 4 * 32 + 16) * 4);
        let mut block = Block::zeroed(counting.bytes()).unwrap();
        let mut cutting = Carver::over(&mut block);
        let pieces = carve(&mut cutting);
        assert_eq!(cutting.bytes(), counting.bytes());
        let offsets: Vec<_> = pieces.iter().map(|piece| (piece.addr() - pieces[0].addr()) / 4).collect();
        assert_eq!(offsets, [0, 16, 64, 96, 128, 160, 192]);
    }

    #[test]
    fn counting_saturates() {
        let mut carver = Carver::counting();
        carver.matrix(usize::MAX / 2, 3);
        carver.floats(usize::MAX - 1);
        carver.pieces(usize::MAX, |carver| carver.floats(1));
        assert_eq!(carver.bytes(), usize::MAX);
    }

    #[test]
    fn a_slab_is_built_once_for_items_that_differ_in_rows() {
        let mut leased = Leased::from(Block::zeroed(64).unwrap());
        let first = Item { batch: 0, kv_heads: 0..2, rows: 0..4, queries: 0..96 };
        let needed = [
            (first.clone(), true),
            (Item { rows: 4..8, ..first.clone() }, false),
            (Item { batch: 1, ..first.clone() }, true),
            (Item { kv_heads: 2..4, ..first.clone() }, true),
            (Item { queries: 96..100, ..first.clone() }, true),
            (first.clone(), true),
            (first, false),
        ];
        for (item, needed) in needed {
            assert_eq!(leased.needs_slab(&item), needed, "{item:?}");
        }
    }

    #[test]
    fn blocks_are_kept_between_launches_unless_large() {
        let cache = BlockCache::default();
        let address = |lease: &Lease<'_>, bytes| lease.with(bytes, |leased| leased.block.address().addr()).unwrap();
        let first = address(&cache.lease(1, 4096).unwrap(), 4096);
        assert_eq!(address(&cache.lease(1, 64).unwrap(), 64), first);
        drop(cache.lease(2, KEPT_BYTES + 1).unwrap());
        assert!(cache.0.lock().unwrap().iter().all(|block| block.bytes() <= KEPT_BYTES));
    }
}
