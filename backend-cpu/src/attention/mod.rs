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
use backward::{Backward, KeyPartials, Part, Wants};
use bias_gradient::{Reduction, owner_pass, reduce_sums, write_tile};
use forward::{Forward, Item, ItemShape};
pub(crate) use operands::Operand;
use operands::{Inputs, Views};
pub(crate) use pack::{Float, Row, update_dense};
use product::Matrix;
use schedule::{BackwardSchedule, ForwardSchedule, cuts, part};
pub(crate) use workspace::Caches;
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
    let backward_bytes = backward.item_bytes.saturating_mul(threads).saturating_add(backward.sums_bytes());
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
pub(crate) fn forward(arch: Arch, threads: usize, caches: &Caches, args: ForwardArgs<'_>) -> DeviceResult<()> {
    let problem = &args.plan().problem;
    let operands = args.into_operands();
    dispatch!(arch, problem, run_forward(problem, operands, threads, caches))
}

/// Runs a backward launch on at most `threads`, for which its plan was made.
pub(crate) fn backward(arch: Arch, threads: usize, caches: &Caches, args: BackwardArgs<'_>) -> DeviceResult<()> {
    let problem = &args.plan().problem;
    let operands = args.into_operands();
    dispatch!(arch, problem, run_backward(problem, operands, threads, caches))
}

