//! Each variant against f64 loops written from the algorithm's indices, which know nothing of views.

use super::*;
use crate::{ProblemError, Tensor};

const BATCH: usize = 2;
const HEADS: usize = 2;
const CHANNELS: usize = 4;

/// Seeded values in -1..1 that f32 holds exactly.
fn values(seed: u32, count: usize) -> Vec<f64> {
    let mut state = seed.wrapping_mul(2_654_435_761).wrapping_add(1);
    let mut next = || {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        f64::from(state >> 16) / 32_768.0 - 1.0
    };
    (0..count).map(|_| next()).collect()
}

/// Indices of what output (x, y) meets at key t.
type Indices = fn(usize, usize, usize) -> (usize, usize);

/// One attention as its algorithm writes it: the output at (x, y) sees `keys` positions.
struct Algorithm {
    variant: Variant,
    /// Sizes of the two middle axes.
    size: [usize; 2],
    keys: usize,
    /// Position of key t for output (x, y).
    key: Indices,
    /// Indices of the pair bias for output (x, y) and key t.
    bias: Option<Indices>,
}

fn algorithms() -> [Algorithm; 4] {
    let (msa, pair) = ([3, 5], [5, 5]);
    [
        // 7: a_sij = q_si · k_sj + b_ij, output (s, i)
        Algorithm { variant: Variant::MsaRow, size: msa, keys: 5, key: |s, _, j| (s, j), bias: Some(|_, i, j| (i, j)) },
        // 8: a_sti = q_si · k_ti, output (s, i)
        Algorithm { variant: Variant::MsaColumn, size: msa, keys: 3, key: |_, i, t| (t, i), bias: None },
        // 13: a_ijk = q_ij · k_ik + b_jk, output (i, j)
        Algorithm {
            variant: Variant::TriangleStarting,
            size: pair,
            keys: 5,
            key: |i, _, k| (i, k),
            bias: Some(|_, j, k| (j, k)),
        },
        // 14: a_ijk = q_ij · k_kj + b_ki, output (i, j)
        Algorithm {
            variant: Variant::TriangleEnding,
            size: pair,
            keys: 5,
            key: |_, j, k| (k, j),
            bias: Some(|i, _, k| (k, i)),
        },
    ]
}

struct Data {
    q: Vec<f64>,
    k: Vec<f64>,
    v: Vec<f64>,
    gate: Vec<f64>,
    bias: Vec<f64>,
    d_out: Vec<f64>,
    mask: Vec<bool>,
}

#[derive(Default)]
struct Expected {
    out: Vec<f64>,
    dq: Vec<f64>,
    dk: Vec<f64>,
    dv: Vec<f64>,
    d_gate: Vec<f64>,
    dbias: Vec<f64>,
}

fn sigmoid(x: f64) -> f64 {
    1.0 / (1.0 + (-x).exp())
}

fn dot(a: &[f64], b: &[f64]) -> f64 {
    a.iter().zip(b).map(|(a, b)| a * b).sum()
}

impl Algorithm {
    fn data(&self) -> Data {
        let [a, b] = self.size;
        let tokens = BATCH * a * b * HEADS * CHANNELS;
        let seeded = |seed| values(seed, tokens);
        let mut mask: Vec<bool> = values(6, BATCH * a * b).iter().map(|&value| value > -0.5).collect();
        // In batch 0 row 0 and column 0 have no key at all.
        (0..b).for_each(|y| mask[y] = false);
        (0..a).for_each(|x| mask[x * b] = false);
        let bias = values(5, BATCH * HEADS * b * b);
        Data { q: seeded(1), k: seeded(2), v: seeded(3), gate: seeded(4), bias, d_out: seeded(7), mask }
    }

    /// Forward and backward, output by output.
    fn expected(&self, data: &Data) -> Expected {
        let zeros = || vec![0.0; data.q.len()];
        let mut expected = Expected {
            out: zeros(),
            dq: zeros(),
            dk: zeros(),
            dv: zeros(),
            d_gate: zeros(),
            dbias: vec![0.0; data.bias.len()],
        };
        for batch in 0..BATCH {
            for x in 0..self.size[0] {
                for y in 0..self.size[1] {
                    (0..HEADS).for_each(|head| self.expected_at(data, [batch, x, y, head], &mut expected));
                }
            }
        }
        expected
    }

