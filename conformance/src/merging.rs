//! Merging: attention over parts of the keys, put together, is attention over all of them; and the arithmetic by
//! itself.

use std::sync::Arc;

use tilefold_core::{
    AttentionProblem, AttentionSpec, Backend, BiasSpec, DType, ForwardArgs, ForwardOperands, MergeArgs, MergeOperands,
    Precision, Stream,
};

use crate::buffer::{Buffer, Downloaded};
use crate::case::{Case, MaskPattern, Place, Values};
use crate::oracle::Expected;
use crate::suite::Trial;
use crate::values::{Host, Inputs};

const GROUP: &str = "merge";

/// Axis of the keys in k and v, and in a bias.
const KEY_AXIS: usize = 2;
const BIAS_KEY_AXIS: usize = 4;

/// How the keys of a case are cut, and what type the sum has.
#[derive(Clone, Debug)]
struct Split {
    case: Case,
    cuts: Vec<usize>,
    accumulator: DType,
    place: Place,
}

pub(crate) fn trials(device: &Arc<dyn Backend>, precision: Precision) -> Vec<Trial> {
    let dtype = precision.dtype;
    let mut trials: Vec<Trial> = splits(precision).into_iter().map(|split| split_trial(device, split)).collect();
    for accumulator in [DType::F32, dtype] {
        let name = format!("{precision}/{GROUP}/arithmetic/{accumulator}");
        let device = Arc::clone(device);
        trials.push(Trial::new(GROUP, name, move || arithmetic(&*device, dtype, accumulator)));
        if dtype == DType::F32 {
            break;
        }
    }
    trials
}

fn split_trial(device: &Arc<dyn Backend>, split: Split) -> Trial {
    let device = Arc::clone(device);
    Trial::new(GROUP, split.case.title(), move || {
        run(&*device, &split)
            .map_err(|message| format!("{}, seed {:#x}: {message}", split.case.title(), split.case.seed))
    })
}

fn splits(precision: Precision) -> Vec<Split> {
    let dtype = precision.dtype;
    let base = |name: &str| {
        let mut spec = AttentionSpec::new(dtype, 2, 2, 20, 4, 8);
        (spec.products, spec.seqlen_k, spec.kv_heads, spec.head_dim_v) = (precision.products, 90, 2, 12);
        spec.biases = vec![BiasSpec { shape: [2, 1, 4, 20, 90], dtype }];
        Case::new(GROUP, name, spec)
    };
    let split = |case: Case, cuts: &[usize]| Split {
        case,
        cuts: cuts.to_vec(),
        accumulator: DType::F32,
        place: Place::default(),
    };
    let masked = |name: &str, pattern| {
        let mut case = base(name);
        (case.spec.key_mask, case.fill.key_mask) = (true, pattern);
        case
    };
    let mut causal = base("causal");
    (causal.spec.mask.causal, causal.spec.mask.q_offset) = (true, 30);
    let mut alibi = base("alibi");
    alibi.spec.mask.alibi_slopes = Some(vec![0.5, 0.25, 0.125, 0.0]);
    let mut minus = base("uniform_-1e9");
    minus.spec.biases[0] = BiasSpec { shape: [1, 1, 1, 1, 90], dtype: DType::F32 };
    (minus.fill.q, minus.fill.biases[0], minus.common_logits) = (Values::Constant(0.0), Values::Constant(-1e9), true);
    let mut strided = split(base("heads_first"), &[0, 41, 90]);
    strided.place = Place { order: vec![0, 1, 3, 2, 4], gap: 1, ..Place::default() };
    let mut own = split(base("own_dtype"), &[0, 40, 90]);
    own.accumulator = dtype;
    vec![
        split(base("one_part"), &[0, 90]),
        split(base("two_parts"), &[0, 37, 90]),
        split(base("three_parts"), &[0, 1, 89, 90]),
        split(masked("first_part_empty", MaskPattern::From(40)), &[0, 40, 90]),
        split(masked("middle_part_empty", MaskPattern::Without(20, 60)), &[0, 20, 60, 90]),
        split(masked("last_part_empty", MaskPattern::Until(40)), &[0, 40, 90]),
        split(masked("all_parts_empty", MaskPattern::Nothing), &[0, 40, 90]),
        split(masked("random", MaskPattern::Random(0.05)), &[0, 30, 60, 90]),
        split(causal, &[0, 33, 66, 90]),
        split(alibi, &[0, 33, 90]),
        split(minus, &[0, 13, 90]),
        strided,
        own,
    ]
}

