//! Sizes and choices of a model.

use tilefold::{AttentionSpec, DType, Element, StructuralMask};

use super::error::{Error, Result};
use super::tokens::VOCABULARY;

/// How the model knows where a token stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Positions {
    /// Queries and keys are rotated by angles that grow with the position (Su et al. 2021).
    Rope,
    /// Logits fall with the distance of query and key (Press et al. 2022).
    Alibi,
    /// A row for each position is added to the embedding: a table that no rank holds whole.
    Learned,
}

/// How attention goes over ranks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum AttentionKind {
    /// Keys and values go round.
    Ring,
    /// Two exchanges, from a part of the sequence to a part of the heads and back.
    Ulysses,
}

/// How the layer after attention goes over ranks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum MlpKind {
    /// Every rank has all weights, and computes its positions.
    Replicated,
    /// Every rank has the weights of a part of the hidden channels, and computes them for all positions, which are gathered
    /// before and scattered after (Korthikanti et al. 2022).
    Tensor,
}

/// Sizes and choices of a model, the same on all ranks.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Config {
    /// Transformer layers.
    pub layers: usize,
    /// Channels of a token.
    pub hidden: usize,
    /// Heads of attention; divides `hidden`.
    pub heads: usize,
    /// Channels inside the MLP.
    pub mlp_hidden: usize,
    /// Tokens of a sequence, over all ranks.
    pub seqlen: usize,
    /// Sequences of a step.
    pub batch: usize,
    /// How the model knows where a token stands.
    pub positions: Positions,
    /// How attention goes over ranks.
    pub attention: AttentionKind,
    /// How the MLP goes over ranks.
    pub mlp: MlpKind,
}

impl Config {
    /// Channels of a head.
    #[must_use]
    pub fn head_dim(&self) -> usize {
        self.hidden / self.heads.max(1)
    }

    /// How many weights a model of these sizes has, however many that are.
    #[must_use]
    pub fn weights(&self) -> f64 {
        let [layers, hidden, mlp] = [self.layers, self.hidden, self.mlp_hidden].map(|size| size as f64);
        let positions = if self.positions == Positions::Learned { self.seqlen as f64 } else { 0.0 };
        let layer = 4.0 * hidden * hidden + 2.0 * hidden * mlp + 2.0 * hidden;
        layers * layer + (VOCABULARY as f64 + positions + 1.0) * hidden
    }

    /// Tokens that the loss is the mean over.
    #[must_use]
    pub fn tokens(&self) -> usize {
        self.batch * self.seqlen
    }

    /// # Errors
    /// [`Error::Config`].
    pub(super) fn check(&self) -> Result<()> {
        let sizes = [
            ("layers", self.layers),
            ("hidden", self.hidden),
            ("heads", self.heads),
            ("mlp_hidden", self.mlp_hidden),
            ("tokens", self.seqlen),
            ("batch", self.batch),
        ];
        for (field, size) in sizes {
            if size == 0 {
                return Err(Error::Config { field, expected: "at least 1".into(), got: "0".into() });
            }
        }
        if !self.hidden.is_multiple_of(self.heads) {
            let expected = format!("a multiple of {} heads", self.heads);
            return Err(Error::Config { field: "hidden", expected, got: self.hidden.to_string() });
        }
        if self.positions == Positions::Rope && !self.head_dim().is_multiple_of(2) {
            let expected = "an even number of channels a head, which are rotated in pairs".into();
            return Err(Error::Config { field: "hidden", expected, got: self.head_dim().to_string() });
        }
        Ok(())
    }

    /// Attention over the whole sequence.
    pub(super) fn attention_spec(&self) -> AttentionSpec {
        let mut spec = AttentionSpec::new(DType::F32, self.batch, 1, self.seqlen, self.heads, self.head_dim());
        let slopes = (self.positions == Positions::Alibi).then(|| self.alibi_slopes());
        spec.mask = StructuralMask { causal: true, alibi_slopes: slopes, ..StructuralMask::default() };
        spec.with_all_gradients()
    }

    /// A slope for each head, from 2^(-8/heads) to 2^-8.
    fn alibi_slopes(&self) -> Vec<f32> {
        (1..=self.heads).map(|head| f32::from_f64((-8.0 * head as f64 / self.heads as f64).exp2())).collect()
    }
}
