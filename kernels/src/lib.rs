//! GPU kernels of tilefold: device sources shared by CUDA and HIP, and how to specialise and launch them. No device calls.
//!
//! The way of a launch: a problem and the layout of its operands choose compile-time constants (dtype, head
//! dimensions, tile sizes, which masks and biases there are, whether rows move in pieces of 16 bytes); [`Source`] puts
//! them as `#define` lines in front of the kernel's file with its includes inlined; the result is a [`Kernel`],
//! self-contained and identified by its hash, that NVRTC or hiprtc compiles without a header. What else varies (sizes, strides, addresses, scale, offsets) is in one struct of [`params`], passed by value. A
//! [`Launch`] holds kernel, argument and number of blocks along x; [`Launch::parts`] cuts grids that are too large.
//!
//! For NVIDIA, compile with `--std=c++17` and `--gpu-architecture=sm_XX` (a cubin) or `compute_80` (PTX), without fast-math: where an
//! approximate instruction is wanted, `include/gpu.h` names it. The same sources compile as HIP for gfx90a and gfx942, with a
//! plan of their own: see [`Vendor`].
//!
//! The mathematics is in `docs/mathematics.md`, the kernels' own account in `attention/README.md`.

mod accumulate;
mod axes;
mod backward;
mod catalogue;
mod constants;
mod fill;
mod forward;
mod kernel;
mod merge;
mod operands;
pub mod params;
mod relayout;
mod rope;
mod source;
mod tile;
mod vendor;
pub mod wgsl;

pub use accumulate::accumulate;
pub use backward::{BackwardLaunch, BackwardOperands, backward, backward_shared_bytes, backward_workspace_bytes};
pub use catalogue::{Entry, Pass, Scores, Walk, catalogue};
pub use constants::{AttentionConstants, BiasKind};
pub use fill::{fill, fill_view};
pub use forward::{ForwardKernel, ForwardOutputs, ForwardTile, forward};
pub use kernel::{Kernel, KernelError, Launch, MAX_GRID_BLOCKS};
pub use merge::merge;
pub use operands::{AttentionOperands, DeviceLists, kv_lengths_strides};
pub use relayout::relayout;
pub use rope::rope;
pub use source::{Constant, Source, kernel_files};
pub use tile::{MAX_SHARED_BYTES, PIECE_BYTES, tile_bytes};
pub use vendor::Vendor;
