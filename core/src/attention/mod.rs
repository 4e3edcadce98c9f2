//! Biased attention: the problem, the plan, the operands, and the f64 reference.
//!
//! The mathematics, with the equation numbers that code comments point to, is in `docs/mathematics.md`.

mod args;
mod bias;
mod mask;
mod plan;
mod problem;
mod products;
pub mod reference;

pub use args::{BackwardArgs, BackwardOperands, ForwardArgs, ForwardOperands};
pub use bias::{BiasSpec, MAX_BIASES};
pub use mask::{Cover, StructuralMask, Window};
pub use plan::AttentionPlan;
pub use problem::{AttentionProblem, AttentionSpec, EmptyRows, Gradients, MAX_HEAD_DIM};
pub use products::{Precision, Products};
