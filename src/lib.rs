#![doc = include_str!("lib.md")]

mod attention;
mod device;
mod error;
pub mod evoformer;
mod mask;
#[cfg(feature = "ndarray")]
pub mod ndarray;
pub mod safetensors;

pub use half;
pub use tilefold_backend_cpu::{Arch, CpuBackend, HostMemory, host_memory};
#[cfg(feature = "cuda")]
pub use tilefold_backend_cuda::CudaBackend;
#[cfg(feature = "wgpu")]
pub use tilefold_backend_wgpu::{WgpuBackend, WgpuOptions};
/// Sequence parallelism: communicators, and attention over sequences that are split over ranks.
pub use tilefold_comm as comm;
pub use tilefold_core::attention::reference;
pub use tilefold_core::{
    AccumulateArgs, AttentionPlan, AttentionProblem, AttentionSpec, Backend, BackwardArgs, BackwardOperands, BiasSpec,
    Clock, DType, DeviceError, DeviceId, DeviceInfo, DeviceKind, DeviceResult, Element, EmptyRows, Event, ForwardArgs,
    ForwardOperands, Gradients, Layout, MAX_BIASES, MAX_HEAD_DIM, MergeArgs, MergeOperands, OpenError, Precision,
    ProblemError, Products, RelayoutArgs, RopeArgs, RopePairs, RopeSpec, Storage, Stream, StructuralMask, Tensor,
    TensorView, TensorViewMut, Timing, Window,
};

pub use crate::attention::{
    Backward, Forward, Inputs, Options, accumulate, all_gradients, attention, attention_backward,
    attention_backward_into, attention_into, merge, problem, relayout, rope,
};
pub use crate::device::{DEVICE_VARIABLE, Device, Discovery};
pub use crate::error::Error;
pub use crate::mask::{
    AddTile, KeepTile, MASK_BYTES_OF_UNKNOWN_MEMORY, MASK_SHARE, MASK_SLAB_BYTES, Mask, MaskForm, MaskOptions,
    MaskPlacement, MaskSource, build_mask,
};

/// The code in the README compiles and runs.
#[cfg(doctest)]
#[doc = include_str!("../README.md")]
struct Readme;

/// So does the code in the guide for backends.
#[cfg(doctest)]
#[doc = include_str!("../docs/adding-a-backend.md")]
struct AddingABackend;

/// And that in the guide to sequence parallelism.
#[cfg(doctest)]
#[doc = include_str!("../docs/sequence-parallel.md")]
struct SequenceParallel;
