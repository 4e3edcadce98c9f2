//! `tilefold plan`: bytes a problem takes, fused and unfused, and the longest sequence that fits a memory size; of one
//! attention, or of a training.

mod paper;
mod train;

use anyhow::{Context, Result, ensure};
use serde::Serialize;
use tilefold::{AttentionProblem, AttentionSpec, Backend, BiasSpec, DType, Device, Precision};

use crate::global::Global;
use crate::list;
use crate::output::{self, Outcome, as_f64, say, say_json, table};

/// Longest sequence that is tried.
const MAX_SEQLEN: usize = usize::MAX >> 24;

/// What the columns mean; printed below the table.
const FORMULA: &str = "\
operands: q k v bias mask gate and out, lse; with gradients also d_out and one gradient for each of q k v bias gate\n\
unfused:  operands + 2 logits forward (logits, probabilities) or 4 logits with gradients (and their two gradients),\n          \
in the dtype; logits = rows x heads x seqlen x seqlen\n\
fused:    operands + workspace of the device's plan";

/// Options of `plan`.
#[derive(Debug, clap::Args)]
#[command(args_conflicts_with_subcommands = true, subcommand_negates_reqs = true)]
pub(crate) struct Args {
    #[command(subcommand)]
    part: Option<Part>,
    /// rows,seqlen,heads,head_dim; the seqlen is where the search for the longest begins
    #[arg(long, value_delimiter = ',', required = true, value_name = "N,L,H,D")]
    shape: Vec<usize>,
    /// Type of q, k, v, out and the biases; tf32 is f32 with products of tf32
    #[arg(long, default_value = "bf16", value_parser = list::dtype)]
    dtype: Precision,
    /// Operands beside q, k, v: a bias for every pair, a bias (and gradient) for every key of every row, a bool mask
    #[arg(long, value_delimiter = ',', value_enum, default_value = "pair,mask")]
    biases: Vec<Bias>,
    /// The output is multiplied by the sigmoid of a gate
    #[arg(long)]
    gate: bool,
    /// A query sees no key after itself
    #[arg(long)]
    causal: bool,
    /// Also finds the longest sequence that fits this much memory, such as 16GiB
    #[arg(long, value_parser = list::memory_bytes, value_name = "SIZE")]
    memory: Option<u64>,
    /// Prints JSON instead of a table
    #[arg(long)]
    json: bool,
}

