//! Integer arithmetic, bit manipulation, comparisons.

use num_traits::{AsPrimitive, PrimInt, WrappingAdd, WrappingMul, WrappingNeg, WrappingSub};

use super::{Executed, combined, float, lanes};
use crate::fault::{FaultKind, Stop};
use crate::instruction::{Combine, Compare, CountOp, Index, IntegerOp, IntegerType, Type};
use crate::registers::{LANES, Lane};
use crate::warp::Warp;

/// What the integer types share.
trait Integer:
    Lane + PrimInt + WrappingAdd + WrappingSub + WrappingMul + WrappingNeg + AsPrimitive<i128> + 'static
{
    const BITS: u32;
    const SIGNED: bool;
    fn from_wide(value: i128) -> Self;
}

macro_rules! integer {
    ($($type:ty, $signed:expr;)*) => {$(
        impl Integer for $type {
            const BITS: u32 = <$type>::BITS;
            const SIGNED: bool = $signed;
            fn from_wide(value: i128) -> Self {
                value as Self
            }
        }
    )*};
}

integer! { u16, false; i16, true; u32, false; i32, true; u64, false; i64, true; }

impl Warp {
    pub(super) fn integer(
        &mut self,
        op: IntegerOp,
        ty: IntegerType,
        d: Index,
        s: [Index; 4],
        mask: u32,
    ) -> Executed<()> {
        match ty {
            IntegerType::U16 => self.typed::<u16>(op, d, s, mask),
            IntegerType::S16 => self.typed::<i16>(op, d, s, mask),
            IntegerType::U32 => self.typed::<u32>(op, d, s, mask),
            IntegerType::S32 => self.typed::<i32>(op, d, s, mask),
            IntegerType::U64 => self.typed::<u64>(op, d, s, mask),
            IntegerType::S64 => self.typed::<i64>(op, d, s, mask),
        }
    }

    fn typed<T: Integer>(&mut self, op: IntegerOp, d: Index, s: [Index; 4], mask: u32) -> Executed<()> {
        let r = &mut self.registers;
        let (one, two, three) = (s[0], [s[0], s[1]], [s[0], s[1], s[2]]);
        let high = |a: T, b: T| T::from_wide((AsPrimitive::<i128>::as_(a) * AsPrimitive::<i128>::as_(b)) >> T::BITS);
        match op {
            IntegerOp::Add => r.map2(d, two, mask, |a: T, b: T| a.wrapping_add(&b)),
            IntegerOp::Sub => r.map2(d, two, mask, |a: T, b: T| a.wrapping_sub(&b)),
            IntegerOp::AddSaturating => r.map2(d, two, mask, |a: T, b: T| a.saturating_add(b)),
            IntegerOp::SubSaturating => r.map2(d, two, mask, |a: T, b: T| a.saturating_sub(b)),
            IntegerOp::MulLow => r.map2(d, two, mask, |a: T, b: T| a.wrapping_mul(&b)),
            IntegerOp::MulHigh => r.map2(d, two, mask, high),
            IntegerOp::MadLow => r.map3(d, three, mask, |a: T, b: T, c: T| a.wrapping_mul(&b).wrapping_add(&c)),
            IntegerOp::MadHigh => r.map3(d, three, mask, |a: T, b: T, c: T| high(a, b).wrapping_add(&c)),
            IntegerOp::Sad => r.map3(d, three, mask, |a: T, b: T, c: T| {
                let difference = if a > b { a.wrapping_sub(&b) } else { b.wrapping_sub(&a) };
                c.wrapping_add(&difference)
            }),
            IntegerOp::Div | IntegerOp::Rem => return self.divide::<T>(op == IntegerOp::Div, d, two, mask),
            IntegerOp::Min => r.map2(d, two, mask, |a: T, b: T| a.min(b)),
            IntegerOp::Max => r.map2(d, two, mask, |a: T, b: T| a.max(b)),
            IntegerOp::Abs => r.map1(d, one, mask, |a: T| if a < T::zero() { a.wrapping_neg() } else { a }),
            IntegerOp::Neg => r.map1(d, one, mask, |a: T| a.wrapping_neg()),
            IntegerOp::And => r.map2(d, two, mask, |a: T, b: T| a & b),
            IntegerOp::Or => r.map2(d, two, mask, |a: T, b: T| a | b),
            IntegerOp::Xor => r.map2(d, two, mask, |a: T, b: T| a ^ b),
            IntegerOp::Not => r.map1(d, one, mask, |a: T| !a),
            IntegerOp::LogicalNot => r.map1(d, one, mask, |a: T| if a == T::zero() { T::one() } else { T::zero() }),
            IntegerOp::ShiftLeft => r.map2(d, two, mask, |a: T, by: u32| {
                let shifted = a << (by & (T::BITS - 1)) as usize;
                if by < T::BITS { shifted } else { T::zero() }
            }),
            // Beyond the width a signed shift leaves the sign.
            IntegerOp::ShiftRight => r.map2(d, two, mask, |a: T, by: u32| {
                let by = if T::SIGNED { by.min(T::BITS - 1) } else { by };
                let shifted = a >> (by & (T::BITS - 1)) as usize;
                if by < T::BITS { shifted } else { T::zero() }
            }),
            IntegerOp::ExtractField => r.map3(d, three, mask, extract::<T>),
            IntegerOp::InsertField => self.insert::<T>(d, s, mask),
            IntegerOp::Reverse => r.map1(d, one, mask, |a: T| a.reverse_bits()),
        }
        Ok(())
    }

