//! Operands, each checked against the plan: shape, dtype, device, aliasing.

use crate::attention::bias::{BIAS_AXES, BIAS_NAMES, DBIAS_NAMES, MAX_BIASES};
use crate::{AttentionPlan, DType, ProblemError, TensorView, TensorViewMut};

/// Tensors of a forward pass.
#[derive(Debug)]
pub struct ForwardOperands<'a> {
    /// `[batch, rows, seqlen_q, heads, head_dim]`
    pub q: TensorView<'a>,
    /// `[batch, rows, seqlen_k, kv_heads, head_dim]`; what stands at keys excluded by `key_mask` or `kv_lengths` has no
    /// influence, NaN included (but v has under [`crate::EmptyRows::Uniform`]). Keys excluded otherwise must be finite.
    pub k: TensorView<'a>,
    /// `[batch, rows, seqlen_k, kv_heads, head_dim_v]`, as k.
    pub v: TensorView<'a>,
    /// As many as the problem has, in the shapes its specification gives.
    pub biases: Vec<TensorView<'a>>,
    /// Bool, broadcastable to `[batch, rows, seqlen_k]`; true keeps the key.
    pub key_mask: Option<TensorView<'a>>,
    /// i32, broadcastable to `[batch, rows, seqlen_q]`.
    pub q_segments: Option<TensorView<'a>>,
    /// i32, broadcastable to `[batch, rows, seqlen_k]`.
    pub k_segments: Option<TensorView<'a>>,
    /// `[batch, rows, seqlen_q, heads, head_dim_v]`, before the sigmoid.
    pub gate: Option<TensorView<'a>>,
    /// `[batch, rows, seqlen_q, heads, head_dim_v]`
    pub out: TensorViewMut<'a>,
    /// Natural log of the sum of exponentials, f32 `[batch, rows, heads, seqlen_q]`.
    pub lse: Option<TensorViewMut<'a>>,
    /// What f32 rounding took from `lse`, f32 of the same shape: `lse + lse_low` carries about 48 bits. A row of -1e9
    /// biases needs it, since `-1e9 + ln 384` is `-1e9` in f32.
    pub lse_low: Option<TensorViewMut<'a>>,
}

/// Tensors of a backward pass; gradients exactly as [`crate::Gradients`] of the problem asks.
#[derive(Debug)]
pub struct BackwardOperands<'a> {
    /// As in forward.
    pub q: TensorView<'a>,
    /// As in forward.
    pub k: TensorView<'a>,
    /// As in forward.
    pub v: TensorView<'a>,
    /// As in forward.
    pub biases: Vec<TensorView<'a>>,
    /// As in forward.
    pub key_mask: Option<TensorView<'a>>,
    /// As in forward.
    pub q_segments: Option<TensorView<'a>>,
    /// As in forward.
    pub k_segments: Option<TensorView<'a>>,
    /// As in forward.
    pub gate: Option<TensorView<'a>>,
    /// What forward wrote (with the gate applied).
    pub out: TensorView<'a>,
    /// What forward wrote.
    pub lse: TensorView<'a>,
    /// What forward wrote.
    pub lse_low: TensorView<'a>,
    /// Gradient of the loss with respect to `out`.
    pub d_out: TensorView<'a>,
    /// Gradient of q.
    pub dq: Option<TensorViewMut<'a>>,
    /// Gradient of k.
    pub dk: Option<TensorViewMut<'a>>,
    /// Gradient of v.
    pub dv: Option<TensorViewMut<'a>>,
    /// Gradient of each bias in the bias's own shape, in its dtype or f32; shorter than the biases when the rest is none.
    pub dbiases: Vec<Option<TensorViewMut<'a>>>,
    /// Gradient of the gate.
    pub d_gate: Option<TensorViewMut<'a>>,
}

/// A forward launch that fits its plan.
#[derive(Debug)]
pub struct ForwardArgs<'a> {
    plan: &'a AttentionPlan,
    operands: ForwardOperands<'a>,
}

