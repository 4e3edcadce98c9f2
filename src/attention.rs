//! Attention on a device: sizes inferred from the tensors, outputs allocated, one launch each way.

use tracing::debug;

use crate::{
    AccumulateArgs, AttentionPlan, AttentionProblem, AttentionSpec, Backend, BackwardArgs, BackwardOperands, BiasSpec,
    DType, Device, DeviceError, DeviceId, EmptyRows, Error, ForwardArgs, ForwardOperands, Gradients, MAX_BIASES,
    MergeArgs, MergeOperands, ProblemError, Products, RelayoutArgs, RopeArgs, RopeSpec, Stream, StructuralMask, Tensor,
    TensorView, TensorViewMut,
};

/// Tensors that attention reads.
///
/// `out = softmax(softmax_scale · q kᵀ + Σ biasᵢ + mask) v`, then `sigmoid(gate) ⊙ out` when there is a gate.
///
/// *Shapes*: below; any strides. *dtypes*: q, k, v and gate alike, f32, f16 or bf16; a bias has that dtype or f32.
#[derive(Clone, Debug)]
pub struct Inputs<'a> {
    /// `[batch, rows, seqlen_q, heads, head_dim]`
    pub q: TensorView<'a>,
    /// `[batch, rows, seqlen_k, kv_heads, head_dim]`; kv_heads divides heads.
    pub k: TensorView<'a>,
    /// `[batch, rows, seqlen_k, kv_heads, head_dim_v]`
    pub v: TensorView<'a>,
    /// Up to [`MAX_BIASES`], each `[batch, rows, heads, seqlen_q, seqlen_k]` with any axes of size 1.
    pub biases: Vec<TensorView<'a>>,
    /// Bool, broadcastable to `[batch, rows, seqlen_k]`; true keeps the key.
    pub key_mask: Option<TensorView<'a>>,
    /// i32, broadcastable to `[batch, rows, seqlen_q]`: a query sees only keys with its own id.
    pub q_segments: Option<TensorView<'a>>,
    /// i32, broadcastable to `[batch, rows, seqlen_k]`.
    pub k_segments: Option<TensorView<'a>>,
    /// `[batch, rows, seqlen_q, heads, head_dim_v]`, before the sigmoid.
    pub gate: Option<TensorView<'a>>,
}

/// What attention is to do with its inputs.
#[derive(Clone, Debug, Default)]
pub struct Options {
    /// Factor of q kᵀ; `None` for 1/√head_dim.
    pub softmax_scale: Option<f64>,
    /// Keys that count, from the front: one entry for all, one per batch, or one per batch and row.
    pub kv_lengths: Option<Vec<i64>>,
    /// Causal, window, ALiBi, global positions: masks that are never stored.
    pub mask: StructuralMask,
    /// What a row without keys gives.
    pub empty_rows: EmptyRows,
    /// Whether the factors of products may be rounded to tf32, in f32 alone: faster where there are tensor cores.
    pub products: Products,
}

/// What a forward pass writes, and a backward pass reads.
#[derive(Debug)]
pub struct Forward {
    /// `[batch, rows, seqlen_q, heads, head_dim_v]` in the dtype of q.
    pub out: Tensor,
    /// Natural log of the sum of exponentials, f32 `[batch, rows, heads, seqlen_q]`.
    pub lse: Tensor,
    /// What f32 rounding took from `lse`, f32 of the same shape.
    pub lse_low: Tensor,
}

/// Gradients, each in the shape and dtype of its input; `None` where none was asked for.
#[derive(Debug)]
pub struct Backward {
    /// Gradient of q.
    pub dq: Option<Tensor>,
    /// Gradient of k.
    pub dk: Option<Tensor>,
    /// Gradient of v.
    pub dv: Option<Tensor>,
    /// Gradient of the gate.
    pub d_gate: Option<Tensor>,
    /// One entry per bias, summed over the axes that bias broadcasts.
    pub dbiases: Vec<Option<Tensor>>,
}

impl<'a> Inputs<'a> {
    /// Plain attention: no bias, mask or gate.
    #[must_use]
    pub fn new(q: TensorView<'a>, k: TensorView<'a>, v: TensorView<'a>) -> Self {
        Self { q, k, v, biases: Vec::new(), key_mask: None, q_segments: None, k_segments: None, gate: None }
    }

