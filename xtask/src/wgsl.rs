//! Every shader of the wgpu backend through a second compiler: Tint, which browsers have.

use std::fs;
use std::path::Path;

use anyhow::{Context, Result, ensure};
use tilefold_kernels::wgsl::{OperandKey, Use};

use crate::command::{run, succeeds};
use crate::report::Count;
use crate::setup;

/// The npm package that has Dawn, and Tint in it.
const PACKAGE: &str = "webgpu@0.6.2";

/// Inputs that never lie in a buffer that is written, for they are not of floats; barriers depend on them.
const UNSHARED: [&str; 2] = ["key_mask", "kv_lengths"];

/// What Tint asks of a shader with subgroups, and the compiler of wgpu does not know.
const ENABLE: &str = "enable subgroups;\n";

/// Writes the shaders below `target/`, and compiles them.
pub(crate) fn check() -> Result<Count> {
    setup::programs(&[("node", "nodejs"), ("npm", "npm")])?;
    let home = Path::new("target").join("tint");
    let (shaders, modules) = (home.join("shaders"), home.join("node_modules").join("webgpu"));
    if shaders.exists() {
        fs::remove_dir_all(&shaders).with_context(|| format!("cannot remove {}", shaders.display()))?;
    }
    fs::create_dir_all(&shaders).with_context(|| format!("cannot make {}", shaders.display()))?;
    let text = |path: &Path| path.to_str().map(str::to_owned).context("a path that is no text");
    if !modules.exists() {
        ensure!(succeeds(&["npm", "--version"]), "npm is missing");
        run(&[], &["npm", "install", "--silent", "--no-audit", "--no-fund", "--prefix", &text(&home)?, PACKAGE])?;
    }
    let catalogue = tilefold_kernels::wgsl::catalogue()?;
    let mut count = 0;
    for (number, dispatch) in catalogue.iter().enumerate() {
        let shader = &dispatch.shader;
        let enable = if shader.has_subgroups() { ENABLE } else { "" };
        let mut write = |name: &str, source: &str| {
            let file = shaders.join(format!("{number:04}-{}{name}.wgsl", shader.file.name()));
            count += 1;
            fs::write(&file, format!("{enable}{source}")).with_context(|| format!("cannot write {}", file.display()))
        };
        // Inputs in buffers of their own; or all others in one that is written too.
        let is_apart = |operand: &&OperandKey| operand.usage != Use::Absent && UNSHARED.contains(&operand.name);
        let written = shader.operands.iter().filter(is_apart).fold(u32::MAX, |written, one| written & !(1 << one.slot));
        let [apart, shared] = [0, written].map(|written| shader.source(written));
        write("", &apart)?;
        if shared != apart {
            write("-shared", &shared)?;
        }
    }
    println!("{count} shaders in {}", shaders.display());
    run(&[], &["node", "xtask/src/tint.mjs", &text(&modules)?, &text(&shaders)?])
}
