//! `tilefold run`: attention on the tensors of a safetensors file.

mod mask;
mod tensors;

use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use serde::Serialize;
use tilefold::{Backend, Device, EmptyRows, Error, Gradients, MAX_BIASES, Options, Products, safetensors};
use tilefold_benches::{Launch, Operands, Pass};

use crate::global::Global;
use crate::out_file::OutFile;
use crate::output::{Outcome, digits, say, say_json, shape};

/// Options of `run`.
#[derive(Debug, clap::Args)]
#[command(after_long_help = "\
Tensors read: q k v [batch, rows, seqlen, heads, head_dim]; bias0..bias3 [batch, rows, heads, seqlen_q, seqlen_k] with any
axes of size 1; key_mask (bool, true keeps) [batch, rows, seqlen_k]; q_segments, k_segments (i32); gate, d_out (shape of out).
A tensor with one axis less leaves out rows, with two less rows and batch.
Tensors written: out lse lse_low, and the gradients dq dk dv dbias0.. dgate.")]
pub(crate) struct Args {
    /// File with q, k, v and what else there is
    #[arg(value_name = "IN.safetensors")]
    input: PathBuf,
    /// File to write; not the one that is read
    #[arg(value_name = "OUT.safetensors")]
    output: PathBuf,
    /// Factor of q kᵀ [default: 1/√head_dim]
    #[arg(long, allow_negative_numbers = true)]
    scale: Option<f64>,
    #[command(flatten)]
    mask: mask::MaskArgs,
    /// Keys that count, from the front: one number for all, one a batch, or one a batch and row
    #[arg(long, value_delimiter = ',', value_name = "N,..")]
    kv_lengths: Vec<i64>,
    /// What a query without keys gives: 0, or the mean of v
    #[arg(long, value_enum, default_value = "zero")]
    empty_rows: EmptyRowsName,
    /// Whether the factors of products of f32 tensors may be rounded to tf32
    #[arg(long, value_enum, default_value = "exact")]
    products: ProductsName,
    /// Gradients: q, k, v, bias0.., gate, or all, or none [default: all if there is a d_out]
    #[arg(long, value_delimiter = ',', value_name = "NAME,..")]
    grad: Vec<String>,
    /// Prints what was written as JSON
    #[arg(long)]
    json: bool,
}

#[derive(Clone, Copy, Debug, clap::ValueEnum)]
enum EmptyRowsName {
    Zero,
    Uniform,
}

#[derive(Clone, Copy, Debug, clap::ValueEnum)]
enum ProductsName {
    Exact,
    Tf32,
}

#[derive(Serialize)]
struct Report {
    device: String,
    kernel: String,
    input: String,
    output: String,
    forward_ms: f64,
    backward_ms: Option<f64>,
    tensors: Vec<Written>,
}

#[derive(Serialize)]
struct Written {
    name: String,
    dtype: String,
    shape: Vec<usize>,
}

/// Reads, computes, writes.
pub(crate) fn run(args: &Args, global: &Global) -> Result<Outcome> {
    check_paths(&args.input, &args.output)?;
    let device = global.open()?;
    let operands = tensors::operands(&args.input)?;
    let input = || args.input.display().to_string();
    let heads = operands.inputs().with_context(input)?.q.shape().get(3).copied().unwrap_or(0);
    let options = Options {
        softmax_scale: args.scale,
        kv_lengths: (!args.kv_lengths.is_empty()).then(|| args.kv_lengths.clone()),
        mask: args.mask.structural(heads)?,
        empty_rows: match args.empty_rows {
            EmptyRowsName::Zero => EmptyRows::Zero,
            EmptyRowsName::Uniform => EmptyRows::Uniform,
        },
        products: match args.products {
            ProductsName::Exact => Products::Exact,
            ProductsName::Tf32 => Products::Tf32,
        },
    };
    let gradients = gradients(&args.grad, &operands, &args.input)?;
    let (launch, [forward, backward]) = compute(&device, operands, &options, gradients).with_context(input)?;
    let launch = launch.into_host()?;
    let ms = |time: Duration| time.as_secs_f64() * 1e3;
    let named = tensors::results(&launch);
    safetensors::write(&args.output, named.iter().map(|(name, tensor)| (name.as_str(), *tensor)))?;
    let report = Report {
        device: device.info().id.to_string(),
        kernel: launch.plan().kernel.clone(),
        input: input(),
        output: args.output.display().to_string(),
        forward_ms: ms(forward),
        backward_ms: launch.backward_results().map(|_| ms(backward)),
        tensors: named
            .into_iter()
            .map(|(name, tensor)| Written { name, dtype: tensor.dtype().to_string(), shape: tensor.shape().to_vec() })
            .collect(),
    };
    if args.json {
        say_json(&report)?
    } else {
        report.print()?
    }
    Ok(Outcome::Passed)
}

