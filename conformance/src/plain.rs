//! The computation a backend is measured against: unfused attention in the problem's own dtype, as a framework does it.
//!
//! Inputs in the dtype; products, sums and softmax in f32; rounded to the dtype where a framework stores a tensor in
//! it: q times the scale, the probabilities before they meet v, the gated gradient, dS before it meets q and k,
//! outputs. What the contract keeps in f32 stays in f32 here too: logits, the softmax, and the dS that bias gradients
//! sum. `delta` comes from the rounded output, since that is what the contract hands to a backward pass.
//!
//! Where products may be of tf32 it rounds both factors of each to that: q, k, v, the gradient of the output, the
//! probabilities and dS, and q before the scale, which the contract puts on the product.
//!
//! Beside each value stands an estimate of the rounding error that any such computation may have there, since one
//! computation can be exact by luck. It is first-order analysis with independent roundings (root of the sum of
//! squares), and plain sums where one error is common to a whole row of logits.

use tilefold_core::attention::reference::ReferenceInputs;
use tilefold_core::{AttentionProblem, AttentionSpec, DType, EmptyRows, Products};

use crate::values::{round_to, round_to_tf32};

/// Unit roundoff of f32.
const EPS: f64 = 1.0 / 16_777_216.0;

/// Roundings of a sum of products relative to the norms of its factors, for any order of summation.
const PRODUCT_ERROR: f64 = 4.0 * EPS;

/// Unit roundoff of tf32.
const TF32: f64 = 1.0 / 2048.0;

/// Logit errors from here on say nothing about the probability any more: it may be anything.
const CHAOTIC: f64 = 0.5;

/// One result of the plain computation.
#[derive(Clone, Debug)]
pub struct Estimate {
    /// `out`, `lse`, `dq`, ...
    pub name: String,
    /// The plain computation's values.
    pub values: Vec<f64>,
    /// Elements that share an error estimate: the channels of one query or key, or 1.
    pub row: usize,
    /// Estimated error of each row, without the rounding of the result itself.
    pub floor: Vec<f64>,
    /// Rows that nothing may contribute to: exactly 0 (for lse: -inf).
    pub empty: Vec<bool>,
}

/// Sums over queries: values, squared errors, magnitudes, and whether there was anything to add.
struct Sums {
    values: Vec<f32>,
    row: usize,
    squared_error: Vec<f64>,
    magnitude: Vec<f64>,
    touched: Vec<bool>,
}

impl Sums {
    fn new(rows: usize, row: usize) -> Self {
        Self {
            values: vec![0.0; rows * row],
            row,
            squared_error: vec![0.0; rows],
            magnitude: vec![0.0; rows],
            touched: vec![false; rows],
        }
    }

    /// values[at] += factor · x, where the sum gets an error of `error` and terms as large as `magnitude`.
    fn add(&mut self, at: usize, factor: f32, x: &[f32], error: f64, magnitude: f64) {
        add_scaled(&mut self.values[at * self.row..(at + 1) * self.row], factor, x);
        self.squared_error[at] += error * error;
        self.magnitude[at] += magnitude;
        self.touched[at] = true;
    }

    fn finish(self, name: &str, dtype: DType, terms: usize) -> Estimate {
        let order = EPS * root(terms);
        let errors = self.squared_error.iter().zip(&self.magnitude);
        Estimate {
            name: name.to_owned(),
            values: self.values.iter().map(|&value| round_to(dtype, f64::from(value))).collect(),
            row: self.row,
            floor: errors.map(|(squared, magnitude)| squared.sqrt() + order * magnitude).collect(),
            empty: self.touched.iter().map(|touched| !touched).collect(),
        }
    }
}

/// Inputs in f32: exact, since every dtype fits in f32; but for q, k and v, which are factors alone, rounded as such.
struct Single {
    q: Vec<f32>,
    k: Vec<f32>,
    v: Vec<f32>,
    biases: Vec<Vec<f32>>,
    gate: Option<Vec<f32>>,
    d_out: Vec<f32>,
    q_norms: Vec<f64>,
    k_norms: Vec<f64>,
    v_norms: Vec<f64>,
}

