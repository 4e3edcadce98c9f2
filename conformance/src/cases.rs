//! The table of cases: lists, and functions over them.
//!
//! Sizes are small where size is not the point: the oracle takes every logit through f64 loops. Each bug that is found
//! gets a case of its own, named after it.

use tilefold_core::{AttentionSpec, BiasSpec, DType, EmptyRows, Gradients, MAX_BIASES, Precision, Window};

use crate::case::{Case, MaskPattern, Place, Places, Poison, SegmentPattern, Values};

/// Groups of which f32 takes the cases with products of tf32, too: sizes by which plans decide, numbers at their limits.
const WITH_TF32: [&str; 5] = ["extreme", "magnitude", "walks", "everything", "workload"];

/// The cases of f32 that are run with products of tf32 where not all are.
#[must_use]
pub fn chosen_with_tf32() -> Vec<Case> {
    let mut cases = all(Precision::TF32, &[]);
    cases.retain(|case| WITH_TF32.contains(&case.group));
    cases
}

/// Every case in one precision. `tiles` are the tile sizes of the backend under test: lengths around them are added.
#[must_use]
pub fn all(precision: impl Into<Precision>, tiles: &[usize]) -> Vec<Case> {
    let Precision { dtype, products } = precision.into();
    let groups = [
        lengths(dtype, tiles),
        cross_lengths(dtype),
        head_dims(dtype),
        outer_sizes(dtype),
        layouts(dtype),
        bias_patterns(dtype),
        several_biases(dtype),
        extreme_biases(dtype),
        key_masks(dtype),
        key_lengths(dtype),
        structural(dtype),
        windows(dtype),
        segments(dtype),
        grouped_queries(dtype),
        gates(dtype),
        gradient_subsets(dtype),
        magnitudes(dtype),
        nans(dtype),
        walks(dtype),
        everything(dtype),
        workloads(dtype),
    ];
    groups.into_iter().flatten().map(|case| case.with(|c| c.spec.products = products)).collect()
}

/// Batch 1 with every gradient.
fn spec(dtype: DType, rows: usize, seqlen: (usize, usize), heads: usize, head_dim: usize) -> AttentionSpec {
    let mut spec = AttentionSpec::new(dtype, 1, rows, seqlen.0, heads, head_dim);
    spec.seqlen_k = seqlen.1;
    spec.with_all_gradients()
}

impl Case {
    /// Adds a bias with its gradient; `axes` says which of batch, rows, heads, seqlen_q, seqlen_k it varies over.
    fn with_bias(mut self, axes: [bool; 5], dtype: DType, values: Values) -> Self {
        let s = &self.spec;
        let full = [s.batch, s.rows, s.heads, s.seqlen_q, s.seqlen_k];
        let shape = std::array::from_fn(|axis| if axes[axis] { full[axis] } else { 1 });
        let index = self.spec.biases.len();
        self.spec.biases.push(BiasSpec { shape, dtype });
        self.spec.gradients.biases[index] = true;
        self.fill.biases.push(values);
        self.places.biases.push(Place::default());
        self
    }

    /// The pair bias of Evoformer attention: `[batch, 1, heads, seqlen_q, seqlen_k]`.
    fn with_pair_bias(self) -> Self {
        let dtype = self.spec.dtype;
        self.with_bias(PAIR, dtype, Values::Normal(1.0))
    }

    fn with_gate(mut self) -> Self {
        self.spec.gate = true;
        self.spec.gradients.gate = true;
        self
    }

    fn with_key_mask(mut self, pattern: MaskPattern) -> Self {
        self.spec.key_mask = true;
        self.fill.key_mask = pattern;
        self
    }

    fn with_segments(mut self, pattern: SegmentPattern) -> Self {
        self.spec.segments = true;
        self.fill.segments = pattern;
        self
    }

    fn with(mut self, edit: impl FnOnce(&mut Self)) -> Self {
        edit(&mut self);
        self
    }
}

const PAIR: [bool; 5] = [true, false, true, true, true];
const KEY: [bool; 5] = [true, true, false, false, true];
const FULL: [bool; 5] = [true; 5];

fn lengths(dtype: DType, tiles: &[usize]) -> Vec<Case> {
    let around = tiles.iter().flat_map(|&tile| [tile.saturating_sub(1), tile, tile + 1]);
    let mut list: Vec<usize> = [1, 2, 3, 7, 8, 9, 15, 16, 17, 31, 32].into_iter().chain(33..=99).collect();
    list.extend([127, 128, 129, 257, 1000].into_iter().chain(around));
    list.retain(|&length| (1..=1024).contains(&length));
    list.sort_unstable();
    list.dedup();
    let case = |length: usize| {
        let (rows, heads, head_dim) = if length > 200 { (1, 1, 8) } else { (2, 2, 16) };
        Case::new("seqlen", format!("{length}"), spec(dtype, rows, (length, length), heads, head_dim)).with_pair_bias()
    };
    list.into_iter().map(case).collect()
}

fn cross_lengths(dtype: DType) -> Vec<Case> {
    let list = [
        (1, 77),
        (77, 1),
        (1, 1000),
        (1000, 1),
        (2, 300),
        (17, 130),
        (130, 17),
        (64, 65),
        (65, 64),
        (33, 257),
        (257, 33),
        (15, 129),
    ];
    let case = |&(q, k): &(usize, usize)| {
        Case::new("cross", format!("{q}x{k}"), spec(dtype, 2, (q, k), 2, 8))
            .with_pair_bias()
            .with_key_mask(MaskPattern::Random(0.8))
    };
    list.iter().map(case).collect()
}

