//! Operands in a device's memory: any layout, in a buffer larger than the operand, with garbage around and in it.

use half::{bf16, f16};
use tilefold_core::{Backend, DType, DeviceResult, Element, Layout, Stream, Tensor};

use crate::case::Place;
use crate::values::Host;

/// Unused elements before and behind every output.
const GUARD: usize = 67;

/// Byte of every element nobody has written: NaN in each float type, -1 as an id, true as a mask entry.
const GARBAGE: u8 = 0xff;

/// A tensor on a device and the bytes it was given.
#[derive(Debug)]
pub struct Buffer {
    tensor: Tensor,
    initial: Vec<u8>,
}

/// What came back from a device: the operand's values, and its bytes to compare runs by.
#[derive(Clone, Debug, PartialEq)]
pub struct Downloaded {
    /// Values, row-major.
    pub values: Vec<f64>,
    /// The whole buffer's bytes.
    pub bytes: Vec<u8>,
}

/// The layout of `shape` at `place`, and the elements its buffer needs.
fn layout(shape: &[usize], place: &Place, guard: usize) -> Result<(Layout, usize), String> {
    let identity: Vec<usize> = (0..shape.len()).collect();
    let order = if place.order.len() == shape.len() { &place.order } else { &identity };
    let mut strides = vec![0_i64; shape.len()];
    let mut next = i64::try_from(1 + place.skip).map_err(|e| e.to_string())?;
    let mut offset = i64::try_from(guard + place.gap).map_err(|e| e.to_string())?;
    for &axis in order.iter().rev() {
        if place.repeated.contains(&axis) {
            continue;
        }
        let size = i64::try_from(shape[axis]).map_err(|e| e.to_string())?;
        strides[axis] = next;
        if place.reversed.contains(&axis) {
            offset += next * (size - 1);
            strides[axis] = -next;
        }
        next = next * size + i64::try_from(place.gap).map_err(|e| e.to_string())?;
    }
    let layout = Layout::new(shape, &strides, offset).map_err(|e| e.to_string())?;
    let elements = usize::try_from(layout.extent().end).map_err(|e| e.to_string())? + place.gap + guard;
    Ok((layout, elements))
}

impl Buffer {
    /// An input: its values at `place`, garbage around them.
    ///
    /// # Errors
    /// What the device reports.
    pub fn input(device: &dyn Backend, stream: &Stream, host: &Host, place: &Place) -> Result<Self, String> {
        let (layout, elements) = layout(&host.shape, place, 0)?;
        let size = host.dtype.size_bytes();
        let mut bytes = vec![GARBAGE; elements * size];
        for (position, &value) in layout.positions().zip(&host.values) {
            let at = usize::try_from(position).map_err(|e| e.to_string())? * size;
            encode(host.dtype, value, &mut bytes[at..at + size]);
        }
        Self::with_bytes(device, stream, host.dtype, layout, bytes)
    }

    /// An output: garbage everywhere, and a guard zone on both sides.
    ///
    /// # Errors
    /// What the device reports.
    pub fn output(
        device: &dyn Backend,
        stream: &Stream,
        dtype: DType,
        shape: &[usize],
        place: &Place,
    ) -> Result<Self, String> {
        let (layout, elements) = layout(shape, &Place { repeated: Vec::new(), ..place.clone() }, GUARD)?;
        Self::with_bytes(device, stream, dtype, layout, vec![GARBAGE; elements * dtype.size_bytes()])
    }

    fn with_bytes(
        device: &dyn Backend,
        stream: &Stream,
        dtype: DType,
        layout: Layout,
        initial: Vec<u8>,
    ) -> Result<Self, String> {
        let upload = || -> DeviceResult<_> {
            let mut storage = device.alloc(stream, initial.len())?;
            device.upload(stream, &initial, &mut storage)?;
            Ok(storage)
        };
        let storage = upload().map_err(|e| e.to_string())?;
        let tensor = Tensor::new(storage, dtype, layout).map_err(|e| e.to_string())?;
        Ok(Self { tensor, initial })
    }