/// What a launch on a device needs besides data.
struct Launch<'a> {
    device: &'a dyn Backend,
    stream: Stream,
}

/// Accumulators of a merge.
struct Sum {
    out: Buffer,
    lse: Buffer,
    lse_low: Buffer,
}

impl Launch<'_> {
    /// The sum over no keys, written by `fill`: 0 and -inf.
    fn empty_sum(&self, dtype: DType, out_shape: &[usize], lse_shape: &[usize], place: &Place) -> Result<Sum, String> {
        let ranked = Place { order: Vec::new(), ..place.clone() };
        let filled = |dtype, shape: &[usize], place: &Place, value| {
            let mut buffer = Buffer::output(self.device, &self.stream, dtype, shape, place)?;
            let filled = self.device.fill(&self.stream, buffer.tensor_mut().view_mut(), value);
            filled.map(|()| buffer).map_err(|e| format!("fill: {e}"))
        };
        Ok(Sum {
            out: filled(dtype, out_shape, place, 0.0)?,
            lse: filled(DType::F32, lse_shape, &ranked, f64::NEG_INFINITY)?,
            lse_low: filled(DType::F32, lse_shape, &ranked, 0.0)?,
        })
    }

    fn merge(&self, part: &Sum, sum: &mut Sum) -> Result<(), String> {
        let operands = MergeOperands {
            out: part.out.tensor().view(),
            lse: part.lse.tensor().view(),
            lse_low: part.lse_low.tensor().view(),
            acc_out: sum.out.tensor_mut().view_mut(),
            acc_lse: sum.lse.tensor_mut().view_mut(),
            acc_lse_low: sum.lse_low.tensor_mut().view_mut(),
        };
        let args = MergeArgs::new(operands).map_err(|e| format!("merge arguments: {e}"))?;
        self.device.merge(&self.stream, args).map_err(|e| format!("merge: {e}"))
    }

    fn results(&self, sum: &Sum) -> Result<Vec<(String, Downloaded)>, String> {
        self.device.synchronize(&self.stream).map_err(|e| e.to_string())?;
        let named = [("out", &sum.out), ("lse", &sum.lse), ("lse_low", &sum.lse_low)];
        named.into_iter().map(|(name, b)| Ok((name.to_owned(), b.download(self.device, &self.stream)?))).collect()
    }
}

fn run(device: &dyn Backend, split: &Split) -> Result<f64, String> {
    let launch = Launch { device, stream: device.stream().map_err(|e| e.to_string())? };
    let (case, inputs) = (&split.case, Inputs::draw(&split.case));
    let problem = AttentionProblem::new(case.spec.clone()).map_err(|e| e.to_string())?;
    let (out, lse) = (problem.out_shape(), problem.lse_shape());
    let mut sum = launch.empty_sum(split.accumulator, &out, &lse, &split.place)?;
    for keys in split.cuts.windows(2) {
        let part = part(&launch, split, &inputs, keys[0]..keys[1])?;
        launch.merge(&part, &mut sum)?;
    }
    // The part's output and the sum are each rounded once for every part.
    let roundings = f64::from(u8::try_from(2 * split.cuts.len()).map_err(|e| e.to_string())?);
    Expected::of(case, &inputs)?.check_merged(split.accumulator, roundings, &launch.results(&sum)?)
}

