//! A backend that computes through the oracle, with a bug planted in it: the suite has to find every one.

mod moves;

use std::sync::Arc;

use tilefold_core::attention::reference::{self, ReferenceInputs};
use tilefold_core::{
    AccumulateArgs, AttentionPlan, AttentionProblem, AttentionSpec, Backend, BackwardArgs, BiasSpec, DType,
    DeviceError, DeviceInfo, DeviceResult, EmptyRows, Event, ForwardArgs, MergeArgs, ProblemError, RelayoutArgs,
    RopeArgs, Storage, Stream, Tensor, TensorViewMut, Window,
};

use crate::values::{round_to, round_to_tf32};

/// What goes wrong, by the mistake a kernel's author makes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Bug {
    /// A query sees one key after its own position.
    CausalOffByOne,
    /// Left and right of a window are exchanged.
    WindowMirrored,
    /// Positions start at 0, whatever the offsets.
    OffsetsIgnored,
    /// ALiBi raises logits instead of lowering them.
    AlibiSign,
    /// The key mask is read inverted.
    KeyMaskInverted,
    /// The last key of `kv_lengths` is left out.
    KeyLengthOffByOne,
    /// Segments are not looked at.
    SegmentsIgnored,
    /// The scale is that of head_dim_v.
    WrongScale,
    /// Query heads are shared out over key heads in turn instead of in groups.
    HeadsInTurn,
    /// Two heads of the output are exchanged.
    HeadsSwapped,
    /// The last query of every row is not written.
    TailUnwritten,
    /// The last key's gradients are not written.
    KeyTailUnwritten,
    /// Empty rows give NaN, as 0/0 does.
    EmptyRowsNan,
    /// Empty rows give the other of zero and mean.
    EmptyRowsExchanged,
    /// lse is stored in one f32; backward takes its probabilities from that.
    LseRounded,
    /// lse to base 2.
    LseBase2,
    /// The gradient of the second bias stays 0.
    BiasGradientDropped,
    /// The bias gradient misses the last row it sums over.
    BiasGradientMissesRow,
    /// The bias gradient includes the softmax scale.
    BiasGradientScaled,
    /// The bias gradient is summed over rows in the dtype of q instead of f32.
    BiasGradientInHalf,
    /// The gradient of k ignores the scale.
    KeyGradientUnscaled,
    /// d_gate misses the factor 1 - σ.
    GateGradient,
    /// The gate is applied in forward, and forgotten in backward.
    GateForgottenInBackward,
    /// Bits depend on the run.
    Nondeterministic,
    /// Every result is 1 % too large.
    Inaccurate,
    /// q, k and v of f32 are rounded to tf32: no bug where that is allowed.
    RoundedToTf32,
    /// q, k and v of f32 are rounded to bf16.
    RoundedToBf16,
    /// k is read as if it lay dense, although it is packed with q and v.
    PackedReadDense,
    /// Strides are taken to 32 bits: what lies farther is read where nothing was written.
    ShortStrides,
    /// A fill of a view with strides misses the last entry of its innermost axis.
    FillMissesTail,
    /// A copy goes along negative strides as if they were positive.
    RelayoutForwards,
    /// A cast to bf16 drops bits instead of rounding.
    RelayoutTruncates,
    /// A merge weighs the part without its low part of lse.
    MergeLowIgnored,
    /// In a merge an empty part is one with a very low lse.
    MergeEmptyPartCounts,
    /// A sum is only its last part.
    AccumulateOverwrites,
    /// Positions of a rotation are numbers in f32.
    RopePositionsInSingle,
    /// The gradient of a rotation is the rotation.
    RopeInverseForgotten,
}

impl Bug {
    /// Every bug.
    pub const ALL: [Self; 37] = [
        Self::CausalOffByOne,
        Self::WindowMirrored,
        Self::OffsetsIgnored,
        Self::AlibiSign,
        Self::KeyMaskInverted,
        Self::KeyLengthOffByOne,
        Self::SegmentsIgnored,
        Self::WrongScale,
        Self::HeadsInTurn,
        Self::HeadsSwapped,
        Self::TailUnwritten,
        Self::KeyTailUnwritten,
        Self::EmptyRowsNan,
        Self::EmptyRowsExchanged,
        Self::LseRounded,
        Self::LseBase2,
        Self::BiasGradientDropped,
        Self::BiasGradientMissesRow,
        Self::BiasGradientScaled,
        Self::BiasGradientInHalf,
        Self::KeyGradientUnscaled,
        Self::GateGradient,
        Self::GateForgottenInBackward,
        Self::Nondeterministic,
        Self::Inaccurate,
        Self::RoundedToTf32,
        Self::RoundedToBf16,
        Self::PackedReadDense,
        Self::ShortStrides,
        Self::FillMissesTail,
        Self::RelayoutForwards,
        Self::RelayoutTruncates,
        Self::MergeLowIgnored,
        Self::MergeEmptyPartCounts,
        Self::AccumulateOverwrites,
        Self::RopePositionsInSingle,
        Self::RopeInverseForgotten,
    ];

