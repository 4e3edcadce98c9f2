//! Holds a crop of an attention's results against the f64 oracle.
//!
//! Rows are independent given the bias, so a few rows of the outputs and gradients are a problem of their own; of a long
//! sequence it is solved in slabs of queries, over which the gradients of k and v are sums. A bias's gradient sums over all
//! rows, but each query's part of it stands alone: it is checked for a few queries over all rows, in slabs. So the check
//! takes little memory at any size.

use anyhow::{Context, Result};
use serde::Serialize;
use tilefold::reference::{self, ReferenceInputs};
use tilefold::{AttentionProblem, Inputs, Options, TensorView, all_gradients, problem};

use super::bound::{Bounds, Precision};

/// Rows whose outputs and gradients are checked, if the oracle can do so many in seconds.
const ROWS: usize = 4;
/// Queries whose part of the bias gradient is checked.
const QUERIES: usize = 2;
/// Logits the oracle visits a row crop: well below a second; and most logits of a slab of queries.
const LIMIT_LOGITS: usize = 8_000_000;
/// Most values of k in a slab of rows.
const LIMIT_KEYS: usize = 1 << 20;

/// One attention, computed: views in the order `[batch, rows, seqlen, heads, head_dim]`, batch 1.
#[derive(Debug)]
pub(super) struct Checked<'a> {
    pub(super) inputs: Inputs<'a>,
    pub(super) d_out: TensorView<'a>,
    pub(super) out: TensorView<'a>,
    pub(super) dq: TensorView<'a>,
    pub(super) dk: TensorView<'a>,
    pub(super) dv: TensorView<'a>,
    pub(super) d_gate: Option<TensorView<'a>>,
    pub(super) dbias: Option<TensorView<'a>>,
}

/// The worst value of one result.
#[derive(Clone, Debug, Serialize)]
pub(super) struct Finding {
    /// Which result.
    pub(super) tensor: &'static str,
    /// Values compared.
    pub(super) values: usize,
    /// Largest difference from the oracle.
    pub(super) max_error: f64,
    /// Largest difference as a share of what rounding explains; above 1 the check fails.
    pub(super) of_tolerance: f64,
}

/// Compares a crop of every result.
pub(super) fn check(problem: &AttentionProblem, checked: &Checked<'_>) -> Result<Vec<Finding>> {
    let spec = problem.spec();
    let precision = Precision::of(problem);
    let row_logits = spec.heads * spec.seqlen_q * spec.seqlen_k;
    // A very long alignment gets fewer rows, then fewer heads.
    let rows = (LIMIT_LOGITS / row_logits.max(1)).clamp(1, ROWS).min(spec.rows);
    let heads = (LIMIT_LOGITS / (spec.seqlen_q * spec.seqlen_k).max(1)).clamp(1, spec.heads);
    let mut findings = Vec::new();
    for row in spread(spec.rows, rows) {
        let crop = checked.slice(1, row, 1)?.slice(3, 0, heads)?;
        crop.compare_rows(slab(LIMIT_LOGITS, heads * spec.seqlen_k, spec.seqlen_q), &precision, &mut findings)?;
    }
    if checked.dbias.is_some() {
        let head = spec.heads - 1;
        for query in spread(spec.seqlen_q, QUERIES.min(spec.seqlen_q)) {
            let crop = checked.slice(3, head, 1)?.slice(2, query, 1)?;
            let rows = slab(LIMIT_KEYS, spec.seqlen_k * spec.head_dim, spec.rows);
            crop.compare_bias_gradient(rows, &precision, &mut findings)?;
        }
    }
    Ok(findings)
}

/// How many of `count` parts of a size make one slab.
fn slab(limit: usize, size: usize, count: usize) -> usize {
    (limit / size.max(1)).clamp(1, count)
}

/// `count` indices from the first to the last.
fn spread(size: usize, count: usize) -> impl Iterator<Item = usize> {
    (0..count).map(move |index| if count < 2 { size / 2 } else { index * (size - 1) / (count - 1) })
}

