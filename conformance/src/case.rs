//! One case as plain data: a problem, what its inputs hold, and where its operands lie.

use tilefold_core::{AttentionSpec, DType};

/// A case of the table.
#[derive(Clone, Debug)]
pub struct Case {
    /// The feature it is about; results are summed up by group.
    pub group: &'static str,
    /// What is special about it, unique in its group.
    pub name: String,
    /// Sizes, options, gradients.
    pub spec: AttentionSpec,
    /// What the inputs hold.
    pub fill: Fill,
    /// Where the operands lie in memory.
    pub places: Places,
    /// The logits of every row are one number, so that their rounding is common to all keys and cancels: the tolerance
    /// then allows nothing for it.
    pub common_logits: bool,
    /// NaN among the inputs.
    pub poison: Poison,
    /// Seed of the inputs.
    pub seed: u64,
}

/// NaN among the inputs.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Poison {
    /// None.
    #[default]
    Nothing,
    /// k and v of the keys that key mask or `kv_lengths` exclude: padding nobody initialised, which may not matter.
    ExcludedKeys,
    /// One query: its results are NaN, those of other queries are not.
    OneQuery,
    /// One key: the queries that see it are NaN.
    OneKey,
    /// The first bias, the same for all rows, at keys whose mask is false in the first row (and so in all).
    BiasOfExcludedKeys,
}

impl Case {
    /// A case with normally distributed inputs in dense tensors, seeded by its name.
    #[must_use]
    pub fn new(group: &'static str, name: impl Into<String>, spec: AttentionSpec) -> Self {
        let name = name.into();
        let fill = Fill { biases: vec![Values::Normal(1.0); spec.biases.len()], ..Fill::default() };
        let places = Places { biases: vec![Place::default(); spec.biases.len()], ..Places::default() };
        let seed = seed(group, &name);
        Self { group, name, spec, fill, places, common_logits: false, poison: Poison::Nothing, seed }
    }

    /// The case's name as results show it.
    #[must_use]
    pub fn title(&self) -> String {
        format!("{}/{}/{}", self.spec.precision(), self.group, self.name)
    }

    /// Tiles of 64 queries by 64 keys, padded ones whole: the work of a device whose kernels are interpreted.
    #[must_use]
    pub fn tiles(&self) -> usize {
        let s = &self.spec;
        let tiles = [s.batch, s.rows, s.heads, s.seqlen_q.div_ceil(64), s.seqlen_k.div_ceil(64)];
        tiles.into_iter().fold(1, usize::saturating_mul)
    }
}

/// FNV-1a over the name: a case keeps its inputs when others are added to the table.
fn seed(group: &str, name: &str) -> u64 {
    let bytes = group.bytes().chain([b'/']).chain(name.bytes());
    bytes.fold(0xcbf2_9ce4_8422_2325, |hash, byte| (hash ^ u64::from(byte)).wrapping_mul(0x100_0000_01b3))
}

/// Values of one floating-point operand.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Values {
    /// Normal with mean 0 and this standard deviation.
    Normal(f64),
    /// One number everywhere.
    Constant(f64),
    /// This number or its negative, at random.
    Signs(f64),
    /// `value` for a random `share` of the elements, 0 for the rest: a mask written as a bias.
    Masking {
        /// The number, such as -1e9 or -inf.
        value: f64,
        /// Share of elements that get it.
        share: f64,
    },
    /// `value` along the first `count` entries of the last axis, normal after them.
    Leading {
        /// The number, such as -inf.
        value: f64,
        /// Entries that get it.
        count: usize,
    },
    /// `value` for every second entry of the axis before the last (queries of a bias), normal between them.
    EverySecondRow {
        /// The number.
        value: f64,
    },
}

/// Which entries of a key mask are true.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum MaskPattern {
    /// A random share.
    Random(f64),
    /// None: every row is empty.
    Nothing,
    /// All, except that every second batch or row keeps nothing.
    EverySecondRow,
    /// Nothing below this key: the first tiles are empty.
    From(usize),
    /// Nothing from this key on: the last tiles are padding.
    Until(usize),
    /// All but this range: a tile in the middle is empty.
    Without(usize, usize),
}

/// How segment ids run along a sequence.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum SegmentPattern {
    /// Blocks of this many positions: sequences packed one after another.
    Blocks(usize),
    /// One of this many ids for each position, at random.
    Random(i32),
    /// No query shares an id with any key.
    Disjoint,
}

/// Inputs of a case.
#[derive(Clone, Debug)]
pub struct Fill {
    /// Queries.
    pub q: Values,
    /// Keys.
    pub k: Values,
    /// Values.
    pub v: Values,
    /// Gate before the sigmoid.
    pub gate: Values,
    /// Gradient of the output.
    pub d_out: Values,
    /// One for each bias.
    pub biases: Vec<Values>,
    /// Key mask, where the problem has one.
    pub key_mask: MaskPattern,
    /// Axes of the key mask with a size of their own (batch, rows, keys); the others have size 1.
    pub key_mask_axes: [bool; 3],
    /// Segments, where the problem has them.
    pub segments: SegmentPattern,
    /// As `key_mask_axes`, for both segment operands.
    pub segment_axes: [bool; 3],
}

impl Default for Fill {
    fn default() -> Self {
        let normal = Values::Normal(1.0);
        Self {
            q: normal,
            k: normal,
            v: normal,
            gate: normal,
            d_out: normal,
            biases: Vec::new(),
            key_mask: MaskPattern::Random(0.7),
            key_mask_axes: [true; 3],
            segments: SegmentPattern::Blocks(7),
            segment_axes: [true; 3],
        }
    }
}

/// Where one operand lies in its buffer.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Place {
    /// Axes from the outermost to the innermost in memory; empty for the logical order.
    pub order: Vec<usize>,
    /// Unused elements after each run of an axis: the operand is a slice of something larger.
    pub gap: usize,
    /// Elements from one entry of the innermost axis to the next, less one.
    pub skip: usize,
    /// Axes that run backwards (negative strides).
    pub reversed: Vec<usize>,
    /// Axes with stride 0; inputs only, their values are repeated.
    pub repeated: Vec<usize>,
}

/// Where every operand lies.
#[derive(Clone, Debug, Default)]
pub struct Places {
    /// Queries.
    pub q: Place,
    /// Keys.
    pub k: Place,
    /// Values.
    pub v: Place,
    /// Gate.
    pub gate: Place,
    /// Output.
    pub out: Place,
    /// Gradient of the output.
    pub d_out: Place,
    /// lse and lse_low.
    pub lse: Place,
    /// One for each bias; its gradient lies likewise, without repeated axes.
    pub biases: Vec<Place>,
    /// Key mask and segments.
    pub masks: Place,
    /// Gradients of q, k, v and gate.
    pub gradients: Place,
    /// Bias gradients in f32, whatever the bias's dtype.
    pub f32_dbiases: bool,
}

/// The three dtypes every case is run in.
pub const DTYPES: [DType; 3] = [DType::F32, DType::F16, DType::BF16];
