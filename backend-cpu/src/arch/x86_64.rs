//! AVX2 with FMA, AVX-512, and AVX-512 with bf16 products.
#![allow(
    clippy::undocumented_unsafe_blocks,
    reason = "every block is one intrinsic whose only condition is that the processor has it, which the token proves; \
              blocks that touch memory say more"
)]

use std::arch::x86_64::*;
use std::mem::transmute;

use half::{bf16, f16};

use super::simd::{EXP2, EXP2_MAGIC, EXP2_ZERO, Simd, pair_lanes, store_bf16_lanes};

/// Proof that the processor has AVX2 and FMA; with `PAIRS` also AVX-512 BF16.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Avx2<const PAIRS: bool>(());

impl Avx2<false> {
    /// The token, where the processor has the instructions.
    pub(crate) fn detect() -> Option<Self> {
        (is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma") && is_x86_feature_detected!("f16c"))
            .then_some(Self(()))
    }

    #[inline(always)]
    pub(crate) fn widen(self, from: &[f16; 16]) -> [f32; 16] {
        let halves = from.as_chunks::<8>().0;
        // SAFETY: a half has 8 elements, and so many bytes as a vector of 128 bits.
        let wide = |half: &[f16; 8]| unsafe { _mm256_cvtph_ps(_mm_loadu_si128(half.as_ptr().cast())) };
        // SAFETY: vectors of the size of the array, any bits.
        unsafe { transmute([wide(&halves[0]), wide(&halves[1])]) }
    }

    #[inline(always)]
    pub(crate) fn narrow(self, from: [f32; 16]) -> [f16; 16] {
        // SAFETY: vectors of the sizes of the arrays, any bits.
        unsafe {
            let halves: [__m256; 2] = transmute(from);
            transmute(halves.map(|half| _mm256_cvtps_ph::<_MM_FROUND_TO_NEAREST_INT>(half)))
        }
    }
}

#[target_feature(enable = "avx2,fma,f16c")]
fn with_avx2<R>(work: impl FnOnce() -> R) -> R {
    work()
}

// SAFETY: `detect` checks every feature the methods use.
unsafe impl<const PAIRS: bool> Simd for Avx2<PAIRS> {
    type V = __m256;
    type Half = Self;
    const LANES: usize = 8;
    // 12 accumulators, 2 vectors and a broadcast: 15 of 16 registers.
    const BLOCK_ROWS: usize = 6;
    const BLOCK_VECTORS: usize = 2;
    const PAIRS: bool = PAIRS;

    fn half(self) -> Self {
        self
    }

    #[inline(always)]
    fn vectorize<R>(self, work: impl FnOnce() -> R) -> R {
        // SAFETY: the token proves the features of its own PAIRS.
        unsafe { if PAIRS { with_avx512bf16(work) } else { with_avx2(work) } }
    }

    #[inline(always)]
    fn prefetch(self, address: *const u8) {
        unsafe { _mm_prefetch::<_MM_HINT_T0>(address.cast()) }
    }

    #[inline(always)]
    fn splat(self, x: f32) -> __m256 {
        unsafe { _mm256_set1_ps(x) }
    }

    #[inline(always)]
    fn add(self, a: __m256, b: __m256) -> __m256 {
        unsafe { _mm256_add_ps(a, b) }
    }

    #[inline(always)]
    fn sub(self, a: __m256, b: __m256) -> __m256 {
        unsafe { _mm256_sub_ps(a, b) }
    }

    #[inline(always)]
    fn mul(self, a: __m256, b: __m256) -> __m256 {
        unsafe { _mm256_mul_ps(a, b) }
    }

    #[inline(always)]
    fn div(self, a: __m256, b: __m256) -> __m256 {
        unsafe { _mm256_div_ps(a, b) }
    }

    #[inline(always)]
    fn fma(self, a: __m256, b: __m256, c: __m256) -> __m256 {
        unsafe { _mm256_fmadd_ps(a, b, c) }
    }

    #[inline(always)]
    fn multiply(self, a: __m256, b: __m256, c: __m256) -> __m256 {
        if !PAIRS {
            return self.fma(a, b, c);
        }
        // SAFETY: vectors of the same size, any bits; PAIRS proves AVX-512 BF16.
        unsafe { _mm256_dpbf16_ps(c, transmute::<__m256, __m256bh>(a), transmute::<__m256, __m256bh>(b)) }
    }