impl<'a> Checked<'a> {
    /// A crop of one axis: rows (1), queries (2) or heads (3); keys stay whole.
    fn slice(&self, axis: usize, start: usize, count: usize) -> Result<Self> {
        let range = start..start + count;
        let cut = |view: &TensorView<'a>| view.slice(axis, range.clone(), 1);
        let keys = |view: &TensorView<'a>| if axis == 2 { Ok(view.clone()) } else { cut(view) };
        // Axes of a bias: batch, rows, heads, queries, keys.
        let bias_axis = [0, 1, 3, 2][axis];
        let cut_bias = |view: &TensorView<'a>| match view.shape()[bias_axis] {
            1 => Ok(view.clone()),
            _ => view.slice(bias_axis, range.clone(), 1),
        };
        let from = &self.inputs;
        let mut inputs = Inputs::new(cut(&from.q)?, keys(&from.k)?, keys(&from.v)?);
        inputs.biases = from.biases.iter().map(cut_bias).collect::<Result<_, _>>()?;
        inputs.gate = from.gate.as_ref().map(cut).transpose()?;
        inputs.key_mask = match &from.key_mask {
            Some(mask) if axis == 1 && mask.shape()[1] != 1 => Some(cut(mask)?),
            mask => mask.clone(),
        };
        Ok(Self {
            inputs,
            d_out: cut(&self.d_out)?,
            out: cut(&self.out)?,
            dq: cut(&self.dq)?,
            dk: keys(&self.dk)?,
            dv: keys(&self.dv)?,
            d_gate: self.d_gate.as_ref().map(cut).transpose()?,
            dbias: self.dbias.as_ref().map(cut_bias).transpose()?,
        })
    }

    /// The crop's own problem and its operands in f64.
    fn exact(&self) -> Result<(AttentionProblem, ReferenceInputs, Vec<f64>)> {
        let Inputs { q, k, v, biases, key_mask, gate, .. } = &self.inputs;
        let problem = problem(&self.inputs, &Options::default(), all_gradients(&self.inputs))?;
        let exact =
            ReferenceInputs::from_views(&problem, q, k, v, biases, key_mask.as_ref(), None, None, gate.as_ref())?;
        Ok((problem, exact, self.d_out.to_f64()?))
    }

    /// Slabs of an axis: rows (1) or queries (2).
    fn slabs(&self, axis: usize, size: usize) -> impl Iterator<Item = Result<Self>> {
        let count = self.inputs.q.shape()[axis];
        (0..count).step_by(size.max(1)).map(move |start| self.slice(axis, start, size.min(count - start)))
    }

    fn compare_rows(&self, queries: usize, precision: &Precision, findings: &mut Vec<Finding>) -> Result<()> {
        let (mut dk, mut dv) = (Sum::like(&self.dk), Sum::like(&self.dv));
        for slab in self.slabs(2, queries) {
            let slab = slab?;
            let (problem, exact, d_out) = slab.exact()?;
            let forward = reference::forward(&problem, &exact);
            let gradients = reference::backward(&problem, &exact, &d_out);
            let bounds = Bounds::new(&problem, &exact, &d_out, &forward, precision);
            dk.add(&gradients.dk, &bounds.dk);
            dv.add(&gradients.dv, &bounds.dv);
            let results = [
                ("out", Some(&slab.out), Some(&forward.out), &bounds.out),
                ("dq", Some(&slab.dq), Some(&gradients.dq), &bounds.dq),
                ("dgate", slab.d_gate.as_ref(), gradients.d_gate.as_ref(), &bounds.d_gate),
            ];
            for (tensor, got, expected, bound) in results {
                if let (Some(got), Some(expected)) = (got, expected) {
                    merge(findings, compare(tensor, &got.to_f64()?, expected, bound));
                }
            }
        }
        for (tensor, got, sum) in [("dk", &self.dk, dk), ("dv", &self.dv, dv)] {
            merge(findings, compare(tensor, &got.to_f64()?, &sum.expected, &sum.bound));
        }
        Ok(())
    }

    fn compare_bias_gradient(&self, rows: usize, precision: &Precision, findings: &mut Vec<Finding>) -> Result<()> {
        let Some(dbias) = &self.dbias else { return Ok(()) };
        let mut sum = Sum::like(dbias);
        for slab in self.slabs(1, rows) {
            let (problem, exact, d_out) = slab?.exact()?;
            let forward = reference::forward(&problem, &exact);
            let gradients = reference::backward(&problem, &exact, &d_out);
            let bounds = Bounds::new(&problem, &exact, &d_out, &forward, precision);
            sum.add(gradients.dbiases.first().context("the oracle gave no dbias")?, &bounds.dbias);
        }
        let Sum { expected, bound } = &mut sum;
        bound.iter_mut().zip(expected).for_each(|(bound, sum)| *bound += precision.result * sum.abs());
        merge(findings, compare("dbias", &dbias.to_f64()?, &sum.expected, &sum.bound));
        Ok(())
    }
}

