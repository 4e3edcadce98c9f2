//! The entries of a mask, line by line: what is written, by all threads.

use std::ops::Range;

use half::{bf16, f16};
use rayon::prelude::*;

use super::{KEYS_PER_WORD, MaskForm, MaskSource};
use crate::{DType, Element, Error, ProblemError, StructuralMask};

/// Lines one thread takes at a time, and queries of a closure's tile.
const TILE_QUERIES: usize = 64;

/// Keys of a closure's tile; whole words of the packed form.
const TILE_KEYS: usize = 1024;

/// The tensor in the names of errors.
const MASK: &str = "mask";

/// [`super::KeepTile`] and [`super::AddTile`].
type Tile<'a, C> = dyn Fn(Range<usize>, Range<usize>, &mut [C]) + Sync + 'a;

/// A mask that can be built. Its entries stand in lines of one query each; there is one block of queries for each head.
#[derive(Debug)]
pub(super) struct Job<'a> {
    source: MaskSource<'a>,
    form: MaskForm,
    heads: usize,
    seqlen_q: usize,
    seqlen_k: usize,
}

/// What a descriptor says, for the lines of one mask.
#[derive(Clone, Copy)]
struct Structure<'a> {
    mask: &'a StructuralMask,
    segments: Option<(&'a [i32], &'a [i32])>,
}

impl<'a> Job<'a> {
    /// Checks that the source can be said in the form.
    ///
    /// # Errors
    /// As [`super::build_mask`].
    pub(super) fn new(
        source: MaskSource<'a>,
        seqlen_q: usize,
        seqlen_k: usize,
        form: MaskForm,
    ) -> Result<Self, ProblemError> {
        for (dimension, size) in [("seqlen_q", seqlen_q), ("seqlen_k", seqlen_k)] {
            if size == 0 {
                return Err(ProblemError::ZeroSize { tensor: MASK, dimension });
            }
        }
        let numbers = match form {
            MaskForm::Additive(dtype) if !dtype.is_float() => {
                let expected = "f32, f16 or bf16".to_owned();
                return Err(ProblemError::UnsupportedDType { tensor: MASK, expected, got: dtype });
            }
            MaskForm::Additive(dtype) => Some(dtype),
            MaskForm::Bool | MaskForm::BitPacked => None,
        };
        let mut heads = 1;
        match source {
            MaskSource::Structural { mask, segments } => {
                check_segments(segments, seqlen_q, seqlen_k)?;
                if let Some(slopes) = &mask.alibi_slopes {
                    check_slopes(mask, slopes, numbers, seqlen_q, seqlen_k)?;
                    heads = slopes.len();
                }
            }
            MaskSource::Add(_) if numbers.is_none() => {
                return Err(ProblemError::Unexpected { tensor: "MaskSource::Add", reason: NO_NUMBERS });
            }
            MaskSource::Keep(_) | MaskSource::Add(_) => {}
        }
        Ok(Self { source, form, heads, seqlen_q, seqlen_k })
    }

    /// Type of an entry.
    pub(super) fn dtype(&self) -> DType {
        match self.form {
            MaskForm::Bool => DType::Bool,
            MaskForm::Additive(dtype) => dtype,
            MaskForm::BitPacked => DType::I32,
        }
    }

    /// Entries of a line.
    pub(super) fn width(&self) -> usize {
        match self.form {
            MaskForm::BitPacked => self.seqlen_k.div_ceil(KEYS_PER_WORD),
            MaskForm::Bool | MaskForm::Additive(_) => self.seqlen_k,
        }
    }

    /// Lines of all heads; [`Job::bytes`] says whether there can be so many.
    pub(super) fn lines(&self) -> usize {
        self.heads.saturating_mul(self.seqlen_q)
    }

    /// The shape that [`MaskForm`] promises.
    pub(super) fn shape(&self) -> Vec<usize> {
        match self.form {
            MaskForm::Additive(_) => vec![1, 1, self.heads, self.seqlen_q, self.seqlen_k],
            MaskForm::Bool | MaskForm::BitPacked => vec![self.seqlen_q, self.width()],
        }
    }

    /// Size of the whole mask.
    ///
    /// # Errors
    /// [`ProblemError::Overflow`].
    pub(super) fn bytes(&self) -> Result<usize, ProblemError> {
        let entries = self.lines().checked_mul(self.width());
        let bytes = entries.and_then(|entries| entries.checked_mul(self.dtype().size_bytes()));
        let fits = bytes.filter(|&bytes| i64::try_from(bytes).is_ok());
        fits.ok_or(ProblemError::Overflow { tensor: MASK, quantity: "size in bytes" })
    }

