//! Masks with one entry for every query and key, for those who ask for one: where they are built, and how.
//!
//! Attention itself needs none: a [`StructuralMask`] is evaluated per tile and takes no memory.

mod fill;

use std::fmt;
use std::ops::Range;

use tracing::debug;

use crate::{
    Backend, DType, Device, DeviceInfo, Error, Layout, ProblemError, StructuralMask, Tensor, TensorView, relayout,
};

/// Share of a device's memory that an explicit mask may take there unless [`MaskOptions`] says otherwise: one in so many.
pub const MASK_SHARE: u64 = 8;

/// The same in bytes for a device that cannot tell its memory: 256 MiB, the largest buffer every WebGPU device has.
pub const MASK_BYTES_OF_UNKNOWN_MEMORY: u64 = 256 << 20;

/// Memory beside the mask while it is built, unless [`MaskOptions`] says otherwise: 16 MiB.
pub const MASK_SLAB_BYTES: usize = 16 << 20;

/// Keys of one word of [`MaskForm::BitPacked`].
const KEYS_PER_WORD: usize = 32;

/// What a mask's entries are.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub enum MaskForm {
    /// One byte a pair, 1 = the query sees the key: dtype bool, `[seqlen_q, seqlen_k]`.
    #[default]
    Bool,
    /// What the logits get: 0 for a key that is seen, or the number of ALiBi, and -inf for one that is not. f32, f16 or
    /// bf16, `[1, 1, heads, seqlen_q, seqlen_k]`; heads is 1 without ALiBi.
    Additive(DType),
    /// One bit a pair, 1 = the query sees the key: dtype i32, `[seqlen_q, ceil(seqlen_k / 32)]`. Key j is bit `j % 32` of
    /// word `j / 32`, bit 0 the least significant; bits beyond the last key are 0.
    BitPacked,
}

/// Where a mask is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum MaskPlacement {
    /// In the device's memory.
    Device,
    /// In host memory: [`Mask::rows_on`] brings the rows in use to the device.
    Host,
}

/// Form, place and temporary memory of a mask.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MaskOptions {
    /// What the entries are.
    pub form: MaskForm,
    /// Largest mask in bytes that is built on the device; larger ones are built in host memory. `None`: one
    /// [`MASK_SHARE`]th of the memory the device has, [`MASK_BYTES_OF_UNKNOWN_MEMORY`] where it does not tell; 0: always
    /// in host memory.
    pub device_threshold_bytes: Option<u64>,
    /// Largest temporary in bytes, on the host and again on a device with memory of its own; at least one row is built at
    /// a time.
    pub slab_bytes: usize,
}

/// Says for a tile, queries × keys, row-major, which keys are seen; all entries are false when it is called.
pub type KeepTile<'a> = dyn Fn(Range<usize>, Range<usize>, &mut [bool]) + Sync + 'a;

/// Says for a tile, queries × keys, row-major, what the logits get; all entries are 0 when it is called.
pub type AddTile<'a> = dyn Fn(Range<usize>, Range<usize>, &mut [f32]) + Sync + 'a;

/// What a mask is built from. Closures are called from several threads, for any tiles and in any order.
#[derive(Clone, Copy)]
pub enum MaskSource<'a> {
    /// Causal, window, ALiBi, global offsets; with segments, a query also sees only keys with its own id.
    Structural {
        /// The descriptor.
        mask: &'a StructuralMask,
        /// Ids of the queries and of the keys.
        segments: Option<(&'a [i32], &'a [i32])>,
    },
    /// A closure that says which keys are seen.
    Keep(&'a KeepTile<'a>),
    /// A closure that says what the logits get, rounded once to the dtype; for [`MaskForm::Additive`] alone.
    Add(&'a AddTile<'a>),
}

/// A mask with an entry for every query and key.
#[derive(Debug)]
pub struct Mask {
    tensor: Tensor,
    form: MaskForm,
    placement: MaskPlacement,
}

impl Default for MaskOptions {
    fn default() -> Self {
        Self { form: MaskForm::default(), device_threshold_bytes: None, slab_bytes: MASK_SLAB_BYTES }
    }
}

impl MaskOptions {
    /// Largest mask in bytes that is built on this device.
    ///
    /// ```
    /// use tilefold::{Backend, Device, MASK_SHARE, MaskOptions};
    /// let info = Device::cpu()?.info().clone();
    /// assert_eq!(MaskOptions::default().threshold_bytes(&info), info.memory_bytes / MASK_SHARE);
    /// # Ok::<(), tilefold::Error>(())
    /// ```
    #[must_use]
    pub fn threshold_bytes(&self, info: &DeviceInfo) -> u64 {
        self.device_threshold_bytes.unwrap_or(match info.memory_bytes {
            0 => MASK_BYTES_OF_UNKNOWN_MEMORY,
            bytes => bytes / MASK_SHARE,
        })
    }
}

impl<'a> From<&'a StructuralMask> for MaskSource<'a> {
    fn from(mask: &'a StructuralMask) -> Self {
        Self::Structural { mask, segments: None }
    }
}

