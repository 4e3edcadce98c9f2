//! The workloads whose static floors are printed: those of the benches.

use std::fs;

use anyhow::{Context, Result};
use serde::{Deserialize, Serialize};

const DEFINITIONS: &str = "benches/definitions/workloads.toml";

#[derive(Deserialize)]
struct Definitions {
    workload: Vec<Workload>,
}

/// An entry of `workloads.toml`, as far as the model needs it.
#[derive(Clone, Debug, Deserialize, Serialize)]
pub(super) struct Workload {
    pub(super) name: String,
    pub(super) head_dim: usize,
    pub(super) pair_bias: bool,
    pub(super) key_mask: bool,
    #[serde(default)]
    pub(super) causal: bool,
    rows: usize,
    seqlen: usize,
    seqlen_k: Option<usize>,
    heads: usize,
}

/// All of them.
pub(super) fn workloads() -> Result<Vec<Workload>> {
    let text = fs::read_to_string(DEFINITIONS).with_context(|| format!("cannot read {DEFINITIONS}"))?;
    let definitions: Definitions =
        toml::from_str(&text).with_context(|| format!("{DEFINITIONS} is not as expected"))?;
    Ok(definitions.workload)
}
