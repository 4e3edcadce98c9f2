//! The four attentions of an Evoformer block in sequence, forward and backward.
//!
//! An Evoformer block holds an alignment `[batch, n_seq, n_res, channels]` and a pair representation
//! `[batch, n_res, n_res, channels]`. Attention runs along each axis in turn: over the residues of each sequence (with a bias
//! from the pair representation), over the sequences at each residue, and along both axes of the pair representation
//! ("triangle" attention around the starting and the ending node of an edge).
//!
//! The tensors keep their order of axes throughout. Column-wise attention and the ending node are the same launch over
//! permuted views: no transpose is ever copied, and gradients come back in the order of their inputs.
//!
//! To keep the example short each attention's output is the next one's q, k and v, where a model has layer norms and
//! projections in between; then the gradient flows back the same way. `cargo run --release -- demo` does it with a real
//! alignment and real projections.
//!
//! Run it with `cargo run --release --example 04-evoformer-block`.
#![allow(clippy::print_stdout, reason = "an example shows its results")]

use std::time::Instant;

use tilefold::evoformer::{Inputs, Variant};
use tilefold::{Backend, Device, Forward, Tensor, TensorView};

const N_SEQ: usize = 24;
const N_RES: usize = 48;
const HEADS: usize = 4;
const HEAD_DIM: usize = 16;
const MSA: [usize; 5] = [1, N_SEQ, N_RES, HEADS, HEAD_DIM];
const PAIR: [usize; 5] = [1, N_RES, N_RES, HEADS, HEAD_DIM];

fn main() -> anyhow::Result<()> {
    let device = Device::best()?;
    println!("{N_SEQ} sequences of {N_RES} residues on {}", device.info().id);
    let bias = tensor(&device, wave(1.0, HEADS * N_RES * N_RES), &[1, HEADS, N_RES, N_RES])?;
    let msa_mask = (0..N_SEQ * N_RES).map(|i| u8::from(i % 7 != 3)).collect(); // gaps of the alignment
    let pair_mask = vec![1; N_RES * N_RES];

    let msa = tensor(&device, wave(2.0, MSA.iter().product()), &MSA)?;
    let mask = device.upload_tensor(Tensor::from_vec::<u8>(msa_mask, &MSA[..3])?)?;
    run_track(&device, [Variant::MsaRow, Variant::MsaColumn], msa, &mask.view(), &bias)?;

    let pair = tensor(&device, wave(3.0, PAIR.iter().product()), &PAIR)?;
    let mask = device.upload_tensor(Tensor::from_vec::<u8>(pair_mask, &PAIR[..3])?)?;
    run_track(&device, [Variant::TriangleStarting, Variant::TriangleEnding], pair, &mask.view(), &bias)
}

/// Two attentions one after the other over one representation, then the gradients in reverse.
fn run_track(
    device: &Device,
    variants: [Variant; 2],
    start: Tensor,
    mask: &TensorView<'_>,
    bias: &Tensor,
) -> anyhow::Result<()> {
    // Forward: what each attention wrote is kept for its backward pass; nothing of size L² is.
    let mut wrote: Vec<Forward> = Vec::new();
    for variant in variants {
        let x = wrote.last().map_or(&start, |before| &before.out);
        let clock = Instant::now();
        let forward = variant.forward(device, &inputs(variant, x, mask, bias))?;
        println!("{:<18} forward  {:>7.2} ms", variant.name(), clock.elapsed().as_secs_f64() * 1e3);
        wrote.push(forward);
    }
    // Backward, with a loss that is half the sum of squares of the last output: its gradient is that output.
    let mut d_out: Option<Tensor> = None;
    for (i, variant) in variants.into_iter().enumerate().rev() {
        let x = if i == 0 { &start } else { &wrote[i - 1].out };
        let inputs = inputs(variant, x, mask, bias);
        let d_view = d_out.as_ref().unwrap_or(&wrote[i].out).view();
        let clock = Instant::now();
        let backward =
            variant.backward(device, &inputs, &wrote[i], &d_view, inputs.all_gradients())?.into_host(device)?;
        let milliseconds = clock.elapsed().as_secs_f64() * 1e3;
        let dbias = backward.dbiases.iter().flatten().map(largest).next().transpose()?.unwrap_or(0.0);
        println!("{:<18} backward {milliseconds:>7.2} ms, largest |dbias| {dbias:.2e}", variant.name());
        d_out = Some(sum(device, [&backward.dq, &backward.dk, &backward.dv, &backward.d_gate], x.shape())?);
    }
    let d_start = d_out.map(|d_out| device.download_tensor(d_out)).transpose()?;
    println!("gradient of the first input: largest {:.2e}", d_start.as_ref().map_or(Ok(0.0), largest)?);
    Ok(())
}

/// q, k, v and gate were one tensor here: its gradient is the sum of theirs.
fn sum(device: &Device, gradients: [&Option<Tensor>; 4], shape: &[usize]) -> anyhow::Result<Tensor> {
    let mut total = vec![0.0; shape.iter().product()];
    for gradient in gradients.into_iter().flatten() {
        total.iter_mut().zip(gradient.as_slice::<f32>()?).for_each(|(total, value)| *total += value);
    }
    tensor(device, total, shape)
}

fn inputs<'a>(variant: Variant, x: &'a Tensor, mask: &TensorView<'a>, bias: &'a Tensor) -> Inputs<'a> {
    let mut inputs = Inputs::new(x.view(), x.view(), x.view());
    inputs.mask = Some(mask.clone());
    inputs.gate = Some(x.view());
    inputs.pair_bias = (variant != Variant::MsaColumn).then(|| bias.view());
    inputs
}

fn tensor(device: &Device, values: Vec<f32>, shape: &[usize]) -> anyhow::Result<Tensor> {
    Ok(device.upload_tensor(Tensor::from_vec(values, shape)?)?)
}

fn largest(tensor: &Tensor) -> anyhow::Result<f32> {
    Ok(tensor.as_slice::<f32>()?.iter().map(|value| value.abs()).fold(0.0, f32::max))
}

/// Made-up values in -1..1, the same on every run.
fn wave(phase: f32, count: usize) -> Vec<f32> {
    (0..count).map(|i| (phase + 0.37 * i as f32).sin()).collect()
}
