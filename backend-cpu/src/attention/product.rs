//! Register-blocked products of small packed matrices: where the time goes.
//!
//! Lanes are queries (or channels); every product is `C[i][lanes] = start + Σ_x A[i][x] · B[x][lanes]` with A broadcast
//! element by element. What happens before and after the sum differs between the phases of attention: a [`Phase`].
//!
//! With [`Simd::PAIRS`] an element of A and B is a slot of two bf16, neighbours along x, and x counts slots; C is f32. The
//! softmax scale, otherwise part of Q, is then applied after the sum, since Q is not rounded a second time.

use half::bf16;

use super::operands::Ahead;
use super::schedule::tile_queries;
use crate::arch::Simd;

/// Most rows of a register block.
const MAX_BLOCK_ROWS: usize = 8;
/// f32 of a cache line.
const LINE_FLOATS: usize = 16;
/// Steps of a sum between two jumps.
const UNROLL: usize = 4;

/// A matrix of 32-bit slots in packed memory: first one and slots from one row to the next.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Matrix {
    pub(crate) data: *mut f32,
    pub(crate) stride: usize,
}

impl Matrix {
    /// The element at `row`, `column`.
    #[inline(always)]
    pub(crate) fn at(self, row: usize, column: usize) -> *mut f32 {
        self.data.wrapping_add(row * self.stride + column)
    }

    /// A matrix with a column per query of a tile, its stride known when compiled: addresses become offsets.
    #[inline(always)]
    fn of_tile<S: Simd>(self) -> Self {
        let stride = const { tile_queries(S::LANES) };
        debug_assert_eq!(self.stride, stride);
        Self { stride, ..self }
    }

    /// As [`Matrix::of_tile`], with pairs of queries.
    #[inline(always)]
    fn of_tile_pairs<S: Simd>(self) -> Self {
        let stride = const { tile_queries(S::LANES) / 2 };
        debug_assert_eq!(self.stride, stride);
        Self { stride, ..self }
    }
}

/// What a product starts from and what becomes of its result, one register block at a time. Phases go by value: behind a
/// reference every store would make the compiler read their pointers again.
pub(crate) trait Phase<S: Simd>: Copy {
    /// Whether lanes are the queries of a tile, in B and in what the phase reads and writes.
    const OF_TILE: bool;

    /// The block at `row`, `column` (in elements) before the sum.
    ///
    /// # Safety
    /// The block lies inside the matrices the phase was built with.
    unsafe fn start<const M: usize, const N: usize>(self, s: S, row: usize, column: usize) -> [[S::V; N]; M];

    /// Takes the block after the sum.
    ///
    /// # Safety
    /// As [`Phase::start`].
    unsafe fn finish<const M: usize, const N: usize>(self, s: S, row: usize, column: usize, sum: [[S::V; N]; M]);
}

/// Slots that hold so many elements of a summed axis.
#[inline(always)]
pub(crate) fn slots<S: Simd>(elements: usize) -> usize {
    if S::PAIRS { elements.div_ceil(2) } else { elements }
}

