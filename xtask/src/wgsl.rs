//! Every shader of the wgpu backend through a second compiler: Tint, which browsers have.

use std::fs;
use std::path::Path;

use anyhow::{Context, Result, ensure};

use crate::command::{run, succeeds};
use crate::report::Count;
use crate::setup;

/// The npm package that has Dawn, and Tint in it.
const PACKAGE: &str = "webgpu@0.6.2";

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
    let count = u32::try_from(catalogue.len())?;
    for (number, dispatch) in catalogue.iter().enumerate() {
        let shader = &dispatch.shader;
        let enable = if shader.has_subgroups() { ENABLE } else { "" };
        let file = shaders.join(format!("{number:04}-{}.wgsl", shader.file.name()));
        fs::write(&file, format!("{enable}{}", shader.source(0)))
            .with_context(|| format!("cannot write {}", file.display()))?;
    }
    println!("{count} shaders in {}", shaders.display());
    run(&[], &["node", "xtask/src/tint.mjs", &text(&modules)?, &text(&shaders)?])
}