fn head_dims(dtype: DType) -> Vec<Case> {
    let dims = [1, 2, 3, 4, 5, 7, 8, 12, 16, 17, 24, 31, 32, 33, 40, 48, 64, 65, 80, 96, 128, 160, 192, 255, 256];
    let equal = dims.into_iter().map(|dim| ((37, 41), dim, dim));
    let different = [(32, 16), (16, 32), (8, 64), (16, 1), (1, 16), (48, 33), (5, 256), (256, 5), (24, 40)];
    let different = different.into_iter().map(|(dim, dim_v)| ((35, 50), dim, dim_v));
    // Where the tile depends on the head dimension, lengths around it.
    let tiled =
        [8, 32, 33, 128].into_iter().flat_map(|dim| [63, 64, 65, 129].map(|length| ((length, length), dim, dim)));
    let case = |(seqlen, dim, dim_v): ((usize, usize), usize, usize)| {
        let name = format!("{dim}-{dim_v}/{}x{}", seqlen.0, seqlen.1);
        Case::new("head_dim", name, spec(dtype, 1, seqlen, 2, dim)).with(|c| c.spec.head_dim_v = dim_v).with_pair_bias()
    };
    equal.chain(different).chain(tiled).map(case).collect()
}

fn outer_sizes(dtype: DType) -> Vec<Case> {
    // batch, rows, heads, seqlen, head_dim; the last three exceed 65 535 (batch, row, head) triples
    let list = [
        (1, 1, 1, 20, 8),
        (1, 300, 1, 10, 8),
        (1, 300, 2, 17, 4),
        (3, 2, 5, 21, 8),
        (7, 1, 3, 18, 8),
        (1, 2, 16, 34, 8),
        (1, 1, 65_537, 2, 2),
        (65_600, 1, 1, 2, 4),
        (3, 5600, 4, 2, 4),
    ];
    let case = |&(batch, rows, heads, seqlen, head_dim): &(usize, usize, usize, usize, usize)| {
        let mut spec = spec(dtype, rows, (seqlen, seqlen), heads, head_dim);
        spec.batch = batch;
        Case::new("outer", format!("{batch}x{rows}x{heads}/{seqlen}"), spec).with_pair_bias()
    };
    list.iter().map(case).collect()
}

/// Puts every operand somewhere: `place` is for five axes, the other ranks get what of it makes sense there.
fn everywhere(place: &Place, biases: usize) -> Places {
    let reversed = |rank: usize| place.reversed.iter().copied().filter(|&axis| axis < rank).collect();
    let ranked = |rank| Place { order: Vec::new(), reversed: reversed(rank), repeated: Vec::new(), ..place.clone() };
    Places {
        q: place.clone(),
        k: place.clone(),
        v: place.clone(),
        gate: place.clone(),
        out: place.clone(),
        d_out: place.clone(),
        lse: ranked(4),
        biases: vec![place.clone(); biases],
        masks: ranked(3),
        gradients: place.clone(),
        f32_dbiases: false,
    }
}

fn layouts(dtype: DType) -> Vec<Case> {
    let ordered = |order: [usize; 5]| Place { order: order.to_vec(), ..Place::default() };
    let list = [
        ("heads_first", ordered([0, 1, 3, 2, 4])),
        ("column_wise", ordered([0, 2, 1, 3, 4])),
        ("column_wise_heads_first", ordered([0, 3, 2, 1, 4])),
        ("channels_outside", ordered([4, 0, 1, 2, 3])),
        ("length_innermost", ordered([0, 1, 3, 4, 2])),
        ("rows_innermost", ordered([0, 2, 3, 4, 1])),
        ("batch_innermost", ordered([4, 3, 2, 1, 0])),
        ("sliced", Place { gap: 3, ..Place::default() }),
        ("sliced_heads_first", Place { gap: 1, ..ordered([0, 1, 3, 2, 4]) }),
        ("every_second", Place { skip: 1, ..Place::default() }),
        ("every_fourth_of_a_slice", Place { skip: 3, gap: 5, ..Place::default() }),
        ("backwards", Place { reversed: vec![2], ..Place::default() }),
        ("rows_backwards", Place { reversed: vec![1, 3], gap: 2, ..Place::default() }),
        ("channels_backwards", Place { reversed: vec![4], ..Place::default() }),
        ("all_backwards", Place { reversed: vec![0, 1, 2, 3, 4], ..ordered([0, 2, 3, 1, 4]) }),
    ];
    let base = |name: &str| {
        let mut spec = spec(dtype, 3, (18, 37), 4, 8);
        (spec.batch, spec.kv_heads, spec.head_dim_v) = (2, 2, 9);
        Case::new("layout", name, spec).with_pair_bias().with_bias(KEY, dtype, Values::Normal(1.0)).with_gate()
    };
    let masked = |case: Case| case.with_key_mask(MaskPattern::Random(0.8)).with_segments(SegmentPattern::Random(3));
    let mut cases: Vec<Case> =
        (list.iter()).map(|(name, place)| masked(base(name)).with(|c| c.places = everywhere(place, 2))).collect();
    // Each operand somewhere else.
    cases.push(masked(base("mixed")).with(|c| {
        let place = |i: usize| list[i].1.clone();
        (c.places.q, c.places.k, c.places.v) = (place(0), place(4), place(11));
        (c.places.gate, c.places.out, c.places.d_out) = (place(7), place(1), place(13));
        (c.places.gradients, c.places.biases) = (place(9), vec![place(2), place(11)]);
    }));
    let repeated = [
        ("repeated_rows", vec![1]),
        ("repeated_heads", vec![3]),
        ("repeated_batch_and_length", vec![0, 2]),
        ("repeated_channels", vec![4]),
    ];
    for (name, axes) in repeated {
        cases.push(base(name).with(|c| {
            let place = Place { repeated: axes, ..Place::default() };
            (c.places.q, c.places.k, c.places.v) = (place.clone(), place.clone(), place.clone());
            (c.places.gate, c.places.d_out) = (place.clone(), place.clone());
            c.places.biases = vec![place; 2];
        }));
    }
    cases.push(base("repeated_d_out_of_a_sum").with(|c| {
        // What autograd hands over for `out.sum()`: one number with strides of 0.
        c.places.d_out = Place { repeated: vec![0, 1, 2, 3, 4], ..Place::default() };
    }));
    let whole_tiles = spec(dtype, 3, (18, 256), 2, 8);
    cases.push(Case::new("layout", "bias_of_whole_tiles", whole_tiles).with_pair_bias().with(|c| {
        c.places.biases = vec![ordered([4, 0, 1, 2, 3])];
    }));
    cases.push(masked(base("repeated_masks")).with(|c| c.places.masks.repeated = vec![0, 1]));
    cases
}