/// `rows × (vectors · LANES)` results over `depth` slots each. With `TRANSPOSED`, A is stored as `[x][i]`.
///
/// # Safety
/// A has `rows × depth` elements, B `depth` rows of `vectors · LANES`, and the phase's matrices cover the result.
#[inline(always)]
pub(crate) unsafe fn product<S: Simd, P: Phase<S>, const TRANSPOSED: bool>(
    s: S,
    (rows, vectors, depth): (usize, usize, usize),
    a: Matrix,
    b: Matrix,
    phase: P,
) {
    let b = if P::OF_TILE { b.of_tile::<S>() } else { b };
    let mut vector = 0;
    while vector < vectors {
        let column = vector * S::LANES;
        let wide = match vectors - vector {
            1 => 1,
            2 | 3 => 2,
            _ => S::BLOCK_VECTORS,
        };
        // A narrow block gets more rows, to keep as many sums under way.
        let most = (S::BLOCK_ROWS * S::BLOCK_VECTORS / wide).min(MAX_BLOCK_ROWS);
        let mut row = 0;
        while row < rows {
            let left = rows - row;
            // Eight rows are two equal blocks rather than six and two.
            let block = if most == 6 && (left == 7 || left == 8) { 4 } else { left.min(most) };
            let first = if TRANSPOSED { a.at(0, row) } else { a.at(row, 0) };
            let at = Block { s, depth, a: first, a_stride: a.stride, b, row, column };
            // SAFETY: the block is inside the result by the loops' bounds; the rest is the caller's promise.
            unsafe {
                match wide {
                    1 => at.rows::<P, 1, TRANSPOSED>(block, phase),
                    2 => at.rows::<P, 2, TRANSPOSED>(block, phase),
                    _ if S::BLOCK_VECTORS == 4 => at.rows::<P, 4, TRANSPOSED>(block, phase),
                    _ => {}
                }
            }
            row += block;
        }
        vector += wide;
    }
}

struct Block<S: Simd> {
    s: S,
    depth: usize,
    a: *const f32,
    a_stride: usize,
    b: Matrix,
    row: usize,
    column: usize,
}

impl<S: Simd> Block<S> {
    /// The run-time number of rows as a constant.
    #[inline(always)]
    unsafe fn rows<P: Phase<S>, const N: usize, const TRANSPOSED: bool>(&self, rows: usize, phase: P) {
        // SAFETY: the caller's.
        unsafe {
            match rows {
                1 => self.run::<P, 1, N, TRANSPOSED>(phase),
                2 => self.run::<P, 2, N, TRANSPOSED>(phase),
                3 => self.run::<P, 3, N, TRANSPOSED>(phase),
                4 => self.run::<P, 4, N, TRANSPOSED>(phase),
                5 => self.run::<P, 5, N, TRANSPOSED>(phase),
                6 => self.run::<P, 6, N, TRANSPOSED>(phase),
                7 => self.run::<P, 7, N, TRANSPOSED>(phase),
                _ => self.run::<P, MAX_BLOCK_ROWS, N, TRANSPOSED>(phase),
            }
        }
    }

    #[inline(always)]
    unsafe fn run<P: Phase<S>, const M: usize, const N: usize, const TRANSPOSED: bool>(&self, phase: P) {
        let s = self.s;
        // SAFETY: rows `row..row + M` and the columns of N vectors are inside A, B and the phase's matrices.
        unsafe {
            let mut sum = phase.start::<M, N>(s, self.row, self.column);
            let mut b = self.b.at(0, self.column).cast_const();
            let mut a = self.a;
            let a_step = if TRANSPOSED { self.a_stride } else { 1 };
            // Four steps at a time: their addresses are offsets from the first one's.
            for _ in 0..self.depth / UNROLL {
                self.steps::<M, N, UNROLL, TRANSPOSED>(&mut sum, a, b);
                a = a.wrapping_add(UNROLL * a_step);
                b = b.wrapping_add(UNROLL * self.b.stride);
            }
            for _ in 0..self.depth % UNROLL {
                self.steps::<M, N, 1, TRANSPOSED>(&mut sum, a, b);
                a = a.wrapping_add(a_step);
                b = b.wrapping_add(self.b.stride);
            }
            phase.finish(s, self.row, self.column, sum);
        }
    }

    #[inline(always)]
    unsafe fn steps<const M: usize, const N: usize, const STEPS: usize, const TRANSPOSED: bool>(
        &self,
        sum: &mut [[S::V; N]; M],
        a: *const f32,
        b: *const f32,
    ) {
        let s = self.s;
        for step in 0..STEPS {
            let mut lanes = [s.splat(0.0); N];
            for j in 0..N {
                // SAFETY: row `step` of B has the columns of N vectors.
                lanes[j] = unsafe { s.load(b.add(step * self.b.stride + j * S::LANES)) };
            }
            for i in 0..M {
                let at = if TRANSPOSED { step * self.a_stride + i } else { i * self.a_stride + step };
                // SAFETY: A has an element for every row of the block and every step.
                let factor = s.splat(unsafe { *a.add(at) });
                for j in 0..N {
                    sum[i][j] = s.multiply(factor, lanes[j], sum[i][j]);
                }
            }
        }
    }
}

