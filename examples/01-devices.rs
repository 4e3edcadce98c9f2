//! Which devices there are, and how to choose one.
//!
//! A `Device` is one piece of hardware behind one contract: what follows in the other examples runs unchanged on each.
//! `Device::all` lists every kind this crate knows and, for one that cannot be used, why: not compiled in, no driver, no
//! such device. `Device::open` takes a name, `Device::best` the fastest that opens, or the one that the environment variable
//! TILEFOLD_DEVICE names. A wrong name is an error, never silently another device.
//!
//! On the CPU the instruction set is chosen when the device is opened; TILEFOLD_CPU_ARCH names another one, which is how
//! tests and benchmarks cover all that a machine has.
//!
//! Run it with `cargo run --release --example 01-devices`.
#![allow(clippy::print_stdout, reason = "an example shows its results")]

use tilefold::{Arch, Backend, Device};

fn main() -> anyhow::Result<()> {
    println!("devices");
    for found in Device::all() {
        match found.device {
            Ok(device) => println!("  {:<6} {}", found.name, describe(&device)),
            Err(why) => println!("  {:<6} off: {why}", found.name),
        }
    }

    let best = Device::best()?;
    println!("best: {}", best.info().id);

    let archs: Vec<&str> = Arch::available().into_iter().map(Arch::name).collect();
    println!("instruction sets of this processor: {}", archs.join(", "));

    // A name that does not exist says which names do.
    if let Err(error) = Device::open("abacus") {
        println!("abacus: {error}");
    }
    Ok(())
}

fn describe(device: &Device) -> String {
    let info = device.info();
    // 0 where the driver does not tell.
    let known = |number: u64| if number > 0 { number.to_string() } else { "unknown".to_owned() };
    let (workers, gib) = (known(info.parallelism as u64), known(info.memory_bytes >> 30));
    let dtypes: Vec<String> = info.dtypes.iter().map(ToString::to_string).collect();
    format!("{} ({}, {workers} workers, {gib} GiB), {}", info.name, info.arch, dtypes.join(" "))
}
