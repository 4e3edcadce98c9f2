//! Attention on the CPU: plan, forward, backward.

mod backward;
mod bias_gradient;
mod forward;
mod operands;
mod pack;
mod product;
mod schedule;
mod share;
mod tile;
mod workspace;

use tilefold_core::{
    AttentionPlan, AttentionProblem, BackwardArgs, BackwardOperands, DType, DeviceError, DeviceId, DeviceResult,
    ForwardArgs, ForwardOperands,
};

use crate::arch::{Arch, Portable, Simd};
#[cfg(target_arch = "x86_64")]
use crate::arch::{Avx2, Avx512};
use crate::memory::Block;
use backward::{Backward, KeyPartials, Part, Wants};
use bias_gradient::{Reduction, owner_pass, reduce_sums, write_tile};
use forward::{Forward, Item, ItemShape};
pub(crate) use operands::Operand;
use operands::{Inputs, Views};
pub(crate) use pack::Row;
use product::Matrix;
use schedule::{BackwardSchedule, ForwardSchedule, cuts};
pub(crate) use workspace::BlockCache;
use workspace::{Carver, Lease};

/// Calls a function generic over the instruction set with the token of a run-time choice. Products of pairs are for
/// problems in bf16 alone.
macro_rules! dispatch {
    ($arch:expr, $problem:expr, $run:ident($($argument:expr),*)) => {{
        let pairs = $problem.spec().dtype == DType::BF16;
        match $arch {
            Arch::PortableBf16 if pairs => $run(Portable::<true>, $($argument),*),
            #[cfg(target_arch = "x86_64")]
            Arch::Avx512Bf16 if let Some(s) = Avx512::<true>::detect().filter(|_| pairs) => $run(s, $($argument),*),
            #[cfg(target_arch = "x86_64")]
            Arch::Avx512 | Arch::Avx512Bf16 if let Some(s) = Avx512::<false>::detect() => $run(s, $($argument),*),
            #[cfg(target_arch = "x86_64")]
            Arch::Avx2 if let Some(s) = Avx2::<false>::detect() => $run(s, $($argument),*),
            #[cfg(target_arch = "aarch64")]
            Arch::Neon if let Some(s) = crate::arch::Neon::detect() => $run(s, $($argument),*),
            _ => $run(Portable::<false>, $($argument),*),
        }
    }};
}

/// Tiles and workspace of a problem.
///
/// # Errors
/// [`DeviceError::Unsupported`] when no address space holds the workspace.
pub(crate) fn plan(problem: &AttentionProblem, arch: Arch, threads: usize) -> DeviceResult<AttentionPlan> {
    dispatch!(arch, problem, plan_for(problem, arch, threads))
}

fn plan_for<S: Simd>(_: S, problem: &AttentionProblem, arch: Arch, threads: usize) -> DeviceResult<AttentionPlan> {
    let forward = ForwardSchedule::new(problem, S::LANES, threads);
    let backward = BackwardPlan::new::<S>(problem, threads);
    let forward_bytes = forward::scratch_bytes::<S>(problem, forward.shape).saturating_mul(threads);
    let backward_bytes = backward.item_bytes.saturating_mul(threads).saturating_add(backward.shared_bytes());
    for (pass, bytes) in [("forward", forward_bytes), ("backward", backward_bytes)] {
        if isize::try_from(bytes).is_err() {
            let limit =
                format!("the {pass} pass needs more workspace than can be addressed; use fewer heads per key head");
            return Err(DeviceError::Unsupported { limit });
        }
    }
    Ok(AttentionPlan {
        problem: problem.clone(),
        device: DeviceId::CPU,
        kernel: format!("cpu-{arch}-{}", problem.spec().dtype),
        tile_q: forward.shape.tile_q,
        tile_k: forward.shape.tile_k,
        forward_workspace_bytes: forward_bytes,
        backward_workspace_bytes: backward_bytes,
        deterministic: true,
    })
}

/// Runs a forward launch on at most `threads`, for which its plan was made.
pub(crate) fn forward(arch: Arch, threads: usize, cache: &BlockCache, args: ForwardArgs<'_>) -> DeviceResult<()> {
    let problem = &args.plan().problem;
    let operands = args.into_operands();
    dispatch!(arch, problem, run_forward(problem, operands, threads, cache))
}

