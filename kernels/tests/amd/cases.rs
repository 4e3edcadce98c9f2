//! The problems: every dtype, head dimensions with and without padding, every feature alone and all of them.

use tilefold_core::{AttentionSpec, BiasSpec, DType, EmptyRows, StructuralMask, Window};

/// A problem, what its masks exclude, and how its operands lie in memory.
pub(crate) struct Case {
    pub(crate) spec: AttentionSpec,
    what: &'static str,
    /// Elements from one to the next in q, k, v, gate and out; 1 allows moves in pieces where channels do.
    pub(crate) step: usize,
    /// The same of biases.
    pub(crate) bias_step: usize,
    /// Positions of a segment.
    pub(crate) segment: usize,
    /// Keys from here on are excluded by the mask in the first row; of others every fifth is.
    padding: usize,
    /// k, v and biases of masked keys hold NaN.
    pub(crate) poisoned: bool,
    /// Keys from here on are so much larger that the first tiles' maxima are nothing beside theirs.
    pub(crate) late: usize,
}

impl Case {
    fn new(what: &'static str, spec: AttentionSpec) -> Self {
        let padding = spec.seqlen_k.saturating_sub(20);
        Self { spec, what, step: 1, bias_step: 1, segment: 40, padding, poisoned: false, late: usize::MAX }
    }

    /// For messages.
    pub(crate) fn name(&self) -> String {
        let spec = &self.spec;
        format!(
            "{} {} {}x{}, {} queries, {} keys",
            self.what, spec.dtype, spec.head_dim, spec.head_dim_v, spec.seqlen_q, spec.seqlen_k
        )
    }

    /// Whether the key mask keeps a key.
    pub(crate) fn keeps(&self, row: usize, key: usize) -> bool {
        if row == 0 { key < self.padding } else { key % 5 != 1 }
    }
}

const HEADS: usize = 2;
const ROWS: usize = 2;

fn base(dtype: DType, head_dim: usize, seqlen: usize) -> AttentionSpec {
    AttentionSpec::new(dtype, 1, ROWS, seqlen, HEADS, head_dim)
}

/// A bias of queries and keys that all rows share.
fn pair(spec: &AttentionSpec) -> BiasSpec {
    BiasSpec { shape: [1, 1, HEADS, spec.seqlen_q, spec.seqlen_k], dtype: spec.dtype }
}

/// A bias of keys, one for each row.
fn of_keys(spec: &AttentionSpec, dtype: DType) -> BiasSpec {
    BiasSpec { shape: [1, ROWS, 1, 1, spec.seqlen_k], dtype }
}

pub(crate) fn cases() -> Vec<Case> {
    let mut cases = Vec::new();
    for dtype in [DType::F32, DType::F16, DType::BF16] {
        for head_dim in [1, 8, 24, 32, 33, 64, 128] {
            // Three tiles of keys: pieces where channels allow them, references that stay.
            let mut spec = base(dtype, head_dim, 160);
            spec.biases = vec![pair(&spec)];
            spec.key_mask = true;
            let mut case = Case::new("pair bias and key mask", spec);
            case.poisoned = true;
            cases.push(case);
        }
        // In bf16 every feature; the other types differ in loads, products and rounding.
        let all = dtype == DType::BF16;
        cases.extend(features(dtype).into_iter().filter(|case| all || OF_ALL_TYPES.contains(&case.what)));
    }
    cases
}

/// Features that are checked in every dtype.
const OF_ALL_TYPES: [&str; 6] =
    ["nothing", "f32 pair bias", "v wider than k", "everything", "everything, strided", "pair bias of odd rows"];

fn features(dtype: DType) -> Vec<Case> {
    let with = |what, change: &dyn Fn(&mut AttentionSpec)| {
        let mut spec = base(dtype, 32, 150);
        change(&mut spec);
        Case::new(what, spec)
    };
    let slopes = Some(vec![0.5, 0.0625]);
    let causal = StructuralMask { causal: true, ..StructuralMask::default() };
    let window = StructuralMask { window: Some(Window { left: Some(50), right: Some(3) }), ..causal.clone() };
    let alibi = StructuralMask { alibi_slopes: slopes, ..causal.clone() };
    let everything = |spec: &mut AttentionSpec| {
        spec.kv_heads = 1;
        spec.biases = vec![pair(spec), of_keys(spec, DType::F32), of_keys(spec, spec.dtype)];
        (spec.key_mask, spec.segments, spec.gate) = (true, true, true);
        (spec.kv_lengths, spec.empty_rows) = (Some(vec![130]), EmptyRows::Uniform);
        spec.mask = alibi.clone();
    };
    let mut nothing_kept =
        with("no key is kept in a row", &|spec| (spec.key_mask, spec.empty_rows) = (true, EmptyRows::Uniform));
    nothing_kept.padding = 0;
    let mut strided = with("everything, strided", &everything);
    (strided.step, strided.bias_step) = (2, 3);
    let mut poisoned = with("NaN in the bias of masked keys", &|spec| {
        spec.seqlen_k = 192;
        spec.key_mask = true;
        spec.biases = vec![of_keys(spec, spec.dtype), pair(spec)];
    });
    poisoned.poisoned = true;
    let mut late = with("maxima that come late", &|spec| spec.biases = vec![pair(spec)]);
    (late.late, late.spec.seqlen_q, late.spec.seqlen_k) = (128, 192, 192);
    late.spec.biases = vec![pair(&late.spec)];
    let mut uneven = with("pair bias of odd rows", &|spec| {
        (spec.seqlen_q, spec.seqlen_k) = (37, 101);
        spec.biases = vec![pair(spec)];
    });
    uneven.step = 2;
    vec![
        with("nothing", &|_| {}),
        with("one query", &|spec| spec.seqlen_q = 1),
        with("keys' bias", &|spec| {
            spec.seqlen_k = 192;
            spec.biases = vec![of_keys(spec, spec.dtype), pair(spec)];
        }),
        with("f32 pair bias", &|spec| {
            spec.seqlen_k = 192;
            spec.biases = vec![BiasSpec { dtype: DType::F32, ..pair(spec) }];
        }),
        with("causal", &|spec| spec.mask = causal.clone()),
        with("window", &|spec| spec.mask = window.clone()),
        with("ALiBi", &|spec| spec.mask = alibi.clone()),
        with("segments", &|spec| spec.segments = true),
        with("lengths", &|spec| spec.kv_lengths = Some(vec![0, 70])),
        with("gate", &|spec| spec.gate = true),
        with("grouped heads", &|spec| spec.kv_heads = 1),
        with("v wider than k", &|spec| (spec.head_dim, spec.head_dim_v) = (20, 40)),
        with("everything", &everything),
        nothing_kept,
        strided,
        uneven,
        poisoned,
        late,
    ]
}
