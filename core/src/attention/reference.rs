//! The oracle: attention and its gradients in plain f64 loops, one query at a time.
//!
//! Every backend is held against it. Equation numbers are those of `docs/mathematics.md`. Nothing of the size of the
//! logits is stored: one row of `seqlen_k` probabilities is the only temporary. Probabilities come from the row maximum
//! and the row sum, never from lse, so that a row of -1e9 biases loses nothing.

use crate::attention::problem::{AttentionProblem, AttentionSpec, EmptyRows};
use crate::{Element, ProblemError, TensorView};

/// Inputs in f64, row-major in the problem's own shapes.
#[derive(Clone, Debug)]
pub struct ReferenceInputs {
    /// `[batch, rows, seqlen_q, heads, head_dim]`
    pub q: Vec<f64>,
    /// `[batch, rows, seqlen_k, kv_heads, head_dim]`
    pub k: Vec<f64>,
    /// `[batch, rows, seqlen_k, kv_heads, head_dim_v]`
    pub v: Vec<f64>,
    /// Each in its own shape, broadcast axes of size 1.
    pub biases: Vec<Vec<f64>>,
    /// `[batch, rows, seqlen_k]`, already expanded; true keeps the key.
    pub key_mask: Option<Vec<bool>>,
    /// `[batch, rows, seqlen_q]`, already expanded.
    pub q_segments: Option<Vec<i32>>,
    /// `[batch, rows, seqlen_k]`, already expanded.
    pub k_segments: Option<Vec<i32>>,
    /// `[batch, rows, seqlen_q, heads, head_dim_v]`, before the sigmoid.
    pub gate: Option<Vec<f64>>,
}

/// What [`forward`] gives.
#[derive(Clone, Debug)]
pub struct ReferenceForward {
    /// `[batch, rows, seqlen_q, heads, head_dim_v]`, with the gate applied.
    pub out: Vec<f64>,
    /// `[batch, rows, heads, seqlen_q]`, natural log; -inf for rows without keys.
    pub lse: Vec<f64>,
}

/// What [`backward`] gives: the gradient of every input.
#[derive(Clone, Debug)]
pub struct ReferenceGradients {
    /// Gradient of q, in its shape.
    pub dq: Vec<f64>,
    /// Gradient of k, in its shape.
    pub dk: Vec<f64>,
    /// Gradient of v, in its shape.
    pub dv: Vec<f64>,
    /// Gradient of each bias in its own shape: summed over its broadcast axes.
    pub dbiases: Vec<Vec<f64>>,
    /// Gradient of the gate, in its shape.
    pub d_gate: Option<Vec<f64>>,
}

