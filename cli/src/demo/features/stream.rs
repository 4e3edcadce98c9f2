//! Which numbers of a seed a set of weights takes, so that no set depends on which others were drawn before it.

pub(super) const MSA_RESIDUE: u64 = 1;
pub(super) const MSA_DELETION: u64 = 2;
pub(super) const MSA_TARGET: u64 = 3;
pub(super) const PAIR_TARGET_LEFT: u64 = 4;
pub(super) const PAIR_TARGET_RIGHT: u64 = 5;
pub(super) const RELATIVE_POSITION: u64 = 6;
pub(super) const OUTER_LEFT: u64 = 7;
pub(super) const OUTER_RIGHT: u64 = 8;
pub(super) const OUTER_OUT: u64 = 9;

// First streams of the attentions, to which the place of a set of weights is added.
pub(super) const MSA_ROW: u64 = 100;
pub(super) const MSA_COLUMN: u64 = 110;
pub(super) const TRIANGLE_STARTING: u64 = 120;
pub(super) const TRIANGLE_ENDING: u64 = 130;
pub(super) const EXTRA_MSA: u64 = 140;

// Places of an attention's weights.
pub(super) const Q: u64 = 0;
pub(super) const K: u64 = 1;
pub(super) const V: u64 = 2;
pub(super) const GATE: u64 = 3;
pub(super) const BIAS: u64 = 4;
pub(super) const D_OUT: u64 = 5;

/// First of the extra MSA's streams for `d_out`, one a row.
pub(super) const EXTRA_MSA_D_OUT: u64 = 1 << 32;
