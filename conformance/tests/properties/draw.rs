//! Drawing a problem: sizes, features, fills and places, each of which shrinks towards small and plain.

use proptest::prelude::*;
use tilefold_conformance::case::{Case, DTYPES, MaskPattern, Place, Places, Poison, SegmentPattern, Values};
use tilefold_core::{AttentionSpec, BiasSpec, DType, EmptyRows, Window};

/// Lengths of problems with a head dimension above this are cut to it, so that each problem takes milliseconds.
const WIDE: usize = 48;

/// What a random problem is made of.
#[derive(Clone, Debug)]
pub(crate) struct Draw {
    /// Which device runs it, modulo their number.
    pub(crate) device: usize,
    dtype: usize,
    outer: (usize, usize),
    lengths: (usize, usize),
    heads: (usize, usize),
    dims: (usize, usize),
    /// Axes, whether in f32, fill.
    biases: Vec<(u32, bool, u8)>,
    /// Two bits each.
    features: u64,
    gradients: u32,
    scale: usize,
    magnitude: usize,
    window: (Option<u64>, Option<u64>),
    offsets: (i64, i64),
    kv_lengths: Vec<usize>,
    /// How many lengths there are: one, one a batch, one a row.
    lengths_of: usize,
    /// Axes with sizes of their own, of key mask and segments.
    own_axes: (u32, u32),
    patterns: (usize, usize),
    places: [usize; 8],
    repeated: [usize; 5],
    seed: u64,
}

pub(crate) fn draw() -> impl Strategy<Value = Draw> {
    let head_dim = || prop_oneof![8 => 1..=40_usize, 1 => 41..=256_usize];
    let sizes = (
        (0..6_usize, 0..3_usize),
        (1..=2_usize, 1..=4_usize),
        (1..=90_usize, 1..=150_usize),
        (1..=3_usize, 1..=3_usize),
        (head_dim(), head_dim()),
    );
    let biases = prop::collection::vec((0..32_u32, any::<bool>(), 0..7_u8), 0..=4);
    let masks = (
        (prop::option::of(0..60_u64), prop::option::of(0..60_u64)),
        prop_oneof![4 => (-40..40_i64, -40..40_i64), 1 => (Just(1 << 40), (1 << 40) - 30..(1 << 40) + 30_i64)],
        prop::collection::vec(0..=150_usize, 8),
        0..3_usize,
        (0..8_u32, 0..8_u32),
        (0..9_usize, 0..8_usize),
    );
    let fills = (any::<u64>(), any::<u32>(), 0..12_usize, 0..16_usize);
    let places = (prop::array::uniform8(0..6_usize), prop::array::uniform5(0..16_usize), any::<u64>());
    (sizes, biases, masks, fills, places).prop_map(|(sizes, biases, masks, fills, places)| {
        let ((device, dtype), outer, lengths, heads, dims) = sizes;
        let (window, offsets, kv_lengths, lengths_of, own_axes, patterns) = masks;
        let (features, gradients, scale, magnitude) = fills;
        let (places, repeated, seed) = places;
        Draw {
            device,
            dtype,
            outer,
            lengths,
            heads,
            dims,
            biases,
            features,
            gradients,
            scale,
            magnitude,
            window,
            offsets,
            kv_lengths,
            lengths_of,
            own_axes,
            patterns,
            places,
            repeated,
            seed,
        }
    })
}

fn bits(number: u32) -> [bool; 3] {
    [0, 1, 2].map(|bit| number >> bit & 1 == 1)
}

impl Draw {
    /// One problem in four, so that plain ones occur too.
    fn has(&self, feature: u32) -> bool {
        self.features >> (2 * feature) & 3 == 3
    }