    #[inline(always)]
    fn pair(self, first: __m256, second: __m256) -> __m256 {
        if !PAIRS {
            return pair_lanes(self, first, second);
        }
        // SAFETY: as above; ORDER_256 has the size of a vector.
        unsafe {
            let both = transmute::<__m256bh, __m256i>(_mm256_cvtne2ps_pbh(second, first));
            let order = _mm256_loadu_si256(ORDER_256.as_ptr().cast());
            _mm256_castsi256_ps(_mm256_permutexvar_epi16(order, both))
        }
    }

    #[inline(always)]
    fn max(self, a: __m256, b: __m256) -> __m256 {
        unsafe { _mm256_max_ps(a, b) }
    }

    #[inline(always)]
    fn select_eq(self, a: __m256, b: __m256, then: __m256, other: __m256) -> __m256 {
        unsafe { _mm256_blendv_ps(other, then, _mm256_cmp_ps::<_CMP_EQ_OQ>(a, b)) }
    }

    #[inline(always)]
    fn any_gt(self, a: __m256, b: __m256) -> bool {
        unsafe { _mm256_movemask_ps(_mm256_cmp_ps::<_CMP_GT_OQ>(a, b)) != 0 }
    }

    #[inline(always)]
    fn exp2(self, x: __m256) -> __m256 {
        let x = self.max(self.splat(EXP2_ZERO), x);
        let magic = self.splat(EXP2_MAGIC);
        let shifted = self.add(x, magic);
        let f = self.sub(x, self.sub(shifted, magic));
        let mut p = self.splat(EXP2[4]);
        for c in [EXP2[3], EXP2[2], EXP2[1], EXP2[0], 1.0] {
            p = self.fma(p, f, self.splat(c));
        }
        let power = unsafe { _mm256_castsi256_ps(_mm256_slli_epi32::<23>(_mm256_castps_si256(shifted))) };
        self.mul(p, power)
    }

    #[inline(always)]
    unsafe fn load(self, from: *const f32) -> __m256 {
        // SAFETY: the caller promises 8 readable f32.
        unsafe { _mm256_loadu_ps(from) }
    }

    #[inline(always)]
    unsafe fn store(self, to: *mut f32, v: __m256) {
        // SAFETY: the caller promises 8 writable f32.
        unsafe { _mm256_storeu_ps(to, v) }
    }

    #[inline(always)]
    unsafe fn load_bf16(self, from: *const bf16) -> __m256 {
        // SAFETY: the caller promises 8 readable bf16.
        let bits = unsafe { _mm256_cvtepu16_epi32(_mm_loadu_si128(from.cast())) };
        unsafe { _mm256_castsi256_ps(_mm256_slli_epi32::<16>(bits)) }
    }

    #[inline(always)]
    unsafe fn store_bf16(self, to: *mut bf16, v: __m256) {
        if !PAIRS {
            // SAFETY: the caller's.
            return unsafe { store_bf16_lanes(self, to, v) };
        }
        // SAFETY: the caller promises room for 8 bf16.
        unsafe { _mm_storeu_si128(to.cast(), transmute::<__m128bh, __m128i>(_mm256_cvtneps_pbh(v))) }
    }

    #[inline(always)]
    unsafe fn interleave(self, first: *const bf16, second: *const bf16) -> __m256 {
        // SAFETY: the caller promises 8 readable bf16 on both sides; the rest moves registers.
        unsafe {
            let low = _mm256_cvtepu16_epi32(_mm_loadu_si128(first.cast()));
            let high = _mm256_cvtepu16_epi32(_mm_loadu_si128(second.cast()));
            _mm256_castsi256_ps(_mm256_or_si256(low, _mm256_slli_epi32::<16>(high)))
        }
    }

