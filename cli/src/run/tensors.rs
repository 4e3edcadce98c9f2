//! Names of the tensors in `run`'s files.

use std::path::Path;

use anyhow::{Context, Result, bail, ensure};
use tilefold::{Backward, Forward, MAX_BIASES, Tensor, safetensors};
use tilefold_benches::{Launch, Omitted, Operands};

/// Names an input file may hold beside the biases.
const NAMES: [&str; 8] = ["q", "k", "v", "key_mask", "q_segments", "k_segments", "gate", "d_out"];

/// Reads the operands; a name that is not known is an error, since its tensor would be silently without effect.
pub(super) fn operands(path: &Path) -> Result<Operands> {
    let mut tensors = safetensors::read(path)?;
    let biases = (0..MAX_BIASES).map(|index| format!("bias{index}"));
    let given: Vec<_> = biases.map(|name| tensors.remove(&name)).collect();
    let count = given.iter().take_while(|bias| bias.is_some()).count();
    if let Some(gap) = given.iter().skip(count).position(Option::is_some) {
        bail!("{}: tensor `bias{}` without `bias{count}`; number the biases from 0", path.display(), count + gap);
    }
    if let Some(name) = tensors.keys().find(|name| !NAMES.contains(&name.as_str())) {
        bail!("{}: unknown tensor `{name}`; expected {}, bias0..bias3", path.display(), NAMES.join(", "));
    }
    let mut take = |name: &str| tensors.remove(name);
    let needed = |tensor: Option<Tensor>, name: &str| {
        tensor.with_context(|| format!("{}: no tensor `{name}`; q, k and v are needed", path.display()))
    };
    let (q, k, v) = (needed(take("q"), "q")?, needed(take("k"), "k")?, needed(take("v"), "v")?);
    let rank = q.shape().len();
    ensure!(
        (3..=5).contains(&rank),
        "{}: tensor `q`: expected 3 to 5 dimensions ([batch, rows,] seqlen, heads, head_dim), got {rank}",
        path.display()
    );
    let (q_segments, k_segments) = (take("q_segments"), take("k_segments"));
    let alone = match (&q_segments, &k_segments) {
        (Some(_), None) => Some("`q_segments` without `k_segments`"),
        (None, Some(_)) => Some("`k_segments` without `q_segments`"),
        _ => None,
    };
    if let Some(alone) = alone {
        bail!("{}: tensor {alone}; give both or neither", path.display());
    }
    let mut operands = Operands::new(q, k, v);
    operands.biases = given.into_iter().flatten().collect();
    operands.key_mask = take("key_mask");
    operands.q_segments = q_segments;
    operands.k_segments = k_segments;
    operands.gate = take("gate");
    operands.d_out = take("d_out");
    operands.omitted = Omitted::Rows;
    Ok(operands)
}

/// Everything a launch wrote, under the names of the output file.
pub(super) fn results(launch: &Launch) -> Vec<(String, &Tensor)> {
    let Forward { out, lse, lse_low } = launch.forward_results();
    let mut named = vec![("out".to_owned(), out), ("lse".to_owned(), lse), ("lse_low".to_owned(), lse_low)];
    let Some(Backward { dq, dk, dv, d_gate, dbiases }) = launch.backward_results() else { return named };
    let gradients = [("dq", dq), ("dk", dk), ("dv", dv), ("dgate", d_gate)];
    named.extend(gradients.into_iter().filter_map(|(name, tensor)| Some((name.to_owned(), tensor.as_ref()?))));
    let dbiases = dbiases.iter().enumerate();
    named.extend(dbiases.filter_map(|(index, tensor)| Some((format!("dbias{index}"), tensor.as_ref()?))));
    named
}
