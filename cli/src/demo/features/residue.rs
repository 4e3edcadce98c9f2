//! Residues as classes: what each place of an alignment holds, and how many residues were deleted before it.

use super::super::alignment::{Alignment, GAP};
use super::{FeatureError, nonzero, reserved, values};

/// Classes of a residue: 20 amino acids, unknown, gap, and the mask sign of training, which no input here uses.
pub(super) const RESIDUE_CLASSES: usize = 23;

/// Class of a residue that is no single amino acid.
const UNKNOWN: u8 = 20;

/// Class of a gap.
pub(super) const GAP_CLASS: u8 = 21;

/// Numbers a place's deletions become: whether there are any, and how many.
pub(super) const DELETION_FEATURES: usize = 2;

/// The amino acids in the order of their classes (that of their one-letter codes).
const AMINO_ACIDS: &[u8; 20] = b"ACDEFGHIKLMNPQRSTVWY";

/// Class and deletion count of every place of an alignment, of the alignment's own size or tiled to another.
///
/// *Shapes*: everything is `[n_seq, n_res]`, row-major.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct MsaFeatures {
    n_seq: usize,
    n_res: usize,
    classes: Vec<u8>,
    deletions: Vec<u32>,
}

impl MsaFeatures {
    /// The alignment as it is.
    ///
    /// # Errors
    ///
    /// [`FeatureError::TooLarge`] if it has more places than this program works on, [`FeatureError::NoMemory`].
    pub(crate) fn new(alignment: &Alignment) -> Result<Self, FeatureError> {
        Self::tiled(alignment, alignment.n_seq(), alignment.n_columns())
    }

    /// The alignment cropped, or repeated cyclically along both axes, to `n_seq` x `n_res`.
    ///
    /// Repeats keep real residues next to real residues, which random filling would not.
    ///
    /// # Errors
    ///
    /// [`FeatureError::Zero`] for a size of 0, [`FeatureError::TooLarge`] for one beyond what this program works on,
    /// [`FeatureError::NoMemory`].
    pub(crate) fn tiled(alignment: &Alignment, n_seq: usize, n_res: usize) -> Result<Self, FeatureError> {
        nonzero(&[("number of sequences", n_seq), ("number of residues", n_res)])?;
        let places = values("alignment", &[n_seq, n_res])?;
        let (mut classes, mut deletions) = (reserved("residue classes", places)?, reserved("deletions", places)?);
        let rows = alignment.rows().iter().zip(alignment.deletions());
        for (row, row_deletions) in rows.cycle().take(n_seq) {
            classes.extend(row.iter().map(|&symbol| class(symbol)).cycle().take(n_res));
            deletions.extend(row_deletions.iter().copied().cycle().take(n_res));
        }
        Ok(Self { n_seq, n_res, classes, deletions })
    }

    /// Number of sequences, at least 1.
    pub(crate) fn n_seq(&self) -> usize {
        self.n_seq
    }

    /// Number of residues, at least 1.
    pub(crate) fn n_res(&self) -> usize {
        self.n_res
    }

    /// `[n_seq, n_res]`: true where there is a residue, false at gaps.
    pub(crate) fn mask(&self) -> Vec<bool> {
        self.classes.iter().map(|&class| class != GAP_CLASS).collect()
    }

    /// `[n_res, n_res]`: true where both columns hold a residue in some sequence.
    pub(crate) fn pair_mask(&self) -> Vec<bool> {
        let mut occupied = vec![false; self.n_res];
        for row in self.classes.chunks_exact(self.n_res) {
            for (occupied, &class) in occupied.iter_mut().zip(row) {
                *occupied |= class != GAP_CLASS;
            }
        }
        occupied.iter().flat_map(|&first| occupied.iter().map(move |&second| first && second)).collect()
    }

    /// Classes, `[n_seq, n_res]`.
    pub(super) fn classes(&self) -> &[u8] {
        &self.classes
    }

    /// Deletion counts, `[n_seq, n_res]`.
    pub(super) fn deletions(&self) -> &[u32] {
        &self.deletions
    }

    /// Classes of the target: the first sequence.
    pub(super) fn target(&self) -> &[u8] {
        &self.classes[..self.n_res]
    }
}

/// The class of an alignment's symbol. As in AlphaFold, `B` (Asx) reads as Asp, `Z` (Glx) as Glu, `U` (Sec) as Cys;
/// other letters are unknown.
pub(super) fn class(symbol: u8) -> u8 {
    let amino_acid = match symbol {
        GAP => return GAP_CLASS,
        b'B' => b'D',
        b'Z' => b'E',
        b'U' => b'C',
        other => other,
    };
    let place = AMINO_ACIDS.iter().position(|&known| known == amino_acid);
    place.and_then(|place| u8::try_from(place).ok()).unwrap_or(UNKNOWN)
}

/// `has_deletion` and `deletion_value` of a deletion count: `min(d, 1)` and `2 / pi * atan(d / 3)`.
pub(super) fn deletion_features(count: u32) -> [f32; DELETION_FEATURES] {
    // Beyond 65,535 the arctangent no longer changes in f32.
    let count = f32::from(u16::try_from(count).unwrap_or(u16::MAX));
    [count.min(1.0), std::f32::consts::FRAC_2_PI * (count / 3.0).atan()]
}