    /// Writes some lines: `bytes` holds exactly these.
    pub(super) fn fill(&self, lines: Range<usize>, bytes: &mut [u8]) -> Result<(), Error> {
        let infinity = f64::NEG_INFINITY;
        match self.form {
            MaskForm::Bool => self.entries::<u8>(lines, cast(bytes)?, [1.0, 0.0]),
            MaskForm::Additive(DType::F16) => self.entries::<f16>(lines, cast(bytes)?, [0.0, infinity]),
            MaskForm::Additive(DType::BF16) => self.entries::<bf16>(lines, cast(bytes)?, [0.0, infinity]),
            MaskForm::Additive(_) => self.entries::<f32>(lines, cast(bytes)?, [0.0, infinity]),
            MaskForm::BitPacked => self.words(lines, cast(bytes)?),
        }
        Ok(())
    }

    /// One entry a pair: `kept` or `hidden`, or a number.
    fn entries<T: Element>(&self, lines: Range<usize>, out: &mut [T], values: [f64; 2]) {
        let [kept, hidden] = values.map(T::from_f64);
        let width = self.width();
        self.in_parallel(lines, out, |lines, out| match self.source {
            MaskSource::Structural { mask, segments } => {
                let structure = Structure { mask, segments };
                for (line, out) in lines.zip(out.chunks_mut(width)) {
                    let slope = mask.alibi_slopes.as_ref().map(|slopes| slopes[line / self.seqlen_q]);
                    structure.line(line % self.seqlen_q, slope, out, kept, hidden);
                }
            }
            MaskSource::Keep(closure) => tiles(lines, self.seqlen_k, closure, |row, keys, tile: &[bool]| {
                let out = &mut out[row * width..][keys];
                out.iter_mut().zip(tile).for_each(|(out, &keep)| *out = if keep { kept } else { hidden });
            }),
            MaskSource::Add(closure) => tiles(lines, self.seqlen_k, closure, |row, keys, tile: &[f32]| {
                let out = &mut out[row * width..][keys];
                out.iter_mut().zip(tile).for_each(|(out, &number)| *out = T::from_f64(f64::from(number)));
            }),
        });
    }

    /// One bit a pair.
    fn words(&self, lines: Range<usize>, out: &mut [u32]) {
        let width = self.width();
        self.in_parallel(lines, out, |lines, out| match self.source {
            MaskSource::Structural { mask, segments } => {
                let structure = Structure { mask, segments };
                lines.zip(out.chunks_mut(width)).for_each(|(q, out)| structure.words(q, self.seqlen_k, out));
            }
            MaskSource::Keep(closure) => tiles(lines, self.seqlen_k, closure, |row, keys, tile: &[bool]| {
                let out = &mut out[row * width + keys.start / KEYS_PER_WORD..];
                for (out, keep) in out.iter_mut().zip(tile.chunks(KEYS_PER_WORD)) {
                    *out = keep.iter().rev().fold(0, |word, &keep| word << 1 | u32::from(keep));
                }
            }),
            // `new` refuses numbers in this form.
            MaskSource::Add(_) => {}
        });
    }

    /// Shares lines out over the threads, with the memory of each.
    fn in_parallel<T: Send>(&self, lines: Range<usize>, out: &mut [T], work: impl Fn(Range<usize>, &mut [T]) + Sync) {
        out.par_chunks_mut(TILE_QUERIES * self.width()).enumerate().for_each(|(tile, out)| {
            let first = lines.start + tile * TILE_QUERIES;
            work(first..lines.end.min(first + TILE_QUERIES), out);
        });
    }
}

impl Structure<'_> {
    /// The keys of a query that causal and window let it see.
    ///
    /// Distances grow with the key, so both ends can be searched for; offsets at the ends of their range saturate in the
    /// search as they do in [`StructuralMask::keeps`].
    fn visible(&self, q: usize, seqlen_k: usize) -> Range<usize> {
        let (low, high) = self.mask.visible_distances();
        let first = |after: &dyn Fn(i64) -> bool| {
            let (mut start, mut end) = (0, seqlen_k);
            while start < end {
                let middle = start + (end - start) / 2;
                if after(self.mask.distance(q, middle)) { end = middle } else { start = middle + 1 }
            }
            start
        };
        let start = first(&|distance| distance >= low);
        start..first(&|distance| distance > high).max(start)
    }

    /// Whether segments let a query see a key.
    fn same_segment(&self, q: usize, key: usize) -> bool {
        self.segments.is_none_or(|(queries, keys)| queries[q] == keys[key])
    }

    /// One query, with the numbers of ALiBi where there is a slope.
    fn line<T: Element>(&self, q: usize, slope: Option<f32>, out: &mut [T], kept: T, hidden: T) {
        let visible = self.visible(q, out.len());
        out[..visible.start].fill(hidden);
        out[visible.end..].fill(hidden);
        let seen = &mut out[visible.clone()];
        if slope.is_none() && self.segments.is_none() {
            return seen.fill(kept);
        }
        for (key, out) in visible.zip(seen) {
            *out = match slope {
                _ if !self.same_segment(q, key) => hidden,
                None => kept,
                Some(slope) => T::from_f64(alibi(slope, self.mask.distance(q, key).unsigned_abs())),
            };
        }
    }

    /// One query, a bit a key.
    fn words(&self, q: usize, seqlen_k: usize, out: &mut [u32]) {
        let visible = self.visible(q, seqlen_k);
        for (index, out) in out.iter_mut().enumerate() {
            let keys = index * KEYS_PER_WORD..(index + 1) * KEYS_PER_WORD;
            let seen = visible.start.clamp(keys.start, keys.end)..visible.end.clamp(keys.start, keys.end);
            *out = match self.segments {
                None => below(seen.end - keys.start) & !below(seen.start - keys.start),
                Some(_) => {
                    let bit = |key: usize| u32::from(self.same_segment(q, key)) << (key - keys.start);
                    seen.map(bit).fold(0, |word, bit| word | bit)
                }
            };
        }
    }
}