/// Whether `C += A B` with rows of so many channels, a multiple of 8, wants [`product_of_twos`]: half a vector would be idle.
#[inline(always)]
pub(crate) fn wants_twos<S: Simd>(channels: usize) -> bool {
    !channels.is_multiple_of(S::LANES)
}

/// Rows of B for [`product_of_twos`]: element by element from two rows in turn.
///
/// # Safety
/// `from` has `rows` rows, an even number, of `columns` elements, a multiple of 8, `to` half as many of twice as many.
#[inline(always)]
pub(crate) unsafe fn rows_of_twos(rows: usize, columns: usize, from: Matrix, to: Matrix) {
    debug_assert!(rows.is_multiple_of(2) && columns.is_multiple_of(8));
    for i in (0..rows).step_by(2) {
        for j in (0..columns).step_by(8) {
            // SAFETY: 8 elements of both rows, and 16 of the one row they go to.
            unsafe {
                let [even, odd] = [i, i + 1].map(|i| from.at(i, j).cast::<[f32; 8]>().read());
                let twos: [f32; 16] = std::array::from_fn(|x| if x % 2 == 0 { even[x / 2] } else { odd[x / 2] });
                to.data.wrapping_add(i * columns + 2 * j).cast::<[f32; 16]>().write(twos);
            }
        }
    }
}

/// `C[i][channels] += Σ_x A[i][x] · B[x][channels]` for an odd number of half vectors of channels: lanes are channels of
/// two x side by side ([`rows_of_twos`]), added up at the end.
///
/// # Safety
/// A has `rows × depth` elements, depth is even, B `depth` rows of `channels`, C `rows` of them.
#[inline(always)]
pub(crate) unsafe fn product_of_twos<S: Simd>(
    s: S,
    (rows, channels, depth): (usize, usize, usize),
    a: Matrix,
    b: Matrix,
    c: Matrix,
) {
    debug_assert!(depth.is_multiple_of(2));
    for column in (0..channels).step_by(S::LANES / 2) {
        let mut row = 0;
        while row < rows {
            let block = match rows - row {
                MAX_BLOCK_ROWS.. => MAX_BLOCK_ROWS,
                4.. => 4,
                _ => 1,
            };
            let (a, c) = (Matrix { data: a.at(row, 0), ..a }, Matrix { data: c.at(row, column), ..c });
            let b = Matrix { data: b.data.wrapping_add(2 * column), stride: 2 * channels };
            // SAFETY: the block is inside the result; the rest is the caller's promise.
            unsafe {
                match block {
                    MAX_BLOCK_ROWS => block_of_twos::<S, MAX_BLOCK_ROWS>(s, depth, a, b, c),
                    4 => block_of_twos::<S, 4>(s, depth, a, b, c),
                    _ => block_of_twos::<S, 1>(s, depth, a, b, c),
                }
            }
            row += block;
        }
    }
}

#[inline(always)]
unsafe fn block_of_twos<S: Simd, const M: usize>(s: S, depth: usize, a: Matrix, b: Matrix, c: Matrix) {
    let mut sum = [s.splat(0.0); M];
    // SAFETY: the caller's.
    unsafe {
        for x in 0..depth / 2 {
            let lanes = s.load(b.at(x, 0));
            for i in 0..M {
                sum[i] = s.multiply(s.splat_two(a.at(i, 2 * x)), lanes, sum[i]);
            }
        }
        for (i, sum) in sum.into_iter().enumerate() {
            s.add_twos(c.at(i, 0), sum);
        }
    }
}

