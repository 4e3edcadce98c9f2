//! Float arithmetic: correctly rounded, also where hardware is allowed to approximate.
//!
//! Sums and products of two f32 are formed in f64 and rounded to odd, so that the one rounding that follows, in
//! whatever direction, is right. `.approx` instructions are computed in f64 and rounded: hardware is a few units off.

use half::{bf16, f16};

use crate::instruction::{FloatMode, FloatOp, FloatType, Index, Rounding};
use crate::registers::Lane;
use crate::warp::Warp;

/// The NaN that NVIDIA hardware gives.
const NAN: u32 = 0x7FFF_FFFF;
const NAN64: u64 = 0x7FF8_0000_0000_0000;
pub(super) const HALF_NAN: u16 = 0x7FFF;

/// `.ftz`: subnormal numbers become zeros of their sign.
#[inline(always)]
pub(super) fn flush(value: f32) -> f32 {
    let bits = value.to_bits();
    if bits & 0x7F80_0000 == 0 { f32::from_bits(bits & 0x8000_0000) } else { value }
}

#[inline(always)]
fn canonical(value: f32) -> f32 {
    if value.is_nan() { f32::from_bits(NAN) } else { value }
}

#[inline(always)]
pub(super) fn saturated(value: f32) -> f32 {
    // NaN becomes zero, as PTX says.
    if value > 0.0 { value.min(1.0) } else { 0.0 }
}

/// Moves a nearest-rounded f64 with a remainder of this sign to the neighbour that is odd.
#[inline(always)]
fn odd(value: f64, remainder: f64) -> f64 {
    let bits = value.to_bits();
    // Not so for NaN.
    let inexact = remainder.abs() > 0.0;
    let away = (remainder > 0.0) == (value > 0.0);
    let moved = if away { bits.wrapping_add(1) } else { bits.wrapping_sub(1) };
    f64::from_bits(if inexact && bits & 1 == 0 { moved } else { bits })
}

/// `a * b + c` rounded to odd in f64. The product of two f32 (or narrower) is exact there.
#[inline(always)]
pub(super) fn fused(a: f64, b: f64, c: f64) -> f64 {
    let product = a * b;
    let sum = product + c;
    // The error of the sum, exactly (Knuth).
    let other = sum - product;
    odd(sum, (product - (sum - other)) + (c - other))
}

/// f64 that is exact or rounded to odd, to f32.
#[inline(always)]
pub(super) fn narrow(value: f64, rounding: Rounding) -> f32 {
    let nearest = value as f32;
    let found = f64::from(nearest);
    match rounding {
        Rounding::Nearest | Rounding::Away => nearest,
        Rounding::Zero if found.abs() > value.abs() => {
            if value > 0.0 {
                nearest.next_down()
            } else {
                nearest.next_up()
            }
        }
        Rounding::Down if found > value => nearest.next_down(),
        Rounding::Up if found < value => nearest.next_up(),
        Rounding::Zero | Rounding::Down | Rounding::Up => nearest,
    }
}

/// f64 to f32 rounded to odd, for a further rounding to 16 bits.
fn narrow_odd(value: f64) -> f32 {
    let nearest = value as f32;
    let found = f64::from(nearest);
    if found == value || value.is_nan() || nearest.to_bits() & 1 == 1 {
        return nearest;
    }
    if found < value { nearest.next_up() } else { nearest.next_down() }
}

fn divided(a: f32, b: f32, rounding: Rounding) -> f32 {
    if rounding == Rounding::Nearest {
        return a / b;
    }
    let (a, b) = (f64::from(a), f64::from(b));
    let quotient = a / b;
    if !quotient.is_finite() || b == 0.0 {
        return quotient as f32;
    }
    // The remainder is exact; its sign, over that of b, tells on which side the quotient lies.
    let remainder = (-quotient).mul_add(b, a);
    narrow(odd(quotient, remainder * b.signum()), rounding)
}

fn square_root(a: f32, rounding: Rounding) -> f32 {
    if rounding == Rounding::Nearest || a.is_nan() || a <= 0.0 || a.is_infinite() {
        return a.sqrt();
    }
    let a = f64::from(a);
    let root = a.sqrt();
    narrow(odd(root, (-root).mul_add(root, a)), rounding)
}