    #[inline(always)]
    unsafe fn transpose(self, from: *const f32, from_stride: usize, to: *mut f32, to_stride: usize) {
        // SAFETY: the caller promises 8 rows of 8 f32 on both sides; the rest moves registers.
        unsafe {
            let (mut lo, mut hi, mut s) =
                ([_mm256_setzero_ps(); 4], [_mm256_setzero_ps(); 4], [_mm256_setzero_ps(); 8]);
            // Pairs of rows, then quadruples, then the two halves of 128 bits.
            for i in 0..4 {
                let even = _mm256_loadu_ps(from.add(2 * i * from_stride));
                let odd = _mm256_loadu_ps(from.add((2 * i + 1) * from_stride));
                lo[i] = _mm256_unpacklo_ps(even, odd);
                hi[i] = _mm256_unpackhi_ps(even, odd);
            }
            for i in 0..2 {
                s[4 * i] = _mm256_shuffle_ps::<0x44>(lo[2 * i], lo[2 * i + 1]);
                s[4 * i + 1] = _mm256_shuffle_ps::<0xee>(lo[2 * i], lo[2 * i + 1]);
                s[4 * i + 2] = _mm256_shuffle_ps::<0x44>(hi[2 * i], hi[2 * i + 1]);
                s[4 * i + 3] = _mm256_shuffle_ps::<0xee>(hi[2 * i], hi[2 * i + 1]);
            }
            for i in 0..4 {
                _mm256_storeu_ps(to.add(i * to_stride), _mm256_permute2f128_ps::<0x20>(s[i], s[i + 4]));
                _mm256_storeu_ps(to.add((i + 4) * to_stride), _mm256_permute2f128_ps::<0x31>(s[i], s[i + 4]));
            }
        }
    }
}

/// Proof that the processor has AVX-512 F, BW, DQ and VL; with `PAIRS` also BF16.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Avx512<const PAIRS: bool>(Avx2<PAIRS>);

impl Avx512<true> {
    /// The token, where the processor has the instructions.
    pub(crate) fn detect() -> Option<Self> {
        Avx512::<false>::detect().filter(|_| is_x86_feature_detected!("avx512bf16")).map(|_| Self(Avx2(())))
    }
}

impl Avx512<false> {
    /// The token, where the processor has the instructions.
    pub(crate) fn detect() -> Option<Self> {
        (is_x86_feature_detected!("avx512f")
            && is_x86_feature_detected!("avx512bw")
            && is_x86_feature_detected!("avx512dq")
            && is_x86_feature_detected!("avx512vl"))
        .then(Avx2::<false>::detect)
        .flatten()
        .map(Self)
    }

    #[inline(always)]
    pub(crate) fn widen(self, from: &[f16; 16]) -> [f32; 16] {
        // SAFETY: 16 elements are a vector of 256 bits; the result has the size of the array.
        unsafe { transmute(_mm512_cvtph_ps(_mm256_loadu_si256(from.as_ptr().cast()))) }
    }

    #[inline(always)]
    pub(crate) fn narrow(self, from: [f32; 16]) -> [f16; 16] {
        // SAFETY: vectors of the sizes of the arrays, any bits.
        unsafe { transmute(_mm512_cvtps_ph::<_MM_FROUND_TO_NEAREST_INT>(transmute::<[f32; 16], __m512>(from))) }
    }
}

#[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl")]
fn with_avx512<R>(work: impl FnOnce() -> R) -> R {
    work()
}

#[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512bf16")]
fn with_avx512bf16<R>(work: impl FnOnce() -> R) -> R {
    work()
}

/// exp2(f) on [0, 1) as [`EXP2`] is on [-1/2, 1/2]: relative error 1.5e-7, rounding included.
const EXP2_UNIT: [f32; 5] = [0.693_151_3, 0.240_164_47, 0.055_799_92, 0.009_017_03, 0.001_867_13];
/// VREDUCEPS: the argument less the largest integer below it.
const REDUCE_DOWN: i32 = _MM_FROUND_TO_NEG_INF;

/// Element i of the first half beside element i of the second one.
const ORDER_512: [u16; 32] = interleaved();
const ORDER_256: [u16; 16] = interleaved();

#[allow(clippy::cast_possible_truncation, reason = "at most 32")]
const fn interleaved<const N: usize>() -> [u16; N] {
    let mut order = [0; N];
    let mut i = 0;
    while i < N {
        order[i] = (i / 2 + i % 2 * (N / 2)) as u16;
        i += 1;
    }
    order
}

// SAFETY: `detect` checks every feature the methods use.
unsafe impl<const PAIRS: bool> Simd for Avx512<PAIRS> {
    type V = __m512;
    type Half = Avx2<PAIRS>;
    const LANES: usize = 16;
    // 16 accumulators and 4 vectors of 32 registers; the broadcast is part of the instruction.
    const BLOCK_ROWS: usize = 4;
    const BLOCK_VECTORS: usize = 4;
    const PAIRS: bool = PAIRS;

    fn half(self) -> Avx2<PAIRS> {
        self.0
    }

    #[inline(always)]
    fn vectorize<R>(self, work: impl FnOnce() -> R) -> R {
        // SAFETY: the token proves the features of its own PAIRS.
        unsafe { if PAIRS { with_avx512bf16(work) } else { with_avx512(work) } }
    }

