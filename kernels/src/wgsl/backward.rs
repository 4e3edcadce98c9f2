//! The backward pass: statistics of the queries, then gradients by queries, by keys and by entries of biases.

use tilefold_core::{AttentionProblem, DType};

use crate::BackwardOperands;
use crate::params::Operand;
use crate::wgsl::attention::{self, BIAS_NAMES, SCALARS, Sizes, THREADS};
use crate::wgsl::dispatch::{
    Builder, Dispatch, DispatchError, Heads, Limits, Part, View, gather, number, parts, parts_with,
};
use crate::wgsl::forward::part_heads;
use crate::wgsl::moves::{copy_view, zeros};
use crate::wgsl::shader::{Constant, Elements, File};

/// Workgroups that the pass by queries should have, where a walk can be cut for it: on a processor, and on a GPU.
const QUERY_GROUPS: [i64; 2] = [32, 512];
/// Operands of a pass beside its inputs, at most: gradient and statistics of the output, three results, and sums.
const OTHERS: usize = 6;
/// Least steps of a walk that is cut.
const LEAST_CHUNK: i64 = 4;
/// Most pieces of a walk.
const MOST_CHUNKS: i64 = 64;

/// Fields of the argument of the pass by queries.
const QUERY_SCALARS: &[(&str, &str)] = &{
    let mut fields = [("", ""); SCALARS.len() + 8];
    let mut i = 0;
    while i < SCALARS.len() {
        fields[i] = SCALARS[i];
        i += 1;
    }
    let own = [
        ("entries", "u32"),
        ("entry_heads", "u32"),
        ("entry_rows", "u32"),
        ("walks", "u32"),
        ("walk_heads", "u32"),
        ("walk_rows", "u32"),
        ("chunk", "u32"),
        ("chunk_stride", "u32"),
    ];
    let mut i = 0;
    while i < own.len() {
        fields[SCALARS.len() + i] = own[i];
        i += 1;
    }
    fields
};

/// Fields of the argument of sums.
const SUM_SCALARS: &[(&str, &str)] = &[
    ("groups", "u32"),
    ("groups_x", "u32"),
    ("count", "u32"),
    ("rows", "u32"),
    ("heads", "u32"),
    ("positions", "u32"),
    ("lasts", "u32"),
    ("add_chunks", "u32"),
    ("add_batches", "u32"),
    ("add_rows", "u32"),
    ("add_heads", "u32"),
    ("add_positions", "u32"),
    ("chunk_stride", "u32"),
    ("zero", "u32"),
];

/// Bytes that a backward pass takes beside its operands, where these are row-major.
///
/// # Errors
/// [`DispatchError`].
pub fn backward_workspace_bytes(problem: &AttentionProblem, limits: &Limits) -> Result<u64, DispatchError> {
    let mut bytes = 0_u64;
    backward(problem, &row_major(problem), limits, |more| {
        bytes = bytes.saturating_add(more);
        Ok::<_, DispatchError>(NOWHERE)
    })?;
    Ok(bytes)
}

/// An address for what is never launched.
pub(crate) const NOWHERE: u64 = 1 << 20;

/// Row-major operands of a problem at addresses of nothing, far apart.
pub(crate) fn row_major(problem: &AttentionProblem) -> BackwardOperands {
    let mut next = 1 << 40;
    let mut operand = |shape: &[usize]| {
        let mut strides = vec![1_i64; shape.len()];
        for axis in (0..shape.len() - 1).rev() {
            strides[axis] = strides[axis + 1].saturating_mul(i64::try_from(shape[axis + 1]).unwrap_or(i64::MAX));
        }
        next += 1 << 40;
        Operand::new(next, shape, &strides)
    };
    let spec = problem.spec();
    let (q, k, v, out) = (problem.q_shape(), problem.k_shape(), problem.v_shape(), problem.out_shape());
    let asked = spec.gradients;
    BackwardOperands {
        inputs: attention::Operands {
            q: operand(&q),
            k: operand(&k),
            v: operand(&v),
            biases: spec.biases.iter().map(|bias| operand(&bias.shape)).collect(),
            key_mask: spec.key_mask.then(|| operand(&[spec.batch, spec.rows, spec.seqlen_k])),
            segments: spec
                .segments
                .then(|| [spec.seqlen_q, spec.seqlen_k].map(|length| operand(&[spec.batch, spec.rows, length]))),
            kv_lengths: spec.kv_lengths.as_ref().map(|_| operand(&[spec.batch, spec.rows])),
            alibi_slopes: spec.mask.alibi_slopes.as_ref().map(|slopes| operand(&[slopes.len()]).data),
            gate: spec.gate.then(|| operand(&out)),
        },
        out: operand(&out),
        lse: operand(&problem.lse_shape()),
        lse_low: operand(&problem.lse_shape()),
        d_out: operand(&out),
        dq: asked.q.then(|| operand(&q)),
        dk: asked.k.then(|| operand(&k)),
        dv: asked.v.then(|| operand(&v)),
        dbiases: (spec.biases.iter().zip(asked.biases))
            .map(|(bias, asked)| asked.then(|| (operand(&bias.shape), bias.dtype)))
            .collect(),
        d_gate: asked.gate.then(|| operand(&out)),
    }
}

