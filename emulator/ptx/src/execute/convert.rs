//! Conversions between integers and floats of all widths.

use super::float::{Bf16, F16, HALF_NAN, Half, flush, narrow, saturated};
use super::lanes;
use crate::instruction::{FloatMode, Index, Rounding, Type};
use crate::warp::Warp;

#[derive(Clone, Copy)]
enum Value {
    Integer(i128),
    Float(f64),
}

impl Warp {
    /// `(type, register is 64 bits wide)` of result and source; `[d, a]`.
    pub(super) fn convert(
        &mut self,
        (to, wide_to): (Type, bool),
        (from, wide_from): (Type, bool),
        mode: FloatMode,
        integral: bool,
        [d, a]: [Index; 2],
        mask: u32,
    ) {
        let r = &mut self.registers;
        // The conversions that address arithmetic is full of.
        match (to, from, wide_to, wide_from) {
            (Type::U64 | Type::S64, Type::U32, true, false) => return r.map1(d, a, mask, |a: u32| u64::from(a)),
            (Type::U64 | Type::S64, Type::S32, true, false) => return r.map1(d, a, mask, |a: i32| i64::from(a)),
            (Type::U32 | Type::S32, Type::U64 | Type::S64, false, true) if !mode.saturate => {
                return r.map1(d, a, mask, |a: u64| a as u32);
            }
            (Type::U32 | Type::S32, Type::U16, false, false) => return r.map1(d, a, mask, |a: u16| u32::from(a)),
            _ => {}
        }
        let bits = self.bits(a, wide_from);
        let mut converted = [0; 32];
        for lane in lanes(mask) {
            converted[lane] = convert(to, value(from, bits[lane], mode), mode, integral, from);
            // The result fills its register with its sign or with zeros.
        }
        if matches!(to, Type::S8 | Type::S16 | Type::S32 | Type::S64) || !to.is_float() {
            for bits in &mut converted {
                *bits = extended(to, *bits);
            }
        }
        if !wide_to && to.class() == crate::syntax::Class::Half {
            // A 16-bit register holds no more; a wider one keeps the extension.
            let keep = if narrow_register(to) { 0xFFFF } else { 0xFFFF_FFFF };
            for bits in &mut converted {
                *bits &= keep;
            }
        }
        self.put_bits(d, wide_to, &converted, mask);
    }

    /// Two f32 into one register: `a` above, `b` below.
    pub(super) fn convert_pair(
        &mut self,
        is_bf16: bool,
        rounding: Rounding,
        relu: bool,
        d: Index,
        s: [Index; 2],
        mask: u32,
    ) {
        // A NaN stays one.
        let clipped = |value: f32| if relu && value <= 0.0 { 0.0 } else { value };
        let pair = |high: u16, low: u16| u32::from(high) << 16 | u32::from(low);
        let r = &mut self.registers;
        match (is_bf16, rounding) {
            (true, Rounding::Nearest) => {
                r.map2(d, s, mask, |a: f32, b: f32| pair(Bf16::nearest(clipped(a)), Bf16::nearest(clipped(b))))
            }
            (true, _) => r.map2(d, s, mask, |a: f32, b: f32| {
                pair(toward_zero::<Bf16>(clipped(a)), toward_zero::<Bf16>(clipped(b)))
            }),
            (false, Rounding::Nearest) => {
                r.map2(d, s, mask, |a: f32, b: f32| pair(F16::nearest(clipped(a)), F16::nearest(clipped(b))));
            }
            (false, _) => r.map2(d, s, mask, |a: f32, b: f32| {
                pair(toward_zero::<F16>(clipped(a)), toward_zero::<F16>(clipped(b)))
            }),
        }
    }

    /// To the 10-bit fraction of tf32, kept in an f32.
    pub(super) fn convert_tf32(&mut self, rounding: Rounding, d: Index, a: Index, mask: u32) {
        const DROPPED: u32 = 13;
        const LOW: u32 = (1 << DROPPED) - 1;
        self.registers.map1(d, a, mask, |bits: u32| {
            let value = f32::from_bits(bits);
            if value.is_nan() {
                return 0x7FFF_FFFF;
            }
            if value.is_infinite() {
                return bits;
            }
            let rounded = match rounding {
                Rounding::Away => bits + (1 << (DROPPED - 1)),
                Rounding::Nearest => bits + (LOW >> 1) + (bits >> DROPPED & 1),
                _ => bits,
            };
            rounded & !LOW
        });
    }
}

/// Registers of 16 bits hold these; others may stand in wider ones, which decoding allows for integers.
fn narrow_register(ty: Type) -> bool {
    matches!(ty, Type::U16 | Type::U8 | Type::F16 | Type::Bf16)
}

fn extended(ty: Type, bits: u64) -> u64 {
    match ty {
        Type::U8 => bits & 0xFF,
        Type::S8 => i64::from(bits as i8).cast_unsigned(),
        Type::U16 => bits & 0xFFFF,
        Type::S16 => i64::from(bits as i16).cast_unsigned(),
        Type::U32 => bits & 0xFFFF_FFFF,
        Type::S32 => i64::from(bits as i32).cast_unsigned(),
        _ => bits,
    }
}

