//! How far rounding may move each result: a first-order running error analysis of fused attention.
//!
//! With u the unit roundoff of f32, w that of the dtype, L keys or queries, D channels, and magnitudes for values:
//!
//! ```text
//! logit    e_s  = u (D + 4) (scale |q||k| + |bias|)             products exact, sums in f32
//! p        e_p  = p (2 max e_s + (L + 16) u + w)                exp and its sum in f32, then rounded to the dtype
//! out      e_o  = Σ e_p |v| + w |out|
//! dP       e_dP = (w + (D + 4) u) |dO||v|                       dO = gate ⊙ d_out in the dtype
//! delta    e_de = |d_out| e_o + (D + 4) u |d_out||out|
//! dS       e_dS = (e_p / p + w) p (|dP| + |delta|) + p (e_dP + e_de)
//! dV = Pᵀ dO, dQ = scale dS K, dK = scale dSᵀ Q, dbias = Σ dS   errors summed, and L u and w of the sums
//! ```
//!
//! It bounds the largest error there may be, not the usual one, so correct kernels stay well below it; a wrong or missing term
//! does not. Subnormal results may lose everything, hence the smallest normal number is added.

use tilefold::AttentionProblem;
use tilefold::DType;
use tilefold::reference::{ReferenceForward, ReferenceInputs};

use crate::output::as_f64;

/// Unit roundoffs of a problem.
#[derive(Clone, Copy, Debug)]
pub(super) struct Precision {
    /// Of sums: f32.
    sum: f64,
    /// Of what enters a product: that of the dtype, 0 for f32, whose rounding is counted in the sums.
    product: f64,
    /// Of results.
    pub(super) result: f64,
    /// Rows a bias gradient sums over; a crop has fewer.
    rows: f64,
}

impl Precision {
    pub(super) fn of(problem: &AttentionProblem) -> Self {
        let dtype = problem.spec().dtype;
        let result = dtype.unit_roundoff();
        let product = if dtype == DType::F32 { 0.0 } else { result };
        Self { sum: DType::F32.unit_roundoff(), product, result, rows: as_f64(problem.spec().rows) }
    }
}

/// Largest explicable error of each value of each result.
#[derive(Debug)]
pub(super) struct Bounds {
    pub(super) out: Vec<f64>,
    pub(super) dq: Vec<f64>,
    pub(super) dk: Vec<f64>,
    pub(super) dv: Vec<f64>,
    pub(super) d_gate: Vec<f64>,
    /// Without the final rounding, which is that of the sum over all rows.
    pub(super) dbias: Vec<f64>,
}

/// One (row, head, query), with its place in each tensor.
struct Query<'a> {
    q: &'a [f64],
    d_out: &'a [f64],
    out: &'a [f64],
    /// σ(gate), all 1 without a gate.
    gate: Vec<f64>,
    p: Vec<f64>,
    /// Relative error of p.
    p_error: f64,
}

impl Bounds {
    /// For batch 1, as many key heads as query heads, at most one bias (shared by rows), key mask, gate.
    pub(super) fn new(
        problem: &AttentionProblem,
        inputs: &ReferenceInputs,
        d_out: &[f64],
        forward: &ReferenceForward,
        precision: &Precision,
    ) -> Self {
        let spec = problem.spec();
        let tiny = f64::from(f32::MIN_POSITIVE);
        let zeros = |from: &[f64]| vec![tiny; from.len()];
        let mut bounds = Self {
            out: zeros(&forward.out),
            dq: zeros(&inputs.q),
            dk: zeros(&inputs.k),
            dv: zeros(&inputs.v),
            d_gate: zeros(&forward.out),
            dbias: inputs.biases.first().map(|bias| zeros(bias)).unwrap_or_default(),
        };
        let analysis = Analysis { problem, inputs, precision };
        for row in 0..spec.rows {
            for query in 0..spec.seqlen_q {
                for head in 0..spec.heads {
                    let place = ((row * spec.seqlen_q + query) * spec.heads + head) * spec.head_dim;
                    let lse = forward.lse[(row * spec.heads + head) * spec.seqlen_q + query];
                    let at = At { row, query, head, channels: place..place + spec.head_dim };
                    let query = analysis.query(&at, lse, d_out, &forward.out);
                    analysis.add(&at, &query, &mut bounds);
                }
            }
        }
        bounds
    }
}

/// Where one query's values are.
struct At {
    row: usize,
    query: usize,
    head: usize,
    channels: std::ops::Range<usize>,
}

struct Analysis<'a> {
    problem: &'a AttentionProblem,
    inputs: &'a ReferenceInputs,
    precision: &'a Precision,
}

impl<'a> Analysis<'a> {
    /// Elements of a key in k and v.
    fn key(&self, at: &At, key: usize) -> std::ops::Range<usize> {
        let spec = self.problem.spec();
        let start = ((at.row * spec.seqlen_k + key) * spec.heads + at.head) * spec.head_dim;
        start..start + spec.head_dim
    }

