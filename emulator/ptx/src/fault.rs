//! What can go wrong while a kernel runs: faults are values that name the place.

use std::fmt;

/// A kernel stopped by an error, with the place where it happened.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Fault {
    /// Name of the kernel.
    pub kernel: Box<str>,
    /// Index of the block in the grid.
    pub block: [u32; 3],
    /// Index of the thread in the block; the first of several.
    pub thread: [u32; 3],
    /// Line of the PTX text, from 1.
    pub line: u32,
    /// Text of the instruction.
    pub instruction: Box<str>,
    /// What happened.
    pub kind: FaultKind,
}

/// Whether memory was read or written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Access {
    /// A load.
    Read,
    /// A store, or the arrival of an asynchronous copy.
    Write,
    /// An atomic operation or an access with a memory order.
    Atomic,
}

/// Kinds of faults.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum FaultKind {
    /// An access outside every allocation or variable.
    #[error("out of bounds: {bytes} bytes at {space} address {address:#x}: {detail}")]
    OutOfBounds {
        /// State space.
        space: &'static str,
        /// First byte of the access.
        address: u64,
        /// Bytes of the access.
        bytes: u32,
        /// Where the address lies.
        detail: String,
    },
    /// An address that is no multiple of the size of its access.
    #[error("misaligned: {bytes} bytes at {space} address {address:#x}")]
    Misaligned {
        /// State space.
        space: &'static str,
        /// First byte of the access.
        address: u64,
        /// Bytes of the access.
        bytes: u32,
    },
    /// A read of bytes that nobody has written.
    #[error("uninitialised: {bytes} bytes at {space} address {address:#x} were never written as a whole")]
    Uninitialised {
        /// State space.
        space: &'static str,
        /// First byte of the access.
        address: u64,
        /// Bytes of the access.
        bytes: u32,
    },
    /// The destination of an asynchronous copy touched before its thread has waited for it.
    #[error("the destination of cp.async at shared address {address:#x} is touched before its wait")]
    PendingCopy {
        /// The byte.
        address: u64,
    },
    /// Two threads of a block touch a byte of shared memory, one writes, and no barrier lies between.
    #[error(
        "race in shared memory at {address:#x}: {access:?} after {earlier:?} by thread {other:?}, with no barrier between"
    )]
    SharedRace {
        /// The byte.
        address: u64,
        /// The access that was found out.
        access: Access,
        /// The access before it.
        earlier: Access,
        /// Thread of the earlier access (linear index in the block).
        other: u32,
    },
    /// Two blocks of a launch touch a byte of global memory and one writes.
    #[error("race in global memory at {address:#x}: {access:?}, but {earlier:?} by {other}")]
    GlobalRace {
        /// The byte.
        address: u64,
        /// The access that was found out.
        access: Access,
        /// What the other block did.
        earlier: Access,
        /// The other block (linear index), or that there are several.
        other: OtherBlock,
    },
    /// A `.sync` instruction that lanes of its mask do not reach.
    #[error("partial warp: lanes {missing:#010x} do not come to this instruction")]
    PartialWarp {
        /// Lanes that are missing.
        missing: u32,
    },
    /// A lane that executes a `.sync` instruction without standing in its mask.
    #[error("the executing lane is not in the member mask {members:#010x}")]
    NotAMember {
        /// The mask.
        members: u32,
    },
    /// A barrier that never completes, or is used in a way that has no meaning.
    #[error("barrier {id}: {what}")]
    Barrier {
        /// Number of the barrier.
        id: u32,
        /// What is wrong.
        what: String,
    },
    /// A value that no instruction has set decides over an address, a branch, a store or a matrix product.
    #[error("an undefined register value is used")]
    UndefinedValue,
    /// `cp.async` asked for more source bytes than it copies.
    #[error("cp.async of {bytes} bytes with a source of {source_bytes}")]
    CopySize {
        /// Bytes of the source.
        source_bytes: u32,
        /// Bytes of the copy.
        bytes: u32,
    },
    /// Integer division by zero.
    #[error("integer division by zero")]
    DivisionByZero,
    /// `brx.idx` beyond its table.
    #[error("branch index {index} beyond its table")]
    BranchIndex {
        /// The index.
        index: u32,
    },
    /// The block has executed more instructions than its budget allows.
    #[error("the budget of {warp_instructions} warp instructions for a block is exhausted")]
    BudgetExhausted {
        /// The budget.
        warp_instructions: u64,
    },
    /// The kernel executed `trap`.
    #[error("trap")]
    Trap,
    /// The launch itself is wrong; no instruction was executed.
    #[error("launch: {what}")]
    Launch {
        /// What is wrong.
        what: String,
    },
}

/// The other side of a race between blocks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum OtherBlock {
    /// One block, by its linear index.
    Block(u32),
    /// More than one.
    Several,
}

impl fmt::Display for OtherBlock {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Block(index) => write!(f, "block {index}"),
            Self::Several => f.write_str("several blocks"),
        }
    }
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { kernel, block, thread, line, instruction, kind } = self;
        write!(f, "{kernel}: block {block:?}, thread {thread:?}, PTX line {line}: `{instruction}`: {kind}")
    }
}

impl std::error::Error for Fault {}

/// A fault inside a warp, before its place is known.
#[derive(Clone, Debug)]
pub(crate) struct Stop {
    pub(crate) lane: u32,
    pub(crate) kind: FaultKind,
}

impl Stop {
    pub(crate) fn new(lane: u32, kind: FaultKind) -> Box<Self> {
        Box::new(Self { lane, kind })
    }
}
