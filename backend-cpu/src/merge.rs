//! Merging (out, lse) pairs over disjoint keys (equations (17)-(18)).

use half::{bf16, f16};
use rayon::prelude::*;
use tilefold_core::{DType, MergeArgs, TensorView};

use crate::arch::{Arch, Halves};
use crate::attention::{Float, Operand, update_dense};

/// Queries of a task: few heads of one row leave enough of them.
const QUERIES: usize = 32;
/// Heads whose shares are kept: 8 KiB of them.
const HEADS: usize = 32;

/// Adds the operands' part into their accumulator.
pub(crate) fn merge(arch: Arch, args: MergeArgs<'_>) {
    let operands = args.into_operands();
    let shape: [usize; 5] = std::array::from_fn(|dim| operands.out.shape()[dim]);
    let sum = Sum {
        shape,
        heads_first: heads_first(operands.acc_out.as_view()),
        part: [Operand::read(&operands.lse), Operand::read(&operands.lse_low)],
        out: Operand::read(&operands.out),
        acc: [Operand::write(operands.acc_lse), Operand::write(operands.acc_lse_low)],
        acc_out: Operand::write(operands.acc_out),
    };
    match operands.out.dtype() {
        DType::F32 => sum.of::<f32>(arch),
        DType::F16 => sum.of::<f16>(arch),
        _ => sum.of::<bf16>(arch),
    }
}

/// Whether the queries of a head lie closer together than the heads of a query.
fn heads_first(view: &TensorView<'_>) -> bool {
    let strides = view.layout().strides();
    strides[3].unsigned_abs() > strides[2].unsigned_abs()
}

struct Sum {
    shape: [usize; 5],
    heads_first: bool,
    part: [Operand<4>; 2],
    out: Operand<5>,
    acc: [Operand<4>; 2],
    acc_out: Operand<5>,
}

impl Sum {
    fn of<A: Float>(&self, arch: Arch) {
        match self.acc_out.dtype {
            DType::F32 => self.run::<A, f32>(arch),
            DType::F16 => self.run::<A, f16>(arch),
            _ => self.run::<A, bf16>(arch),
        }
    }

    fn run<A: Float, B: Float>(&self, arch: Arch) {
        let [batch, rows, seqlen, ..] = self.shape;
        let blocks = seqlen.div_ceil(QUERIES);
        (0..batch * rows * blocks).into_par_iter().for_each(|task| {
            let (outer, first) = (task / blocks, task % blocks * QUERIES);
            arch.vectorize(
                #[inline(always)]
                |halves| self.block::<A, B>(halves, [outer / rows, outer % rows], first, QUERIES.min(seqlen - first)),
            );
        });
    }

    /// Some queries of one row, all heads.
    #[inline(always)]
    fn block<A: Float, B: Float>(&self, halves: Halves, outer: [usize; 2], first: usize, count: usize) {
        let heads = self.shape[3];
        let mut shares = [[[0.0; 2]; QUERIES]; HEADS];
        for from in (0..heads).step_by(HEADS) {
            let some = HEADS.min(heads - from);
            for (head, shares) in (from..heads).zip(&mut shares) {
                self.add_lse(outer, head, first, &mut shares[..count]);
            }
            self.mix::<A, B>(halves, outer, [from, first], &shares[..some], count);
        }
    }

    /// Adds the lse of a head's queries and gives the shares of both parts.
    #[inline(always)]
    fn add_lse(&self, [batch, row]: [usize; 2], head: usize, first: usize, shares: &mut [[f32; 2]]) {
        let (at, count) = ([batch, row, head, first], shares.len());
        let lse_of = |[high, low]: &[Operand<4>; 2]| {
            // SAFETY: f32 elements inside the operands; the accumulators' belong to this worker.
            let (high, low) = unsafe { (read(high, at, count), read(low, at, count)) };
            let mut sums = [0.0; QUERIES];
            for i in 0..QUERIES {
                sums[i] = f64::from(high[i]) + f64::from(low[i]);
            }
            sums
        };
        let (of_acc, of_part) = (lse_of(&self.acc), lse_of(&self.part));
        let mut weights = [[0.0; QUERIES]; 4];
        let [to_acc, to_part, lse, lse_low] = &mut weights;
        // Without a branch, for vectors.
        for i in 0..count.min(QUERIES) {
            let weights = Weights::new(of_acc[i], of_part[i]);
            [to_acc[i], to_part[i]] = weights.shares;
            (lse[i], lse_low[i]) = (weights.lse, weights.lse_low);
        }
        // SAFETY: as above.
        unsafe {
            write(&self.acc[0], at, &lse[..count]);
            write(&self.acc[1], at, &lse_low[..count]);
        }
        for (shares, both) in shares.iter_mut().zip(to_acc.iter().zip(to_part)) {
            *shares = [*both.0, *both.1];
        }
    }

