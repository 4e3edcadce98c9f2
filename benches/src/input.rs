//! Seeded inputs, written row by row in the dtype itself: no second copy, and the same values for any number of threads.

use half::{bf16, f16};
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use rayon::prelude::*;
use tilefold::{DType, Element, ProblemError, Tensor};

/// Values `normal` draws from one stream.
const BLOCK_VALUES: usize = 1 << 14;

/// Bytes summed for one value; their sum is normal enough for a bench, and cheap.
const BYTES: usize = 4;

/// A host tensor whose rows of `row_len` values `fill` writes as f32, on any thread and in any order.
///
/// # Errors
/// [`ProblemError`] for a shape without elements or too many, or a dtype without real numbers.
pub fn filled_by_rows(
    dtype: DType,
    shape: &[usize],
    row_len: usize,
    fill: impl Fn(usize, &mut [f32]) + Sync,
) -> Result<Tensor, ProblemError> {
    let mut tensor = Tensor::zeros(dtype, shape)?;
    let values = tensor.layout().len() * dtype.size_bytes();
    let bytes = tensor.host_bytes_mut().unwrap_or_default();
    let bytes = &mut bytes[..values];
    match dtype {
        DType::F32 => fill_rows::<f32>(bytes, row_len, &fill),
        DType::F16 => fill_rows::<f16>(bytes, row_len, &fill),
        DType::BF16 => fill_rows::<bf16>(bytes, row_len, &fill),
        got => {
            return Err(ProblemError::UnsupportedDType { tensor: "input", expected: "f32, f16 or bf16".into(), got });
        }
    }
    Ok(tensor)
}

fn fill_rows<T: Element + Round>(bytes: &mut [u8], row_len: usize, fill: &(impl Fn(usize, &mut [f32]) + Sync)) {
    let values: &mut [T] = bytemuck::cast_slice_mut(bytes);
    values.par_chunks_mut(row_len.max(1)).enumerate().for_each_init(
        || vec![0_f32; row_len],
        |row, (index, out)| {
            let row = &mut row[..out.len()];
            fill(index, row);
            out.iter_mut().zip(row).for_each(|(out, value)| *out = T::round(*value));
        },
    );
}

/// The nearest value of a dtype.
trait Round {
    fn round(value: f32) -> Self;
}
impl Round for f32 {
    fn round(value: f32) -> Self {
        value
    }
}
impl Round for f16 {
    fn round(value: f32) -> Self {
        Self::from_f32(value)
    }
}
impl Round for bf16 {
    fn round(value: f32) -> Self {
        Self::from_f32(value)
    }
}

/// Values of mean 0 and variance 1, nearly normal; `seed` is best another one for each tensor.
///
/// # Errors
/// As [`filled_by_rows`].
pub fn normal(dtype: DType, shape: &[usize], seed: u64) -> Result<Tensor, ProblemError> {
    filled_by_rows(dtype, shape, BLOCK_VALUES, |block, values| {
        let mut rng = stream(seed, block);
        let mut bytes = vec![0_u8; values.len() * BYTES];
        rng.fill_bytes(&mut bytes);
        for (value, bytes) in values.iter_mut().zip(bytes.chunks_exact(BYTES)) {
            let sum: u16 = bytes.iter().copied().map(u16::from).sum();
            *value = (f32::from(sum) - SUM_MEAN) / SUM_DEVIATION;
        }
    })
}

/// Mean of the sum of [`BYTES`] random bytes.
const SUM_MEAN: f32 = 510.0;
/// Standard deviation of that sum: √(4 · (256² - 1) / 12).
const SUM_DEVIATION: f32 = 147.800_77;

/// A mask that keeps seven of eight keys.
///
/// # Errors
/// As [`Tensor::zeros`].
pub fn random_bools(shape: &[usize], seed: u64) -> Result<Tensor, ProblemError> {
    let mut tensor = Tensor::zeros(DType::Bool, shape)?;
    let values = tensor.layout().len();
    let bytes = &mut tensor.host_bytes_mut().unwrap_or_default()[..values];
    stream(seed, 0).fill_bytes(bytes);
    bytes.iter_mut().for_each(|byte| *byte = u8::from(*byte % 8 != 0));
    Ok(tensor)
}

fn stream(seed: u64, block: usize) -> ChaCha8Rng {
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    rng.set_stream(u64::try_from(block).unwrap_or(u64::MAX));
    rng
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn values_have_mean_0_and_variance_1_in_every_dtype() {
        for dtype in [DType::F32, DType::F16, DType::BF16] {
            let values = normal(dtype, &[3, BLOCK_VALUES], 7).unwrap().to_f64().unwrap();
            let count = f64::from(u32::try_from(values.len()).unwrap());
            let mean = values.iter().sum::<f64>() / count;
            let variance = values.iter().map(|value| value * value).sum::<f64>() / count;
            assert!(mean.abs() < 0.02 && (variance - 1.0).abs() < 0.02, "{dtype}: {mean} {variance}");
        }
    }

    #[test]
    fn values_depend_on_seed_and_block_not_on_threads() {
        let values = |threads, seed| {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
            pool.install(|| normal(DType::F32, &[2 * BLOCK_VALUES + 5], seed).unwrap().to_f64().unwrap())
        };
        assert_eq!(values(1, 3), values(3, 3));
        assert_ne!(values(1, 3), values(1, 4));
        assert_ne!(values(1, 3)[..9], values(1, 3)[BLOCK_VALUES..][..9]);
    }

    #[test]
    fn masks_keep_most_keys() {
        let mask = random_bools(&[10_000], 1).unwrap().to_f64().unwrap();
        let kept = mask.iter().sum::<f64>() / 1e4;
        assert!((0.85..0.9).contains(&kept), "{kept}");
    }
}