    /// Operands of a forward launch that writes to the caller's own memory.
    ///
    /// *Shapes*: as in [`Forward`]; any strides that do not overlap.
    #[must_use]
    pub fn forward_operands(
        &self,
        out: TensorViewMut<'a>,
        lse: Option<TensorViewMut<'a>>,
        lse_low: Option<TensorViewMut<'a>>,
    ) -> ForwardOperands<'a> {
        let Self { q, k, v, biases, key_mask, q_segments, k_segments, gate } = self.clone();
        ForwardOperands { q, k, v, biases, key_mask, q_segments, k_segments, gate, out, lse, lse_low }
    }

    /// Operands of a backward launch that reads `forward` and writes to `backward`.
    #[must_use]
    pub fn backward_operands(
        &self,
        forward: &'a Forward,
        d_out: &TensorView<'a>,
        backward: &'a mut Backward,
    ) -> BackwardOperands<'a> {
        let Self { q, k, v, biases, key_mask, q_segments, k_segments, gate } = self.clone();
        let Backward { dq, dk, dv, d_gate, dbiases } = backward;
        let [dq, dk, dv, d_gate] = [dq, dk, dv, d_gate].map(|gradient| gradient.as_mut().map(Tensor::view_mut));
        let dbiases = dbiases.iter_mut().map(|gradient| gradient.as_mut().map(Tensor::view_mut)).collect();
        let (out, lse, lse_low) = (forward.out.view(), forward.lse.view(), forward.lse_low.view());
        #[rustfmt::skip]
        let operands = BackwardOperands {
            q, k, v, biases, key_mask, q_segments, k_segments, gate,
            out, lse, lse_low, d_out: d_out.clone(),
            dq, dk, dv, dbiases, d_gate,
        };
        operands
    }
}

impl Forward {
    /// Memory for a forward pass of `problem`.
    ///
    /// # Errors
    /// [`DeviceError::OutOfMemory`].
    pub fn zeros(device: &Device, problem: &AttentionProblem) -> Result<Self, Error> {
        Self::with_out(device.zeros(problem.spec().dtype, &problem.out_shape())?, device, problem)
    }

    /// The same on the host: see [`Device::download_tensor`].
    ///
    /// # Errors
    /// As there.
    pub fn into_host(self, device: &Device) -> Result<Self, Error> {
        let to = |tensor| device.download_tensor(tensor);
        Ok(Self { out: to(self.out)?, lse: to(self.lse)?, lse_low: to(self.lse_low)? })
    }

    pub(crate) fn with_out(out: Tensor, device: &Device, problem: &AttentionProblem) -> Result<Self, Error> {
        let lse = || device.zeros(DType::F32, &problem.lse_shape());
        Ok(Self { out, lse: lse()?, lse_low: lse()? })
    }
}

impl Backward {
    /// Memory for the gradients asked for, in the shapes and dtypes of the inputs.
    ///
    /// # Errors
    /// [`ProblemError::Unexpected`] for a gradient of the gate without a gate, [`DeviceError::OutOfMemory`].
    pub fn zeros(device: &Device, inputs: &Inputs<'_>, gradients: Gradients) -> Result<Self, Error> {
        let like =
            |view: &TensorView<'_>, wanted: bool| wanted.then(|| device.zeros(view.dtype(), view.shape())).transpose();
        let no_gate = ProblemError::Unexpected { tensor: "d_gate", reason: "the problem has no such operand" };
        let gate = match &inputs.gate {
            None if gradients.gate => return Err(no_gate.into()),
            gate => gate.as_ref().map(|gate| like(gate, gradients.gate)).transpose()?.flatten(),
        };
        let dbiases = inputs.biases.iter().zip(gradients.biases).map(|(bias, wanted)| like(bias, wanted));
        Ok(Self {
            dq: like(&inputs.q, gradients.q)?,
            dk: like(&inputs.k, gradients.k)?,
            dv: like(&inputs.v, gradients.v)?,
            d_gate: gate,
            dbiases: dbiases.collect::<Result<_, _>>()?,
        })
    }

    /// The same on the host: see [`Device::download_tensor`].
    ///
    /// # Errors
    /// As there.
    pub fn into_host(self, device: &Device) -> Result<Self, Error> {
        let to = |tensor: Option<Tensor>| tensor.map(|tensor| device.download_tensor(tensor)).transpose();
        Ok(Self {
            dq: to(self.dq)?,
            dk: to(self.dk)?,
            dv: to(self.dv)?,
            d_gate: to(self.d_gate)?,
            dbiases: self.dbiases.into_iter().map(to).collect::<Result<_, _>>()?,
        })
    }
}