fn run_forward<S: Simd>(
    s: S,
    problem: &AttentionProblem,
    operands: ForwardOperands<'_>,
    threads: usize,
    caches: &Caches,
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
    let lease = caches.scratch.lease(workers, bytes)?;
    share::for_each(workers, items.len(), |index| {
        lease.with(bytes, |leased| forward.run(s, &items.item(index), leased))
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

    fn sums_bytes(&self) -> usize {
        let mut carver = Carver::counting();
        Sums::carve(&mut carver, self);
        carver.bytes()
    }
}

/// Sums in f32 that items leave for a later step.
#[derive(Clone, Copy, Debug)]
struct Sums {
    /// Of dS over the queries, and over the keys.
    key: Option<Operand<4>>,
    query: Option<Operand<4>>,
    /// Of dS over chunks of rows.
    rows: Option<Operand<3>>,
    /// dK and dV of chunks of queries.
    partials: KeyPartials,
}

impl Sums {
    fn carve(carver: &mut Carver, plan: &BackwardPlan<'_>) -> Self {
        let (spec, wanted) = (plan.problem.spec(), plan.problem.spec().gradients);
        let mut of = |reduction| plan.sums(reduction).map(|shape| carver.operand(shape));
        let (key, query) = (of(Reduction::Queries), of(Reduction::Keys));
        let mut partial = |wanted: bool, channels: usize| {
            plan.partials(channels).filter(|_| wanted).map(|shape| carver.operand(shape))
        };
        let (dk, dv) = (partial(wanted.k, spec.head_dim), partial(wanted.v, spec.head_dim_v));
        let rows = plan.row_sums().map(|shape| carver.operand(shape));
        Self { key, query, rows, partials: KeyPartials { dk, dv } }
    }
}

fn run_backward<S: Simd>(
    s: S,
    problem: &AttentionProblem,
    operands: BackwardOperands<'_>,
    threads: usize,
    caches: &Caches,
) -> DeviceResult<()> {
    let plan = BackwardPlan::new::<S>(problem, threads);
    let workers = share::workers(problem, threads);
    let lease = caches.scratch.lease(workers, plan.item_bytes)?;
    let bytes = plan.sums_bytes();
    caches.sums.lease(1, bytes)?.with(bytes, |leased| {
        let sums = Sums::carve(&mut Carver::over(&mut leased.block), &plan);
        run_planned_backward(s, &plan, operands, workers, &lease, &sums)
    })?
}

fn run_planned_backward<S: Simd>(
    s: S,
    plan: &BackwardPlan<'_>,
    operands: BackwardOperands<'_>,
    workers: usize,
    lease: &Lease<'_>,
    sums: &Sums,
) -> DeviceResult<()> {
    let (problem, spec) = (plan.problem, plan.problem.spec());
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
        key_sums: sums.key,
        query_sums: sums.query,
        key_partials: sums.partials,
        shape: plan.schedule.shape,
        workers,
    };
    let dbiases: Vec<_> = operands.dbiases.into_iter().map(|view| view.map(Operand::<5>::write)).collect();
    let gradients = |reduction: Reduction| {
        let wanted = plan.reductions.iter().zip(&spec.biases).zip(&dbiases);
        wanted.filter_map(move |((made, bias), to)| (*made == Some(reduction)).then_some((bias, (*to)?)))
    };
    if let (Some(key_sums), Some(shape)) = (sums.key, plan.sums(Reduction::Queries)) {
        // The main pass adds to them, the others it writes.
        // SAFETY: memory of this size, which nobody else uses.
        unsafe { key_sums.at([0; 4]).cast::<f32>().write_bytes(0, shape.iter().product()) };
    }
    if plan.has_main_pass() {
        let row_gradients: Vec<_> = gradients(Reduction::Rows).map(|(_, to)| to).collect();
        let rows = RowGradients { to: row_gradients, partial: sums.rows };
        main_pass(s, &backward, plan, &rows, lease)?;
        rows.finish(s, &backward, plan, lease)?;
        finish_partials(s, &backward, plan.schedule.chunks(spec))?;
    }
    for (reduction, sums) in [(Reduction::Queries, &sums.key), (Reduction::Keys, &sums.query)] {
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
            owner_pass(s, &backward, bias, &to, lease, plan.item_bytes)?;
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
        lease.with(plan.item_bytes, |leased| {
            let scratch = backward.scratch::<S>(&mut Carver::over(&mut leased.block), plan.wants);
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
                if leased.needs_slab(&Item { queries: part.queries.clone(), ..item.clone() }) {
                    backward.build_slab(s, item, &part, &scratch);
                }
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
            lease.with(plan.item_bytes, |leased| {
                let scratch = backward.scratch::<S>(&mut Carver::over(&mut leased.block), plan.wants);
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
                    let q = part(tile, shape.tile_q, spec.seqlen_q);
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

/// Keys that a worker takes at once in [`finish_partials`]: their sums stay in the L1 cache.
const PARTIAL_KEYS: usize = 32;

/// Adds dK and dV of the chunks of queries in order and writes them.
fn finish_partials<S: Simd>(s: S, backward: &Backward<'_>, chunks: usize) -> DeviceResult<()> {
    let spec = backward.inputs.problem.spec();
    let scale = backward::scale_f32(&backward.inputs);
    let pairs = [
        (backward.dk, backward.key_partials.dk, spec.head_dim, scale),
        (backward.dv, backward.key_partials.dv, spec.head_dim_v, 1.0),
    ];
    for (to, partial, channels, factor) in pairs {
        let Some((to, partial)) = to.zip(partial) else { continue };
        let parts = spec.seqlen_k.div_ceil(PARTIAL_KEYS);
        share::for_each(backward.workers, spec.batch * spec.rows * parts, |index| {
            let (batch, row) = (index / parts / spec.rows, index / parts % spec.rows);
            let keys = part(index % parts, PARTIAL_KEYS, spec.seqlen_k);
            let count = keys.len() * spec.kv_heads * channels;
            let chunk = |chunk: usize| partial.at([chunk * spec.batch + batch, row, keys.start, 0, 0]).cast::<f32>();
            s.vectorize(
                #[inline(always)]
                || {
                    // SAFETY: the partial sums are dense and complete by now, and these keys of theirs and of the
                    // gradient belong to this worker.
                    unsafe {
                        let sum = std::slice::from_raw_parts_mut(chunk(0), count);
                        for next in 1..chunks {
                            let next = std::slice::from_raw_parts(chunk(next), count);
                            sum.iter_mut().zip(next).for_each(|(sum, next)| *sum += next);
                        }
                        sum.iter_mut().for_each(|sum| *sum *= factor);
                        for (i, sum) in sum.chunks_exact(channels).enumerate() {
                            let (key, head) = (keys.start + i / spec.kv_heads, i % spec.kv_heads);
                            let data = to.at([batch, row, key, head, 0]);
                            Row { data, dtype: to.dtype, stride: to.strides[4] }.write(channels, sum.as_ptr());
                        }
                    }
                },
            );
            Ok(())
        })?;
    }
    Ok(())
}
