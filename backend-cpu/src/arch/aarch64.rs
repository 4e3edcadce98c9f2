//! NEON.
#![allow(
    clippy::undocumented_unsafe_blocks,
    reason = "every block is one intrinsic whose only condition is that the processor has it, which the token proves; \
              blocks that touch memory say more"
)]

use std::arch::aarch64::*;

use super::simd::{EXP2, EXP2_MAGIC, EXP2_ZERO, Simd};

/// Proof that the processor has NEON.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Neon(());

impl Neon {
    /// The token, where the processor has the instructions.
    pub(crate) fn detect() -> Option<Self> {
        std::arch::is_aarch64_feature_detected!("neon").then_some(Self(()))
    }
}

#[target_feature(enable = "neon")]
fn with_neon<R>(work: impl FnOnce() -> R) -> R {
    work()
}

// SAFETY: `detect` checks every feature the methods use.
unsafe impl Simd for Neon {
    type V = float32x4_t;
    type Half = Self;
    const LANES: usize = 4;
    // 24 accumulators, 4 vectors and a broadcast of 32 registers.
    const BLOCK_ROWS: usize = 6;
    const BLOCK_VECTORS: usize = 4;
    const PAIRS: bool = false;

    fn half(self) -> Self {
        self
    }

    #[inline(always)]
    fn vectorize<R>(self, work: impl FnOnce() -> R) -> R {
        unsafe { with_neon(work) }
    }

    #[inline(always)]
    fn splat(self, x: f32) -> float32x4_t {
        unsafe { vdupq_n_f32(x) }
    }

    #[inline(always)]
    fn add(self, a: float32x4_t, b: float32x4_t) -> float32x4_t {
        unsafe { vaddq_f32(a, b) }
    }

    #[inline(always)]
    fn sub(self, a: float32x4_t, b: float32x4_t) -> float32x4_t {
        unsafe { vsubq_f32(a, b) }
    }

    #[inline(always)]
    fn mul(self, a: float32x4_t, b: float32x4_t) -> float32x4_t {
        unsafe { vmulq_f32(a, b) }
    }

    #[inline(always)]
    fn div(self, a: float32x4_t, b: float32x4_t) -> float32x4_t {
        unsafe { vdivq_f32(a, b) }
    }

    #[inline(always)]
    fn fma(self, a: float32x4_t, b: float32x4_t, c: float32x4_t) -> float32x4_t {
        unsafe { vfmaq_f32(c, a, b) }
    }

    /// A NaN in either argument gives NaN, where the other sets give `b`; no caller can tell, since a NaN score makes its
    /// row NaN in any case.
    #[inline(always)]
    fn max(self, a: float32x4_t, b: float32x4_t) -> float32x4_t {
        unsafe { vmaxq_f32(a, b) }
    }

    #[inline(always)]
    fn select_eq(self, a: float32x4_t, b: float32x4_t, then: float32x4_t, other: float32x4_t) -> float32x4_t {
        unsafe { vbslq_f32(vceqq_f32(a, b), then, other) }
    }

    #[inline(always)]
    fn any_gt(self, a: float32x4_t, b: float32x4_t) -> bool {
        unsafe { vmaxvq_u32(vcgtq_f32(a, b)) != 0 }
    }

    #[inline(always)]
    fn exp2(self, x: float32x4_t) -> float32x4_t {
        let x = self.max(self.splat(EXP2_ZERO), x);
        let magic = self.splat(EXP2_MAGIC);
        let shifted = self.add(x, magic);
        let f = self.sub(x, self.sub(shifted, magic));
        let mut p = self.splat(EXP2[4]);
        for c in [EXP2[3], EXP2[2], EXP2[1], EXP2[0], 1.0] {
            p = self.fma(p, f, self.splat(c));
        }
        let power = unsafe { vreinterpretq_f32_s32(vshlq_n_s32::<23>(vreinterpretq_s32_f32(shifted))) };
        self.mul(p, power)
    }

    #[inline(always)]
    unsafe fn load(self, from: *const f32) -> float32x4_t {
        // SAFETY: the caller promises 4 readable f32.
        unsafe { vld1q_f32(from) }
    }

    #[inline(always)]
    unsafe fn store(self, to: *mut f32, v: float32x4_t) {
        // SAFETY: the caller promises 4 writable f32.
        unsafe { vst1q_f32(to, v) }
    }

    #[inline(always)]
    unsafe fn transpose(self, from: *const f32, from_stride: usize, to: *mut f32, to_stride: usize) {
        // SAFETY: the caller promises 4 rows of 4 f32 on both sides; the rest moves registers.
        unsafe {
            let mut r = [vdupq_n_f32(0.0); 4];
            for i in 0..4 {
                r[i] = vld1q_f32(from.add(i * from_stride));
            }
            let (a, b) = (vtrnq_f32(r[0], r[1]), vtrnq_f32(r[2], r[3]));
            vst1q_f32(to, vcombine_f32(vget_low_f32(a.0), vget_low_f32(b.0)));
            vst1q_f32(to.add(to_stride), vcombine_f32(vget_low_f32(a.1), vget_low_f32(b.1)));
            vst1q_f32(to.add(2 * to_stride), vcombine_f32(vget_high_f32(a.0), vget_high_f32(b.0)));
            vst1q_f32(to.add(3 * to_stride), vcombine_f32(vget_high_f32(a.1), vget_high_f32(b.1)));
        }
    }
}
