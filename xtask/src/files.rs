//! Rules about files that no compiler knows: length, stubs, tests that are switched off.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};

use crate::report::Count;

/// Lines a source file may have; it is split above that.
const MAX_LINES: usize = 800;
/// What a source file is called.
const SOURCES: [&str; 9] = ["rs", "py", "sh", "cu", "cuh", "h", "c", "wgsl", "md"];
/// Words that leave something undone; put together here so that this file does not hold them.
const STUBS: [&str; 3] = [concat!("todo", "!("), concat!("unimplemented", "!("), concat!("#[", "ignore")];

/// Checks every source file of the workspace.
pub(crate) fn check() -> Result<Count> {
    let mut files = Vec::new();
    collect(Path::new("."), &mut files)?;
    let mut wrong = Vec::new();
    for file in &files {
        let text = fs::read_to_string(file).with_context(|| format!("cannot read {}", file.display()))?;
        wrong.extend(complaints(&text).into_iter().map(|complaint| format!("{}: {complaint}", file.display())));
    }
    ensure!(wrong.is_empty(), "{}", wrong.join("\n"));
    println!("{} files", files.len());
    Ok(Count::one())
}

fn complaints(text: &str) -> Vec<String> {
    let mut wrong = Vec::new();
    let lines = text.lines().count();
    if lines > MAX_LINES {
        wrong.push(format!("{lines} lines; split it, {MAX_LINES} are allowed"));
    }
    for (number, line) in text.lines().enumerate() {
        if let Some(stub) = STUBS.iter().find(|stub| line.contains(*stub)) {
            wrong.push(format!("line {}: `{stub}` leaves something undone", number + 1));
        }
    }
    wrong
}

/// Source files below a folder, without hidden folders and build output.
fn collect(folder: &Path, files: &mut Vec<PathBuf>) -> Result<()> {
    let entries = fs::read_dir(folder).with_context(|| format!("cannot list {}", folder.display()))?;
    for entry in entries {
        let entry = entry.with_context(|| format!("cannot list {}", folder.display()))?;
        let (path, name) = (entry.path(), entry.file_name());
        let hidden = name.to_string_lossy().starts_with('.');
        if entry.file_type()?.is_dir() {
            if !hidden && name != "target" {
                collect(&path, files)?;
            }
        } else if path.extension().is_some_and(|extension| SOURCES.iter().any(|known| extension == *known)) {
            files.push(path);
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn long_files_and_stubs_are_found() {
        assert!(complaints("fn main() {}\n").is_empty());
        assert_eq!(complaints(&"x\n".repeat(MAX_LINES)).len(), 0);
        assert_eq!(complaints(&"x\n".repeat(MAX_LINES + 1)).len(), 1);
        let text = format!("fn a() {{ {}) }}\n{}]\n", STUBS[0], STUBS[2]);
        let wrong = complaints(&text);
        assert!(wrong.len() == 2 && wrong[1].starts_with("line 2: "), "{wrong:?}");
    }
}