impl ReferenceInputs {
    /// Reads the operands of a launch.
    ///
    /// # Errors
    /// [`ProblemError::Length`], [`ProblemError::Missing`] and [`ProblemError::Unexpected`] for operands that are not the
    /// problem's, and those of [`TensorView::expand`] and [`TensorView::to_f64`].
    #[allow(clippy::too_many_arguments, reason = "the operands of a launch, in the order of ForwardOperands")]
    pub fn from_views(
        problem: &AttentionProblem,
        q: &TensorView<'_>,
        k: &TensorView<'_>,
        v: &TensorView<'_>,
        biases: &[TensorView<'_>],
        key_mask: Option<&TensorView<'_>>,
        q_segments: Option<&TensorView<'_>>,
        k_segments: Option<&TensorView<'_>>,
        gate: Option<&TensorView<'_>>,
    ) -> Result<Self, ProblemError> {
        let s = problem.spec();
        let (queries, keys) = ([s.batch, s.rows, s.seqlen_q], [s.batch, s.rows, s.seqlen_k]);
        if biases.len() != s.biases.len() {
            let (expected, got) = (s.biases.len().to_string(), biases.len());
            return Err(ProblemError::Length { list: "biases", expected, got });
        }
        let optional = [
            ("key_mask", key_mask, s.key_mask),
            ("q_segments", q_segments, s.segments),
            ("k_segments", k_segments, s.segments),
            ("gate", gate, s.gate),
        ];
        for (tensor, given, wanted) in optional {
            match (given, wanted) {
                (None, true) => return Err(ProblemError::Missing { tensor, reason: "the problem has one" }),
                (Some(_), false) => return Err(ProblemError::Unexpected { tensor, reason: "the problem has none" }),
                _ => {}
            }
        }
        let bools = |values: Vec<f64>| values.into_iter().map(|value| value != 0.0).collect();
        let ids = |values: Vec<f64>| values.into_iter().map(i32::from_f64).collect();
        Ok(Self {
            q: read(q, &problem.q_shape())?,
            k: read(k, &problem.k_shape())?,
            v: read(v, &problem.v_shape())?,
            biases: biases
                .iter()
                .zip(&s.biases)
                .map(|(view, bias)| read(view, &bias.shape))
                .collect::<Result<_, _>>()?,
            key_mask: key_mask.map(|view| read(view, &keys)).transpose()?.map(bools),
            q_segments: q_segments.map(|view| read(view, &queries)).transpose()?.map(ids),
            k_segments: k_segments.map(|view| read(view, &keys)).transpose()?.map(ids),
            gate: gate.map(|view| read(view, &problem.out_shape())).transpose()?,
        })
    }

    /// Whether every operand of the problem is there, with as many elements as its shape has, and no other.
    fn fit(&self, problem: &AttentionProblem) -> bool {
        let s = problem.spec();
        let (queries, keys) = ([s.batch, s.rows, s.seqlen_q], [s.batch, s.rows, s.seqlen_k]);
        let optional = |length: Option<usize>, wanted: bool, shape: &[usize]| match length {
            Some(length) => wanted && elements(shape) == Some(length),
            None => !wanted,
        };
        elements(&problem.q_shape()) == Some(self.q.len())
            && elements(&problem.k_shape()) == Some(self.k.len())
            && elements(&problem.v_shape()) == Some(self.v.len())
            && self.biases.len() == s.biases.len()
            && self.biases.iter().zip(&s.biases).all(|(values, bias)| elements(&bias.shape) == Some(values.len()))
            && optional(self.key_mask.as_ref().map(Vec::len), s.key_mask, &keys)
            && optional(self.q_segments.as_ref().map(Vec::len), s.segments, &queries)
            && optional(self.k_segments.as_ref().map(Vec::len), s.segments, &keys)
            && optional(self.gate.as_ref().map(Vec::len), s.gate, &problem.out_shape())
    }
}

/// Output and log-sum-exp: equations (1)-(6).
///
/// *Numerics*: f64 throughout, keys in order; deterministic. A key of probability 0 adds nothing, whatever its v holds.
/// Inputs that do not fit the problem give NaN everywhere.
#[must_use]
pub fn forward(problem: &AttentionProblem, inputs: &ReferenceInputs) -> ReferenceForward {
    let fits = inputs.fit(problem);
    let mut out = filled(&problem.out_shape(), fits);
    let mut lse = filled(&problem.lse_shape(), fits);
    if !fits {
        return ReferenceForward { out, lse };
    }
    let data = Data { problem, spec: problem.spec(), inputs };
    let mut p = vec![0.0; data.spec.seqlen_k];
    for at in queries(data.spec) {
        let row = data.probabilities(at, &mut p);
        // (5) lse = m + ln l
        lse[at.lse_index(data.spec)] = row.max + row.sum.ln();
        let o = &mut out[at.out(data.spec)];
        data.output(at, &p, o);
        if let Some(gate) = &inputs.gate {
            // (6) out = σ(g) ⊙ o
            o.iter_mut().zip(&gate[at.out(data.spec)]).for_each(|(o, &g)| *o *= sigmoid(g));
        }
    }
    ReferenceForward { out, lse }
}

/// Every gradient, from the gradient `d_out` of the output: equations (7)-(16).
///
/// *Numerics*: as [`forward`]. Inputs or a `d_out` that do not fit the problem give NaN everywhere.
#[must_use]
pub fn backward(problem: &AttentionProblem, inputs: &ReferenceInputs, d_out: &[f64]) -> ReferenceGradients {
    let fits = inputs.fit(problem) && elements(&problem.out_shape()) == Some(d_out.len());
    let spec = problem.spec();
    let mut gradients = ReferenceGradients {
        dq: filled(&problem.q_shape(), fits),
        dk: filled(&problem.k_shape(), fits),
        dv: filled(&problem.v_shape(), fits),
        dbiases: spec.biases.iter().map(|bias| filled(&bias.shape, fits)).collect(),
        d_gate: spec.gate.then(|| filled(&problem.out_shape(), fits)),
    };
    if !fits {
        return gradients;
    }
    let data = Data { problem, spec, inputs };
    let mut p = vec![0.0; spec.seqlen_k];
    let mut out = vec![0.0; spec.head_dim_v];
    for at in queries(spec) {
        let row = data.probabilities(at, &mut p);
        data.output(at, &p, &mut out);
        let d_out = &d_out[at.out(spec)];
        let mut d_o = d_out.to_vec();
        if let (Some(gate), Some(d_gate)) = (&inputs.gate, &mut gradients.d_gate) {
            let gate = &gate[at.out(spec)];
            for (c, d_gate) in d_gate[at.out(spec)].iter_mut().enumerate() {
                out[c] *= sigmoid(gate[c]);
                // (7) dO = σ(g) ⊙ d_out
                d_o[c] *= sigmoid(gate[c]);
                // (16) d_gate = d_out ⊙ out ⊙ (1 - σ(g)), and 1 - σ(g) = σ(-g)
                *d_gate = d_out[c] * out[c] * sigmoid(-gate[c]);
            }
        }
        // (8) delta = Σ d_out · out
        let delta = dot(d_out, &out);
        data.add_gradients(at, &p, row, &d_o, delta, &mut gradients);
    }
    gradients
}

/// One (batch, row, head, query): the owner of one row of logits.
#[derive(Clone, Copy)]
struct Query {
    batch: usize,
    row: usize,
    head: usize,
    query: usize,
}

/// Every query, heads inside queries.
fn queries(s: &AttentionSpec) -> impl Iterator<Item = Query> {
    let (rows, seqlen_q, heads) = (s.rows, s.seqlen_q, s.heads);
    let outer = (0..s.batch).flat_map(move |batch| (0..rows).map(move |row| (batch, row)));
    outer.flat_map(move |(batch, row)| {
        (0..seqlen_q).flat_map(move |query| (0..heads).map(move |head| Query { batch, row, head, query }))
    })
}

impl Query {
    /// Index of (batch, row).
    fn outer(self, s: &AttentionSpec) -> usize {
        self.batch * s.rows + self.row
    }

