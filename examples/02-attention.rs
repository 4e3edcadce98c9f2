//! One attention with everything that science models put on it: a pair bias, a mask, a gate; and what it saves.
//!
//! Tensors are views: memory that is yours, a shape, and strides. The axes are always
//! `[batch, rows, seqlen, heads, head_dim]`: `rows` are independent attentions that may share a bias, such as the sequences
//! of an alignment. A bias may have size 1 on any axis; here one bias `[1, 1, heads, L, L]` serves every row.
//!
//! The unfused way stores the logits, `rows · heads · L · L` numbers, several times over. Here they exist only tile by tile
//! in cache: `plan` says before the launch how much memory there will be beside inputs and outputs.
//!
//! Run it with `cargo run --release --example 02-attention`.
#![allow(clippy::print_stdout, reason = "an example shows its results")]

use std::time::Instant;

use tilefold::half::bf16;
use tilefold::{Backend, Device, Forward, Gradients, Inputs, Options, Tensor, attention_into, problem};

const ROWS: usize = 32;
const SEQLEN: usize = 128;
const HEADS: usize = 4;
const HEAD_DIM: usize = 32;

fn main() -> anyhow::Result<()> {
    let device = Device::best()?;

    // Inputs in bf16, the bias in f32: a bias may be in the dtype of q or in f32.
    let shape = [1, ROWS, SEQLEN, HEADS, HEAD_DIM];
    let tensor = |phase: f32| {
        let values = wave(phase, shape.iter().product()).into_iter().map(bf16::from_f32).collect();
        device.upload_tensor(Tensor::from_vec(values, &shape)?)
    };
    let (q, k, v, gate) = (tensor(1.0)?, tensor(2.0)?, tensor(3.0)?, tensor(4.0)?);
    let bias_shape = [1, 1, HEADS, SEQLEN, SEQLEN];
    let pair_bias = device.upload_tensor(Tensor::from_vec(wave(5.0, HEADS * SEQLEN * SEQLEN), &bias_shape)?)?;
    let keep = (0..ROWS * SEQLEN).map(|i| u8::from(i % SEQLEN < SEQLEN - i / SEQLEN)).collect(); // ragged rows
    let keep = device.upload_tensor(Tensor::from_vec::<u8>(keep, &[1, ROWS, SEQLEN])?)?;

    let mut inputs = Inputs::new(q.view(), k.view(), v.view());
    inputs.biases.push(pair_bias.view());
    inputs.key_mask = Some(keep.view());
    inputs.gate = Some(gate.view());

    // `attention(&device, &inputs, &options)` does these steps in one call; one by one they show the plan.
    let problem = problem(&inputs, &Options::default(), Gradients::default())?;
    let plan = device.plan_attention(&problem)?;
    let mut forward = Forward::zeros(&device, &problem)?;
    let Forward { out, lse, lse_low } = &mut forward;
    let operands = inputs.forward_operands(out.view_mut(), Some(lse.view_mut()), Some(lse_low.view_mut()));
    let start = Instant::now();
    attention_into(&device, &plan, operands)?;
    let seconds = start.elapsed().as_secs_f64();

    println!("{} on {}: {} in {:.2} ms", plan.kernel, plan.device, describe(&shape), seconds * 1e3);
    println!("{:.1} GFLOP/s", problem.forward_flops() / seconds / 1e9);
    println!("logits never stored: {:.1} MB (as f32)", problem.logits() * 4.0 / 1e6);
    println!("workspace: {} bytes", plan.forward_workspace_bytes);

    let values = forward.into_host(&device)?.out.to_f64()?;
    println!("out[0, 0, 0, 0, ..4] = {:.4?}", &values[..4]);
    Ok(())
}

fn describe(shape: &[usize; 5]) -> String {
    let [_, rows, seqlen, heads, head_dim] = shape;
    format!("{rows} rows of {seqlen}, {heads} heads of {head_dim}")
}

/// Made-up values in -1..1, the same on every run.
fn wave(phase: f32, count: usize) -> Vec<f32> {
    (0..count).map(|i| (phase + 0.37 * i as f32).sin()).collect()
}