/// A backward launch that fits its plan.
#[derive(Debug)]
pub struct BackwardArgs<'a> {
    plan: &'a AttentionPlan,
    operands: BackwardOperands<'a>,
}

impl<'a> ForwardArgs<'a> {
    /// Checks every operand against the plan.
    ///
    /// # Errors
    /// A [`ProblemError`] that names the tensor.
    pub fn new(plan: &'a AttentionPlan, operands: ForwardOperands<'a>) -> Result<Self, ProblemError> {
        let o = &operands;
        let inputs = Inputs {
            q: &o.q,
            k: &o.k,
            v: &o.v,
            biases: &o.biases,
            key_mask: o.key_mask.as_ref(),
            q_segments: o.q_segments.as_ref(),
            k_segments: o.k_segments.as_ref(),
            gate: o.gate.as_ref(),
        };
        inputs.check(plan)?;
        let problem = &plan.problem;
        let check = Check { plan };
        check.exact("out", o.out.as_view(), &problem.out_shape(), OUT_AXES, &[problem.spec().dtype])?;
        for (name, lse) in [("lse", &o.lse), ("lse_low", &o.lse_low)] {
            if let Some(lse) = lse {
                check.exact(name, lse.as_view(), &problem.lse_shape(), LSE_AXES, &[DType::F32])?;
            }
        }
        let outputs = [("out", Some(&o.out)), ("lse", o.lse.as_ref()), ("lse_low", o.lse_low.as_ref())];
        check_aliasing(&inputs.named(), &outputs)?;
        Ok(Self { plan, operands })
    }

    /// The plan the operands fit.
    #[must_use]
    pub fn plan(&self) -> &'a AttentionPlan {
        self.plan
    }

    /// The operands.
    #[must_use]
    pub fn into_operands(self) -> ForwardOperands<'a> {
        self.operands
    }
}

impl<'a> BackwardArgs<'a> {
    /// Checks every operand against the plan.
    ///
    /// # Errors
    /// A [`ProblemError`] that names the tensor.
    pub fn new(plan: &'a AttentionPlan, operands: BackwardOperands<'a>) -> Result<Self, ProblemError> {
        let o = &operands;
        let inputs = Inputs {
            q: &o.q,
            k: &o.k,
            v: &o.v,
            biases: &o.biases,
            key_mask: o.key_mask.as_ref(),
            q_segments: o.q_segments.as_ref(),
            k_segments: o.k_segments.as_ref(),
            gate: o.gate.as_ref(),
        };
        inputs.check(plan)?;
        let problem = &plan.problem;
        let (dtype, asked) = (problem.spec().dtype, problem.spec().gradients);
        let check = Check { plan };
        for (name, view) in [("out", &o.out), ("d_out", &o.d_out)] {
            check.exact(name, view, &problem.out_shape(), OUT_AXES, &[dtype])?;
        }
        for (name, view) in [("lse", &o.lse), ("lse_low", &o.lse_low)] {
            check.exact(name, view, &problem.lse_shape(), LSE_AXES, &[DType::F32])?;
        }
        let gradients = [
            ("dq", &o.dq, asked.q, problem.q_shape(), Q_AXES),
            ("dk", &o.dk, asked.k, problem.k_shape(), K_AXES),
            ("dv", &o.dv, asked.v, problem.v_shape(), V_AXES),
            ("d_gate", &o.d_gate, asked.gate, problem.out_shape(), OUT_AXES),
        ];
        for (name, gradient, wanted, shape, axes) in &gradients {
            check.wanted(name, gradient.is_some(), *wanted)?;
            if let Some(gradient) = gradient {
                check.exact(name, gradient.as_view(), shape, *axes, &[dtype])?;
            }
        }
        if o.dbiases.len() > problem.spec().biases.len() {
            let (limit, got) = (problem.spec().biases.len(), o.dbiases.len());
            return Err(ProblemError::Limit { what: "dbiases", limit, got });
        }
        for (i, name) in DBIAS_NAMES.into_iter().enumerate() {
            let gradient = o.dbiases.get(i).and_then(Option::as_ref);
            check.wanted(name, gradient.is_some(), asked.biases[i])?;
            if let (Some(gradient), Some(bias)) = (gradient, problem.spec().biases.get(i)) {
                check.exact(name, gradient.as_view(), &bias.shape, BIAS_AXES, &[bias.dtype, DType::F32])?;
            }
        }
        let mut read = inputs.named();
        read.extend([("out", &o.out), ("lse", &o.lse), ("lse_low", &o.lse_low), ("d_out", &o.d_out)]);
        let mut outputs: Vec<_> = gradients.iter().map(|(name, gradient, ..)| (*name, gradient.as_ref())).collect();
        outputs.extend(DBIAS_NAMES.into_iter().zip(&o.dbiases).map(|(name, gradient)| (name, gradient.as_ref())));
        check_aliasing(&read, &outputs)?;
        Ok(Self { plan, operands })
    }