impl fmt::Debug for MaskSource<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Structural { mask, segments } => {
                f.debug_struct("Structural").field("mask", mask).field("segments", &segments.is_some()).finish()
            }
            Self::Keep(_) => f.write_str("Keep(..)"),
            Self::Add(_) => f.write_str("Add(..)"),
        }
    }
}

impl Mask {
    /// What the entries are.
    #[must_use]
    pub fn form(&self) -> MaskForm {
        self.form
    }

    /// Where it was built.
    #[must_use]
    pub fn placement(&self) -> MaskPlacement {
        self.placement
    }

    /// Its entries, in the shape and dtype that [`MaskForm`] gives.
    #[must_use]
    pub fn tensor(&self) -> &Tensor {
        &self.tensor
    }

    /// The tensor alone.
    #[must_use]
    pub fn into_tensor(self) -> Tensor {
        self.tensor
    }

    /// The mask as a bias of [`crate::Inputs`]: `[1, 1, heads, seqlen_q, seqlen_k]`.
    ///
    /// # Errors
    /// [`ProblemError::UnsupportedDType`] for another form than [`MaskForm::Additive`].
    pub fn bias(&self) -> Result<TensorView<'_>, Error> {
        if self.tensor.dtype().is_float() {
            return Ok(self.tensor.view());
        }
        let expected = "f32, f16 or bf16: ask for MaskForm::Additive".to_owned();
        Err(ProblemError::UnsupportedDType { tensor: "mask", expected, got: self.tensor.dtype() }.into())
    }

    /// The mask as the key mask of [`crate::Inputs`], `[1, 1, seqlen_k]`, when it has one query for all.
    ///
    /// # Errors
    /// [`ProblemError::Shape`] when queries differ, which a key mask cannot say: use [`Mask::bias`];
    /// [`ProblemError::UnsupportedDType`] for another form than [`MaskForm::Bool`].
    pub fn key_mask(&self) -> Result<TensorView<'_>, Error> {
        let (tensor, got) = ("mask", self.tensor.dtype());
        if got != DType::Bool {
            let expected = "bool: ask for MaskForm::Bool".to_owned();
            return Err(ProblemError::UnsupportedDType { tensor, expected, got }.into());
        }
        match self.tensor.shape() {
            [1, _] => Ok(self.tensor.view().unsqueeze(0)?),
            shape => {
                let (dimension, got) = ("seqlen_q", shape.first().copied().unwrap_or(0));
                Err(ProblemError::Shape { tensor, dimension, expected: 1, got }.into())
            }
        }
    }

    /// A copy of the rows of some queries in the device's memory: what attention over these queries needs of a mask that
    /// stays on the host.
    ///
    /// *Shapes*: as the mask, with as many queries as the range has.
    ///
    /// ```
    /// use tilefold::{Device, Inputs, MaskForm, MaskOptions, Options, StructuralMask, TensorView, attention, build_mask};
    /// let device = Device::cpu()?;
    /// let causal = StructuralMask { causal: true, ..StructuralMask::default() };
    /// let form = MaskForm::Additive(tilefold::DType::F32);
    /// let options = MaskOptions { form, device_threshold_bytes: Some(0), ..MaskOptions::default() };
    /// let mask = build_mask(&device, (&causal).into(), 4, 4, &options)?; // in host memory
    ///
    /// let data: Vec<f32> = (0_u8..32).map(|i| f32::from(i % 7)).collect();
    /// let x = TensorView::from_slice(&data, &[1, 1, 4, 1, 8])?;
    /// for queries in [0..2, 2..4] {
    ///     let rows = mask.rows_on(&device, queries.clone())?;
    ///     let mut inputs = Inputs::new(x.slice(2, queries, 1)?, x.clone(), x.clone());
    ///     inputs.biases.push(rows.view());
    ///     assert_eq!(attention(&device, &inputs, &Options::default())?.out.shape(), [1, 1, 2, 1, 8]);
    /// }
    /// # Ok::<(), tilefold::Error>(())
    /// ```
    ///
    /// # Errors
    /// [`ProblemError::Limit`] and [`ProblemError::ZeroSize`] for queries that are not there, a wrong-device error for a
    /// mask on another device, [`crate::DeviceError::OutOfMemory`].
    pub fn rows_on(&self, device: &Device, queries: Range<usize>) -> Result<Tensor, Error> {
        let rows = self.tensor.view().slice(self.tensor.shape().len() - 2, queries, 1)?;
        let here = if self.tensor.device().is_host() { Device::cpu()? } else { device.clone() };
        let mut slab = here.zeros(rows.dtype(), rows.shape())?;
        relayout(&here, rows, slab.view_mut())?;
        device.upload_tensor(slab)
    }
}

