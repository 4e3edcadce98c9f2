//! Which part of a training step is run and timed.

use std::fmt;

use tilefold::AttentionProblem;

/// Forward, backward, or one after the other.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Pass {
    /// Output and lse.
    Forward,
    /// Every gradient, from a forward pass done before.
    Backward,
    /// Forward, then backward.
    Both,
}

impl Pass {
    /// Every pass.
    pub const ALL: [Self; 3] = [Self::Forward, Self::Backward, Self::Both];

    /// Whether gradients are computed.
    #[must_use]
    pub fn has_gradients(self) -> bool {
        self != Self::Forward
    }

    /// Floating-point operations of the matrix products: 2 forward, 5 backward, each 2 · logits · channels.
    ///
    /// Masked keys count as work, whether they are skipped or not.
    #[must_use]
    pub fn flops(self, problem: &AttentionProblem) -> f64 {
        match self {
            Self::Forward => problem.forward_flops(),
            Self::Backward => problem.backward_flops(),
            Self::Both => problem.forward_flops() + problem.backward_flops(),
        }
    }
}

impl fmt::Display for Pass {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Forward => "forward",
            Self::Backward => "backward",
            Self::Both => "both",
        })
    }
}