    fn divide<T: Integer>(&mut self, quotient: bool, d: Index, s: [Index; 2], mask: u32) -> Executed<()> {
        let (a, b) = (T::get(&self.registers, s[0]), T::get(&self.registers, s[1]));
        let mut result = [T::zero(); LANES];
        for lane in lanes(mask) {
            if b[lane] == T::zero() {
                return Err(Stop::new(lane as u32, FaultKind::DivisionByZero));
            }
            // The most negative number by -1 wraps.
            let negated = T::SIGNED && b[lane] == T::zero().wrapping_sub(&T::one());
            result[lane] = match (quotient, negated) {
                (true, true) => a[lane].wrapping_neg(),
                (true, false) => a[lane] / b[lane],
                (false, true) => T::zero(),
                (false, false) => a[lane] % b[lane],
            };
        }
        T::put(&mut self.registers, d, result, mask);
        Ok(())
    }

    fn insert<T: Integer>(&mut self, d: Index, s: [Index; 4], mask: u32) {
        let (a, b) = (T::get(&self.registers, s[0]), T::get(&self.registers, s[1]));
        let (position, length) = (u32::get(&self.registers, s[2]), u32::get(&self.registers, s[3]));
        let inserted = std::array::from_fn(|lane| {
            let (position, length) = (position[lane] & 0xFF, length[lane] & 0xFF);
            if position >= T::BITS {
                return b[lane];
            }
            let field = field_mask(length) << position;
            let bits: i128 = a[lane].as_() << position & field | AsPrimitive::<i128>::as_(b[lane]) & !field;
            T::from_wide(bits)
        });
        T::put(&mut self.registers, d, inserted, mask);
    }

    pub(super) fn wide(&mut self, ty: IntegerType, d: Index, s: [Index; 2], c: Option<Index>, mask: u32) {
        let r = &mut self.registers;
        let three = c.map(|c| [s[0], s[1], c]);
        match (ty, three) {
            (IntegerType::U32, None) => r.map2(d, s, mask, |a: u32, b: u32| u64::from(a) * u64::from(b)),
            (IntegerType::S32, None) => r.map2(d, s, mask, |a: i32, b: i32| i64::from(a) * i64::from(b)),
            (IntegerType::U16, None) => r.map2(d, s, mask, |a: u16, b: u16| u32::from(a) * u32::from(b)),
            (IntegerType::S16, None) => r.map2(d, s, mask, |a: i16, b: i16| i32::from(a) * i32::from(b)),
            (IntegerType::U32, Some(s)) => {
                r.map3(d, s, mask, |a: u32, b: u32, c: u64| (u64::from(a) * u64::from(b)).wrapping_add(c));
            }
            (IntegerType::S32, Some(s)) => {
                r.map3(d, s, mask, |a: i32, b: i32, c: i64| (i64::from(a) * i64::from(b)).wrapping_add(c));
            }
            (IntegerType::U16, Some(s)) => {
                r.map3(d, s, mask, |a: u16, b: u16, c: u32| (u32::from(a) * u32::from(b)).wrapping_add(c));
            }
            (IntegerType::S16, Some(s)) => {
                r.map3(d, s, mask, |a: i16, b: i16, c: i32| (i32::from(a) * i32::from(b)).wrapping_add(c));
            }
            // Decoding gives no 64-bit type here.
            (IntegerType::U64 | IntegerType::S64, _) => {}
        }
    }