    /// Elements of this query in q.
    fn q(self, s: &AttentionSpec) -> std::ops::Range<usize> {
        let start = ((self.outer(s) * s.seqlen_q + self.query) * s.heads + self.head) * s.head_dim;
        start..start + s.head_dim
    }

    /// Elements of this query in out and gate.
    fn out(self, s: &AttentionSpec) -> std::ops::Range<usize> {
        let start = ((self.outer(s) * s.seqlen_q + self.query) * s.heads + self.head) * s.head_dim_v;
        start..start + s.head_dim_v
    }

    /// Element of this query in lse.
    fn lse_index(self, s: &AttentionSpec) -> usize {
        (self.outer(s) * s.heads + self.head) * s.seqlen_q + self.query
    }

    /// Elements of a key in k or v, whose head is shared by a group of query heads.
    fn key(self, s: &AttentionSpec, key: usize, channels: usize) -> std::ops::Range<usize> {
        let kv_head = self.head / (s.heads / s.kv_heads);
        let start = ((self.outer(s) * s.seqlen_k + key) * s.kv_heads + kv_head) * channels;
        start..start + channels
    }

    /// Element of a bias at key 0, and the step from key to key: 0 along a broadcast axis.
    fn bias(self, shape: &[usize; 5]) -> (usize, usize) {
        let axes = shape.iter().zip([self.batch, self.row, self.head, self.query]);
        let start = axes.fold(0, |start, (&size, index)| start * size + if size == 1 { 0 } else { index });
        (start * shape[4], usize::from(shape[4] != 1))
    }
}

/// Row maximum and row sum of one query; -inf and 0 for an empty row.
#[derive(Clone, Copy)]
struct RowSum {
    max: f64,
    sum: f64,
}

impl RowSum {
    fn is_empty(self) -> bool {
        self.max == f64::NEG_INFINITY
    }
}

/// A problem with inputs that fit it.
struct Data<'a> {
    problem: &'a AttentionProblem,
    spec: &'a AttentionSpec,
    inputs: &'a ReferenceInputs,
}

