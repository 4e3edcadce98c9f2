//! The oracle against values worked out by hand, and its gradients against central differences of its forward pass.

use super::*;
use crate::{BiasSpec, DType, StructuralMask, Window};

const LN_3: f64 = 1.098_612_288_668_109_8;

fn assert_close(name: &str, got: &[f64], expected: &[f64]) {
    assert_eq!(got.len(), expected.len(), "{name}");
    for (i, (&got, &expected)) in got.iter().zip(expected).enumerate() {
        let close = got == expected || (got - expected).abs() <= 1e-14 * expected.abs().max(1.0);
        assert!(close, "{name}[{i}]: got {got}, expected {expected}");
    }
}

/// One batch, row and head, one channel, scale 1: small enough to work out by hand.
fn scalar_spec(seqlen_q: usize, seqlen_k: usize) -> AttentionSpec {
    let spec = AttentionSpec::new(DType::F32, 1, 1, seqlen_q, 1, 1);
    AttentionSpec { seqlen_k, softmax_scale: Some(1.0), ..spec }
}

fn inputs(q: &[f64], k: &[f64], v: &[f64]) -> ReferenceInputs {
    ReferenceInputs {
        q: q.to_vec(),
        k: k.to_vec(),
        v: v.to_vec(),
        biases: Vec::new(),
        key_mask: None,
        q_segments: None,
        k_segments: None,
        gate: None,
    }
}

fn bias(shape: [usize; 5]) -> BiasSpec {
    BiasSpec { shape, dtype: DType::F32 }
}

/// Logits 0 and ln 3: probabilities 1/4 and 3/4. v = 2, 10, so out = 8 and delta = 8 for d_out = 1.
#[test]
fn two_keys_by_hand() {
    let biases = vec![bias([1, 1, 1, 1, 2]), bias([1; 5])];
    let spec = AttentionSpec { softmax_scale: Some(2.0), biases, ..scalar_spec(1, 2) };
    let problem = AttentionProblem::new(spec).unwrap();
    let mut inputs = inputs(&[1.0], &[0.0, LN_3 / 2.0], &[2.0, 10.0]);
    inputs.biases = vec![vec![0.0, 0.0], vec![0.0]];
    let got = forward(&problem, &inputs);
    assert_close("out", &got.out, &[8.0]);
    assert_close("lse", &got.lse, &[4_f64.ln()]);
    let got = backward(&problem, &inputs, &[1.0]);
    assert_close("dv", &got.dv, &[0.25, 0.75]);
    // dP = 2, 10; dS = 1/4 (2 - 8), 3/4 (10 - 8)
    assert_close("dbias0", &got.dbiases[0], &[-1.5, 1.5]);
    assert_close("dbias1", &got.dbiases[1], &[0.0]);
    assert_close("dq", &got.dq, &[2.0 * 1.5 * LN_3 / 2.0]);
    assert_close("dk", &got.dk, &[-3.0, 3.0]);
    assert!(got.d_gate.is_none());
}

/// The same with a gate of 0, whose sigmoid is 1/2 with derivative 1/4.
#[test]
fn gate_by_hand() {
    let problem = AttentionProblem::new(AttentionSpec { gate: true, ..scalar_spec(1, 2) }).unwrap();
    let mut inputs = inputs(&[1.0], &[0.0, LN_3], &[2.0, 10.0]);
    inputs.gate = Some(vec![0.0]);
    let got = forward(&problem, &inputs);
    assert_close("out", &got.out, &[4.0]);
    assert_close("lse", &got.lse, &[4_f64.ln()]);
    let got = backward(&problem, &inputs, &[1.0]);
    assert_close("d_gate", &got.d_gate.unwrap(), &[8.0 / 4.0]);
    assert_close("dv", &got.dv, &[0.125, 0.375]);
    assert_close("dk", &got.dk, &[-0.75, 0.75]);
    assert_close("dq", &got.dq, &[0.75 * LN_3]);
}

