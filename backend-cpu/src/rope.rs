//! Rotary position embedding: equations (19)-(21).

use half::{bf16, f16};
use rayon::prelude::*;
use tilefold_core::{DType, Layout, MAX_HEAD_DIM, RopeAngle, RopeArgs, RopePairs};

use crate::arch::{Arch, BLOCK, Halves};
use crate::attention::Float;
use crate::walk::Origin;

/// Positions whose sines and cosines are kept: 16 KiB of them.
const POSITIONS: usize = 16;
const PAIRS: usize = MAX_HEAD_DIM / 2;

/// Turns the pairs of every head.
pub(crate) fn rope(arch: Arch, args: RopeArgs<'_>) {
    let (dtype, spec, angles) = (args.dtype(), args.spec().clone(), args.spec().angles());
    let (source, mut destination) = args.into_parts();
    let rotation = Rotation {
        arch,
        angles,
        interleaved: spec.pairs == RopePairs::Interleaved,
        shape: std::array::from_fn(|axis| source.shape()[axis]),
        strides: [strides(source.layout()), strides(destination.as_view().layout())],
        source: Origin::read(&source),
        destination: Origin::write(&mut destination),
    };
    match dtype {
        DType::F32 => rotation.run::<f32>(),
        DType::F16 => rotation.run::<f16>(),
        _ => rotation.run::<bf16>(),
    }
}

fn strides(layout: &Layout) -> [isize; 5] {
    std::array::from_fn(|axis| isize::try_from(layout.strides()[axis]).unwrap_or(0))
}

struct Rotation {
    arch: Arch,
    angles: Vec<RopeAngle>,
    interleaved: bool,
    shape: [usize; 5],
    /// Of source and destination.
    strides: [[isize; 5]; 2],
    source: Origin,
    destination: Origin,
}

/// Sines and cosines of some positions, by position and pair.
struct Table {
    sin: [[f32; PAIRS]; POSITIONS],
    cos: [[f32; PAIRS]; POSITIONS],
}

impl Rotation {
    fn run<T: Float>(&self) {
        let [batch, rows, seqlen, ..] = self.shape;
        let blocks = seqlen.div_ceil(POSITIONS);
        (0..batch * rows * blocks).into_par_iter().for_each(|task| {
            let (outer, first) = (task / blocks, task % blocks * POSITIONS);
            self.arch.vectorize(
                #[inline(always)]
                |halves| self.block::<T>(halves, [outer / rows, outer % rows], first, POSITIONS.min(seqlen - first)),
            );
        });
    }

    /// Some positions of one row: all heads, in the order in which they lie.
    #[inline(always)]
    fn block<T: Float>(&self, halves: Halves, [batch, row]: [usize; 2], first: usize, count: usize) {
        let mut table = Table { sin: [[0.0; PAIRS]; POSITIONS], cos: [[0.0; PAIRS]; POSITIONS] };
        self.fill(&mut table, first, count);
        let heads = self.shape[3];
        let heads_first = self.strides[1][3].unsigned_abs() > self.strides[1][2].unsigned_abs();
        for i in 0..count * heads {
            let (position, head) = if heads_first { (i % count, i / count) } else { (i / heads, i % heads) };
            let index = [batch, row, first + position, head];
            let pairs = self.angles.len();
            let (sin, cos) = (&table.sin[position][..pairs], &table.cos[position][..pairs]);
            // SAFETY: a head's channels, inside both tensors as core checked, which hold T; the destination's belong to this
            // task alone.
            unsafe { self.head::<T>(halves, index, sin, cos) };
        }
    }

    #[inline(always)]
    fn fill(&self, table: &mut Table, first: usize, count: usize) {
        let mut turns = [0_u64; PAIRS];
        for (turn, angle) in turns.iter_mut().zip(&self.angles) {
            *turn = angle.at(first as u64);
        }
        let mut steps = [0_u64; PAIRS];
        for (step, angle) in steps.iter_mut().zip(&self.angles) {
            *step = angle.step;
        }
        let pairs = self.angles.len();
        for position in 0..count {
            let (sin, cos) = (&mut table.sin[position][..pairs], &mut table.cos[position][..pairs]);
            for i in 0..pairs {
                (sin[i], cos[i]) = sin_cos(turns[i]);
                turns[i] = turns[i].wrapping_add(steps[i]);
            }
        }
    }