fn bias_patterns(dtype: DType) -> Vec<Case> {
    let pattern = |bits: u32| -> [bool; 5] { std::array::from_fn(|axis| bits >> axis & 1 == 1) };
    let name = |bits: u32| -> String {
        "bnhqk".chars().zip(pattern(bits)).map(|(axis, own)| if own { axis } else { '1' }).collect()
    };
    let base = |name: String| {
        let mut spec = spec(dtype, 3, (19, 35), 2, 8);
        spec.batch = 2;
        Case::new("bias", name, spec)
    };
    let normal = Values::Normal(1.0);
    let mut cases: Vec<Case> = (0..32).map(|bits| base(name(bits)).with_bias(pattern(bits), dtype, normal)).collect();
    // The bias's gradient alone, with long sums and with lengths beyond one tile.
    for bits in 0..32 {
        let mut only = spec(dtype, 5, (70, 67), 2, 4);
        only.gradients = Gradients::default();
        cases.push(Case::new("bias", format!("{}_alone", name(bits)), only).with_bias(pattern(bits), dtype, normal));
    }
    if dtype != DType::F32 {
        for bits in 0..32 {
            cases.push(base(format!("{}_f32", name(bits))).with_bias(pattern(bits), DType::F32, normal));
            let case = base(format!("{}_f32_gradient", name(bits))).with_bias(pattern(bits), dtype, normal);
            cases.push(case.with(|c| c.places.f32_dbiases = true));
        }
    }
    cases.push(
        base("expanded".into()).with_bias(FULL, dtype, normal).with(|c| c.places.biases[0].repeated = vec![1, 3]),
    );
    cases
}

fn several_biases(dtype: DType) -> Vec<Case> {
    let sets: [(&str, &[[bool; 5]]); 5] = [
        ("mask_and_pair", &[KEY, PAIR]),
        ("pair_and_mask", &[PAIR, KEY]),
        ("two_pairs", &[PAIR, PAIR]),
        ("four", &[KEY, PAIR, [false, true, false, true, false], [true, true, true, true, true]]),
        ("four_keys", &[KEY, [false, false, false, false, true], [true, false, true, false, true], KEY]),
    ];
    let case = |(name, set): (&str, &[[bool; 5]]), mixed: bool| {
        let mut spec = spec(dtype, 3, (33, 40), 2, 8);
        spec.batch = 2;
        let title = if mixed { format!("{name}_f32_and_own") } else { name.to_owned() };
        set.iter().enumerate().fold(Case::new("biases", title, spec), |case, (i, &axes)| {
            let own = if mixed && i % 2 == 0 { DType::F32 } else { dtype };
            case.with_bias(axes, own, Values::Normal(1.0))
        })
    };
    let mixed = if dtype == DType::F32 { [].iter() } else { sets.iter() };
    sets.iter().map(|&set| case(set, false)).chain(mixed.map(|&set| case(set, true))).collect()
}

/// The most negative finite number, which many programs write into masks.
fn lowest(dtype: DType) -> f64 {
    match dtype {
        DType::F16 => f64::from(half::f16::MIN),
        DType::BF16 => f64::from(half::bf16::MIN),
        _ => f64::from(f32::MIN),
    }
}