#[test]
fn gate_far_from_zero_neither_overflows_nor_cancels() {
    assert_close("sigmoid", &[sigmoid(-800.0), sigmoid(800.0), sigmoid(-3.0)], &[0.0, 1.0, 1.0 / (1.0 + 3_f64.exp())]);
    let problem = AttentionProblem::new(AttentionSpec { gate: true, ..scalar_spec(1, 1) }).unwrap();
    let mut inputs = inputs(&[1.0], &[1.0], &[1.0]);
    inputs.gate = Some(vec![40.0]);
    let d_gate = backward(&problem, &inputs, &[1.0]).d_gate.unwrap();
    // 1 - sigmoid(40) would be 0 in f64.
    assert!((d_gate[0] / (-40_f64).exp() - 1.0).abs() < 1e-12, "{d_gate:?}");
}

/// A causal first query sees only the first key: probability 1, hence no gradient through the logit.
#[test]
fn causal_first_row_by_hand() {
    let mask = StructuralMask { causal: true, ..Default::default() };
    let problem = AttentionProblem::new(AttentionSpec { mask, ..scalar_spec(2, 2) }).unwrap();
    let inputs = inputs(&[5.0, 1.0], &[0.0, LN_3], &[2.0, 10.0]);
    let got = forward(&problem, &inputs);
    assert_close("out", &got.out, &[2.0, 8.0]);
    assert_close("lse", &got.lse, &[0.0, 4_f64.ln()]);
    let got = backward(&problem, &inputs, &[1.0, 0.0]);
    assert_close("dq", &got.dq, &[0.0, 0.0]);
    assert_close("dk", &got.dk, &[0.0, 0.0]);
    assert_close("dv", &got.dv, &[1.0, 0.0]);
}

/// Each way to exclude every key, and both kinds of empty rows.
#[test]
fn empty_rows_by_hand() {
    let base = AttentionSpec { gate: true, biases: vec![bias([1, 1, 1, 1, 2])], ..scalar_spec(1, 2) };
    let causal = StructuralMask { causal: true, k_offset: 1, ..Default::default() };
    let cases = [
        ("bias -inf", base.clone()),
        ("key_mask", AttentionSpec { key_mask: true, ..base.clone() }),
        ("kv_lengths", AttentionSpec { kv_lengths: Some(vec![0]), ..base.clone() }),
        ("segments", AttentionSpec { segments: true, ..base.clone() }),
        ("causal", AttentionSpec { mask: causal, ..base }),
    ];
    for (name, spec) in cases {
        let mut inputs = inputs(&[1.0], &[1.0, 2.0], &[2.0, 10.0]);
        inputs.gate = Some(vec![0.0]);
        inputs.biases = vec![vec![if name == "bias -inf" { f64::NEG_INFINITY } else { 0.0 }; 2]];
        inputs.key_mask = spec.key_mask.then(|| vec![false; 2]);
        inputs.q_segments = spec.segments.then(|| vec![1]);
        inputs.k_segments = spec.segments.then(|| vec![2; 2]);
        // Mean of v: 6, halved by the gate; d_gate = 1/4 · 6.
        for (empty_rows, out, dv, d_gate) in [(EmptyRows::Zero, 0.0, 0.0, 0.0), (EmptyRows::Uniform, 3.0, 0.25, 1.5)] {
            let problem = AttentionProblem::new(AttentionSpec { empty_rows, ..spec.clone() }).unwrap();
            let got = forward(&problem, &inputs);
            assert_close(name, &got.out, &[out]);
            assert_close(name, &got.lse, &[f64::NEG_INFINITY]);
            let got = backward(&problem, &inputs, &[1.0]);
            assert_close(name, &got.dv, &[dv; 2]);
            assert_close(name, &got.d_gate.unwrap(), &[d_gate]);
            for gradient in [&got.dq, &got.dk, &got.dbiases[0]] {
                assert!(gradient.iter().all(|&g| g == 0.0), "{name}: {gradient:?}");
            }
        }
    }
}

/// Finite biases are ordinary numbers, however low: a row of them is a softmax, not an empty row.
#[test]
fn row_of_minus_1e9_is_a_softmax() {
    let problem = AttentionProblem::new(AttentionSpec { biases: vec![bias([1; 5])], ..scalar_spec(1, 4) }).unwrap();
    let mut inputs = inputs(&[0.0], &[1.0; 4], &[1.0, 2.0, 3.0, 6.0]);
    inputs.biases = vec![vec![-1e9]];
    let got = forward(&problem, &inputs);
    assert_close("out", &got.out, &[3.0]);
    assert_close("lse", &got.lse, &[-1e9 + 4_f64.ln()]);
    let got = backward(&problem, &inputs, &[1.0]);
    assert_close("dk", &got.dk, &[0.0; 4]);
    // dS = 1/4 (v - 3)
    assert_close("dq", &got.dq, &[0.0]);
    assert_close("dv", &got.dv, &[0.25; 4]);
}

