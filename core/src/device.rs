//! What a device is called and what it can do.

use std::fmt;

use crate::DType;

/// The kind of hardware interface a device is driven through.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum DeviceKind {
    /// The host's processors.
    Cpu,
    /// NVIDIA, through the CUDA driver.
    Cuda,
    /// AMD Instinct, through HIP.
    Rocm,
    /// Vulkan, Metal or DX12, through wgpu.
    Wgpu,
    /// A backend of the caller's own.
    Custom,
}

/// One device: `cpu`, `cuda:0`, ...
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct DeviceId {
    /// The interface.
    pub kind: DeviceKind,
    /// Number of the device among those of its kind.
    pub ordinal: usize,
}

impl DeviceId {
    /// The host's processors, all of them as one device.
    pub const CPU: Self = Self { kind: DeviceKind::Cpu, ordinal: 0 };

    /// Whether the processor can read this device's memory by its addresses.
    #[must_use]
    pub fn is_host(self) -> bool {
        self.kind == DeviceKind::Cpu
    }
}

impl fmt::Display for DeviceId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.kind {
            DeviceKind::Cpu => f.write_str("cpu"),
            DeviceKind::Cuda => write!(f, "cuda:{}", self.ordinal),
            DeviceKind::Rocm => write!(f, "rocm:{}", self.ordinal),
            DeviceKind::Wgpu => write!(f, "wgpu:{}", self.ordinal),
            DeviceKind::Custom => write!(f, "custom:{}", self.ordinal),
        }
    }
}

/// What a backend reports about its device.
#[derive(Clone, Debug, PartialEq)]
pub struct DeviceInfo {
    /// Which device.
    pub id: DeviceId,
    /// The model's name, as its maker writes it.
    pub name: String,
    /// The maker.
    pub vendor: String,
    /// The instruction set the kernels use, such as `avx2` or `sm_80`.
    pub arch: String,
    /// Memory in bytes; 0 when it cannot be told.
    pub memory_bytes: u64,
    /// Independent workers: threads, multiprocessors or compute units; 0 when it cannot be told.
    pub parallelism: usize,
    /// f32 lanes of one vector instruction, warp or wave.
    pub lanes: usize,
    /// The dtypes q, k and v may have.
    pub dtypes: Vec<DType>,
    /// Whether an interpreter stands in for the hardware: its results count, its times do not.
    pub is_virtual: bool,
}
