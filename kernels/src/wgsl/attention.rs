//! What the passes of attention share: operands, constants, scalars.

use tilefold_core::{AttentionProblem, AttentionSpec, DType, EmptyRows};

use crate::params::Operand;
use crate::wgsl::dispatch::{DispatchError, Heads, Limits, Part, View, number};
use crate::wgsl::shader::{Constant, Elements, slices};

/// Keys of one step where heads are wide: one bit of a word for each. Where rows go through the workgroup's memory, as many
/// as fit it.
const WIDE_STEP: u32 = 32;
const STAGED_WIDE_STEP: u32 = 8;

/// Threads of a workgroup.
pub(crate) const THREADS: u32 = 64;

/// What both passes read, with addresses and strides as `tilefold_kernels::AttentionOperands` has them.
pub type Operands = crate::AttentionOperands;

/// Orders of axes from the contract's to batch, row, head, position, last.
const ROWS: [usize; 5] = [0, 1, 3, 2, 4];
const LOGITS: [usize; 5] = [0, 1, 2, 3, 4];

/// Longest sequence: positions and their differences are 32-bit numbers.
const MAX_SEQLEN: u64 = 1 << 30;

/// Sizes of a problem.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Sizes {
    pub(crate) batch: i64,
    pub(crate) rows: i64,
    pub(crate) heads: i64,
    pub(crate) kv_heads: i64,
    pub(crate) group: i64,
    pub(crate) seqlen_q: i64,
    pub(crate) seqlen_k: i64,
    pub(crate) head_dim: i64,
    pub(crate) head_dim_v: i64,
}

impl Sizes {
    /// # Errors
    /// [`DispatchError::Limit`] for a sequence that 32-bit positions do not reach.
    pub(crate) fn of(problem: &AttentionProblem) -> Result<Self, DispatchError> {
        let spec = problem.spec();
        let size = |what, size: usize, limit: u64| match i64::try_from(size) {
            Ok(size) if size.unsigned_abs() <= limit => Ok(size),
            _ => Err(DispatchError::Limit { what, limit, got: size as u64 }),
        };
        let (long, any) = (MAX_SEQLEN, u64::from(u32::MAX));
        Ok(Self {
            batch: size("batch", spec.batch, any)?,
            rows: size("rows", spec.rows, any)?,
            heads: size("heads", spec.heads, any)?,
            kv_heads: size("kv_heads", spec.kv_heads, any)?,
            group: size("heads", problem.group(), any)?,
            seqlen_q: size("seqlen_q", spec.seqlen_q, long)?,
            seqlen_k: size("seqlen_k", spec.seqlen_k, long)?,
            head_dim: size("head_dim", spec.head_dim, any)?,
            head_dim_v: size("head_dim_v", spec.head_dim_v, any)?,
        })
    }

    /// Sizes of the axes along which a call can be cut.
    pub(crate) fn outer(&self) -> [i64; 3] {
        [self.batch, self.rows, self.kv_heads]
    }

    fn view(
        &self,
        name: &'static str,
        elements: Elements,
        operand: &Operand,
        order: [usize; 5],
        sizes: [i64; 5],
        heads: Heads,
    ) -> View {
        let strides = order.map(|axis| if axis < 5 { operand.strides[axis] } else { 0 });
        // An axis without a stride is broadcast, or has one entry.
        let sizes = std::array::from_fn(|axis| if strides[axis] == 0 { 1 } else { sizes[axis] });
        View { elements, strides, sizes, heads, ..View::dense(name, operand.data, sizes) }
    }

    /// Rows of channels by query and query head.
    pub(crate) fn by_query(&self, name: &'static str, dtype: DType, operand: &Operand, channels: i64) -> View {
        let sizes = [self.batch, self.rows, self.heads, self.seqlen_q, channels];
        let view = self.view(name, Elements::Numbers(dtype), operand, ROWS, sizes, Heads::Query);
        with_channels(view, channels)
    }

