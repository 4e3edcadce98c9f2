//! Tensors in host memory for kernels: strided, with guards before, behind and between the elements.

use half::{bf16, f16};
use tilefold_core::DType;
use tilefold_kernels::params::Operand;

/// What memory holds that belongs to no element: NaN in every float type.
const UNWRITTEN: u8 = 0xff;
const GUARD_BYTES: usize = 4096;
/// Operands start at pieces of 16 bytes.
const ALIGNMENT: usize = 16;

/// A tensor of numbers that its dtype holds.
pub(crate) struct Tensor {
    dtype: DType,
    shape: Vec<usize>,
    /// Elements from one to the next.
    step: usize,
    bytes: Vec<u8>,
    start: usize,
}

impl Tensor {
    /// Elements that nobody has written, in row-major order and `step` apart.
    pub(crate) fn new(dtype: DType, shape: &[usize], step: usize) -> Self {
        let elements = shape.iter().product::<usize>() * step;
        let bytes = vec![UNWRITTEN; 2 * GUARD_BYTES + ALIGNMENT + elements * dtype.size_bytes()];
        let start = GUARD_BYTES + bytes[GUARD_BYTES..].as_ptr().align_offset(ALIGNMENT);
        Self { dtype, shape: shape.to_vec(), step, bytes, start }
    }

    /// The same with these elements.
    pub(crate) fn of(dtype: DType, shape: &[usize], step: usize, values: &[f64]) -> Self {
        let mut tensor = Self::new(dtype, shape, step);
        for (index, &value) in values.iter().enumerate() {
            let at = tensor.place(index);
            match dtype {
                DType::F32 => tensor.bytes[at..at + 4].copy_from_slice(&(value as f32).to_le_bytes()),
                DType::F16 => tensor.bytes[at..at + 2].copy_from_slice(&f16::from_f64(value).to_le_bytes()),
                DType::BF16 => tensor.bytes[at..at + 2].copy_from_slice(&bf16::from_f64(value).to_le_bytes()),
                DType::I32 => tensor.bytes[at..at + 4].copy_from_slice(&(value as i32).to_le_bytes()),
                _ => tensor.bytes[at] = u8::from(value != 0.0),
            }
        }
        tensor
    }

    fn place(&self, index: usize) -> usize {
        self.start + index * self.step * self.dtype.size_bytes()
    }

    /// The elements.
    pub(crate) fn values(&self) -> Vec<f64> {
        let elements = self.shape.iter().product::<usize>();
        let two = |at: usize| [self.bytes[at], self.bytes[at + 1]];
        let four = |at: usize| [self.bytes[at], self.bytes[at + 1], self.bytes[at + 2], self.bytes[at + 3]];
        let value = |at| match self.dtype {
            DType::F16 => f16::from_le_bytes(two(at)).to_f64(),
            DType::BF16 => bf16::from_le_bytes(two(at)).to_f64(),
            _ => f64::from(f32::from_le_bytes(four(at))),
        };
        (0..elements).map(|index| value(self.place(index))).collect()
    }

    /// Its address and strides; what runs may write to it as long as it lives.
    pub(crate) fn operand(&mut self) -> Operand {
        let mut strides = vec![self.step as i64; self.shape.len()];
        for axis in (1..self.shape.len()).rev() {
            strides[axis - 1] = strides[axis] * self.shape[axis] as i64;
        }
        Operand::new(self.bytes[self.start..].as_mut_ptr().addr() as u64, &self.shape, &strides)
    }

    /// Whether nothing but elements was written.
    pub(crate) fn guards_hold(&self) -> bool {
        let (size, elements) = (self.dtype.size_bytes(), self.shape.iter().product::<usize>());
        let belongs = |at: usize| {
            at >= self.start
                && (at - self.start) / size < elements * self.step
                && ((at - self.start) / size).is_multiple_of(self.step)
        };
        self.bytes.iter().enumerate().all(|(at, &byte)| byte == UNWRITTEN || belongs(at))
    }
}