fn extreme_biases(dtype: DType) -> Vec<Case> {
    let masking = |value| Values::Masking { value, share: 0.4 };
    let everywhere = Values::Constant;
    let every_second = |value| Values::EverySecondRow { value };
    let leading = |value, count| Values::Leading { value, count };
    let inf = f64::NEG_INFINITY;
    let list = [
        ("-1e9_keys", KEY, masking(-1e9)),
        ("-1e9_pairs", PAIR, masking(-1e9)),
        ("-1e9_rows", PAIR, every_second(-1e9)),
        ("-1e9_first_tiles", PAIR, leading(-1e9, 100)),
        ("-1e9_everywhere", KEY, everywhere(-1e9)),
        ("-1e4_everywhere", KEY, everywhere(-1e4)),
        ("1e9_everywhere", KEY, everywhere(1e9)),
        ("1e9_keys", KEY, masking(1e9)),
        ("-inf_keys", KEY, masking(inf)),
        ("-inf_pairs", PAIR, masking(inf)),
        ("-inf_rows", PAIR, every_second(inf)),
        ("-inf_first_key", PAIR, leading(inf, 1)),
        ("-inf_first_tiles", PAIR, leading(inf, 100)),
        ("-20_first_tile", PAIR, leading(-20.0, 64)),
        ("-100_first_tile", PAIR, leading(-100.0, 70)),
        ("-inf_all_but_one_key", KEY, leading(inf, 139)),
        ("-inf_everywhere", KEY, everywhere(inf)),
        ("3e4_signs", PAIR, Values::Signs(3e4)),
        ("3e4_everywhere", PAIR, everywhere(3e4)),
        ("-3e4_rows", PAIR, every_second(-3e4)),
        ("lowest_pairs", PAIR, masking(lowest(dtype))),
        ("lowest_everywhere", KEY, everywhere(lowest(dtype))),
    ];
    let mut cases = Vec::new();
    for (name, axes, values) in list {
        for empty_rows in [EmptyRows::Zero, EmptyRows::Uniform] {
            // Without an empty row both are the same.
            let empties =
                matches!(name, "-inf_rows" | "-inf_everywhere" | "-inf_pairs" | "-1e9_rows" | "-1e9_everywhere");
            if empty_rows == EmptyRows::Zero || empties {
                let title = format!("{name}/{empty_rows:?}").to_lowercase();
                let case = Case::new("extreme", title, spec(dtype, 2, (21, 140), 2, 8)).with_bias(axes, dtype, values);
                cases.push(case.with(|c| c.spec.empty_rows = empty_rows));
            }
        }
        if dtype != DType::F32 {
            let case = Case::new("extreme", format!("{name}/f32"), spec(dtype, 2, (21, 140), 2, 8));
            cases.push(case.with_bias(axes, DType::F32, values));
        }
    }
    // Rows of one logit: rounding is common to all keys, so probabilities must be 1 / seqlen_k even at -1e9.
    let shared = [("-1e9", -1e9), ("-3e4", -3e4), ("1e9", 1e9), ("-1e18", -1e18), ("-1e20", -1e20)];
    for (name, value) in shared.into_iter().chain([("lowest", f64::from(f32::MIN)), ("largest", f64::from(f32::MAX))]) {
        for length in [7, 384] {
            let case = Case::new("extreme", format!("uniform_{name}/{length}"), spec(dtype, 2, (9, length), 2, 8));
            cases.push(case.with_bias(PAIR, DType::F32, Values::Constant(value)).with(|c| {
                (c.fill.q, c.common_logits) = (Values::Constant(0.0), true);
            }));
        }
    }
    cases.push(
        Case::new("extreme", "mask_and_pair_of_-1e9", spec(dtype, 2, (21, 140), 2, 8))
            .with_bias(KEY, DType::F32, masking(-1e9))
            .with_bias(PAIR, DType::F32, masking(-1e9)),
    );
    // Values whose sum with weights relative to an early maximum does not fit f32.
    if dtype != DType::F16 {
        let case = Case::new("extreme", "-8_first_tile_large_values", spec(dtype, 2, (21, 192), 2, 8));
        let case = case.with_bias(PAIR, dtype, leading(-8.0, 64));
        cases.push(
            case.with(|c| (c.fill.v, c.spec.gradients.q, c.spec.gradients.k) = (Values::Signs(1e36), false, false)),
        );
    }
    // Large biases that leave nothing when they are added to each other.
    for (name, value) in [("1e5", 1e5), ("1e9", 1e9)] {
        cases.push(
            Case::new("extreme", format!("cancelling_{name}"), spec(dtype, 2, (21, 140), 2, 8))
                .with_bias(KEY, DType::F32, everywhere(value))
                .with_bias(PAIR, DType::F32, everywhere(-value)),
        );
    }
    cases
}

fn key_masks(dtype: DType) -> Vec<Case> {
    let patterns = [
        ("random", MaskPattern::Random(0.5)),
        ("sparse", MaskPattern::Random(0.03)),
        ("every_second_row", MaskPattern::EverySecondRow),
        ("nothing", MaskPattern::Nothing),
        ("first_tiles_empty", MaskPattern::From(130)),
        ("last_tiles_empty", MaskPattern::Until(5)),
        ("middle_tiles_empty", MaskPattern::Without(10, 140)),
    ];
    let mut cases = Vec::new();
    for (name, pattern) in patterns {
        for empty_rows in [EmptyRows::Zero, EmptyRows::Uniform] {
            let title = format!("{name}/{empty_rows:?}").to_lowercase();
            let case = Case::new("key_mask", title, spec(dtype, 4, (18, 150), 2, 8)).with_pair_bias().with_gate();
            cases.push(case.with_key_mask(pattern).with(|c| c.spec.empty_rows = empty_rows));
        }
    }
    for bits in 0..8_u32 {
        let axes: [bool; 3] = std::array::from_fn(|axis| bits >> axis & 1 == 1);
        let mut spec = spec(dtype, 3, (18, 33), 2, 8);
        spec.batch = 2;
        let case = Case::new("key_mask", format!("axes_{bits:03b}"), spec).with_key_mask(MaskPattern::Random(0.6));
        cases.push(case.with(|c| c.fill.key_mask_axes = axes));
    }
    cases
}