/// The smaller number; a NaN loses against a number; -0 is below +0.
#[inline(always)]
fn smaller(a: f32, b: f32) -> f32 {
    if a < b || b.is_nan() {
        a
    } else if b < a || a.is_nan() {
        b
    } else {
        f32::from_bits(a.to_bits() | b.to_bits())
    }
}

#[inline(always)]
fn larger(a: f32, b: f32) -> f32 {
    if a > b || b.is_nan() {
        a
    } else if b > a || a.is_nan() {
        b
    } else {
        f32::from_bits(a.to_bits() & b.to_bits())
    }
}

fn with_nan(a: f32, b: f32, f: impl Fn(f32, f32) -> f32) -> f32 {
    if a.is_nan() || b.is_nan() { f32::NAN } else { f(a, b) }
}

/// Unary functions in f64, rounded once.
fn unary(op: FloatOp, a: f32) -> f32 {
    let wide = f64::from(a);
    (match op {
        FloatOp::ReciprocalSqrt => 1.0 / wide.sqrt(),
        FloatOp::Exp2 => wide.exp2(),
        FloatOp::Log2 => wide.log2(),
        FloatOp::Sin => wide.sin(),
        FloatOp::Cos => wide.cos(),
        _ => wide.tanh(),
    }) as f32
}

impl Warp {
    pub(super) fn float(&mut self, op: FloatOp, ty: FloatType, mode: FloatMode, d: Index, s: [Index; 3], mask: u32) {
        match ty {
            FloatType::F32 if mode.ftz => self.single(op, mode, d, s, mask, flush),
            FloatType::F32 => self.single(op, mode, d, s, mask, |value| value),
            FloatType::F64 => self.float64(op, mode, d, s, mask),
            FloatType::F16 => self.half::<F16>(op, mode, d, s, mask),
            FloatType::Bf16 => self.half::<Bf16>(op, mode, d, s, mask),
            FloatType::F16x2 => self.half_pair::<F16>(op, mode, d, s, mask),
            FloatType::Bf16x2 => self.half_pair::<Bf16>(op, mode, d, s, mask),
        }
        if mode.saturate && ty == FloatType::F32 {
            self.registers.map1(d, d, mask, saturated);
        }
    }

