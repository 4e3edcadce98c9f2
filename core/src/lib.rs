//! The contract of `tilefold` and its plain data: no device calls, no cargo features.
//!
//! The data's way: sizes and dtypes become a valid [`AttentionProblem`] (or a [`ProblemError`] naming tensor and
//! dimension); a [`Backend`] turns it into an [`AttentionPlan`]; operands are checked once against the plan and become
//! [`ForwardArgs`] or [`BackwardArgs`]; the backend launches. [`attention::reference`] is the f64 oracle that every
//! backend is held against.

mod accumulate;
pub mod attention;
mod backend;
mod device;
mod dtype;
mod error;
mod layout;
mod merge;
mod relayout;
pub mod rope;
mod storage;
mod stream;
mod tensor;
mod timing;

pub use accumulate::AccumulateArgs;
pub use attention::{
    AttentionPlan, AttentionProblem, AttentionSpec, BackwardArgs, BackwardOperands, BiasSpec, EmptyRows, ForwardArgs,
    ForwardOperands, Gradients, MAX_BIASES, MAX_HEAD_DIM, Precision, Products, StructuralMask, Window,
};
pub use backend::Backend;
pub use device::{DeviceId, DeviceInfo, DeviceKind};
pub use dtype::{DType, Element};
pub use error::{DeviceError, DeviceResult, OpenError, ProblemError};
pub use layout::Layout;
pub use merge::{MergeArgs, MergeOperands};
pub use relayout::RelayoutArgs;
pub use rope::{RopeAngle, RopeArgs, RopePairs, RopeSpec};
pub use storage::Storage;
pub use stream::{Event, Stream};
pub use tensor::{Tensor, TensorView, TensorViewMut};
pub use timing::{Clock, Timing};