    #[inline(always)]
    fn prefetch(self, address: *const u8) {
        unsafe { _mm_prefetch::<_MM_HINT_T0>(address.cast()) }
    }

    #[inline(always)]
    fn splat(self, x: f32) -> __m512 {
        unsafe { _mm512_set1_ps(x) }
    }

    #[inline(always)]
    fn add(self, a: __m512, b: __m512) -> __m512 {
        unsafe { _mm512_add_ps(a, b) }
    }

    #[inline(always)]
    fn sub(self, a: __m512, b: __m512) -> __m512 {
        unsafe { _mm512_sub_ps(a, b) }
    }

    #[inline(always)]
    fn mul(self, a: __m512, b: __m512) -> __m512 {
        unsafe { _mm512_mul_ps(a, b) }
    }

    #[inline(always)]
    fn div(self, a: __m512, b: __m512) -> __m512 {
        unsafe { _mm512_div_ps(a, b) }
    }

    #[inline(always)]
    fn fma(self, a: __m512, b: __m512, c: __m512) -> __m512 {
        unsafe { _mm512_fmadd_ps(a, b, c) }
    }

    #[inline(always)]
    fn multiply(self, a: __m512, b: __m512, c: __m512) -> __m512 {
        if !PAIRS {
            return self.fma(a, b, c);
        }
        // SAFETY: vectors of the same size, any bits; PAIRS proves AVX-512 BF16.
        unsafe { _mm512_dpbf16_ps(c, transmute::<__m512, __m512bh>(a), transmute::<__m512, __m512bh>(b)) }
    }

    #[inline(always)]
    fn pair(self, first: __m512, second: __m512) -> __m512 {
        if !PAIRS {
            return pair_lanes(self, first, second);
        }
        // SAFETY: as above; ORDER_512 has the size of a vector.
        unsafe {
            let both = transmute::<__m512bh, __m512i>(_mm512_cvtne2ps_pbh(second, first));
            let order = _mm512_loadu_si512(ORDER_512.as_ptr().cast());
            _mm512_castsi512_ps(_mm512_permutexvar_epi16(order, both))
        }
    }

    #[inline(always)]
    fn max(self, a: __m512, b: __m512) -> __m512 {
        unsafe { _mm512_max_ps(a, b) }
    }

    #[inline(always)]
    fn select_eq(self, a: __m512, b: __m512, then: __m512, other: __m512) -> __m512 {
        unsafe { _mm512_mask_blend_ps(_mm512_cmp_ps_mask::<_CMP_EQ_OQ>(a, b), other, then) }
    }

    #[inline(always)]
    fn any_gt(self, a: __m512, b: __m512) -> bool {
        unsafe { _mm512_cmp_ps_mask::<_CMP_GT_OQ>(a, b) != 0 }
    }

    #[inline(always)]
    fn exp2(self, x: __m512) -> __m512 {
        // VREDUCEPS leaves the fraction above the integer that VSCALEFPS rounds down to.
        let f = unsafe { _mm512_reduce_ps::<REDUCE_DOWN>(x) };
        let not_zero = unsafe { _mm512_cmp_ps_mask::<_CMP_NLE_UQ>(x, self.splat(EXP2_ZERO)) };
        let mut p = self.splat(EXP2_UNIT[4]);
        for c in [EXP2_UNIT[3], EXP2_UNIT[2], EXP2_UNIT[1], EXP2_UNIT[0], 1.0] {
            p = self.fma(p, f, self.splat(c));
        }
        unsafe { _mm512_maskz_scalef_ps(not_zero, p, x) }
    }

    #[inline(always)]
    unsafe fn load(self, from: *const f32) -> __m512 {
        // SAFETY: the caller promises 16 readable f32.
        unsafe { _mm512_loadu_ps(from) }
    }

    #[inline(always)]
    unsafe fn store(self, to: *mut f32, v: __m512) {
        // SAFETY: the caller promises 16 writable f32.
        unsafe { _mm512_storeu_ps(to, v) }
    }

    #[inline(always)]
    unsafe fn load_bf16(self, from: *const bf16) -> __m512 {
        // SAFETY: the caller promises 16 readable bf16.
        let bits = unsafe { _mm512_cvtepu16_epi32(_mm256_loadu_si256(from.cast())) };
        unsafe { _mm512_castsi512_ps(_mm512_slli_epi32::<16>(bits)) }
    }

