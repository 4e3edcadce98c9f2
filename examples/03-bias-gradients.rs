//! The gradient of a broadcast bias, checked by finite differences.
//!
//! A pair bias `[1, 1, heads, L, L]` is added to the logits of every row, so its gradient is a sum over the rows. PyTorch's
//! fused attention gives no such gradient, and unfused attention gets it by keeping `rows` full matrices. Here it is summed
//! tile by tile in f32, in an order that does not depend on the number of threads: equal bits on every run.
//!
//! The check: with loss = Σ d_out · out, the derivative of the loss by one entry of the bias is what the backward pass wrote
//! for that entry. So move the entry by ±ε, run forward twice, and compare the slope.
//!
//! Run it with `cargo run --release --example 03-bias-gradients`.
#![allow(clippy::print_stdout, reason = "an example shows its results")]

use anyhow::Context;
use tilefold::{Device, Gradients, Inputs, Options, Tensor, attention, attention_backward};

const ROWS: usize = 8;
const SEQLEN: usize = 24;
const HEADS: usize = 2;
const SHAPE: [usize; 5] = [1, ROWS, SEQLEN, HEADS, 16];
const BIAS_SHAPE: [usize; 5] = [1, 1, HEADS, SEQLEN, SEQLEN];

fn main() -> anyhow::Result<()> {
    let (device, options) = (Device::best()?, Options::default());
    let [q, k, v, d_out] = [1.0, 2.0, 3.0, 4.0].map(|phase| wave(phase, SHAPE.iter().product()));
    let mut bias = wave(5.0, BIAS_SHAPE.iter().product());
    let upload = |values: &[f32], shape: &[usize]| device.upload_tensor(Tensor::from_vec(values.to_vec(), shape)?);
    let (q, k, v) = (upload(&q, &SHAPE)?, upload(&k, &SHAPE)?, upload(&v, &SHAPE)?);
    let plain = Inputs::new(q.view(), k.view(), v.view());

    // The bias alone: a gradient that is not asked for costs nothing.
    let mut inputs = plain.clone();
    let bias_there = upload(&bias, &BIAS_SHAPE)?;
    inputs.biases.push(bias_there.view());
    let d_out_there = upload(&d_out, &SHAPE)?;
    let forward = attention(&device, &inputs, &options)?;
    let wanted = Gradients { biases: [true, false, false, false], ..Gradients::default() };
    let backward =
        attention_backward(&device, &inputs, &options, &forward, &d_out_there.view(), wanted)?.into_host(&device)?;
    assert!(backward.dq.is_none());
    let dbias = backward.dbiases[0].as_ref().context("no gradient of the bias")?.to_f64()?;

    // One entry: head 1, query 3, key 7.
    let (entry, step) = ((SEQLEN + 3) * SEQLEN + 7, 1.0 / 64.0);
    let mut loss_at = |value: f32| -> anyhow::Result<f64> {
        let kept = std::mem::replace(&mut bias[entry], value);
        let mut inputs = plain.clone();
        let bias_there = upload(&bias, &BIAS_SHAPE)?;
        inputs.biases.push(bias_there.view());
        let out = attention(&device, &inputs, &options)?.into_host(&device)?.out.to_f64()?;
        bias[entry] = kept;
        Ok(out.iter().zip(&d_out).map(|(out, d_out)| out * f64::from(*d_out)).sum())
    };
    let here = wave(5.0, entry + 1)[entry];
    let slope = (loss_at(here + step)? - loss_at(here - step)?) / (2.0 * f64::from(step));

    println!("dbias[0, 0, 1, 3, 7] from the backward pass  {:+.6}", dbias[entry]);
    println!("the same by finite differences               {slope:+.6}");
    anyhow::ensure!((dbias[entry] - slope).abs() < 1e-3 * (1.0 + slope.abs()), "they differ");

    // Adding a constant to all logits of a query changes nothing, so each row of the gradient sums to 0.
    let largest = dbias.chunks_exact(SEQLEN).map(|row| row.iter().sum::<f64>().abs()).fold(0.0, f64::max);
    println!("largest sum over a row of dbias               {largest:.1e}");
    Ok(())
}

/// Made-up values in -1..1, the same on every run.
fn wave(phase: f32, count: usize) -> Vec<f32> {
    (0..count).map(|i| (phase + 0.37 * i as f32).sin()).collect()
}