/// Slope ln 3: the key at distance 1 gets a third of the weight of the key at distance 0, on either side.
#[test]
fn alibi_by_hand() {
    let slope = f32::ln(3.0);
    for (q_offset, k_offset, out) in [(1, 0, 8.0), (0, 0, 4.0), (3, 2, 8.0), (-7, -7, 4.0)] {
        let mask = StructuralMask { alibi_slopes: Some(vec![slope]), q_offset, k_offset, ..Default::default() };
        let problem = AttentionProblem::new(AttentionSpec { mask, ..scalar_spec(1, 2) }).unwrap();
        let got = forward(&problem, &inputs(&[0.0], &[1.0, 1.0], &[2.0, 10.0]));
        // The slope is f32.
        assert!((got.out[0] - out).abs() < 1e-6, "{q_offset} {k_offset}: {:?}", got.out);
    }
}

#[test]
fn excluded_keys_hide_what_they_hold_and_nan_propagates() {
    let spec = AttentionSpec { kv_lengths: Some(vec![1]), ..scalar_spec(1, 2) };
    let problem = AttentionProblem::new(spec).unwrap();
    let hidden = inputs(&[1.0], &[3.0, f64::NAN], &[2.0, f64::NAN]);
    assert_close("out", &forward(&problem, &hidden).out, &[2.0]);
    let got = backward(&problem, &hidden, &[1.0]);
    assert_close("dv", &got.dv, &[1.0, 0.0]);
    assert_close("dk", &got.dk, &[0.0, 0.0]);
    let problem = AttentionProblem::new(AttentionSpec { kv_lengths: Some(vec![2]), ..scalar_spec(1, 3) }).unwrap();
    for k in [f64::NAN, f64::INFINITY] {
        let seen = inputs(&[1.0], &[k, 0.0, 0.0], &[2.0, 0.0, 0.0]);
        let got = forward(&problem, &seen);
        assert!(got.out[0].is_nan() && got.lse[0].is_nan(), "{got:?}");
        let got = backward(&problem, &seen, &[1.0]);
        assert!(got.dq[0].is_nan() && got.dk[..2].iter().chain(&got.dv[..2]).all(|g| g.is_nan()), "{got:?}");
        assert!(got.dk[2] == 0.0 && got.dv[2] == 0.0, "{got:?}");
    }
}

#[test]
fn views_are_read_in_any_layout_and_must_fit() {
    let spec = AttentionSpec { key_mask: true, segments: true, ..AttentionSpec::new(DType::F32, 1, 2, 3, 1, 1) };
    let problem = AttentionProblem::new(spec).unwrap();
    let (data, mask, ids) = ([1_f32, 2.0, 3.0, 4.0, 5.0, 6.0], [true, false, true], [4_i32, 5]);
    // Stored column by column.
    let q = TensorView::from_slice(&data, &[1, 3, 2, 1, 1]).unwrap().permute(&[0, 2, 1, 3, 4]).unwrap();
    let k = TensorView::from_slice(&data, &[1, 2, 3, 1, 1]).unwrap();
    let mask = TensorView::from_bools(&mask, &[1, 1, 3]).unwrap();
    let ids = TensorView::from_slice(&ids, &[1, 2, 1]).unwrap();
    let got = ReferenceInputs::from_views(&problem, &q, &k, &k, &[], Some(&mask), Some(&ids), Some(&ids), None);
    let got = got.unwrap();
    assert_close("q", &got.q, &[1.0, 3.0, 5.0, 2.0, 4.0, 6.0]);
    assert_eq!(got.key_mask.unwrap(), [true, false, true, true, false, true]);
    assert_eq!(got.q_segments.unwrap(), [4, 4, 4, 5, 5, 5]);
    let without = |mask, ids| ReferenceInputs::from_views(&problem, &q, &k, &k, &[], mask, ids, ids, None);
    let reason = "the problem has one";
    assert_eq!(without(None, Some(&ids)).unwrap_err(), ProblemError::Missing { tensor: "key_mask", reason });
    assert_eq!(without(Some(&mask), None).unwrap_err(), ProblemError::Missing { tensor: "q_segments", reason });
    let extra = ReferenceInputs::from_views(
        &problem,
        &q,
        &k,
        &k,
        std::slice::from_ref(&q),
        Some(&mask),
        Some(&ids),
        Some(&ids),
        None,
    );
    assert_eq!(extra.unwrap_err(), ProblemError::Length { list: "biases", expected: "0".into(), got: 1 });
}