/// Every gradient the inputs have.
///
/// ```
/// # use tilefold::{Inputs, TensorView, all_gradients};
/// let data = [0.0_f32; 8];
/// let view = TensorView::from_slice(&data, &[1, 1, 2, 1, 4])?;
/// let gradients = all_gradients(&Inputs::new(view.clone(), view.clone(), view));
/// assert!(gradients.q && gradients.k && gradients.v && !gradients.gate && gradients.biases == [false; 4]);
/// # Ok::<(), tilefold::Error>(())
/// ```
#[must_use]
pub fn all_gradients(inputs: &Inputs<'_>) -> Gradients {
    let biases = std::array::from_fn(|i| i < inputs.biases.len());
    Gradients { q: true, k: true, v: true, gate: inputs.gate.is_some(), biases }
}

/// The checked problem that inputs, options and gradients describe, with sizes inferred from the shapes.
///
/// Sizes come from q, from `seqlen_k` and `kv_heads` of k, and from `head_dim_v` of v; that every tensor agrees is checked
/// again, with strides and aliasing, when a launch is made.
///
/// ```
/// use tilefold::{Backend, Device, Inputs, Options, TensorView, all_gradients, problem};
/// let data = [0.0_f32; 24];
/// let x = TensorView::from_slice(&data, &[1, 1, 3, 2, 4])?;
/// let inputs = Inputs::new(x.clone(), x.clone(), x);
/// let problem = problem(&inputs, &Options::default(), all_gradients(&inputs))?;
/// assert_eq!(problem.logits_shape(), [1, 1, 2, 3, 3]);
/// let plan = Device::cpu()?.plan_attention(&problem)?;
/// println!("backward needs {} bytes beside its operands", plan.backward_workspace_bytes);
/// # Ok::<(), tilefold::Error>(())
/// ```
///
/// # Errors
/// A [`ProblemError`] that names the tensor and dimension, or the parameter.
pub fn problem(inputs: &Inputs<'_>, options: &Options, gradients: Gradients) -> Result<AttentionProblem, Error> {
    let [batch, rows, seqlen_q, heads, head_dim] = dims("q", &inputs.q)?;
    let [_, _, seqlen_k, kv_heads, _] = dims("k", &inputs.k)?;
    let [.., head_dim_v] = dims("v", &inputs.v)?;
    if inputs.biases.len() > MAX_BIASES {
        let (what, limit, got) = ("biases", MAX_BIASES, inputs.biases.len());
        return Err(ProblemError::Limit { what, limit, got }.into());
    }
    let biases = inputs.biases.iter().zip(["bias0", "bias1", "bias2", "bias3"]);
    let biases = biases.map(|(bias, name)| Ok(BiasSpec { shape: dims(name, bias)?, dtype: bias.dtype() }));
    let spec = AttentionSpec {
        dtype: inputs.q.dtype(),
        products: options.products,
        batch,
        rows,
        seqlen_q,
        seqlen_k,
        heads,
        kv_heads,
        head_dim,
        head_dim_v,
        softmax_scale: options.softmax_scale,
        biases: biases.collect::<Result<_, ProblemError>>()?,
        key_mask: inputs.key_mask.is_some(),
        kv_lengths: options.kv_lengths.clone(),
        segments: inputs.q_segments.is_some() || inputs.k_segments.is_some(),
        mask: options.mask.clone(),
        gate: inputs.gate.is_some(),
        empty_rows: options.empty_rows,
        gradients,
    };
    Ok(AttentionProblem::new(spec)?)
}

fn dims(tensor: &'static str, view: &TensorView<'_>) -> Result<[usize; 5], ProblemError> {
    view.shape().try_into().map_err(|_| ProblemError::Rank { tensor, expected: 5, got: view.shape().len() })
}