    /// Element of the bias.
    fn bias(&self, at: &At, key: usize) -> usize {
        let spec = self.problem.spec();
        (at.head * spec.seqlen_q + at.query) * spec.seqlen_k + key
    }

    fn query(&self, at: &At, lse: f64, d_out: &'a [f64], out: &'a [f64]) -> Query<'a> {
        let (spec, inputs, precision) = (self.problem.spec(), self.inputs, self.precision);
        let q = &inputs.q[at.channels.clone()];
        let scale = self.problem.softmax_scale();
        let mut worst_logit = 0.0_f64;
        let mut p = vec![0.0; spec.seqlen_k];
        for (key, p) in p.iter_mut().enumerate() {
            if inputs.key_mask.as_ref().is_some_and(|mask| !mask[at.row * spec.seqlen_k + key]) {
                continue;
            }
            let k = &inputs.k[self.key(at, key)];
            let bias = inputs.biases.first().map_or(0.0, |bias| bias[self.bias(at, key)]);
            let logit = scale * q.iter().zip(k).map(|(q, k)| q * k).sum::<f64>() + bias;
            let size = scale.abs() * q.iter().zip(k).map(|(q, k)| (q * k).abs()).sum::<f64>() + bias.abs();
            worst_logit = worst_logit.max(size);
            *p = (logit - lse).exp();
        }
        let channels = as_f64(spec.head_dim) + 4.0;
        let p_error = 2.0 * channels * precision.sum * worst_logit
            + (as_f64(spec.seqlen_k) + 16.0) * precision.sum
            + precision.product;
        let gate = match &inputs.gate {
            Some(gate) => gate[at.channels.clone()].iter().map(|gate| 1.0 / (1.0 + (-gate).exp())).collect(),
            None => vec![1.0; spec.head_dim],
        };
        Query { q, d_out: &d_out[at.channels.clone()], out: &out[at.channels.clone()], gate, p, p_error }
    }

    fn add(&self, at: &At, query: &Query<'_>, bounds: &mut Bounds) {
        let (spec, precision) = (self.problem.spec(), self.precision);
        let channels = (as_f64(spec.head_dim) + 4.0) * precision.sum;
        let mut out_error = vec![0.0; spec.head_dim];
        for (key, &p) in query.p.iter().enumerate().filter(|(_, p)| **p != 0.0) {
            let v = &self.inputs.v[self.key(at, key)];
            out_error.iter_mut().zip(v).for_each(|(error, v)| *error += query.p_error * p * v.abs());
        }
        let (mut delta, mut delta_error) = (0.0, 0.0);
        for (c, error) in out_error.iter().enumerate() {
            let (d_out, out, gate) = (query.d_out[c].abs(), query.out[c].abs(), query.gate[c]);
            let rounding = (precision.result + 8.0 * precision.sum) * out;
            let out_error = error * gate + rounding;
            bounds.out[at.channels.start + c] += out_error;
            delta += query.d_out[c] * query.out[c];
            delta_error += d_out * (out_error + channels * out);
            // d_gate = d_out · out · (1 - σ): errors of out, of its own rounding, and of 1 - σ.
            bounds.d_gate[at.channels.start + c] +=
                d_out * ((1.0 - gate) * (out_error + rounding) + 8.0 * precision.sum * out);
        }
        for (key, &p) in query.p.iter().enumerate().filter(|(_, p)| **p != 0.0) {
            self.add_key(at, query, key, p, [delta.abs(), delta_error], bounds);
        }
    }

    fn add_key(
        &self,
        at: &At,
        query: &Query<'_>,
        key: usize,
        p: f64,
        [delta, delta_error]: [f64; 2],
        bounds: &mut Bounds,
    ) {
        let (spec, precision) = (self.problem.spec(), self.precision);
        let channels = (as_f64(spec.head_dim) + 4.0) * precision.sum;
        let length = as_f64(spec.seqlen_q.max(spec.seqlen_k)) * precision.sum;
        let (in_k, scale) = (self.key(at, key), self.problem.softmax_scale().abs());
        let v = &self.inputs.v[in_k.clone()];
        let d_o = |c: usize| (query.d_out[c] * query.gate[c]).abs();
        let dp: f64 = (0..spec.head_dim).map(|c| d_o(c) * v[c].abs()).sum();
        // The sum over queries and the final rounding are taken of magnitudes: no more than the true ones.
        let sums = length + precision.result;
        let ds = p * (dp + delta);
        let ds_error =
            (query.p_error + precision.product + sums) * ds + p * ((precision.product + channels) * dp + delta_error);
        for c in 0..spec.head_dim {
            let (q, k) = (query.q[c].abs(), self.inputs.k[in_k.start + c].abs());
            bounds.dv[in_k.start + c] += (query.p_error + precision.product + sums) * p * d_o(c);
            bounds.dq[at.channels.start + c] += scale * ds_error * k;
            bounds.dk[in_k.start + c] += scale * ds_error * q;
        }
        if !bounds.dbias.is_empty() {
            let place = self.bias(at, key);
            bounds.dbias[place] += ds_error + precision.rows * precision.sum * ds;
        }
    }
}