#[test]
fn inputs_that_do_not_fit_give_nan() {
    let problem = AttentionProblem::new(scalar_spec(1, 2)).unwrap();
    let short = inputs(&[1.0], &[1.0], &[1.0, 1.0]);
    assert!(forward(&problem, &short).out[0].is_nan());
    let mut right = inputs(&[1.0], &[1.0, 1.0], &[1.0, 1.0]);
    assert!(backward(&problem, &right, &[]).dk.iter().all(|g| g.is_nan()));
    right.gate = Some(vec![0.0]);
    assert!(forward(&problem, &right).out[0].is_nan());
}

/// Reproducible numbers in -1..1 (splitmix64), since this crate has no random numbers of its own.
struct Random(u64);

impl Random {
    fn next(&mut self) -> f64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let z = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        let z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        as_f64((z ^ (z >> 31)) >> 11) / as_f64(1 << 52) - 1.0
    }

    fn vec(&mut self, shape: &[usize]) -> Vec<f64> {
        (0..elements(shape).unwrap()).map(|_| self.next()).collect()
    }
}

/// Inputs of every kind the problem has; a tenth of each bias that has a key axis is -inf.
fn random_inputs(problem: &AttentionProblem, random: &mut Random) -> ReferenceInputs {
    let s = problem.spec();
    let (queries, keys) = ([s.batch, s.rows, s.seqlen_q], [s.batch, s.rows, s.seqlen_k]);
    let mut list = |wanted: bool, shape: &[usize]| wanted.then(|| random.vec(shape));
    let ids = |values: Vec<f64>| values.iter().map(|&x| i32::from(x > 0.3)).collect();
    let (key_mask, q_ids, k_ids) = (list(s.key_mask, &keys), list(s.segments, &queries), list(s.segments, &keys));
    let gate = list(s.gate, &problem.out_shape());
    let biases = s.biases.iter().map(|bias| {
        let values = random.vec(&bias.shape).into_iter();
        values.map(|x| if x > 0.8 && bias.shape[4] > 1 { f64::NEG_INFINITY } else { x }).collect()
    });
    ReferenceInputs {
        biases: biases.collect(),
        q: random.vec(&problem.q_shape()),
        k: random.vec(&problem.k_shape()),
        v: random.vec(&problem.v_shape()),
        key_mask: key_mask.map(|values| values.iter().map(|&x| x > -0.7).collect()),
        q_segments: q_ids.map(ids),
        k_segments: k_ids.map(ids),
        gate,
    }
}