/// `C += A B`: weighted values, and every gradient that is a product.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Accumulate<const OF_TILE: bool> {
    pub(crate) c: Matrix,
}

impl<const OF_TILE: bool> Accumulate<OF_TILE> {
    #[inline(always)]
    fn matrix<S: Simd>(self) -> Matrix {
        if OF_TILE { self.c.of_tile::<S>() } else { self.c }
    }
}

impl<S: Simd, const OF_TILE: bool> Phase<S> for Accumulate<OF_TILE> {
    const OF_TILE: bool = OF_TILE;

    #[inline(always)]
    unsafe fn start<const M: usize, const N: usize>(self, s: S, row: usize, column: usize) -> [[S::V; N]; M] {
        let (mut block, c) = ([[s.splat(0.0); N]; M], self.matrix::<S>());
        for i in 0..M {
            for j in 0..N {
                // SAFETY: the block is inside C.
                block[i][j] = unsafe { s.load(c.at(row + i, column + j * S::LANES)) };
            }
        }
        block
    }

    #[inline(always)]
    unsafe fn finish<const M: usize, const N: usize>(self, s: S, row: usize, column: usize, sum: [[S::V; N]; M]) {
        let c = self.matrix::<S>();
        for (i, sum) in sum.into_iter().enumerate() {
            for (j, sum) in sum.into_iter().enumerate() {
                // SAFETY: the block is inside C.
                unsafe { s.store(c.at(row + i, column + j * S::LANES), sum) }
            }
        }
    }
}

/// Additive part of a tile of logits in base 2: a value per key, and optionally one per key and query.
#[derive(Clone, Copy, Debug)]
pub(crate) struct TileBias {
    /// One value per key.
    pub(crate) keys: *const f32,
    /// `[key][query]`, when the tile has one.
    pub(crate) tile: Option<Matrix>,
}

impl TileBias {
    #[inline(always)]
    unsafe fn start<S: Simd, const M: usize, const N: usize>(self, s: S, row: usize, column: usize) -> [[S::V; N]; M] {
        let mut block = [[s.splat(0.0); N]; M];
        for i in 0..M {
            // SAFETY: `keys` has a value for every row of the result.
            block[i] = [s.splat(unsafe { *self.keys.add(row + i) }); N];
        }
        if let Some(tile) = self.tile {
            let tile = tile.of_tile::<S>();
            let first = tile.at(row, column);
            for i in 0..M {
                // SAFETY: as above.
                if unsafe { *self.keys.add(row + i) } == f32::NEG_INFINITY {
                    // An excluded key: what the tile holds there, NaN included, has no influence.
                    continue;
                }
                for j in 0..N {
                    // SAFETY: the block is inside the tile.
                    block[i][j] = s.add(block[i][j], unsafe { s.load(first.add(i * tile.stride + j * S::LANES)) });
                }
            }
        }
        block
    }

    /// What the sum of a block starts from: the bias, unless a scale comes between.
    #[inline(always)]
    unsafe fn before<S: Simd, const M: usize, const N: usize>(self, s: S, row: usize, column: usize) -> [[S::V; N]; M] {
        if let Some(tile) = self.tile {
            let tile = tile.of_tile::<S>();
            // Of the next block, line by line; beyond the last one is harmless.
            for i in 0..M {
                for j in (0..N).step_by(LINE_FLOATS.div_ceil(S::LANES)) {
                    s.prefetch(tile.at(row + M + i, column + j * S::LANES).cast());
                }
            }
        }
        // SAFETY: the caller's.
        if S::PAIRS { [[s.splat(0.0); N]; M] } else { unsafe { self.start(s, row, column) } }
    }

    /// The logits of a block from its sum.
    #[inline(always)]
    unsafe fn after<S: Simd, const M: usize, const N: usize>(
        self,
        s: S,
        (row, column): (usize, usize),
        scale: f32,
        sum: [[S::V; N]; M],
    ) -> [[S::V; N]; M] {
        if !S::PAIRS {
            return sum;
        }
        let scale = s.splat(scale);
        // SAFETY: the caller's.
        let mut block = unsafe { self.start(s, row, column) };
        for i in 0..M {
            for j in 0..N {
                block[i][j] = s.fma(sum[i][j], scale, block[i][j]);
            }
        }
        block
    }
}