    /// The plan the operands fit.
    #[must_use]
    pub fn plan(&self) -> &'a AttentionPlan {
        self.plan
    }

    /// The operands.
    #[must_use]
    pub fn into_operands(self) -> BackwardOperands<'a> {
        self.operands
    }
}

const Q_AXES: [&str; 5] = ["batch", "rows", "seqlen_q", "heads", "head_dim"];
const K_AXES: [&str; 5] = ["batch", "rows", "seqlen_k", "kv_heads", "head_dim"];
const V_AXES: [&str; 5] = ["batch", "rows", "seqlen_k", "kv_heads", "head_dim_v"];
const OUT_AXES: [&str; 5] = ["batch", "rows", "seqlen_q", "heads", "head_dim_v"];
const LSE_AXES: [&str; 4] = ["batch", "rows", "heads", "seqlen_q"];

/// What both passes read.
struct Inputs<'v, 'a> {
    q: &'v TensorView<'a>,
    k: &'v TensorView<'a>,
    v: &'v TensorView<'a>,
    biases: &'v [TensorView<'a>],
    key_mask: Option<&'v TensorView<'a>>,
    q_segments: Option<&'v TensorView<'a>>,
    k_segments: Option<&'v TensorView<'a>>,
    gate: Option<&'v TensorView<'a>>,
}

impl<'v, 'a> Inputs<'v, 'a> {
    fn check(&self, plan: &AttentionPlan) -> Result<(), ProblemError> {
        let (problem, spec) = (&plan.problem, plan.problem.spec());
        let check = Check { plan };
        check.exact("q", self.q, &problem.q_shape(), Q_AXES, &[spec.dtype])?;
        check.exact("k", self.k, &problem.k_shape(), K_AXES, &[spec.dtype])?;
        check.exact("v", self.v, &problem.v_shape(), V_AXES, &[spec.dtype])?;
        if self.biases.len() != spec.biases.len() {
            let (expected, got) = (format!("{} (as planned)", spec.biases.len()), self.biases.len());
            return Err(ProblemError::Length { list: "biases", expected, got });
        }
        for ((view, bias), name) in self.biases.iter().zip(&spec.biases).zip(BIAS_NAMES) {
            check.exact(name, view, &bias.shape, BIAS_AXES, &[bias.dtype])?;
        }
        let queries = ([spec.batch, spec.rows, spec.seqlen_q], ["batch", "rows", "seqlen_q"]);
        let keys = ([spec.batch, spec.rows, spec.seqlen_k], ["batch", "rows", "seqlen_k"]);
        let lists = [
            ("key_mask", self.key_mask, spec.key_mask, keys, DType::Bool),
            ("q_segments", self.q_segments, spec.segments, queries, DType::I32),
            ("k_segments", self.k_segments, spec.segments, keys, DType::I32),
        ];
        for (name, view, wanted, (shape, axes), dtype) in lists {
            check.wanted(name, view.is_some(), wanted)?;
            if let Some(view) = view {
                check.broadcastable(name, view, &shape, axes, dtype)?;
            }
        }
        check.wanted("gate", self.gate.is_some(), spec.gate)?;
        match self.gate {
            Some(gate) => check.exact("gate", gate, &problem.out_shape(), OUT_AXES, &[spec.dtype]),
            None => Ok(()),
        }
    }

