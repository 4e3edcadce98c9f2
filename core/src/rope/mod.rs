//! Rotary position embedding: pairs of channels turned by an angle that grows with the position.
//!
//! Su, Lu, Pan, Murtadha, Wen & Liu 2021, *RoFormer*, arXiv 2104.09864; docs/mathematics.md, equations (19)-(21).

pub mod reference;
mod turns;

use crate::{DType, DeviceId, MAX_HEAD_DIM, ProblemError, TensorView, TensorViewMut};

pub use turns::RopeAngle;

/// Bases and scales of positions that angles are exact for.
const BASES: [f64; 2] = [1.0, 1e12];
const SCALES: [f64; 2] = [1e-6, 1e6];

/// Which two channels are a pair.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum RopePairs {
    /// Channels 2i and 2i + 1: RoFormer, GPT-J, the original LLaMA.
    Interleaved,
    /// Channels i and i + rotary_dim / 2: GPT-NeoX, and what Hugging Face stores.
    Halves,
}

/// A rotation: pair i of position p turns by `p · base^(-2i / rotary_dim) / position_scale`, an angle in radians.
///
/// *Numerics*: the angle is right to 2⁻³² of a turn whatever the position, since it is reduced as an integer; its sine and
/// cosine and the rotation are f32. Before it is rounded once to the dtype, a result is within 2.5 · 2⁻²³ of the length
/// of its pair. Equal inputs give equal bits on one device; devices differ in the last bits.
#[derive(Clone, Debug, PartialEq)]
pub struct RopeSpec {
    /// Channels that are turned, the first ones of a head: even, at least 2, at most head_dim and [`MAX_HEAD_DIM`]. The
    /// others are copied.
    pub rotary_dim: usize,
    /// Which channels are pairs.
    pub pairs: RopePairs,
    /// Base of the geometric sequence of frequencies, 1 to 10¹².
    pub base: f64,
    /// What positions are divided by, 10⁻⁶ to 10⁶: a factor above 1 fits a longer text into the positions of training
    /// (Chen et al. 2023, arXiv 2306.15595).
    pub position_scale: f64,
    /// Position of the first entry of the sequence axis; the others follow. Parts of a sequence that do not lie side by side
    /// are one call each.
    pub offset: i64,
    /// Turns back: the inverse of the rotation, which is its transpose and so the gradient.
    pub inverse: bool,
}

impl RopeSpec {
    /// Rotation of the first `rotary_dim` channels with base 10 000, from position 0.
    #[must_use]
    pub fn new(rotary_dim: usize, pairs: RopePairs) -> Self {
        Self { rotary_dim, pairs, base: 10_000.0, position_scale: 1.0, offset: 0, inverse: false }
    }

    /// The base for texts `factor` times as long without training: `base · factor^(d / (d - 2))` with d = rotary_dim, so
    /// that the slowest pair turns `factor` times slower and the fastest one as before ("NTK-aware" scaling).
    ///
    /// With rotary_dim 2 there is one pair, the fastest: the base is returned as it is.
    ///
    /// ```
    /// use tilefold_core::RopeSpec;
    /// let base = RopeSpec::ntk_base(10_000.0, 4.0, 128);
    /// // The slowest pair has the frequency base^(-126 / 128).
    /// let slower = (10_000_f64 / base).powf(126.0 / 128.0);
    /// assert!((slower - 0.25).abs() < 1e-12);
    /// ```
    #[must_use]
    pub fn ntk_base(base: f64, factor: f64, rotary_dim: usize) -> f64 {
        let channels = f64::from(u32::try_from(rotary_dim).unwrap_or(u32::MAX));
        if rotary_dim <= 2 { base } else { base * factor.powf(channels / (channels - 2.0)) }
    }

    /// Pairs of channels.
    #[must_use]
    pub fn pair_count(&self) -> usize {
        self.rotary_dim / 2
    }

    /// Channels of pair `pair`.
    #[must_use]
    pub fn channels(&self, pair: usize) -> [usize; 2] {
        match self.pairs {
            RopePairs::Interleaved => [2 * pair, 2 * pair + 1],
            RopePairs::Halves => [pair, pair + self.pair_count()],
        }
    }