/// A word whose lowest `bits` bits are set.
fn below(bits: usize) -> u32 {
    u32::try_from((1_u64 << bits) - 1).unwrap_or(u32::MAX)
}

/// Calls a closure for one tile of keys after the other, and hands on each row of what it wrote.
fn tiles<C: Copy + Default>(
    queries: Range<usize>,
    seqlen_k: usize,
    closure: &Tile<'_, C>,
    mut write: impl FnMut(usize, Range<usize>, &[C]),
) {
    let mut memory = vec![C::default(); queries.len() * seqlen_k.min(TILE_KEYS)];
    for first in (0..seqlen_k).step_by(TILE_KEYS) {
        let keys = first..seqlen_k.min(first + TILE_KEYS);
        let tile = &mut memory[..queries.len() * keys.len()];
        tile.fill(C::default());
        closure(queries.clone(), keys.clone(), tile);
        for (row, tile) in tile.chunks(keys.len()).enumerate() {
            write(row, keys.clone(), tile);
        }
    }
}

/// What a logit gets: docs/mathematics.md, equation (1).
fn alibi(slope: f32, distance: u64) -> f64 {
    -f64::from(slope) * as_f64(distance)
}

#[allow(clippy::cast_precision_loss, reason = "distances beyond 2^53 are rounded")]
fn as_f64(distance: u64) -> f64 {
    distance as f64
}

fn cast<T: bytemuck::Pod>(bytes: &mut [u8]) -> Result<&mut [T], ProblemError> {
    let (address, expected) = (bytes.as_ptr().addr(), align_of::<T>());
    let misaligned = ProblemError::Misaligned { tensor: MASK, expected, got: address % expected };
    bytemuck::try_cast_slice_mut(bytes).map_err(|_| misaligned)
}

const NO_NUMBERS: &str = "this form says only whether a key is seen; ask for MaskForm::Additive";

fn check_segments(segments: Option<(&[i32], &[i32])>, seqlen_q: usize, seqlen_k: usize) -> Result<(), ProblemError> {
    let Some((queries, keys)) = segments else { return Ok(()) };
    let lists = [("q_segments", queries.len(), seqlen_q, "seqlen_q"), ("k_segments", keys.len(), seqlen_k, "seqlen_k")];
    for (list, got, expected, name) in lists {
        if got != expected {
            return Err(ProblemError::Length { list, expected: format!("{expected} ({name})"), got });
        }
    }
    Ok(())
}

/// That every slope is a number, and that no key which is seen gets an infinity.
fn check_slopes(
    mask: &StructuralMask,
    slopes: &[f32],
    numbers: Option<DType>,
    seqlen_q: usize,
    seqlen_k: usize,
) -> Result<(), ProblemError> {
    let list = "alibi_slopes";
    let Some(dtype) = numbers else { return Err(ProblemError::Unexpected { tensor: list, reason: NO_NUMBERS }) };
    if slopes.is_empty() {
        return Err(ProblemError::Length { list, expected: "one per head".into(), got: 0 });
    }
    let (low, high) = mask.visible_distances();
    let ends = [mask.distance(seqlen_q - 1, 0).max(low), mask.distance(0, seqlen_k - 1).min(high)];
    let sees_keys = ends[0] <= ends[1];
    let farthest = ends.map(i64::unsigned_abs).into_iter().max().filter(|_| sees_keys).unwrap_or(0);
    for (index, &slope) in slopes.iter().enumerate() {
        let number = alibi(slope, farthest);
        let rounded = match dtype {
            DType::F16 => <f16 as Element>::from_f64(number).to_f64(),
            DType::BF16 => <bf16 as Element>::from_f64(number).to_f64(),
            _ => <f32 as Element>::from_f64(number).into(),
        };
        if !slope.is_finite() || !rounded.is_finite() {
            let expected = format!("a slope that gives a finite {dtype} at distance {farthest}");
            return Err(ProblemError::Value { list, index, expected, got: slope.to_string() });
        }
    }
    Ok(())
}
