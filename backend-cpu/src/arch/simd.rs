//! The vector operations a kernel is written in; each instruction set implements them once.

use half::bf16;

/// exp2(f) on [-1/2, 1/2] as 1 + f · polynomial: relative error 9e-8 before rounding. The constant is exactly 1, so that
/// exp2(0) is exactly 1.
#[allow(clippy::approx_constant, reason = "a minimax coefficient close to ln 2, not ln 2")]
pub(crate) const EXP2: [f32; 5] = [0.693_147, 0.240_222_42, 0.055_507_336, 0.009_671_513, 0.001_326_472_7];

/// Adding it rounds to the nearest integer n and leaves n + 127, the exponent field of 2ⁿ, in the low mantissa bits.
pub(crate) const EXP2_MAGIC: f32 = 12_582_912.0 + 127.0;

/// Smallest argument told apart from -inf: exp2 of it, and of anything below, is exactly 0.
pub(crate) const EXP2_ZERO: f32 = -127.0;

/// Lanes of the widest set.
const MOST_LANES: usize = 16;

/// One instruction set, as a token: a value exists only where the processor has it, which is what makes the methods safe
/// to call.
///
/// With `PAIRS`, products multiply bf16: a 32-bit slot of their operands holds two neighbours along the summed axis, the
/// first in its lower half, and one instruction adds both products to an f32. All else is f32.
///
/// # Safety
/// An implementer's constructor must check that the processor has the instructions its methods use.
pub(crate) unsafe trait Simd: Copy + Send + Sync + 'static {
    /// A vector of `LANES` f32.
    type V: Copy;
    /// Half as many lanes, where narrow matrices would waste full vectors.
    type Half: Simd;
    /// f32 in one vector.
    const LANES: usize;
    /// Rows of the register block of a product.
    const BLOCK_ROWS: usize;
    /// Vectors in a row of the register block: 2 or 4.
    const BLOCK_VECTORS: usize;
    /// Whether products take pairs of bf16.
    const PAIRS: bool;

    /// The token of the narrower set.
    fn half(self) -> Self::Half;

    /// Runs `work` compiled for this instruction set. Everything inlined into it may use the instructions; a call that is
    /// not inlined does not.
    fn vectorize<R>(self, work: impl FnOnce() -> R) -> R;

    /// Asks for the cache line at an address, which need not be valid, ahead of its use.
    #[inline(always)]
    fn prefetch(self, address: *const u8) {
        let _ = address;
    }

    /// All lanes `x`.
    fn splat(self, x: f32) -> Self::V;
    /// `a + b`
    fn add(self, a: Self::V, b: Self::V) -> Self::V;
    /// `a - b`
    fn sub(self, a: Self::V, b: Self::V) -> Self::V;
    /// `a · b`
    fn mul(self, a: Self::V, b: Self::V) -> Self::V;
    /// `a / b`
    fn div(self, a: Self::V, b: Self::V) -> Self::V;
    /// `a · b + c`, rounded once where the processor can.
    fn fma(self, a: Self::V, b: Self::V, c: Self::V) -> Self::V;
    /// `a · b + c` for slots of a product: f32, or with `PAIRS` both halves of each slot, the second one first.
    #[inline(always)]
    fn multiply(self, a: Self::V, b: Self::V, c: Self::V) -> Self::V {
        self.fma(a, b, c)
    }

    /// Slots that hold `first` and `second`, rounded to the nearest bf16, ties to even.
    #[inline(always)]
    fn pair(self, first: Self::V, second: Self::V) -> Self::V {
        pair_lanes(self, first, second)
    }

    /// The larger one; `b` when either is NaN.
    fn max(self, a: Self::V, b: Self::V) -> Self::V;
    /// `then` in lanes where `a = b`, `other` elsewhere.
    fn select_eq(self, a: Self::V, b: Self::V, then: Self::V, other: Self::V) -> Self::V;
    /// Whether any lane of `a` is greater than that of `b`.
    fn any_gt(self, a: Self::V, b: Self::V) -> bool;
    /// 2 to the power of `x ≤ 127`: exactly 0 at or below -127 and at -inf, exactly 1 at 0, NaN for NaN; relative error
    /// below 2e-7 from -126 up; in between, where results are subnormal, within 2^-126.
    fn exp2(self, x: Self::V) -> Self::V;

    /// `LANES` values from `from`.
    ///
    /// # Safety
    /// `from` is valid for reads of `LANES` f32.
    unsafe fn load(self, from: *const f32) -> Self::V;

    /// `LANES` values to `to`.
    ///
    /// # Safety
    /// `to` is valid for writes of `LANES` f32.
    unsafe fn store(self, to: *mut f32, v: Self::V);

    /// `LANES` bf16 from `from`, widened.
    ///
    /// # Safety
    /// `from` is valid for reads of `LANES` bf16.
    #[inline(always)]
    unsafe fn load_bf16(self, from: *const bf16) -> Self::V {
        let mut lanes = [0.0; MOST_LANES];
        // SAFETY: the caller's; the array holds LANES elements.
        unsafe {
            for (i, lane) in lanes.iter_mut().enumerate().take(Self::LANES) {
                *lane = f32::from_bits(u32::from(from.add(i).read_unaligned().to_bits()) << 16);
            }
            self.load(lanes.as_ptr())
        }
    }

    /// `LANES` values to `to`, rounded to the nearest bf16, ties to even.
    ///
    /// # Safety
    /// `to` is valid for writes of `LANES` bf16.
    #[inline(always)]
    unsafe fn store_bf16(self, to: *mut bf16, v: Self::V) {
        // SAFETY: the caller's.
        unsafe { store_bf16_lanes(self, to, v) }
    }

    /// Two neighbours, in turn in all lanes.
    ///
    /// # Safety
    /// `from` is valid for reads of two f32.
    #[inline(always)]
    unsafe fn splat_two(self, from: *const f32) -> Self::V {
        // SAFETY: the caller's; the array holds LANES elements.
        unsafe {
            let two = [*from, *from.add(1)];
            let lanes: [f32; MOST_LANES] = std::array::from_fn(|i| two[i % 2]);
            self.load(lanes.as_ptr())
        }
    }

    /// Adds the sums of two neighbouring lanes each to `LANES / 2` values at `to`.
    ///
    /// # Safety
    /// `to` is valid for reads and writes of `LANES / 2` f32.
    #[inline(always)]
    unsafe fn add_twos(self, to: *mut f32, v: Self::V) {
        let mut lanes = [0.0; MOST_LANES];
        // SAFETY: the caller's; the array holds LANES elements.
        unsafe {
            self.store(lanes.as_mut_ptr(), v);
            for i in 0..Self::LANES / 2 {
                *to.add(i) += lanes[2 * i] + lanes[2 * i + 1];
            }
        }
    }

    /// Slots that hold `first[i]` and `second[i]`.
    ///
    /// # Safety
    /// Both are valid for reads of `LANES` bf16.
    #[inline(always)]
    unsafe fn interleave(self, first: *const bf16, second: *const bf16) -> Self::V {
        let mut lanes = [0.0; MOST_LANES];
        // SAFETY: the caller's; the array holds LANES elements.
        unsafe {
            for (i, lane) in lanes.iter_mut().enumerate().take(Self::LANES) {
                let bits = |from: *const bf16| u32::from(from.add(i).read_unaligned().to_bits());
                *lane = f32::from_bits(bits(first) | bits(second) << 16);
            }
            self.load(lanes.as_ptr())
        }
    }

    /// `to[j][i] = from[i][j]` for a block of `LANES × LANES`, with row strides in elements.
    ///
    /// # Safety
    /// All `LANES` rows of `from` and `to` are valid for reads and writes of `LANES` f32, and do not overlap.
    unsafe fn transpose(self, from: *const f32, from_stride: usize, to: *mut f32, to_stride: usize);
}

