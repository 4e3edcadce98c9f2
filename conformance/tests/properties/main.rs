//! Random valid problems against the oracle: what the table of cases did not think of.
//!
//! `TILEFOLD_SEED=7` chooses another sequence of problems; a failure prints the seed and the smallest problem found.

#![allow(clippy::unwrap_used, reason = "a panic in a test is a failed test")]

use std::time::{Duration, Instant};

use proptest::prelude::*;
use proptest::test_runner::{Config, RngAlgorithm, TestError, TestRng, TestRunner};
use tilefold::Device;
use tilefold_conformance::case::{Case, DTYPES, MaskPattern, Place, Places, SegmentPattern, Values};
use tilefold_conformance::oracle::check_case;
use tilefold_core::{AttentionSpec, BiasSpec, DType, EmptyRows, Window};

/// Time after which no further problem is drawn.
const BUDGET: Duration = Duration::from_secs(20);

/// What a random problem is made of; everything shrinks towards small and plain.
#[derive(Clone, Debug)]
struct Draw {
    dtype: usize,
    outer: (usize, usize),
    lengths: (usize, usize),
    heads: (usize, usize),
    dims: (usize, usize),
    biases: Vec<(u32, bool, u8)>,
    features: u32,
    gradients: u32,
    window: (Option<u64>, Option<u64>),
    offsets: (i64, i64),
    kv_lengths: Vec<usize>,
    places: [usize; 6],
    seed: u64,
}

fn draw() -> impl Strategy<Value = Draw> {
    let sizes = (0..3_usize, (1..=2_usize, 1..=4_usize), (1..=90_usize, 1..=150_usize), (1..=3_usize, 1..=3_usize));
    let dims = (1..=40_usize, 1..=40_usize);
    let biases = prop::collection::vec((0..32_u32, any::<bool>(), 0..4_u8), 0..=4);
    let window = (prop::option::of(0..60_u64), prop::option::of(0..60_u64));
    let offsets = (-40..40_i64, -40..40_i64);
    let lengths = prop::collection::vec(0..=150_usize, 8);
    let rest = (any::<u32>(), any::<u32>(), window, offsets, lengths, prop::array::uniform6(0..6_usize), any::<u64>());
    (sizes, dims, biases, rest).prop_map(|((dtype, outer, seqlens, heads), dims, biases, rest)| {
        let (features, gradients, window, offsets, kv_lengths, places, seed) = rest;
        Draw {
            dtype,
            outer,
            lengths: seqlens,
            heads,
            dims,
            biases,
            features,
            gradients,
            window,
            offsets,
            kv_lengths,
            places,
            seed,
        }
    })
}

impl Draw {
    fn has(&self, feature: u32) -> bool {
        // One feature in three, so that plain problems occur too.
        self.features >> (2 * feature) & 3 == 3
    }

    fn case(&self) -> Case {
        let mut spec = AttentionSpec::new(DTYPES[self.dtype], self.outer.0, self.outer.1, 1, 1, self.dims.0);
        (spec.seqlen_q, spec.seqlen_k) = self.lengths;
        (spec.heads, spec.kv_heads) = (self.heads.0 * self.heads.1, self.heads.0);
        spec.head_dim_v = if self.has(0) { self.dims.1 } else { self.dims.0 };
        self.mask(&mut spec);
        (spec.gate, spec.key_mask, spec.segments) = (self.has(1), self.has(2), self.has(3));
        spec.empty_rows = if self.features >> 31 == 1 { EmptyRows::Uniform } else { EmptyRows::Zero };
        let full = [spec.batch, spec.rows, spec.heads, spec.seqlen_q, spec.seqlen_k];
        for &(axes, single, _) in &self.biases {
            let shape = std::array::from_fn(|axis| if axes >> axis & 1 == 1 { full[axis] } else { 1 });
            spec.biases.push(BiasSpec { shape, dtype: if single { DType::F32 } else { spec.dtype } });
        }
        let asked = |bit: u32| self.gradients >> bit & 1 == 1;
        (spec.gradients.q, spec.gradients.k, spec.gradients.v) = (asked(0), asked(1), asked(2));
        spec.gradients.gate = spec.gate && asked(3);
        spec.gradients.biases = [0, 1, 2, 3].map(|i| i < spec.biases.len() && asked(4 + u32::try_from(i).unwrap()));
        let mut case = Case::new("random", format!("{self:?}"), spec);
        case.seed = self.seed;
        self.fill(&mut case);
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
        spec.kv_lengths = self.has(8).then(|| lengths.take(spec.batch * spec.rows).collect());
    }

    fn fill(&self, case: &mut Case) {
        let inf = f64::NEG_INFINITY;
        let fills = [
            Values::Normal(1.0),
            Values::Masking { value: inf, share: 0.3 },
            Values::Masking { value: -1e4, share: 0.3 },
            Values::Leading { value: inf, count: 40 },
        ];
        case.fill.biases = self.biases.iter().map(|&(_, _, fill)| fills[usize::from(fill)]).collect();
        case.fill.key_mask = MaskPattern::Random(0.6);
        case.fill.key_mask_axes = [true, self.features & 1 == 1, true];
        case.fill.segments = SegmentPattern::Blocks(17);
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
        case.places = Places {
            q: place(0),
            k: place(1),
            v: place(1),
            gate: place(2),
            out: place(3),
            d_out: place(4),
            biases: vec![place(5); self.biases.len()],
            gradients: place(2),
            ..Places::default()
        };
    }
}

#[test]
fn random_problems() {
    let seed: u64 = std::env::var("TILEFOLD_SEED").ok().and_then(|seed| seed.parse().ok()).unwrap_or(0);
    let mut bytes = [0_u8; 32];
    bytes[..8].copy_from_slice(&seed.to_le_bytes());
    let config = Config { cases: 10_000, max_shrink_time: 30_000, failure_persistence: None, ..Config::default() };
    let mut runner = TestRunner::new_with_rng(config, TestRng::from_seed(RngAlgorithm::ChaCha, &bytes));
    let device = Device::best().unwrap();
    let (start, mut count) = (Instant::now(), std::cell::Cell::new(0_u32));
    let result = runner.run(&draw(), |draw| {
        if start.elapsed() > BUDGET {
            return Ok(());
        }
        count.set(count.get() + 1);
        check_case(&device, &draw.case()).map(drop).map_err(TestCaseError::fail)
    });
    println!("{} problems, TILEFOLD_SEED={seed}", count.get_mut());
    match result {
        Err(TestError::Fail(why, draw)) => panic!("TILEFOLD_SEED={seed}: {why}\n{draw:#?}"),
        other => other.unwrap(),
    }
}