    /// Rows of channels by key and key head.
    pub(crate) fn by_key(&self, name: &'static str, dtype: DType, operand: &Operand, channels: i64) -> View {
        let sizes = [self.batch, self.rows, self.kv_heads, self.seqlen_k, channels];
        let view = self.view(name, Elements::Numbers(dtype), operand, ROWS, sizes, Heads::Key);
        with_channels(view, channels)
    }

    /// What threads of a wide head add up, at an address of the workspace: `quads` of f32 for each position, up to a whole
    /// `tile` of them, since threads beyond the end work too.
    pub(crate) fn sums(&self, address: u64, heads: Heads, tile: u32, quads: u32) -> View {
        let (positions, tile) = (if heads == Heads::Query { self.seqlen_q } else { self.seqlen_k }, i64::from(tile));
        let positions = (positions + tile - 1) / tile * tile;
        let count = if heads == Heads::Query { self.heads } else { self.kv_heads };
        let sizes = [self.batch, self.rows, count, positions, 4 * i64::from(quads)];
        View { quads: true, heads, ..View::dense("sums", address, sizes) }.written()
    }

    /// One f32 by query and query head: strides by batch, row, head, query.
    pub(crate) fn statistic(&self, name: &'static str, operand: &Operand) -> View {
        let sizes = [self.batch, self.rows, self.heads, self.seqlen_q, 1];
        self.view(name, Elements::Numbers(DType::F32), operand, [0, 1, 2, 3, ABSENT], sizes, Heads::Query)
    }

    /// A bias, or what has its shape.
    pub(crate) fn bias(&self, name: &'static str, dtype: DType, operand: &Operand) -> View {
        let sizes = [self.batch, self.rows, self.heads, self.seqlen_q, self.seqlen_k];
        self.view(name, Elements::Numbers(dtype), operand, LOGITS, sizes, Heads::Query)
    }

    /// A list by batch, row and position.
    fn list(&self, name: &'static str, dtype: DType, operand: &Operand, length: i64) -> View {
        let sizes = [self.batch, self.rows, 1, length, 1];
        self.view(name, Elements::Numbers(dtype), operand, [0, 1, ABSENT, 2, ABSENT], sizes, Heads::Query)
    }
}

/// An axis that an operand does not have.
const ABSENT: usize = 5;

/// The last axis are channels, even if there is one.
fn with_channels(mut view: View, channels: i64) -> View {
    view.sizes[4] = channels;
    if channels == 1 {
        view.strides[4] = 1;
    }
    view.quads = true;
    view
}

/// Names of biases in the texts.
pub(crate) const BIAS_NAMES: [&str; 4] = ["bias0", "bias1", "bias2", "bias3"];

/// What all passes read, in the order of the argument, with `None` for what the problem lacks.
pub(crate) fn inputs(sizes: &Sizes, spec: &AttentionSpec, operands: &Operands) -> Vec<(&'static str, Option<View>)> {
    let mut views = vec![
        ("q", Some(sizes.by_query("q", spec.dtype, &operands.q, sizes.head_dim))),
        ("k", Some(sizes.by_key("k", spec.dtype, &operands.k, sizes.head_dim))),
        ("v", Some(sizes.by_key("v", spec.dtype, &operands.v, sizes.head_dim_v))),
    ];
    for (i, name) in BIAS_NAMES.into_iter().enumerate() {
        let bias = operands.biases.get(i).zip(spec.biases.get(i));
        views.push((name, bias.map(|(operand, bias)| sizes.bias(name, bias.dtype, operand))));
    }
    let mask = operands.key_mask.as_ref();
    views.push(("key_mask", mask.map(|mask| sizes.list("key_mask", DType::Bool, mask, sizes.seqlen_k))));
    let segments = operands.segments.as_ref();
    let q_segments = segments.map(|[q, _]| sizes.list("q_segments", DType::I32, q, sizes.seqlen_q));
    let k_segments = segments.map(|[_, k]| sizes.list("k_segments", DType::I32, k, sizes.seqlen_k));
    views.extend([("q_segments", q_segments), ("k_segments", k_segments)]);
    let lengths = operands.kv_lengths.as_ref();
    let words = |mut view: View| {
        view.elements = Elements::Words;
        view
    };
    views.push(("kv_lengths", lengths.map(|list| words(sizes.list("kv_lengths", DType::I32, list, 1)))));
    let slopes = operands.alibi_slopes.map(|data| {
        let operand = Operand { data, strides: [0, 0, 1, 0, 0] };
        let sizes_of = [1, 1, sizes.heads, 1, 1];
        sizes.view("slopes", Elements::Words, &operand, LOGITS, sizes_of, Heads::Query)
    });
    views.push(("slopes", slopes));
    views
}