    fn spec(self, s: &mut AttentionSpec) {
        match self {
            Self::CausalOffByOne if s.mask.causal => s.mask.q_offset += 1,
            Self::WindowMirrored => {
                s.mask.window = s.mask.window.map(|window| Window { left: window.right, right: window.left });
            }
            Self::OffsetsIgnored => (s.mask.q_offset, s.mask.k_offset) = (0, 0),
            Self::AlibiSign => s.mask.alibi_slopes.iter_mut().flatten().for_each(|slope| *slope = -*slope),
            Self::KeyLengthOffByOne => {
                s.kv_lengths.iter_mut().flatten().for_each(|length| *length = (*length - 1).max(0))
            }
            #[allow(clippy::cast_precision_loss, reason = "at most 256")]
            Self::WrongScale if s.softmax_scale.is_none() => s.softmax_scale = Some(1.0 / (s.head_dim_v as f64).sqrt()),
            Self::EmptyRowsExchanged => {
                s.empty_rows = if s.empty_rows == EmptyRows::Zero { EmptyRows::Uniform } else { EmptyRows::Zero };
            }
            _ => {}
        }
    }

    /// `q_strides` are those of the q that was handed over.
    fn inputs(self, s: &AttentionSpec, q_strides: &[i64], inputs: &mut ReferenceInputs) {
        let width = s.heads * s.head_dim;
        match self {
            Self::PackedReadDense if usize::try_from(q_strides[2]).is_ok_and(|stride| stride == 3 * width) => {
                let positions = inputs.q.chunks(width).zip(inputs.k.chunks(width)).zip(inputs.v.chunks(width));
                let packed: Vec<f64> = positions.flat_map(|((q, k), v)| [q, k, v].concat()).collect();
                let count = inputs.k.len();
                inputs.k.copy_from_slice(&packed[width..width + count]);
            }
            Self::ShortStrides if i32::try_from(q_strides[1]).is_err() => inputs.q[s.seqlen_q * width..].fill(0.0),
            Self::KeyMaskInverted => inputs.key_mask.iter_mut().flatten().for_each(|keeps| *keeps = !*keeps),
            Self::SegmentsIgnored => {
                inputs.q_segments.iter_mut().chain(&mut inputs.k_segments).flatten().for_each(|id| *id = 0);
            }
            Self::HeadsInTurn if s.kv_heads > 1 && s.heads > s.kv_heads => {
                // The same as exchanging the first two key heads, as far as a wrong mapping goes.
                swap_heads(&mut inputs.k, s.kv_heads, s.head_dim);
            }
            Self::RoundedToTf32 if s.dtype == DType::F32 => {
                #[allow(clippy::cast_possible_truncation, reason = "they were given in f32")]
                round_factors(inputs, |x| f64::from(round_to_tf32(x as f32)));
            }
            Self::RoundedToBf16 if s.dtype == DType::F32 => round_factors(inputs, |x| round_to(DType::BF16, x)),
            _ => {}
        }
    }
}

fn round_factors(inputs: &mut ReferenceInputs, round: impl Fn(f64) -> f64) {
    inputs.q.iter_mut().chain(&mut inputs.k).chain(&mut inputs.v).for_each(|x| *x = round(*x));
}

/// Exchanges heads 0 and 1 of a `[.., heads, channels]` tensor.
fn swap_heads(values: &mut [f64], heads: usize, channels: usize) {
    for row in values.chunks_mut(heads * channels).filter(|_| heads > 1) {
        let (first, rest) = row.split_at_mut(channels);
        first.swap_with_slice(&mut rest[..channels]);
    }
}

/// The factor of results that are off.
const OFF: f64 = 1.01;

/// Attention through the oracle, everything else through another host backend.
#[derive(Debug)]
pub struct Planted {
    inner: Arc<dyn Backend>,
    bug: Option<Bug>,
    launches: std::sync::atomic::AtomicU32,
}

