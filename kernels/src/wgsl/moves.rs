//! Strided copies, sums, fills and merges.

use tilefold_core::{DType, Element, Layout, MergeOperands, TensorView};

use crate::axes::Axes;
use crate::kernel::KernelError;
use crate::params::{MAX_LAYOUT_AXES, Operand};
use crate::wgsl::attention::{Sizes, THREADS};
use crate::wgsl::dispatch::{Builder, Dispatch, DispatchError, Limits, Part, View, number, parts, wrapped};
use crate::wgsl::shader::{Constant, Elements, File};

/// Most elements of one dispatch: their numbers, rounded up to workgroups, are 32 bits.
pub(crate) const MAX_ELEMENTS: i64 = 1 << 31;

/// Fields of the argument of copies.
const RELAYOUT_SCALARS: &[(&str, &str)] =
    &[("groups", "u32"), ("groups_x", "u32"), ("count", "u32"), ("zero", "u32"), ("axes", "array<vec4<u32>, 8>")];

/// Fields of the argument of fills.
const FILL_SCALARS: &[(&str, &str)] =
    &[("groups", "u32"), ("groups_x", "u32"), ("count", "u32"), ("value", "u32"), ("axes", "array<vec4<u32>, 8>")];

/// The dispatches that copy `source` to `destination`, which a [`tilefold_core::RelayoutArgs`] has checked.
///
/// # Errors
/// [`DispatchError`].
pub fn relayout(
    source: &TensorView<'_>,
    destination: &TensorView<'_>,
    limits: &Limits,
) -> Result<Vec<Dispatch>, DispatchError> {
    let axes = Axes::new(source.layout(), destination.layout()).map_err(too_many_axes)?;
    let (from, to) = (source.dtype(), destination.dtype());
    let kinds = if from == to { [0; 2] } else { [kind(from), kind(to)] };
    let constants = vec![
        ("THREADS", Constant::Number(THREADS)),
        ("NATIVE_EXP", Constant::Switch(false)),
        ("AXES", Constant::Number(number(axes.compiled()))),
        ("SOURCE", Constant::Number(kinds[0])),
        ("DESTINATION", Constant::Number(kinds[1])),
    ];
    let moves = Moves {
        file: File::Relayout,
        constants,
        value: 0,
        source: Some(Side::of("source", source, axes.source_start)),
        destination: Side::of("destination", destination, axes.destination_start),
        limits,
    };
    let mut dispatches = Vec::new();
    moves.cut(Box::of(&axes), &mut dispatches)?;
    Ok(dispatches)
}

/// The dispatches that add `source` to `destination`, which a [`tilefold_core::AccumulateArgs`] has checked.
///
/// # Errors
/// [`DispatchError`].
pub fn accumulate(
    source: &TensorView<'_>,
    destination: &TensorView<'_>,
    limits: &Limits,
) -> Result<Vec<Dispatch>, DispatchError> {
    let axes = Axes::new(source.layout(), destination.layout()).map_err(too_many_axes)?;
    let numbers = |side: Side, view: &TensorView<'_>| Side { elements: Elements::Numbers(view.dtype()), ..side };
    let moves = Moves {
        file: File::Accumulate,
        constants: vec![
            ("THREADS", Constant::Number(THREADS)),
            ("NATIVE_EXP", Constant::Switch(false)),
            ("AXES", Constant::Number(number(axes.compiled()))),
        ],
        value: 0,
        source: Some(numbers(Side::of("source", source, axes.source_start), source)),
        destination: numbers(Side::of("destination", destination, axes.destination_start), destination),
        limits,
    };
    let mut dispatches = Vec::new();
    moves.cut(Box::of(&axes), &mut dispatches)?;
    Ok(dispatches)
}