/// Inputs that are copied into one array where a device has too few storage buffers.
pub(crate) fn is_small(name: &str) -> bool {
    !matches!(name, "q" | "k" | "v")
}

/// Constants of a problem.
pub(crate) fn constants(spec: &AttentionSpec, limits: &Limits) -> Vec<(&'static str, Constant)> {
    let [q, v] = [spec.head_dim, spec.head_dim_v].map(|channels| slices(number(channels)));
    vec![
        ("THREADS", Constant::Number(THREADS)),
        ("NATIVE_EXP", Constant::Switch(limits.native_exp())),
        ("Q_SLICES", Constant::Number(q[0])),
        ("Q_SLICE", Constant::Number(q[1])),
        ("Q_QUADS", Constant::Number(q[0] * q[1])),
        ("V_SLICES", Constant::Number(v[0])),
        ("V_SLICE", Constant::Number(v[1])),
        ("V_QUADS", Constant::Number(v[0] * v[1])),
        ("WIDE", Constant::Switch(is_wide(spec))),
        ("BIASES", Constant::Number(number(spec.biases.len()))),
        ("KEY_MASK", Constant::Switch(spec.key_mask)),
        ("KV_LENGTHS", Constant::Switch(spec.kv_lengths.is_some())),
        ("SEGMENTS", Constant::Switch(spec.segments)),
        ("BAND", Constant::Switch(spec.mask.restricts())),
        ("ALIBI", Constant::Switch(spec.mask.alibi_slopes.is_some())),
        ("GATE", Constant::Switch(spec.gate)),
        ("UNIFORM", Constant::Switch(spec.empty_rows == EmptyRows::Uniform)),
    ]
}

/// Whether a thread's rows are more than its registers hold at a time.
pub(crate) fn is_wide(spec: &AttentionSpec) -> bool {
    [spec.head_dim, spec.head_dim_v].iter().any(|&channels| slices(number(channels))[0] > 1)
}

/// Quads of channels of the rows of q and k, and of those of v, as threads take them.
pub(crate) fn quads(spec: &AttentionSpec) -> [u32; 2] {
    [spec.head_dim, spec.head_dim_v].map(|channels| slices(number(channels)).iter().product())
}

/// Keys (or queries) of one step of a walk: `narrow`, or where rows lie in memory as many as make up for going through it.
pub(crate) fn step(spec: &AttentionSpec, limits: &Limits, narrow: u32) -> u32 {
    match (is_wide(spec), limits.workgroup_bytes) {
        (false, _) => narrow,
        (true, 0) => WIDE_STEP,
        (true, _) => STAGED_WIDE_STEP,
    }
}

