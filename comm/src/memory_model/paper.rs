//! The longest sequences that DeepSpeed4Science publishes, beside two predictions.
//!
//! *Source*: Song et al. 2023, "DeepSpeed4Science Initiative: Enabling Large-Scale Scientific Discovery through
//! Sophisticated AI System Technologies": genome-scale models on A100 GPUs of 40 GB.

use super::{DenseMask, Model, ModelError, Positions, Recompute, Training, ZeroStage};

/// Memory of one GPU: 40 GiB.
pub const GPU_BYTES: u64 = 40 << 30;

/// GPUs of the three columns.
pub const GPUS: [u32; 3] = [32, 64, 128];

/// Tokens of the paper's K.
pub const TOKENS_PER_K: f64 = 1024.0;

/// The paper does not say its vocabulary; this is that of GPT-2, which its code has by default.
pub const ASSUMED_VOCABULARY: u32 = 50_257;

/// What was trained with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum System {
    /// Megatron-DeepSpeed with the paper's work.
    New,
    /// Megatron-DeepSpeed before it.
    Old,
    /// Megatron-LM.
    MegatronLm,
}

/// A row of the paper's table.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Published {
    /// The paper's name of the model.
    pub name: &'static str,
    /// Its sizes.
    pub model: Model,
    /// 12Lh², to three digits: Ψ of the fit.
    pub parameters: f64,
    /// What it was trained with.
    pub system: System,
    /// Longest sequence in K tokens, on [`GPUS`].
    pub longest_k: [f64; 3],
}

/// A published length beside what is predicted.
#[derive(Clone, Debug, PartialEq)]
pub struct Compared {
    /// The row.
    pub published: Published,
    /// How the prediction takes the system to have worked.
    pub assumed: &'static str,
    /// GPUs.
    pub gpus: u32,
    /// Published, in K tokens.
    pub published_k: f64,
    /// From first principles, in K tokens; the reason where the model does not fit at all.
    pub predicted_k: Result<f64, ModelError>,
    /// From the fit, in K tokens; for [`System::New`] alone, to which it was made.
    pub fitted_k: Option<f64>,
}

const MODEL_25B: Model = Model { layers: 64, hidden: 6144, heads: 64, vocabulary: ASSUMED_VOCABULARY };
const MODEL_33B: Model = Model { layers: 80, ..MODEL_25B };

/// The paper's table.
pub const PUBLISHED: [Published; 6] = [
    row_25b(System::New, [192.0, 448.0, 512.0]),
    row_25b(System::Old, [36.0, 42.0, 42.0]),
    row_25b(System::MegatronLm, [26.0, 48.0, 52.0]),
    row_33b(System::New, [128.0, 384.0, 448.0]),
    row_33b(System::Old, [28.0, 32.0, 32.0]),
    row_33b(System::MegatronLm, [14.0, 46.0, 52.0]),
];

const fn row_25b(system: System, longest_k: [f64; 3]) -> Published {
    Published { name: "25B", model: MODEL_25B, parameters: 29.0e9, system, longest_k }
}

const fn row_33b(system: System, longest_k: [f64; 3]) -> Published {
    Published { name: "33B", model: MODEL_33B, parameters: 36.2e9, system, longest_k }
}

/// What the GPUs do: t = as many as there are heads at most, N = the rest.
///
/// The paper does not say; no more than one rank a head is what Megatron allows.
#[must_use]
pub fn ranks(model: &Model, gpus: u32) -> (u32, u32) {
    let tensor_ranks = gpus.min(model.heads).max(1);
    (tensor_ranks, gpus / tensor_ranks)
}

