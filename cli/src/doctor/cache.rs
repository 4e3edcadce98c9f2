//! Sizes of the processor's caches, where the system tells them (Linux).

use std::fs;
use std::path::Path;

use serde::Serialize;

/// One cache the first core uses.
#[derive(Debug, PartialEq, Eq, Serialize)]
pub(super) struct Cache {
    /// 1 is nearest to the core.
    pub(super) level: u32,
    /// `data`, `instruction` or `unified`.
    pub(super) kind: String,
    /// Its size.
    pub(super) bytes: u64,
}

/// Caches of the first core; empty where the system does not tell.
pub(super) fn of_first_core() -> Vec<Cache> {
    let Ok(entries) = fs::read_dir("/sys/devices/system/cpu/cpu0/cache") else { return Vec::new() };
    let mut caches: Vec<_> = entries.flatten().filter_map(|entry| read(&entry.path())).collect();
    caches.sort_by(|a, b| (a.level, &a.kind).cmp(&(b.level, &b.kind)));
    caches
}

fn read(folder: &Path) -> Option<Cache> {
    let field = |name: &str| Some(fs::read_to_string(folder.join(name)).ok()?.trim().to_owned());
    let bytes = size_bytes(&field("size")?)?;
    Some(Cache { level: field("level")?.parse().ok()?, kind: field("type")?.to_lowercase(), bytes })
}

/// `1024K` or `32M`.
fn size_bytes(text: &str) -> Option<u64> {
    let (number, factor) = match text.strip_suffix('K') {
        Some(number) => (number, 1 << 10),
        None => (text.strip_suffix('M')?, 1 << 20),
    };
    number.parse::<u64>().ok()?.checked_mul(factor)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_have_a_binary_unit() {
        assert_eq!(size_bytes("1024K"), Some(1 << 20));
        assert_eq!(size_bytes("32M"), Some(32 << 20));
        assert_eq!(size_bytes("x"), None);
    }
}