fn key_lengths(dtype: DType) -> Vec<Case> {
    let lists: [(&str, Vec<i64>); 6] = [
        ("one", vec![50]),
        ("one_of_0", vec![0]),
        ("one_of_all", vec![150]),
        ("per_batch", vec![150, 17]),
        ("per_batch_with_0", vec![0, 33]),
        ("per_row", vec![1, 0, 64, 149, 150, 65]),
    ];
    let mut cases = Vec::new();
    for (name, lengths) in lists {
        for empty_rows in [EmptyRows::Zero, EmptyRows::Uniform] {
            let mut spec = spec(dtype, 3, (9, 150), 2, 8);
            (spec.batch, spec.kv_lengths, spec.empty_rows) = (2, Some(lengths.clone()), empty_rows);
            cases.push(Case::new("kv_lengths", format!("{name}/{empty_rows:?}").to_lowercase(), spec).with_pair_bias());
        }
    }
    let masked = cases[10].clone().with_key_mask(MaskPattern::Random(0.5));
    cases.push(masked.with(|c| c.name = "per_row_and_mask".to_owned()));
    cases
}

/// Every combination of causal, window, segments and ALiBi, without offsets, with some, and with some that empty rows.
fn structural(dtype: DType) -> Vec<Case> {
    let on = |bits: u32, bit: u32| bits >> bit & 1 == 1;
    let case = |bits: u32, offsets: (i64, i64), empty_rows: EmptyRows| {
        let flags = ["causal", "window", "segments", "alibi"];
        let mut names: Vec<String> =
            flags.into_iter().zip(0..).filter(|&(_, bit)| on(bits, bit)).map(|(name, _)| name.to_owned()).collect();
        if offsets != (0, 0) {
            names.push(format!("offsets{}/{empty_rows:?}", offsets.0).to_lowercase());
        }
        let mut case = Case::new("structural", names.join("+"), spec(dtype, 1, (70, 75), 2, 8)).with_pair_bias();
        case.spec.empty_rows = empty_rows;
        let mask = &mut case.spec.mask;
        mask.causal = on(bits, 0);
        mask.window = on(bits, 1).then_some(Window { left: Some(20), right: Some(6) });
        mask.alibi_slopes = on(bits, 3).then(|| vec![0.5, 0.0625]);
        (mask.q_offset, mask.k_offset) = offsets;
        if on(bits, 2) { case.with_segments(SegmentPattern::Blocks(23)) } else { case }
    };
    let mut cases: Vec<Case> = (1..16).map(|bits| case(bits, (0, 0), EmptyRows::Zero)).collect();
    cases.extend((0..16).map(|bits| case(bits, (9, -4), EmptyRows::Zero)));
    // Queries before the first key: causal masks and windows leave the first rows empty.
    for empty_rows in [EmptyRows::Zero, EmptyRows::Uniform] {
        cases.extend((0..16).map(|bits| case(bits, (-6, 4), empty_rows)));
    }
    // (name, seqlen_q, seqlen_k, q_offset, k_offset) of causal attention
    let causal = [
        ("square", 129, 129, 0, 0),
        ("single_query", 1, 130, 129, 0),
        ("tall", 130, 9, 0, 0),
        ("tall_at_the_end", 130, 9, -121, 0),
        ("sees_nothing", 40, 40, 0, 40),
        ("sees_all", 40, 40, 40, 0),
        ("first_queries_empty", 70, 70, 0, 33),
        ("far_positions", 33, 40, 1 << 40, 1 << 40),
    ];
    for (name, q, k, q_offset, k_offset) in causal {
        for empty_rows in [EmptyRows::Zero, EmptyRows::Uniform] {
            let title = format!("causal/{name}/{empty_rows:?}").to_lowercase();
            cases.push(Case::new("structural", title, spec(dtype, 1, (q, k), 2, 8)).with_pair_bias().with(|c| {
                (c.spec.mask.causal, c.spec.empty_rows) = (true, empty_rows);
                (c.spec.mask.q_offset, c.spec.mask.k_offset) = (q_offset, k_offset);
            }));
        }
    }
    cases
}