    /// Mixes the rows of some heads' queries, in the order in which they lie.
    #[inline(always)]
    fn mix<A: Float, B: Float>(
        &self,
        halves: Halves,
        [batch, row]: [usize; 2],
        [first_head, first]: [usize; 2],
        shares: &[[[f32; 2]; QUERIES]],
        count: usize,
    ) {
        let (heads, channels) = (shares.len(), self.shape[4]);
        let (mut query, mut head) = (0, 0);
        for _ in 0..count * heads {
            let at = [batch, row, first + query, first_head + head, 0];
            let data = |operand: &Operand<5>| (operand.at(at), operand.strides[4]);
            // SAFETY: rows of `channels` elements of their dtypes; the accumulators' belong to this worker.
            unsafe { mix_row::<A, B>(halves, shares[head][query], channels, data(&self.out), data(&self.acc_out)) };
            let (inner, outer, size) =
                if self.heads_first { (&mut query, &mut head, count) } else { (&mut head, &mut query, heads) };
            *inner += 1;
            if *inner == size {
                (*inner, *outer) = (0, *outer + 1);
            }
        }
    }
}

/// Queries from one on, neighbours in memory as a rule.
///
/// # Safety
/// There are as many, at most [`QUERIES`], in f32.
#[inline(always)]
unsafe fn read(operand: &Operand<4>, at: [usize; 4], count: usize) -> [f32; QUERIES] {
    let (first, stride) = (operand.at(at).cast::<f32>(), operand.strides[3]);
    let mut values = [0.0; QUERIES];
    // SAFETY: the caller's.
    unsafe {
        if (stride, count) == (1, QUERIES) {
            return first.cast::<[f32; QUERIES]>().read_unaligned();
        }
        for (i, value) in (0..).zip(&mut values[..count]) {
            *value = first.offset(i * stride).read();
        }
    }
    values
}

/// The other way.
///
/// # Safety
/// As [`read`], and no other thread touches them.
#[inline(always)]
unsafe fn write(operand: &Operand<4>, at: [usize; 4], values: &[f32]) {
    let (first, stride) = (operand.at(at).cast::<f32>(), operand.strides[3]);
    // SAFETY: the caller's.
    unsafe {
        if stride == 1 {
            first.copy_from_nonoverlapping(values.as_ptr(), values.len());
            return;
        }
        for (i, value) in (0..).zip(values) {
            first.offset(i * stride).write(*value);
        }
    }
}

/// A row's address and the elements from one of its channels to the next.
type Channels = (*mut u8, isize);

/// Mixes a row of the part into one of the accumulator.
///
/// # Safety
/// Both rows have `channels` elements, of A and of B; no other thread touches the accumulator's, and they share none.
#[inline(always)]
unsafe fn mix_row<A: Float, B: Float>(
    halves: Halves,
    shares: [f32; 2],
    channels: usize,
    part: Channels,
    acc: Channels,
) {
    let (from, to) = (part.0.cast::<A>().cast_const(), acc.0.cast::<B>());
    // SAFETY: the caller's.
    unsafe {
        if (part.1, acc.1) == (1, 1) {
            let from = std::slice::from_raw_parts(from, channels);
            let to = std::slice::from_raw_parts_mut(to, channels);
            // A loop of its own for each case of `mix`.
            let [first, second] = shares;
            match (first == 0.0, second == 0.0) {
                (_, true) => {}
                (true, false) => update_dense(halves, from, to, |_, from| from),
                _ => update_dense(halves, from, to, |to, from| first * to + second * from),
            }
            return;
        }
        for i in 0..channels.cast_signed() {
            let to = to.offset(i * acc.1);
            *to = B::from_f32(mix(shares, (*to).to_f32(), (*from.offset(i * part.1)).to_f32()));
        }
    }
}

/// Shares of two parts in their union, and the union's lse in two parts.
struct Weights {
    shares: [f32; 2],
    lse: f32,
    lse_low: f32,
}

impl Weights {
    #[allow(clippy::cast_possible_truncation, reason = "weights and the split lse are f32 by contract")]
    #[inline(always)]
    fn new(first: f64, second: f64) -> Self {
        let empty = first == f64::NEG_INFINITY && second == f64::NEG_INFINITY;
        // NaN on one side only: the maximum is the other side, the sum NaN.
        let max = first.max(second);
        // +inf spreads as NaN does: no sum of finite logits gives it.
        let ratio = if max == f64::INFINITY { f64::NAN } else { exp_negative((first - second).abs()) };
        let lse = max + ln_1p(ratio);
        let (larger, smaller) = (1.0 / (1.0 + ratio), ratio / (1.0 + ratio));
        let (first, second) = if first < second { (smaller, larger) } else { (larger, smaller) };
        let shares = [first as f32, second as f32].map(|share| if empty { 0.0 } else { share });
        let lse = if empty { f64::NEG_INFINITY } else { lse };
        let low = if (lse as f32).is_finite() { (lse - f64::from(lse as f32)) as f32 } else { 0.0 };
        Self { shares, lse: lse as f32, lse_low: low }
    }
}

/// Of Taylor's series of e to the x, from the 13th power down.
const EXP: [f64; 14] = {
    let mut coefficients = [1.0; 14];
    let mut power = 1;
    while power < 14 {
        coefficients[13 - power] = coefficients[14 - power] / power as f64;
        power += 1;
    }
    coefficients
};

