//! Runs the test kernel on many blocks and prints thread-instructions a second.

#![allow(clippy::print_stdout, reason = "a program for the terminal")]

use std::error::Error;
use std::time::Instant;

use tilefold_emulator_ptx::{Launch, Memory, Module, run};

const LENGTH: u32 = 2048;

fn main() -> Result<(), Box<dyn Error>> {
    let module = Module::parse(include_str!("../tests/attention.ptx"))?;
    let kernel = module.kernel("attention").ok_or("no such kernel")?;
    let memory = Memory::new(1 << 30);
    let filled = |bytes: u64, value: u32| -> Result<u64, Box<dyn Error>> {
        let address = memory.allocate(bytes)?;
        memory.fill32(address, value, bytes / 4)?;
        Ok(address)
    };
    let bytes = u64::from(LENGTH) * 32;
    let one = 0x3F80_3F80;
    let bias = filled(u64::from(LENGTH) * u64::from(LENGTH) * 4, 0)?;
    let addresses = [filled(bytes, one)?, filled(bytes, one)?, filled(bytes, one)?, bias, memory.allocate(bytes)?];
    let mut parameters = addresses.map(u64::to_le_bytes).concat();
    parameters.extend(LENGTH.to_le_bytes());
    parameters.extend(0.25f32.to_le_bytes());
    let launch = Launch {
        kernel,
        module: &module,
        grid: [LENGTH / 32, 1, 1],
        block: [64, 1, 1],
        dynamic_shared_bytes: 0,
        parameters: &parameters,
    };
    let start = Instant::now();
    let statistics = run(&memory, &launch)?;
    let seconds = start.elapsed().as_secs_f64();
    let threads = std::thread::available_parallelism()?;
    let rate = statistics.thread_instructions as f64 / seconds / 1e6;
    println!(
        "{} blocks, {:.1} million thread-instructions in {seconds:.2} s on at most {threads} threads: {rate:.0} million a second",
        statistics.blocks,
        statistics.thread_instructions as f64 / 1e6
    );
    Ok(())
}
