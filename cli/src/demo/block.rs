//! The four attentions of an Evoformer block on one alignment, through the facade's own entry points.

use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use indicatif::ProgressBar;
use tilefold::evoformer::{Inputs, Variant};
use tilefold::{Backward, DType, Device, Forward, Options, Tensor, TensorView, all_gradients, problem};
use tilefold_benches::{peak_rss_bytes, reset_peak_rss};

use super::alignment::Alignment;
use super::check::{self, Checked};
use super::features::{self, EvoformerInputs, FeatureOptions, MsaFeatures, VariantInputs};
use super::report::Case;

/// Timed runs of each pass; the median counts.
const REPEATS: usize = 3;

/// Runs, times and checks each variant in f32.
pub(super) fn run(device: &Device, alignment: &Alignment, progress: &ProgressBar) -> Result<Vec<Case>> {
    progress.set_message("embedding the alignment");
    let inputs = EvoformerInputs::new(MsaFeatures::new(alignment)?, FeatureOptions::default())?;
    let variants = features::Variant::ALL.into_iter().zip(Variant::ALL);
    variants
        .map(|(from, variant)| {
            progress.set_message(variant.name());
            one(device, variant, inputs.variant(from)?).with_context(|| format!("variant {}", variant.name()))
        })
        .collect()
}

fn one(device: &Device, variant: Variant, from: VariantInputs) -> Result<Case> {
    let operands = Operands::new(from)?;
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
    let mut results = step()?;
    let mut times = Vec::new();
    let _ = reset_peak_rss();
    for _ in 0..REPEATS {
        results = step()?;
        times.push(results.2);
    }
    let peak_bytes = peak_rss_bytes();
    let checked = checked(variant, &operands, &results.0, &results.1)?;
    let problem = problem(&checked.inputs, &Options::default(), all_gradients(&checked.inputs))?;
    let median = |pass: usize| {
        let mut pass: Vec<_> = times.iter().map(|times| times[pass]).collect();
        pass.sort();
        pass[REPEATS / 2].as_secs_f64()
    };
    let plan = tilefold::Backend::plan_attention(device, &problem)?;
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