/// Attention, with its outputs allocated on the device.
///
/// *Numerics*: docs/mathematics.md, equations (1)-(6); sums and softmax in f32 whatever the dtype, and equal inputs give
/// equal bits. *Memory*: nothing of size seqlen_q × seqlen_k is allocated.
///
/// ```
/// use tilefold::{Device, Inputs, Options, TensorView, attention};
/// let data: Vec<f32> = (0_u8..24).map(|i| f32::from(i % 7) - 3.0).collect();
/// let x = TensorView::from_slice(&data, &[1, 1, 3, 2, 4])?; // [batch, rows, seqlen, heads, head_dim]
/// let forward = attention(&Device::cpu()?, &Inputs::new(x.clone(), x.clone(), x), &Options::default())?;
/// assert_eq!(forward.out.shape(), [1, 1, 3, 2, 4]);
/// assert_eq!(forward.lse.shape(), [1, 1, 2, 3]); // [batch, rows, heads, seqlen]
/// # Ok::<(), tilefold::Error>(())
/// ```
///
/// # Errors
/// [`Error::Problem`] that names the tensor and dimension; [`Error::Device`].
pub fn attention(device: &Device, inputs: &Inputs<'_>, options: &Options) -> Result<Forward, Error> {
    let problem = problem(inputs, options, Gradients::default())?;
    let plan = device.plan_attention(&problem)?;
    let mut forward = Forward::zeros(device, &problem)?;
    let Forward { out, lse, lse_low } = &mut forward;
    let operands = inputs.forward_operands(out.view_mut(), Some(lse.view_mut()), Some(lse_low.view_mut()));
    attention_into(device, &plan, operands)?;
    Ok(forward)
}

/// Gradients of attention, with memory allocated on the device.
///
/// `forward` is what [`attention`] gave for the same inputs and options, `d_out` the gradient of a loss with respect to
/// its output. *Numerics*: docs/mathematics.md, equations (7)-(16); a recomputation, the same bits on every run. A bias's
/// gradient is summed over the axes it broadcasts, in f32, and rounded once to the bias's dtype.
///
/// ```
/// use tilefold::{Device, Inputs, Options, TensorView, all_gradients, attention, attention_backward};
/// let (device, options) = (Device::cpu()?, Options::default());
/// let data: Vec<f32> = (0_u8..24).map(|i| f32::from(i % 7) - 3.0).collect();
/// let x = TensorView::from_slice(&data, &[1, 1, 3, 2, 4])?;
/// let mut inputs = Inputs::new(x.clone(), x.clone(), x.clone());
/// let bias = [0.5_f32; 9];
/// inputs.biases.push(TensorView::from_slice(&bias, &[1, 1, 1, 3, 3])?); // one for both heads
/// let forward = attention(&device, &inputs, &options)?;
/// let backward = attention_backward(&device, &inputs, &options, &forward, &x, all_gradients(&inputs))?;
/// let dbias = backward.dbiases[0].as_ref().map(tilefold::Tensor::to_f64).transpose()?.unwrap_or_default();
/// assert_eq!(dbias.len(), 9);
/// assert!(dbias.iter().sum::<f64>().abs() < 1e-4); // adding a constant to a row's logits changes nothing
/// # Ok::<(), tilefold::Error>(())
/// ```
///
/// # Errors
/// As [`attention`]; [`ProblemError::Unexpected`] for a gradient of an operand that is not there.
pub fn attention_backward(
    device: &Device,
    inputs: &Inputs<'_>,
    options: &Options,
    forward: &Forward,
    d_out: &TensorView<'_>,
    gradients: Gradients,
) -> Result<Backward, Error> {
    let plan = device.plan_attention(&problem(inputs, options, gradients)?)?;
    let mut backward = Backward::zeros(device, inputs, gradients)?;
    attention_backward_into(device, &plan, inputs.backward_operands(forward, d_out, &mut backward))?;
    Ok(backward)
}

/// A forward launch into the caller's own outputs; returns when they are written.
///
/// ```
/// use tilefold::{Backend, Device, Gradients, Inputs, Options, TensorView, TensorViewMut, attention_into, problem};
/// let device = Device::cpu()?;
/// let data = [1.0_f32; 24];
/// let x = TensorView::from_slice(&data, &[1, 1, 3, 2, 4])?;
/// let inputs = Inputs::new(x.clone(), x.clone(), x);
/// let plan = device.plan_attention(&problem(&inputs, &Options::default(), Gradients::default())?)?;
/// println!("{} needs {} bytes beside its operands", plan.kernel, plan.forward_workspace_bytes);
/// let mut out = [0.0_f32; 24];
/// let out_view = TensorViewMut::from_slice(&mut out, &[1, 1, 3, 2, 4])?;
/// attention_into(&device, &plan, inputs.forward_operands(out_view, None, None))?;
/// assert_eq!(out, data); // the mean of equal values
/// # Ok::<(), tilefold::Error>(())
/// ```
///
/// # Errors
/// [`Error::Problem`] when an operand does not fit the plan; [`Error::Device`].
pub fn attention_into(device: &Device, plan: &AttentionPlan, operands: ForwardOperands<'_>) -> Result<(), Error> {
    check_device("plan", device, plan.device)?;
    debug!(kernel = plan.kernel, workspace_bytes = plan.forward_workspace_bytes, "attention forward");
    let args = ForwardArgs::new(plan, operands)?;
    launch(device, |stream| device.attention_forward(stream, args))
}

