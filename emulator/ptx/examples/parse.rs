//! Parses PTX files and says what is in them, or why not.

#![allow(clippy::print_stdout, reason = "a program for the terminal")]

use std::process::ExitCode;

use tilefold_emulator_ptx::Module;

fn main() -> ExitCode {
    let mut failed = false;
    for path in std::env::args().skip(1) {
        match std::fs::read_to_string(&path).map(|text| Module::parse(&text)) {
            Ok(Ok(module)) => {
                let names: Vec<&str> = module.kernels().iter().map(|kernel| kernel.name.as_str()).collect();
                println!("{path}: {}", names.join(", "));
            }
            Ok(Err(error)) => {
                failed = true;
                println!("{path}: {error}");
            }
            Err(error) => {
                failed = true;
                println!("{path}: {error}");
            }
        }
    }
    if failed { ExitCode::FAILURE } else { ExitCode::SUCCESS }
}
