//! Tests that need a device: without one they are ignored, with the reason, unless `TILEFOLD_REQUIRE` names `wgpu`.

use std::process::ExitCode;

use libtest_mimic::{Arguments, Completion, Trial};
use tilefold_backend_wgpu::WgpuBackend;
use tilefold_core::OpenError;

pub(crate) type Test = (&'static str, fn());

pub(crate) fn run(tests: &[Test]) -> ExitCode {
    let arguments = Arguments::from_args();
    let trials = tests.iter().map(|&(name, test)| {
        Trial::ignorable_test(name, move || match missing()? {
            Some(reason) => {
                println!("\nskipped {name}: {reason}");
                Ok(Completion::ignored_with(reason))
            }
            None => {
                test();
                Ok(Completion::Completed)
            }
        })
    });
    libtest_mimic::run(&arguments, trials.collect()).exit_code()
}

/// Why there is no device, where that is allowed.
fn missing() -> Result<Option<String>, String> {
    let Err(error @ OpenError::NoDriver { .. }) = WgpuBackend::new(0) else { return Ok(None) };
    let required = std::env::var("TILEFOLD_REQUIRE").unwrap_or_default();
    if required.split(',').any(|name| name.trim() == "wgpu") {
        Err(error.to_string())
    } else {
        Ok(Some(error.to_string()))
    }
}