/// A backward launch into the caller's own gradients; returns when they are written.
///
/// ```
/// use tilefold::{
///     Backend, Backward, Device, Gradients, Inputs, Options, TensorView, TensorViewMut, attention,
///     attention_backward_into, problem,
/// };
/// let (device, options) = (Device::cpu()?, Options::default());
/// let data: Vec<f32> = (0_u8..24).map(|i| f32::from(i % 7) - 3.0).collect();
/// let x = TensorView::from_slice(&data, &[1, 1, 3, 2, 4])?;
/// let inputs = Inputs::new(x.clone(), x.clone(), x.clone());
/// let forward = attention(&device, &inputs, &options)?;
///
/// let wanted = Gradients { v: true, ..Gradients::default() };
/// let plan = device.plan_attention(&problem(&inputs, &options, wanted)?)?;
/// let (mut none, mut dv) = (Backward::zeros(&device, &inputs, Gradients::default())?, [0.0_f32; 24]);
/// let mut operands = inputs.backward_operands(&forward, &x, &mut none);
/// operands.dv = Some(TensorViewMut::from_slice(&mut dv, &[1, 1, 3, 2, 4])?);
/// attention_backward_into(&device, &plan, operands)?;
/// assert!(dv.iter().any(|&dv| dv != 0.0));
/// # Ok::<(), tilefold::Error>(())
/// ```
///
/// # Errors
/// As [`attention_into`].
pub fn attention_backward_into(
    device: &Device,
    plan: &AttentionPlan,
    operands: BackwardOperands<'_>,
) -> Result<(), Error> {
    check_device("plan", device, plan.device)?;
    debug!(kernel = plan.kernel, workspace_bytes = plan.backward_workspace_bytes, "attention backward");
    let args = BackwardArgs::new(plan, operands)?;
    launch(device, |stream| device.attention_backward(stream, args))
}

/// Adds attention over other keys into an accumulator: the same as attention over both sets at once.
///
/// ```
/// use tilefold::{Device, Inputs, MergeOperands, Options, TensorView, attention, merge};
/// let (device, options) = (Device::cpu()?, Options::default());
/// let data: Vec<f32> = (0_u8..16).map(|i| f32::from(i % 5)).collect();
/// let x = TensorView::from_slice(&data, &[1, 1, 4, 1, 4])?;
/// let whole = attention(&device, &Inputs::new(x.clone(), x.clone(), x.clone()), &options)?;
///
/// let half = |keys| {
///     let part = x.slice(2, keys, 1)?;
///     attention(&device, &Inputs::new(x.clone(), part.clone(), part), &options)
/// };
/// let (mut acc, other) = (half(0..2)?, half(2..4)?);
/// merge(&device, MergeOperands {
///     out: other.out.view(),
///     lse: other.lse.view(),
///     lse_low: other.lse_low.view(),
///     acc_out: acc.out.view_mut(),
///     acc_lse: acc.lse.view_mut(),
///     acc_lse_low: acc.lse_low.view_mut(),
/// })?;
/// let (whole, merged) = (whole.out.to_f64()?, acc.out.to_f64()?);
/// assert!(whole.iter().zip(&merged).all(|(a, b)| (a - b).abs() < 1e-5));
/// # Ok::<(), tilefold::Error>(())
/// ```
///
/// # Errors
/// [`Error::Problem`] when the tensors do not fit together; [`Error::Device`].
pub fn merge(device: &Device, operands: MergeOperands<'_>) -> Result<(), Error> {
    let args = MergeArgs::new(operands)?;
    check_device("tensors", device, args.device())?;
    launch(device, |stream| device.merge(stream, args))
}