/// Runs a backward launch on at most `threads`, for which its plan was made.
pub(crate) fn backward(arch: Arch, threads: usize, cache: &BlockCache, args: BackwardArgs<'_>) -> DeviceResult<()> {
    let problem = &args.plan().problem;
    let operands = args.into_operands();
    dispatch!(arch, problem, run_backward(problem, operands, threads, cache))
}

fn run_forward<S: Simd>(
    s: S,
    problem: &AttentionProblem,
    operands: ForwardOperands<'_>,
    threads: usize,
    cache: &BlockCache,
) -> DeviceResult<()> {
    let schedule = ForwardSchedule::new(problem, S::LANES, threads);
    let views = Views {
        q: &operands.q,
        k: &operands.k,
        v: &operands.v,
        biases: &operands.biases,
        key_mask: operands.key_mask.as_ref(),
        q_segments: operands.q_segments.as_ref(),
        k_segments: operands.k_segments.as_ref(),
        gate: operands.gate.as_ref(),
    };
    let forward = Forward {
        inputs: Inputs::new(problem, &views, schedule.shape.slab),
        out: Operand::write(operands.out),
        lse: operands.lse.map(Operand::write),
        lse_low: operands.lse_low.map(Operand::write),
        shape: schedule.shape,
    };
    let bytes = forward::scratch_bytes::<S>(problem, schedule.shape);
    let items = schedule.items(problem.spec());
    let workers = share::workers(problem, threads).min(items.len());
    let lease = cache.lease(workers, bytes)?;
    share::for_each(workers, items.len(), |index| {
        lease.with(bytes, |block| forward.run(s, &items.item(index), &mut Carver::over(block)))
    })
}

/// Sizes of everything a backward launch allocates.
struct BackwardPlan<'p> {
    problem: &'p AttentionProblem,
    reductions: Vec<Option<Reduction>>,
    schedule: BackwardSchedule,
    wants: Wants,
    /// Shape of the items of an owner's pass.
    owner: ItemShape,
    /// Scratch bytes of an item, of whichever pass needs more.
    item_bytes: usize,
}

/// Query tiles in one item of an owner's pass.
const OWNER_TILES: usize = 4;

impl<'p> BackwardPlan<'p> {
    fn new<S: Simd>(problem: &'p AttentionProblem, threads: usize) -> Self {
        let spec = problem.spec();
        let wanted = spec.gradients.biases;
        let reductions: Vec<_> =
            spec.biases.iter().enumerate().map(|(i, bias)| wanted[i].then(|| Reduction::of(bias, spec))).collect();
        let bias_sum = reductions.contains(&Some(Reduction::Rows));
        let schedule = BackwardSchedule::new(problem, S::LANES, threads, bias_sum);
        let wants = Wants { row: true, bias_sum };
        let owner = ItemShape {
            item_q: OWNER_TILES * schedule.shape.tile_q,
            heads: 1,
            slab: false,
            whole_keys: false,
            ..schedule.shape
        };
        let mut item_bytes = backward::scratch_bytes::<S>(problem, schedule.shape, wants);
        if reductions.contains(&Some(Reduction::Owner)) {
            let wants = Wants { row: false, bias_sum: true };
            item_bytes = item_bytes.max(backward::scratch_bytes::<S>(problem, owner, wants));
        }
        Self { problem, reductions, schedule, wants, owner, item_bytes }
    }

    /// Whether anything but owners' gradients is asked for.
    fn has_main_pass(&self) -> bool {
        let wanted = self.problem.spec().gradients;
        let fused = |reduction: &Option<Reduction>| reduction.is_some_and(|reduction| reduction != Reduction::Owner);
        wanted.q || wanted.k || wanted.v || wanted.gate || self.reductions.iter().any(fused)
    }

    fn sums(&self, reduction: Reduction) -> Option<[usize; 4]> {
        let spec = self.problem.spec();
        self.reductions.contains(&Some(reduction)).then(|| match reduction {
            Reduction::Queries => [self.schedule.chunks(spec) * spec.batch, spec.rows, spec.heads, spec.seqlen_k],
            _ => [spec.batch, spec.rows, spec.heads, spec.seqlen_q],
        })
    }