fn windows(dtype: DType) -> Vec<Case> {
    let list = [
        (Some(0), Some(0)),
        (Some(5), None),
        (None, Some(5)),
        (None, None),
        (Some(3), Some(64)),
        (Some(64), Some(0)),
        (Some(u64::MAX), Some(1)),
        (Some(1), Some(u64::MAX)),
    ];
    let mut cases = Vec::new();
    for (left, right) in list {
        // Queries behind the last key and before the first one: rows without keys, at the end and at the start.
        let (zero, uniform) = (EmptyRows::Zero, EmptyRows::Uniform);
        let offsets = [(0, zero), (90, zero), (90, uniform), (-30, zero), (-30, uniform)];
        let plain = offsets.map(|(q_offset, empty_rows)| (false, q_offset, empty_rows));
        for (causal, q_offset, empty_rows) in plain.into_iter().chain([(true, 0, zero)]) {
            let text = |limit: Option<u64>| limit.map_or("all".to_owned(), |limit| limit.to_string());
            let causal_text = if causal { "/causal" } else { "" };
            let name = format!("{}..{}{causal_text}/{q_offset}/{empty_rows:?}", text(left), text(right));
            cases.push(Case::new("window", name.to_lowercase(), spec(dtype, 1, (66, 140), 2, 8)).with(|c| {
                c.spec.mask.window = Some(Window { left, right });
                (c.spec.mask.causal, c.spec.mask.q_offset, c.spec.empty_rows) = (causal, q_offset, empty_rows);
            }));
        }
    }
    cases
}

fn segments(dtype: DType) -> Vec<Case> {
    let patterns = [
        ("packed", SegmentPattern::Blocks(30)),
        ("tiles", SegmentPattern::Blocks(64)),
        ("short", SegmentPattern::Blocks(2)),
        ("random", SegmentPattern::Random(4)),
        ("disjoint", SegmentPattern::Disjoint),
    ];
    let mut cases = Vec::new();
    for (name, pattern) in patterns {
        for empty_rows in [EmptyRows::Zero, EmptyRows::Uniform] {
            let title = format!("{name}/{empty_rows:?}").to_lowercase();
            let case = Case::new("segments", title, spec(dtype, 3, (100, 90), 1, 8)).with_segments(pattern);
            cases.push(case.with_pair_bias().with(|c| c.spec.empty_rows = empty_rows));
        }
    }
    for axes in [[false; 3], [true, false, true], [false, true, true], [false, false, true]] {
        let mut spec = spec(dtype, 3, (20, 35), 2, 8);
        spec.batch = 2;
        let case = Case::new("segments", format!("axes_{axes:?}"), spec).with_segments(SegmentPattern::Random(3));
        cases.push(case.with(|c| c.fill.segment_axes = axes));
    }
    cases
}

fn grouped_queries(dtype: DType) -> Vec<Case> {
    let mut cases = Vec::new();
    for (heads, kv_heads) in [(2, 1), (4, 2), (4, 1), (6, 3), (6, 2), (8, 8), (16, 2)] {
        for length in [20, 70] {
            let mut spec = spec(dtype, 2, (length, length + 3), heads, 8);
            spec.kv_heads = kv_heads;
            let case = Case::new("gqa", format!("{heads}over{kv_heads}/{length}"), spec).with_pair_bias();
            cases.push(if length == 20 { case } else { case.with_gate().with(|c| c.spec.mask.causal = true) });
        }
    }
    // More queries of a key head than a worker holds at once: dK and dV are summed over parts of the queries.
    for empty_rows in [EmptyRows::Zero, EmptyRows::Uniform] {
        let mut spec = spec(dtype, 16, (300, 40), 32, 4);
        (spec.kv_heads, spec.empty_rows) = (1, empty_rows);
        let name = format!("32over1/300/{empty_rows:?}").to_lowercase();
        cases.push(Case::new("gqa", name, spec).with_key_mask(MaskPattern::EverySecondRow));
    }
    cases
}

fn gates(dtype: DType) -> Vec<Case> {
    let base = |name: &str| Case::new("gate", name, spec(dtype, 2, (35, 67), 2, 16)).with_pair_bias().with_gate();
    let fills = [("normal", 1.0), ("closed_and_open", 30.0), ("tiny", 1e-3)];
    let mut cases: Vec<Case> =
        fills.iter().map(|&(name, deviation)| base(name).with(|c| c.fill.gate = Values::Normal(deviation))).collect();
    cases.push(base("shut").with(|c| c.fill.gate = Values::Constant(-200.0)));
    cases.push(base("head_dim_v").with(|c| c.spec.head_dim_v = 5));
    cases.push(base("alone").with(|c| c.spec.gradients = Gradients { gate: true, ..Gradients::default() }));
    cases.push(base("without_its_gradient").with(|c| c.spec.gradients.gate = false));
    for empty_rows in [EmptyRows::Zero, EmptyRows::Uniform] {
        let case = base(&format!("empty_rows/{empty_rows:?}").to_lowercase());
        cases.push(case.with_key_mask(MaskPattern::EverySecondRow).with(|c| c.spec.empty_rows = empty_rows));
    }
    cases
}

