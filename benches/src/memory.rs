//! Resident memory of this process, where the system tells it (Linux).

use std::fs;

/// Bytes of memory this process holds now; `None` where the system does not tell.
#[must_use]
pub fn rss_bytes() -> Option<u64> {
    status("VmRSS:")
}

/// Most bytes this process held since its start or since [`reset_peak_rss`]; `None` where the system does not tell.
#[must_use]
pub fn peak_rss_bytes() -> Option<u64> {
    status("VmHWM:")
}

/// Starts a new measurement of the peak; false where the system does not allow it.
#[must_use]
pub fn reset_peak_rss() -> bool {
    fs::write("/proc/self/clear_refs", "5").is_ok()
}

/// A line of `/proc/self/status` such as `VmHWM:     1234 kB`, in bytes.
fn status(field: &str) -> Option<u64> {
    let status = fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find_map(|line| line.strip_prefix(field))?;
    line.trim().strip_suffix("kB")?.trim().parse::<u64>().ok()?.checked_mul(1024)
}

#[cfg(all(test, target_os = "linux"))]
mod tests {
    use super::*;

    #[test]
    fn the_peak_follows_an_allocation() {
        const BYTES: usize = 64 << 20;
        let before = rss_bytes().unwrap();
        let block = vec![1_u8; BYTES];
        assert!(block.iter().step_by(4096).all(|&byte| byte == 1));
        drop(block);
        assert!(peak_rss_bytes().unwrap() >= before.max(1 << 20));
        assert!(peak_rss_bytes().unwrap() >= u64::try_from(BYTES).unwrap());
    }
}