fn value(from: Type, bits: u64, mode: FloatMode) -> Value {
    match from {
        Type::F16 => Value::Float(f64::from(F16::wide(bits as u16))),
        Type::Bf16 => Value::Float(f64::from(Bf16::wide(bits as u16))),
        Type::F32 => {
            let value = f32::from_bits(bits as u32);
            Value::Float(f64::from(if mode.ftz { flush(value) } else { value }))
        }
        Type::F64 => Value::Float(f64::from_bits(bits)),
        Type::U64 => Value::Integer(i128::from(bits)),
        Type::S64 => Value::Integer(i128::from(bits.cast_signed())),
        unsigned @ (Type::U8 | Type::U16 | Type::U32) => Value::Integer(i128::from(extended(unsigned, bits))),
        signed => Value::Integer(i128::from(extended(signed, bits).cast_signed())),
    }
}

fn range(ty: Type) -> (i128, i128) {
    match ty {
        Type::U8 => (0, u8::MAX.into()),
        Type::S8 => (i8::MIN.into(), i8::MAX.into()),
        Type::U16 => (0, u16::MAX.into()),
        Type::S16 => (i16::MIN.into(), i16::MAX.into()),
        Type::U32 => (0, u32::MAX.into()),
        Type::S32 => (i32::MIN.into(), i32::MAX.into()),
        Type::U64 => (0, u64::MAX.into()),
        _ => (i64::MIN.into(), i64::MAX.into()),
    }
}

fn convert(to: Type, value: Value, mode: FloatMode, integral: bool, from: Type) -> u64 {
    match (value, to.is_float()) {
        (Value::Integer(value), false) => {
            let (least, most) = range(to);
            let value = if mode.saturate { value.clamp(least, most) } else { value };
            value as u64
        }
        (Value::Integer(value), true) => to_float(to, integer(value, to, mode.rounding), mode),
        (Value::Float(value), false) => to_integer(to, value, mode.rounding, from),
        (Value::Float(value), true) => {
            let value = if integral { rounded(value, mode.rounding) } else { value };
            to_float(to, value, mode)
        }
    }
}

/// An integer as an f64 that rounds to the float type in the same way.
fn integer(value: i128, to: Type, rounding: Rounding) -> f64 {
    let nearest = value as f64;
    let found = nearest as i128;
    if found == value {
        return nearest;
    }
    if to == Type::F64 {
        let (up, down) = (found < value, found > value);
        return match rounding {
            Rounding::Up if up => nearest.next_up(),
            Rounding::Down if down => nearest.next_down(),
            Rounding::Zero if down && value > 0 => nearest.next_down(),
            Rounding::Zero if up && value < 0 => nearest.next_up(),
            _ => nearest,
        };
    }
    if nearest.to_bits() & 1 == 1 {
        return nearest;
    }
    if found < value { nearest.next_up() } else { nearest.next_down() }
}

fn rounded(value: f64, rounding: Rounding) -> f64 {
    match rounding {
        Rounding::Nearest | Rounding::Away => value.round_ties_even(),
        Rounding::Zero => value.trunc(),
        Rounding::Down => value.floor(),
        Rounding::Up => value.ceil(),
    }
}

fn to_integer(to: Type, value: f64, rounding: Rounding, from: Type) -> u64 {
    if value.is_nan() {
        return match to {
            Type::S64 | Type::U64 => 1 << 63,
            Type::U32 | Type::S32 if from == Type::F64 => 1 << 31,
            _ => 0,
        };
    }
    let (least, most) = range(to);
    (rounded(value, rounding) as i128).clamp(least, most) as u64
}

fn to_float(to: Type, value: f64, mode: FloatMode) -> u64 {
    match to {
        Type::F64 => {
            let clipped = if value > 0.0 { value.min(1.0) } else { 0.0 };
            (if mode.saturate { clipped } else { value }).to_bits()
        }
        Type::F32 => {
            let value = narrow(value, mode.rounding);
            let value = if value.is_nan() { f32::from_bits(0x7FFF_FFFF) } else { value };
            let value = if mode.ftz { flush(value) } else { value };
            u64::from(if mode.saturate { saturated(value) } else { value }.to_bits())
        }
        Type::F16 => u64::from(to_half::<F16>(value, mode)),
        _ => u64::from(to_half::<Bf16>(value, mode)),
    }
}

fn to_half<H: Half>(value: f64, mode: FloatMode) -> u16 {
    // To odd first: the second rounding is then the only one.
    let nearest = narrow(value, Rounding::Nearest);
    let exact = f64::from(nearest) == value || value.is_nan() || nearest.to_bits() & 1 == 1;
    let up = f64::from(nearest) < value;
    let single = if exact {
        nearest
    } else if up {
        nearest.next_up()
    } else {
        nearest.next_down()
    };
    let single = if mode.saturate { saturated(single) } else { single };
    match mode.rounding {
        Rounding::Zero => toward_zero::<H>(single),
        Rounding::Down if single < 0.0 => away_from_zero::<H>(single),
        Rounding::Up if single > 0.0 => away_from_zero::<H>(single),
        Rounding::Down | Rounding::Up => toward_zero::<H>(single),
        Rounding::Nearest | Rounding::Away => H::nearest(single),
    }
}

fn toward_zero<H: Half>(value: f32) -> u16 {
    let nearest = H::nearest(value);
    if value.is_nan() {
        return HALF_NAN;
    }
    if H::wide(nearest).abs() > value.abs() { nearest - 1 } else { nearest }
}

fn away_from_zero<H: Half>(value: f32) -> u16 {
    let nearest = H::nearest(value);
    if H::wide(nearest).abs() < value.abs() { nearest + 1 } else { nearest }
}
