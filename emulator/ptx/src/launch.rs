//! Running a kernel: the launch is checked, then its blocks run in parallel.

use std::collections::HashMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};

use rayon::iter::{IntoParallelIterator, ParallelIterator};

use crate::block::Block;
use crate::fault::{Fault, FaultKind};
use crate::global::Global;
use crate::memory::Memory;
use crate::module::{Kernel, Module};
use crate::registers::{Registers, Vector};
use crate::shadow::MOST_BLOCKS;

const BLOCK_THREADS: u32 = 1024;
/// Shared memory that a block of sm_80 may have.
const SHARED_BYTES: u32 = 163 << 10;
const GRID: [u32; 3] = [0x7FFF_FFFF, 65_535, 65_535];

/// One launch of a kernel.
#[derive(Clone, Copy, Debug)]
pub struct Launch<'a> {
    /// The kernel.
    pub kernel: &'a Kernel,
    /// The module that the kernel belongs to.
    pub module: &'a Module,
    /// Blocks along x, y, z.
    pub grid: [u32; 3],
    /// Threads of a block along x, y, z.
    pub block: [u32; 3],
    /// Shared memory beyond what the kernel declares.
    pub dynamic_shared_bytes: u32,
    /// The block of parameters, as laid out by [`Kernel::parameters`].
    pub parameters: &'a [u8],
}

/// Bounds of a run.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// Instructions that the warps of one block may execute together.
    pub warp_instructions_per_block: u64,
}

impl Default for Limits {
    fn default() -> Self {
        Self { warp_instructions_per_block: 1 << 30 }
    }
}

/// What was executed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Statistics {
    /// Instructions times their active lanes.
    pub thread_instructions: u64,
    /// Instructions of warps.
    pub warp_instructions: u64,
    /// Matrix products among them.
    pub matrix_instructions: u64,
    /// Blocks.
    pub blocks: u64,
}

/// A launch with all that its blocks share.
pub(crate) struct Prepared<'a> {
    pub(crate) kernel: &'a Kernel,
    pub(crate) global: Global,
    pub(crate) constants: &'a [u8],
    pub(crate) parameters: &'a [u8],
    pub(crate) grid: [u32; 3],
    pub(crate) block: [u32; 3],
    pub(crate) threads: u32,
    pub(crate) dynamic_shared_bytes: u32,
    pub(crate) limits: Limits,
    /// Registers with the constants in place.
    pub(crate) registers: Registers,
}

/// Runs a kernel to its end, with the default [`Limits`].
///
/// # Errors
/// The [`Fault`] of the first block (by linear index) that has one.
pub fn run(memory: &Memory, launch: &Launch<'_>) -> Result<Statistics, Fault> {
    run_with(memory, launch, Limits::default())
}

/// Runs a kernel to its end.
///
/// # Errors
/// The [`Fault`] of the first block (by linear index) that has one.
pub fn run_with(memory: &Memory, launch: &Launch<'_>, limits: Limits) -> Result<Statistics, Fault> {
    let refuse = |what: String| launch_fault(launch.kernel, what);
    let (blocks, threads) = check(launch).map_err(refuse)?;
    let variables = memory.load_variables(launch.module).map_err(|error| refuse(error.to_string()))?;
    let prepared = Prepared {
        kernel: launch.kernel,
        global: Global::new(memory.snapshot()),
        constants: &launch.module.constants,
        parameters: launch.parameters,
        grid: launch.grid,
        block: launch.block,
        threads,
        dynamic_shared_bytes: launch.dynamic_shared_bytes,
        limits,
        registers: registers(launch.kernel, &variables),
    };
    let totals = Totals::default();
    // Register files are large: blocks reuse those of blocks that are done.
    let idle: Mutex<Vec<Block<'_>>> = Mutex::new(Vec::new());
    let take = || idle.lock().unwrap_or_else(PoisonError::into_inner).pop();
    let fault = (0..blocks).into_par_iter().find_map_first(|index| {
        let mut block = take().unwrap_or_else(|| Block::new(&prepared));
        match block.run(index) {
            Ok(statistics) => {
                totals.add(statistics);
                idle.lock().unwrap_or_else(PoisonError::into_inner).push(block);
                None
            }
            Err(fault) => Some(fault),
        }
    });
    match fault {
        Some(fault) => Err(*fault),
        None => Ok(totals.get()),
    }
}