/// One (batch, row, head, query).
struct Query {
    batch: usize,
    row: usize,
    outer: usize,
    head: usize,
    kv_head: usize,
    query: usize,
    /// Row of q, out and gate.
    q_row: usize,
    /// Row of lse.
    lse_row: usize,
}

/// One row of logits and what is known of its errors.
struct Logits {
    logits: Vec<f32>,
    kept: Vec<bool>,
    error: Vec<f64>,
    p: Vec<f32>,
    max: f32,
    sum: f32,
    /// Error of a probability from its own logit.
    p_error: Vec<f64>,
    /// Relative error of the row's normalisation, at most 1, and the same without that bound.
    common: f64,
    lse_error: f64,
}

/// The plain computation of one problem, under way.
struct Plain<'a> {
    problem: &'a AttentionProblem,
    spec: &'a AttentionSpec,
    inputs: &'a ReferenceInputs,
    single: Single,
    common_logits: bool,
    /// Unit roundoff of the dtype.
    unit: f64,
    /// Relative error of a term from rounding its factors. In the half types one of them is rounded, the other was given in
    /// the dtype; in tf32 both are; in f32 none.
    half: f64,
    out: Sums,
    lse: Vec<f64>,
    lse_floor: Vec<f64>,
    dq: Sums,
    dk: Sums,
    dv: Sums,
    dbiases: Vec<Sums>,
    d_gate: Option<Sums>,
}

/// Runs the plain computation, all gradients included; `bias_dtypes` are those of the bias gradients.
#[must_use]
pub fn compute(
    problem: &AttentionProblem,
    inputs: &ReferenceInputs,
    d_out: &[f64],
    common_logits: bool,
    bias_dtypes: &[DType],
) -> Vec<Estimate> {
    let spec = problem.spec();
    let mut plain = Plain::new(problem, inputs, d_out, common_logits);
    for outer in 0..spec.batch * spec.rows {
        for head in 0..spec.heads {
            for query in 0..spec.seqlen_q {
                let at = Query {
                    batch: outer / spec.rows,
                    row: outer % spec.rows,
                    outer,
                    head,
                    kv_head: head / problem.group(),
                    query,
                    q_row: (outer * spec.seqlen_q + query) * spec.heads + head,
                    lse_row: (outer * spec.heads + head) * spec.seqlen_q + query,
                };
                plain.query(&at);
            }
        }
    }
    plain.finish(bias_dtypes)
}

impl<'a> Plain<'a> {
    fn new(problem: &'a AttentionProblem, inputs: &'a ReferenceInputs, d_out: &[f64], common_logits: bool) -> Self {
        let spec = problem.spec();
        let queries = spec.batch * spec.rows * spec.seqlen_q * spec.heads;
        let keys = spec.batch * spec.rows * spec.seqlen_k * spec.kv_heads;
        let unit = spec.dtype.unit_roundoff();
        Self {
            problem,
            spec,
            inputs,
            single: Single::new(spec, inputs, d_out),
            common_logits,
            unit,
            half: match (spec.dtype, spec.products) {
                (DType::F32, Products::Exact) => 0.0,
                (DType::F32, _) => std::f64::consts::SQRT_2 * TF32,
                _ => unit,
            },
            out: Sums::new(queries, spec.head_dim_v),
            lse: vec![f64::NEG_INFINITY; queries],
            lse_floor: vec![0.0; queries],
            dq: Sums::new(queries, spec.head_dim),
            dk: Sums::new(keys, spec.head_dim),
            dv: Sums::new(keys, spec.head_dim_v),
            dbiases: spec.biases.iter().map(|bias| Sums::new(bias.shape.iter().product(), 1)).collect(),
            d_gate: spec.gate.then(|| Sums::new(queries, spec.head_dim_v)),
        }
    }

    fn query(&mut self, at: &Query) {
        let mut row = self.logits(at);
        if row.max == f32::NEG_INFINITY {
            if self.spec.empty_rows == EmptyRows::Uniform {
                row.p.fill(1.0 / single(as_f64(self.spec.seqlen_k)));
                row.p_error.fill(0.0);
                let out = self.forward(at, &row);
                self.backward(at, &row, &out, true);
            }
            return;
        }
        self.softmax(&mut row);
        self.lse[at.lse_row] = f64::from(row.max) + f64::from(row.sum).ln();
        self.lse_floor[at.lse_row] = row.lse_error;
        let out = self.forward(at, &row);
        self.backward(at, &row, &out, false);
    }

