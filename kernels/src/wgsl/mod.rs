//! The kernels in WGSL, for every device that wgpu drives: which shader a call runs, with which bindings and arguments.
//!
//! Addresses are numbers of the backend's own making; here they only tell which operands lie where in one buffer. A call
//! whose operands exceed what a binding shows is cut along batch, rows and heads into several dispatches.

mod attention;
mod backward;
mod catalogue;
mod dispatch;
mod forward;
mod moves;
mod rope;
mod shader;

pub use attention::Operands;
pub use backward::{backward, backward_workspace_bytes};
pub use catalogue::{CatalogueError, catalogue};
pub use dispatch::{Binding, Dispatch, DispatchError, Limits};
pub use forward::{forward, forward_tile, forward_workspace_bytes};
pub use moves::{accumulate, fill, merge, relayout};
pub use rope::rope;
pub use shader::{Constant, Elements, File, OperandKey, Shader, Sharing, Use};