    fn named(&self) -> Vec<(&'static str, &'v TensorView<'a>)> {
        let mut named = vec![("q", self.q), ("k", self.k), ("v", self.v)];
        named.extend(BIAS_NAMES.into_iter().zip(self.biases));
        let optional = [
            ("key_mask", self.key_mask),
            ("q_segments", self.q_segments),
            ("k_segments", self.k_segments),
            ("gate", self.gate),
        ];
        named.extend(optional.into_iter().filter_map(|(name, view)| Some((name, view?))));
        named
    }
}

/// Checks of one operand.
struct Check<'p> {
    plan: &'p AttentionPlan,
}

impl Check<'_> {
    fn wanted(&self, tensor: &'static str, given: bool, wanted: bool) -> Result<(), ProblemError> {
        match (given, wanted) {
            (true, false) => Err(ProblemError::Unexpected { tensor, reason: "the plan was made without it" }),
            (false, true) => Err(ProblemError::Missing { tensor, reason: "the plan was made with it" }),
            _ => Ok(()),
        }
    }

    fn exact<const N: usize>(
        &self,
        tensor: &'static str,
        view: &TensorView<'_>,
        shape: &[usize; N],
        axes: [&'static str; N],
        dtypes: &[DType],
    ) -> Result<(), ProblemError> {
        self.kind(tensor, view, N, dtypes)?;
        for ((&got, &expected), dimension) in view.shape().iter().zip(shape).zip(axes) {
            if got != expected {
                return Err(ProblemError::Shape { tensor, dimension, expected, got });
            }
        }
        Ok(())
    }

    fn broadcastable<const N: usize>(
        &self,
        tensor: &'static str,
        view: &TensorView<'_>,
        shape: &[usize; N],
        axes: [&'static str; N],
        dtype: DType,
    ) -> Result<(), ProblemError> {
        self.kind(tensor, view, N, &[dtype])?;
        for ((&got, &expected), dimension) in view.shape().iter().zip(shape).zip(axes) {
            if got != 1 && got != expected {
                return Err(ProblemError::NotBroadcastable { tensor, dimension, expected, got });
            }
        }
        Ok(())
    }

    fn kind(
        &self,
        tensor: &'static str,
        view: &TensorView<'_>,
        rank: usize,
        dtypes: &[DType],
    ) -> Result<(), ProblemError> {
        if view.device() != self.plan.device {
            return Err(ProblemError::WrongDevice { tensor, expected: self.plan.device, got: view.device() });
        }
        if !dtypes.contains(&view.dtype()) {
            let names: Vec<String> = dtypes.iter().map(DType::to_string).collect();
            return Err(ProblemError::UnsupportedDType { tensor, expected: names.join(" or "), got: view.dtype() });
        }
        if view.shape().len() != rank {
            return Err(ProblemError::Rank { tensor, expected: rank, got: view.shape().len() });
        }
        Ok(())
    }
}

/// An output's elements are distinct, and none is read or written through another operand.
fn check_aliasing(
    inputs: &[(&'static str, &TensorView<'_>)],
    outputs: &[(&'static str, Option<&TensorViewMut<'_>>)],
) -> Result<(), ProblemError> {
    let outputs: Vec<_> = outputs.iter().filter_map(|(name, view)| Some((*name, view.as_ref()?.as_view()))).collect();
    for (i, &(tensor, view)) in outputs.iter().enumerate() {
        if view.layout().overlaps_itself() {
            return Err(ProblemError::SelfOverlap { tensor, strides: view.layout().strides().to_vec() });
        }
        let others = inputs.iter().copied().chain(outputs[..i].iter().copied());
        if let Some((other, _)) = others.into_iter().find(|(_, other)| view.overlaps(other)) {
            return Err(ProblemError::Overlap { output: tensor, other });
        }
    }
    Ok(())
}

const _: () = assert!(MAX_BIASES == BIAS_NAMES.len());