/// A gradient that slabs are added to, and how far it may be off.
struct Sum {
    expected: Vec<f64>,
    bound: Vec<f64>,
}

impl Sum {
    fn like(view: &TensorView<'_>) -> Self {
        let count = view.shape().iter().product();
        Self { expected: vec![0.0; count], bound: vec![0.0; count] }
    }

    fn add(&mut self, expected: &[f64], bound: &[f64]) {
        self.expected.iter_mut().zip(expected).for_each(|(sum, part)| *sum += part);
        self.bound.iter_mut().zip(bound).for_each(|(sum, part)| *sum += part);
    }
}

/// Adds to the finding of the same tensor.
fn merge(findings: &mut Vec<Finding>, finding: Finding) {
    match findings.iter_mut().find(|known| known.tensor == finding.tensor) {
        None => findings.push(finding),
        Some(known) => {
            known.values += finding.values;
            known.max_error = known.max_error.max(finding.max_error);
            known.of_tolerance = known.of_tolerance.max(finding.of_tolerance);
        }
    }
}

fn compare(tensor: &'static str, got: &[f64], expected: &[f64], bound: &[f64]) -> Finding {
    let mut finding = Finding { tensor, values: got.len(), max_error: 0.0, of_tolerance: 0.0 };
    let lengths_agree = got.len() == expected.len() && got.len() == bound.len();
    for ((got, expected), bound) in got.iter().zip(expected).zip(bound) {
        let error = (got - expected).abs();
        // A NaN is no small error.
        let (error, share) = if error.is_nan() { (f64::INFINITY, f64::INFINITY) } else { (error, error / bound) };
        finding.max_error = finding.max_error.max(error);
        // 0 / 0: exact where nothing may differ.
        finding.of_tolerance = finding.of_tolerance.max(if error == 0.0 { 0.0 } else { share });
    }
    if !lengths_agree {
        finding.of_tolerance = f64::INFINITY;
    }
    finding
}

#[cfg(test)]
mod tests {
    use tilefold::{DType, Device, Tensor, attention, attention_backward};
    use tilefold_benches::{normal, random_bools};

    use super::*;

    const SHAPE: [usize; 5] = [1, 6, 20, 2, 8];