/// Attention over some of the keys, as views of the whole operands.
fn part(launch: &Launch<'_>, split: &Split, inputs: &Inputs, keys: std::ops::Range<usize>) -> Result<Sum, String> {
    let Launch { device, stream } = launch;
    let mut spec = split.case.spec.clone();
    spec.seqlen_k = keys.len();
    spec.mask.k_offset += i64::try_from(keys.start).map_err(|e| e.to_string())?;
    let has_keys = |bias: &BiasSpec| bias.shape[BIAS_KEY_AXIS] > 1;
    spec.biases.iter_mut().filter(|bias| has_keys(bias)).for_each(|bias| bias.shape[BIAS_KEY_AXIS] = keys.len());
    let problem = AttentionProblem::new(spec).map_err(|e| e.to_string())?;
    let plan = device.plan_attention(&problem).map_err(|e| e.to_string())?;

    let put = |host: &Host| Buffer::input(*device, stream, host, &Place::default());
    let (q, k, v) = (put(&inputs.q)?, put(&inputs.k)?, put(&inputs.v)?);
    let biases = inputs.biases.iter().map(put).collect::<Result<Vec<_>, _>>()?;
    let mask = inputs.key_mask.as_ref().map(put).transpose()?;
    let place = &split.place;
    let ranked = Place { order: Vec::new(), ..place.clone() };
    let mut sum = Sum {
        out: Buffer::output(*device, stream, problem.spec().dtype, &problem.out_shape(), place)?,
        lse: Buffer::output(*device, stream, DType::F32, &problem.lse_shape(), &ranked)?,
        lse_low: Buffer::output(*device, stream, DType::F32, &problem.lse_shape(), &ranked)?,
    };
    let mut bias_views = Vec::new();
    for (buffer, bias) in biases.iter().zip(&split.case.spec.biases) {
        let view = buffer.tensor().view();
        bias_views.push(if has_keys(bias) {
            view.slice(BIAS_KEY_AXIS, keys.clone(), 1).map_err(|e| e.to_string())?
        } else {
            view
        });
    }
    let operands = ForwardOperands {
        q: q.tensor().view(),
        k: k.tensor().view().slice(KEY_AXIS, keys.clone(), 1).map_err(|e| e.to_string())?,
        v: v.tensor().view().slice(KEY_AXIS, keys.clone(), 1).map_err(|e| e.to_string())?,
        biases: bias_views,
        key_mask: match &mask {
            Some(mask) => Some(mask.tensor().view().slice(2, keys.clone(), 1).map_err(|e| e.to_string())?),
            None => None,
        },
        q_segments: None,
        k_segments: None,
        gate: None,
        out: sum.out.tensor_mut().view_mut(),
        lse: Some(sum.lse.tensor_mut().view_mut()),
        lse_low: Some(sum.lse_low.tensor_mut().view_mut()),
    };
    let args = ForwardArgs::new(&plan, operands).map_err(|e| format!("forward arguments: {e}"))?;
    device.attention_forward(stream, args).map_err(|e| format!("forward: {e}"))?;
    Ok(sum)
}

/// One row of a merge: (out, lse, lse_low) of the sum so far and of the part.
type Sides = [(f64, f64, f64); 2];

/// What merges go wrong on.
fn sides() -> Vec<Sides> {
    let inf = f64::NEG_INFINITY;
    vec![
        [(1.0, 0.0, 0.0), (3.0, 0.0, 0.0)],
        [(1.0, 2.5, 1e-8), (-3.0, 1.25, -1e-8)],
        [(1.0, -80.0, 0.0), (2.0, 90.0, 0.0)],
        [(1.0, 1e4, 0.0), (2.0, -1e4, 0.0)],
        // The low parts alone tell 5 keys from 379.
        [(1.0, -1e9, 5_f64.ln()), (2.0, -1e9, 379_f64.ln())],
        // Low parts so large that they decide which side is the larger.
        [(1.0, -1e10, 400.0), (2.0, -1e10, -400.0)],
        // An empty side is not read, whichever it is.
        [(f64::NAN, inf, 0.0), (2.0, 0.5, 0.0)],
        [(2.0, 0.5, 0.0), (f64::NAN, inf, 0.0)],
        [(0.0, inf, 0.0), (f64::NAN, inf, 0.0)],
        [(0.0, inf, 0.0), (-2.0, -1e9, 3.0)],
    ]
}