    fn token(&self, [batch, x, y, head]: [usize; 4]) -> usize {
        (((batch * self.size[0] + x) * self.size[1] + y) * HEADS + head) * CHANNELS
    }

    fn expected_at(&self, data: &Data, at: [usize; 4], expected: &mut Expected) {
        let [batch, x, y, head] = at;
        let (here, scale) = (self.token(at), 0.5); // 1/√4
        let q = &data.q[here..here + CHANNELS];
        // (token of the key, index of its bias, logit)
        let mut seen = Vec::new();
        for t in 0..self.keys {
            let (kx, ky) = (self.key)(x, y, t);
            if data.mask[(batch * self.size[0] + kx) * self.size[1] + ky] {
                let key = self.token([batch, kx, ky, head]);
                let n_res = self.size[1];
                let bias = self.bias.map(|bias| bias(x, y, t));
                let bias = bias.map(|(i, j)| ((batch * HEADS + head) * n_res + i) * n_res + j);
                let logit = scale * dot(q, &data.k[key..key + CHANNELS]) + bias.map_or(0.0, |at| data.bias[at]);
                seen.push((key, bias, logit));
            }
        }
        let sum: f64 = seen.iter().map(|(.., logit)| logit.exp()).sum();
        let p: Vec<f64> = seen.iter().map(|(.., logit)| logit.exp() / sum).collect();
        let mut dp = vec![0.0; seen.len()];
        for c in 0..CHANNELS {
            let attended: f64 = seen.iter().zip(&p).map(|((key, ..), p)| p * data.v[key + c]).sum();
            let (open, d_out) = (sigmoid(data.gate[here + c]), data.d_out[here + c]);
            expected.out[here + c] = open * attended;
            expected.d_gate[here + c] = d_out * attended * open * (1.0 - open);
            for ((key, ..), (p, dp)) in seen.iter().zip(p.iter().zip(&mut dp)) {
                expected.dv[key + c] += p * open * d_out;
                *dp += open * d_out * data.v[key + c];
            }
        }
        let mean: f64 = dot(&p, &dp);
        for ((key, bias, _), (p, dp)) in seen.iter().zip(p.iter().zip(&dp)) {
            let ds = p * (dp - mean);
            for (c, q) in q.iter().enumerate() {
                expected.dq[here + c] += scale * ds * data.k[key + c];
                expected.dk[key + c] += scale * ds * q;
            }
            bias.iter().for_each(|&at| expected.dbias[at] += ds);
        }
    }
}

fn tensor(values: &[f64], shape: &[usize]) -> Tensor {
    Tensor::from_f64(values, crate::DType::F32, shape).unwrap()
}

fn assert_close(what: &str, got: &Tensor, shape: &[usize], expected: &[f64]) {
    assert_eq!(got.shape(), shape, "{what}");
    let got = got.to_f64().unwrap();
    assert!(expected.iter().any(|value| value.abs() > 1e-3), "{what}: nothing to compare");
    for (i, (got, expected)) in got.iter().zip(expected).enumerate() {
        assert!((got - expected).abs() < 2e-6 * (1.0 + expected.abs()), "{what}[{i}]: {got} instead of {expected}");
    }
}

