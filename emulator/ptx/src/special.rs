//! The special registers that kernels read.

/// A special register of 32 bits; the clocks are instructions of their own.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Special {
    Thread(usize),
    BlockSize(usize),
    Block(usize),
    GridSize(usize),
    Lane,
    Warp,
    Warps,
    LaneMaskEqual,
    LaneMaskLess,
    LaneMaskLessEqual,
    LaneMaskGreater,
    LaneMaskGreaterEqual,
    DynamicSharedBytes,
}

impl Special {
    pub(crate) fn named(name: &str) -> Option<Self> {
        if let Some((base, axis)) = name.rsplit_once('.') {
            let axis = ["x", "y", "z"].iter().position(|&a| a == axis)?;
            return Some(match base {
                "%tid" => Self::Thread(axis),
                "%ntid" => Self::BlockSize(axis),
                "%ctaid" => Self::Block(axis),
                "%nctaid" => Self::GridSize(axis),
                _ => return None,
            });
        }
        Some(match name {
            "%laneid" => Self::Lane,
            "%warpid" => Self::Warp,
            "%nwarpid" => Self::Warps,
            "%lanemask_eq" => Self::LaneMaskEqual,
            "%lanemask_lt" => Self::LaneMaskLess,
            "%lanemask_le" => Self::LaneMaskLessEqual,
            "%lanemask_gt" => Self::LaneMaskGreater,
            "%lanemask_ge" => Self::LaneMaskGreaterEqual,
            "%dynamic_smem_size" => Self::DynamicSharedBytes,
            _ => return None,
        })
    }

    /// The value for one thread of a block.
    pub(crate) fn value(self, at: &Position) -> u32 {
        let bit = 1u32 << at.lane;
        match self {
            Self::Thread(axis) => at.thread[axis],
            Self::BlockSize(axis) => at.block_size[axis],
            Self::Block(axis) => at.block[axis],
            Self::GridSize(axis) => at.grid_size[axis],
            Self::Lane => at.lane,
            Self::Warp => at.warp,
            Self::Warps => at.warps,
            Self::LaneMaskEqual => bit,
            Self::LaneMaskLess => bit - 1,
            Self::LaneMaskLessEqual => bit | (bit - 1),
            Self::LaneMaskGreater => !(bit | (bit - 1)),
            Self::LaneMaskGreaterEqual => !(bit - 1),
            Self::DynamicSharedBytes => at.dynamic_shared_bytes,
        }
    }

    /// Whether the value changes from block to block.
    pub(crate) fn of_block(self) -> bool {
        matches!(self, Self::Block(_))
    }
}

/// Where a thread stands.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Position {
    pub(crate) thread: [u32; 3],
    pub(crate) block_size: [u32; 3],
    pub(crate) block: [u32; 3],
    pub(crate) grid_size: [u32; 3],
    pub(crate) lane: u32,
    pub(crate) warp: u32,
    pub(crate) warps: u32,
    pub(crate) dynamic_shared_bytes: u32,
}