/// Merges single rows and compares with equations (17) and (18) in f64.
fn arithmetic(device: &dyn Backend, part_dtype: DType, sum_dtype: DType) -> Result<f64, String> {
    let launch = Launch { device, stream: device.stream().map_err(|e| e.to_string())? };
    let sides = sides();
    let row = |side: usize, dtype| -> Result<Sum, String> {
        let column = |field: fn(&(f64, f64, f64)) -> f64| sides.iter().map(|sides| field(&sides[side])).collect();
        let host = |dtype, shape: [usize; 5], rank: usize, values| {
            let host = Host { dtype, shape: shape[..rank].to_vec(), values };
            Buffer::input(device, &launch.stream, &host, &Place::default())
        };
        let count = sides.len();
        Ok(Sum {
            out: host(dtype, [1, 1, count, 1, 1], 5, column(|s| s.0))?,
            lse: host(DType::F32, [1, 1, 1, count, 0], 4, column(|s| s.1))?,
            lse_low: host(DType::F32, [1, 1, 1, count, 0], 4, column(|s| s.2))?,
        })
    };
    let mut sum = row(0, sum_dtype)?;
    launch.merge(&row(1, part_dtype)?, &mut sum)?;
    let results = launch.results(&sum)?;
    let mut worst = 0.0_f64;
    for (i, &[a, b]) in sides.iter().enumerate() {
        let got = (results[0].1.values[i], results[1].1.values[i], results[2].1.values[i]);
        worst = worst.max(check_row(i, a, b, got, sum_dtype)?);
    }
    Ok(worst)
}

fn check_row(
    i: usize,
    a: (f64, f64, f64),
    b: (f64, f64, f64),
    got: (f64, f64, f64),
    dtype: DType,
) -> Result<f64, String> {
    let single = |x: f64| crate::values::round_to(DType::F32, x);
    let (a_lse, b_lse) = (single(a.1) + single(a.2), single(b.1) + single(b.2));
    if a_lse == f64::NEG_INFINITY && b_lse == f64::NEG_INFINITY {
        return if got == (0.0, f64::NEG_INFINITY, 0.0) {
            Ok(0.0)
        } else {
            Err(format!("row {i}: both sides empty: expected out 0, lse -inf, lse_low 0, got {got:?}"))
        };
    }
    let top = a_lse.max(b_lse);
    let (a_weight, b_weight) = ((a_lse - top).exp(), (b_lse - top).exp());
    let term = |weight: f64, out: f64| if weight == 0.0 { 0.0 } else { weight * out };
    let out = (term(a_weight, a.0) + term(b_weight, b.0)) / (a_weight + b_weight);
    let lse = top + (a_weight + b_weight).ln();
    // f32 arithmetic on numbers of this size; the difference of the logarithms has the error of its low parts.
    let eps = 16.0 * DType::F32.unit_roundoff() * (1.0 + a.2.abs().max(b.2.abs()));
    let sizes = [a.0, b.0].into_iter().filter(|x| x.is_finite()).fold(0.0_f64, |m, x| m.max(x.abs()));
    let ratios = [
        ("out", got.0, out, (dtype.unit_roundoff() + eps) * sizes),
        ("lse + lse_low", got.1 + got.2, lse, eps + 2_f64.powi(-46) * lse.abs()),
    ];
    let mut worst = 0.0_f64;
    for (name, got, expected, allowed) in ratios {
        let ratio = (got - expected).abs() / allowed;
        if ratio > 1.0 || ratio.is_nan() {
            return Err(format!("row {i}: {name}: expected {expected:e}, got {got:e}, allowed error {allowed:.2e}"));
        }
        worst = worst.max(ratio);
    }
    Ok(worst)
}
