//! `tilefold plan train`: memory of one rank while a transformer is trained, and the longest sequence that fits.

use anyhow::{Result, ensure};
use clap::ValueEnum;
use clap::builder::RangedU64ValueParser;
use serde::Serialize;
use tilefold::Precision;
use tilefold_comm::memory_model::{
    Buffer, DenseMask, Model, Place, Positions as Table, Recompute as Again, Training, ZeroStage,
};

use super::paper;
use crate::list;
use crate::output::{self, Outcome, as_f64, say, say_json, table};

/// What the letters mean; printed below the table.
const LEGEND: &str = "\
s sequence, b batch, h hidden, a heads, V vocabulary, L layers, Ψ parameters; bytes are of one rank, after the division\n\
divided by: t tensor ranks, r sequence ranks, N data ranks, `t in part` what a term of the formula says, - nothing\n\
not in it: allocator, communication buffers, streams, temporaries; a GPU needs more (see --compare paper)";

/// Options of `plan train`.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// Layers of the model
    #[arg(long, required_unless_present = "compare", value_parser = size())]
    layers: Option<u32>,
    /// Hidden size
    #[arg(long, required_unless_present = "compare", value_parser = size())]
    hidden: Option<u32>,
    /// Attention heads; they divide the hidden size
    #[arg(long, required_unless_present = "compare", value_parser = size())]
    heads: Option<u32>,
    /// Vocabulary
    #[arg(long, default_value = "50257", value_parser = size())]
    vocabulary: u32,
    /// Sequences of one pass on one rank
    #[arg(long, default_value = "1", value_parser = size())]
    batch: u32,
    /// Tensor- and sequence-parallel ranks (t); they divide the heads
    #[arg(long, default_value = "1", value_parser = size())]
    tensor_ranks: u32,
    /// Data-parallel ranks (N)
    #[arg(long, default_value = "1", value_parser = size())]
    data_ranks: u32,
    /// Ranks that divide the sequence alone (r), as ring attention and Ulysses do
    #[arg(long, default_value = "1", value_parser = size())]
    sequence_ranks: u32,
    /// The tensor ranks divide the sequence between layers too
    #[arg(long)]
    sequence_parallel: bool,
    /// ZeRO stage: what data-parallel ranks share out
    #[arg(long, value_enum, default_value = "0")]
    zero: Zero,
    /// Activations that backward computes again
    #[arg(long, value_enum, default_value = "selective")]
    recompute: Recompute,
    /// The tensor ranks share out the layer inputs that full recomputation keeps
    #[arg(long)]
    partition_activations: bool,
    /// What layers keep goes to host memory, all but two layers of it
    #[arg(long)]
    offload_activations: bool,
    /// Fused attention stores no matrix of sequence x sequence
    #[arg(long, value_enum, default_value = "fused")]
    attention: Attention,
    /// A mask of sequence x sequence in the device's memory
    #[arg(long, value_enum, default_value = "none")]
    mask: Mask,
    /// The mask is built from a second one of its size
    #[arg(long)]
    mask_copied: bool,
    /// A learned table of positions: whole on every tensor rank, or partitioned
    #[arg(long, value_enum, default_value = "none")]
    positions: Positions,
    /// Type of weights and activations
    #[arg(long, default_value = "bf16", value_parser = list::dtype)]
    dtype: Precision,
    /// Gradients are summed in f32
    #[arg(long)]
    f32_gradients: bool,
    /// Elements a layer keeps for each of s b h [default: Megatron's 16, and two dropout masks]
    #[arg(long, value_parser = size())]
    kept_elements: Option<u32>,
    /// Logits of a token that are there at a time [default: all]
    #[arg(long, value_parser = size())]
    vocabulary_tile: Option<u32>,
    /// Tensors of the whole sequence that sequence parallelism holds at a time
    #[arg(long, default_value_t = 2, value_name = "COPIES")]
    gathered: u32,
    /// Length of the sequence, in tokens [default: the longest that fits]
    #[arg(long, required_unless_present_any = ["memory", "compare"], value_parser = clap::value_parser!(u64).range(1..1 << 40))]
    seqlen: Option<u64>,
    /// Also finds the longest sequence that fits this much memory of one rank, such as 40GiB
    #[arg(long, value_parser = list::memory_bytes, value_name = "SIZE")]
    memory: Option<u64>,
    /// Prints published lengths beside the predictions, and nothing else
    #[arg(long, value_enum)]
    compare: Option<Compare>,
    /// Prints JSON instead of a table
    #[arg(long)]
    json: bool,
}

fn size() -> RangedU64ValueParser<u32> {
    RangedU64ValueParser::new().range(1..)
}

