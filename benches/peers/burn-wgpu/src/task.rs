//! What is computed: seeded inputs of one shape, and the f64 oracle that results are held against.

use anyhow::{Result, anyhow};
use tilefold::{AttentionSpec, BiasSpec, DType, Gradients};
use tilefold_conformance::buffer::Downloaded;
use tilefold_conformance::case::Case;
use tilefold_conformance::exchange::Results;
use tilefold_conformance::oracle::Expected;
use tilefold_conformance::values::Inputs;

/// Attention of f32 with one bias that all rows share, and its gradients.
pub(crate) struct Task {
    /// Rows, length, heads, channels.
    pub(crate) shape: [usize; 4],
    /// q, k, v, `d_out` `[1, rows, L, heads, channels]` and the bias `[1, 1, heads, L, L]`.
    pub(crate) inputs: Inputs,
    case: Case,
    expected: Expected,
}

/// Every gradient of a [`Task`].
pub(crate) const GRADIENTS: Gradients =
    Gradients { q: true, k: true, v: true, gate: false, biases: [true, false, false, false] };

impl Task {
    /// Draws the inputs and runs the oracle.
    pub(crate) fn new(shape @ [rows, length, heads, channels]: [usize; 4]) -> Result<Self> {
        let mut spec = AttentionSpec::new(DType::F32, 1, rows, length, heads, channels);
        spec.biases.push(BiasSpec { shape: [1, 1, heads, length, length], dtype: DType::F32 });
        spec.gradients = GRADIENTS;
        let case = Case::new("peers", format!("{rows} x {length} x {heads} x {channels}"), spec);
        let inputs = Inputs::draw(&case);
        let expected = Expected::of(&case, &inputs).map_err(|error| anyhow!(error))?;
        Ok(Self { shape, inputs, case, expected })
    }

    /// Holds results, by the names `out`, `dq`, `dk`, `dv` and `dbias0`, against the oracle: gives the largest error as a
    /// share of three times that of plain f32 arithmetic.
    pub(crate) fn check(&self, results: Vec<(&str, Vec<f64>)>) -> Result<f64> {
        let results: Results = results
            .into_iter()
            .map(|(name, values)| (name.to_owned(), Downloaded { values, bytes: Vec::new() }))
            .collect();
        self.expected.check(&self.case, &results).map_err(|error| anyhow!(error))
    }
}