    fn keeps(&self, at: &Query, key: usize) -> bool {
        let (s, inputs) = (self.spec, self.inputs);
        let (q, k) = (at.outer * s.seqlen_q + at.query, at.outer * s.seqlen_k + key);
        let segments = inputs.q_segments.as_ref().zip(inputs.k_segments.as_ref());
        key < self.problem.kv_length(at.batch, at.row)
            && s.mask.keeps(at.query, key)
            && segments.is_none_or(|(q_ids, k_ids)| q_ids[q] == k_ids[k])
            && inputs.key_mask.as_ref().is_none_or(|mask| mask[k])
    }

    fn logits(&self, at: &Query) -> Logits {
        let (s, x) = (self.spec, &self.single);
        let scale = self.problem.softmax_scale();
        let tf32 = s.products == Products::Tf32;
        let scaled = |&q: &f32| if tf32 { q } else { single(round_to(s.dtype, f64::from(q) * scale)) };
        let q: Vec<f32> = x.q[span(at.q_row, s.head_dim)].iter().map(scaled).collect();
        let keys = s.seqlen_k;
        let mut row = Logits {
            logits: vec![f32::NEG_INFINITY; keys],
            kept: vec![false; keys],
            error: vec![0.0; keys],
            p: vec![0.0; keys],
            max: f32::NEG_INFINITY,
            sum: 0.0,
            p_error: vec![0.0; keys],
            common: 0.0,
            lse_error: 0.0,
        };
        for key in 0..keys {
            if !self.keeps(at, key) {
                continue;
            }
            let k_row = self.k_row(at, key);
            let mut logit = dot(&q, &x.k[span(k_row, s.head_dim)]) * if tf32 { single(scale) } else { 1.0 };
            let norms = scale.abs() * x.q_norms[at.q_row] * x.k_norms[k_row];
            let mut magnitude = 0.0;
            for (bias, values) in s.biases.iter().zip(&x.biases) {
                let value = values[bias_index(&bias.shape, at, key)];
                logit += value;
                magnitude += f64::from(value.abs());
            }
            if let Some(slopes) = &s.mask.alibi_slopes {
                let penalty = f64::from(slopes[at.head]) * as_f64_wide(s.mask.distance(at.query, key).unsigned_abs());
                logit -= single(penalty);
                magnitude += penalty.abs();
            }
            row.kept[key] = logit != f32::NEG_INFINITY;
            row.logits[key] = logit;
            // Unlike `f32::max`, keeps a NaN.
            if logit > row.max || logit.is_nan() {
                row.max = logit;
            }
            if !self.common_logits && row.kept[key] {
                let products = PRODUCT_ERROR * norms + self.half * norms / root(s.head_dim);
                // A kernel may start the sum of products with the biases.
                let biases = EPS * (2.0 + root(s.head_dim)) * magnitude;
                row.error[key] = products + biases + 2.0 * EPS * f64::from(logit.abs()) + 4.0 * EPS;
            }
        }
        row
    }

    fn softmax(&self, row: &mut Logits) {
        for (p, &logit) in row.p.iter_mut().zip(&row.logits) {
            *p = (logit - row.max).exp();
            row.sum += *p;
        }
        let (mut common, mut lse_error) = (0.0, 4.0 * EPS * root(row.p.len()));
        for key in 0..row.p.len() {
            row.p[key] /= row.sum;
            let (p, error) = (f64::from(row.p[key]), row.error[key]);
            if error < CHAOTIC {
                row.p_error[key] = p * error;
                common += (p * error).powi(2);
            } else if f64::from(row.max - row.logits[key]) < 8.0 * error {
                row.p_error[key] = 1.0;
                common = 1.0;
                lse_error = 8.0 * error;
            }
        }
        row.common = common.sqrt().min(1.0);
        // Even where the rounding of a logit is common to all keys, lse has it.
        row.lse_error = lse_error + common.sqrt() + 2.0 * EPS * f64::from(row.max.abs());
    }

