//! Rotary position embedding.

use tilefold_core::{RopeAngle, RopePairs, RopeSpec, TensorView};

use crate::params::{MAX_ROPE_PAIRS, Operand};
use crate::wgsl::attention::{Sizes, THREADS};
use crate::wgsl::dispatch::{Builder, Dispatch, DispatchError, Limits, Part, View, number, parts_with};
use crate::wgsl::moves::MAX_ELEMENTS;
use crate::wgsl::shader::{Constant, File};

/// Fields of the argument: whole lines of four words before the array of [`MAX_ROPE_PAIRS`] angles.
const SCALARS: &[(&str, &str)] = &[
    ("groups", "u32"),
    ("groups_x", "u32"),
    ("count", "u32"),
    ("rows", "u32"),
    ("heads", "u32"),
    ("seqlen", "u32"),
    ("pairs", "u32"),
    ("slots", "u32"),
    ("zero", "u32"),
    ("zero1", "u32"),
    ("zero2", "u32"),
    ("zero3", "u32"),
    ("angles", "array<vec4<u32>, 128>"),
];

/// The dispatches that turn `source` into `destination`, which a [`tilefold_core::RopeArgs`] has checked; `angles` are its
/// own.
///
/// # Errors
/// [`DispatchError`].
pub fn rope(
    spec: &RopeSpec,
    angles: &[RopeAngle],
    source: &TensorView<'_>,
    destination: &TensorView<'_>,
    limits: &Limits,
) -> Result<Vec<Dispatch>, DispatchError> {
    let shape = |axis: usize| source.shape().get(axis).map_or(1, |&size| i64::try_from(size).unwrap_or(i64::MAX));
    let [batch, rows, seqlen, heads, head_dim] = std::array::from_fn(shape);
    let sizes = Sizes {
        batch,
        rows,
        seqlen_q: seqlen,
        heads,
        kv_heads: heads,
        group: 1,
        seqlen_k: 1,
        head_dim,
        head_dim_v: head_dim,
    };
    let side = |name, view: &TensorView<'_>| View {
        quads: false,
        ..sizes.by_query(name, view.dtype(), &Operand::of(view), head_dim)
    };
    let views = [side("source", source), side("destination", destination).written()];
    let pairs = angles.len() as i64;
    let slots = head_dim - pairs;
    let words = angle_words(angles);
    let rounds = |part: &Part| part.heads[1].unsigned_abs() + 1;
    let dispatch = |part: &Part| {
        let count = part.batch[1] * part.rows[1] * seqlen * slots;
        if count > MAX_ELEMENTS {
            let (what, limit) = ("the number of pairs of channels of all positions", MAX_ELEMENTS.unsigned_abs());
            return Err(DispatchError::Limit { what, limit, got: count.unsigned_abs() });
        }
        let numbers = [count, part.rows[1], part.heads[1], seqlen, pairs, slots, 0, 0, 0, 0];
        let builder = Builder {
            file: File::Rope,
            constants: vec![
                ("THREADS", Constant::Number(THREADS)),
                ("NATIVE_EXP", Constant::Switch(false)),
                ("INTERLEAVED", Constant::Switch(spec.pairs == RopePairs::Interleaved)),
            ],
            scalars: SCALARS,
            values: numbers.map(number).into_iter().chain(words.iter().copied()).collect(),
            limits,
            rounds: rounds(part),
            operands: views.iter().map(|view| (view.name, Some(view.part(part, 1)))).collect(),
        };
        builder.dispatch(count.unsigned_abs().div_ceil(u64::from(THREADS)))
    };
    let is_too_long = |part: &Part| rounds(part) > limits.loop_rounds;
    parts_with(sizes.outer(), 1, &views, limits, is_too_long)?.iter().map(dispatch).collect()
}

/// Angles as the kernel reads them, lower halves first; room for all that there may be.
fn angle_words(angles: &[RopeAngle]) -> Vec<u32> {
    let halves = |turn: u64| [number(turn & 0xffff_ffff), number(turn >> 32)];
    let mut words: Vec<u32> =
        angles.iter().flat_map(|angle| [halves(angle.first), halves(angle.step)].concat()).collect();
    words.resize(4 * MAX_ROPE_PAIRS, 0);
    words
}
