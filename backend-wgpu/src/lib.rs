//! Vulkan, Metal and DX12 devices as devices of `tilefold`: the attention contract on wgpu.
//!
//! Building needs no SDK. Drivers are found when a device is opened; without one the error says what to install. Shaders are
//! WGSL, specialised for a problem and compiled by the driver at the first launch that needs them.

mod accumulate;
mod attention;
mod calls;
mod context;
mod device;
mod error;
mod event;
mod memory;
mod merge;
mod module;
mod relayout;
mod rope;
mod stream;
mod timing;

pub use context::WgpuOptions;
pub use device::WgpuBackend;