#[test]
fn variants_are_their_algorithms() {
    let device = Device::cpu().unwrap();
    for algorithm in algorithms() {
        let (data, name) = (algorithm.data(), algorithm.variant.name());
        let expected = algorithm.expected(&data);
        let [a, b] = algorithm.size;
        let shape = [BATCH, a, b, HEADS, CHANNELS];
        let [q, k, v, gate, d_out] =
            [&data.q, &data.k, &data.v, &data.gate, &data.d_out].map(|values| tensor(values, &shape));
        let bias = tensor(&data.bias, &[BATCH, HEADS, b, b]);
        let mut inputs = Inputs::new(q.view(), k.view(), v.view());
        inputs.gate = Some(gate.view());
        inputs.mask = Some(TensorView::from_bools(&data.mask, &[BATCH, a, b]).unwrap());
        inputs.pair_bias = algorithm.bias.map(|_| bias.view());

        let forward = algorithm.variant.forward(&device, &inputs).unwrap();
        assert_close(name, &forward.out, &shape, &expected.out);
        let gradients = inputs.all_gradients();
        let backward = algorithm.variant.backward(&device, &inputs, &forward, &d_out.view(), gradients).unwrap();
        for (what, got, expected) in [
            ("dq", &backward.dq, &expected.dq),
            ("dk", &backward.dk, &expected.dk),
            ("dv", &backward.dv, &expected.dv),
            ("d_gate", &backward.d_gate, &expected.d_gate),
        ] {
            assert_close(&format!("{name} {what}"), got.as_ref().unwrap(), &shape, expected);
        }
        assert_eq!(backward.dbiases.len(), usize::from(algorithm.bias.is_some()));
        for dbias in &backward.dbiases {
            assert_close(&format!("{name} dbias"), dbias.as_ref().unwrap(), bias.shape(), &expected.dbias);
        }
    }
}

#[test]
fn deepspeed_shapes_equal_the_row_variant() {
    let device = Device::cpu().unwrap();
    let [row, ..] = algorithms();
    let data = row.data();
    let [a, b] = row.size;
    let shape = [BATCH, a, b, HEADS, CHANNELS];
    let [q, k, v, d_out] = [&data.q, &data.k, &data.v, &data.d_out].map(|values| tensor(values, &shape));
    // Every row keeps at least one key: -1e9 and a mask then give the same.
    let keep: Vec<bool> = data.mask.iter().enumerate().map(|(i, &keep)| keep || i % b == 1).collect();
    let bias1: Vec<f64> = keep.iter().map(|&keep| if keep { 0.0 } else { -1e9 }).collect();
    let bias1 = tensor(&bias1, &[BATCH, a, 1, 1, b]);
    let bias2 = tensor(&data.bias, &[BATCH, 1, HEADS, b, b]);
    let biases = [Some(bias1.view()), Some(bias2.view())];
    let forward = evoformer_attention(&device, &q.view(), &k.view(), &v.view(), &biases).unwrap();
    let all = Gradients { q: true, k: true, v: true, gate: false, biases: [true, true, false, false] };
    let views = (q.view(), k.view(), v.view(), d_out.view());
    let backward =
        evoformer_attention_backward(&device, &views.0, &views.1, &views.2, &biases, &forward, &views.3, all).unwrap();

    let bias = tensor(&data.bias, &[BATCH, HEADS, b, b]);
    let mut inputs = Inputs::new(q.view(), k.view(), v.view());
    inputs.mask = Some(TensorView::from_bools(&keep, &[BATCH, a, b]).unwrap());
    inputs.pair_bias = Some(bias.view());
    let same = msa_row(&device, &inputs).unwrap();
    let gradients = msa_row_backward(&device, &inputs, &same, &views.3, inputs.all_gradients()).unwrap();
    assert_close("out", &forward.out, &shape, &same.out.to_f64().unwrap());
    for (what, got, expected) in
        [("dq", &backward.dq, &gradients.dq), ("dk", &backward.dk, &gradients.dk), ("dv", &backward.dv, &gradients.dv)]
    {
        assert_close(what, got.as_ref().unwrap(), &shape, &expected.as_ref().unwrap().to_f64().unwrap());
    }
    let dbias2 = gradients.dbiases[0].as_ref().unwrap().to_f64().unwrap();
    assert_close("dbias2", backward.dbiases[1].as_ref().unwrap(), &[BATCH, 1, HEADS, b, b], &dbias2);
    assert_eq!(backward.dbiases[0].as_ref().unwrap().shape(), [BATCH, a, 1, 1, b]);

    // With bias1 absent, bias2 still answers to its own number.
    let alone = [None, Some(bias2.view())];
    let forward = evoformer_attention(&device, &views.0, &views.1, &views.2, &alone).unwrap();
    let only = Gradients { biases: [false, true, false, false], ..Gradients::default() };
    let backward =
        evoformer_attention_backward(&device, &views.0, &views.1, &views.2, &alone, &forward, &views.3, only).unwrap();
    assert!(backward.dq.is_none() && backward.dbiases[0].is_none() && backward.dbiases[1].is_some());
    let error = evoformer_attention_backward(&device, &views.0, &views.1, &views.2, &alone, &forward, &views.3, all)
        .unwrap_err();
    assert!(matches!(error, Error::Problem(ProblemError::Unexpected { tensor: "dbias1", .. })), "{error}");
}