/// Rounds that the loops of a thread make in a walk over so many keys or queries, at most, where compilers write out short
/// loops: those over quads and over what a thread owns, and all of a narrow head's step but one. In a step, loops over its
/// neighbours and over slices of rows of q, and of v, come so many times.
///
/// Measured on llvmpipe by the length from which results are wrong: 1 or 2 rounds a key in narrow heads, in heads of 72
/// channels 8.6 forward, 11.8 by queries and 14.1 by keys, where this says 10.5, 13.7 and 16.9.
pub(crate) fn rounds(
    spec: &AttentionSpec,
    limits: &Limits,
    narrow: u32,
    [with_q, with_v]: [u64; 2],
    positions: i64,
) -> u64 {
    /// Loops over a step's neighbours beside those of products.
    const OTHER_LOOPS: u64 = 4;
    let step = u64::from(step(spec, limits, narrow));
    let [q, v] = [spec.head_dim, spec.head_dim_v].map(|channels| slices(number(channels)).map(u64::from));
    let of_step =
        if is_wide(spec) { (step + 2) * (with_q * q[0] + with_v * v[0]) + OTHER_LOOPS * (step + 1) } else { step };
    // Before and behind, each quad once or twice.
    let around = 64 + 4 * (q[0] * q[1] + v[0] * v[1]);
    positions.unsigned_abs().div_ceil(step) * (of_step + 1) + around
}

/// Keys that a tile of queries walks over, at most; or queries, for a tile of keys.
pub(crate) fn walked(problem: &AttentionProblem, positions: i64, tile: u32) -> i64 {
    let (low, high) = problem.spec().mask.visible_distances();
    let band = high.saturating_sub(low).saturating_add(i64::from(tile));
    positions.min(band.saturating_add(1).max(0))
}

/// Fields of the argument of every pass.
pub(crate) const SCALARS: &[(&str, &str)] = &[
    ("groups", "u32"),
    ("groups_x", "u32"),
    ("tiles", "u32"),
    ("rows", "u32"),
    ("heads", "u32"),
    ("group", "u32"),
    ("seqlen_q", "u32"),
    ("seqlen_k", "u32"),
    ("lowest", "i32"),
    ("highest", "i32"),
    ("near_offset", "i32"),
    ("far_offset", "f32"),
    ("scale", "f32"),
    ("minus_infinity", "f32"),
    ("zero", "u32"),
];

/// Their values, but for the first two.
#[allow(clippy::cast_possible_truncation, reason = "numbers that are rounded or bounded on purpose")]
pub(crate) fn scalars(problem: &AttentionProblem, sizes: &Sizes, part: &Part, tiles: u32) -> Vec<u32> {
    let mask = &problem.spec().mask;
    let offset = mask.k_offset.saturating_sub(mask.q_offset);
    let (low, high) = mask.visible_distances();
    // Differences of indices lie within the lengths; a bound beyond all of them is as good as any.
    let bound = |distance: i64| {
        let index = distance.saturating_sub(offset);
        index.clamp(-sizes.seqlen_q - 1, sizes.seqlen_k + 1) as i32
    };
    let is_near = offset.unsigned_abs() <= MAX_SEQLEN / 2;
    vec![
        tiles,
        number(part.rows[1]),
        number(part.heads[1] * sizes.group),
        number(sizes.group),
        number(sizes.seqlen_q),
        number(sizes.seqlen_k),
        bound(low).cast_unsigned(),
        bound(high).cast_unsigned(),
        if is_near { (offset as i32).cast_unsigned() } else { 0 },
        if is_near { 0.0_f32 } else { offset as f32 }.to_bits(),
        (problem.softmax_scale() as f32).to_bits(),
        f32::NEG_INFINITY.to_bits(),
        0,
    ]
}

/// Positions that a thread owns: as many as its registers hold, `numbers` for each; one in wide heads, since the time of
/// compilers goes with what is written out.
pub(crate) fn per_thread(spec: &AttentionSpec, numbers: i64, limits: &Limits) -> u32 {
    if is_wide(spec) {
        return 1;
    }
    let room = if limits.software { 256 } else { 128 };
    [4, 2].into_iter().find(|&count| i64::from(count) * numbers <= room).unwrap_or(1)
}

/// No more of them than a sequence has for every thread.
pub(crate) fn needed(count: u32, positions: i64) -> u32 {
    let threads = i64::from(THREADS);
    [1, 2].into_iter().find(|&few| few < count && positions <= threads * i64::from(few)).unwrap_or(count)
}