    /// Looks at an attention after one value of a result was moved by `shift` of the result's own size.
    fn look<T>(dtype: DType, moved: &str, shift: f32, at: impl FnOnce(&AttentionProblem, &Checked<'_>) -> T) -> T {
        let tensor = |seed| normal(dtype, &SHAPE, seed).unwrap();
        let [q, k, v, gate, d_out] = [1, 2, 3, 4, 5].map(tensor);
        let bias = normal(dtype, &[1, 1, 2, 20, 20], 6).unwrap();
        let mask = random_bools(&[1, 6, 20], 7).unwrap();
        let mut inputs = Inputs::new(q.view(), k.view(), v.view());
        (inputs.gate, inputs.key_mask) = (Some(gate.view()), Some(mask.view()));
        inputs.biases.push(bias.view());
        let (device, options) = (Device::cpu().unwrap(), Options::default());
        let wanted = all_gradients(&inputs);
        let forward = attention(&device, &inputs, &options).unwrap();
        let backward = attention_backward(&device, &inputs, &options, &forward, &d_out.view(), wanted).unwrap();
        let result = |name: &str, tensor: &Tensor| {
            let mut values = tensor.to_f64().unwrap();
            if name == moved {
                // In a row, and in a head and query of the bias, that the crop holds.
                let middle = values.len() / 2;
                values[middle] += f64::from(shift) * values.iter().fold(0.0_f64, |size, value| size.max(value.abs()));
            }
            Tensor::from_f64(&values, DType::F32, tensor.shape()).unwrap()
        };
        let gradient = |name, tensor: &Option<Tensor>| result(name, tensor.as_ref().unwrap());
        let out = result("out", &forward.out);
        let [dq, dk, dv] = [("dq", &backward.dq), ("dk", &backward.dk), ("dv", &backward.dv)]
            .map(|(name, tensor)| gradient(name, tensor));
        let d_gate = gradient("dgate", &backward.d_gate);
        let dbias = gradient("dbias", &backward.dbiases[0]);
        let problem = problem(&inputs, &options, wanted).unwrap();
        let checked = Checked {
            d_out: d_out.view(),
            out: out.view(),
            dq: dq.view(),
            dk: dk.view(),
            dv: dv.view(),
            d_gate: Some(d_gate.view()),
            dbias: Some(dbias.view()),
            inputs: inputs.clone(),
        };
        at(&problem, &checked)
    }

    fn worst(dtype: DType, moved: &str, shift: f32) -> f64 {
        look(dtype, moved, shift, |problem, checked| {
            check(problem, checked).unwrap().iter().map(|finding| finding.of_tolerance).fold(0.0, f64::max)
        })
    }

    #[test]
    fn correct_results_pass_in_every_dtype() {
        for dtype in [DType::F32, DType::F16, DType::BF16] {
            let worst = worst(dtype, "nothing", 0.0);
            assert!((1e-3..1.0).contains(&worst), "{dtype}: {worst}");
        }
    }

    #[test]
    fn slabs_find_what_the_whole_finds() {
        look(DType::F32, "dk", 1e-3, |problem, checked| {
            let precision = Precision::of(problem);
            let findings = |queries, rows| {
                let mut findings = Vec::new();
                checked.slice(1, 3, 1).unwrap().compare_rows(queries, &precision, &mut findings).unwrap();
                let crop = checked.slice(3, 1, 1).unwrap().slice(2, 0, 1).unwrap();
                crop.compare_bias_gradient(rows, &precision, &mut findings).unwrap();
                findings
            };
            let whole = findings(20, 6);
            assert!(whole.iter().any(|finding| finding.tensor == "dk" && finding.of_tolerance > 1.0));
            for (queries, rows) in [(1, 1), (7, 4), (100, 100)] {
                for (slab, whole) in findings(queries, rows).iter().zip(&whole) {
                    assert_eq!((slab.tensor, slab.values), (whole.tensor, whole.values));
                    assert!((slab.max_error - whole.max_error).abs() < 1e-12, "{slab:?} {whole:?}");
                    assert!((slab.of_tolerance / whole.of_tolerance - 1.0).abs() < 1e-3, "{slab:?} {whole:?}");
                }
            }
        });
        assert_eq!([slab(8, 3, 9), slab(8, 9, 9), slab(8, 0, 5)], [2, 1, 5]);
    }

    #[test]
    fn one_wrong_value_of_any_result_fails() {
        for result in ["out", "dq", "dk", "dv", "dgate", "dbias"] {
            assert!(worst(DType::F32, result, 1e-3) > 1.0, "{result}");
            assert!(worst(DType::F32, result, f32::NAN) > 1.0, "{result}");
        }
    }
}
