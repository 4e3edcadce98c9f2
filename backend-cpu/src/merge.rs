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

    /// Adds the lse of a head's queries, neighbours in memory as a rule, and gives the shares of both parts.
    fn add_lse(&self, [batch, row]: [usize; 2], head: usize, first: usize, shares: &mut [[f32; 2]]) {
        for (query, shares) in (first..).zip(shares) {
            let at = [batch, row, head, query];
            // SAFETY: f32 elements inside the operands; the accumulators' belong to this worker.
            unsafe {
                let read = |[high, low]: &[Operand<4>; 2]| {
                    f64::from(high.at(at).cast::<f32>().read()) + f64::from(low.at(at).cast::<f32>().read())
                };
                let weights = Weights::new(read(&self.acc), read(&self.part));
                self.acc[0].at(at).cast::<f32>().write(weights.lse);
                self.acc[1].at(at).cast::<f32>().write(weights.lse_low);
                *shares = weights.shares;
            }
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
        for i in 0..count * heads {
            let (query, head) = if self.heads_first { (i % count, i / count) } else { (i / heads, i % heads) };
            let at = [batch, row, first + query, first_head + head, 0];
            let data = |operand: &Operand<5>| (operand.at(at), operand.strides[4]);
            // SAFETY: rows of `channels` elements of their dtypes; the accumulators' belong to this worker.
            unsafe { mix_row::<A, B>(halves, shares[head][query], channels, data(&self.out), data(&self.acc_out)) };
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
    fn new(first: f64, second: f64) -> Self {
        if first == f64::NEG_INFINITY && second == f64::NEG_INFINITY {
            return Self { shares: [0.0; 2], lse: f32::NEG_INFINITY, lse_low: 0.0 };
        }
        // NaN on one side only: the maximum is the other side, the sum NaN.
        let max = first.max(second);
        // +inf spreads as NaN does: no sum of finite logits gives it.
        let ratio = if max == f64::INFINITY { f64::NAN } else { (-(first - second).abs()).exp() };
        let lse = max + ratio.ln_1p();
        let (larger, smaller) = (1.0 / (1.0 + ratio), ratio / (1.0 + ratio));
        let (first, second) = if first < second { (smaller, larger) } else { (larger, smaller) };
        let low = if (lse as f32).is_finite() { (lse - f64::from(lse as f32)) as f32 } else { 0.0 };
        Self { shares: [first as f32, second as f32], lse: lse as f32, lse_low: low }
    }
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
    fn weights_add_up() {
        let weights = Weights::new(0.0, 3_f64.ln());
        assert!((weights.shares[0] - 0.25).abs() < 1e-7 && (weights.shares[1] - 0.75).abs() < 1e-7);
        assert!((f64::from(weights.lse) + f64::from(weights.lse_low) - 4_f64.ln()).abs() < 1e-12);
        let far = Weights::new(-1e9 + 2_f64.ln(), -1e9 + 6_f64.ln());
        assert!((far.shares[0] - 0.25).abs() < 1e-6, "-1e9 rows keep their lengths");
        let empty = Weights::new(f64::NEG_INFINITY, f64::NEG_INFINITY);
        assert_eq!((empty.lse, mix(empty.shares, 2.0, 5.0)), (f32::NEG_INFINITY, 2.0));
        assert_eq!(mix(Weights::new(f64::NEG_INFINITY, 1.0).shares, f32::NAN, 5.0), 5.0);
        for other in [f64::NEG_INFINITY, 1.0, f64::NAN] {
            for weights in [Weights::new(f64::NAN, other), Weights::new(other, f64::NAN)] {
                assert!(weights.lse.is_nan() && mix(weights.shares, 1.0, 1.0).is_nan(), "NaN beside {other}");
            }
        }
    }
}
