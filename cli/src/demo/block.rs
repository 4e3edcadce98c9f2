//! The four attentions of an Evoformer block on one alignment, through the facade's own entry points.

use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use indicatif::ProgressBar;
use tilefold::evoformer::{Inputs, Variant};
use tilefold::{
    AttentionProblem, AttentionSpec, Backend, Backward, BiasSpec, DType, Device, Forward, Options, Tensor, TensorView,
    all_gradients, problem,
};

use super::alignment::Alignment;
use super::check::{self, Checked};
use super::features::{EvoformerInputs, FeatureOptions, MsaFeatures, VariantInputs};
use super::memory;
use super::report::Case;
use crate::output::as_f64;
use crate::system::PeakMemory;

/// Timed runs of each pass; the median counts.
const REPEATS: usize = 3;

/// Runs, times and checks each variant in f32.
pub(super) fn run(device: &Device, alignment: &Alignment, progress: &ProgressBar) -> Result<Vec<Case>> {
    progress.set_message("embedding the alignment");
    let (n_seq, n_res, options) = (alignment.n_seq(), alignment.n_columns(), FeatureOptions::default());
    let part = format!("an Evoformer block for {n_seq} x {n_res} residues");
    let counted = counted_bytes(device, n_seq, n_res, &options).with_context(|| part.clone())?;
    memory::check(&part, counted, "give an alignment of fewer sequences or columns, or use a larger machine")?;
    let inputs = EvoformerInputs::new(MsaFeatures::new(alignment)?, options)?;
    Variant::ALL
        .into_iter()
        .map(|variant| {
            progress.set_message(variant.name());
            let from = inputs.variant(variant).map_err(anyhow::Error::from);
            from.and_then(|from| one(device, variant, from)).with_context(|| format!("variant {}", variant.name()))
        })
        .collect()
}

/// Bytes of the block's two representations and of its largest attention.
fn counted_bytes(device: &Device, n_seq: usize, n_res: usize, options: &FeatureOptions) -> Result<f64> {
    let f32s = |sizes: &[usize]| 4.0 * sizes.iter().map(|&size| as_f64(size)).product::<f64>();
    let (msa, pair) = (f32s(&[n_seq, n_res, options.msa_channels]), f32s(&[n_res, n_res, options.pair_channels]));
    let attention = |rows: usize, seqlen: usize, heads: usize, has_bias: bool| -> Result<f64> {
        let mut spec = AttentionSpec::new(DType::F32, 1, rows, seqlen, heads, options.head_dim);
        (spec.key_mask, spec.gate) = (true, true);
        if has_bias {
            spec.biases.push(BiasSpec { shape: [1, 1, heads, seqlen, seqlen], dtype: DType::F32 });
        }
        let plan = device.plan_attention(&AttentionProblem::new(spec.with_all_gradients())?)?;
        // q k v gate d_out out dq dk dv d_gate, lse in two parts, bias and its gradient.
        let tensors = 10.0 * f32s(&[rows, seqlen, heads, options.head_dim]) + 2.0 * f32s(&[rows, heads, seqlen]);
        let bias = if has_bias { 2.0 * f32s(&[heads, seqlen, seqlen]) } else { 0.0 };
        Ok(tensors + bias + as_f64(plan.forward_workspace_bytes.max(plan.backward_workspace_bytes)))
    };
    let largest = [
        attention(n_seq, n_res, options.msa_heads, true)?,
        attention(n_res, n_seq, options.msa_heads, false)?,
        attention(n_res, n_res, options.pair_heads, true)?,
    ];
    Ok(msa + pair + largest.into_iter().fold(0.0, f64::max))
}

fn one(device: &Device, variant: Variant, from: VariantInputs) -> Result<Case> {
    let operands = Operands::new(from)?.moved(|tensor| device.upload_tensor(tensor))?;
    let inputs = operands.inputs();
    let d_out = operands.d_out.view();
    let gradients = inputs.all_gradients();
    let step = || -> Result<(Forward, Backward, [Duration; 2])> {
        let start = Instant::now();
        let forward = variant.forward(device, &inputs)?;
        let forward_time = start.elapsed();
        let start = Instant::now();
        let backward = variant.backward(device, &inputs, &forward, &d_out, gradients)?;
        Ok((forward, backward, [forward_time, start.elapsed()]))
    };
    step()?;
    let peak = PeakMemory::start();
    // Only the last results are kept: two sets of them would double the memory.
    let mut times = (1..REPEATS).map(|_| Ok(step()?.2)).collect::<Result<Vec<_>>>()?;
    let (forward, backward, time) = step()?;
    times.push(time);
    let peak_bytes = peak.bytes();
    let (forward, backward) = (forward.into_host(device)?, backward.into_host(device)?);
    let operands = operands.moved(|tensor| device.download_tensor(tensor))?;
    let checked = checked(variant, &operands, &forward, &backward)?;
    let problem = problem(&checked.inputs, &Options::default(), all_gradients(&checked.inputs))?;
    let median = |pass: usize| {
        let mut pass: Vec<_> = times.iter().map(|times| times[pass]).collect();
        pass.sort();
        pass[REPEATS / 2].as_secs_f64()
    };
    let plan = device.plan_attention(&problem)?;
    let findings = check::check(&problem, &checked)?;
    Ok(Case { peak_bytes, ..Case::new(variant.name(), &plan, DType::F32, [median(0), median(1)], findings) })
}