    /// # Safety
    /// The index is inside both tensors, which hold T; no other thread touches these channels of the destination.
    #[inline(always)]
    unsafe fn head<T: Float>(&self, halves: Halves, index: [usize; 4], sin: &[f32], cos: &[f32]) {
        let at = |strides: &[isize; 5]| {
            let steps = index.iter().zip(strides);
            steps.fold(0_isize, |sum, (&i, &stride)| sum.wrapping_add(i.cast_signed().wrapping_mul(stride)))
        };
        let [from, to] = [&self.strides[0], &self.strides[1]];
        let (source, destination) =
            (self.source.element::<T>(at(from)).cast_const(), self.destination.element::<T>(at(to)));
        let (head_dim, pairs, steps) = (self.shape[4], sin.len(), [from[4], to[4]]);
        // SAFETY: the caller's; core checked that source and destination share no element.
        unsafe {
            if steps == [1, 1] {
                let source = std::slice::from_raw_parts(source, head_dim);
                let destination = std::slice::from_raw_parts_mut(destination, head_dim);
                self.dense(halves, source, destination, sin, cos);
                return;
            }
            for (i, (&sin, &cos)) in sin.iter().zip(cos).enumerate() {
                let [a, b] = if self.interleaved { [2 * i, 2 * i + 1] } else { [i, i + pairs] };
                let [x, y] = [a, b].map(|c| (*source.offset(c.cast_signed() * steps[0])).to_f32());
                let turned = turn([x, y], sin, cos);
                *destination.offset(a.cast_signed() * steps[1]) = T::from_f32(turned[0]);
                *destination.offset(b.cast_signed() * steps[1]) = T::from_f32(turned[1]);
            }
            for c in 2 * pairs.cast_signed()..head_dim.cast_signed() {
                *destination.offset(c * steps[1]) = *source.offset(c * steps[0]);
            }
        }
    }

    #[inline(always)]
    fn dense<T: Float>(&self, halves: Halves, from: &[T], to: &mut [T], sin: &[f32], cos: &[f32]) {
        let rotary_dim = 2 * sin.len();
        let (from, copied) = from.split_at(rotary_dim);
        let (to, copy) = to.split_at_mut(rotary_dim);
        copy.copy_from_slice(copied);
        self.turn_all(halves, from, to, [sin, cos]);
    }

    #[inline(always)]
    fn turn_all<T: Float>(&self, halves: Halves, from: &[T], to: &mut [T], [sin, cos]: [&[f32]; 2]) {
        if self.interleaved {
            turn_neighbours(halves, from, to, [sin, cos]);
            return;
        }
        let pairs = sin.len();
        let (first, second) = from.split_at(pairs);
        let (to_first, to_second) = to.split_at_mut(pairs);
        let whole = if T::BY_BLOCKS { pairs / BLOCK * BLOCK } else { 0 };
        let from = first[..whole].as_chunks().0.iter().zip(second[..whole].as_chunks().0);
        let tables = sin[..whole].as_chunks::<BLOCK>().0.iter().zip(cos[..whole].as_chunks::<BLOCK>().0);
        let to = to_first[..whole].as_chunks_mut().0.iter_mut().zip(to_second[..whole].as_chunks_mut().0);
        for (((x, y), (sin, cos)), (to_x, to_y)) in from.zip(tables).zip(to) {
            let (mut x, mut y) = (T::widen_block(halves, x), T::widen_block(halves, y));
            for i in 0..BLOCK {
                [x[i], y[i]] = turn([x[i], y[i]], sin[i], cos[i]);
            }
            (*to_x, *to_y) = (T::narrow_block(halves, x), T::narrow_block(halves, y));
        }
        let (first, second) = (&first[whole..pairs], &second[whole..pairs]);
        let (to_first, to_second) = (&mut to_first[whole..pairs], &mut to_second[whole..pairs]);
        let (sin, cos) = (&sin[whole..pairs], &cos[whole..pairs]);
        for i in 0..pairs - whole {
            let [x, y] = turn([first[i].to_f32(), second[i].to_f32()], sin[i], cos[i]);
            to_first[i] = T::from_f32(x);
            to_second[i] = T::from_f32(y);
        }
    }
}

