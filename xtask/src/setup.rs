//! Tools the checks need, installed where they are missing.

use anyhow::{Result, ensure};

use crate::command::{run, succeeds};
use crate::report::Count;

/// Adds rustfmt and clippy to the toolchain when it lacks them.
pub(crate) fn toolchain() -> Result<Count> {
    for (component, probe) in [("rustfmt", "fmt"), ("clippy", "clippy")] {
        if succeeds(&["cargo", probe, "--version"]) {
            println!("{component} is there");
            continue;
        }
        ensure!(succeeds(&["rustup", "--version"]), "{component} is missing, and there is no rustup to add it with");
        println!("{component} is missing: adding it");
        run(&[], &["rustup", "component", "add", component])?;
    }
    Ok(Count::one())
}

/// Installs Debian packages whose programs are missing, as root or with sudo.
pub(crate) fn programs(wanted: &[(&str, &str)]) -> Result<Count> {
    let missing = wanted.iter().filter(|(program, _)| !succeeds(&[program, "--version"]));
    let packages: Vec<&str> = missing.map(|&(_, package)| package).collect();
    self::packages(&packages)
}

/// Installs Debian packages, as root or with sudo.
pub(crate) fn packages(packages: &[&str]) -> Result<Count> {
    if packages.is_empty() {
        return Ok(Count::one());
    }
    println!("installing {}", packages.join(" "));
    ensure!(
        succeeds(&["apt-get", "--version"]),
        "{} missing, and there is no apt-get to add them with",
        packages.join(", ")
    );
    let root = succeeds(&["sh", "-c", "test $(id -u) = 0"]);
    let apt: &[&str] = if root { &["apt-get"] } else { &["sudo", "apt-get"] };
    run(&[], &[apt, &["update"]].concat())?;
    run(&[], &[apt, &["install", "--yes", "--no-install-recommends"], packages].concat())
}