    fn partials(&self, channels: usize) -> Option<[usize; 5]> {
        let spec = self.problem.spec();
        let chunks = self.schedule.chunks(spec);
        let shape = [chunks * spec.batch, spec.rows, spec.seqlen_k, spec.kv_heads, channels];
        self.schedule.splits_keys(spec).then_some(shape)
    }

    /// Shape of the sums of dS of every chunk of rows, when there are several: chunk, batch and head, then a slab.
    fn row_sums(&self) -> Option<[usize; 3]> {
        let (spec, shape) = (self.problem.spec(), self.schedule.shape);
        let chunks = self.schedule.row_chunks(spec);
        let keys = spec.seqlen_k.next_multiple_of(shape.tile_k);
        let slab = spec.seqlen_q.next_multiple_of(shape.tile_q).saturating_mul(keys);
        (self.wants.bias_sum && chunks > 1).then_some([chunks, spec.batch * spec.heads, slab])
    }

    fn shared_bytes(&self) -> usize {
        let spec = self.problem.spec();
        let wanted = spec.gradients;
        let sums = [Reduction::Queries, Reduction::Keys].into_iter().filter_map(|reduction| self.sums(reduction));
        let partials = [(wanted.k, spec.head_dim), (wanted.v, spec.head_dim_v)];
        let partials = partials.into_iter().filter_map(|(wanted, channels)| self.partials(channels).filter(|_| wanted));
        let sizes = sums.map(|shape| f32_bytes(&shape)).chain(partials.map(|shape| f32_bytes(&shape)));
        sizes.chain(self.row_sums().map(|shape| f32_bytes(&shape))).fold(0, usize::saturating_add)
    }
}

/// Bytes of f32 memory of one shape; saturates.
fn f32_bytes(shape: &[usize]) -> usize {
    shape.iter().copied().fold(size_of::<f32>(), usize::saturating_mul)
}

/// Zeroed f32 memory of one shape.
struct Shared<const R: usize> {
    _block: Block,
    operand: Operand<R>,
}

impl<const R: usize> Shared<R> {
    fn new(shape: [usize; R]) -> DeviceResult<Self> {
        let mut block = Block::zeroed(f32_bytes(&shape))?;
        let operand = Operand::dense_f32(block.address(), shape);
        Ok(Self { _block: block, operand })
    }
}

fn run_backward<S: Simd>(
    s: S,
    problem: &AttentionProblem,
    operands: BackwardOperands<'_>,
    threads: usize,
    cache: &BlockCache,
) -> DeviceResult<()> {
    let plan = BackwardPlan::new::<S>(problem, threads);
    let (spec, workers) = (problem.spec(), share::workers(problem, threads));
    let views = Views {
        q: &operands.q,
        k: &operands.k,
        v: &operands.v,
        biases: &operands.biases,
        key_mask: operands.key_mask.as_ref(),
        q_segments: operands.q_segments.as_ref(),
        k_segments: operands.k_segments.as_ref(),
        gate: operands.gate.as_ref(),
    };
    let key_sums = plan.sums(Reduction::Queries).map(Shared::new).transpose()?;
    let query_sums = plan.sums(Reduction::Keys).map(Shared::new).transpose()?;
    let partial = |wanted: bool, channels| plan.partials(channels).filter(|_| wanted).map(Shared::new).transpose();
    let (dk_partial, dv_partial) =
        (partial(spec.gradients.k, spec.head_dim)?, partial(spec.gradients.v, spec.head_dim_v)?);
    let row_sums = plan.row_sums().map(Shared::new).transpose()?;
    let mut backward = Backward {
        inputs: Inputs::new(problem, &views, plan.schedule.shape.slab),
        out: Operand::read(&operands.out),
        d_out: Operand::read(&operands.d_out),
        lse: Operand::read(&operands.lse),
        lse_low: Operand::read(&operands.lse_low),
        dq: operands.dq.map(Operand::write),
        dk: operands.dk.map(Operand::write),
        dv: operands.dv.map(Operand::write),
        d_gate: operands.d_gate.map(Operand::write),
        key_sums: key_sums.as_ref().map(|sums| sums.operand),
        query_sums: query_sums.as_ref().map(|sums| sums.operand),
        key_partials: KeyPartials {
            dk: dk_partial.as_ref().map(|p| p.operand),
            dv: dv_partial.as_ref().map(|p| p.operand),
        },
        shape: plan.schedule.shape,
        workers,
    };
    let dbiases: Vec<_> = operands.dbiases.into_iter().map(|view| view.map(Operand::<5>::write)).collect();
    let gradients = |reduction: Reduction| {
        let wanted = plan.reductions.iter().zip(&spec.biases).zip(&dbiases);
        wanted.filter_map(move |((made, bias), to)| (*made == Some(reduction)).then_some((bias, (*to)?)))
    };
    let lease = cache.lease(workers, plan.item_bytes)?;
    if plan.has_main_pass() {
        let row_gradients: Vec<_> = gradients(Reduction::Rows).map(|(_, to)| to).collect();
        let rows = RowGradients { to: row_gradients, partial: row_sums.as_ref().map(|sums| sums.operand) };
        main_pass(s, &backward, &plan, &rows, &lease)?;
        rows.finish(s, &backward, &plan, &lease)?;
        finish_partials(&backward, plan.schedule.chunks(spec))?;
    }
    for (reduction, sums) in [(Reduction::Queries, &backward.key_sums), (Reduction::Keys, &backward.query_sums)] {
        let Some(sums) = sums else { continue };
        let (chunks, length) = match reduction {
            Reduction::Queries => (plan.schedule.chunks(spec), spec.seqlen_k),
            _ => (1, spec.seqlen_q),
        };
        for (bias, to) in gradients(reduction) {
            reduce_sums(sums, (chunks, length), (spec, workers), bias, &to)?;
        }
    }
    if plan.reductions.contains(&Some(Reduction::Owner)) {
        backward.inputs = Inputs::new(problem, &views, false);
        backward.shape = plan.owner;
        for (bias, to) in gradients(Reduction::Owner) {
            owner_pass(s, &backward, bias, &to, &lease, plan.item_bytes)?;
        }
    }
    Ok(())
}