#[derive(Clone, Copy, Debug, ValueEnum)]
enum Zero {
    /// Nothing
    #[value(name = "0")]
    Off,
    /// Optimizer state
    #[value(name = "1")]
    One,
    /// And gradients
    #[value(name = "2")]
    Two,
    /// And parameters
    #[value(name = "3")]
    Three,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
enum Recompute {
    /// None: all are kept
    None,
    /// Attention matrices
    Selective,
    /// All but the input of each layer
    Full,
}

#[derive(Clone, Copy, Debug, PartialEq, ValueEnum)]
enum Attention {
    Fused,
    Unfused,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
enum Mask {
    /// A descriptor, or in host memory
    None,
    Bool,
    F32,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
enum Positions {
    /// Rotary positions or `ALiBi`
    None,
    Replicated,
    Partitioned,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
enum Compare {
    /// The table of the DeepSpeed4Science paper
    Paper,
}

#[derive(Serialize)]
struct Report {
    parameters: f64,
    tensor_ranks: u32,
    sequence_ranks: u32,
    data_ranks: u32,
    dtype: String,
    seqlen: u64,
    buffers: Vec<BufferReport>,
    device_bytes: f64,
    host_bytes: f64,
    memory_bytes: Option<u64>,
    max_seqlen: Option<u64>,
}

#[derive(Serialize)]
struct BufferReport {
    buffer: &'static str,
    place: &'static str,
    formula: String,
    divided_by: String,
    bytes: f64,
}

/// Prints the sizes, or the comparison.
pub(crate) fn run(args: &Args) -> Result<Outcome> {
    if let Some(Compare::Paper) = args.compare {
        paper::run(args.json)?;
        return Ok(Outcome::Passed);
    }
    let training = args.training()?;
    let max_seqlen = args.memory.map(|memory| training.longest(memory)).transpose()?;
    let seqlen = args.seqlen.or(max_seqlen).unwrap_or(1);
    let buffers = training.buffers(seqlen)?;
    let bytes_at = |place| buffers.iter().filter(|buffer| buffer.place == place).map(|buffer| buffer.bytes).sum();
    let report = Report {
        parameters: training.model.parameters(),
        tensor_ranks: training.tensor_ranks,
        sequence_ranks: training.sequence_ranks,
        data_ranks: training.data_ranks,
        dtype: args.dtype.to_string(),
        seqlen,
        device_bytes: bytes_at(Place::Device),
        host_bytes: bytes_at(Place::Host),
        buffers: buffers.iter().map(BufferReport::of).collect(),
        memory_bytes: args.memory,
        max_seqlen,
    };
    if args.json {
        say_json(&report)?
    } else {
        report.print()?
    }
    Ok(Outcome::Passed)
}

impl Args {
    fn training(&self) -> Result<Training> {
        // clap asks for all three unless `--compare` is there.
        let [layers, hidden, heads] = [self.layers, self.hidden, self.heads].map(Option::unwrap_or_default);
        let element_bytes = u32::try_from(self.dtype.dtype.size_bytes())?;
        ensure!(
            !self.mask_copied || !matches!(self.mask, Mask::None),
            "--mask-copied: there is no mask to build; choose --mask bool or f32"
        );
        let training = Training {
            batch: self.batch,
            tensor_ranks: self.tensor_ranks,
            data_ranks: self.data_ranks,
            sequence_ranks: self.sequence_ranks,
            sequence_parallel: self.sequence_parallel,
            zero: match self.zero {
                Zero::Off => ZeroStage::Off,
                Zero::One => ZeroStage::OptimizerState,
                Zero::Two => ZeroStage::Gradients,
                Zero::Three => ZeroStage::Parameters,
            },
            recompute: match self.recompute {
                Recompute::None => Again::None,
                Recompute::Selective => Again::Selective,
                Recompute::Full => Again::Full,
            },
            partition_activations: self.partition_activations,
            offload_activations: self.offload_activations,
            fused_attention: self.attention == Attention::Fused,
            mask: match self.mask {
                Mask::None => DenseMask::None,
                Mask::Bool => DenseMask::Bool,
                Mask::F32 => DenseMask::F32,
            },
            mask_is_copied: self.mask_copied,
            positions: match self.positions {
                Positions::None => Table::None,
                Positions::Replicated => Table::Replicated,
                Positions::Partitioned => Table::Partitioned,
            },
            element_bytes,
            f32_gradients: self.f32_gradients,
            kept_elements: self.kept_elements,
            vocabulary_tile: self.vocabulary_tile,
            gathered_copies: self.gathered,
            ..Training::new(Model { layers, hidden, heads, vocabulary: self.vocabulary })
        };
        training.check()?;
        Ok(training)
    }
}

impl BufferReport {
    fn of(buffer: &Buffer) -> Self {
        let place = match buffer.place {
            Place::Device => "device",
            Place::Host => "host",
        };
        let Buffer { name, formula, divided_by, bytes, .. } = buffer.clone();
        Self { buffer: name, place, formula, divided_by, bytes }
    }
}

impl Report {
    fn print(&self) -> Result<()> {
        let Self { seqlen, dtype, tensor_ranks, sequence_ranks, data_ranks, .. } = self;
        let parameters = output::digits(self.parameters / 1e9);
        say(&format!(
            "{parameters} G parameters, sequence {seqlen}, {dtype}; t = {tensor_ranks}, r = {sequence_ranks}, N = {data_ranks}"
        ))?;
        let mut sizes = table(&["buffer", "where", "formula", "divided by", "bytes"], 4);
        for buffer in &self.buffers {
            let BufferReport { buffer, place, formula, divided_by, bytes } = buffer;
            sizes.add_row([buffer, *place, formula, divided_by, &output::bytes(*bytes)]);
        }
        for (place, bytes) in [("device", self.device_bytes), ("host", self.host_bytes)] {
            if bytes > 0.0 {
                sizes.add_row(["all", place, "", "", &output::bytes(bytes)]);
            }
        }
        say(&sizes.to_string())?;
        say(LEGEND)?;
        let (Some(memory), Some(longest)) = (self.memory_bytes, self.max_seqlen) else { return Ok(()) };
        let thousands = output::digits(as_f64(longest) / tilefold_comm::memory_model::paper::TOKENS_PER_K);
        let memory = output::bytes(as_f64(memory));
        say(&format!("\nlongest sequence in {memory}: {longest} tokens ({thousands} K)"))
    }
}