    /// The angle of each pair, turned back where the rotation is the inverse; of numbers that [`RopeArgs`] accepts.
    #[must_use]
    pub fn angles(&self) -> Vec<RopeAngle> {
        turns::angles(self)
    }

    fn check(&self, head_dim: usize) -> Result<(), ProblemError> {
        if self.rotary_dim == 0 || self.rotary_dim % 2 == 1 || self.rotary_dim > head_dim {
            let expected = format!("an even number from 2 to head_dim = {head_dim}");
            let (parameter, got) = ("rotary_dim", self.rotary_dim.to_string());
            return Err(ProblemError::Parameter { parameter, expected, got });
        }
        if self.rotary_dim > MAX_HEAD_DIM {
            return Err(ProblemError::Limit { what: "rotary_dim", limit: MAX_HEAD_DIM, got: self.rotary_dim });
        }
        for (parameter, value, [least, most]) in
            [("base", self.base, BASES), ("position_scale", self.position_scale, SCALES)]
        {
            if !(least..=most).contains(&value) {
                let expected = format!("a number from {least:e} to {most:e}");
                return Err(ProblemError::Parameter { parameter, expected, got: value.to_string() });
            }
        }
        Ok(())
    }
}

/// A rotation whose tensors fit together.
///
/// *Shapes*: source and destination `[batch, rows, seqlen, heads, head_dim]`, any strides; the source may broadcast, and
/// shares no element with the destination. *dtypes*: both f32, both f16 or both bf16.
#[derive(Debug)]
pub struct RopeArgs<'a> {
    spec: RopeSpec,
    source: TensorView<'a>,
    destination: TensorViewMut<'a>,
}

impl<'a> RopeArgs<'a> {
    /// Checks options, shapes, dtypes, devices and aliasing.
    ///
    /// # Errors
    /// A [`ProblemError`] that names the tensor or the option.
    pub fn new(spec: &RopeSpec, source: TensorView<'a>, destination: TensorViewMut<'a>) -> Result<Self, ProblemError> {
        const AXES: [&str; 5] = ["batch", "rows", "seqlen", "heads", "head_dim"];
        let (tensor, to) = ("destination", destination.as_view());
        if to.device() != source.device() {
            return Err(ProblemError::WrongDevice { tensor, expected: source.device(), got: to.device() });
        }
        if !source.dtype().is_float() {
            let (tensor, expected) = ("source", "f32, f16 or bf16".to_owned());
            return Err(ProblemError::UnsupportedDType { tensor, expected, got: source.dtype() });
        }
        if to.dtype() != source.dtype() {
            let expected = format!("{}, as the source's", source.dtype());
            return Err(ProblemError::UnsupportedDType { tensor, expected, got: to.dtype() });
        }
        for (tensor, view) in [("source", &source), (tensor, to)] {
            if view.shape().len() != AXES.len() {
                return Err(ProblemError::Rank { tensor, expected: AXES.len(), got: view.shape().len() });
            }
        }
        for ((&expected, &got), dimension) in source.shape().iter().zip(to.shape()).zip(AXES) {
            if expected != got {
                return Err(ProblemError::Shape { tensor, dimension, expected, got });
            }
        }
        spec.check(source.shape()[4])?;
        if to.layout().overlaps_itself() {
            return Err(ProblemError::SelfOverlap { tensor, strides: to.layout().strides().to_vec() });
        }
        if to.overlaps(&source) {
            return Err(ProblemError::Overlap { output: tensor, other: "source" });
        }
        Ok(Self { spec: spec.clone(), source, destination })
    }

    /// The device both are on.
    #[must_use]
    pub fn device(&self) -> DeviceId {
        self.source.device()
    }

    /// The dtype of both.
    #[must_use]
    pub fn dtype(&self) -> DType {
        self.source.dtype()
    }

    /// The rotation.
    #[must_use]
    pub fn spec(&self) -> &RopeSpec {
        &self.spec
    }

    /// Source and destination.
    #[must_use]
    pub fn into_parts(self) -> (TensorView<'a>, TensorViewMut<'a>) {
        (self.source, self.destination)
    }
}
