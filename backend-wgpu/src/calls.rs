//! Calls: prepared when they come for the first time, and kept, so that the same call again is only enqueued.
//!
//! A call is the same if it does the same to operands at the same addresses. A buffer keeps its address for as long as it
//! exists, and what was prepared for a buffer goes when the buffer goes. Workspace belongs to a call while it is enqueued and
//! no longer: another may have it in the meantime, and where it is not free the call is prepared anew with other memory.

use std::collections::HashMap;
use std::sync::{Arc, Mutex};

use tilefold_core::{AttentionProblem, DeviceResult, RopePairs, RopeSpec, TensorView};
use tilefold_kernels::wgsl::Dispatch;

use crate::context::{Context, lock};
use crate::memory::Block;
use crate::module::{Launch, prepare, submit};

/// Calls kept at a time: what a network of some depth makes.
const MAX_CALLS: usize = 1024;

/// Calls of a device that have been prepared.
#[derive(Debug, Default)]
pub(crate) struct Calls(Mutex<Kept>);

#[derive(Debug, Default)]
struct Kept {
    /// By what they are as numbers; with the look-up that last wanted them.
    calls: HashMap<Box<[u64]>, (Arc<Call>, u64)>,
    /// Numbers of the call that is looked up, whose memory stays.
    key: Vec<u64>,
    /// Look-ups so far.
    now: u64,
}

/// What a call does, beside what the views of its operands say.
#[derive(Clone, Copy, Debug)]
pub(crate) enum What<'a> {
    Forward(&'a AttentionProblem),
    Backward(&'a AttentionProblem),
    Merge,
    Relayout,
    Accumulate,
    Rope(&'a RopeSpec),
    Fill(f64),
}

/// Operands of a call, each in a place of its own.
pub(crate) type Views<'v, 'a> = [Option<&'v TensorView<'a>>];

/// Everything that a call enqueues.
#[derive(Debug)]
struct Call {
    /// What is asked for beyond the operands' own shapes.
    problem: Option<AttentionProblem>,
    launches: Vec<Launch>,
    /// Addresses of the buffers that it takes only while it is enqueued.
    workspace: Vec<u64>,
    /// Memory of its own.
    _kept: Vec<Block>,
}

/// Memory of a call that is being prepared.
#[derive(Debug)]
pub(crate) struct Space<'a> {
    pub(crate) context: &'a Arc<Context>,
    workspace: Vec<Block>,
    kept: Vec<Block>,
}

impl<'a> What<'a> {
    fn problem(self) -> Option<&'a AttentionProblem> {
        match self {
            Self::Forward(problem) | Self::Backward(problem) => Some(problem),
            _ => None,
        }
    }

    /// Writes the call as numbers that no call differing in more than its problem has.
    fn write_key(self, views: &Views<'_, '_>, key: &mut Vec<u64>) {
        key.clear();
        key.extend(match self {
            Self::Forward(_) => [0, 0],
            Self::Backward(_) => [1, 0],
            Self::Merge => [2, 0],
            Self::Relayout => [3, 0],
            Self::Fill(value) => [4, value.to_bits()],
            Self::Accumulate => [5, 0],
            Self::Rope(spec) => [6, spec.rotary_dim as u64],
        });
        if let Self::Rope(RopeSpec { rotary_dim: _, pairs, base, position_scale, offset, inverse }) = self {
            let flags = 2 * u64::from(*pairs == RopePairs::Halves) + u64::from(*inverse);
            key.extend([flags, base.to_bits(), position_scale.to_bits(), offset.cast_unsigned()]);
        }
        for view in views {
            // No tensor lies at 0.
            let Some(view) = view else {
                key.push(0);
                continue;
            };
            key.extend([view.origin().addr() as u64, view.dtype() as u64, view.shape().len() as u64]);
            key.extend(view.shape().iter().map(|&size| size as u64));
            key.extend(view.layout().strides().iter().map(|stride| stride.cast_unsigned()));
        }
    }
}