#[test]
fn bad_shapes_are_named() {
    let device = Device::cpu().unwrap();
    let zeros = |shape: &[usize]| Tensor::zeros(crate::DType::F32, shape).unwrap();
    let (msa, other, flat) = (zeros(&[1, 3, 5, 2, 4]), zeros(&[1, 3, 4, 2, 4]), zeros(&[3, 5, 2, 4]));
    let (bias, mask) = (zeros(&[1, 2, 5, 4]), Tensor::zeros(crate::DType::Bool, &[1, 5, 3]).unwrap());
    let plain = || Inputs::new(msa.view(), msa.view(), msa.view());
    let cases = [
        (Variant::MsaRow, Inputs::new(flat.view(), msa.view(), msa.view()), "q: expected 5 dimensions, got 4"),
        (Variant::MsaRow, Inputs::new(msa.view(), other.view(), msa.view()), "k: n_res must be 5, got 4"),
        (Variant::MsaColumn, Inputs::new(msa.view(), msa.view(), other.view()), "v: n_res must be 5, got 4"),
        (Variant::TriangleEnding, plain(), "q: n_res (end) must be 3, got 5"),
        (Variant::MsaRow, Inputs { gate: Some(other.view()), ..plain() }, "gate: n_res must be 5, got 4"),
        (
            Variant::MsaRow,
            Inputs { pair_bias: Some(bias.view()), ..plain() },
            "pair_bias: n_res (j) must be 1 or 5 to broadcast, got 4",
        ),
        (
            Variant::MsaColumn,
            Inputs { pair_bias: Some(bias.view()), ..plain() },
            "pair_bias: expected none, got one; column-wise attention takes no pair bias; leave it out",
        ),
        (
            Variant::MsaColumn,
            Inputs { mask: Some(mask.view()), ..plain() },
            "mask: n_seq must be 1 or 3 to broadcast, got 5",
        ),
    ];
    for (variant, inputs, message) in cases {
        assert_eq!(variant.forward(&device, &inputs).unwrap_err().to_string(), message);
    }
    let half = Tensor::zeros(crate::DType::F16, msa.shape()).unwrap();
    let products = Products::Tf32;
    let rounded = Inputs { products, ..Inputs::new(half.view(), half.view(), half.view()) };
    let refused = msa_row(&device, &rounded).unwrap_err().to_string();
    assert_eq!(refused, "products: tf32 is for dtype f32, got f16; leave it at exact");
    let forward = msa_row(&device, &plain()).unwrap();
    let wrong = msa_row_backward(&device, &plain(), &forward, &other.view(), plain().all_gradients());
    assert_eq!(wrong.unwrap_err().to_string(), "d_out: n_res must be 5, got 4");
    let absent = Gradients { biases: [true, false, false, false], ..Gradients::default() };
    let wrong = msa_row_backward(&device, &plain(), &forward, &msa.view(), absent);
    assert!(matches!(wrong, Err(Error::Problem(ProblemError::Unexpected { tensor: "dbias0", .. }))));
    let short = [None, Some(zeros(&[1, 1, 2, 5, 4]))];
    let biases = [None, short[1].as_ref().map(Tensor::view)];
    let error = evoformer_attention(&device, &msa.view(), &msa.view(), &msa.view(), &biases).unwrap_err();
    assert_eq!(error.to_string(), "bias2: L (key) must be 5, got 4");
}