/// The dispatches that set every element of a view to `value`, rounded to its dtype.
///
/// # Errors
/// [`DispatchError`].
pub fn fill(view: &TensorView<'_>, value: f64, limits: &Limits) -> Result<Vec<Dispatch>, DispatchError> {
    // An axis whose entries share a place is written once.
    let layout = view.layout();
    let once = |(&size, &stride): (&usize, &i64)| if stride == 0 { 1 } else { size };
    let shape: Vec<usize> = layout.shape().iter().zip(layout.strides()).map(once).collect();
    let once = Layout::new(&shape, layout.strides(), 0).unwrap_or_else(|_| layout.clone());
    let axes = Axes::new(&once, &once).map_err(too_many_axes)?;
    let constants = vec![("THREADS", Constant::Number(THREADS)), ("AXES", Constant::Number(number(axes.compiled())))];
    let moves = Moves {
        file: File::Fill,
        constants,
        value: bits(view.dtype(), value),
        source: None,
        destination: Side::of("destination", view, axes.destination_start),
        limits,
    };
    let mut dispatches = Vec::new();
    moves.cut(Box::of(&axes), &mut dispatches)?;
    Ok(dispatches)
}

/// The dispatches that copy one view to another of the same sizes, rounding where the dtypes differ.
///
/// # Errors
/// [`DispatchError`].
pub(crate) fn copy_view(source: &View, destination: &View, limits: &Limits) -> Result<Vec<Dispatch>, DispatchError> {
    let kinds = match (source.elements, destination.elements) {
        (Elements::Numbers(from), Elements::Numbers(to)) if from != to => [kind(from), kind(to)],
        _ => [0; 2],
    };
    let constants = vec![
        ("THREADS", Constant::Number(THREADS)),
        ("NATIVE_EXP", Constant::Switch(false)),
        ("AXES", Constant::Number(number(MAX_LAYOUT_AXES))),
        ("SOURCE", Constant::Number(kinds[0])),
        ("DESTINATION", Constant::Number(kinds[1])),
    ];
    let side = |name, view: &View| {
        let bytes = number(view.size_bytes());
        Side { name, elements: Elements::Bits(bytes), bytes, address: view.address }
    };
    let moves = Moves {
        file: File::Relayout,
        constants,
        value: 0,
        source: Some(side("source", source)),
        destination: side("destination", destination),
        limits,
    };
    // Axes that are not there are outermost.
    let padded = |fill, values: [i64; 5]| {
        let mut array = [fill; MAX_LAYOUT_AXES];
        array[MAX_LAYOUT_AXES - 5..].copy_from_slice(&values);
        array
    };
    let part = Box {
        sizes: padded(1, source.sizes),
        source: padded(0, source.strides),
        destination: padded(0, destination.strides),
        offsets: [0, 0],
    };
    let mut dispatches = Vec::new();
    moves.cut(part, &mut dispatches)?;
    Ok(dispatches)
}

/// The dispatches that set so many f32 in a row to 0.
///
/// # Errors
/// [`DispatchError`].
pub(crate) fn zeros(address: u64, elements: i64, limits: &Limits) -> Result<Vec<Dispatch>, DispatchError> {
    let [mut sizes, mut strides] = [[1; MAX_LAYOUT_AXES], [0; MAX_LAYOUT_AXES]];
    let last = MAX_LAYOUT_AXES - 1;
    (sizes[last], strides[last]) = (elements, 1);
    let moves = Moves {
        file: File::Fill,
        constants: vec![("THREADS", Constant::Number(THREADS)), ("AXES", Constant::Number(number(MAX_LAYOUT_AXES)))],
        value: 0,
        source: None,
        destination: Side { name: "dbias", elements: Elements::Bits(4), bytes: 4, address },
        limits,
    };
    let mut dispatches = Vec::new();
    moves.cut(Box { sizes, source: strides, destination: strides, offsets: [0, 0] }, &mut dispatches)?;
    Ok(dispatches)
}

fn too_many_axes(error: KernelError) -> DispatchError {
    match error {
        KernelError::Limit { what, limit, got } => DispatchError::Limit { what, limit, got },
        KernelError::MissingSource { .. } => DispatchError::Limit { what: "the number of sources", limit: 0, got: 0 },
    }
}

