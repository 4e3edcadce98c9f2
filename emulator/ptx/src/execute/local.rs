//! Local memory of the threads of a warp.

use crate::fault::FaultKind;
use crate::layout::START;

#[derive(Clone, Debug)]
pub(crate) struct Local {
    bytes_per_thread: usize,
    bytes: Vec<u8>,
    set: Vec<bool>,
}

const SPACE: &str = "local";

impl Local {
    pub(crate) fn new(bytes_per_thread: u32) -> Self {
        let all = 32 * bytes_per_thread as usize;
        Self { bytes_per_thread: bytes_per_thread as usize, bytes: vec![0; all], set: vec![false; all] }
    }

    pub(crate) fn clear(&mut self) {
        self.set.fill(false);
    }

    fn locate(&self, lane: usize, address: u64, bytes: u32) -> Result<std::ops::Range<usize>, FaultKind> {
        if !address.is_multiple_of(u64::from(bytes)) {
            return Err(FaultKind::Misaligned { space: SPACE, address, bytes });
        }
        let start = address.wrapping_sub(START);
        let size = self.bytes_per_thread as u64;
        if start >= size || size - start < u64::from(bytes) {
            let detail = format!("local memory lies from {START:#x} to {:#x}", START + size);
            return Err(FaultKind::OutOfBounds { space: SPACE, address, bytes, detail });
        }
        let start = lane * self.bytes_per_thread + start as usize;
        Ok(start..start + bytes as usize)
    }

    /// The bytes, and whether all were set: unset ones make the loaded register undefined.
    pub(crate) fn read(&self, lane: usize, address: u64, bytes: u32) -> Result<(u128, bool), FaultKind> {
        let range = self.locate(lane, address, bytes)?;
        let mut value = [0; 16];
        value[..bytes as usize].copy_from_slice(&self.bytes[range.clone()]);
        Ok((u128::from_le_bytes(value), self.set[range].iter().all(|&set| set)))
    }

    pub(crate) fn write(
        &mut self,
        lane: usize,
        address: u64,
        bytes: u32,
        value: u128,
        defined: bool,
    ) -> Result<(), FaultKind> {
        let range = self.locate(lane, address, bytes)?;
        self.bytes[range.clone()].copy_from_slice(&value.to_le_bytes()[..bytes as usize]);
        self.set[range].fill(defined);
        Ok(())
    }
}
