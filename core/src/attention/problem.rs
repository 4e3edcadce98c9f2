//! Sizes, dtypes and options of one attention, checked once.

use crate::attention::bias::{BIAS_AXES, BIAS_NAMES, BiasSpec, DBIAS_NAMES, MAX_BIASES};
use crate::{DType, Precision, ProblemError, Products, StructuralMask};

/// Largest head dimension of q, k and v.
pub const MAX_HEAD_DIM: usize = 256;

/// What a query row gives when every key is excluded (by a bool or structural mask, or by -inf).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum EmptyRows {
    /// Output 0, lse -inf, no gradients.
    #[default]
    Zero,
    /// Output the mean of v over all seqlen_k keys, as `-1e9` biases give in PyTorch; lse -inf; v alone gets gradients,
    /// since the excluded logits are constants.
    Uniform,
}

/// Which gradients the backward pass writes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Gradients {
    /// Gradient of q.
    pub q: bool,
    /// Gradient of k.
    pub k: bool,
    /// Gradient of v.
    pub v: bool,
    /// Gradient of the gate.
    pub gate: bool,
    /// Gradient of each bias, reduced over its broadcast axes.
    pub biases: [bool; MAX_BIASES],
}

/// Sizes, dtypes and options as the caller writes them; [`AttentionProblem::new`] checks them.
///
/// `out = softmax(softmax_scale · q kᵀ + Σ biasᵢ + mask) v`, then `sigmoid(gate) ⊙ out` with a gate.
#[derive(Clone, Debug, PartialEq)]
pub struct AttentionSpec {
    /// Type of q, k, v, gate, out and their gradients: f32, f16 or bf16.
    pub dtype: DType,
    /// Whether the factors of products may be rounded to tf32; f32 alone has the choice.
    pub products: Products,
    /// Outermost dimension.
    pub batch: usize,
    /// Independent attentions that may share biases: MSA rows, columns, or rows of the pair representation.
    pub rows: usize,
    /// Queries.
    pub seqlen_q: usize,
    /// Keys.
    pub seqlen_k: usize,
    /// Heads of q and out.
    pub heads: usize,
    /// Heads of k and v; divides `heads` (grouped-query attention).
    pub kv_heads: usize,
    /// Channels of q and k.
    pub head_dim: usize,
    /// Channels of v and out.
    pub head_dim_v: usize,
    /// Factor of q kᵀ; `None` for 1/√head_dim.
    pub softmax_scale: Option<f64>,
    /// Additive biases, up to [`MAX_BIASES`].
    pub biases: Vec<BiasSpec>,
    /// Whether there is a bool mask, broadcastable to `[batch, rows, seqlen_k]`; true keeps the key.
    pub key_mask: bool,
    /// Keys that count, from the front: one entry for all, one per batch, or one per batch and row.
    pub kv_lengths: Option<Vec<i64>>,
    /// Whether there are segment ids; a query sees only keys with its own id.
    pub segments: bool,
    /// Masks described by positions.
    pub mask: StructuralMask,
    /// Whether the output is multiplied by the sigmoid of a gate.
    pub gate: bool,
    /// What a row without keys gives.
    pub empty_rows: EmptyRows,
    /// What a backward pass writes; all false for forward only.
    pub gradients: Gradients,
}

impl AttentionSpec {
    /// Plain attention: one sequence length, as many key heads as query heads, nothing else.
    #[must_use]
    pub fn new(dtype: DType, batch: usize, rows: usize, seqlen: usize, heads: usize, head_dim: usize) -> Self {
        Self {
            dtype,
            products: Products::Exact,
            batch,
            rows,
            seqlen_q: seqlen,
            seqlen_k: seqlen,
            heads,
            kv_heads: heads,
            head_dim,
            head_dim_v: head_dim,
            softmax_scale: None,
            biases: Vec::new(),
            key_mask: false,
            kv_lengths: None,
            segments: false,
            mask: StructuralMask::default(),
            gate: false,
            empty_rows: EmptyRows::Zero,
            gradients: Gradients::default(),
        }
    }