    pub(super) fn count(&mut self, op: CountOp, ty: IntegerType, d: Index, a: Index, mask: u32) {
        let r = &mut self.registers;
        match ty {
            IntegerType::U64 => r.map1(d, a, mask, |a: u64| counted(op, a, 64)),
            IntegerType::S64 => {
                r.map1(d, a, mask, |a: i64| counted(op, above_sign(op, a, a >> 63).cast_unsigned(), 64))
            }
            IntegerType::S32 => {
                r.map1(d, a, mask, |a: i32| {
                    let bits = above_sign(op, i64::from(a), i64::from(a >> 31)) as u32;
                    counted(op, u64::from(bits), 32)
                });
            }
            _ => r.map1(d, a, mask, |a: u32| counted(op, u64::from(a), 32)),
        }
    }

    pub(super) fn lop3(&mut self, table: u8, d: Index, s: [Index; 3], mask: u32) {
        self.registers.map3(d, s, mask, |a: u32, b: u32, c: u32| {
            let mut result = 0;
            for entry in 0..8 {
                if table >> entry & 1 == 1 {
                    let a = if entry & 4 != 0 { a } else { !a };
                    let b = if entry & 2 != 0 { b } else { !b };
                    let c = if entry & 1 != 0 { c } else { !c };
                    result |= a & b & c;
                }
            }
            result
        });
    }

    pub(super) fn permute(&mut self, d: Index, s: [Index; 3], mask: u32) {
        self.registers.map3(d, s, mask, |a: u32, b: u32, selector: u32| {
            let bytes = u64::from(b) << 32 | u64::from(a);
            let mut result = 0;
            for at in 0..4 {
                let choice = selector >> (4 * at) & 0xF;
                let byte = (bytes >> (8 * (choice & 7))) as u32 & 0xFF;
                // The top bit of a choice asks for the byte's sign instead.
                let byte = if choice & 8 == 0 { byte } else { 0xFF * (byte >> 7) };
                result |= byte << (8 * at);
            }
            result
        });
    }

    pub(super) fn funnel_shift(&mut self, left: bool, wrap: bool, d: Index, s: [Index; 3], mask: u32) {
        self.registers.map3(d, s, mask, |a: u32, b: u32, by: u32| {
            let by = if wrap { by & 31 } else { by.min(32) };
            let both = u64::from(b) << 32 | u64::from(a);
            if left { (both << by >> 32) as u32 } else { (both >> by) as u32 }
        });
    }

    /// Lanes for which the comparison holds.
    pub(super) fn compare(&self, compare: Compare, ty: Type, ftz: bool, a: Index, b: Index) -> u32 {
        match ty {
            Type::U16 | Type::U8 => self.ordered::<u16>(compare, a, b),
            Type::S16 | Type::S8 => self.ordered::<i16>(compare, a, b),
            Type::U32 => self.ordered::<u32>(compare, a, b),
            Type::S32 => self.ordered::<i32>(compare, a, b),
            Type::U64 => self.ordered::<u64>(compare, a, b),
            Type::S64 => self.ordered::<i64>(compare, a, b),
            Type::F16 => self.ordered::<half::f16>(compare, a, b),
            Type::Bf16 => self.ordered::<half::bf16>(compare, a, b),
            Type::F32 if ftz => {
                let (a, b) = (f32::get(&self.registers, a), f32::get(&self.registers, b));
                (0..LANES).fold(0, |held, lane| {
                    let holds = holds(compare, float::flush(a[lane]), float::flush(b[lane]));
                    held | u32::from(holds) << lane
                })
            }
            Type::F32 => self.ordered::<f32>(compare, a, b),
            Type::F64 => self.ordered::<f64>(compare, a, b),
        }
    }