/// Builds a mask with an entry for every query and key: on the device when it is small enough for it, otherwise in host
/// memory.
///
/// Attention takes the descriptor as it is, [`crate::Options::mask`], and stores nothing; this is for other callers, and for
/// masks that no descriptor says. *Memory*: the mask, and at most a slab ([`MaskOptions::slab_bytes`]) on the host and one
/// on a device with memory of its own; closures also get a tile of 64 queries × 1024 keys a thread. *Numerics*: ALiBi and
/// what a closure adds are rounded once to the dtype; equal sources give equal bits. *Threads*: those of the rayon pool the
/// caller is in.
///
/// ```
/// use tilefold::{DType, Device, Inputs, MaskForm, MaskOptions, Options, StructuralMask, TensorView, attention, build_mask};
/// let device = Device::cpu()?;
/// let data: Vec<f32> = (0_u8..96).map(|i| f32::from(i % 11) / 11.0).collect();
/// let x = TensorView::from_slice(&data, &[1, 1, 6, 2, 8])?;
/// let mask = StructuralMask { causal: true, alibi_slopes: Some(vec![0.5, 0.25]), ..StructuralMask::default() };
///
/// let explicit = MaskOptions { form: MaskForm::Additive(DType::F32), ..MaskOptions::default() };
/// let built = build_mask(&device, (&mask).into(), 6, 6, &explicit)?;
/// let mut inputs = Inputs::new(x.clone(), x.clone(), x.clone());
/// inputs.biases.push(built.bias()?); // [1, 1, heads, seqlen_q, seqlen_k]
/// let with_tensor = attention(&device, &inputs, &Options::default())?.out.to_f64()?;
///
/// let descriptor = Options { mask, ..Options::default() };
/// let without = attention(&device, &Inputs::new(x.clone(), x.clone(), x), &descriptor)?.out.to_f64()?;
/// assert!(with_tensor.iter().zip(&without).all(|(a, b)| (a - b).abs() < 1e-6));
/// # Ok::<(), tilefold::Error>(())
/// ```
///
/// # Errors
/// [`ProblemError::ZeroSize`] and [`ProblemError::Overflow`] for the sizes; [`ProblemError::UnsupportedDType`] for an additive
/// form that is not of floats; [`ProblemError::Unexpected`] for numbers (ALiBi, [`MaskSource::Add`]) in a form that holds
/// none; [`ProblemError::Length`] for segments of other lengths or no slopes; [`ProblemError::Value`] for a slope that is not
/// finite, or whose largest number the dtype rounds to an infinity, which would hide the key; [`Error::Device`] and
/// [`Error::Open`].
pub fn build_mask(
    device: &Device,
    source: MaskSource<'_>,
    seqlen_q: usize,
    seqlen_k: usize,
    options: &MaskOptions,
) -> Result<Mask, Error> {
    let job = fill::Job::new(source, seqlen_q, seqlen_k, options.form)?;
    let bytes = u64::try_from(job.bytes()?).unwrap_or(u64::MAX);
    let threshold_bytes = options.threshold_bytes(device.info());
    let placement = if bytes <= threshold_bytes { MaskPlacement::Device } else { MaskPlacement::Host };
    debug!(bytes, threshold_bytes, ?placement, "explicit mask");
    let tensor = match placement {
        MaskPlacement::Device if !device.info().id.is_host() => upload_by_slabs(device, &job, options.slab_bytes)?,
        MaskPlacement::Device => in_place(device, &job)?,
        MaskPlacement::Host => in_place(&Device::cpu()?, &job)?,
    };
    Ok(Mask { tensor, form: options.form, placement })
}

/// In memory that the host reads: nothing beside the mask.
fn in_place(host: &Device, job: &fill::Job<'_>) -> Result<Tensor, Error> {
    let mut tensor = host.zeros(job.dtype(), &job.shape())?;
    job.fill(0..job.lines(), tensor.host_bytes_mut().unwrap_or_default())?;
    Ok(tensor)
}

/// In the device's memory, a slab of lines at a time: filled on the host, uploaded, copied to its place.
fn upload_by_slabs(device: &Device, job: &fill::Job<'_>, slab_bytes: usize) -> Result<Tensor, Error> {
    let (dtype, width, lines) = (job.dtype(), job.width(), job.lines());
    let slab_lines = (slab_bytes / (width * dtype.size_bytes())).clamp(1, lines);
    let mut tensor = device.zeros(dtype, &[lines, width])?;
    let mut on_host = Tensor::zeros(dtype, &[slab_lines, width])?;
    let stream = device.stream()?;
    let mut on_device = device.alloc(&stream, slab_lines * width * dtype.size_bytes())?;
    for first in (0..lines).step_by(slab_lines) {
        let part = first..lines.min(first + slab_lines);
        let bytes = on_host.host_bytes_mut().unwrap_or_default();
        let filled = bytes.get_mut(..part.len() * width * dtype.size_bytes()).unwrap_or_default();
        job.fill(part.clone(), filled)?;
        device.upload(&stream, filled, &mut on_device)?;
        device.synchronize(&stream)?;
        let slab = Tensor::new(on_device, dtype, Layout::contiguous(&[part.len(), width])?)?;
        relayout(device, slab.view(), tensor.view_mut().slice(0, part, 1)?)?;
        on_device = slab.into_storage();
    }
    Ok(Tensor::new(tensor.into_storage(), dtype, Layout::contiguous(&job.shape())?)?)
}

#[cfg(test)]
mod tests;
