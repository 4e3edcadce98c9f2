//! The backward kernels, compiled by NVRTC and executed by the PTX interpreter, against the f64 oracle: cases of the
//! conformance suite, run on a device whose forward pass is the CPU's.
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test fails by panicking")]

#[path = "backward/device.rs"]
mod device;

use device::EmulatedBackward;
use libtest_mimic::{Arguments, Trial};
use tilefold_conformance::case::{Case, DTYPES};
use tilefold_conformance::{cases, oracle};

/// Logits times channels that one case may have: the interpreter is not fast.
const MOST_WORK: usize = 8 << 20;

/// Tile lengths around which lengths are tried.
const TILES: [usize; 2] = [32, 128];

fn work(case: &Case) -> usize {
    let s = &case.spec;
    [s.batch, s.rows, s.heads, s.seqlen_q, s.seqlen_k, s.head_dim + s.head_dim_v].iter().product()
}

fn main() {
    let arguments = Arguments::from_args();
    let mut trials = Vec::new();
    for dtype in DTYPES {
        for mut case in cases::all(dtype, &TILES) {
            let g = case.spec.gradients;
            if !(g.q || g.k || g.v || g.gate || g.biases.contains(&true)) {
                case.spec = case.spec.with_all_gradients();
            }
            if work(&case) > MOST_WORK {
                continue;
            }
            trials.push(Trial::test(case.title(), move || {
                let device = EmulatedBackward::shared()?;
                oracle::check_case(device, &case).map(|_| ()).map_err(Into::into)
            }));
        }
    }
    libtest_mimic::run(&arguments, trials).exit();
}