/// Each gradient alone, and every subset of q, k, v with and without the biases.
fn gradient_subsets(dtype: DType) -> Vec<Case> {
    let base = |name: String| {
        let case = Case::new("gradients", name, spec(dtype, 3, (34, 66), 2, 8)).with_gate();
        let axes = [KEY, PAIR, [false, true, true, true, false], FULL];
        axes.into_iter().fold(case, |case, axes| case.with_bias(axes, dtype, Values::Normal(0.5)))
    };
    let none = Gradients::default();
    let mut list = vec![("none".to_owned(), none), ("gate".to_owned(), Gradients { gate: true, ..none })];
    for i in 0..MAX_BIASES {
        let mut biases = [false; MAX_BIASES];
        biases[i] = true;
        list.push((format!("bias{i}"), Gradients { biases, ..none }));
        list.push((
            format!("all_but_bias{i}"),
            Gradients { q: true, k: true, v: true, gate: true, biases: biases.map(|b| !b) },
        ));
    }
    for bits in 1..8_u32 {
        let on = |bit: u32| bits >> bit & 1 == 1;
        let name: String = "qkv".chars().zip(0..).filter(|&(_, bit)| on(bit)).map(|(letter, _)| letter).collect();
        let subset = Gradients { q: on(0), k: on(1), v: on(2), ..none };
        list.push((name.clone(), subset));
        list.push((format!("{name}_and_biases"), Gradients { biases: [true; MAX_BIASES], ..subset }));
    }
    let mut cases: Vec<Case> =
        list.into_iter().map(|(name, subset)| base(name).with(|c| c.spec.gradients = subset)).collect();
    for (name, q, k, v) in
        [("q_of_plain", true, false, false), ("k_of_plain", false, true, false), ("v_of_plain", false, false, true)]
    {
        let mut spec = spec(dtype, 2, (50, 50), 2, 32);
        spec.gradients = Gradients { q, k, v, ..none };
        cases.push(Case::new("gradients", name, spec));
    }
    cases
}

fn magnitudes(dtype: DType) -> Vec<Case> {
    let base = |name: &str| Case::new("magnitude", name, spec(dtype, 2, (34, 70), 2, 16)).with_pair_bias();
    let tiny = if dtype == DType::F16 { 1e-3 } else { 1e-12 };
    let (large_v, large_d_out) = if dtype == DType::F16 { (100.0, 10.0) } else { (1e6, 1e6) };
    let scaled = |name, q: f64, v: f64, d_out: f64| {
        base(name).with(|c| {
            (c.fill.q, c.fill.k) = (Values::Normal(q), Values::Normal(q));
            (c.fill.v, c.fill.d_out) = (Values::Normal(v), Values::Normal(d_out));
        })
    };
    let constant = |name, value: f64, bias: f64| {
        base(name).with(|c| {
            let same = Values::Constant(value);
            (c.fill.q, c.fill.k, c.fill.v, c.fill.d_out) = (same, same, same, same);
            (c.fill.biases[0], c.common_logits) = (Values::Constant(bias), true);
        })
    };
    let scale = |name, scale: f64| base(name).with(|c| c.spec.softmax_scale = Some(scale));
    vec![
        constant("constant", 0.5, 0.25),
        constant("zero", 0.0, 0.0),
        constant("one", 1.0, 0.0),
        scaled("large_logits", 8.0, 1.0, 1.0),
        scaled("huge_logits", 64.0, 1.0, 1.0),
        scaled("large_values", 1.0, large_v, 1.0),
        scaled("large_gradients", 1.0, 1.0, large_d_out),
        scaled("tiny_logits", tiny, 1.0, 1.0),
        scaled("tiny_values", 1.0, tiny, 1.0),
        scaled("tiny_gradients", 1.0, 1.0, tiny),
        scaled("all_tiny", tiny, tiny, 1.0),
        scaled("no_gradient", 1.0, 1.0, 0.0),
        scale("scale_of_0", 0.0),
        scale("negative_scale", -0.3),
        scale("large_scale", 4.0),
        scale("tiny_scale", 1e-20),
    ]
}

/// What an excluded key holds does not matter; a NaN that is seen shows, and only where it is seen.
fn nans(dtype: DType) -> Vec<Case> {
    let base = |name: &str| Case::new("nan", name, spec(dtype, 3, (34, 150), 2, 8)).with_pair_bias();
    let lengths = |case: Case| case.with(|c| c.spec.kv_lengths = Some(vec![70, 150, 3]));
    let masked = |case: Case| case.with_key_mask(MaskPattern::Random(0.5));
    let poisoned = |case: Case, poison| case.with(|c| c.poison = poison);
    let first_tiles = base("in_first_tiles").with_key_mask(MaskPattern::From(100));
    vec![
        poisoned(lengths(base("beyond_lengths")), Poison::ExcludedKeys),
        poisoned(masked(base("in_masked_keys")), Poison::ExcludedKeys),
        poisoned(lengths(masked(base("in_both"))).with_gate(), Poison::ExcludedKeys),
        poisoned(first_tiles, Poison::ExcludedKeys),
        poisoned(base("in_all_keys").with_key_mask(MaskPattern::Nothing), Poison::ExcludedKeys),
        poisoned(base("in_bias").with_key_mask(MaskPattern::From(100)), Poison::BiasOfExcludedKeys),
        poisoned(base("in_one_query"), Poison::OneQuery),
        poisoned(base("in_one_key"), Poison::OneKey),
    ]
}

/// Sizes by which a backward plan decides: broadcast axes walked whole or in chunks, dQ and a bias's gradient in one
/// pass or two, dQ whole or as parts that are added, dK and dV in one pass or two.
fn walks(dtype: DType) -> Vec<Case> {
    let per_head = [false, false, true, true, true];
    let list = [
        ("rows", 120, (9, 10), 8, PAIR),
        ("rows_and_batch", 120, (9, 10), 32, per_head),
        ("parts_of_dq", 2, (5, 150), 32, PAIR),
        ("most_parts_of_dq", 1, (3, 760), 8, PAIR),
        ("two_passes", 1, (3, 780), 8, PAIR),
        ("two_passes_by_channels", 2, (20, 40), 33, PAIR),
        ("dk_and_dv_apart", 1, (18, 20), 136, PAIR),
    ];
    let case = |(name, rows, seqlen, head_dim, bias)| {
        let mut spec = spec(dtype, rows, seqlen, 2, head_dim);
        spec.batch = 2;
        Case::new("walks", name, spec).with_bias(bias, dtype, Values::Normal(1.0))
    };
    list.into_iter().map(case).collect()
}

