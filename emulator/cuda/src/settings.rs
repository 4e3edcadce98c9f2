//! What the environment says about the virtual devices.

use std::env;

/// How many devices there are; 1 without it, and 0 for a driver without a device.
pub const DEVICES: &str = "TILEFOLD_VIRTUAL_GPU";
/// Bytes of memory each device has; 2 GiB without it. Allocations beyond are refused as a driver refuses them.
pub const MEMORY: &str = "TILEFOLD_VIRTUAL_GPU_MEMORY";
/// Architecture, as 80 for sm_80.
pub const ARCH: &str = "TILEFOLD_VIRTUAL_GPU_ARCH";
/// Version of the driver as `cuDriverGetVersion` counts it; 13000 without it.
pub const DRIVER: &str = "TILEFOLD_VIRTUAL_GPU_DRIVER";
/// 0 for devices without stream-ordered allocation.
pub const POOLS: &str = "TILEFOLD_VIRTUAL_GPU_POOLS";
/// Number of the launch that fails, counted from 1; 0, as without it, for none.
pub const FAIL_LAUNCH: &str = "TILEFOLD_VIRTUAL_GPU_FAIL_LAUNCH";

/// The values in use.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Settings {
    pub(crate) devices: u64,
    pub(crate) memory_bytes: u64,
    pub(crate) arch: u64,
    pub(crate) driver: u64,
    pub(crate) pools: u64,
    pub(crate) fail_launch: u64,
}

impl Settings {
    /// Reads the environment.
    ///
    /// # Errors
    /// The variable that is no number in its range.
    pub(crate) fn from_environment() -> Result<Self, String> {
        Self::read(|name| env::var_os(name).map(|value| value.to_string_lossy().into_owned()))
    }

    fn read(variable: impl Fn(&str) -> Option<String>) -> Result<Self, String> {
        let number = |name: &str, default: u64, most: u64| match variable(name) {
            None => Ok(default),
            Some(text) => text
                .parse()
                .ok()
                .filter(|&number| number <= most)
                .ok_or_else(|| format!("{name}={text}: expected a number from 0 to {most}")),
        };
        Ok(Self {
            devices: number(DEVICES, 1, 16)?,
            memory_bytes: number(MEMORY, 2 << 30, 1 << 46)?,
            arch: number(ARCH, 80, 999)?,
            driver: number(DRIVER, 13_000, 99_990)?,
            pools: number(POOLS, 1, 1)?,
            fail_launch: number(FAIL_LAUNCH, 0, u64::MAX)?,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_out_of_range_are_refused_by_name() {
        assert_eq!(Settings::read(|_| None).unwrap().devices, 1);
        let with = |name: &'static str, value: &'static str| {
            Settings::read(move |asked| (asked == name).then(|| value.to_owned()))
        };
        assert_eq!(with(DEVICES, "2").unwrap().devices, 2);
        assert_eq!(with(MEMORY, "4096").unwrap().memory_bytes, 4096);
        for (name, value) in [(DEVICES, "17"), (MEMORY, "-1"), (POOLS, "yes"), (ARCH, "")] {
            let error = with(name, value).unwrap_err();
            assert!(error.starts_with(&format!("{name}={value}: expected")), "{error}");
        }
    }
}
