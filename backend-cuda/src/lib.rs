//! NVIDIA GPUs as devices of `tilefold`: the attention contract on the CUDA driver.
//!
//! Building needs no CUDA. The driver (`libcuda`) and the run-time compiler (NVRTC) are loaded when a device is opened;
//! what is missing or too old is a typed error that says what to install. Kernels are specialised and compiled for the
//! device at the first launch that needs them, and kept on disk: [`CACHE_VARIABLE`] says where.

mod accumulate;
mod attention;
mod cache;
mod context;
mod device;
mod driver;
mod error;
mod event;
mod memory;
mod merge;
mod module;
mod nvrtc;
mod relayout;
mod rope;
mod stream;

pub use cache::CACHE_VARIABLE;
pub use device::CudaBackend;
pub use nvrtc::NVRTC_VARIABLE;
