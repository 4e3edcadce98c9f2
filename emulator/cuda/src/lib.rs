//! A stand-in for the CUDA driver: kernels run in an interpreter of their PTX, so no GPU is needed.
//!
//! The library exports the driver's calls that the CUDA backend makes, and a few beside them. Put a folder with it under
//! the names `libcuda.so` and `libcuda.so.1` (see [`install`]) first on the library path, and a process that loads the
//! driver gets virtual devices. The environment says how many, and what goes wrong on them: [`settings`].
//!
//! What differs from a driver. Work is done when it is enqueued; what a launch did wrong is reported by the next call
//! on its stream, once, and the device can be used afterwards. Machine code is refused, as by a device of another
//! architecture, so that its user falls back to PTX. The words for a status hold what the interpreter found.
//!
//! Handles are numbers that are looked up: a foreign or freed one is an error, never an access to memory.

mod calls;
mod fault;
mod handles;
mod install;
pub mod settings;
mod status;
mod system;

pub use install::{LIBRARY, install};