/// All items of the main pass.
fn main_pass<S: Simd>(
    s: S,
    backward: &Backward<'_>,
    plan: &BackwardPlan<'_>,
    rows: &RowGradients,
    lease: &Lease<'_>,
) -> DeviceResult<()> {
    let group = plan.problem.group();
    let items = plan.schedule.items(plan.problem.spec());
    share::for_each(backward.workers, items.len(), |index| {
        let item = &items.item(index);
        lease.with(plan.item_bytes, |block| {
            let scratch = backward.scratch::<S>(&mut Carver::over(block), plan.wants);
            let chunk = item.queries.start / plan.schedule.chunk;
            let parts = cuts(item.queries.clone(), plan.schedule.shape.item_q).map(|queries| {
                let (first, last) = (queries.start == item.queries.start, queries.end == item.queries.end);
                Part { heads: 0..group, queries, chunk, first, last }
            });
            if plan.schedule.shape.whole_keys {
                let parts: Vec<_> = parts.collect();
                backward.run_by_row(s, item, &parts, &scratch, plan.wants);
                return;
            }
            for part in parts {
                backward.run(s, item, &part, &scratch, plan.wants);
                if let Some(sum) = scratch.bias_sum {
                    rows.take(s, backward, plan, item, &part, sum, scratch.turned);
                }
            }
        })
    })
}

/// Gradients of biases that rows share, and the sums of chunks of rows.
struct RowGradients {
    to: Vec<Operand<5>>,
    partial: Option<Operand<3>>,
}

impl RowGradients {
    /// Writes the sum of an item that saw all rows; keeps that of one that did not.
    #[allow(clippy::too_many_arguments, reason = "a sum, and where it belongs")]
    fn take<S: Simd>(
        &self,
        s: S,
        backward: &Backward<'_>,
        plan: &BackwardPlan<'_>,
        item: &Item,
        part: &Part,
        sum: Matrix,
        turned: Matrix,
    ) {
        let (spec, shape) = (plan.problem.spec(), plan.schedule.shape);
        let tiles = backward.tiles(part);
        for index in 0..item.kv_heads.len() * part.heads.len() * tiles {
            let head = item.kv_heads.start * part.heads.len() + index / tiles;
            let q = backward.tile_range(part, index % tiles);
            let from = backward.slab_at(sum, index, 0);
            // SAFETY: the sum is complete for this item, which alone writes these elements.
            unsafe {
                if let Some(partial) = self.partial {
                    let size = backward.padded_keys() * shape.tile_q;
                    let chunk = item.rows.start / plan.schedule.rows;
                    let at = [chunk, item.batch * spec.heads + head, q.start / shape.tile_q * size];
                    partial.at(at).cast::<f32>().copy_from_nonoverlapping(from.data, size);
                    continue;
                }
                for to in &self.to {
                    write_tile(s, [item.batch, 0, head], &q, (spec.seqlen_k, shape.tile_k), from, turned, to);
                }
            }
        }
    }