/// Runs both passes, the backward one if there are gradients to compute, and says how long each took.
fn compute(
    device: &Device,
    operands: Operands,
    options: &Options,
    gradients: Gradients,
) -> Result<(Launch, [Duration; 2]), Error> {
    let mut launch = Launch::new(device, operands, options, gradients)?;
    let forward = launch.timed(Pass::Forward)?;
    let backward = match launch.backward_results() {
        Some(_) => launch.timed(Pass::Backward)?,
        None => Duration::ZERO,
    };
    Ok((launch, [forward, backward]))
}

/// The output is a file of its own that can be written.
fn check_paths(input: &Path, output: &Path) -> Result<()> {
    let read =
        input.canonicalize().with_context(|| format!("cannot read {}; give a safetensors file", input.display()))?;
    if output.canonicalize().is_ok_and(|written| written == read) {
        bail!("{} is the input; name another output file", output.display());
    }
    OutFile::new(output, "OUT.safetensors").map(drop)
}

/// Gradients by name; without names all that the operands of a file allow.
fn gradients(names: &[String], operands: &Operands, file: &Path) -> Result<Gradients> {
    let every = || operands.inputs().map(|inputs| tilefold::all_gradients(&inputs));
    let wanted = match names {
        [] if operands.d_out.is_some() => every()?,
        [] => Gradients::default(),
        [one] if one == "none" => Gradients::default(),
        [one] if one == "all" => every()?,
        names => named_gradients(names)?,
    };
    ensure!(
        wanted == Gradients::default() || operands.d_out.is_some(),
        "{}: no tensor `d_out`; gradients need the gradient of out (or ask for --grad none)",
        file.display()
    );
    let bias = wanted.biases.iter().skip(operands.biases.len()).position(|&is_wanted| is_wanted);
    if let Some(index) = bias {
        let index = operands.biases.len() + index;
        bail!("--grad: bias{index} asked for, but {} has no tensor `bias{index}`", file.display());
    }
    ensure!(
        !wanted.gate || operands.gate.is_some(),
        "--grad: gate asked for, but {} has no tensor `gate`",
        file.display()
    );
    Ok(wanted)
}

fn named_gradients(names: &[String]) -> Result<Gradients> {
    let mut wanted = Gradients::default();
    for name in names {
        let bias = (0..MAX_BIASES).find(|index| *name == format!("bias{index}"));
        match (name.as_str(), bias) {
            ("q", _) => wanted.q = true,
            ("k", _) => wanted.k = true,
            ("v", _) => wanted.v = true,
            ("gate", _) => wanted.gate = true,
            (_, Some(index)) => wanted.biases[index] = true,
            _ => bail!("--grad: expected q, k, v, bias0..bias3, gate (or all, or none, alone), got `{name}`"),
        }
    }
    Ok(wanted)
}

impl Report {
    fn print(&self) -> Result<()> {
        say(&format!("{} -> {} on {} ({})", self.input, self.output, self.device, self.kernel))?;
        let backward = self.backward_ms.map(|ms| format!(", backward {} ms", digits(ms))).unwrap_or_default();
        say(&format!("forward {} ms{backward}", digits(self.forward_ms)))?;
        let mut lines =
            self.tensors.iter().map(|tensor| format!("  {} {} {}", tensor.name, tensor.dtype, shape(&tensor.shape)));
        lines.try_for_each(|line| say(&line))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn gradients_are_asked_for_by_name() {
        let names = |text: &str| text.split(',').map(str::to_owned).collect::<Vec<_>>();
        let wanted = named_gradients(&names("q,bias2,gate")).unwrap();
        assert!(wanted.q && !wanted.k && !wanted.v && wanted.gate);
        assert_eq!(wanted.biases, [false, false, true, false]);
        for wrong in ["bias4", "q,all", "x", "bias", "bias00", "bias+1", "bias 1"] {
            assert!(named_gradients(&names(wrong)).is_err(), "{wrong}");
        }
    }
}