/// Compares every entry of every gradient with a central difference of `Σ d_out · out`.
///
/// The step h = 2⁻¹⁷ is near the cube root of the f64 roundoff, where both errors are small: truncation h²/6 |f'''| is
/// 10⁻¹¹ |f'''|, cancellation 2⁻⁵³ |f| / h is 10⁻¹¹ |f| for each rounding of a sum of some hundred terms, with |f| below
/// 100. A tolerance of 10⁻⁷ leaves room for both; a wrong term shows at 10⁻² and above.
fn check_gradients(problem: &AttentionProblem, seed: u64) {
    const STEP: f64 = 1.0 / 131_072.0;
    let mut random = Random(seed);
    let mut inputs = random_inputs(problem, &mut random);
    let d_out = random.vec(&problem.out_shape());
    let got = backward(problem, &inputs, &d_out);
    let loss = |inputs: &ReferenceInputs| dot(&forward(problem, inputs).out, &d_out);
    let mut check = |name: &str, gradient: &[f64], field: &dyn Fn(&mut ReferenceInputs) -> &mut Vec<f64>| {
        assert_eq!(gradient.len(), field(&mut inputs).len(), "{name}");
        for (i, &got) in gradient.iter().enumerate() {
            let original = field(&mut inputs)[i];
            field(&mut inputs)[i] = original + STEP;
            let above = loss(&inputs);
            field(&mut inputs)[i] = original - STEP;
            let expected = (above - loss(&inputs)) / (2.0 * STEP);
            field(&mut inputs)[i] = original;
            let error = (got - expected).abs();
            assert!(error <= 1e-7 * got.abs().max(1.0), "seed {seed}, {name}[{i}]: got {got}, expected {expected}");
        }
    };
    check("dq", &got.dq, &|inputs| &mut inputs.q);
    check("dk", &got.dk, &|inputs| &mut inputs.k);
    check("dv", &got.dv, &|inputs| &mut inputs.v);
    for (b, dbias) in got.dbiases.iter().enumerate() {
        // A bias without a key axis shifts whole rows, which a softmax does not see.
        let shifts_rows = problem.spec().biases[b].shape[4] == 1;
        assert_eq!(dbias.iter().any(|&g| g.abs() > 1e-3), !shifts_rows, "seed {seed}, dbias{b}: {dbias:?}");
        check(&format!("dbias{b}"), dbias, &move |inputs| &mut inputs.biases[b]);
    }
    if let Some(d_gate) = &got.d_gate {
        check("d_gate", d_gate, &|inputs| inputs.gate.as_mut().unwrap());
    }
}

/// Every feature at once: the last (batch, row) has no keys, and masks leave more rows empty.
fn full_spec(empty_rows: EmptyRows) -> AttentionSpec {
    AttentionSpec {
        seqlen_k: 6,
        kv_heads: 2,
        head_dim_v: 2,
        biases: vec![bias([2, 1, 4, 5, 6]), bias([1, 2, 1, 1, 6]), bias([2, 2, 4, 5, 1])],
        key_mask: true,
        kv_lengths: Some(vec![6, 4, 5, 0]),
        segments: true,
        mask: StructuralMask {
            causal: true,
            window: Some(Window { left: Some(3), right: None }),
            alibi_slopes: Some(vec![0.5, 0.25, 0.125, -0.25]),
            q_offset: 12,
            k_offset: 10,
        },
        gate: true,
        empty_rows,
        ..AttentionSpec::new(DType::F32, 2, 2, 5, 4, 3)
    }
}

/// Finite differences cannot tell whether heads, rows or batches are mixed up, so each query is computed alone as well.
#[test]
fn every_query_agrees_with_a_problem_of_its_own() {
    let index = |shape: &[usize], at: &[usize]| shape.iter().zip(at).fold(0, |i, (n, at)| i * n + at.min(&(n - 1)));
    let problem = AttentionProblem::new(full_spec(EmptyRows::Uniform)).unwrap();
    let (s, all) = (problem.spec(), random_inputs(&problem, &mut Random(11)));
    let got = forward(&problem, &all);
    for ((b, n), (i, h)) in
        (0..4).map(|bn| (bn / 2, bn % 2)).flat_map(|bn| (0..20).map(move |ih| (bn, (ih / 4, ih % 4))))
    {
        let mut mask = StructuralMask { q_offset: s.mask.q_offset + i64::try_from(i).unwrap(), ..s.mask.clone() };
        mask.alibi_slopes = mask.alibi_slopes.map(|slopes| vec![slopes[h]]);
        let own = AttentionSpec {
            batch: 1,
            rows: 1,
            seqlen_q: 1,
            heads: 1,
            kv_heads: 1,
            biases: vec![bias([1, 1, 1, 1, 6])],
            kv_lengths: s.kv_lengths.as_ref().map(|lengths| vec![lengths[2 * b + n]]),
            mask,
            ..s.clone()
        };
        let take = |data: &[f64], shape: &[usize; 5], l: usize, h: usize| -> Vec<f64> {
            (0..shape[4]).map(|c| data[index(shape, &[b, n, l, h, c])]).collect()
        };
        let keys = |data: &[f64], shape: &[usize; 5]| -> Vec<f64> {
            // Heads 0 and 1 share the first key head, 2 and 3 the second.
            (0..6).flat_map(|key| take(data, shape, key, h / 2)).collect()
        };
        let biases = |key| {
            let values =
                all.biases.iter().zip(&s.biases).map(|(bias, spec)| bias[index(&spec.shape, &[b, n, h, i, key])]);
            values.sum()
        };
        let alone = ReferenceInputs {
            q: take(&all.q, &problem.q_shape(), i, h),
            k: keys(&all.k, &problem.k_shape()),
            v: keys(&all.v, &problem.v_shape()),
            biases: vec![(0..6).map(biases).collect()],
            key_mask: all
                .key_mask
                .as_ref()
                .map(|mask| (0..6).map(|key| mask[index(&[2, 2, 6], &[b, n, key])]).collect()),
            q_segments: all.q_segments.as_ref().map(|ids| vec![ids[index(&[2, 2, 5], &[b, n, i])]]),
            k_segments: all
                .k_segments
                .as_ref()
                .map(|ids| (0..6).map(|key| ids[index(&[2, 2, 6], &[b, n, key])]).collect()),
            gate: all.gate.as_ref().map(|gate| take(gate, &problem.out_shape(), i, h)),
        };
        let expected = forward(&AttentionProblem::new(own).unwrap(), &alone);
        assert_close("out", &take(&got.out, &problem.out_shape(), i, h), &expected.out);
        assert_close("lse", &[got.lse[index(&problem.lse_shape(), &[b, n, h, i])]], &expected.lse);
    }
}

