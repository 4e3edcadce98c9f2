//! Attention on a virtual device: small cases of the conformance table against the f64 oracle.
//!
//! The kernels have tests of their own over more of the table; these hold the way from operands to a launch.

use tilefold_backend_cuda::CudaBackend;
use tilefold_conformance::case::Case;
use tilefold_conformance::{cases, oracle};
use tilefold_core::{AttentionProblem, DType};

pub(crate) const TESTS: &[(&str, fn())] = &[("attention_agrees_with_the_oracle", attention)];

/// Logits a case may have: the interpreter takes milliseconds for a thousand.
const MOST_LOGITS: f64 = 40_000.0;

/// One case of each group.
fn small(dtype: DType) -> Vec<Case> {
    let logits = |case: &Case| AttentionProblem::new(case.spec.clone()).unwrap().logits();
    let mut cases: Vec<_> = cases::all(dtype, &[64]).into_iter().filter(|case| logits(case) <= MOST_LOGITS).collect();
    cases.dedup_by_key(|case| case.group);
    cases
}

fn attention() {
    let device = CudaBackend::new(0).unwrap();
    for dtype in [DType::F32, DType::BF16] {
        let cases = small(dtype);
        // Both lists that are uploaded with a launch are among them.
        assert!(cases.iter().any(|case| case.spec.kv_lengths.is_some()), "{dtype}");
        assert!(cases.iter().any(|case| case.spec.mask.alibi_slopes.is_some()), "{dtype}");
        assert!(cases.iter().any(|case| case.spec.gradients.biases.contains(&true)), "{dtype}");
        let failures: Vec<_> = cases.iter().filter_map(|case| oracle::check_case(&device, case).err()).collect();
        assert!(failures.is_empty(), "{} of {} cases: {}", failures.len(), cases.len(), failures.join("\n"));
    }
}