/// One variant's tensors in the order in which a model holds them.
struct Operands {
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gate: Tensor,
    d_out: Tensor,
    mask: Tensor,
    bias: Option<Tensor>,
}

impl Operands {
    fn new(from: VariantInputs) -> Result<Self> {
        let (shape, bias_shape) = (from.shape, from.bias_shape());
        let tensor = |data: Vec<f32>| Tensor::from_vec(data, &shape);
        let mask = from.mask.iter().copied().map(u8::from).collect();
        Ok(Self {
            q: tensor(from.q)?,
            k: tensor(from.k)?,
            v: tensor(from.v)?,
            gate: tensor(from.gate)?,
            d_out: tensor(from.d_out)?,
            mask: Tensor::from_vec::<u8>(mask, &shape[..3])?,
            // The shape of a pair representation's bias has no axis for rows.
            bias: from.bias.map(|bias| Tensor::from_vec(bias, &bias_shape[1..])).transpose()?,
        })
    }

    fn moved(self, to: impl Fn(Tensor) -> Result<Tensor, tilefold::Error>) -> Result<Self> {
        let [q, k, v, gate, d_out, mask] = [self.q, self.k, self.v, self.gate, self.d_out, self.mask].map(&to);
        let bias = self.bias.map(to).transpose()?;
        Ok(Self { q: q?, k: k?, v: v?, gate: gate?, d_out: d_out?, mask: mask?, bias })
    }

    fn inputs(&self) -> Inputs<'_> {
        let mut inputs = Inputs::new(self.q.view(), self.k.view(), self.v.view());
        inputs.mask = Some(self.mask.view());
        inputs.gate = Some(self.gate.view());
        inputs.pair_bias = self.bias.as_ref().map(Tensor::view);
        inputs
    }
}

/// Everything in the order `[batch, rows, seqlen, heads, head_dim]`, turned here and not by the code under test.
fn checked<'a>(
    variant: Variant,
    operands: &'a Operands,
    forward: &'a Forward,
    backward: &'a Backward,
) -> Result<Checked<'a>> {
    let is_turned = matches!(variant, Variant::MsaColumn | Variant::TriangleEnding);
    let turn = |tensor: &'a Tensor| -> Result<TensorView<'a>> {
        let order: &[usize] = if is_turned { &[0, 2, 1, 3, 4] } else { &[0, 1, 2, 3, 4] };
        Ok(tensor.view().permute(&order[..tensor.shape().len()])?)
    };
    let turn_bias = |bias: &'a Tensor| -> Result<TensorView<'a>> {
        let order: &[usize] = if variant == Variant::TriangleEnding { &[0, 1, 3, 2] } else { &[0, 1, 2, 3] };
        Ok(bias.view().permute(order)?.unsqueeze(1)?)
    };
    let given = |tensor: &'a Option<Tensor>, name: &str| {
        turn(tensor.as_ref().with_context(|| format!("backward gave no {name}"))?)
    };
    let mut inputs = tilefold::Inputs::new(turn(&operands.q)?, turn(&operands.k)?, turn(&operands.v)?);
    inputs.gate = Some(turn(&operands.gate)?);
    inputs.key_mask = Some(turn(&operands.mask)?);
    inputs.biases.extend(operands.bias.as_ref().map(turn_bias).transpose()?);
    let dbias = backward.dbiases.first().and_then(Option::as_ref);
    Ok(Checked {
        inputs,
        d_out: turn(&operands.d_out)?,
        out: turn(&forward.out)?,
        dq: given(&backward.dq, "dq")?,
        dk: given(&backward.dk, "dk")?,
        dv: given(&backward.dv, "dv")?,
        d_gate: Some(given(&backward.d_gate, "d_gate")?),
        dbias: dbias.map(turn_bias).transpose()?,
    })
}