/// What is planned instead of one attention.
#[derive(Debug, clap::Subcommand)]
enum Part {
    /// Says what one rank holds while a transformer is trained, and what sequence fits; or compares that with published numbers
    Train(train::Args),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
enum Bias {
    /// `[1, 1, heads, seqlen, seqlen]`
    Pair,
    /// `[1, rows, 1, 1, seqlen]`
    Key,
    /// Bool `[1, rows, seqlen]`
    Mask,
    /// Nothing
    None,
}

#[derive(Serialize)]
struct Report {
    device: String,
    dtype: String,
    shape: [usize; 4],
    kernel: String,
    logits_bytes: f64,
    passes: Vec<PassReport>,
    memory_bytes: Option<u64>,
}

#[derive(Serialize)]
struct PassReport {
    pass: &'static str,
    operand_bytes: f64,
    workspace_bytes: f64,
    fused_bytes: f64,
    unfused_bytes: f64,
    /// Longest sequence that fits the memory size.
    fused_max_seqlen: Option<usize>,
    unfused_max_seqlen: Option<usize>,
}

/// Bytes of one pass.
struct Need {
    operands: f64,
    workspace: f64,
    unfused: f64,
}

/// Prints the sizes.
pub(crate) fn run(args: &Args, global: &Global) -> Result<Outcome> {
    if let Some(Part::Train(args)) = &args.part {
        return train::run(args);
    }
    let device = global.open()?;
    let shape = list::shape(&args.shape)?;
    let passes = [("forward", false), ("forward and backward", true)];
    let problem = args.problem(shape, shape[1], true)?;
    let report = Report {
        device: device.info().id.to_string(),
        dtype: args.dtype.to_string(),
        shape,
        kernel: device.plan_attention(&problem)?.kernel,
        logits_bytes: logits_bytes(&problem),
        passes: passes
            .into_iter()
            .map(|(pass, gradients)| args.pass(&device, shape, pass, gradients))
            .collect::<Result<_>>()?,
        memory_bytes: args.memory,
    };
    if args.json {
        say_json(&report)?
    } else {
        report.print()?
    }
    Ok(Outcome::Passed)
}

impl Args {
    fn problem(
        &self,
        [rows, _, heads, head_dim]: [usize; 4],
        seqlen: usize,
        gradients: bool,
    ) -> Result<AttentionProblem> {
        ensure!(
            !self.biases.contains(&Bias::None) || self.biases.len() == 1,
            "--biases: `none` stands alone; leave it out or name nothing else"
        );
        let Precision { dtype, products } = self.dtype;
        let mut spec = AttentionSpec::new(dtype, 1, rows, seqlen, heads, head_dim);
        spec.products = products;
        for bias in &self.biases {
            match bias {
                Bias::Pair => spec.biases.push(BiasSpec { shape: [1, 1, heads, seqlen, seqlen], dtype }),
                Bias::Key => spec.biases.push(BiasSpec { shape: [1, rows, 1, 1, seqlen], dtype }),
                Bias::Mask => spec.key_mask = true,
                Bias::None => {}
            }
        }
        spec.gate = self.gate;
        spec.mask.causal = self.causal;
        let spec = if gradients { spec.with_all_gradients() } else { spec };
        AttentionProblem::new(spec).context("--shape describes no valid attention")
    }

    fn pass(&self, device: &Device, shape: [usize; 4], pass: &'static str, gradients: bool) -> Result<PassReport> {
        let here = Need::of(device, &self.problem(shape, shape[1], gradients)?, gradients)?;
        let fits = |memory: u64, seqlen, bytes: fn(&Need) -> f64| -> Result<bool> {
            let problem = self.problem(shape, seqlen, gradients)?;
            // Nothing is planned for a length whose operands alone do not fit.
            let memory = as_f64(memory);
            Ok(operand_bytes(&problem, gradients) <= memory && bytes(&Need::of(device, &problem, gradients)?) <= memory)
        };
        // Sizes beyond the contract's limits do not fit either.
        let longest = |bytes: fn(&Need) -> f64| {
            self.memory.map(|memory| largest(|seqlen| fits(memory, seqlen, bytes).unwrap_or(false)))
        };
        Ok(PassReport {
            pass,
            operand_bytes: here.operands,
            workspace_bytes: here.workspace,
            fused_bytes: here.fused(),
            unfused_bytes: here.unfused,
            fused_max_seqlen: longest(Need::fused),
            unfused_max_seqlen: longest(|need| need.unfused),
        })
    }
}

impl Need {
    fn of(device: &Device, problem: &AttentionProblem, gradients: bool) -> Result<Self> {
        let plan = device.plan_attention(problem)?;
        let workspace = if gradients {
            plan.forward_workspace_bytes.max(plan.backward_workspace_bytes)
        } else {
            plan.forward_workspace_bytes
        };
        let operands = operand_bytes(problem, gradients);
        let matrices = if gradients { 4.0 } else { 2.0 };
        let unfused = operands + matrices * logits_bytes(problem);
        Ok(Self { operands, workspace: as_f64(workspace), unfused })
    }