/// Copies elements from one layout and dtype to another.
///
/// ```
/// use tilefold::{DType, Device, TensorView, relayout};
/// let device = Device::cpu()?;
/// let data = [1.0_f32, 2.0, 3.0, 4.0, 5.0, 6.0];
/// let mut turned = device.zeros(DType::BF16, &[3, 2])?;
/// relayout(&device, TensorView::from_slice(&data, &[2, 3])?.permute(&[1, 0])?, turned.view_mut())?;
/// assert_eq!(turned.to_f64(), Ok(vec![1.0, 4.0, 2.0, 5.0, 3.0, 6.0]));
/// # Ok::<(), tilefold::Error>(())
/// ```
///
/// # Errors
/// [`Error::Problem`] when shapes or dtypes do not fit together; [`Error::Device`].
pub fn relayout(device: &Device, source: TensorView<'_>, destination: TensorViewMut<'_>) -> Result<(), Error> {
    let args = RelayoutArgs::new(source, destination)?;
    check_device("tensors", device, args.device())?;
    launch(device, |stream| device.relayout(stream, args))
}

/// Adds `source` to `destination`, element by element in f32: see [`AccumulateArgs`].
///
/// ```
/// use tilefold::{DType, Device, Tensor, TensorView, accumulate};
/// let mut sum = Tensor::from_f64(&[1.0, 2.0, 3.0], DType::BF16, &[3])?;
/// accumulate(&Device::cpu()?, TensorView::from_slice(&[0.5_f32, 0.0, -1.0], &[3])?, sum.view_mut())?;
/// assert_eq!(sum.to_f64(), Ok(vec![1.5, 2.0, 2.0]));
/// # Ok::<(), tilefold::Error>(())
/// ```
///
/// # Errors
/// [`Error::Problem`] when shapes or dtypes do not fit together, or the tensors overlap; [`Error::Device`].
pub fn accumulate(device: &Device, source: TensorView<'_>, destination: TensorViewMut<'_>) -> Result<(), Error> {
    let args = AccumulateArgs::new(source, destination)?;
    check_device("tensors", device, args.device())?;
    launch(device, |stream| device.accumulate(stream, args))
}

/// Rotary position embedding: turns pairs of channels by angles that grow with the position. See [`RopeSpec`].
///
/// *Shapes*: source and destination `[batch, rows, seqlen, heads, head_dim]`, any strides, without a common element; the
/// dtypes are alike. With `inverse` it is the gradient: `dq` of attention becomes the gradient of what was turned.
///
/// ```
/// use tilefold::{DType, Device, RopePairs, RopeSpec, TensorView, rope};
/// let device = Device::cpu()?;
/// let x: Vec<f32> = (0_u8..32).map(f32::from).collect();
/// let x = TensorView::from_slice(&x, &[1, 1, 2, 2, 8])?;
/// let (mut turned, mut back) = (device.zeros(DType::F32, x.shape())?, device.zeros(DType::F32, x.shape())?);
/// let mut spec = RopeSpec { offset: 1 << 31, ..RopeSpec::new(8, RopePairs::Halves) };
/// rope(&device, &spec, x.clone(), turned.view_mut())?;
/// spec.inverse = true;
/// rope(&device, &spec, turned.view(), back.view_mut())?;
/// assert!(back.to_f64()?.iter().zip(x.to_f64()?).all(|(back, x)| (back - x).abs() < 2e-5));
/// # Ok::<(), tilefold::Error>(())
/// ```
///
/// # Errors
/// [`Error::Problem`] for options out of range, and when the tensors do not fit together; [`Error::Device`].
pub fn rope(
    device: &Device,
    spec: &RopeSpec,
    source: TensorView<'_>,
    destination: TensorViewMut<'_>,
) -> Result<(), Error> {
    let args = RopeArgs::new(spec, source, destination)?;
    check_device("tensors", device, args.device())?;
    launch(device, |stream| device.rope(stream, args))
}

fn check_device(what: &'static str, device: &Device, got: DeviceId) -> Result<(), DeviceError> {
    let expected = device.info().id;
    if got == expected { Ok(()) } else { Err(DeviceError::WrongDevice { what, expected, got }) }
}

/// Enqueues on a stream of its own and waits.
fn launch(device: &Device, enqueue: impl FnOnce(&Stream) -> Result<(), DeviceError>) -> Result<(), Error> {
    let stream = device.stream()?;
    enqueue(&stream)?;
    Ok(device.synchronize(&stream)?)
}

#[cfg(test)]
mod tests;