impl Data<'_> {
    /// (2) Whether bool mask, lengths, segments and structural mask let the query see the key.
    fn keeps(&self, at: Query, key: usize) -> bool {
        let s = self.spec;
        let (q, k) = (at.outer(s) * s.seqlen_q + at.query, at.outer(s) * s.seqlen_k + key);
        let same_segment = match (&self.inputs.q_segments, &self.inputs.k_segments) {
            (Some(q_ids), Some(k_ids)) => q_ids[q] == k_ids[k],
            _ => true,
        };
        key < self.problem.kv_length(at.batch, at.row)
            && s.mask.keeps(at.query, key)
            && same_segment
            && self.inputs.key_mask.as_ref().is_none_or(|mask| mask[k])
    }

    /// (1) The logit of a key that is kept.
    fn logit(&self, at: Query, key: usize) -> f64 {
        let (s, inputs) = (self.spec, self.inputs);
        let mut logit = self.problem.softmax_scale() * dot(&inputs.q[at.q(s)], &inputs.k[at.key(s, key, s.head_dim)]);
        for (values, bias) in inputs.biases.iter().zip(&s.biases) {
            let (start, step) = at.bias(&bias.shape);
            logit += values[start + key * step];
        }
        if let Some(slopes) = &s.mask.alibi_slopes {
            logit -= f64::from(slopes[at.head]) * as_f64(s.mask.distance(at.query, key).unsigned_abs());
        }
        logit
    }

    /// (3)-(4) Row maximum and row sum of one query, and its probabilities over all keys.
    ///
    /// An excluded key has probability exactly 0, in an empty row of [`EmptyRows::Uniform`] 1 / seqlen_k.
    fn probabilities(&self, at: Query, p: &mut [f64]) -> RowSum {
        let mut row = RowSum { max: f64::NEG_INFINITY, sum: 0.0 };
        for (key, p) in p.iter_mut().enumerate() {
            *p = if self.keeps(at, key) { self.logit(at, key) } else { f64::NEG_INFINITY };
            // Unlike `f64::max`, keeps a NaN.
            if *p > row.max || p.is_nan() {
                row.max = *p;
            }
        }
        if row.is_empty() {
            let uniform = self.spec.empty_rows == EmptyRows::Uniform;
            p.fill(if uniform { 1.0 / as_f64(u64::try_from(p.len()).unwrap_or(u64::MAX)) } else { 0.0 });
            return row;
        }
        if row.max == f64::INFINITY {
            row.max = f64::NAN; // inf - inf: such a row has no softmax.
        }
        for p in p.iter_mut() {
            *p = if *p == f64::NEG_INFINITY { 0.0 } else { (*p - row.max).exp() };
            row.sum += *p;
        }
        // A NaN row must leave excluded keys at 0.
        p.iter_mut().filter(|p| **p != 0.0).for_each(|p| *p /= row.sum);
        row
    }

    /// (4) o = Σ p v, before the gate.
    fn output(&self, at: Query, p: &[f64], o: &mut [f64]) {
        let s = self.spec;
        o.fill(0.0);
        for (key, &p) in p.iter().enumerate().filter(|(_, p)| **p != 0.0) {
            add_scaled(o, p, &self.inputs.v[at.key(s, key, s.head_dim_v)]);
        }
    }

    /// (9)-(15) What one query adds to the gradients of q, k, v and the biases.
    fn add_gradients(
        &self,
        at: Query,
        p: &[f64],
        row: RowSum,
        d_o: &[f64],
        delta: f64,
        gradients: &mut ReferenceGradients,
    ) {
        let (s, inputs, scale) = (self.spec, self.inputs, self.problem.softmax_scale());
        for (key, &p) in p.iter().enumerate().filter(|(_, p)| **p != 0.0) {
            let (in_k, in_v) = (at.key(s, key, s.head_dim), at.key(s, key, s.head_dim_v));
            // (10) dV = Pᵀ dO, summed over the heads of a group
            add_scaled(&mut gradients.dv[in_v.clone()], p, d_o);
            if row.is_empty() {
                continue; // The logits of an empty row are constants.
            }
            // (11)-(12) dP = dO Vᵀ, dS = P (dP - delta)
            let ds = p * (dot(d_o, &inputs.v[in_v]) - delta);
            // (13)-(14) dQ = scale dS K, dK = scale dSᵀ Q, the latter summed over the heads of a group
            add_scaled(&mut gradients.dq[at.q(s)], scale * ds, &inputs.k[in_k.clone()]);
            add_scaled(&mut gradients.dk[in_k], scale * ds, &inputs.q[at.q(s)]);
            // (15) dbias = dS, summed over broadcast axes
            for (dbias, bias) in gradients.dbiases.iter_mut().zip(&s.biases) {
                let (start, step) = at.bias(&bias.shape);
                dbias[start + key * step] += ds;
            }
        }
    }
}