    pub(crate) fn case(&self) -> Case {
        let mut spec = AttentionSpec::new(DTYPES[self.dtype], self.outer.0, self.outer.1, 1, 1, self.dims.0);
        spec.head_dim_v = if self.has(0) { self.dims.1 } else { self.dims.0 };
        let longest = if spec.head_dim.max(spec.head_dim_v) > WIDE { WIDE } else { usize::MAX };
        (spec.seqlen_q, spec.seqlen_k) = (self.lengths.0.min(longest), self.lengths.1.min(longest));
        (spec.heads, spec.kv_heads) = (self.heads.0 * self.heads.1, self.heads.0);
        spec.softmax_scale = [0.0, -0.3, 1e-4, 1.0, 3.0].get(self.scale).copied();
        self.mask(&mut spec);
        (spec.gate, spec.key_mask, spec.segments) = (self.has(1), self.has(2), self.has(3));
        spec.empty_rows = if self.features >> 63 == 1 { EmptyRows::Uniform } else { EmptyRows::Zero };
        let full = [spec.batch, spec.rows, spec.heads, spec.seqlen_q, spec.seqlen_k];
        for &(axes, single, _) in &self.biases {
            let shape = std::array::from_fn(|axis| if axes >> axis & 1 == 1 { full[axis] } else { 1 });
            spec.biases.push(BiasSpec { shape, dtype: if single { DType::F32 } else { spec.dtype } });
        }
        let asked = |bit: u32| self.gradients >> bit & 1 == 1;
        (spec.gradients.q, spec.gradients.k, spec.gradients.v) = (asked(0), asked(1), asked(2));
        spec.gradients.gate = spec.gate && asked(3);
        spec.gradients.biases = std::array::from_fn(|i| i < spec.biases.len() && self.gradients >> (4 + i) & 1 == 1);
        let mut case = Case::new("random", format!("{self:?}"), spec);
        case.seed = self.seed;
        self.fill(&mut case);
        self.poison(&mut case);
        self.place(&mut case);
        case
    }

    fn mask(&self, spec: &mut AttentionSpec) {
        spec.mask.causal = self.has(4);
        spec.mask.window = self.has(5).then_some(Window { left: self.window.0, right: self.window.1 });
        spec.mask.alibi_slopes =
            self.has(6).then(|| (0_u8..).take(spec.heads).map(|h| 0.5 / f32::from(h + 1)).collect());
        if self.has(7) {
            (spec.mask.q_offset, spec.mask.k_offset) = self.offsets;
        }
        let lengths = self.kv_lengths.iter().map(|&length| i64::try_from(length.min(spec.seqlen_k)).unwrap());
        let count = [1, spec.batch, spec.batch * spec.rows][self.lengths_of];
        spec.kv_lengths = self.has(8).then(|| lengths.take(count).collect());
    }

    fn fill(&self, case: &mut Case) {
        let inf = f64::NEG_INFINITY;
        let fills = [
            Values::Normal(1.0),
            Values::Masking { value: inf, share: 0.3 },
            Values::Masking { value: -1e4, share: 0.3 },
            Values::Masking { value: -1e9, share: 0.3 },
            Values::Leading { value: inf, count: 40 },
            Values::EverySecondRow { value: inf },
            Values::Normal(10.0),
        ];
        let fill = &mut case.fill;
        fill.biases = self.biases.iter().map(|&(_, _, fill)| fills[usize::from(fill)]).collect();
        // Together with wide biases larger values would bring back what underflows.
        let (tiny, large) = if case.spec.dtype == DType::F16 { (1e-3, 30.0) } else { (1e-12, 1e3) };
        // Deviations of q and k, of v, and of d_out.
        let deviations = [
            (4.0, 1.0, 1.0),
            (0.1, 1.0, 1.0),
            (1.0, large, 1.0),
            (1.0, 1.0, large),
            (tiny, 1.0, 1.0),
            (1.0, tiny, 1.0),
            (1.0, 1.0, tiny),
            (1.0, 1.0, 0.0),
        ];
        if let Some(&(q, v, d_out)) = deviations.get(self.magnitude) {
            (fill.q, fill.k) = (Values::Normal(q), Values::Normal(q));
            (fill.v, fill.d_out) = (Values::Normal(v), Values::Normal(d_out));
        }
        let masks = [
            MaskPattern::Random(0.6),
            MaskPattern::EverySecondRow,
            MaskPattern::Nothing,
            MaskPattern::From(40),
            MaskPattern::Until(5),
            MaskPattern::Without(10, 70),
        ];
        fill.key_mask = masks.get(self.patterns.0).copied().unwrap_or(masks[0]);
        fill.key_mask_axes = bits(self.own_axes.0);
        let segments = [
            SegmentPattern::Blocks(17),
            SegmentPattern::Blocks(2),
            SegmentPattern::Random(3),
            SegmentPattern::Disjoint,
        ];
        fill.segments = segments.get(self.patterns.1).copied().unwrap_or(segments[0]);
        fill.segment_axes = bits(self.own_axes.1);
    }

