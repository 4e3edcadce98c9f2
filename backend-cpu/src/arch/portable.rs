//! Plain Rust over arrays: the reference for the other sets, and what runs where there is nothing better.

use super::simd::{EXP2, EXP2_MAGIC, EXP2_ZERO, Simd};

/// No instructions beyond the target's baseline. With `PAIRS`, what sets with bf16 products do, step by step.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Portable<const PAIRS: bool>;

const LANES: usize = 8;

fn map2(a: [f32; LANES], b: [f32; LANES], f: impl Fn(f32, f32) -> f32) -> [f32; LANES] {
    std::array::from_fn(|i| f(a[i], b[i]))
}

// SAFETY: the methods use no special instructions.
unsafe impl<const PAIRS: bool> Simd for Portable<PAIRS> {
    type V = [f32; LANES];
    type Half = Self;
    const LANES: usize = LANES;
    const BLOCK_ROWS: usize = 4;
    const BLOCK_VECTORS: usize = 2;
    const PAIRS: bool = PAIRS;

    fn half(self) -> Self {
        self
    }

    fn vectorize<R>(self, work: impl FnOnce() -> R) -> R {
        work()
    }

    #[inline(always)]
    fn splat(self, x: f32) -> Self::V {
        [x; LANES]
    }

    #[inline(always)]
    fn add(self, a: Self::V, b: Self::V) -> Self::V {
        map2(a, b, |a, b| a + b)
    }

    #[inline(always)]
    fn sub(self, a: Self::V, b: Self::V) -> Self::V {
        map2(a, b, |a, b| a - b)
    }

    #[inline(always)]
    fn mul(self, a: Self::V, b: Self::V) -> Self::V {
        map2(a, b, |a, b| a * b)
    }

    #[inline(always)]
    fn div(self, a: Self::V, b: Self::V) -> Self::V {
        map2(a, b, |a, b| a / b)
    }

    /// Rounded twice: without an FMA instruction, `mul_add` is a library call of many cycles.
    #[inline(always)]
    fn fma(self, a: Self::V, b: Self::V, c: Self::V) -> Self::V {
        std::array::from_fn(|i| a[i] * b[i] + c[i])
    }

    #[inline(always)]
    fn multiply(self, a: Self::V, b: Self::V, c: Self::V) -> Self::V {
        if !PAIRS {
            return self.fma(a, b, c);
        }
        let halves = |x: f32| (f32::from_bits(x.to_bits() << 16), f32::from_bits(x.to_bits() & 0xffff_0000));
        std::array::from_fn(|i| {
            let (a, b) = (halves(a[i]), halves(b[i]));
            // A product of two bf16 has no rounding error of its own.
            a.0 * b.0 + (a.1 * b.1 + c[i])
        })
    }

    #[inline(always)]
    fn max(self, a: Self::V, b: Self::V) -> Self::V {
        map2(a, b, |a, b| if a > b { a } else { b })
    }

    #[inline(always)]
    fn select_eq(self, a: Self::V, b: Self::V, then: Self::V, other: Self::V) -> Self::V {
        std::array::from_fn(|i| if a[i] == b[i] { then[i] } else { other[i] })
    }

    #[inline(always)]
    fn any_gt(self, a: Self::V, b: Self::V) -> bool {
        a.iter().zip(&b).any(|(a, b)| a > b)
    }

    #[inline(always)]
    fn exp2(self, x: Self::V) -> Self::V {
        x.map(|x| {
            let x = if EXP2_ZERO > x { EXP2_ZERO } else { x };
            let shifted = x + EXP2_MAGIC;
            let f = x - (shifted - EXP2_MAGIC);
            let p = EXP2.iter().rev().fold(0.0, |p, c| p * f + c) * f + 1.0;
            p * f32::from_bits(shifted.to_bits() << 23)
        })
    }

    #[inline(always)]
    unsafe fn load(self, from: *const f32) -> Self::V {
        // SAFETY: the caller promises `LANES` readable f32.
        unsafe { from.cast::<Self::V>().read_unaligned() }
    }

    #[inline(always)]
    unsafe fn store(self, to: *mut f32, v: Self::V) {
        // SAFETY: the caller promises `LANES` writable f32.
        unsafe { to.cast::<Self::V>().write_unaligned(v) }
    }

    #[inline(always)]
    unsafe fn transpose(self, from: *const f32, from_stride: usize, to: *mut f32, to_stride: usize) {
        for i in 0..LANES {
            for j in 0..LANES {
                // SAFETY: i, j < LANES, and the caller promises LANES rows of LANES elements on both sides.
                unsafe { *to.add(j * to_stride + i) = *from.add(i * from_stride + j) };
            }
        }
    }
}
