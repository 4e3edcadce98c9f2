//! Reads the workload definitions that every bench shares.

use serde::Deserialize;
use thiserror::Error;
use tilefold::{AttentionSpec, BiasSpec, Precision};

const DEFINITIONS: &str = include_str!("../definitions/workloads.toml");

/// One named attention.
#[derive(Clone, Debug, PartialEq, Deserialize)]
pub struct Workload {
    /// Its name on the command line and in records.
    pub name: String,
    /// Independent attentions that share the pair bias.
    pub rows: usize,
    /// Queries.
    pub seqlen: usize,
    /// Keys, when they are not as many as the queries.
    pub seqlen_k: Option<usize>,
    /// Heads of q, k and v.
    pub heads: usize,
    /// Channels of q, k and v.
    pub head_dim: usize,
    /// A query sees no key after itself.
    #[serde(default)]
    pub causal: bool,
    /// A bias `[heads, seqlen, seqlen_k]` for all rows, whose gradient is wanted.
    pub pair_bias: bool,
    /// A bool mask `[rows, seqlen_k]`.
    pub key_mask: bool,
    /// Dtypes it is run in, by name.
    pub dtypes: Vec<String>,
    /// Whether it belongs to the default table.
    #[serde(default)]
    pub compare: bool,
    /// Which model it comes from.
    pub source: String,
}

/// A workload that cannot be had.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum DefinitionError {
    /// The definitions do not have the form of [`Workload`].
    #[error("definitions/workloads.toml: {0}")]
    Toml(#[from] toml::de::Error),
    /// No workload has this name.
    #[error("no workload `{name}`; known: {known}")]
    Unknown {
        /// The name asked for.
        name: String,
        /// Names that exist.
        known: String,
    },
}

impl Workload {
    /// Number of keys.
    #[must_use]
    pub fn seqlen_k(&self) -> usize {
        self.seqlen_k.unwrap_or(self.seqlen)
    }

    /// The problem in one precision, with every gradient if `gradients` says so.
    #[must_use]
    pub fn spec(&self, precision: impl Into<Precision>, gradients: bool) -> AttentionSpec {
        let Precision { dtype, products } = precision.into();
        let mut spec = AttentionSpec::new(dtype, 1, self.rows, self.seqlen, self.heads, self.head_dim);
        (spec.products, spec.seqlen_k) = (products, self.seqlen_k());
        spec.key_mask = self.key_mask;
        spec.mask.causal = self.causal;
        if self.pair_bias {
            spec.biases.push(BiasSpec { shape: [1, 1, self.heads, self.seqlen, self.seqlen_k()], dtype });
        }
        if gradients { spec.with_all_gradients() } else { spec }
    }
}

/// Every defined workload, in the file's order.
///
/// # Errors
/// [`DefinitionError::Toml`] when the file does not have the form of [`Workload`].
pub fn definitions() -> Result<Vec<Workload>, DefinitionError> {
    #[derive(Deserialize)]
    struct Definitions {
        workload: Vec<Workload>,
    }
    Ok(toml::from_str::<Definitions>(DEFINITIONS)?.workload)
}

/// The workload of this name.
///
/// # Errors
/// [`DefinitionError::Unknown`] lists the names there are.
pub fn find(name: &str) -> Result<Workload, DefinitionError> {
    let all = definitions()?;
    let known = all.iter().map(|workload| workload.name.as_str()).collect::<Vec<_>>().join(", ");
    let found = all.into_iter().find(|workload| workload.name == name);
    found.ok_or_else(|| DefinitionError::Unknown { name: name.to_owned(), known })
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use tilefold::{AttentionProblem, DType};

    use super::*;

    #[test]
    fn every_definition_is_a_valid_problem_under_a_name_of_its_own() {
        let all = definitions().unwrap();
        let names: HashSet<_> = all.iter().map(|workload| &workload.name).collect();
        assert_eq!(names.len(), all.len());
        for workload in &all {
            AttentionProblem::new(workload.spec(DType::BF16, true)).unwrap();
            assert!(workload.dtypes.iter().all(|name| ["f32", "f16", "bf16"].contains(&name.as_str())));
        }
    }

    #[test]
    fn the_paper_size_has_12_08_gigabytes_of_half_precision_logits() {
        let paper = find("extra-msa-finetuning").unwrap();
        let problem = AttentionProblem::new(paper.spec(DType::BF16, false)).unwrap();
        assert!((problem.logits() * 2.0 / 1e9 - 12.08).abs() < 0.005);
    }

    #[test]
    fn an_unknown_name_is_answered_with_the_known_ones() {
        let message = find("nothing").unwrap_err().to_string();
        assert!(message.contains("`nothing`") && message.contains("small"), "{message}");
    }
}
