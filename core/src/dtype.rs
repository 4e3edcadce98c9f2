//! Element types a tensor may have.

use std::fmt;

use half::{bf16, f16};

/// The type of one element of a tensor.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum DType {
    /// IEEE 754 binary32.
    F32,
    /// IEEE 754 binary16.
    F16,
    /// bfloat16: binary32 with the low 16 bits cut off.
    BF16,
    /// 32-bit signed integer (segment ids).
    I32,
    /// One byte; 0 is false, anything else is true (key masks).
    Bool,
}

impl DType {
    /// Size of one element in bytes, which is also its alignment.
    #[must_use]
    pub const fn size_bytes(self) -> usize {
        match self {
            Self::F32 | Self::I32 => 4,
            Self::F16 | Self::BF16 => 2,
            Self::Bool => 1,
        }
    }

    /// Whether the type holds real numbers: what q, k, v, biases and outputs may be.
    #[must_use]
    pub const fn is_float(self) -> bool {
        matches!(self, Self::F32 | Self::F16 | Self::BF16)
    }

    /// Unit roundoff: the largest relative error of rounding a number in normal range to this type.
    ///
    /// 2⁻²⁴ (f32), 2⁻¹¹ (f16), 2⁻⁸ (bf16), 0 for exact types.
    #[must_use]
    pub const fn unit_roundoff(self) -> f64 {
        match self {
            Self::F32 => 1.0 / 16_777_216.0,
            Self::F16 => 1.0 / 2048.0,
            Self::BF16 => 1.0 / 256.0,
            Self::I32 | Self::Bool => 0.0,
        }
    }
}

impl fmt::Display for DType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::F32 => "f32",
            Self::F16 => "f16",
            Self::BF16 => "bf16",
            Self::I32 => "i32",
            Self::Bool => "bool",
        })
    }
}

/// A Rust type that is the element of a tensor.
pub trait Element: bytemuck::Pod + Send + Sync {
    /// The tensor's element type.
    const DTYPE: DType;
    /// The value as f64: exact for every supported type.
    fn to_f64(self) -> f64;
    /// The nearest value of this type (round to nearest, ties to even; integers saturate).
    fn from_f64(value: f64) -> Self;
}

macro_rules! element {
    ($type:ty, $dtype:ident, $to:expr, $from:expr) => {
        impl Element for $type {
            const DTYPE: DType = DType::$dtype;
            fn to_f64(self) -> f64 {
                $to(self)
            }
            #[allow(clippy::cast_possible_truncation, reason = "rounding to the type is what is asked for")]
            fn from_f64(value: f64) -> Self {
                $from(value)
            }
        }
    };
}
element!(f32, F32, f64::from, |v| v as f32);
element!(f16, F16, f16::to_f64, |v| f16::from_f32(round_to_odd(v)));
element!(bf16, BF16, bf16::to_f64, |v| bf16::from_f32(round_to_odd(v)));
element!(i32, I32, f64::from, |v| v as i32);
element!(u8, Bool, f64::from, |v| u8::from(v != 0.0));

/// The f32 next to `value` towards 0, its last bit set when it is not exact: rounding that once more to half precision
/// gives the nearest half-precision number, as rounding twice to nearest would not.
#[allow(clippy::cast_possible_truncation, reason = "rounding to f32 is the first step")]
fn round_to_odd(value: f64) -> f32 {
    let nearest = value as f32;
    if value.is_nan() || f64::from(nearest) == value {
        return nearest;
    }
    let beyond = f64::from(nearest).abs() > value.abs();
    f32::from_bits((nearest.to_bits() - u32::from(beyond)) | 1)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn f64_is_rounded_once() {
        // Just above the middle of 1 and the next f16: rounding to f32 first would land on the middle, then on 1.
        let above_middle = 1.0 + 2_f64.powi(-11) + 2_f64.powi(-40);
        assert_eq!(f16::from_f32(round_to_odd(above_middle)), f16::from_bits(0x3c01));
        assert_eq!(<f16 as Element>::from_f64(-above_middle), f16::from_bits(0xbc01));
        assert_eq!(<f16 as Element>::from_f64(1.0 + 2_f64.powi(-11)), f16::from_bits(0x3c00), "ties to even");
        assert_eq!(<bf16 as Element>::from_f64(1.0 + 2_f64.powi(-8) + 2_f64.powi(-40)), bf16::from_bits(0x3f81));
        assert_eq!(<bf16 as Element>::from_f64(f64::MAX), bf16::INFINITY);
        assert!(<f16 as Element>::from_f64(f64::NAN).is_nan());
        assert_eq!(<f16 as Element>::from_f64(f64::NEG_INFINITY), f16::NEG_INFINITY);
    }
}