/// Pairs of neighbours.
#[inline(always)]
fn turn_neighbours<T: Float>(halves: Halves, from: &[T], to: &mut [T], [sin, cos]: [&[f32]; 2]) {
    let whole = if T::BY_BLOCKS { from.len() / BLOCK * BLOCK } else { 0 };
    let (blocks, rest) = from.split_at(whole);
    let (to_blocks, to_rest) = to.split_at_mut(whole);
    let (sins, sin_rest) = sin.split_at(whole / 2);
    let (coses, cos_rest) = cos.split_at(whole / 2);
    let tables = sins.as_chunks::<{ BLOCK / 2 }>().0.iter().zip(coses.as_chunks::<{ BLOCK / 2 }>().0);
    for ((to, from), (sin, cos)) in to_blocks.as_chunks_mut().0.iter_mut().zip(blocks.as_chunks().0).zip(tables) {
        let mut turned = T::widen_block(halves, from);
        for ((pair, sin), cos) in turned.as_chunks_mut::<2>().0.iter_mut().zip(sin).zip(cos) {
            *pair = turn(*pair, *sin, *cos);
        }
        *to = T::narrow_block(halves, turned);
    }
    let pairs = to_rest.as_chunks_mut::<2>().0.iter_mut().zip(rest.as_chunks::<2>().0);
    for ((to, from), (sin, cos)) in pairs.zip(sin_rest.iter().zip(cos_rest)) {
        *to = turn(from.map(T::to_f32), *sin, *cos).map(T::from_f32);
    }
}

#[inline(always)]
fn turn([x, y]: [f32; 2], sin: f32, cos: f32) -> [f32; 2] {
    [x * cos - y * sin, x * sin + y * cos]
}

/// Sine and cosine of an angle in 2⁶⁴ths of a turn: within 1.2 · 2⁻²⁴ and 2⁻²³.
///
/// The nearest quarter turn exchanges and negates them; what is left, up to an eighth of a turn t, goes into
/// sin 2πt = t · 2π + t · P(t²) and cos 2πt = 1 + t² · Q(t²), Chebyshev interpolations.
#[inline(always)]
fn sin_cos(turn: u64) -> (f32, f32) {
    #[allow(clippy::cast_possible_truncation, reason = "the upper half was shifted down")]
    let turn = (turn >> 32) as u32;
    let quarter = turn.wrapping_add(1 << 29) >> 30;
    #[allow(clippy::cast_precision_loss, reason = "rounded to f32 is what is asked for")]
    let t = turn.wrapping_sub(quarter << 30).cast_signed() as f32 * (1.0 / 4_294_967_296.0);
    let square = t * t;
    let p = ((41.589_542 * square - 76.701_29) * square + 81.605_23) * square - 41.341_7;
    let sin = t * TAU_HIGH + t * (p * square + TAU_LOW);
    let q = ((59.424_107 * square - 85.448_82) * square + 64.939_37) * square - 19.739_208;
    let cos = q * square + 1.0;
    // Bits, so that loops have no branch: the sign of the sine is set in quarters 2 and 3, of the cosine in 1 and 2.
    let (sin_of, cos_of) = if quarter & 1 == 0 { (sin, cos) } else { (cos, sin) };
    let negated = |x: f32, is: u32| f32::from_bits(x.to_bits() ^ (is << 31));
    (negated(sin_of, quarter >> 1 & 1), negated(cos_of, (quarter + 1) >> 1 & 1))
}

const TAU_HIGH: f32 = std::f32::consts::TAU;
/// 2π less its nearest f32.
const TAU_LOW: f32 = -1.748_455_6e-7;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sines_and_cosines_are_within_their_bounds() {
        let mut worst = [0.0_f64; 2];
        for i in 0..200_000_u64 {
            let turn = i.wrapping_mul(0x9e37_79b9_7f4a_7c15);
            let (sin, cos) = sin_cos(turn);
            #[allow(clippy::cast_precision_loss, reason = "far below the bounds")]
            let exact = (turn as f64 * 2_f64.powi(-64) * std::f64::consts::TAU).sin_cos();
            worst[0] = worst[0].max((f64::from(sin) - exact.0).abs());
            worst[1] = worst[1].max((f64::from(cos) - exact.1).abs());
        }
        let bound = 2_f64.powi(-23);
        assert!(worst[0] <= bound && worst[1] <= bound, "{worst:?}");
        assert_eq!([0, 1, 2, 3].map(|q| sin_cos(q << 62)), [(0.0, 1.0), (1.0, 0.0), (0.0, -1.0), (-1.0, 0.0)]);
    }
}
