//! Merging (out, lse) pairs over disjoint keys (equations (17)-(18)).

use rayon::prelude::*;
use tilefold_core::MergeArgs;

use crate::attention::{Operand, Row};

/// Adds the operands' part into their accumulator.
pub(crate) fn merge(args: MergeArgs<'_>) {
    let operands = args.into_operands();
    let shape: [usize; 5] = std::array::from_fn(|dim| operands.out.shape()[dim]);
    let [_, rows, seqlen, heads, channels] = shape;
    let part = [Operand::<4>::read(&operands.lse), Operand::read(&operands.lse_low)];
    let out = Operand::<5>::read(&operands.out);
    let acc = [Operand::<4>::write(operands.acc_lse), Operand::write(operands.acc_lse_low)];
    let acc_out = Operand::<5>::write(operands.acc_out);
    (0..shape[0] * rows * heads).into_par_iter().for_each(|index| {
        let (batch, row, head) = (index / heads / rows, index / heads % rows, index % heads);
        let mut values = vec![0_f32; channels];
        let mut sum = vec![0_f32; channels];
        for query in 0..seqlen {
            let at = [batch, row, head, query];
            // SAFETY: f32 elements inside the operands; the accumulators' belong to this worker.
            let read = |[high, low]: [Operand<4>; 2]| unsafe {
                f64::from(high.at(at).cast::<f32>().read()) + f64::from(low.at(at).cast::<f32>().read())
            };
            let weights = Weights::new(read(acc), read(part));
            let data = |operand: &Operand<5>| Row {
                data: operand.at([batch, row, query, head, 0]),
                dtype: operand.dtype,
                stride: operand.strides[4],
            };
            // SAFETY: rows of `channels` elements; the accumulators' belong to this worker.
            unsafe {
                data(&out).read(channels, values.as_mut_ptr());
                data(&acc_out).read(channels, sum.as_mut_ptr());
                for (sum, value) in sum.iter_mut().zip(&values) {
                    *sum = weights.mix(*sum, *value);
                }
                data(&acc_out).write(channels, sum.as_ptr());
                acc[0].at(at).cast::<f32>().write(weights.lse);
                acc[1].at(at).cast::<f32>().write(weights.lse_low);
            }
        }
    });
}

/// Shares of two parts in their union, and the union's lse in two parts.
struct Weights {
    first: f32,
    second: f32,
    lse: f32,
    lse_low: f32,
}

impl Weights {
    #[allow(clippy::cast_possible_truncation, reason = "weights and the split lse are f32 by contract")]
    fn new(first: f64, second: f64) -> Self {
        if first == f64::NEG_INFINITY && second == f64::NEG_INFINITY {
            return Self { first: 0.0, second: 0.0, lse: f32::NEG_INFINITY, lse_low: 0.0 };
        }
        // NaN on one side only: the maximum is the other side, the sum NaN.
        let max = first.max(second);
        let lse = max + ((first - max).exp() + (second - max).exp()).ln();
        let low = if (lse as f32).is_finite() { (lse - f64::from(lse as f32)) as f32 } else { 0.0 };
        Self { first: (first - lse).exp() as f32, second: (second - lse).exp() as f32, lse: lse as f32, lse_low: low }
    }

    /// A part without weight has no say, whatever it holds; two empty parts keep the accumulator, which may be the mean
    /// of v under `EmptyRows::Uniform`.
    fn mix(&self, first: f32, second: f32) -> f32 {
        match (self.first == 0.0, self.second == 0.0) {
            (_, true) => first,
            (true, false) => second,
            _ => self.first * first + self.second * second,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn weights_add_up() {
        let weights = Weights::new(0.0, 3_f64.ln());
        assert!((weights.first - 0.25).abs() < 1e-7 && (weights.second - 0.75).abs() < 1e-7);
        assert!((f64::from(weights.lse) + f64::from(weights.lse_low) - 4_f64.ln()).abs() < 1e-12);
        let far = Weights::new(-1e9 + 2_f64.ln(), -1e9 + 6_f64.ln());
        assert!((far.first - 0.25).abs() < 1e-6, "-1e9 rows keep their lengths");
        let empty = Weights::new(f64::NEG_INFINITY, f64::NEG_INFINITY);
        assert_eq!((empty.lse, empty.mix(2.0, 5.0)), (f32::NEG_INFINITY, 2.0));
        assert_eq!(Weights::new(f64::NEG_INFINITY, 1.0).mix(f32::NAN, 5.0), 5.0);
        for other in [f64::NEG_INFINITY, 1.0, f64::NAN] {
            for weights in [Weights::new(f64::NAN, other), Weights::new(other, f64::NAN)] {
                assert!(weights.lse.is_nan() && weights.mix(1.0, 1.0).is_nan(), "NaN beside {other}");
            }
        }
    }
}