/// Forward logits Sᵀ = bias + K Qᵀ, stored, with the running maximum of every query.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Scores {
    pub(crate) bias: TileBias,
    /// Softmax scale in base 2, where Q has it not.
    pub(crate) scale: f32,
    pub(crate) scores: Matrix,
    /// One running maximum per query.
    pub(crate) row_max: *mut f32,
    /// What the next tiles will read.
    pub(crate) ahead: [Ahead; 4],
}

impl<S: Simd> Phase<S> for Scores {
    const OF_TILE: bool = true;

    #[inline(always)]
    unsafe fn start<const M: usize, const N: usize>(self, s: S, row: usize, column: usize) -> [[S::V; N]; M] {
        if column == 0 {
            self.ahead.into_iter().for_each(|ahead| ahead.fetch(s, row, M));
        }
        // SAFETY: the caller's.
        unsafe { self.bias.before(s, row, column) }
    }

    #[inline(always)]
    unsafe fn finish<const M: usize, const N: usize>(self, s: S, row: usize, column: usize, sum: [[S::V; N]; M]) {
        // SAFETY: the caller's.
        let sum = unsafe { self.bias.after(s, (row, column), self.scale, sum) };
        let scores = self.scores.of_tile::<S>();
        for j in 0..N {
            let at = column + j * S::LANES;
            // SAFETY: the block is inside the scores, and `row_max` has a value for every query.
            unsafe {
                let mut max = s.load(self.row_max.add(at));
                let first = scores.at(row, at);
                for (i, sum) in sum.iter().enumerate() {
                    max = s.max(max, sum[j]);
                    s.store(first.add(i * scores.stride), sum[j]);
                }
                s.store(self.row_max.add(at), max);
            }
        }
    }
}

/// Backward probabilities Pᵀ = exp2(bias + K Qᵀ - lse), recomputed from the log-sum-exp of every query in two parts.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Probabilities {
    pub(crate) bias: TileBias,
    /// Softmax scale in base 2, where Q has it not.
    pub(crate) scale: f32,
    pub(crate) lse: *const f32,
    pub(crate) lse_low: *const f32,
    pub(crate) probabilities: Matrix,
    /// With `PAIRS`, the same as pairs of queries: what dV is made of.
    pub(crate) by_query: Matrix,
    /// What the next tiles will read.
    pub(crate) ahead: [Ahead; 5],
}

impl<S: Simd> Phase<S> for Probabilities {
    const OF_TILE: bool = true;

    #[inline(always)]
    unsafe fn start<const M: usize, const N: usize>(self, s: S, row: usize, column: usize) -> [[S::V; N]; M] {
        if column == 0 {
            self.ahead.into_iter().for_each(|ahead| ahead.fetch(s, row, M));
        }
        // SAFETY: the caller's.
        unsafe { self.bias.before(s, row, column) }
    }

    #[inline(always)]
    unsafe fn finish<const M: usize, const N: usize>(self, s: S, row: usize, column: usize, sum: [[S::V; N]; M]) {
        // SAFETY: the caller's.
        let sum = unsafe { self.bias.after(s, (row, column), self.scale, sum) };
        let probabilities = self.probabilities.of_tile::<S>();
        for j in 0..N {
            let at = column + j * S::LANES;
            // SAFETY: the block is inside the result, and both parts of lse have a value for every query.
            unsafe {
                let (lse, low) = (s.load(self.lse.add(at)), s.load(self.lse_low.add(at)));
                let first = probabilities.at(row, at);
                for (i, sum) in sum.iter().enumerate() {
                    // Subtracted after the products, as forward's maximum is: with -1e9 biases both lose the same bits.
                    let probability = s.exp2(s.sub(s.sub(sum[j], lse), low));
                    s.store(first.add(i * probabilities.stride), probability);
                    if S::PAIRS {
                        s.store_bf16(
                            self.by_query.of_tile_pairs::<S>().at(row + i, 0).cast::<bf16>().add(at),
                            probability,
                        );
                    }
                }
            }
        }
    }
}

