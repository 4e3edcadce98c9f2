//! Angles as fractions of a turn in fixed point: integers wrap where angles do, so that no position is too large.
//!
//! A frequency is wanted to some 2^-100 of a turn, since positions multiply its error; f64 has 2^-56. So the sequence of
//! frequencies is computed in pairs of f64 (Dekker 1971): the ratio by Newton's method for its power, the others from it.

use super::RopeSpec;

/// The angle of one pair of channels, where 2⁶⁴ is one turn: that of row r is `first + r · step`, modulo 2⁶⁴.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct RopeAngle {
    /// At the first position.
    pub first: u64,
    /// From one position to the next.
    pub step: u64,
}

impl RopeAngle {
    /// At row `row`.
    #[must_use]
    #[inline]
    pub fn at(self, row: u64) -> u64 {
        self.first.wrapping_add(self.step.wrapping_mul(row))
    }
}

/// The angles of a rotation's pairs.
pub(super) fn angles(spec: &RopeSpec) -> Vec<RopeAngle> {
    let angle = |frequency| RopeAngle { first: turn(frequency, spec.offset.into()), step: turn(frequency, 1) };
    frequencies(spec).into_iter().map(angle).collect()
}

/// `frequency · position` in 2⁶⁴ths of a turn, to the nearest.
pub(super) fn turn(frequency: u128, position: i128) -> u64 {
    let exact = frequency.wrapping_mul(position.cast_unsigned());
    u64::try_from(exact.wrapping_add(1 << 63) >> 64).unwrap_or(0)
}

/// Turns from one position to the next, in 2¹²⁸ths of a turn; turned back where the rotation is the inverse.
pub(super) fn frequencies(spec: &RopeSpec) -> Vec<u128> {
    let ratio = root(spec.base, spec.pair_count()); // of one frequency to the next
    let mut frequency = ONE_OVER_TAU.over(spec.position_scale);
    let mut all = Vec::with_capacity(spec.pair_count());
    for _ in 0..spec.pair_count() {
        let turns = fixed(frequency.high).wrapping_add(fixed(frequency.low));
        all.push(if spec.inverse { turns.wrapping_neg() } else { turns });
        frequency = frequency.times(ratio);
    }
    all
}

/// A number in two parts that do not overlap: some 106 bits.
#[derive(Clone, Copy, Debug)]
struct Double {
    high: f64,
    low: f64,
}

/// 1/(2π)
const ONE_OVER_TAU: Double = Double { high: 0.159_154_943_091_895_35, low: -9.839_338_337_591_243e-18 };

impl Double {
    /// The sum of two numbers of which the first is the larger.
    fn sum(high: f64, low: f64) -> Self {
        let sum = high + low;
        Self { high: sum, low: low - (sum - high) }
    }

    fn times(self, other: Self) -> Self {
        let product = self.high * other.high;
        let lost = self.high.mul_add(other.high, -product);
        Self::sum(product, lost + (self.high * other.low + self.low * other.high))
    }

    fn over(self, divisor: f64) -> Self {
        let quotient = self.high / divisor;
        let rest = (-quotient).mul_add(divisor, self.high) + self.low;
        Self::sum(quotient, rest / divisor)
    }
}

/// `x^(-1 / degree)`
fn root(x: f64, degree: usize) -> Double {
    let n = f64::from(u32::try_from(degree).unwrap_or(u32::MAX));
    let mut root = Double { high: x.powf(-1.0 / n), low: 0.0 };
    // The first step makes 53 bits the rounding of the power, the second one all that there are.
    for _ in 0..2 {
        let power = (0..degree).fold(Double { high: x, low: 0.0 }, |power, _| power.times(root));
        let error = (1.0 - power.high) - power.low;
        root = Double::sum(root.high, root.low + root.high * error / n);
    }
    root
}

/// The fraction of a number, negative ones from the next lower integer, in 2¹²⁸ths.
fn fixed(x: f64) -> u128 {
    const MANTISSA_BITS: u64 = 52;
    // What multiplies the mantissa as an integer: 2^(exponent - 1075), and 2^128.
    const UNITS: i64 = 1023 + 52 - 128;
    if x < 0.0 {
        return fixed(-x).wrapping_neg();
    }
    let bits = x.fract().to_bits();
    let exponent = i64::try_from(bits >> MANTISSA_BITS).unwrap_or(0);
    if exponent == 0 {
        return 0; // 0, and numbers far below 2^-128.
    }
    let mantissa = u128::from(bits & ((1 << MANTISSA_BITS) - 1) | 1 << MANTISSA_BITS);
    let shift = exponent - UNITS;
    let distance = u32::try_from(shift.unsigned_abs()).unwrap_or(u32::MAX);
    let shifted = if shift >= 0 { mantissa.checked_shl(distance) } else { mantissa.checked_shr(distance) };
    shifted.unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::super::RopePairs;
    use super::*;

    /// Computed with 300 bits: base, rotary_dim, scale, pair, position, 2^64ths of a turn.
    const EXACT: [(f64, usize, f64, usize, i128, u64); 6] = [
        (10_000.0, 64, 1.0, 0, (1 << 31) + 5, 0x9580_66ef_215a_056e),
        (10_000.0, 64, 1.0, 13, (1 << 31) + 5, 0x9f34_aa4e_913f_2ae3),
        (10_000.0, 128, 1.0, 63, (1 << 62) + 12_345, 0x4463_0258_c1cf_ce75),
        (500_000.0, 128, 8.0, 17, -7, 0xfee8_695c_1f7f_61ac),
        (10_000.0, 6, 2.5, 1, 1_000_000_000_000, 0xadb0_8476_518f_f486),
        (10_000.0, 2, 1.0, 0, 1, 0x28be_60db_9391_054a),
    ];

    #[test]
    fn angles_of_large_positions_are_exact() {
        for (base, rotary_dim, position_scale, pair, position, expected) in EXACT {
            let spec = RopeSpec { base, position_scale, ..RopeSpec::new(rotary_dim, RopePairs::Halves) };
            let got = turn(frequencies(&spec)[pair], position);
            // 2^-100 of a turn, times the position.
            let allowed = 2 + u64::try_from(position.unsigned_abs() >> 36).unwrap();
            let error = got.wrapping_sub(expected).cast_signed().unsigned_abs();
            assert!(error <= allowed, "{base} {rotary_dim} pair {pair} at {position}: {got:x}, {expected:x}");
        }
    }

    #[test]
    fn rows_continue_the_first_position() {
        let spec = RopeSpec { offset: -3, ..RopeSpec::new(8, RopePairs::Interleaved) };
        for (angle, frequency) in angles(&spec).into_iter().zip(frequencies(&spec)) {
            for row in 0..100_u64 {
                let error = angle.at(row).wrapping_sub(turn(frequency, i128::from(row) - 3)).cast_signed();
                assert!(error.unsigned_abs() <= 1 + row, "row {row}: {error}");
            }
        }
        assert!(angles(&spec)[0].at(3).cast_signed().unsigned_abs() <= 3, "position 0 does not turn");
    }

    #[test]
    fn fractions_of_a_turn() {
        assert_eq!(fixed(0.5), 1 << 127);
        assert_eq!(fixed(3.25), 1 << 126);
        assert_eq!(fixed(-0.25), 3 << 126);
        assert_eq!(fixed(2_f64.powi(-128)), 1);
        assert_eq!((fixed(0.0), fixed(f64::MIN_POSITIVE), fixed(7.0)), (0, 0, 0));
    }
}