/// Dispatches of a backward pass, in order. `workspace` gives the address of so many bytes, which live until all of
/// them are enqueued.
///
/// # Errors
/// [`DispatchError`], and what `workspace` reports.
pub fn backward<E: From<DispatchError>>(
    problem: &AttentionProblem,
    operands: &BackwardOperands,
    limits: &Limits,
    workspace: impl FnMut(u64) -> Result<u64, E>,
) -> Result<Vec<Dispatch>, E> {
    let mut passes = Passes::new(problem, operands, limits, workspace)?;
    passes.all()?;
    Ok(passes.dispatches)
}

/// A named operand of a kernel, `None` where the problem lacks it.
type Named = (&'static str, Option<View>);

struct Passes<'a, W> {
    problem: &'a AttentionProblem,
    operands: &'a BackwardOperands,
    limits: &'a Limits,
    sizes: Sizes,
    constants: Vec<(&'static str, Constant)>,
    /// What all passes but the first read.
    inputs: Vec<Named>,
    workspace: W,
    dispatches: Vec<Dispatch>,
}

impl<'a, W, E> Passes<'a, W>
where
    W: FnMut(u64) -> Result<u64, E>,
    E: From<DispatchError>,
{
    fn new(
        problem: &'a AttentionProblem,
        operands: &'a BackwardOperands,
        limits: &'a Limits,
        mut workspace: W,
    ) -> Result<Self, E> {
        let constants = attention::constants(problem.spec(), limits);
        let sizes = Sizes::of(problem)?;
        let mut inputs = attention::inputs(&sizes, problem.spec(), &operands.inputs);
        let dispatches = gather(&mut inputs, OTHERS, limits, attention::is_small, &mut workspace)?;
        Ok(Self { problem, operands, limits, sizes, constants, inputs, workspace, dispatches })
    }

    fn all(&mut self) -> Result<(), E> {
        let (spec, o) = (self.problem.spec(), self.operands);
        let has_axis = |i: usize, axis: usize| spec.biases[i].shape[axis] > 1;
        let asked: Vec<usize> =
            (0..spec.biases.len()).filter(|&i| o.dbiases.get(i).is_some_and(Option::is_some)).collect();
        // One key, or one query, is an axis as good as none.
        let by_entry: Vec<usize> = asked.iter().copied().filter(|&i| has_axis(i, 3) && has_axis(i, 4)).collect();
        let by_row = |&&i: &&usize| has_axis(i, 3) && !has_axis(i, 4);
        let needs_rows = asked.iter().any(|i| by_row(&i));
        let needs_columns = asked.iter().any(|&i| !has_axis(i, 3));
        let by_queries = o.dq.is_some() || needs_rows || !by_entry.is_empty();
        let by_keys = o.dk.is_some() || o.dv.is_some() || needs_columns;
        if !by_queries && !by_keys && o.d_gate.is_none() {
            return Ok(());
        }
        let (statistics, d_out) = self.prepare(by_queries || by_keys)?;
        if by_queries {
            let sums = self.queries(statistics, d_out, [o.dq.is_some(), needs_rows], by_entry.first().copied())?;
            for &i in asked.iter().filter(by_row) {
                self.sum(i, sums)?;
            }
        }
        for &i in by_entry.iter().skip(1) {
            self.queries(statistics, d_out, [false; 2], Some(i))?;
        }
        if by_keys {
            let sums = self.keys(statistics, d_out, needs_columns)?;
            for &i in asked.iter().filter(|&&i| !has_axis(i, 3)) {
                self.sum(i, sums)?;
            }
        }
        Ok(())
    }

    /// A row-major f32 array in the workspace.
    fn array(&mut self, name: &'static str, sizes: [i64; 5]) -> Result<View, E> {
        let view = View::dense(name, 0, sizes);
        Ok(View { address: (self.workspace)(view.dense_bytes()?)?, ..view })
    }

    /// What wide heads add their gradients up in.
    fn sums(&mut self, heads: Heads, tile: u32, quads: u32) -> Result<Named, E> {
        if !attention::is_wide(self.problem.spec()) {
            return Ok(("sums", None));
        }
        let view = self.sizes.sums(0, heads, tile, quads);
        Ok(("sums", Some(View { address: (self.workspace)(view.dense_bytes()?)?, ..view })))
    }

    /// Statistics of the queries, and the gradient of the ungated output.
    fn prepare(&mut self, needs_statistics: bool) -> Result<(Option<View>, View), E> {
        let (spec, sizes, o) = (self.problem.spec(), self.sizes, self.operands);
        let Sizes { batch, rows, heads, seqlen_q, head_dim_v, .. } = sizes;
        let by_query = |name, operand| sizes.by_query(name, spec.dtype, operand, head_dim_v);
        let d_out = by_query("d_out", &o.d_out);
        let statistics = match needs_statistics {
            true => Some(self.array("statistics", [batch, rows, heads, seqlen_q, 4])?),
            false => None,
        };
        let gated = match o.inputs.gate {
            // Channels are neighbours, then heads, as in the contract's own order.
            Some(_) if needs_statistics => Some(View {
                strides: [
                    rows * seqlen_q * heads * head_dim_v,
                    seqlen_q * heads * head_dim_v,
                    head_dim_v,
                    heads * head_dim_v,
                    1,
                ],
                quads: true,
                ..self.array("gated", [batch, rows, heads, seqlen_q, head_dim_v])?
            }),
            _ => None,
        };
        let statistic = |name, operand| needs_statistics.then(|| sizes.statistic(name, operand));
        let views: Vec<Named> = vec![
            ("out", Some(by_query("out", &o.out))),
            ("d_out", Some(d_out)),
            ("gate", o.inputs.gate.as_ref().map(|gate| by_query("gate", gate))),
            ("lse", statistic("lse", &o.lse)),
            ("lse_low", statistic("lse_low", &o.lse_low)),
            ("statistics", statistics.map(View::written)),
            ("gated", gated.map(View::written)),
            ("d_gate", o.d_gate.as_ref().map(|d_gate| by_query("d_gate", d_gate).written())),
        ];
        let switches = [("STATISTICS", needs_statistics), ("GATED", gated.is_some()), ("D_GATE", o.d_gate.is_some())];
        let (views, rounds) = (with_absent_inputs(views), sizes.head_dim_v.unsigned_abs() + 1);
        self.pass(File::Prepare, views, (&switches, &[]), seqlen_q, THREADS, sizes.group, rounds)?;
        Ok((statistics, gated.map_or(d_out, |gated| View { name: "d_out", ..gated })))
    }

    /// Gradient of q, sums of dS over the keys, and the gradient of a bias with a query and a key axis.
    fn queries(
        &mut self,
        statistics: Option<View>,
        d_out: View,
        [with_dq, with_sums]: [bool; 2],
        bias: Option<usize>,
    ) -> Result<Option<View>, E> {
        let (spec, sizes, o) = (self.problem.spec(), self.sizes, self.operands);
        let Sizes { batch, rows, heads, seqlen_q, seqlen_k, head_dim, .. } = sizes;
        let row_sums = match with_sums {
            true => Some(self.array("row_sums", [batch, rows, heads, seqlen_q, 1])?),
            false => None,
        };
        let dq = o.dq.as_ref().filter(|_| with_dq).map(|dq| sizes.by_query("dq", spec.dtype, dq, head_dim).written());
        let mut views = self.inputs.clone();
        share(&mut views, &["k", "v"]);
        views.extend([
            ("d_out", Some(d_out)),
            ("statistics", statistics),
            ("dq", dq),
            ("row_sums", row_sums.map(View::written)),
        ]);
        let queries = attention::per_thread(spec, 2 * quads(head_dim) + quads(sizes.head_dim_v), self.limits);
        let queries = attention::needed(queries, seqlen_q);
        let [q_quads, _] = attention::quads(spec);
        views.push(match with_dq {
            true => self.sums(Heads::Query, THREADS * queries, q_quads)?,
            false => ("sums", None),
        });
        let tiles = (seqlen_q + i64::from(THREADS * queries) - 1) / i64::from(THREADS * queries);

        // The axes of the bias, if any: without one each head of each row is an entry of its own.
        let shape = match bias {
            Some(index) => spec.biases[index].shape.map(|size| i64::try_from(size).unwrap_or(i64::MAX)),
            None => [batch, rows, heads, seqlen_q, seqlen_k],
        };
        // Of a bias that there is, since all logits may be more than can be counted.
        let dbias = bias.map(|_| View { strides: keys_before_queries(shape), ..View::dense("dbias", 0, shape) });
        let elements = bias.map_or(0, |_| shape.iter().product::<i64>());
        let mut present: Vec<View> = views.iter().filter_map(|(_, view)| *view).collect();
        present.extend(dbias);
        let parts = parts(sizes.outer(), sizes.group, &present, self.limits)?;
        let chunks = match (dbias, parts.first()) {
            (Some(_), Some(part)) => {
                let wanted =
                    Walks::of(part, &sizes, shape).chunks(tiles, QUERY_GROUPS[usize::from(!self.limits.software)]);
                // All copies are written through one binding.
                let room = self.limits.binding_bytes / (4 * elements.unsigned_abs()).max(1);
                wanted.min(i64::try_from(room).unwrap_or(i64::MAX)).max(1)
            }
            _ => 1,
        };
        let dbias = match dbias {
            Some(dbias) => {
                let address = self.array("dbias", [chunks, elements, 1, 1, 1])?.address;
                self.dispatches.extend(zeros(address, chunks * elements, self.limits)?);
                Some(View { address, copies: [elements, chunks], ..dbias }.written())
            }
            None => None,
        };
        views.push(("dbias", dbias));
        // A walk that is too long for the device's loops goes on in another dispatch.
        let walked = attention::walked(self.problem, seqlen_k, THREADS * queries);
        let of_head = attention::rounds(spec, self.limits, 1, [2, 1], walked) + 1;
        let rounds =
            |part: &Part| of_head * ((Walks::of(part, &sizes, shape).steps() + chunks - 1) / chunks).unsigned_abs();
        let is_too_long =
            |part: &Part| Walks::of(part, &sizes, shape).steps() > 1 && rounds(part) > self.limits.loop_rounds;
        let parts = parts_with(sizes.outer(), sizes.group, &present, self.limits, is_too_long)?;

        let mut constants = self.constants.clone();
        constants.extend([("D_Q", with_dq), ("ROW_SUMS", with_sums), ("D_BIAS", bias.is_some())].map(switch));
        let step = attention::step(spec, self.limits, 1);
        constants.extend([("QUERIES", Constant::Number(queries)), ("STEP", Constant::Number(step))]);
        for part in parts {
            let walks = Walks::of(&part, &sizes, shape);
            let mut values = attention::scalars(self.problem, &sizes, &part, number(tiles));
            let steps = (walks.steps() + chunks - 1) / chunks;
            let own = [
                walks.entries(),
                walks.entry[2],
                walks.entry[1],
                walks.steps(),
                walks.walk[2],
                walks.walk[1],
                steps,
                if chunks == 1 { 0 } else { elements },
            ];
            values.extend(own.map(number));
            let builder = Builder {
                file: File::Queries,
                constants: constants.clone(),
                scalars: QUERY_SCALARS,
                values,
                limits: self.limits,
                rounds: rounds(&part),
                operands: in_part(&views, &part, sizes.group),
            };
            self.dispatches.push(builder.dispatch((tiles * walks.entries() * chunks).unsigned_abs())?);
        }
        if let (Some(index), Some(dbias)) = (bias, dbias) {
            self.total(index, dbias, shape, chunks)?;
        }
        Ok(row_sums)
    }

    /// The gradient of a bias from copies that lie one behind the other.
    fn total(&mut self, index: usize, copied: View, shape: [i64; 5], copies: i64) -> Result<(), E> {
        let Some(Some((operand, dtype))) = self.operands.dbiases.get(index) else { return Ok(()) };
        let total = self.sizes.bias("total", *dtype, operand).written();
        let source = View { writes: false, ..copied };
        if source.binding(self.limits).bytes <= self.limits.binding_bytes {
            return self.add(source, total, shape, [copies, 1, 1, 1, 1], false);
        }
        if copies == 1 {
            return self.add(source, total, shape, [1; 5], false);
        }
        // One copy after the other, since no binding shows them all.
        let elements = shape.iter().product::<i64>();
        let sum = self.array("total", shape)?.written();
        for copy in 0..copies {
            let address = source.address.wrapping_add_signed(4 * copy * elements);
            let source = View { address, copies: [0, 1], ..source };
            self.add(source, sum, shape, [1; 5], copy > 0)?;
        }
        let sum = View { writes: false, ..sum };
        self.dispatches.extend(copy_view(&sum, &View { sizes: shape, ..total }, self.limits)?);
        Ok(())
    }

    /// Gradients of k and v, and sums of dS over the queries.
    fn keys(&mut self, statistics: Option<View>, d_out: View, sums: bool) -> Result<Option<View>, E> {
        let (spec, sizes, o) = (self.problem.spec(), self.sizes, self.operands);
        let Sizes { batch, rows, heads, seqlen_k, head_dim, head_dim_v, .. } = sizes;
        let column_sums = match sums {
            true => Some(self.array("column_sums", [batch, rows, heads, seqlen_k, 1])?),
            false => None,
        };
        let mut views = self.inputs.clone();
        share(&mut views, &["q"]);
        let by_key = |name, operand, channels| sizes.by_key(name, spec.dtype, operand, channels).written();
        views.extend([
            ("d_out", Some(View { shared: true, ..d_out })),
            ("statistics", statistics),
            ("dk", o.dk.as_ref().map(|dk| by_key("dk", dk, head_dim))),
            ("dv", o.dv.as_ref().map(|dv| by_key("dv", dv, head_dim_v))),
            ("column_sums", column_sums.map(View::written)),
        ]);
        let keys = attention::per_thread(spec, 2 * (quads(head_dim) + quads(head_dim_v)), self.limits);
        let keys = attention::needed(keys, seqlen_k);
        views.push(self.sums(Heads::Key, THREADS * keys, attention::quads(spec).iter().sum())?);
        let switches = [("D_K", o.dk.is_some()), ("D_V", o.dv.is_some()), ("COLUMN_SUMS", sums)];
        let numbers = [("KEYS", keys), ("STEP", attention::step(spec, self.limits, 1))];
        let walked = attention::walked(self.problem, sizes.seqlen_q, THREADS * keys);
        let of_member = attention::rounds(spec, self.limits, 1, [2, 2], walked) + 1;
        let rounds = of_member * sizes.group.unsigned_abs();
        self.pass(File::Keys, views, (&switches, &numbers), seqlen_k, THREADS * keys, 1, rounds)?;
        Ok(column_sums)
    }

    /// One dispatch for each part: `group` heads of a part's key head, tiles of `tile` positions.
    #[allow(clippy::too_many_arguments, reason = "private; each is named where it is given")]
    fn pass(
        &mut self,
        file: File,
        views: Vec<Named>,
        (switches, numbers): Switches<'_>,
        positions: i64,
        tile: u32,
        group: i64,
        rounds: u64,
    ) -> Result<(), E> {
        let sizes = self.sizes;
        let tiles = u32::try_from(positions).unwrap_or(u32::MAX).div_ceil(tile);
        let mut constants = self.constants.clone();
        constants.extend(switches.iter().copied().map(switch));
        constants.extend(numbers.iter().map(|&(name, number)| (name, Constant::Number(number))));
        let present: Vec<View> = views.iter().filter_map(|(_, view)| *view).collect();
        for part in parts(sizes.outer(), sizes.group, &present, self.limits)? {
            let builder = Builder {
                file,
                constants: constants.clone(),
                scalars: SCALARS,
                values: attention::scalars(self.problem, &sizes, &part, tiles),
                limits: self.limits,
                rounds,
                operands: in_part(&views, &part, sizes.group),
            };
            let groups = part_heads(&part, group).unsigned_abs() * u64::from(tiles);
            self.dispatches.push(builder.dispatch(groups)?);
        }
        Ok(())
    }

    /// Gradient of a bias that lacks a query or a key axis, from sums over that axis.
    fn sum(&mut self, index: usize, sums: Option<View>) -> Result<(), E> {
        let (spec, sizes, o) = (self.problem.spec(), self.sizes, self.operands);
        let (Some(sums), Some(Some((operand, dtype)))) = (sums, o.dbiases.get(index)) else { return Ok(()) };
        let total = View { name: "total", ..sizes.bias("total", *dtype, operand) }.written();
        let shape = spec.biases[index].shape.map(|size| i64::try_from(size).unwrap_or(i64::MAX));
        let mut source = View { name: "source", ..sums };
        let mut add = [1; 5];
        for (axis, size) in [sizes.batch, sizes.rows, sizes.heads].into_iter().enumerate() {
            add[axis + 1] = if shape[axis] > 1 { 1 } else { size };
        }
        if shape[4] > 1 {
            // Keys are the last axis of the gradient, and the position of the sums.
            source.strides.swap(3, 4);
            source.sizes.swap(3, 4);
        } else if shape[3] == 1 {
            // All positions of a head first, so that no thread has everything to add.
            let [batch, rows, heads, positions, _] = source.sizes;
            let heads_of = [batch, rows, heads, 1, 1];
            let by_head = self.array("total", heads_of)?;
            self.add(source, by_head.written(), heads_of, [1, 1, 1, 1, positions], false)?;
            source = View { name: "source", ..by_head };
        }
        self.add(source, total, shape, add, false)
    }

    /// [`Self::add`] for more than one thread's loops can add: half of the longest axis after the other, in f32.
    fn add_halves(
        &mut self,
        source: View,
        total: View,
        shape: [i64; 5],
        add: [i64; 5],
        accumulates: bool,
    ) -> Result<(), E> {
        if total.elements != Elements::Numbers(DType::F32) {
            let sum = self.array("total", shape)?;
            self.add(source, sum.written(), shape, add, false)?;
            self.dispatches.extend(copy_view(&sum, &View { sizes: shape, ..total }, self.limits)?);
            return Ok(());
        }
        let axis = (0..5).max_by_key(|&axis| add[axis]).unwrap_or(0);
        let half = add[axis] / 2;
        let stride = if axis == 0 { source.copies[0] } else { source.strides[axis - 1] };
        for (first, count, accumulates) in [(0, half, accumulates), (half, add[axis] - half, true)] {
            let address = source.address.wrapping_add_signed(first * stride * source.size_bytes());
            let mut part = add;
            part[axis] = count;
            let copies = if axis == 0 { [source.copies[0], count] } else { source.copies };
            let mut sizes = source.sizes;
            if axis > 0 {
                sizes[axis - 1] = count;
            }
            self.add(View { address, copies, sizes, ..source }, total, shape, part, accumulates)?;
        }
        Ok(())
    }

    /// `total[b, n, h, i, j]` is the sum of `source` over so many copies, batches, rows, heads and positions, added to
    /// what it was if `accumulates`.
    fn add(&mut self, source: View, total: View, shape: [i64; 5], add: [i64; 5], accumulates: bool) -> Result<(), E> {
        // Nested loops; each ends with a round of its own.
        let rounds = add
            .iter()
            .rev()
            .fold(1, |inner: u64, &size| inner.saturating_add(1).saturating_mul(size.unsigned_abs()) + 1);
        if rounds > self.limits.loop_rounds {
            return self.add_halves(source, total, shape, add, accumulates);
        }
        let limit = self.limits.binding_bytes;
        let part = |view: &View| {
            let sizes = std::array::from_fn(|axis| if shape[axis] > 1 { shape[axis] } else { view.sizes[axis] });
            View { sizes, ..*view }
        };
        let large = [source, total].map(|view| part(&view)).into_iter().find(|v| v.binding(self.limits).bytes > limit);
        if let Some(large) = large {
            let Some(axis) = (0..3).find(|&axis| shape[axis] > 1) else {
                let (operand, bytes) = (large.name, large.binding(self.limits).bytes);
                return Err(DispatchError::Binding { operand, bytes, limit }.into());
            };
            let half = shape[axis] / 2;
            for [first, count] in [[0, half], [half, shape[axis] - half]] {
                let moved = |view: View| {
                    let offset = first * view.strides[axis] * view.size_bytes();
                    View { address: view.address.wrapping_add_signed(offset), ..view }
                };
                let mut shape = shape;
                shape[axis] = count;
                // An axis of one entry would count as one that is added over.
                let whole = |mut view: View| {
                    view.sizes[axis] = count;
                    view
                };
                self.add(whole(moved(source)), whole(moved(total)), shape, add, accumulates)?;
            }
            return Ok(());
        }
        let count = shape.iter().product::<i64>();
        let values = [
            count,
            shape[1],
            shape[2],
            shape[3],
            shape[4],
            add[0],
            add[1],
            add[2],
            add[3],
            add[4],
            source.copies[0],
            0,
        ];
        let builder = Builder {
            file: File::Sums,
            constants: vec![
                ("THREADS", Constant::Number(THREADS)),
                ("NATIVE_EXP", Constant::Switch(false)),
                ("ACCUMULATES", Constant::Switch(accumulates)),
            ],
            scalars: SUM_SCALARS,
            values: values.map(number).to_vec(),
            limits: self.limits,
            rounds,
            operands: vec![
                ("source", Some(View { name: "source", ..part(&source) })),
                ("total", Some(View { name: "total", ..part(&total) })),
            ],
        };
        self.dispatches.push(builder.dispatch(count.unsigned_abs().div_ceil(u64::from(THREADS)))?);
        Ok(())
    }
}

/// Constants of a pass: switches and numbers.
type Switches<'c> = (&'c [(&'static str, bool)], &'c [(&'static str, u32)]);

/// How the pass by queries shares out its work in one part.
struct Walks {
    /// Entries along batch, rows and heads: those of the bias.
    entry: [i64; 3],
    /// How many batches, rows and heads broadcast to each.
    walk: [i64; 3],
}

impl Walks {
    fn of(part: &Part, sizes: &Sizes, shape: [i64; 5]) -> Self {
        let outer = [part.batch[1], part.rows[1], part.heads[1] * sizes.group];
        Self {
            entry: std::array::from_fn(|axis| if shape[axis] > 1 { outer[axis] } else { 1 }),
            walk: std::array::from_fn(|axis| if shape[axis] > 1 { 1 } else { outer[axis] }),
        }
    }

    fn entries(&self) -> i64 {
        self.entry.iter().product()
    }

    fn steps(&self) -> i64 {
        self.walk.iter().product()
    }

    /// Pieces of a walk, by the sizes alone.
    fn chunks(&self, tiles: i64, groups: i64) -> i64 {
        let wanted = groups / (tiles * self.entries());
        wanted.min(self.steps() / LEAST_CHUNK).clamp(1, MOST_CHUNKS)
    }
}

/// Strides of a gradient in the workspace: neighbouring threads, which have neighbouring queries, write neighbours.
fn keys_before_queries(shape: [i64; 5]) -> [i64; 5] {
    let [_, rows, heads, queries, keys] = shape;
    let tile = queries * keys;
    let strides = [rows * heads * tile, heads * tile, tile, 1, queries];
    std::array::from_fn(|axis| if shape[axis] == 1 { 0 } else { strides[axis] })
}

fn switch((name, switch): (&'static str, bool)) -> (&'static str, Constant) {
    (name, Constant::Switch(switch))
}

fn quads(channels: i64) -> i64 {
    4 * ((channels + 3) / 4)
}

/// Rows of some operands are read by all threads of a workgroup together.
fn share(views: &mut [Named], names: &[&str]) {
    for (name, view) in views {
        if let Some(view) = view {
            view.shared = names.contains(name);
        }
    }
}

fn in_part(views: &[Named], part: &Part, group: i64) -> Vec<Named> {
    views.iter().map(|(name, view)| (*name, view.map(|view| view.part(part, group)))).collect()
}

/// The shared text names inputs that this kernel has no use for.
fn with_absent_inputs(mut views: Vec<Named>) -> Vec<Named> {
    let names = ["key_mask", "q_segments", "k_segments", "kv_lengths", "slopes"];
    views.extend(BIAS_NAMES.into_iter().chain(names).map(|name| (name, None)));
    views
}

#[cfg(test)]
mod tests {
    use tilefold_core::{AttentionSpec, DType};

    use super::*;

    #[test]
    fn more_logits_than_can_be_counted_are_planned() {
        let limits = Limits {
            binding_bytes: u64::MAX,
            storage_buffers: 10,
            offset_alignment: 256,
            workgroups: 65_535,
            subgroup: 1,
            workgroup_bytes: 0,
            loop_rounds: u64::MAX,
            software: false,
        };
        let spec = AttentionSpec::new(DType::F16, 1, 1 << 5, 1 << 28, 1 << 2, 1).with_all_gradients();
        let bytes = backward_workspace_bytes(&AttentionProblem::new(spec).unwrap(), &limits).unwrap();
        // Four f32 for each query of each head.
        assert_eq!(bytes, 16 << 35);
    }
}