/// Backward dSᵀ = Pᵀ ⊙ (V dOᵀ - delta).
#[derive(Clone, Copy, Debug)]
pub(crate) struct ScoreGradients {
    pub(crate) delta: *const f32,
    pub(crate) probabilities: Matrix,
    /// In f32, where a product or a sum reads that; may be the memory of the probabilities.
    pub(crate) gradients: Option<Matrix>,
    /// With `PAIRS`, as pairs of queries and as pairs of keys: what dK and dQ are made of.
    pub(crate) by_query: Matrix,
    pub(crate) by_key: Matrix,
    /// Sum over the rows that share a bias: `[key][query]`, when a bias wants it.
    pub(crate) bias_sum: Option<Matrix>,
}

impl<S: Simd> Phase<S> for ScoreGradients {
    const OF_TILE: bool = true;

    #[inline(always)]
    unsafe fn start<const M: usize, const N: usize>(self, s: S, _: usize, column: usize) -> [[S::V; N]; M] {
        let mut first = [s.splat(0.0); N];
        for j in 0..N {
            // SAFETY: `delta` has a value for every query.
            first[j] = s.sub(first[j], unsafe { s.load(self.delta.add(column + j * S::LANES)) });
        }
        [first; M]
    }

    #[inline(always)]
    unsafe fn finish<const M: usize, const N: usize>(self, s: S, row: usize, column: usize, sum: [[S::V; N]; M]) {
        let probabilities = self.probabilities.of_tile::<S>();
        let p = probabilities.at(row, column);
        let mut block = sum;
        for i in 0..M {
            for j in 0..N {
                // SAFETY: the block is inside the probabilities.
                let probability = unsafe { s.load(p.add(i * probabilities.stride + j * S::LANES)) };
                block[i][j] = s.mul(block[i][j], probability);
            }
        }
        if let Some(gradients) = self.gradients {
            let gradients = gradients.of_tile::<S>();
            let first = gradients.at(row, column);
            for i in 0..M {
                for j in 0..N {
                    // SAFETY: the block is inside the gradients.
                    unsafe { s.store(first.add(i * gradients.stride + j * S::LANES), block[i][j]) }
                }
            }
        }
        if S::PAIRS {
            // SAFETY: the block is inside both matrices; every block starts at an even row.
            unsafe { self.store_pairs(s, row, column, &block) }
        }
        let Some(total) = self.bias_sum else { return };
        let total = total.of_tile::<S>();
        let first = total.at(row, column);
        for i in 0..M {
            for j in 0..N {
                let total = first.wrapping_add(i * total.stride + j * S::LANES);
                // SAFETY: the block is inside the sum.
                unsafe { s.store(total, s.add(s.load(total), block[i][j])) }
            }
        }
    }
}

impl ScoreGradients {
    #[inline(always)]
    unsafe fn store_pairs<S: Simd, const M: usize, const N: usize>(
        self,
        s: S,
        row: usize,
        column: usize,
        block: &[[S::V; N]; M],
    ) {
        let (by_query, by_key) = (self.by_query.of_tile_pairs::<S>(), self.by_key.of_tile::<S>());
        for i in 0..M {
            for j in 0..N {
                let at = column + j * S::LANES;
                // SAFETY: the caller's.
                unsafe {
                    s.store_bf16(by_query.at(row + i, 0).cast::<bf16>().add(at), block[i][j]);
                    if i % 2 == 0 {
                        let second = if i + 1 < M { block[i + 1][j] } else { s.splat(0.0) };
                        s.store(by_key.at((row + i) / 2, at), s.pair(block[i][j], second));
                    }
                }
            }
        }
    }
}
