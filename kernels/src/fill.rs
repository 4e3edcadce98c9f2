//! Fills contiguous elements with one value.

use crate::kernel::{Kernel, KernelError, Launch};
use crate::params::FillParams;

const BLOCK_THREADS: u32 = 256;
const ELEMENTS_PER_THREAD: u32 = 8;

/// The launch that writes `value` into `count` elements of `element_bytes` bytes (1, 2, 4 or 8) from `data` on.
///
/// # Errors
/// [`KernelError`].
pub fn fill(data: u64, element_bytes: u32, value: u64, count: u64) -> Result<Launch<FillParams>, KernelError> {
    let constants = [
        ("ELEMENT_BYTES".to_owned(), element_bytes.to_string()),
        ("BLOCK_THREADS".to_owned(), BLOCK_THREADS.to_string()),
        ("ELEMENTS_PER_THREAD".to_owned(), ELEMENTS_PER_THREAD.to_string()),
    ];
    let name = format!("fill {element_bytes} bytes");
    let kernel = Kernel::new(name, "fill.cu", "fill", &constants, BLOCK_THREADS)?;
    let limit = i64::MAX.unsigned_abs();
    let count_signed = i64::try_from(count).map_err(|_| KernelError::Limit { what: "elements", limit, got: count })?;
    let params = FillParams { data, value, count: count_signed, first_block: 0 };
    Ok(Launch { kernel, blocks: count.div_ceil(u64::from(BLOCK_THREADS * ELEMENTS_PER_THREAD)), params })
}
