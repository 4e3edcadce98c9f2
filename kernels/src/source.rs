//! From source files to one self-contained text: includes inlined, constants in front, and its hash.

use sha2::{Digest, Sha256};

/// Every source file, by the path that `#include` lines use.
const FILES: &[(&str, &str)] = &[
    ("include/gpu.h", include_str!("../include/gpu.h")),
    ("include/gpu_cuda.h", include_str!("../include/gpu_cuda.h")),
    ("include/gpu_hip.h", include_str!("../include/gpu_hip.h")),
    ("include/params.h", include_str!("../include/params.h")),
    ("include/axes.cuh", include_str!("../include/axes.cuh")),
    ("include/mma.cuh", include_str!("../include/mma.cuh")),
    ("include/mma_hip.cuh", include_str!("../include/mma_hip.cuh")),
    ("include/rows.cuh", include_str!("../include/rows.cuh")),
    ("include/tile_hip.cuh", include_str!("../include/tile_hip.cuh")),
    ("include/products_hip.cuh", include_str!("../include/products_hip.cuh")),
    ("include/tile.cuh", include_str!("../include/tile.cuh")),
    ("include/products.cuh", include_str!("../include/products.cuh")),
    ("include/products_cuda.cuh", include_str!("../include/products_cuda.cuh")),
    ("include/attention.cuh", include_str!("../include/attention.cuh")),
    ("include/walk.cuh", include_str!("../include/walk.cuh")),
    ("include/fragment.cuh", include_str!("../include/fragment.cuh")),
    ("include/stage.cuh", include_str!("../include/stage.cuh")),
    ("include/backward.cuh", include_str!("../include/backward.cuh")),
    ("include/key_products.cuh", include_str!("../include/key_products.cuh")),
    ("include/key_products_cuda.cuh", include_str!("../include/key_products_cuda.cuh")),
    ("include/lds_hip.cuh", include_str!("../include/lds_hip.cuh")),
    ("include/key_products_hip.cuh", include_str!("../include/key_products_hip.cuh")),
    ("include/key_logits.cuh", include_str!("../include/key_logits.cuh")),
    ("include/query_products.cuh", include_str!("../include/query_products.cuh")),
    ("include/query_products_cuda.cuh", include_str!("../include/query_products_cuda.cuh")),
    ("include/query_products_hip.cuh", include_str!("../include/query_products_hip.cuh")),
    ("include/query_logits.cuh", include_str!("../include/query_logits.cuh")),
    ("attention/forward.cu", include_str!("../attention/forward.cu")),
    ("fill.cu", include_str!("../fill.cu")),
    ("attention/backward_prepare.cu", include_str!("../attention/backward_prepare.cu")),
    ("attention/backward_uniform.cu", include_str!("../attention/backward_uniform.cu")),
    ("attention/backward_keys.cu", include_str!("../attention/backward_keys.cu")),
    ("attention/backward_bias.cu", include_str!("../attention/backward_bias.cu")),
    ("attention/backward_queries.cu", include_str!("../attention/backward_queries.cu")),
    ("attention/sums.cu", include_str!("../attention/sums.cu")),
    ("merge.cu", include_str!("../merge.cu")),
    ("relayout.cu", include_str!("../relayout.cu")),
    ("accumulate.cu", include_str!("../accumulate.cu")),
    ("rope.cu", include_str!("../rope.cu")),
];

/// A compile-time constant of a kernel: `#define NAME value` in front of its source.
pub type Constant = (String, String);

/// One self-contained text for a run-time compiler.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Source {
    /// The text.
    pub text: String,
    /// SHA-256 of the text, in hexadecimal digits.
    pub hash: String,
}

impl Source {
    /// The source of a kernel file with constants in front. `None` when there is no such file, or it includes a file
    /// that is not there: the crate's tests say that neither happens.
    ///
    /// Includes are found by the last part of their path and inlined once each, where they are first named.
    #[must_use]
    pub fn new(file: &str, constants: &[Constant]) -> Option<Self> {
        let mut text = String::new();
        for (name, value) in constants {
            text.extend(["#define ", name, " ", value, "\n"]);
        }
        inline(file, &mut Vec::new(), &mut text)?;
        let digest = Sha256::digest(text.as_bytes());
        let hash = digest.iter().map(|byte| format!("{byte:02x}")).collect();
        Some(Self { text, hash })
    }
}

/// Paths of the files that hold kernels.
pub fn kernel_files() -> impl Iterator<Item = &'static str> {
    FILES.iter().map(|(path, _)| *path).filter(|path| path.ends_with(".cu"))
}

fn file_name(path: &str) -> &str {
    path.rsplit('/').next().unwrap_or(path)
}

fn inline(file: &str, seen: &mut Vec<&'static str>, text: &mut String) -> Option<()> {
    let &(path, content) = FILES.iter().find(|(path, _)| file_name(path) == file_name(file))?;
    if seen.contains(&path) {
        return Some(());
    }
    seen.push(path);
    for line in content.lines() {
        match line.strip_prefix("#include \"") {
            Some(rest) => inline(rest.trim_end().trim_end_matches('"'), seen, text)?,
            None if line.starts_with("#pragma once") => {}
            None => text.extend([line, "\n"]),
        }
    }
    Some(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_kernel_file_becomes_one_text_without_includes() {
        for file in kernel_files() {
            let source = Source::new(file, &[]).unwrap();
            assert!(!source.text.contains("#include"), "{file}");
            assert_eq!(source.text.matches("typedef unsigned char u8;").count(), 1, "{file}");
        }
    }

    #[test]
    fn names_of_files_are_unique() {
        let mut names: Vec<_> = FILES.iter().map(|(path, _)| file_name(path)).collect();
        names.sort_unstable();
        names.dedup();
        assert_eq!(names.len(), FILES.len());
    }

    #[test]
    fn constants_change_the_hash() {
        let one = |value: &str| Source::new("fill.cu", &[("ELEMENT_BYTES".into(), value.into())]).unwrap();
        assert!(one("2").text.starts_with("#define ELEMENT_BYTES 2\n"));
        assert_ne!(one("2").hash, one("4").hash);
        assert_eq!(one("2"), one("2"));
        assert_eq!(one("2").hash.len(), 64);
        assert!(Source::new("missing.cu", &[]).is_none());
    }
}