fn kind(dtype: DType) -> u32 {
    match dtype {
        DType::F16 => 2,
        DType::BF16 => 3,
        _ => 1,
    }
}

fn bits(dtype: DType, value: f64) -> u32 {
    match dtype {
        DType::F16 => u32::from(<half::f16 as Element>::from_f64(value).to_bits()),
        DType::BF16 => u32::from(<half::bf16 as Element>::from_f64(value).to_bits()),
        DType::I32 => i32::from_f64(value).cast_unsigned(),
        DType::Bool => u32::from(value != 0.0),
        _ => f32::from_f64(value).to_bits(),
    }
}

/// Elements of one tensor that are moved.
struct Side {
    name: &'static str,
    /// How the kernel takes them.
    elements: Elements,
    /// Of one element.
    bytes: u32,
    /// Address of the first element of the axes.
    address: u64,
}

impl Side {
    fn of(name: &'static str, view: &TensorView<'_>, start: i64) -> Self {
        let bytes = view.dtype().size_bytes();
        let address = crate::axes::moved(view.origin().addr() as u64, start, bytes);
        Self { name, elements: Elements::Bits(number(bytes)), bytes: number(bytes), address }
    }

    /// Its part in a box whose first element lies `offset` elements on.
    fn view(&self, sizes: &[i64], strides: &[i64], offset: i64) -> View {
        // Axes beyond five lie inside the reach of one: only the reach of a binding is asked for.
        let reach = |forwards: bool| {
            let steps = sizes.iter().zip(strides).map(|(size, stride)| (size - 1) * stride);
            steps.filter(|&step| (step > 0) == forwards).sum::<i64>()
        };
        let [forwards, backwards] = [true, false].map(reach);
        View {
            elements: self.elements,
            strides: [forwards, backwards, 0, 0, 0],
            ..View::dense(self.name, crate::axes::moved(self.address, offset, self.bytes as usize), [2, 2, 1, 1, 1])
        }
    }
}

/// A part of the elements of both tensors.
#[derive(Clone)]
struct Box {
    sizes: [i64; MAX_LAYOUT_AXES],
    source: [i64; MAX_LAYOUT_AXES],
    destination: [i64; MAX_LAYOUT_AXES],
    /// Elements from the first ones.
    offsets: [i64; 2],
}

impl Box {
    fn of(axes: &Axes) -> Self {
        Self {
            sizes: axes.sizes(),
            source: axes.source_strides(),
            destination: axes.destination_strides(),
            offsets: [0, 0],
        }
    }

    fn count(&self) -> i64 {
        self.sizes.iter().product()
    }

    /// Two halves along the outermost axis that has more than one entry.
    fn halves(&self) -> Option<[Self; 2]> {
        let axis = self.sizes.iter().position(|&size| size > 1)?;
        let (mut first, mut second) = (self.clone(), self.clone());
        first.sizes[axis] = self.sizes[axis] / 2;
        second.sizes[axis] -= first.sizes[axis];
        second.offsets[0] += first.sizes[axis] * self.source[axis];
        second.offsets[1] += first.sizes[axis] * self.destination[axis];
        Some([first, second])
    }
}

struct Moves<'a> {
    file: File,
    constants: Vec<(&'static str, Constant)>,
    value: u32,
    source: Option<Side>,
    destination: Side,
    limits: &'a Limits,
}