    /// NaN where the contract says that it does not matter: what excluded keys hold, except v under `Uniform`.
    fn poison(&self, case: &mut Case) {
        let s = &case.spec;
        let (masked, rows) = (s.key_mask || s.kv_lengths.is_some(), &mut case.fill.key_mask_axes);
        let keys = s.biases.first().is_some_and(|bias| bias.shape[4] == s.seqlen_k);
        if self.has(9) && s.key_mask && keys {
            // The poison of a bias is made for masks that are the same in every row.
            *rows = [false, false, true];
            case.poison = Poison::BiasOfExcludedKeys;
        } else if self.has(9) && masked && s.empty_rows == EmptyRows::Zero {
            case.poison = Poison::ExcludedKeys;
        }
    }

    fn place(&self, case: &mut Case) {
        let place = |i: usize| -> Place {
            let ordered = |order: [usize; 5]| Place { order: order.to_vec(), ..Place::default() };
            match self.places[i] {
                1 => ordered([0, 1, 3, 2, 4]),
                2 => ordered([0, 2, 1, 3, 4]),
                3 => Place { gap: 3, skip: 1, ..Place::default() },
                4 => Place { reversed: vec![2, 3], ..ordered([4, 1, 0, 3, 2]) },
                5 => Place { gap: 1, reversed: vec![4], ..Place::default() },
                _ => Place::default(),
            }
        };
        // Inputs may have strides of 0; equal channels of q and k have equal rounding errors, which no estimate foresees.
        let repeated = |i: usize| -> Vec<usize> {
            let axes: [&[usize]; 6] = [&[1], &[3], &[0, 2], &[2], &[4], &[0, 1, 2, 3, 4]];
            let count = if i < 2 { 4 } else { axes.len() };
            axes[..count].get(self.repeated[i]).map(|axes| axes.to_vec()).unwrap_or_default()
        };
        let input = |i: usize, repeats: usize| Place { repeated: repeated(repeats), ..place(i) };
        let poisoned = case.poison == Poison::ExcludedKeys;
        let keys = if poisoned { place(1) } else { input(1, 1) };
        let bias = if case.poison == Poison::BiasOfExcludedKeys { place(5) } else { input(5, 2) };
        let ranked = |i: usize, order: &[usize]| match self.places[i] {
            1 => Place { order: order.to_vec(), ..Place::default() },
            2 => Place { order: order.to_vec(), gap: 2, reversed: vec![order.len() - 1], ..Place::default() },
            3 => Place { skip: 2, ..Place::default() },
            4 => Place { reversed: vec![0, 1], gap: 1, ..Place::default() },
            _ => Place::default(),
        };
        let masks = ranked(7, &[2, 0, 1]);
        case.places = Places {
            q: input(0, 0),
            k: keys.clone(),
            v: keys,
            gate: input(2, 3),
            out: place(3),
            d_out: input(4, 4),
            lse: ranked(6, &[0, 3, 1, 2]),
            biases: vec![bias; self.biases.len()],
            masks: Place { repeated: repeated(3).into_iter().filter(|&axis| axis < 3).collect(), ..masks },
            gradients: place(2),
            f32_dbiases: self.has(10),
        };
    }
}