/// Features together: what single cases cannot see is how they share tiles.
fn everything(dtype: DType) -> Vec<Case> {
    let lengths = [(5, 6), (40, 33), (65, 130), (130, 65), (97, 200)];
    let places = [
        Place::default(),
        Place { order: vec![0, 1, 3, 2, 4], ..Place::default() },
        Place { order: vec![0, 2, 1, 3, 4], gap: 2, reversed: vec![2], ..Place::default() },
    ];
    let mut cases = Vec::new();
    // The last two lengths have wide heads.
    for (i, (q, k)) in lengths.into_iter().chain([(70, 40), (40, 70)]).enumerate() {
        for (j, place) in places.iter().enumerate() {
            let [dims, dims_v] =
                if i < lengths.len() { [[8, 24, 33], [8, 16, 20]] } else { [[68, 67, 136], [72, 136, 67]] };
            let mut spec = spec(dtype, 2, (q, k), 4, dims[j]);
            (spec.batch, spec.kv_heads, spec.head_dim_v) = (2, 2, dims_v[j]);
            (spec.mask.q_offset, spec.mask.k_offset) = (3, 1);
            spec.mask.alibi_slopes = Some(vec![0.25, 0.125, 0.5, 0.0]);
            spec.mask.window = Some(Window { left: Some(90), right: if j == 0 { Some(40) } else { None } });
            spec.mask.causal = j == 1;
            let length = i64::try_from(k).unwrap_or(0);
            spec.kv_lengths = Some(vec![length, length - 2, length / 2, 0]);
            spec.empty_rows = if i % 2 == 0 { EmptyRows::Zero } else { EmptyRows::Uniform };
            let case = Case::new("everything", format!("{q}x{k}/{j}"), spec)
                .with_bias(KEY, DType::F32, Values::Masking { value: -1e9, share: 0.2 })
                .with_pair_bias()
                .with_bias([false, true, true, true, false], dtype, Values::Normal(1.0))
                .with_gate()
                .with_key_mask(MaskPattern::Random(0.8))
                .with_segments(SegmentPattern::Blocks(50));
            cases.push(case.with(|c| c.places = everywhere(place, 3)));
        }
    }
    cases
}

/// Evoformer attention in miniature: a mask as a bias of -1e9 and the pair bias.
fn workloads(dtype: DType) -> Vec<Case> {
    // name, rows, L, H, D, place of q, k, v, out and gradients
    let column = Place { order: vec![0, 2, 1, 3, 4], ..Place::default() };
    let list = [
        ("msa_row", 6, 40, 8, 32, Place::default()),
        ("msa_column", 7, 36, 8, 32, column.clone()),
        ("extra_msa", 20, 48, 8, 8, Place::default()),
        ("triangle_starting", 33, 33, 4, 32, Place::default()),
        ("triangle_ending", 33, 33, 4, 32, column),
        ("single_with_pair", 1, 96, 16, 24, Place::default()),
    ];
    let case = |(name, rows, length, heads, head_dim, place): (&str, usize, usize, usize, usize, Place)| {
        Case::new("workload", name, spec(dtype, rows, (length, length), heads, head_dim))
            .with_bias(KEY, dtype, Values::Masking { value: -1e9, share: 0.15 })
            .with_pair_bias()
            .with_gate()
            .with(|c| c.places = everywhere(&place, 2))
            .with(|c| c.places.biases = vec![Place::default(); 2])
    };
    list.into_iter().map(case).collect()
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use super::*;

    #[test]
    fn every_case_is_a_valid_problem_with_a_name_of_its_own() {
        for precision in Precision::ALL {
            let cases = all(precision, &[48]);
            let mut titles = HashSet::new();
            for case in &cases {
                assert!(titles.insert(case.title()), "{} twice", case.title());
                let problem = tilefold_core::AttentionProblem::new(case.spec.clone());
                assert!(problem.is_ok(), "{}: {problem:?}", case.title());
                assert_eq!(case.fill.biases.len(), case.spec.biases.len(), "{}", case.title());
                assert_eq!(case.places.biases.len(), case.spec.biases.len(), "{}", case.title());
            }
        }
    }

    #[test]
    fn windows_and_structural_masks_empty_rows_under_both_rules() {
        let sees_nothing = |s: &AttentionSpec, query| (0..s.seqlen_k).all(|key| !s.mask.keeps(query, key));
        let empties = |case: &Case| (0..case.spec.seqlen_q).any(|query| sees_nothing(&case.spec, query));
        for (group, cases) in [("window", windows(DType::F32)), ("structural", structural(DType::F32))] {
            for empty_rows in [EmptyRows::Zero, EmptyRows::Uniform] {
                let mut count = 0;
                for case in cases.iter().filter(|case| case.spec.empty_rows == empty_rows) {
                    count += usize::from(case.spec.mask.window.is_some() && empties(case));
                }
                assert!(count >= 5, "{group}, {empty_rows:?}: {count} cases with rows that a window empties");
            }
        }
    }
}
