//! A case on a device against the f64 oracle: every result, within the tolerance of the plain computation.

use tilefold_core::attention::reference::{self, ReferenceForward, ReferenceGradients};
use tilefold_core::{AttentionProblem, Backend, DType};

use crate::case::Case;
use crate::exchange::{self, Results};
use crate::plain::{self, Estimate};
use crate::tolerance::{self, Stored};
use crate::values::Inputs;

/// Where lse tells no more than "farther than any other", on both sides: kernels clamp finite biases of that size
/// (docs/mathematics.md, exponentials to base 2). Probabilities stay right.
const LARGEST_LSE: f64 = 5_954_088_944.0; // 2^33 ln 2

/// What a case's results must be.
#[derive(Debug)]
pub struct Expected {
    forward: ReferenceForward,
    gradients: ReferenceGradients,
    plain: Vec<Estimate>,
    /// Unit roundoff of the problem's dtype.
    unit: f64,
}

impl Expected {
    /// Runs the oracle and the plain computation on the inputs as the device gets them.
    ///
    /// # Errors
    /// A specification that is not valid.
    pub fn of(case: &Case, inputs: &Inputs) -> Result<Self, String> {
        let problem = AttentionProblem::new(case.spec.clone()).map_err(|e| e.to_string())?;
        let reference = inputs.reference(&case.spec);
        let bias_dtypes: Vec<DType> = (case.spec.biases.iter())
            .map(|bias| if case.places.f32_dbiases { DType::F32 } else { bias.dtype })
            .collect();
        let d_out = &inputs.d_out.values;
        Ok(Self {
            forward: reference::forward(&problem, &reference),
            gradients: reference::backward(&problem, &reference, d_out),
            plain: plain::compute(&problem, &reference, d_out, case.common_logits, &bias_dtypes),
            unit: case.spec.dtype.unit_roundoff(),
        })
    }

    fn tensor(&self, name: &str) -> Option<&[f64]> {
        let gradients = &self.gradients;
        match name {
            "out" => Some(&self.forward.out),
            "lse" => Some(&self.forward.lse),
            "dq" => Some(&gradients.dq),
            "dk" => Some(&gradients.dk),
            "dv" => Some(&gradients.dv),
            "d_gate" => gradients.d_gate.as_deref(),
            _ => gradients.dbiases.get(name.strip_prefix("dbias")?.parse::<usize>().ok()?).map(Vec::as_slice),
        }
    }

    /// Holds every result against the oracle; gives the largest error as a fraction of what is allowed.
    ///
    /// # Errors
    /// Every tensor that is off, with index, expected and got.
    pub fn check(&self, case: &Case, results: &Results) -> Result<f64, String> {
        self.check_parts(case, |_| 1.0, 0.0, results)
    }

    /// The same for results of `parts` over different keys: each is rounded to the dtype before it is merged or added, and so
    /// is the sum; each merge rounds lse in two parts, which is common to a row of probabilities. With `whole_rows` a query
    /// sees all of its keys at once: what is a query's is rounded once.
    ///
    /// # Errors
    /// As [`Expected::check`].
    pub(crate) fn check_sharded(
        &self,
        case: &Case,
        parts: u32,
        whole_rows: bool,
        results: &Results,
    ) -> Result<f64, String> {
        let lse = self.forward.lse.iter().map(|lse| lse.abs()).filter(|lse| lse.is_finite());
        let lse = lse.fold(0.0, f64::max).min(LARGEST_LSE);
        let common = if whole_rows { 0.0 } else { f64::from(parts) * lse * DType::F32.unit_roundoff().powi(2) };
        let roundings = |name: &str| match name {
            "out" | "lse" | "dq" | "d_gate" if whole_rows => 1.0,
            _ => 1.0 + f64::from(parts),
        };
        self.check_parts(case, roundings, common, results)
    }

    fn check_parts(
        &self,
        case: &Case,
        roundings: impl Fn(&str) -> f64,
        common: f64,
        results: &Results,
    ) -> Result<f64, String> {
        let mut checks = Vec::new();
        for (name, got) in results.iter().filter(|(name, _)| name != "lse_low") {
            let dtype = match name.strip_prefix("dbias").and_then(|i| i.parse::<usize>().ok()) {
                Some(i) if !case.places.f32_dbiases => case.spec.biases[i].dtype,
                Some(_) => DType::F32,
                None if name == "lse" => DType::F32,
                None => case.spec.dtype,
            };
            let common = if name == "lse" { 0.0 } else { common };
            let stored = Stored { roundings: roundings(name), common, ..dtype.into() };
            checks.push(self.check_tensor(name, name, &got.values, stored));
        }
        let find = |wanted: &str| results.iter().find(|(name, _)| name == wanted).map(|(_, got)| &got.values);
        if let (Some(lse), Some(low)) = (find("lse"), find("lse_low")) {
            checks.push(self.check_lse_low(lse, low));
        }
        all(checks)
    }

    /// Holds `out`, `lse` and `lse_low` merged from parts against the oracle; `roundings` is how often a part or the
    /// sum was rounded to its dtype on the way.
    ///
    /// # Errors
    /// As [`Expected::check`].
    pub(crate) fn check_merged(&self, accumulator: DType, roundings: f64, results: &Results) -> Result<f64, String> {
        let tensors: Vec<&[f64]> = results.iter().map(|(_, got)| got.values.as_slice()).collect();
        let [out, lse, low] = tensors[..] else { return Err("a merge gives out, lse and lse_low".to_owned()) };
        let stored = Stored { unit: self.unit.max(accumulator.unit_roundoff()), roundings, ..accumulator.into() };
        all(vec![
            self.check_tensor("out", "out", out, stored),
            self.check_tensor("lse", "lse", lse, DType::F32.into()),
            self.check_lse_low(lse, low),
        ])
    }