    /// The operand.
    #[must_use]
    pub fn tensor(&self) -> &Tensor {
        &self.tensor
    }

    /// The operand, to be written.
    pub fn tensor_mut(&mut self) -> &mut Tensor {
        &mut self.tensor
    }

    /// Whether the buffer still holds what it was given.
    ///
    /// # Errors
    /// What the device reports.
    pub fn is_unchanged(&self, device: &dyn Backend, stream: &Stream) -> Result<bool, String> {
        let mut bytes = vec![0; self.initial.len()];
        device.download(stream, self.tensor.storage(), &mut bytes).map_err(|e| e.to_string())?;
        Ok(bytes == self.initial)
    }

    /// What the device left in the buffer.
    ///
    /// # Errors
    /// What the device reports; and a byte outside the operand that has changed.
    pub fn download(&self, device: &dyn Backend, stream: &Stream) -> Result<Downloaded, String> {
        let mut bytes = vec![0; self.initial.len()];
        device.download(stream, self.tensor.storage(), &mut bytes).map_err(|e| e.to_string())?;
        let (dtype, layout) = (self.tensor.dtype(), self.tensor.layout());
        let size = dtype.size_bytes();
        let mut outside = vec![true; bytes.len() / size];
        let mut values = Vec::with_capacity(layout.len());
        for position in layout.positions() {
            let at = usize::try_from(position).map_err(|e| e.to_string())?;
            outside[at] = false;
            values.push(decode(dtype, &bytes[at * size..(at + 1) * size]));
        }
        let changed = |&at: &usize| bytes[at * size..(at + 1) * size] != self.initial[at * size..(at + 1) * size];
        match outside.iter().enumerate().filter_map(|(at, outside)| outside.then_some(at)).find(changed) {
            Some(at) => Err(format!("wrote outside the tensor, at element {at} of its buffer; layout {layout:?}")),
            None => Ok(Downloaded { values, bytes }),
        }
    }
}

fn encode(dtype: DType, value: f64, bytes: &mut [u8]) {
    match dtype {
        DType::F32 => bytes.copy_from_slice(&f32::from_f64(value).to_ne_bytes()),
        DType::F16 => bytes.copy_from_slice(&<f16 as Element>::from_f64(value).to_ne_bytes()),
        DType::BF16 => bytes.copy_from_slice(&<bf16 as Element>::from_f64(value).to_ne_bytes()),
        DType::I32 => bytes.copy_from_slice(&i32::from_f64(value).to_ne_bytes()),
        _ => bytes.copy_from_slice(&[u8::from_f64(value)]),
    }
}

fn decode(dtype: DType, bytes: &[u8]) -> f64 {
    let [a, b, c, d] = std::array::from_fn(|i| bytes.get(i).copied().unwrap_or(0));
    match dtype {
        DType::F32 => f64::from(f32::from_ne_bytes([a, b, c, d])),
        DType::F16 => f16::from_ne_bytes([a, b]).to_f64(),
        DType::BF16 => bf16::from_ne_bytes([a, b]).to_f64(),
        DType::I32 => f64::from(i32::from_ne_bytes([a, b, c, d])),
        _ => f64::from(a),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn places_are_distinct_positions_inside_the_buffer() {
        let places = [
            Place::default(),
            Place { order: vec![2, 0, 1], gap: 3, skip: 1, reversed: vec![0, 2], repeated: vec![] },
            Place { reversed: vec![1], gap: 1, ..Place::default() },
        ];
        for place in places {
            let (layout, elements) = layout(&[2, 3, 4], &place, GUARD).unwrap();
            assert!(!layout.overlaps_itself());
            let mut positions: Vec<_> = layout.positions().collect();
            positions.sort_unstable();
            positions.dedup();
            assert_eq!(positions.len(), 24);
            assert!(positions[0] >= 67 && usize::try_from(positions[23]).unwrap() + GUARD < elements);
        }
    }
}