    /// Adds the chunks of rows in order and writes the gradients.
    fn finish<S: Simd>(
        &self,
        s: S,
        backward: &Backward<'_>,
        plan: &BackwardPlan<'_>,
        lease: &Lease<'_>,
    ) -> DeviceResult<()> {
        let Some(partial) = self.partial else { return Ok(()) };
        let (spec, shape) = (plan.problem.spec(), plan.schedule.shape);
        let (tiles, size) = (spec.seqlen_q.div_ceil(shape.tile_q), backward.padded_keys() * shape.tile_q);
        share::for_each(backward.workers, spec.batch * spec.heads * tiles, |index| {
            lease.with(plan.item_bytes, |block| {
                let scratch = backward.scratch::<S>(&mut Carver::over(block), plan.wants);
                let (owner, tile) = (index / tiles, index % tiles);
                let chunk = |chunk: usize| partial.at([chunk, owner, tile * size]).cast::<f32>();
                // SAFETY: every chunk has the tile, and only this worker reads or writes it now.
                unsafe {
                    let sum = std::slice::from_raw_parts_mut(chunk(0), size);
                    for next in 1..plan.schedule.row_chunks(spec) {
                        let next = std::slice::from_raw_parts(chunk(next), size);
                        s.vectorize(
                            #[inline(always)]
                            || sum.iter_mut().zip(next).for_each(|(sum, next)| *sum += next),
                        );
                    }
                    let start = tile * shape.tile_q;
                    let q = start..(start + shape.tile_q).min(spec.seqlen_q);
                    let from = Matrix { data: sum.as_mut_ptr(), stride: shape.tile_q };
                    let at = [owner / spec.heads, 0, owner % spec.heads];
                    for to in &self.to {
                        write_tile(s, at, &q, (spec.seqlen_k, shape.tile_k), from, scratch.turned, to);
                    }
                }
            })
        })
    }
}

/// Adds dK and dV of the chunks of queries in order and writes them.
fn finish_partials(backward: &Backward<'_>, chunks: usize) -> DeviceResult<()> {
    let problem = backward.inputs.problem;
    let spec = problem.spec();
    let scale = backward::scale_f32(&backward.inputs);
    let pairs = [
        (backward.dk, backward.key_partials.dk, spec.head_dim, scale),
        (backward.dv, backward.key_partials.dv, spec.head_dim_v, 1.0),
    ];
    for (to, partial, channels, factor) in pairs {
        let Some((to, partial)) = to.zip(partial) else { continue };
        share::for_each(backward.workers, spec.batch * spec.rows * spec.kv_heads, |index| {
            let (batch, row) = (index / spec.kv_heads / spec.rows, index / spec.kv_heads % spec.rows);
            let head = index % spec.kv_heads;
            let mut sum = vec![0_f32; channels];
            for key in 0..spec.seqlen_k {
                sum.fill(0.0);
                for chunk in 0..chunks {
                    let from = partial.at([chunk * spec.batch + batch, row, key, head, 0]).cast::<f32>();
                    // SAFETY: the partial sum has a row of channels for every key, complete by now.
                    let from = unsafe { std::slice::from_raw_parts(from, channels) };
                    sum.iter_mut().zip(from).for_each(|(sum, from)| *sum += from);
                }
                sum.iter_mut().for_each(|sum| *sum *= factor);
                let data = to.at([batch, row, key, head, 0]);
                // SAFETY: the row belongs to this worker.
                unsafe { Row { data, dtype: to.dtype, stride: to.strides[4] }.write(channels, sum.as_ptr()) };
            }
            Ok(())
        })?;
    }
    Ok(())
}