impl Planted {
    /// The oracle as a backend; with a bug, or right.
    #[must_use]
    pub fn new(inner: Arc<dyn Backend>, bug: Option<Bug>) -> Self {
        Self { inner, bug, launches: 0.into() }
    }

    fn has(&self, bug: Bug) -> bool {
        self.bug == Some(bug)
    }

    fn problem(&self, plan: &AttentionPlan) -> DeviceResult<AttentionProblem> {
        let mut spec = plan.problem.spec().clone();
        if let Some(bug) = self.bug {
            bug.spec(&mut spec);
        }
        AttentionProblem::new(spec).map_err(failed)
    }

    /// Writes row-major values into a view of any layout.
    fn write(&self, stream: &Stream, values: &[f64], to: TensorViewMut<'_>) -> DeviceResult<()> {
        let (shape, dtype) = (to.as_view().shape().to_vec(), to.as_view().dtype());
        let dense = Tensor::from_f64(values, dtype, &shape).map_err(failed)?;
        self.inner.relayout(stream, RelayoutArgs::new(dense.view(), to).map_err(failed)?)
    }

    fn forward_bugs(&self, s: &AttentionSpec, out: &mut [f64], lse: &mut [f64]) {
        if self.has(Bug::HeadsSwapped) {
            swap_heads(out, s.heads, s.head_dim_v);
        }
        if self.has(Bug::LseBase2) {
            lse.iter_mut().for_each(|lse| *lse /= std::f64::consts::LN_2);
        }
        if self.has(Bug::Inaccurate) {
            out.iter_mut().for_each(|out| *out *= OFF);
        }
        if self.has(Bug::EmptyRowsNan) {
            for (at, row) in out.chunks_mut(s.head_dim_v).enumerate() {
                let (head, rest) = (at % s.heads, at / s.heads);
                let (query, outer) = (rest % s.seqlen_q, rest / s.seqlen_q);
                if lse[(outer * s.heads + head) * s.seqlen_q + query] == f64::NEG_INFINITY {
                    row.fill(f64::NAN);
                }
            }
        }
        if self.has(Bug::Nondeterministic) {
            let launch = self.launches.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
            out[0] *= 1.0 + f64::from(launch % 2) * 2.0 * s.dtype.unit_roundoff();
        }
    }

    fn backward_bugs(
        &self,
        problem: &AttentionProblem,
        gradients: &mut reference::ReferenceGradients,
        gate: Option<&[f64]>,
    ) {
        if self.has(Bug::KeyGradientUnscaled) {
            gradients.dk.iter_mut().for_each(|dk| *dk /= problem.softmax_scale());
        }
        if self.has(Bug::BiasGradientDropped) {
            gradients.dbiases.iter_mut().skip(1).for_each(|dbias| dbias.fill(0.0));
        }
        if self.has(Bug::BiasGradientScaled) {
            gradients.dbiases.iter_mut().flatten().for_each(|dbias| *dbias *= problem.softmax_scale());
        }
        if self.has(Bug::GateGradient) {
            let sigmoid = |x: f64| 1.0 / (1.0 + (-x).exp());
            let pairs = gradients.d_gate.iter_mut().flatten().zip(gate.into_iter().flatten());
            pairs.for_each(|(d_gate, &gate)| *d_gate /= 1.0 - sigmoid(gate) + 1e-9);
        }
        if self.has(Bug::Inaccurate) {
            let named = [&mut gradients.dq, &mut gradients.dk, &mut gradients.dv];
            let all = named.into_iter().chain(&mut gradients.d_gate).chain(&mut gradients.dbiases);
            all.flatten().for_each(|gradient| *gradient *= OFF);
        }
    }
}

/// Leaves out the last index of axis 2, the sequence.
fn without_tail<'a>(values: &mut Vec<f64>, to: TensorViewMut<'a>) -> Option<TensorViewMut<'a>> {
    let shape = to.as_view().shape().to_vec();
    let inner: usize = shape[3..].iter().product();
    let kept = shape[2].checked_sub(1).filter(|&kept| kept > 0)?;
    *values = values.chunks(shape[2] * inner).flat_map(|row| row[..kept * inner].to_vec()).collect();
    to.slice(2, 0..kept, 1).ok()
}