    fn ordered<T: Lane + PartialOrd>(&self, compare: Compare, a: Index, b: Index) -> u32 {
        let r = &self.registers;
        match compare {
            Compare::Equal => r.test2(a, b, |a: T, b: T| a == b),
            Compare::NotEqual => r.test2(a, b, |a: T, b: T| holds(Compare::NotEqual, a, b)),
            Compare::Less => r.test2(a, b, |a: T, b: T| a < b),
            Compare::LessEqual => r.test2(a, b, |a: T, b: T| a <= b),
            Compare::Greater => r.test2(a, b, |a: T, b: T| a > b),
            Compare::GreaterEqual => r.test2(a, b, |a: T, b: T| a >= b),
            other => r.test2(a, b, |a: T, b: T| holds(other, a, b)),
        }
    }

    pub(super) fn combine(&mut self, held: u32, combine: Option<Combine>, p: Index, q: Option<Index>, mask: u32) {
        let (mut first, mut second) = (held, !held);
        if let Some(Combine { logic, predicate, negated }) = combine {
            let other = self.registers.predicates[predicate as usize];
            let other = if negated { !other } else { other };
            (first, second) = (combined(logic, first, other), combined(logic, second, other));
        }
        self.registers.set_predicate(p, first, mask);
        if let Some(q) = q {
            self.registers.set_predicate(q, second, mask);
        }
    }
}

fn holds<T: PartialOrd>(compare: Compare, a: T, b: T) -> bool {
    let (less, equal, greater) = (a < b, a == b, a > b);
    let unordered = !(less || equal || greater);
    match compare {
        Compare::Equal => equal,
        Compare::NotEqual => less || greater,
        Compare::Less => less,
        Compare::LessEqual => less || equal,
        Compare::Greater => greater,
        Compare::GreaterEqual => greater || equal,
        Compare::EqualU => equal || unordered,
        Compare::NotEqualU => !equal,
        Compare::LessU => less || unordered,
        Compare::LessEqualU => !greater,
        Compare::GreaterU => greater || unordered,
        Compare::GreaterEqualU => !less,
        Compare::Ordered => !unordered,
        Compare::Unordered => unordered,
    }
}

fn field_mask(length: u32) -> i128 {
    if length >= 64 { i128::from(u64::MAX) } else { (1 << length) - 1 }
}

/// `bfe`: bits beyond the register are its sign (signed) or zero.
fn extract<T: Integer>(a: T, position: u32, length: u32) -> T {
    let (position, length) = (position & 0xFF, length & 0xFF);
    if length == 0 {
        return T::zero();
    }
    // An i128 holds the value with its sign, as if the register went on for ever.
    let wide: i128 = a.as_();
    let moved = wide >> position.min(127);
    if length >= T::BITS {
        return T::from_wide(moved);
    }
    let field = moved & field_mask(length);
    // The sign bit of the field lies at its end, or at the register's.
    let sign = wide >> (position + length - 1).min(T::BITS - 1) & 1;
    if T::SIGNED && sign == 1 { T::from_wide(field | !field_mask(length)) } else { T::from_wide(field) }
}

/// `bfind` of a negative number looks for the first bit that differs from the sign.
fn above_sign(op: CountOp, value: i64, sign: i64) -> i64 {
    if matches!(op, CountOp::FindLeading | CountOp::FindLeadingShift) { value ^ sign } else { value }
}

fn counted(op: CountOp, bits: u64, width: u32) -> u32 {
    let zeros = bits.leading_zeros() - (64 - width);
    match op {
        CountOp::Population => bits.count_ones(),
        CountOp::LeadingZeros => zeros,
        CountOp::FindLeading if zeros == width => u32::MAX,
        CountOp::FindLeading => width - 1 - zeros,
        CountOp::FindLeadingShift if zeros == width => u32::MAX,
        CountOp::FindLeadingShift => zeros,
    }
}