    /// The dtype and how products are taken, as one name.
    #[must_use]
    pub fn precision(&self) -> Precision {
        Precision { dtype: self.dtype, products: self.products }
    }

    /// Asks for every gradient the problem has.
    #[must_use]
    pub fn with_all_gradients(mut self) -> Self {
        let biases = std::array::from_fn(|i| i < self.biases.len());
        self.gradients = Gradients { q: true, k: true, v: true, gate: self.gate, biases };
        self
    }
}

/// A valid problem: what a value of this type says can be computed.
#[derive(Clone, Debug, PartialEq)]
pub struct AttentionProblem {
    spec: AttentionSpec,
    softmax_scale: f64,
}

impl AttentionProblem {
    /// Checks a specification.
    ///
    /// # Errors
    /// A [`ProblemError`] that names the tensor and dimension, or the parameter.
    pub fn new(spec: AttentionSpec) -> Result<Self, ProblemError> {
        check_sizes(&spec)?;
        check_dtypes(&spec)?;
        check_biases(&spec)?;
        check_masks(&spec)?;
        check_gradients(&spec)?;
        let softmax_scale = spec.softmax_scale.unwrap_or_else(|| 1.0 / as_f64(spec.head_dim).sqrt());
        // The kernels hold the scale in f32, multiplied by log2(e).
        let limit = f64::from(f32::MAX) / 2.0;
        if softmax_scale.is_nan() || softmax_scale.abs() > limit {
            return Err(ProblemError::OutOfRange { parameter: "softmax_scale", limit, got: softmax_scale });
        }
        Ok(Self { spec, softmax_scale })
    }

    /// The checked specification.
    #[must_use]
    pub fn spec(&self) -> &AttentionSpec {
        &self.spec
    }

    /// The factor of q kᵀ.
    #[must_use]
    pub fn softmax_scale(&self) -> f64 {
        self.softmax_scale
    }

    /// Query heads that share one key head.
    #[must_use]
    pub fn group(&self) -> usize {
        self.spec.heads / self.spec.kv_heads
    }

    /// Keys that count for one batch and row: `seqlen_k` without `kv_lengths`.
    #[must_use]
    pub fn kv_length(&self, batch: usize, row: usize) -> usize {
        let Some(lengths) = &self.spec.kv_lengths else { return self.spec.seqlen_k };
        let index = if lengths.len() == 1 {
            0
        } else if lengths.len() == self.spec.batch {
            batch
        } else {
            batch * self.spec.rows + row
        };
        usize::try_from(lengths[index]).unwrap_or(0)
    }

    /// `[batch, rows, seqlen_q, heads, head_dim]`, the shape of q.
    #[must_use]
    pub fn q_shape(&self) -> [usize; 5] {
        let s = &self.spec;
        [s.batch, s.rows, s.seqlen_q, s.heads, s.head_dim]
    }

    /// `[batch, rows, seqlen_k, kv_heads, head_dim]`, the shape of k.
    #[must_use]
    pub fn k_shape(&self) -> [usize; 5] {
        let s = &self.spec;
        [s.batch, s.rows, s.seqlen_k, s.kv_heads, s.head_dim]
    }

    /// `[batch, rows, seqlen_k, kv_heads, head_dim_v]`, the shape of v.
    #[must_use]
    pub fn v_shape(&self) -> [usize; 5] {
        let s = &self.spec;
        [s.batch, s.rows, s.seqlen_k, s.kv_heads, s.head_dim_v]
    }

    /// `[batch, rows, seqlen_q, heads, head_dim_v]`, the shape of out and gate.
    #[must_use]
    pub fn out_shape(&self) -> [usize; 5] {
        let s = &self.spec;
        [s.batch, s.rows, s.seqlen_q, s.heads, s.head_dim_v]
    }

    /// `[batch, rows, heads, seqlen_q]`, the shape of lse.
    #[must_use]
    pub fn lse_shape(&self) -> [usize; 4] {
        let s = &self.spec;
        [s.batch, s.rows, s.heads, s.seqlen_q]
    }