    fn check_tensor(&self, title: &str, name: &str, got: &[f64], stored: Stored) -> Result<f64, String> {
        let expected = self.tensor(name).ok_or_else(|| format!("{name}: the oracle has no such result"))?;
        let plain = self.plain.iter().find(|estimate| estimate.name == name);
        let plain = plain.ok_or_else(|| format!("{name}: the plain computation has no such result"))?;
        if name != "lse" {
            return tolerance::check(title, got, expected, plain, stored);
        }
        let clamp = |lse: &[f64]| -> Vec<f64> {
            lse.iter()
                .map(|&lse| if lse > f64::NEG_INFINITY { lse.clamp(-LARGEST_LSE, LARGEST_LSE) } else { lse })
                .collect()
        };
        let plain = Estimate { values: clamp(&plain.values), ..plain.clone() };
        tolerance::check(title, &clamp(got), &clamp(expected), &plain, stored)
    }

    /// lse_low is what rounding took from lse: small beside it, and together they carry more than f32 does.
    fn check_lse_low(&self, lse: &[f64], low: &[f64]) -> Result<f64, String> {
        let too_large = |(lse, low): (&f64, &f64)| {
            lse.is_finite() && low.abs() > 2.0 * DType::F32.unit_roundoff() * lse.abs() + f64::from(f32::MIN_POSITIVE)
        };
        if let Some(index) = lse.iter().zip(low).position(too_large) {
            let (lse, low) = (lse[index], low[index]);
            return Err(format!("lse_low[{index}]: expected what f32 rounding took from lse = {lse:e}, got {low:e}"));
        }
        if let Some(index) = lse.iter().zip(low).position(|(lse, low)| lse.is_infinite() && *low != 0.0) {
            return Err(format!("lse_low[{index}]: expected 0 for an empty row, got {:e}", low[index]));
        }
        let sum: Vec<f64> = lse.iter().zip(low).map(|(lse, low)| lse + low).collect();
        self.check_tensor("lse + lse_low", "lse", &sum, Stored { unit: 2_f64.powi(-46), ..DType::F32.into() })
    }
}

/// The largest ratio, or every message: which results are off together tells a lot about the cause.
fn all(checks: Vec<Result<f64, String>>) -> Result<f64, String> {
    let messages: Vec<String> = checks.iter().filter_map(|check| check.clone().err()).collect();
    if messages.is_empty() {
        return Ok(checks.into_iter().flatten().fold(0.0, f64::max));
    }
    Err(messages.join("; "))
}

/// Runs a case and holds it against the oracle; gives the largest error as a fraction of what is allowed.
///
/// # Errors
/// Case, seed, tensor, index, expected and got; or what the device reports.
pub fn check_case(device: &dyn Backend, case: &Case) -> Result<f64, String> {
    let check = || {
        reserve(case)?;
        let inputs = Inputs::draw(case);
        let results = exchange::run(device, case, &inputs)?;
        Expected::of(case, &inputs)?.check(case, &results)
    };
    check().map_err(|message| format!("{}, seed {:#x}: {message}", case.title(), case.seed))
}

/// Numbers of 8 bytes that the suite holds for one element of an operand and of its gradient: values, bytes on both
/// sides, oracle, plain computation, results.
const NUMBERS_PER_ELEMENT: usize = 12;

/// Tries whether the memory that inputs, oracle and results of a case take can be had, all at once: what fails here is
/// this trial, while an allocation that fails in the middle of one ends the process and loses every other's result.
fn reserve(case: &Case) -> Result<(), String> {
    let s = &case.spec;
    let width = s.head_dim + s.head_dim_v;
    let product = |sizes: [usize; 5]| sizes.into_iter().try_fold(1, usize::checked_mul);
    let operands = [[s.seqlen_q, s.heads], [s.seqlen_k, s.kv_heads]];
    let operands = operands.map(|[seqlen, heads]| product([s.batch, s.rows, seqlen, heads, width])).into_iter();
    let biases = s.biases.iter().map(|bias| product(bias.shape));
    let elements = operands.chain(biases).try_fold(0_usize, |sum, size| sum.checked_add(size?));
    let numbers = elements.and_then(|elements| elements.checked_mul(NUMBERS_PER_ELEMENT));
    let numbers = numbers.ok_or("the sizes of inputs and results overflow")?;
    let reserved = Vec::<f64>::new().try_reserve_exact(numbers);
    reserved.map_err(|_| format!("no memory for {numbers} numbers of 8 bytes: inputs, oracle and results"))
}

#[cfg(test)]
mod tests {
    use tilefold::CpuBackend;
    use tilefold_core::AttentionSpec;

    use super::*;

    #[test]
    fn memory_that_cannot_be_had_fails_one_trial() {
        let spec = AttentionSpec::new(DType::F32, 1 << 20, 1, 1 << 20, 1, 16).with_all_gradients();
        let message = check_case(&CpuBackend::new().unwrap(), &Case::new("outer", "too_much", spec)).unwrap_err();
        assert!(message.contains("no memory for") && message.contains("outer/too_much"), "{message}");
    }
}