/// Bias gradients as sums of dS in the dtype of q: one term after another, rounded after each.
fn dbiases_in_half(problem: &AttentionProblem, inputs: &ReferenceInputs, d_out: &[f64]) -> DeviceResult<Vec<Vec<f64>>> {
    let (full, mut spec, mut expanded) = (problem.logits_shape(), problem.spec().clone(), inputs.clone());
    let logits: usize = full.iter().product();
    // A bias of full shape has dS as its gradient.
    for (bias, values) in spec.biases.iter_mut().zip(&mut expanded.biases) {
        *values = (0..logits).map(|logit| values[source(logit, &full, &bias.shape)]).collect();
        bias.shape = full;
    }
    let expanded_problem = AttentionProblem::new(spec);
    let expanded_problem = expanded_problem.map_err(failed)?;
    let gradients = reference::backward(&expanded_problem, &expanded, d_out).dbiases;
    let sum = |(bias, ds): (&BiasSpec, Vec<f64>)| {
        let mut sums = vec![0.0; bias.shape.iter().product()];
        for (logit, ds) in ds.into_iter().enumerate() {
            let at = source(logit, &full, &bias.shape);
            sums[at] = round_to(problem.spec().dtype, sums[at] + ds);
        }
        sums
    };
    Ok(problem.spec().biases.iter().zip(gradients).map(sum).collect())
}

/// Element of a bias of shape `own` that reaches a logit.
fn source(logit: usize, full: &[usize; 5], own: &[usize; 5]) -> usize {
    let (mut rest, mut step, mut source) = (logit, 1, 0);
    for (&size, &own) in full.iter().zip(own).rev() {
        source += if own == 1 { 0 } else { rest % size * step };
        rest /= size;
        step *= own;
    }
    source
}

fn failed(error: ProblemError) -> DeviceError {
    DeviceError::Unsupported { limit: error.to_string() }
}

impl Backend for Planted {
    fn info(&self) -> &DeviceInfo {
        self.inner.info()
    }

    fn stream(&self) -> DeviceResult<Stream> {
        self.inner.stream()
    }

    fn alloc(&self, stream: &Stream, bytes: usize) -> DeviceResult<Storage> {
        self.inner.alloc(stream, bytes)
    }

    fn upload(&self, stream: &Stream, source: &[u8], destination: &mut Storage) -> DeviceResult<()> {
        self.inner.upload(stream, source, destination)
    }

    fn download(&self, stream: &Stream, source: &Storage, destination: &mut [u8]) -> DeviceResult<()> {
        self.inner.download(stream, source, destination)
    }

    fn fill(&self, stream: &Stream, destination: TensorViewMut<'_>, value: f64) -> DeviceResult<()> {
        moves::fill(&*self.inner, self.bug, stream, destination, value)
    }

    fn relayout(&self, stream: &Stream, args: RelayoutArgs<'_>) -> DeviceResult<()> {
        moves::relayout(&*self.inner, self.bug, stream, args)
    }

    fn accumulate(&self, stream: &Stream, args: AccumulateArgs<'_>) -> DeviceResult<()> {
        moves::accumulate(&*self.inner, self.bug, stream, args)
    }

    fn rope(&self, stream: &Stream, args: RopeArgs<'_>) -> DeviceResult<()> {
        moves::rope(&*self.inner, self.bug, stream, args)
    }

    fn record(&self, stream: &Stream) -> DeviceResult<Event> {
        self.inner.record(stream)
    }

    fn wait(&self, stream: &Stream, event: &Event) -> DeviceResult<()> {
        self.inner.wait(stream, event)
    }

    fn synchronize(&self, stream: &Stream) -> DeviceResult<()> {
        self.inner.synchronize(stream)
    }

    fn plan_attention(&self, problem: &AttentionProblem) -> DeviceResult<AttentionPlan> {
        self.inner.plan_attention(problem)
    }

    fn attention_forward(&self, stream: &Stream, args: ForwardArgs<'_>) -> DeviceResult<()> {
        let (plan, o) = (args.plan(), args.into_operands());
        let problem = self.problem(plan)?;
        let inputs = ReferenceInputs::from_views(
            &problem,
            &o.q,
            &o.k,
            &o.v,
            &o.biases,
            o.key_mask.as_ref(),
            o.q_segments.as_ref(),
            o.k_segments.as_ref(),
            o.gate.as_ref(),
        );
        let mut inputs = inputs.map_err(failed)?;
        if let Some(bug) = self.bug {
            bug.inputs(problem.spec(), o.q.layout().strides(), &mut inputs);
        }
        let mut results = reference::forward(&problem, &inputs);
        self.forward_bugs(problem.spec(), &mut results.out, &mut results.lse);
        let high: Vec<f64> = results.lse.iter().map(|&lse| round_to(DType::F32, lse)).collect();
        let low = results.lse.iter().zip(&high).map(|(lse, high)| if high.is_infinite() { 0.0 } else { lse - high });
        let low: Vec<f64> = low.map(|low| if self.has(Bug::LseRounded) { 0.0 } else { low }).collect();
        let out = if self.has(Bug::TailUnwritten) { without_tail(&mut results.out, o.out) } else { Some(o.out) };
        out.map_or(Ok(()), |out| self.write(stream, &results.out, out))?;
        o.lse.map_or(Ok(()), |lse| self.write(stream, &high, lse))?;
        o.lse_low.map_or(Ok(()), |lse_low| self.write(stream, &low, lse_low))
    }