    #[inline(always)]
    fn single(&mut self, op: FloatOp, mode: FloatMode, d: Index, s: [Index; 3], mask: u32, ftz: impl Fn(f32) -> f32) {
        let r = &mut self.registers;
        let (one, two) = (s[0], [s[0], s[1]]);
        let rounding = mode.rounding;
        let end = |value: f32| ftz(canonical(value));
        match (op, rounding) {
            (FloatOp::Add, Rounding::Nearest) => r.map2(d, two, mask, |a: f32, b: f32| end(ftz(a) + ftz(b))),
            (FloatOp::Sub, Rounding::Nearest) => r.map2(d, two, mask, |a: f32, b: f32| end(ftz(a) - ftz(b))),
            (FloatOp::Mul, Rounding::Nearest) => r.map2(d, two, mask, |a: f32, b: f32| end(ftz(a) * ftz(b))),
            (FloatOp::Fma, Rounding::Nearest) => r.map3(d, s, mask, |a: f32, b: f32, c: f32| {
                end(fused(f64::from(ftz(a)), f64::from(ftz(b)), f64::from(ftz(c))) as f32)
            }),
            (FloatOp::Add, _) => r.map2(d, two, mask, |a: f32, b: f32| {
                end(narrow(fused(f64::from(ftz(a)), 1.0, f64::from(ftz(b))), rounding))
            }),
            (FloatOp::Sub, _) => r.map2(d, two, mask, |a: f32, b: f32| {
                end(narrow(fused(f64::from(ftz(a)), 1.0, -f64::from(ftz(b))), rounding))
            }),
            (FloatOp::Mul, _) => {
                r.map2(d, two, mask, |a: f32, b: f32| end(narrow(f64::from(ftz(a)) * f64::from(ftz(b)), rounding)))
            }
            (FloatOp::Fma | FloatOp::FmaRelu, _) => r.map3(d, s, mask, |a: f32, b: f32, c: f32| {
                end(narrow(fused(f64::from(ftz(a)), f64::from(ftz(b)), f64::from(ftz(c))), rounding))
            }),
            (FloatOp::Div, _) => r.map2(d, two, mask, |a: f32, b: f32| end(divided(ftz(a), ftz(b), rounding))),
            (FloatOp::Min, _) => r.map2(d, two, mask, |a: f32, b: f32| end(smaller(ftz(a), ftz(b)))),
            (FloatOp::Max, _) => r.map2(d, two, mask, |a: f32, b: f32| end(larger(ftz(a), ftz(b)))),
            (FloatOp::MinNan, _) => r.map2(d, two, mask, |a: f32, b: f32| end(with_nan(ftz(a), ftz(b), smaller))),
            (FloatOp::MaxNan, _) => r.map2(d, two, mask, |a: f32, b: f32| end(with_nan(ftz(a), ftz(b), larger))),
            (FloatOp::Abs, _) => r.map1(d, one, mask, |a: f32| ftz(a.abs())),
            (FloatOp::Neg, _) => r.map1(d, one, mask, |a: f32| ftz(-a)),
            // PTX copies the sign of its first operand to the second.
            (FloatOp::CopySign, _) => r.map2(d, two, mask, |a: f32, b: f32| b.copysign(a)),
            (FloatOp::Reciprocal, _) => r.map1(d, one, mask, |a: f32| end(divided(1.0, ftz(a), rounding))),
            (FloatOp::Sqrt, _) => r.map1(d, one, mask, |a: f32| end(square_root(ftz(a), rounding))),
            (op, _) => r.map1(d, one, mask, |a: f32| end(unary(op, ftz(a)))),
        }
    }

    fn float64(&mut self, op: FloatOp, mode: FloatMode, d: Index, s: [Index; 3], mask: u32) {
        let r = &mut self.registers;
        let (one, two) = (s[0], [s[0], s[1]]);
        let end = |value: f64| {
            let value = if value.is_nan() { f64::from_bits(NAN64) } else { value };
            // A NaN becomes zero, as PTX says.
            if mode.saturate { if value > 0.0 { value.min(1.0) } else { 0.0 } } else { value }
        };
        let picked = |less: bool, a: f64, b: f64| {
            let first = if a == b { less == a.is_sign_negative() } else { less == (a < b) };
            if b.is_nan() || (first && !a.is_nan()) { a } else { b }
        };
        match op {
            FloatOp::Add => r.map2(d, two, mask, |a: f64, b: f64| end(a + b)),
            FloatOp::Sub => r.map2(d, two, mask, |a: f64, b: f64| end(a - b)),
            FloatOp::Mul => r.map2(d, two, mask, |a: f64, b: f64| end(a * b)),
            FloatOp::Fma | FloatOp::FmaRelu => r.map3(d, s, mask, |a: f64, b: f64, c: f64| end(a.mul_add(b, c))),
            FloatOp::Div => r.map2(d, two, mask, |a: f64, b: f64| end(a / b)),
            FloatOp::Min | FloatOp::MinNan => r.map2(d, two, mask, |a: f64, b: f64| end(picked(true, a, b))),
            FloatOp::Max | FloatOp::MaxNan => r.map2(d, two, mask, |a: f64, b: f64| end(picked(false, a, b))),
            FloatOp::Abs => r.map1(d, one, mask, f64::abs),
            FloatOp::Neg => r.map1(d, one, mask, |a: f64| -a),
            FloatOp::CopySign => r.map2(d, two, mask, |a: f64, b: f64| b.copysign(a)),
            FloatOp::Reciprocal => r.map1(d, one, mask, |a: f64| end(1.0 / a)),
            FloatOp::Sqrt => r.map1(d, one, mask, |a: f64| end(a.sqrt())),
            FloatOp::ReciprocalSqrt => r.map1(d, one, mask, |a: f64| end(1.0 / a.sqrt())),
            FloatOp::Exp2 => r.map1(d, one, mask, |a: f64| end(a.exp2())),
            FloatOp::Log2 => r.map1(d, one, mask, |a: f64| end(a.log2())),
            FloatOp::Sin => r.map1(d, one, mask, |a: f64| end(a.sin())),
            FloatOp::Cos => r.map1(d, one, mask, |a: f64| end(a.cos())),
            FloatOp::Tanh => r.map1(d, one, mask, |a: f64| end(a.tanh())),
        }
    }