    #[inline(always)]
    unsafe fn store_bf16(self, to: *mut bf16, v: __m512) {
        if !PAIRS {
            // SAFETY: the caller's.
            return unsafe { store_bf16_lanes(self, to, v) };
        }
        // SAFETY: the caller promises room for 16 bf16.
        unsafe { _mm256_storeu_si256(to.cast(), transmute::<__m256bh, __m256i>(_mm512_cvtneps_pbh(v))) }
    }

    #[inline(always)]
    unsafe fn splat_two(self, from: *const f32) -> __m512 {
        // SAFETY: the caller promises 8 readable bytes.
        unsafe { _mm512_castpd_ps(_mm512_set1_pd(from.cast::<f64>().read_unaligned())) }
    }

    #[inline(always)]
    unsafe fn add_twos(self, to: *mut f32, v: __m512) {
        // SAFETY: the caller promises 8 f32; the rest moves registers.
        unsafe {
            let sums = _mm256_hadd_ps(_mm512_castps512_ps256(v), _mm512_extractf32x8_ps::<1>(v));
            // The horizontal sum leaves the halves of both vectors in turn.
            let sums = _mm256_castpd_ps(_mm256_permute4x64_pd::<0b11_01_10_00>(_mm256_castps_pd(sums)));
            _mm256_storeu_ps(to, _mm256_add_ps(_mm256_loadu_ps(to), sums));
        }
    }

    #[inline(always)]
    unsafe fn interleave(self, first: *const bf16, second: *const bf16) -> __m512 {
        // SAFETY: the caller promises 16 readable bf16 on both sides; the rest moves registers.
        unsafe {
            let low = _mm512_cvtepu16_epi32(_mm256_loadu_si256(first.cast()));
            let high = _mm512_cvtepu16_epi32(_mm256_loadu_si256(second.cast()));
            _mm512_castsi512_ps(_mm512_or_si512(low, _mm512_slli_epi32::<16>(high)))
        }
    }

    #[inline(always)]
    unsafe fn transpose(self, from: *const f32, from_stride: usize, to: *mut f32, to_stride: usize) {
        // SAFETY: the caller promises 16 rows of 16 f32 on both sides; the rest moves registers.
        unsafe {
            let (mut r, mut t) = ([_mm512_setzero_ps(); 16], [_mm512_setzero_ps(); 16]);
            for i in 0..16 {
                r[i] = _mm512_loadu_ps(from.add(i * from_stride));
            }
            for i in 0..8 {
                t[2 * i] = _mm512_unpacklo_ps(r[2 * i], r[2 * i + 1]);
                t[2 * i + 1] = _mm512_unpackhi_ps(r[2 * i], r[2 * i + 1]);
            }
            for i in 0..4 {
                r[4 * i] = _mm512_shuffle_ps::<0x44>(t[4 * i], t[4 * i + 2]);
                r[4 * i + 1] = _mm512_shuffle_ps::<0xee>(t[4 * i], t[4 * i + 2]);
                r[4 * i + 2] = _mm512_shuffle_ps::<0x44>(t[4 * i + 1], t[4 * i + 3]);
                r[4 * i + 3] = _mm512_shuffle_ps::<0xee>(t[4 * i + 1], t[4 * i + 3]);
            }
            for i in 0..4 {
                t[i] = _mm512_shuffle_f32x4::<0x88>(r[i], r[4 + i]);
                t[4 + i] = _mm512_shuffle_f32x4::<0xdd>(r[i], r[4 + i]);
                t[8 + i] = _mm512_shuffle_f32x4::<0x88>(r[8 + i], r[12 + i]);
                t[12 + i] = _mm512_shuffle_f32x4::<0xdd>(r[8 + i], r[12 + i]);
            }
            for i in 0..4 {
                _mm512_storeu_ps(to.add(i * to_stride), _mm512_shuffle_f32x4::<0x88>(t[i], t[8 + i]));
                _mm512_storeu_ps(to.add((8 + i) * to_stride), _mm512_shuffle_f32x4::<0xdd>(t[i], t[8 + i]));
                _mm512_storeu_ps(to.add((4 + i) * to_stride), _mm512_shuffle_f32x4::<0x88>(t[4 + i], t[12 + i]));
                _mm512_storeu_ps(to.add((12 + i) * to_stride), _mm512_shuffle_f32x4::<0xdd>(t[4 + i], t[12 + i]));
            }
        }
    }
}