impl Moves<'_> {
    /// Dispatches for a box: one, or those of its halves where bindings cannot show it.
    fn cut(&self, part: Box, dispatches: &mut Vec<Dispatch>) -> Result<(), DispatchError> {
        let destination = self.destination.view(&part.sizes, &part.destination, part.offsets[1]).written();
        let source = self.source.as_ref().map(|source| source.view(&part.sizes, &part.source, part.offsets[0]));
        let limit = self.limits.binding_bytes;
        let fits = |view: &View| view.binding(self.limits).bytes <= limit;
        if part.count() > MAX_ELEMENTS || !fits(&destination) || !source.as_ref().is_none_or(fits) {
            let halves = part.halves().ok_or(DispatchError::Binding { operand: "an element", bytes: 4, limit })?;
            return halves.into_iter().try_for_each(|half| self.cut(half, dispatches));
        }
        let mut values = vec![number(part.count()), self.value];
        for axis in 0..MAX_LAYOUT_AXES {
            values.extend([number(part.sizes[axis]), wrapped(part.source[axis]), wrapped(part.destination[axis]), 0]);
        }
        let mut operands = vec![("destination", Some(destination))];
        if let Some(source) = source {
            operands.insert(0, ("source", Some(source)));
        }
        let builder = Builder {
            file: self.file,
            constants: self.constants.clone(),
            scalars: if self.file == File::Fill { FILL_SCALARS } else { RELAYOUT_SCALARS },
            values,
            limits: self.limits,
            rounds: MAX_LAYOUT_AXES as u64 + 1,
            operands,
        };
        let groups = part.count().unsigned_abs().div_ceil(u64::from(THREADS));
        dispatches.push(builder.dispatch(groups)?);
        Ok(())
    }
}

/// Fields of the argument of a merge.
const MERGE_SCALARS: &[(&str, &str)] = &[
    ("groups", "u32"),
    ("groups_x", "u32"),
    ("count", "u32"),
    ("rows", "u32"),
    ("heads", "u32"),
    ("seqlen_q", "u32"),
    ("channels", "u32"),
    ("zero", "u32"),
];

/// The dispatches that add a part into its accumulator; a [`tilefold_core::MergeArgs`] has checked the operands.
///
/// # Errors
/// [`DispatchError`].
pub fn merge(operands: &MergeOperands<'_>, limits: &Limits) -> Result<Vec<Dispatch>, DispatchError> {
    let shape = |axis: usize| operands.out.shape().get(axis).map_or(1, |&size| i64::try_from(size).unwrap_or(i64::MAX));
    let sizes = Sizes {
        batch: shape(0),
        rows: shape(1),
        seqlen_q: shape(2),
        heads: shape(3),
        kv_heads: shape(3),
        group: 1,
        seqlen_k: 1,
        head_dim: shape(4),
        head_dim_v: shape(4),
    };
    let out = |name, view: &TensorView<'_>| View {
        quads: false,
        ..sizes.by_query(name, view.dtype(), &Operand::of(view), sizes.head_dim_v)
    };
    let statistic = |name, view: &TensorView<'_>| sizes.statistic(name, &Operand::of(view));
    let views = [
        out("out", &operands.out),
        statistic("lse", &operands.lse),
        statistic("lse_low", &operands.lse_low),
        out("acc_out", operands.acc_out.as_view()).written(),
        statistic("acc_lse", operands.acc_lse.as_view()).written(),
        statistic("acc_lse_low", operands.acc_lse_low.as_view()).written(),
    ];
    let dispatch = |part: &Part| {
        let count = part.batch[1] * part.rows[1] * part.heads[1] * sizes.seqlen_q;
        if count > MAX_ELEMENTS {
            let (what, limit) = ("the number of queries of all heads", MAX_ELEMENTS.unsigned_abs());
            return Err(DispatchError::Limit { what, limit, got: count.unsigned_abs() });
        }
        let numbers = [count, part.rows[1], part.heads[1], sizes.seqlen_q, sizes.head_dim_v, 0];
        let builder = Builder {
            file: File::Merge,
            constants: vec![
                ("THREADS", Constant::Number(THREADS)),
                ("NATIVE_EXP", Constant::Switch(limits.native_exp())),
            ],
            scalars: MERGE_SCALARS,
            values: numbers.map(number).to_vec(),
            limits,
            rounds: sizes.head_dim_v.unsigned_abs() + 1,
            operands: views.iter().map(|view| (view.name, Some(view.part(part, 1)))).collect(),
        };
        builder.dispatch(count.unsigned_abs().div_ceil(u64::from(THREADS)))
    };
    parts(sizes.outer(), 1, &views, limits)?.iter().map(dispatch).collect()
}