fn read(view: &TensorView<'_>, shape: &[usize]) -> Result<Vec<f64>, ProblemError> {
    view.expand(shape)?.to_f64()
}

fn elements(shape: &[usize]) -> Option<usize> {
    shape.iter().try_fold(1_usize, |product, &size| product.checked_mul(size))
}

/// Zeros to add to, or NaN where nothing can be computed.
fn filled(shape: &[usize], fits: bool) -> Vec<f64> {
    vec![if fits { 0.0 } else { f64::NAN }; elements(shape).unwrap_or(0)]
}

/// σ(x) = 1 / (1 + e⁻ˣ), without overflow on either side.
fn sigmoid(x: f64) -> f64 {
    let e = (-x.abs()).exp();
    if x >= 0.0 { 1.0 / (1.0 + e) } else { e / (1.0 + e) }
}

/// Σ a b, in eight independent sums so that it vectorises.
fn dot(a: &[f64], b: &[f64]) -> f64 {
    let ((a, a_rest), (b, b_rest)) = (a.as_chunks::<8>(), b.as_chunks::<8>());
    let mut sums = [0.0; 8];
    for (a, b) in a.iter().zip(b) {
        for lane in 0..8 {
            sums[lane] += a[lane] * b[lane];
        }
    }
    let rest: f64 = a_rest.iter().zip(b_rest).map(|(a, b)| a * b).sum();
    sums.iter().sum::<f64>() + rest
}

/// y += factor x
fn add_scaled(y: &mut [f64], factor: f64, x: &[f64]) {
    y.iter_mut().zip(x).for_each(|(y, x)| *y += factor * x);
}

#[allow(clippy::cast_precision_loss, reason = "distances and lengths below 2^53 are exact")]
fn as_f64(count: u64) -> f64 {
    count as f64
}

#[cfg(test)]
mod tests;