/// How a system is taken to have trained, with names. The paper does not say whether the older Megatron-DeepSpeed shared
/// out its checkpoints, so it is there both ways.
#[must_use]
pub fn assumptions(system: System, model: Model, gpus: u32) -> Vec<(&'static str, Training)> {
    let (tensor_ranks, data_ranks) = ranks(&model, gpus);
    let zero = ZeroStage::OptimizerState;
    let plain = Training { tensor_ranks, data_ranks, zero, ..Training::new(model) };
    let unfused = Training { fused_attention: false, mask: DenseMask::Bool, mask_is_copied: true, ..plain };
    let full = |training| Training { recompute: Recompute::Full, ..training };
    match system {
        System::New => {
            let new = Training { sequence_parallel: true, positions: Positions::Partitioned, ..plain };
            vec![("full recompute, fused, no mask, positions / t", full(new))]
        }
        System::Old => {
            let old = full(Training { positions: Positions::Replicated, ..unfused });
            let shared = Training { partition_activations: true, ..old };
            vec![("full recompute, unfused, bool mask", old), ("the same, checkpoints / t", shared)]
        }
        System::MegatronLm => {
            let positions = Positions::Replicated;
            let selective = Training { sequence_parallel: true, recompute: Recompute::Selective, positions, ..unfused };
            vec![("selective recompute, unfused, bool mask", selective)]
        }
    }
}

/// The constants of a fit to the six lengths of [`System::New`]: chosen to match, not derived.
///
/// `M = (S(N)Ψ + S(N)sh)/t + 2shL/t + 34sh/t + 6sh + 8sV/t + 6 GB` with `S(N) = 4 + 18/N`: per parameter, 4 bytes on
/// every rank and 18 that ZeRO-1 shares out; 2sh a checkpoint; one layer of 34sh; 3 gathered copies of 2sh; f32 logits
/// and their gradient; and 6 GB for what no formula names.
pub mod fit {
    /// Bytes a parameter on every rank.
    pub const STATE_BYTES: f64 = 4.0;
    /// Bytes a parameter, over the N data-parallel ranks.
    pub const STATE_BYTES_SHARED: f64 = 18.0;
    /// Bytes of a checkpoint for each of sh.
    pub const CHECKPOINT_BYTES: f64 = 2.0;
    /// Bytes of the layer in work for each of sh.
    pub const LAYER_BYTES: f64 = 34.0;
    /// Bytes of gathered tensors for each of sh.
    pub const GATHERED_BYTES: f64 = 6.0;
    /// Bytes of logits for each of sV.
    pub const LOGITS_BYTES: f64 = 8.0;
    /// Bytes of everything else.
    pub const RESERVED_BYTES: f64 = 6e9;
}

/// Longest sequence in K tokens by the [`fit`].
#[must_use]
pub fn fitted_k(row: &Published, gpus: u32) -> f64 {
    let (tensor_ranks, data_ranks) = ranks(&row.model, gpus);
    let (t, n) = (f64::from(tensor_ranks), f64::from(data_ranks));
    let (h, layers) = (f64::from(row.model.hidden), f64::from(row.model.layers));
    let state = fit::STATE_BYTES + fit::STATE_BYTES_SHARED / n;
    let token = state * h / t
        + fit::CHECKPOINT_BYTES * h * layers / t
        + fit::LAYER_BYTES * h / t
        + fit::GATHERED_BYTES * h
        + fit::LOGITS_BYTES * f64::from(row.model.vocabulary) / t;
    (super::real(GPU_BYTES) - fit::RESERVED_BYTES - state * row.parameters / t) / token / TOKENS_PER_K
}

/// The paper's table beside the predictions: one entry for each assumption and number of GPUs.
///
/// ```
/// use tilefold_comm::memory_model::paper;
/// let rows = paper::compare();
/// let fitted: Vec<f64> = rows.iter().filter_map(|row| row.fitted_k).map(f64::round).collect();
/// assert_eq!(fitted, [196.0, 433.0, 506.0, 130.0, 375.0, 459.0]);
/// ```
#[must_use]
pub fn compare() -> Vec<Compared> {
    let mut rows = Vec::new();
    for published in PUBLISHED {
        let variants = assumptions(published.system, published.model, 1).len();
        for variant in 0..variants {
            for (gpus, published_k) in GPUS.into_iter().zip(published.longest_k) {
                let assumed = assumptions(published.system, published.model, gpus).into_iter().nth(variant);
                let Some((assumed, training)) = assumed else { continue };
                let predicted_k = training.longest(GPU_BYTES).map(|tokens| super::real(tokens) / TOKENS_PER_K);
                let fitted_k = (published.system == System::New).then(|| fitted_k(&published, gpus));
                rows.push(Compared { published, assumed, gpus, published_k, predicted_k, fitted_k });
            }
        }
    }
    rows
}
