//! `ldmatrix` and `mma.sync`, by the fragment layouts of the PTX manual.
//!
//! Products are exact. A sum is formed over eight of them (four for tf32) and the accumulator, and cut to f32 towards
//! zero, as measurements of the A100 found: results carry the drift that long sums have on hardware.

use super::{Env, Executed, lanes};
use crate::fault::Stop;
use crate::instruction::{Address, Index, MatrixType, Mma};
use crate::registers::LANES;
use crate::warp::Warp;

const ROWS: usize = 16;
const COLUMNS: usize = 8;
const DEPTH: usize = 16;
/// Bytes of one row of an 8x8 matrix of 16-bit elements.
const ROW_BYTES: u32 = 16;

type Left = [[f64; DEPTH]; ROWS];
type Right = [[f64; COLUMNS]; DEPTH];
type Sums = [[f64; COLUMNS]; ROWS];

impl Warp {
    /// Lane `8 m + r` gives the address of row `r` of matrix `m`; lane `l` receives elements `2 (l % 4)` and the next of
    /// row `l / 4`, or of column `l / 4` when transposed.
    pub(super) fn load_matrix(
        &mut self,
        env: &mut Env<'_, '_>,
        address: Address,
        count: usize,
        transposed: bool,
        d: [Index; 4],
        mask: u32,
    ) -> Executed<()> {
        for (matrix, &into) in d[..count].iter().enumerate() {
            let mut rows = [[0u16; 8]; 8];
            for (row, elements) in rows.iter_mut().enumerate() {
                let lane = 8 * matrix + row;
                let bits = self.read_row(env, address, lane).map_err(|kind| Stop::new(lane as u32, kind))?;
                *elements = std::array::from_fn(|column| (bits >> (16 * column)) as u16);
            }
            for lane in lanes(mask) {
                let (line, first) = (lane / 4, 2 * (lane % 4));
                let (low, high) = if transposed {
                    (rows[first][line], rows[first + 1][line])
                } else {
                    (rows[line][first], rows[line][first + 1])
                };
                self.registers.words[into as usize][lane] = u32::from(high) << 16 | u32::from(low);
            }
        }
        Ok(())
    }

    fn read_row(&self, env: &mut Env<'_, '_>, address: Address, lane: usize) -> Result<u128, crate::fault::FaultKind> {
        let at = self.address(address, lane);
        self.read(env, address.space, lane, at, ROW_BYTES, false).map(|(bits, _)| bits)
    }

    pub(super) fn mma(&mut self, mma: &Mma) {
        let (a, b) = (self.left(mma), self.right(mma));
        let c: [[f32; LANES]; 4] = mma.c.map(|index| self.floats(index));
        let mut sums = [[0f64; COLUMNS]; ROWS];
        for lane in 0..LANES {
            for (element, values) in c.iter().enumerate() {
                let (row, column) = accumulator(lane, element);
                sums[row][column] = f64::from(values[lane]);
            }
        }
        let step = if mma.input == MatrixType::Tf32 { 4 } else { 8 };
        accumulate(&a, &b, &mut sums, mma.depth as usize, step);
        for (element, &index) in mma.d.iter().enumerate() {
            let values = &mut self.registers.words[index as usize];
            for (lane, value) in values.iter_mut().enumerate() {
                let (row, column) = accumulator(lane, element);
                let sum = sums[row][column];
                *value = if sum.is_nan() { 0x7FFF_FFFF } else { (sum as f32).to_bits() };
            }
        }
    }

    /// The 16 x depth matrix, from its fragments.
    fn left(&self, mma: &Mma) -> Left {
        let mut matrix = [[0.0; DEPTH]; ROWS];
        let count = mma.depth as usize * if mma.input == MatrixType::Tf32 { 2 } else { 1 } / 4;
        for (register, &index) in mma.a[..count].iter().enumerate() {
            let words = &self.registers.words[index as usize];
            for (lane, &bits) in words.iter().enumerate() {
                // Odd registers hold the lower eight rows, the second pair the further columns.
                let row = lane / 4 + 8 * (register % 2);
                if mma.input == MatrixType::Tf32 {
                    matrix[row][lane % 4 + 4 * (register / 2)] = tf32(bits);
                } else {
                    let column = 2 * (lane % 4) + 8 * (register / 2);
                    [matrix[row][column], matrix[row][column + 1]] = halves(mma.input, bits);
                }
            }
        }
        matrix
    }