    /// `[batch, rows, heads, seqlen_q, seqlen_k]`, the shape every bias broadcasts to.
    #[must_use]
    pub fn logits_shape(&self) -> [usize; 5] {
        let s = &self.spec;
        [s.batch, s.rows, s.heads, s.seqlen_q, s.seqlen_k]
    }

    /// Entries of the logits that are never stored: batch · rows · heads · seqlen_q · seqlen_k.
    #[must_use]
    pub fn logits(&self) -> f64 {
        self.logits_shape().iter().map(|&size| as_f64(size)).product()
    }

    /// Floating-point operations of the two products of the forward pass: 2 · logits · (head_dim + head_dim_v).
    #[must_use]
    pub fn forward_flops(&self) -> f64 {
        2.0 * self.logits() * as_f64(self.spec.head_dim + self.spec.head_dim_v)
    }

    /// Operations of the five products of the backward pass: 2 · logits · (3 head_dim + 2 head_dim_v).
    #[must_use]
    pub fn backward_flops(&self) -> f64 {
        2.0 * self.logits() * as_f64(3 * self.spec.head_dim + 2 * self.spec.head_dim_v)
    }
}

#[allow(clippy::cast_precision_loss, reason = "sizes for estimates; 53 bits are plenty")]
fn as_f64(size: usize) -> f64 {
    size as f64
}

fn check_sizes(s: &AttentionSpec) -> Result<(), ProblemError> {
    let sizes = [
        ("q", "batch", s.batch),
        ("q", "rows", s.rows),
        ("q", "seqlen_q", s.seqlen_q),
        ("k", "seqlen_k", s.seqlen_k),
        ("q", "heads", s.heads),
        ("k", "kv_heads", s.kv_heads),
        ("q", "head_dim", s.head_dim),
        ("v", "head_dim_v", s.head_dim_v),
    ];
    if let Some(&(tensor, dimension, _)) = sizes.iter().find(|(_, _, size)| *size == 0) {
        return Err(ProblemError::ZeroSize { tensor, dimension });
    }
    for (what, got) in [("head_dim", s.head_dim), ("head_dim_v", s.head_dim_v)] {
        if got > MAX_HEAD_DIM {
            return Err(ProblemError::Limit { what, limit: MAX_HEAD_DIM, got });
        }
    }
    if !s.heads.is_multiple_of(s.kv_heads) {
        return Err(ProblemError::HeadGroups { heads: s.heads, kv_heads: s.kv_heads });
    }
    // Every operand's byte count must fit 63 bits; the logits need not, since they are never stored.
    let operands = [
        ("q", [s.seqlen_q, s.heads, s.head_dim]),
        ("k", [s.seqlen_k, s.kv_heads, s.head_dim]),
        ("v", [s.seqlen_k, s.kv_heads, s.head_dim_v]),
        ("out", [s.seqlen_q, s.heads, s.head_dim_v]),
    ];
    for (tensor, inner) in operands {
        check_bytes(tensor, [s.batch, s.rows, s.dtype.size_bytes()].into_iter().chain(inner))?;
    }
    Ok(())
}

fn check_dtypes(s: &AttentionSpec) -> Result<(), ProblemError> {
    if !s.dtype.is_float() {
        return Err(ProblemError::UnsupportedDType { tensor: "q", expected: "f32, f16 or bf16".into(), got: s.dtype });
    }
    if s.products != Products::Exact && s.dtype != DType::F32 {
        return Err(ProblemError::ProductsOfDType { products: s.products, dtype: s.dtype });
    }
    for (bias, tensor) in s.biases.iter().zip(BIAS_NAMES) {
        if bias.dtype != s.dtype && bias.dtype != DType::F32 {
            let expected = format!("{} (that of q) or f32", s.dtype);
            return Err(ProblemError::UnsupportedDType { tensor, expected, got: bias.dtype });
        }
    }
    Ok(())
}