    fn attention_backward(&self, stream: &Stream, args: BackwardArgs<'_>) -> DeviceResult<()> {
        let (plan, o) = (args.plan(), args.into_operands());
        let problem = self.problem(plan)?;
        let inputs = ReferenceInputs::from_views(
            &problem,
            &o.q,
            &o.k,
            &o.v,
            &o.biases,
            o.key_mask.as_ref(),
            o.q_segments.as_ref(),
            o.k_segments.as_ref(),
            o.gate.as_ref(),
        );
        let mut inputs = inputs.map_err(failed)?;
        let mut d_out = o.d_out.to_f64().map_err(failed)?;
        let s = problem.spec();
        if let Some(bug) = self.bug {
            bug.inputs(s, o.q.layout().strides(), &mut inputs);
        }
        let row = s.seqlen_q * s.heads * s.head_dim_v;
        if self.has(Bug::BiasGradientMissesRow) && s.rows > 1 {
            let last = d_out.len() - row;
            d_out[last..].fill(0.0);
        }
        if self.has(Bug::GateForgottenInBackward) {
            inputs.gate.iter_mut().flatten().for_each(|gate| *gate = 100.0);
        }
        let gate = inputs.gate.clone();
        let mut gradients = reference::backward(&problem, &inputs, &d_out);
        self.backward_bugs(&problem, &mut gradients, gate.as_deref());
        if self.has(Bug::BiasGradientInHalf) {
            gradients.dbiases = dbiases_in_half(&problem, &inputs, &d_out)?;
        }
        if self.has(Bug::LseRounded) {
            self.scale_by_rounded_lse(&o, &problem, &inputs, &mut gradients)?;
        }
        let dk = match (o.dk, self.has(Bug::KeyTailUnwritten)) {
            (Some(dk), true) => without_tail(&mut gradients.dk, dk),
            (dk, _) => dk,
        };
        let named = [(o.dq, &gradients.dq), (dk, &gradients.dk), (o.dv, &gradients.dv)];
        for (to, values) in named {
            to.map_or(Ok(()), |to| self.write(stream, values, to))?;
        }
        for (to, values) in o.dbiases.into_iter().zip(&gradients.dbiases) {
            to.map_or(Ok(()), |to| self.write(stream, values, to))?;
        }
        o.d_gate.zip(gradients.d_gate).map_or(Ok(()), |(to, values)| self.write(stream, &values, to))
    }

    fn merge(&self, stream: &Stream, args: MergeArgs<'_>) -> DeviceResult<()> {
        moves::merge(&*self.inner, self.bug, stream, args)
    }
}

impl Planted {
    /// What backward gets when P = exp(S - lse) with lse in one f32: rows too large by exp(lse - fl(lse)).
    fn scale_by_rounded_lse(
        &self,
        o: &tilefold_core::BackwardOperands<'_>,
        problem: &AttentionProblem,
        inputs: &ReferenceInputs,
        gradients: &mut reference::ReferenceGradients,
    ) -> DeviceResult<()> {
        let s = problem.spec();
        let stored = o.lse.to_f64().map_err(failed)?;
        let exact = reference::forward(problem, inputs).lse;
        for (at, row) in gradients.dq.chunks_mut(s.head_dim).enumerate() {
            let (head, rest) = (at % s.heads, at / s.heads);
            let lse = ((rest / s.seqlen_q) * s.heads + head) * s.seqlen_q + rest % s.seqlen_q;
            if exact[lse].is_finite() {
                row.iter_mut().for_each(|dq| *dq *= (exact[lse] - stored[lse]).exp());
            }
        }
        let mean =
            exact.iter().zip(&stored).filter(|(exact, _)| exact.is_finite()).map(|(exact, stored)| exact - stored);
        let largest = mean.fold(0.0_f64, |a, b| if b.abs() > a.abs() { b } else { a });
        gradients.dv.iter_mut().for_each(|dv| *dv *= largest.exp());
        Ok(())
    }
}