    /// The output row in f32, rounded as stored.
    fn forward(&mut self, at: &Query, row: &Logits) -> Vec<f32> {
        let s = self.spec;
        let mut out = vec![0.0_f32; s.head_dim_v];
        let (mut squared, mut magnitude) = (0.0, 0.0);
        for key in 0..s.seqlen_k {
            let p = f64::from(row.p[key]);
            if p == 0.0 && row.p_error[key] == 0.0 {
                continue;
            }
            let v = &self.single.v[span(self.k_row(at, key), s.head_dim_v)];
            add_scaled(&mut out, factor(s, p), v);
            let largest = largest(v);
            squared += ((row.p_error[key] + self.half * p) * largest).powi(2);
            magnitude += p * largest;
        }
        let mut error = squared.sqrt() + row.common * largest(&out) + EPS * root(s.seqlen_k) * magnitude;
        let mut stored: Vec<f32> = out.iter().map(|&o| single(round_to(s.dtype, f64::from(o)))).collect();
        if let Some(gate) = &self.single.gate {
            error += self.unit * largest(&stored);
            for (o, &g) in stored.iter_mut().zip(&gate[span(at.q_row, s.head_dim_v)]) {
                *o = single(round_to(s.dtype, f64::from(*o * sigmoid(g))));
            }
        }
        self.out.add(at.q_row, 1.0, &stored, error, 0.0);
        stored
    }

    fn backward(&mut self, at: &Query, row: &Logits, out: &[f32], constant: bool) {
        let s = self.spec;
        let d_out = self.single.d_out[span(at.q_row, s.head_dim_v)].to_vec();
        let out_error = self.out.squared_error[at.q_row].sqrt();
        let d_o = self.gate(at, &d_out, out, out_error);
        let products: Vec<f32> = d_out.iter().zip(out).map(|(d, o)| d * o).collect();
        let delta: f32 = products.iter().sum();
        let delta_error =
            norm(&d_o) * out_error + 2.0 * self.unit * norm(&products) + PRODUCT_ERROR * norm(&d_out) * norm(out);
        let rounded = s.gate || s.products == Products::Tf32;
        let rounding = if rounded { self.half / root(s.head_dim_v) } else { 0.0 };
        let d_o_factor: Vec<f32> = d_o.iter().map(|&d_o| factor(s, f64::from(d_o))).collect();
        let mut ds = DS::new(s.seqlen_k);
        for key in 0..s.seqlen_k {
            let p = f64::from(row.p[key]);
            if !(row.kept[key] || constant) {
                continue;
            }
            let k_row = self.k_row(at, key);
            if p == 0.0 && row.p_error[key] == 0.0 {
                // Seen, but too small for f32.
                self.dv.touched[k_row] = true;
                ds.seen[key] = true;
                continue;
            }
            let error = (row.p_error[key] + (self.half + row.common) * p) * largest(&d_o);
            self.dv.add(k_row, factor(s, p), &d_o_factor, error, p * largest(&d_o));
            if constant {
                continue;
            }
            let dp = dot(&d_o_factor, &self.single.v[span(k_row, s.head_dim_v)]);
            let dp_error = (PRODUCT_ERROR + rounding) * norm(&d_o) * self.single.v_norms[k_row];
            ds.seen[key] = true;
            ds.values[key] = row.p[key] * (dp - delta);
            // Where a probability may be anything, delta and dp are multiplied by another one than the plain one.
            let factor_error = f64::from((dp - delta).abs()) + dp_error + delta_error;
            ds.own_error[key] = row.p_error[key] * factor_error + p * dp_error;
            ds.row_error[key] = p * delta_error + row.common * f64::from(ds.values[key].abs());
        }
        if !constant {
            self.add_qk(at, &ds, row.common);
            self.add_biases(at, &ds);
        }
    }

