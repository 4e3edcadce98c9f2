//! A GenSLM-type language model of a genome, trained on a sequence that is split over ranks.
//!
//! A causal transformer predicts each codon from those before it. Every rank holds the activations of its own positions;
//! attention is the only layer that looks at others, and goes through [`tilefold::comm`]. What to read, in this order:
//!
//! | file | what |
//! |---|---|
//! | `tokens.rs` | FASTA to codons |
//! | `config.rs` | sizes and choices |
//! | `parameters.rs` | the weights, and which of them are split over ranks |
//! | `norm.rs`, `attention.rs`, `mlp.rs`, `loss.rs` | one layer each, forward and backward |
//! | `model.rs` | the layers put together |
//! | `adam.rs` | the optimizer |
//!
//! Every backward pass is written by hand, next to its forward pass. The matrices `[rows, width]` have one row for each
//! token of this rank, batch by batch; matrix products are `ndarray`'s, in f32.
//!
//! Source: Zvyagin et al., "GenSLMs: Genome-scale language models reveal SARS-CoV-2 evolutionary dynamics", 2022.

mod adam;
mod attention;
mod config;
mod error;
mod host;
mod loss;
mod mlp;
mod model;
mod norm;
mod parameters;
mod tokens;

pub use adam::Adam;
pub use config::{AttentionKind, Config, MlpKind, Positions};
pub use error::{Error, Result};
pub use loss::VOCABULARY_TILE;
pub use model::{Model, mean_over_replicas};
pub use parameters::{Parameters, Part};
pub use tokens::{BEGIN, GenomeError, Tokens, UNKNOWN, VOCABULARY};