impl Space<'_> {
    /// The address of so many bytes, which are the call's until it is enqueued.
    ///
    /// # Errors
    /// As [`Block::new`].
    pub(crate) fn workspace(&mut self, bytes: u64) -> DeviceResult<u64> {
        let block = Block::new(self.context, bytes)?;
        let address = block.address();
        self.workspace.push(block);
        Ok(address)
    }

    /// The same for as long as the call is kept.
    ///
    /// # Errors
    /// As [`Block::new`].
    pub(crate) fn kept(&mut self, bytes: u64) -> DeviceResult<u64> {
        let block = Block::new(self.context, bytes)?;
        let address = block.address();
        self.kept.push(block);
        Ok(address)
    }
}

/// Enqueues a call, which `dispatches` makes where it is not known yet.
///
/// # Errors
/// What `dispatches` gives, and what wgpu reports.
pub(crate) fn enqueue(
    context: &Arc<Context>,
    what: What<'_>,
    views: &Views<'_, '_>,
    dispatches: impl FnOnce(&mut Space<'_>) -> DeviceResult<Vec<Dispatch>>,
) -> DeviceResult<()> {
    context.check()?;
    if let Some(call) = context.calls.find(what, views)
        && let Some(_claim) = context.memory.claim(&call.workspace)
    {
        // Without error scopes, which allocate: all of it was valid before, and what fails now nevertheless is told.
        submit(context, &call.launches);
        return context.check();
    }
    let mut space = Space { context, workspace: Vec::new(), kept: Vec::new() };
    let launches = prepare(context, &dispatches(&mut space)?)?;
    context.guarded("submit", || {
        submit(context, &launches);
        Ok(())
    })?;
    let Space { workspace, kept, .. } = space;
    let addresses = workspace.iter().map(Block::address).collect();
    let problem = what.problem().cloned();
    context.calls.keep(what, views, Call { problem, launches, workspace: addresses, _kept: kept });
    // Idle only now, so that a buffer which goes takes the call with it.
    drop(workspace);
    Ok(())
}

impl Calls {
    fn find(&self, what: What<'_>, views: &Views<'_, '_>) -> Option<Arc<Call>> {
        let Kept { calls, key, now } = &mut *lock(&self.0);
        what.write_key(views, key);
        let (call, last_used) = calls.get_mut(key.as_slice())?;
        *now += 1;
        *last_used = *now;
        (call.problem.as_ref() == what.problem()).then(|| Arc::clone(call))
    }

    /// Keeps a call instead of what had its key, and of the one that was not wanted for longest if there are too many.
    fn keep(&self, what: What<'_>, views: &Views<'_, '_>, call: Call) {
        let mut kept = lock(&self.0);
        let Kept { calls, key, now } = &mut *kept;
        what.write_key(views, key);
        *now += 1;
        let before = calls.insert(key.as_slice().into(), (Arc::new(call), *now));
        let oldest = calls.iter().filter(|_| calls.len() > MAX_CALLS).min_by_key(|(_, (_, last_used))| last_used);
        let oldest = oldest.map(|(key, _)| key.clone()).and_then(|key| calls.remove(&key));
        // What goes may take memory along, which asks for this lock.
        drop(kept);
        drop((before, oldest));
    }

    /// Forgets the calls that reach a buffer which is no more.
    pub(crate) fn forget(&self, buffer: u64) {
        let reaches = |call: &Call| call.launches.iter().any(|launch| launch.buffers.contains(&buffer));
        let gone: Vec<_> = lock(&self.0).calls.extract_if(|_, (call, _)| reaches(call)).collect();
        drop(gone);
    }

    /// Forgets all.
    pub(crate) fn clear(&self) {
        let gone = std::mem::take(&mut lock(&self.0).calls);
        drop(gone);
    }
}