    fn fused(&self) -> f64 {
        self.operands + self.workspace
    }
}

/// Bytes of one matrix of the size of the logits, in the dtype of q.
fn logits_bytes(problem: &AttentionProblem) -> f64 {
    problem.logits() * as_f64(problem.spec().dtype.size_bytes())
}

/// Bytes of everything an attention reads and writes.
fn operand_bytes(problem: &AttentionProblem, gradients: bool) -> f64 {
    let spec = problem.spec();
    let tensor = |shape: &[usize], dtype: DType| {
        shape.iter().map(|&size| as_f64(size)).product::<f64>() * as_f64(dtype.size_bytes())
    };
    let inputs = tensor(&problem.q_shape(), spec.dtype)
        + tensor(&problem.k_shape(), spec.dtype)
        + tensor(&problem.v_shape(), spec.dtype)
        + spec.biases.iter().map(|bias| tensor(&bias.shape, bias.dtype)).sum::<f64>()
        + if spec.gate { tensor(&problem.out_shape(), spec.dtype) } else { 0.0 };
    let out = tensor(&problem.out_shape(), spec.dtype);
    let lse = 2.0 * tensor(&problem.lse_shape(), DType::F32);
    let mask = if spec.key_mask { tensor(&[spec.batch, spec.rows, spec.seqlen_k], DType::Bool) } else { 0.0 };
    let forward = inputs + mask + out + lse;
    if gradients { forward + out + inputs } else { forward }
}

/// Largest length for which `fits` holds, when it holds up to some length and not beyond; 0 for none.
fn largest(fits: impl Fn(usize) -> bool) -> usize {
    let (mut low, mut high) = (0, MAX_SEQLEN);
    while high - low > 1 {
        let middle = low + (high - low) / 2;
        if fits(middle) { low = middle } else { high = middle }
    }
    low
}

impl Report {
    fn print(&self) -> Result<()> {
        let [rows, seqlen, heads, head_dim] = self.shape;
        say(&format!(
            "rows {rows}, seqlen {seqlen}, heads {heads}, head_dim {head_dim}, {} on {} ({}); logits {}",
            self.dtype,
            self.device,
            self.kernel,
            output::bytes(self.logits_bytes)
        ))?;
        let mut sizes = table(&["pass", "operands", "workspace", "fused", "unfused", "ratio"], 1);
        for pass in &self.passes {
            let columns = [pass.operand_bytes, pass.workspace_bytes, pass.fused_bytes, pass.unfused_bytes];
            let row = std::iter::once(pass.pass.to_owned()).chain(columns.map(output::bytes));
            sizes.add_row(row.chain([format!("{}x", output::digits(pass.unfused_bytes / pass.fused_bytes))]));
        }
        say(&sizes.to_string())?;
        say(FORMULA)?;
        let Some(memory) = self.memory_bytes else { return Ok(()) };
        say(&format!("\nlongest sequence in {}:", output::bytes(as_f64(memory))))?;
        let mut lengths = table(&["pass", "fused", "unfused"], 1);
        for pass in &self.passes {
            let columns = [pass.fused_max_seqlen, pass.unfused_max_seqlen];
            let columns = columns.map(|length| length.map_or_else(String::new, |length| length.to_string()));
            lengths.add_row(std::iter::once(pass.pass.to_owned()).chain(columns));
        }
        say(&lengths.to_string())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_search_ends_at_the_last_length_that_fits() {
        for limit in [0, 1, 2, 1000, 1 << 30] {
            assert_eq!(largest(|length| length <= limit), limit);
        }
    }

    #[test]
    fn operands_are_counted_once_each() {
        let mut spec = AttentionSpec::new(DType::BF16, 1, 2, 3, 5, 7);
        spec.key_mask = true;
        spec.biases.push(BiasSpec { shape: [1, 1, 5, 3, 3], dtype: DType::F32 });
        let problem = AttentionProblem::new(spec).unwrap();
        let (tensor, bias, mask, lse) = (2.0 * 3.0 * 5.0 * 7.0 * 2.0, 45.0 * 4.0, 6.0, 2.0 * 30.0 * 4.0);
        assert!((operand_bytes(&problem, false) - (4.0 * tensor + bias + mask + lse)).abs() < 1e-9);
        assert!((operand_bytes(&problem, true) - (8.0 * tensor + 2.0 * bias + mask + lse)).abs() < 1e-9);
    }
}