#[test]
fn gradients_of_every_feature_match_central_differences() {
    for empty_rows in [EmptyRows::Zero, EmptyRows::Uniform] {
        for seed in 1..4 {
            let problem = AttentionProblem::new(full_spec(empty_rows)).unwrap();
            let lse = forward(&problem, &random_inputs(&problem, &mut Random(seed))).lse;
            let empty = lse.iter().filter(|lse| **lse == f64::NEG_INFINITY).count();
            assert!(empty > 20 && lse.len() - empty > 20, "seed {seed}: {empty} empty rows of {}", lse.len());
            check_gradients(&problem, seed);
        }
    }
}

#[test]
fn gradients_of_every_broadcast_pattern_match_central_differences() {
    for pattern in 0_u64..32 {
        let spec = AttentionSpec { seqlen_k: 4, kv_heads: 1, ..AttentionSpec::new(DType::F32, 2, 2, 3, 2, 9) };
        let full = [spec.batch, spec.rows, spec.heads, spec.seqlen_q, spec.seqlen_k];
        let shape = std::array::from_fn(|axis| if pattern >> axis & 1 == 1 { full[axis] } else { 1 });
        let biases = vec![bias(shape)];
        check_gradients(&AttentionProblem::new(AttentionSpec { biases, ..spec }).unwrap(), pattern);
    }
}

/// Equations (17)-(18): attention over two parts of the keys, merged, is attention over all of them.
#[test]
fn parts_of_the_keys_merge() {
    let causal = |k_offset| StructuralMask { causal: true, q_offset: 2, k_offset, ..Default::default() };
    let spec = |seqlen_k, k_offset| AttentionSpec { mask: causal(k_offset), ..scalar_spec(8, seqlen_k) };
    let mut random = Random(7);
    let (q, k, v) = (random.vec(&[8]), random.vec(&[9]), random.vec(&[9]));
    let run = |keys: std::ops::Range<usize>| {
        let problem = AttentionProblem::new(spec(keys.len(), i64::try_from(keys.start).unwrap())).unwrap();
        forward(&problem, &inputs(&q, &k[keys.clone()], &v[keys]))
    };
    let (all, a, b) = (run(0..9), run(0..5), run(5..9));
    assert!(b.lse[0] == f64::NEG_INFINITY && b.lse[7].is_finite());
    for i in 0..8 {
        let max = a.lse[i].max(b.lse[i]);
        let (weight_a, weight_b) = ((a.lse[i] - max).exp(), (b.lse[i] - max).exp());
        let sum = weight_a + weight_b;
        assert_close("lse", &[max + sum.ln()], &all.lse[i..=i]);
        assert_close("out", &[(weight_a * a.out[i] + weight_b * b.out[i]) / sum], &all.out[i..=i]);
    }
}
