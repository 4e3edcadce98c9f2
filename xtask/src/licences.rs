//! Every dependency has a licence that `deny.toml` allows, and comes from a registry or this workspace.

use std::collections::BTreeSet;
use std::fs;

use anyhow::{Context, Result, ensure};
use serde::Deserialize;

use crate::command::output;
use crate::report::Count;

#[derive(Deserialize)]
struct Deny {
    licenses: Licenses,
}

#[derive(Deserialize)]
struct Licenses {
    allow: BTreeSet<String>,
}

#[derive(Deserialize)]
struct Metadata {
    packages: Vec<Package>,
}

#[derive(Deserialize)]
struct Package {
    name: String,
    version: String,
    license: Option<String>,
    source: Option<String>,
}

/// Checks all packages of the lock file, whatever the target and the features.
pub(crate) fn check() -> Result<Count> {
    let text = fs::read_to_string("deny.toml").context("cannot read deny.toml")?;
    let deny: Deny = toml::from_str(&text).context("deny.toml")?;
    let metadata = output(&["cargo", "metadata", "--format-version", "1", "--all-features"])?;
    let metadata: Metadata = serde_json::from_slice(&metadata).context("cannot read what cargo metadata prints")?;
    let wrong: Vec<String> =
        metadata.packages.iter().filter_map(|package| complaint(package, &deny.licenses.allow)).collect();
    ensure!(wrong.is_empty(), "{}\nallow the licence in deny.toml, or do without the package", wrong.join("\n"));
    println!("{} packages", metadata.packages.len());
    Ok(Count::one())
}

fn complaint(package: &Package, allowed: &BTreeSet<String>) -> Option<String> {
    let Package { name, version, license, source } = package;
    let from_registry = source.as_ref().is_none_or(|source| source.starts_with("registry+"));
    if !from_registry {
        return Some(format!("{name} {version} does not come from a registry"));
    }
    match license {
        None => Some(format!("{name} {version} names no licence")),
        Some(license) if !allows(license, allowed) => Some(format!("{name} {version}: {license} is not allowed")),
        Some(_) => None,
    }
}

/// Whether an SPDX expression can be satisfied: any part of an OR, every part of an AND.
fn allows(expression: &str, allowed: &BTreeSet<String>) -> bool {
    // The old spelling of OR.
    let expression = expression.replace('/', " OR ").replace('(', " ( ").replace(')', " ) ");
    let words: Vec<&str> = expression.split_whitespace().collect();
    let mut rest = words.as_slice();
    any_of(&mut rest, allowed) && rest.is_empty()
}

fn any_of(words: &mut &[&str], allowed: &BTreeSet<String>) -> bool {
    let mut fits = all_of(words, allowed);
    while let Some((&"OR", rest)) = words.split_first() {
        *words = rest;
        fits |= all_of(words, allowed);
    }
    fits
}

fn all_of(words: &mut &[&str], allowed: &BTreeSet<String>) -> bool {
    let mut fits = licence(words, allowed);
    while let Some((&"AND", rest)) = words.split_first() {
        *words = rest;
        fits &= licence(words, allowed);
    }
    fits
}

fn licence(words: &mut &[&str], allowed: &BTreeSet<String>) -> bool {
    match *words {
        ["(", rest @ ..] => {
            *words = rest;
            let fits = any_of(words, allowed);
            let closed = words.first() == Some(&")");
            *words = words.get(1..).unwrap_or_default();
            fits && closed
        }
        [name, "WITH", exception, rest @ ..] => {
            *words = rest;
            allowed.contains(&format!("{name} WITH {exception}"))
        }
        [name, rest @ ..] => {
            *words = rest;
            allowed.contains(*name)
        }
        [] => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn expressions_are_understood() {
        let allowed: BTreeSet<String> =
            ["MIT", "Apache-2.0", "Unicode-3.0", "Apache-2.0 WITH LLVM-exception"].map(String::from).into();
        for (expression, expected) in [
            ("MIT", true),
            ("GPL-3.0", false),
            ("MIT OR GPL-3.0", true),
            ("MIT/Apache-2.0", true),
            ("MIT AND GPL-3.0", false),
            ("(MIT OR Apache-2.0) AND Unicode-3.0", true),
            ("(MIT OR Apache-2.0) AND GPL-3.0", false),
            ("Apache-2.0 WITH LLVM-exception OR GPL-3.0", true),
            ("MIT WITH LLVM-exception", false),
            ("(MIT", false),
            ("MIT MIT", false),
            ("", false),
        ] {
            assert_eq!(allows(expression, &allowed), expected, "{expression}");
        }
    }
}