    /// The gradient of the ungated output, as stored; adds to the gate's gradient.
    fn gate(&mut self, at: &Query, d_out: &[f32], out: &[f32], out_error: f64) -> Vec<f32> {
        let (Some(gate), Some(d_gate)) = (&self.single.gate, &mut self.d_gate) else { return d_out.to_vec() };
        let gate = &gate[span(at.q_row, self.spec.head_dim_v)];
        // d_gate = d_out out (1 - σ(g)), and 1 - σ(g) = σ(-g)
        let factors: Vec<f32> = d_out.iter().zip(gate).map(|(d, &g)| d * sigmoid(-g)).collect();
        let gradient: Vec<f32> = factors.iter().zip(out).map(|(factor, o)| factor * o).collect();
        let error = largest(&factors) * out_error + 2.0 * self.unit * largest(&gradient);
        d_gate.add(at.q_row, 1.0, &gradient, error, 0.0);
        d_out.iter().zip(gate).map(|(&d, &g)| single(round_to(self.spec.dtype, f64::from(d * sigmoid(g))))).collect()
    }

    fn add_qk(&mut self, at: &Query, ds: &DS, common: f64) {
        let (s, scale) = (self.spec, self.problem.softmax_scale());
        let q = self.single.q[span(at.q_row, s.head_dim)].to_vec();
        let mut dq = vec![0.0_f32; s.head_dim];
        let (mut squared, mut linear, mut magnitude) = (0.0, 0.0, 0.0);
        for key in (0..s.seqlen_k).filter(|&key| ds.seen[key]) {
            let k_row = self.k_row(at, key);
            let k = &self.single.k[span(k_row, s.head_dim)];
            let stored = factor(s, f64::from(ds.values[key]));
            let (size, own) = (f64::from(ds.values[key].abs()), ds.own_error[key]);
            add_scaled(&mut dq, stored, k);
            squared += ((own + self.half * size) * largest(k)).powi(2);
            linear += (ds.row_error[key] - common * size).max(0.0) * largest(k);
            magnitude += size * largest(k);
            let error = scale.abs() * (own + ds.row_error[key] + self.half * size) * largest(&q);
            self.dk.add(k_row, single(scale) * stored, &q, error, scale.abs() * size * largest(&q));
        }
        let sums = squared.sqrt() + linear + EPS * root(s.seqlen_k) * magnitude + common * largest(&dq);
        if ds.seen.contains(&true) {
            self.dq.add(at.q_row, single(scale), &dq, scale.abs() * sums, 0.0);
        }
    }

    fn add_biases(&mut self, at: &Query, ds: &DS) {
        for (bias, sums) in self.spec.biases.iter().zip(&mut self.dbiases) {
            let keys = (0..ds.seen.len()).filter(|&key| ds.seen[key]);
            if bias.shape[4] > 1 {
                for key in keys {
                    let error = ds.own_error[key] + ds.row_error[key];
                    let size = f64::from(ds.values[key].abs());
                    sums.add(bias_index(&bias.shape, at, key), ds.values[key], &[1.0], error, size);
                }
                continue;
            }
            // Summed over the keys of the row: errors common to the row add up.
            let (mut total, mut squared, mut linear, mut magnitude) = (0.0, 0.0, 0.0, 0.0);
            for key in keys {
                total += ds.values[key];
                squared += ds.own_error[key].powi(2);
                linear += ds.row_error[key];
                magnitude += f64::from(ds.values[key].abs());
            }
            if ds.seen.contains(&true) {
                sums.add(bias_index(&bias.shape, at, 0), total, &[1.0], squared.sqrt() + linear, magnitude);
            }
        }
    }

    fn k_row(&self, at: &Query, key: usize) -> usize {
        (at.outer * self.spec.seqlen_k + key) * self.spec.kv_heads + at.kv_head
    }

    fn finish(self, bias_dtypes: &[DType]) -> Vec<Estimate> {
        let (s, dtype) = (self.spec, self.spec.dtype);
        let shared = s.seqlen_q * self.problem.group();
        let lse = Estimate {
            name: "lse".to_owned(),
            row: 1,
            empty: self.lse.iter().map(|&lse| lse == f64::NEG_INFINITY).collect(),
            values: self.lse,
            floor: self.lse_floor,
        };
        let mut estimates = vec![
            self.out.finish("out", dtype, 1),
            lse,
            self.dq.finish("dq", dtype, 1),
            self.dk.finish("dk", dtype, shared),
            self.dv.finish("dv", dtype, shared),
        ];
        estimates.extend(self.d_gate.map(|sums| sums.finish("d_gate", dtype, 1)));
        let logits: usize = self.problem.logits_shape().iter().product();
        for (i, (sums, &dtype)) in self.dbiases.into_iter().zip(bias_dtypes).enumerate() {
            let terms = logits / sums.values.len();
            estimates.push(sums.finish(&format!("dbias{i}"), dtype, terms));
        }
        estimates
    }
}