fn check_biases(s: &AttentionSpec) -> Result<(), ProblemError> {
    if s.biases.len() > MAX_BIASES {
        return Err(ProblemError::Limit { what: "biases", limit: MAX_BIASES, got: s.biases.len() });
    }
    let full = [s.batch, s.rows, s.heads, s.seqlen_q, s.seqlen_k];
    for (bias, tensor) in s.biases.iter().zip(BIAS_NAMES) {
        for ((&got, &expected), dimension) in bias.shape.iter().zip(&full).zip(BIAS_AXES) {
            if got == 0 {
                return Err(ProblemError::ZeroSize { tensor, dimension });
            }
            if got != 1 && got != expected {
                return Err(ProblemError::NotBroadcastable { tensor, dimension, expected, got });
            }
        }
        check_bytes(tensor, bias.shape.into_iter().chain([bias.dtype.size_bytes()]))?;
    }
    Ok(())
}

/// The product of sizes fits 63 bits.
fn check_bytes(tensor: &'static str, factors: impl IntoIterator<Item = usize>) -> Result<(), ProblemError> {
    let multiply = |product: i64, size: usize| product.checked_mul(i64::try_from(size).ok()?);
    let bytes = factors.into_iter().try_fold(1, multiply);
    bytes.map(|_| ()).ok_or(ProblemError::Overflow { tensor, quantity: "size in bytes" })
}

/// Positions and distances fit 64 bits.
fn check_offsets(s: &AttentionSpec) -> Result<(), ProblemError> {
    let end = |offset: i64, length: usize| offset.checked_add(i64::try_from(length).ok()?);
    let overflow = |tensor| ProblemError::Overflow { tensor, quantity: "the last position" };
    let (q, k) = (s.mask.q_offset, s.mask.k_offset);
    let q_end = end(q, s.seqlen_q).ok_or(overflow("q_offset"))?;
    let k_end = end(k, s.seqlen_k).ok_or(overflow("k_offset"))?;
    let far = ProblemError::Overflow { tensor: "k_offset", quantity: "the distance from q_offset" };
    k_end.checked_sub(q).and(k.checked_sub(q_end)).map(|_| ()).ok_or(far)
}

fn check_masks(s: &AttentionSpec) -> Result<(), ProblemError> {
    check_offsets(s)?;
    if let Some(slopes) = &s.mask.alibi_slopes {
        if slopes.len() != s.heads {
            let expected = format!("{} (one per head)", s.heads);
            return Err(ProblemError::Length { list: "alibi_slopes", expected, got: slopes.len() });
        }
        if let Some((index, slope)) = slopes.iter().enumerate().find(|(_, slope)| !slope.is_finite()) {
            let (expected, got) = ("a finite number".into(), slope.to_string());
            return Err(ProblemError::Value { list: "alibi_slopes", index, expected, got });
        }
    }
    let Some(lengths) = &s.kv_lengths else { return Ok(()) };
    if ![1, s.batch, s.batch.saturating_mul(s.rows)].contains(&lengths.len()) {
        let expected = format!("1, {} (batch) or {} (batch · rows)", s.batch, s.batch.saturating_mul(s.rows));
        return Err(ProblemError::Length { list: "kv_lengths", expected, got: lengths.len() });
    }
    let fits = |length: i64| usize::try_from(length).is_ok_and(|length| length <= s.seqlen_k);
    if let Some((index, length)) = lengths.iter().enumerate().find(|(_, length)| !fits(**length)) {
        let (expected, got) = (format!("0..={} (seqlen_k)", s.seqlen_k), length.to_string());
        return Err(ProblemError::Value { list: "kv_lengths", index, expected, got });
    }
    Ok(())
}

fn check_gradients(s: &AttentionSpec) -> Result<(), ProblemError> {
    let absent = |tensor| ProblemError::Unexpected { tensor, reason: "the problem has no such operand" };
    if s.gradients.gate && !s.gate {
        return Err(absent("d_gate"));
    }
    match (s.biases.len()..MAX_BIASES).find(|&i| s.gradients.biases[i]) {
        Some(i) => Err(absent(DBIAS_NAMES[i])),
        None => Ok(()),
    }
}