    fn half<H: Half>(&mut self, op: FloatOp, mode: FloatMode, d: Index, s: [Index; 3], mask: u32) {
        self.registers.map3(d, s, mask, |a: u16, b: u16, c: u16| half_op::<H>(op, mode, [a, b, c]));
    }

    fn half_pair<H: Half>(&mut self, op: FloatOp, mode: FloatMode, d: Index, s: [Index; 3], mask: u32) {
        self.registers.map3(d, s, mask, |a: u32, b: u32, c: u32| {
            let low = half_op::<H>(op, mode, [a as u16, b as u16, c as u16]);
            let high = half_op::<H>(op, mode, [(a >> 16) as u16, (b >> 16) as u16, (c >> 16) as u16]);
            u32::from(high) << 16 | u32::from(low)
        });
    }
}

/// The two types of 16 bits.
pub(super) trait Half {
    /// Bits of the exponent and of the fraction, in place.
    const EXPONENT: u16;
    fn wide(bits: u16) -> f32;
    fn nearest(value: f32) -> u16;
}

pub(super) struct F16;
pub(super) struct Bf16;

impl Half for F16 {
    const EXPONENT: u16 = 0x7C00;
    fn wide(bits: u16) -> f32 {
        f16::from_bits(bits).to_f32()
    }
    fn nearest(value: f32) -> u16 {
        if value.is_nan() { HALF_NAN } else { f16::from_f32(value).to_bits() }
    }
}

impl Half for Bf16 {
    const EXPONENT: u16 = 0x7F80;
    fn wide(bits: u16) -> f32 {
        bf16::from_bits(bits).to_f32()
    }
    #[inline(always)]
    fn nearest(value: f32) -> u16 {
        let bits = value.to_bits();
        let rounded = (bits.wrapping_add(0x7FFF + (bits >> 16 & 1)) >> 16) as u16;
        if value.is_nan() { HALF_NAN } else { rounded }
    }
}

fn half_op<H: Half>(op: FloatOp, mode: FloatMode, s: [u16; 3]) -> u16 {
    // Sign operations keep the bits of a NaN.
    match op {
        FloatOp::Abs => return s[0] & 0x7FFF,
        FloatOp::Neg => return s[0] ^ 0x8000,
        _ => {}
    }
    let flushed = |bits: u16| if mode.ftz && bits & H::EXPONENT == 0 { bits & 0x8000 } else { bits };
    let [a, b, c] = s.map(|bits| H::wide(flushed(bits)));
    let [x, y, z] = [a, b, c].map(f64::from);
    let value = match op {
        FloatOp::Add => narrow_odd(fused(x, 1.0, y)),
        FloatOp::Sub => narrow_odd(fused(x, 1.0, -y)),
        FloatOp::Mul => narrow_odd(x * y),
        FloatOp::Fma => narrow_odd(fused(x, y, z)),
        FloatOp::FmaRelu => {
            let value = narrow_odd(fused(x, y, z));
            if value.is_nan() { value } else { value.max(0.0) }
        }
        FloatOp::Min => smaller(a, b),
        FloatOp::Max => larger(a, b),
        FloatOp::MinNan => with_nan(a, b, smaller),
        FloatOp::MaxNan => with_nan(a, b, larger),
        FloatOp::Exp2 => narrow_odd(x.exp2()),
        _ => narrow_odd(x.tanh()),
    };
    let value = if mode.saturate { saturated(value) } else { value };
    flushed(H::nearest(value))
}

impl Warp {
    /// Lanes of f32, for the other files of this folder.
    pub(super) fn floats(&self, index: Index) -> [f32; 32] {
        f32::get(&self.registers, index)
    }
}