/// [`Simd::pair`] for any set; those with bf16 have an instruction.
#[inline(always)]
pub(crate) fn pair_lanes<S: Simd>(s: S, first: S::V, second: S::V) -> S::V {
    let (mut low, mut high) = ([0.0; MOST_LANES], [0.0; MOST_LANES]);
    // SAFETY: both arrays hold LANES elements.
    unsafe {
        s.store(low.as_mut_ptr(), first);
        s.store(high.as_mut_ptr(), second);
        for (low, high) in low.iter_mut().zip(high) {
            let bits = |x| u32::from(bf16::from_f32(x).to_bits());
            *low = f32::from_bits(bits(*low) | bits(high) << 16);
        }
        s.load(low.as_ptr())
    }
}

/// [`Simd::store_bf16`] for any set; those with bf16 have an instruction.
///
/// # Safety
/// `to` is valid for writes of `LANES` bf16.
#[inline(always)]
pub(crate) unsafe fn store_bf16_lanes<S: Simd>(s: S, to: *mut bf16, v: S::V) {
    let mut lanes = [0.0; MOST_LANES];
    // SAFETY: the array holds LANES elements, `to` has room for them.
    unsafe {
        s.store(lanes.as_mut_ptr(), v);
        for (i, lane) in lanes.into_iter().enumerate().take(S::LANES) {
            to.add(i).write_unaligned(bf16::from_f32(lane));
        }
    }
}