/// Of artanh(s) / s in powers of s², from the 32nd of s down.
const ARTANH: [f64; 17] = {
    let mut coefficients = [1.0; 17];
    let mut power = 0;
    while power < 17 {
        coefficients[16 - power] = 1.0 / (2 * power + 1) as f64;
        power += 1;
    }
    coefficients
};

/// e to the power of -x for x ≥ 0, to a few units in the last place, without a branch or a call; NaN stays NaN. From x = 700 on
/// the power of -700, nothing in f32.
#[inline(always)]
fn exp_negative(x: f64) -> f64 {
    /// Its last bits count ones.
    const MAGIC: f64 = 1.5 * (1_u64 << 52) as f64;
    /// ln 2 in two parts, the first with trailing zeros.
    const LN_2: [f64; 2] = [6.931_471_803_691_238e-1, 1.908_214_929_270_587_7e-10];
    let x = if x > 700.0 { -700.0 } else { -x };
    let power = x * std::f64::consts::LOG2_E + MAGIC;
    let whole = power - MAGIC;
    let rest = (x - whole * LN_2[0]) - whole * LN_2[1];
    // Taylor's series, to the 13th power of at most ln 2 / 2.
    let sum = EXP.iter().fold(0.0, |sum, coefficient| sum * rest + coefficient);
    sum * f64::from_bits((power.to_bits() << 52).wrapping_add(1023 << 52))
}

/// ln(1 + x) for x from 0 to 1, as [`exp_negative`].
#[inline(always)]
fn ln_1p(x: f64) -> f64 {
    // 2 artanh(s), whose series ends with the 33rd power of at most a third.
    let s = x / (2.0 + x);
    let square = s * s;
    2.0 * s * ARTANH.iter().fold(0.0, |sum, coefficient| sum * square + coefficient)
}

/// A part without a share has no say, whatever it holds; two empty parts keep the accumulator, which may be the mean of v
/// under `EmptyRows::Uniform`.
#[inline(always)]
fn mix(shares: [f32; 2], first: f32, second: f32) -> f32 {
    match shares.map(|share| share == 0.0) {
        [_, true] => first,
        [true, false] => second,
        _ => shares[0] * first + shares[1] * second,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exponentials_and_logarithms_are_those_of_the_library() {
        for i in 0..=70_000_u32 {
            let x = f64::from(i) * 0.01;
            let (got, expected) = (exp_negative(x), (-x).exp());
            assert!((got / expected - 1.0).abs() < 1e-15, "exp(-{x}) = {got:e}, expected {expected:e}");
            let ratio = expected;
            let (got, expected) = (ln_1p(ratio), ratio.ln_1p());
            assert!((got / expected - 1.0).abs() < 1e-15, "ln(1 + {ratio:e}) = {got:e}, expected {expected:e}");
        }
        assert!(exp_negative(f64::INFINITY) < 1e-300 && exp_negative(f64::NAN).is_nan() && ln_1p(f64::NAN).is_nan());
        assert_eq!((exp_negative(0.0), ln_1p(0.0)), (1.0, 0.0));
    }

    #[test]
    fn weights_add_up() {
        let weights = Weights::new(0.0, 3_f64.ln());
        assert!((weights.shares[0] - 0.25).abs() < 1e-7 && (weights.shares[1] - 0.75).abs() < 1e-7);
        assert!((f64::from(weights.lse) + f64::from(weights.lse_low) - 4_f64.ln()).abs() < 1e-12);
        let far = Weights::new(-1e9 + 2_f64.ln(), -1e9 + 6_f64.ln());
        assert!((far.shares[0] - 0.25).abs() < 1e-6, "-1e9 rows keep their lengths");
        let empty = Weights::new(f64::NEG_INFINITY, f64::NEG_INFINITY);
        assert_eq!((empty.lse, mix(empty.shares, 2.0, 5.0)), (f32::NEG_INFINITY, 2.0));
        assert_eq!(mix(Weights::new(f64::NEG_INFINITY, 1.0).shares, f32::NAN, 5.0), 5.0);
        for other in [f64::NEG_INFINITY, 1.0, f64::INFINITY] {
            for weights in [Weights::new(f64::INFINITY, other), Weights::new(other, f64::INFINITY)] {
                assert!(weights.lse.is_nan() && mix(weights.shares, 1.0, 1.0).is_nan(), "+inf beside {other}");
            }
        }
        let alone = Weights::new(800.0, 50.0);
        assert_eq!((alone.shares, alone.lse, alone.lse_low), ([1.0, 0.0], 800.0, 0.0));
        for other in [f64::NEG_INFINITY, 1.0, f64::NAN] {
            for weights in [Weights::new(f64::NAN, other), Weights::new(other, f64::NAN)] {
                assert!(weights.lse.is_nan() && mix(weights.shares, 1.0, 1.0).is_nan(), "NaN beside {other}");
            }
        }
    }
}