    /// The depth x 8 matrix, from its fragments.
    fn right(&self, mma: &Mma) -> Right {
        let mut matrix = [[0.0; COLUMNS]; DEPTH];
        let count = mma.depth as usize * if mma.input == MatrixType::Tf32 { 2 } else { 1 } / 8;
        for (register, &index) in mma.b[..count].iter().enumerate() {
            let words = &self.registers.words[index as usize];
            for (lane, &bits) in words.iter().enumerate() {
                let column = lane / 4;
                if mma.input == MatrixType::Tf32 {
                    matrix[lane % 4 + 4 * register][column] = tf32(bits);
                } else {
                    let row = 2 * (lane % 4) + 8 * register;
                    [matrix[row][column], matrix[row + 1][column]] = halves(mma.input, bits);
                }
            }
        }
        matrix
    }
}

/// Row and column of an accumulator's element.
fn accumulator(lane: usize, element: usize) -> (usize, usize) {
    (lane / 4 + 8 * (element / 2), 2 * (lane % 4) + element % 2)
}

/// Adds `depth` products to every sum, `step` of them before each cut.
fn accumulate(a: &Left, b: &Right, sums: &mut Sums, depth: usize, step: usize) {
    #[cfg(target_arch = "x86_64")]
    if std::arch::is_x86_feature_detected!("avx2") {
        // SAFETY: the processor has AVX2, as the line above asked.
        unsafe { accumulate_avx2(a, b, sums, depth, step) };
        return;
    }
    accumulate_portable(a, b, sums, depth, step);
}

/// The same code, compiled for longer vectors; products are exact in f64, so that the results are the same, too.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2")]
fn accumulate_avx2(a: &Left, b: &Right, sums: &mut Sums, depth: usize, step: usize) {
    accumulate_portable(a, b, sums, depth, step);
}

#[inline(always)]
fn accumulate_portable(a: &Left, b: &Right, sums: &mut Sums, depth: usize, step: usize) {
    for start in (0..depth).step_by(step) {
        for (sums, left) in sums.iter_mut().zip(a) {
            let mut row = *sums;
            for (&left, right) in left[start..start + step].iter().zip(&b[start..start + step]) {
                for (sum, &right) in row.iter_mut().zip(right) {
                    *sum += left * right;
                }
            }
            *sums = row.map(cut);
        }
    }
}

fn halves(input: MatrixType, bits: u32) -> [f64; 2] {
    if input == MatrixType::Bf16 {
        [f64::from(f32::from_bits(bits << 16)), f64::from(f32::from_bits(bits & 0xFFFF_0000))]
    } else {
        [f64::from(half_value(bits & 0xFFFF)), f64::from(half_value(bits >> 16))]
    }
}

/// The value of an f16: its exponent and fraction moved into those of an f32, and the biases' difference made good.
fn half_value(bits: u32) -> f32 {
    let magnitude = (bits & 0x7FFF) << 13;
    let scaled = (f32::from_bits(magnitude) * f32::from_bits(0x7780_0000)).to_bits();
    let special = if bits & 0x7C00 == 0x7C00 { 0x7F80_0000 } else { 0 };
    f32::from_bits(scaled | special | (bits & 0x8000) << 16)
}

/// The hardware reads no more than the 10 upper bits of the fraction.
fn tf32(bits: u32) -> f64 {
    f64::from(f32::from_bits(bits & 0xFFFF_E000))
}

/// Towards zero to the fraction of an f32 (of an f32's normal numbers).
#[inline(always)]
fn cut(sum: f64) -> f64 {
    f64::from_bits(sum.to_bits() & !0x1FFF_FFFF)
}

#[cfg(test)]
mod tests {
    use super::half_value;

    #[test]
    fn every_half_has_its_value() {
        for bits in 0..=u16::MAX {
            let (found, due) = (half_value(bits.into()), half::f16::from_bits(bits).to_f32());
            assert!(found == due || (found.is_nan() && due.is_nan()), "{bits:#x}: {found} {due}");
            assert_eq!(found.is_sign_negative(), due.is_sign_negative());
        }
    }
}