#[derive(Default)]
struct Totals {
    thread_instructions: AtomicU64,
    warp_instructions: AtomicU64,
    matrix_instructions: AtomicU64,
    blocks: AtomicU64,
}

impl Totals {
    fn add(&self, block: Statistics) {
        self.thread_instructions.fetch_add(block.thread_instructions, Ordering::Relaxed);
        self.warp_instructions.fetch_add(block.warp_instructions, Ordering::Relaxed);
        self.matrix_instructions.fetch_add(block.matrix_instructions, Ordering::Relaxed);
        self.blocks.fetch_add(1, Ordering::Relaxed);
    }

    fn get(&self) -> Statistics {
        Statistics {
            thread_instructions: self.thread_instructions.load(Ordering::Relaxed),
            warp_instructions: self.warp_instructions.load(Ordering::Relaxed),
            matrix_instructions: self.matrix_instructions.load(Ordering::Relaxed),
            blocks: self.blocks.load(Ordering::Relaxed),
        }
    }
}

fn launch_fault(kernel: &Kernel, what: String) -> Fault {
    let (line, instruction) = kernel.code.statements.first().cloned().unwrap_or_default();
    let kind = FaultKind::Launch { what };
    Fault {
        kernel: kernel.name.as_str().into(),
        block: [0; 3],
        thread: [0; 3],
        line,
        instruction: instruction.into(),
        kind,
    }
}

/// Blocks of the grid and threads of a block, or what is wrong with the launch.
fn check(launch: &Launch<'_>) -> Result<(u64, u32), String> {
    let Launch { kernel, module, grid, block, .. } = launch;
    if !module.kernels().iter().any(|k| std::ptr::eq(k, *kernel)) {
        return Err("the kernel is of another module".to_owned());
    }
    if grid.iter().zip(GRID).any(|(&blocks, most)| blocks == 0 || blocks > most) {
        return Err(format!("grid {grid:?}, at least 1 and at most {GRID:?} are allowed"));
    }
    let blocks: u64 = grid.iter().fold(1, |total, &n| total.saturating_mul(u64::from(n)));
    if blocks > MOST_BLOCKS {
        return Err(format!("{blocks} blocks, {MOST_BLOCKS} can be followed"));
    }
    let threads: u64 = block.iter().fold(1, |total, &n| total.saturating_mul(u64::from(n)));
    let most = kernel.max_threads.unwrap_or(BLOCK_THREADS).min(BLOCK_THREADS);
    let threads = u32::try_from(threads).unwrap_or(u32::MAX);
    if threads == 0 || threads > most {
        return Err(format!("block {block:?}, at least 1 and at most {most} threads are allowed"));
    }
    let shared = kernel.static_shared_bytes.saturating_add(launch.dynamic_shared_bytes);
    if shared > SHARED_BYTES {
        return Err(format!("{shared} bytes of shared memory, a block has {SHARED_BYTES}"));
    }
    if launch.parameters.len() != kernel.parameter_bytes as usize {
        let (found, due) = (launch.parameters.len(), kernel.parameter_bytes);
        return Err(format!("{found} bytes of parameters, the kernel takes {due}"));
    }
    Ok((blocks, threads))
}

fn registers(kernel: &Kernel, variables: &HashMap<usize, u64>) -> Registers {
    let code = &kernel.code;
    let mut words: Vec<Vector<u32>> = vec![[0; 32]; code.words as usize];
    let mut doubles: Vec<Vector<u64>> = vec![[0; 32]; code.doubles as usize];
    for &(index, value) in &code.word_constants {
        words[index as usize] = [value; 32];
    }
    for &(index, value) in &code.double_constants {
        doubles[index as usize] = [value; 32];
    }
    for &(index, variable, offset) in &code.relocations {
        let address = variables.get(&variable).copied().unwrap_or(0);
        doubles[index as usize] = [address.wrapping_add_signed(offset); 32];
    }
    let defined = vec![0; (code.predicates + code.words + code.doubles) as usize];
    let mut predicates = vec![0; code.predicates as usize];
    for &(index, value) in &code.predicate_constants {
        predicates[index as usize] = if value { u32::MAX } else { 0 };
    }
    Registers { predicates, words, doubles, defined }
}