impl Single {
    fn new(s: &AttentionSpec, inputs: &ReferenceInputs, d_out: &[f64]) -> Self {
        let narrow = |values: &[f64]| values.iter().map(|&value| single(value)).collect::<Vec<f32>>();
        let factors = |values: &[f64]| values.iter().map(|&value| factor(s, value)).collect::<Vec<f32>>();
        let norms = |values: &[f32], row: usize| values.chunks(row).map(norm).collect();
        let (q, k, v) = (factors(&inputs.q), factors(&inputs.k), factors(&inputs.v));
        Self {
            q_norms: norms(&q, s.head_dim),
            k_norms: norms(&k, s.head_dim),
            v_norms: norms(&v, s.head_dim_v),
            biases: inputs.biases.iter().map(|bias| narrow(bias)).collect(),
            gate: inputs.gate.as_ref().map(|gate| narrow(gate)),
            d_out: narrow(d_out),
            q,
            k,
            v,
        }
    }
}

/// One row of dS.
struct DS {
    values: Vec<f32>,
    seen: Vec<bool>,
    /// Error from the logit and the product of this key alone.
    own_error: Vec<f64>,
    /// Error from what the row has in common: delta and the normalisation.
    row_error: Vec<f64>,
}

impl DS {
    fn new(keys: usize) -> Self {
        Self {
            values: vec![0.0; keys],
            seen: vec![false; keys],
            own_error: vec![0.0; keys],
            row_error: vec![0.0; keys],
        }
    }
}

/// A number as a factor of a product.
fn factor(s: &AttentionSpec, value: f64) -> f32 {
    let stored = single(round_to(s.dtype, value));
    if s.products == Products::Tf32 { round_to_tf32(stored) } else { stored }
}

fn span(row: usize, channels: usize) -> std::ops::Range<usize> {
    row * channels..(row + 1) * channels
}

fn bias_index(shape: &[usize; 5], at: &Query, key: usize) -> usize {
    let index = [at.batch, at.row, at.head, at.query, key];
    shape.iter().zip(index).fold(0, |flat, (&size, at)| flat * size + if size == 1 { 0 } else { at })
}

fn dot(a: &[f32], b: &[f32]) -> f32 {
    let ((a, a_rest), (b, b_rest)) = (a.as_chunks::<8>(), b.as_chunks::<8>());
    let mut sums = [0.0; 8];
    for (a, b) in a.iter().zip(b) {
        for lane in 0..8 {
            sums[lane] += a[lane] * b[lane];
        }
    }
    let rest: f32 = a_rest.iter().zip(b_rest).map(|(a, b)| a * b).sum();
    sums.iter().sum::<f32>() + rest
}

fn add_scaled(y: &mut [f32], factor: f32, x: &[f32]) {
    y.iter_mut().zip(x).for_each(|(y, x)| *y += factor * x);
}

fn norm(values: &[f32]) -> f64 {
    values.iter().map(|&value| f64::from(value).powi(2)).sum::<f64>().sqrt()
}

fn largest(values: &[f32]) -> f64 {
    f64::from(values.iter().fold(0.0_f32, |largest, value| largest.max(value.abs())))
}

fn sigmoid(x: f32) -> f32 {
    let e = (-x.abs()).exp();
    if x >= 0.0 { 1.0 / (1.0 + e) } else { e / (1.0 + e) }
}

fn root(count: usize) -> f64 {
    as_f64(count).sqrt()
}

#[allow(clippy::cast_possible_truncation, reason = "rounding to f32 is what is asked for")]
fn single(value: f64) -> f32 {
    value as f32
}

#[allow(clippy::cast_precision_loss, reason = "sizes far below 2^53")]
fn as_f64(count: usize) -> f64 {
    count as f64
}

#[allow(clippy::cast_precision_loss, reason = "an error estimate")]
fn as_f64_wide(count: u64) -> f64 {
    count as f64
}
