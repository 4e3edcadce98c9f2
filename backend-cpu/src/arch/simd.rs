//! The vector operations a kernel is written in; each instruction set implements them once.

/// exp2(f) on [-1/2, 1/2] as 1 + f · polynomial: relative error 9e-8 before rounding. The constant is exactly 1, so that
/// exp2(0) is exactly 1.
#[allow(clippy::approx_constant, reason = "a minimax coefficient close to ln 2, not ln 2")]
pub(crate) const EXP2: [f32; 5] = [0.693_147, 0.240_222_42, 0.055_507_336, 0.009_671_513, 0.001_326_472_7];

/// Adding it rounds to the nearest integer n and leaves n + 127, the exponent field of 2ⁿ, in the low mantissa bits.
pub(crate) const EXP2_MAGIC: f32 = 12_582_912.0 + 127.0;

/// Smallest argument told apart from -inf: exp2 of it, and of anything below, is exactly 0.
pub(crate) const EXP2_ZERO: f32 = -127.0;

/// One instruction set, as a token: a value exists only where the processor has it, which is what makes the methods safe
/// to call.
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
    /// The larger one; `b` when either is NaN.
    fn max(self, a: Self::V, b: Self::V) -> Self::V;
    /// `then` in lanes where `a = b`, `other` elsewhere.
    fn select_eq(self, a: Self::V, b: Self::V, then: Self::V, other: Self::V) -> Self::V;
    /// Whether any lane of `a` is greater than that of `b`.
    fn any_gt(self, a: Self::V, b: Self::V) -> bool;
    /// 2 to the power of `x ≤ 127`: exactly 0 at or below -127 and at -inf, exactly 1 at 0, NaN for NaN; relative error
    /// below 2e-7 elsewhere.
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

    /// `to[j][i] = from[i][j]` for a block of `LANES × LANES`, with row strides in elements.
    ///
    /// # Safety
    /// All `LANES` rows of `from` and `to` are valid for reads and writes of `LANES` f32, and do not overlap.
    unsafe fn transpose(self, from: *const f32, from_stride: usize, to: *mut f32, to_stride: usize);
}
