//! The layer after attention: `gelu(m · up) · down`, by token, or by hidden channel.
//!
//! By token every rank has both matrices. By hidden channel (Megatron's maps with sequence parallelism) rank r has columns of
//! `up` and the same rows of `down`:
//!
//! ```text
//! forward                                     backward
//!   m  = all-gather of m along the sequence     dz = all-gather of dy
//!   u  = m · up[:, mine]                        du = (dz · down[mine, :]ᵀ) ⊙ gelu'(u)
//!   z  = gelu(u) · down[mine, :]                d_down[mine, :] = gelu(u)ᵀ · dz,  d_up[:, mine] = mᵀ · du
//!   y  = reduce-scatter of z                    dm = reduce-scatter of du · up[:, mine]ᵀ
//! ```
//!
//! The gathered m is not kept: it is gathered again.

use ndarray::linalg::general_mat_mul;
use ndarray::{Array2, Zip};
use tilefold::comm::sequence_parallel::maps::{AllGather, Map, Split};
use tilefold::comm::{Partition, Rank};

use super::config::{Config, MlpKind};
use super::error::Result;
use super::host::apply;
use super::parameters::LayerParameters;

/// The MLP as it goes over ranks.
#[derive(Debug)]
pub(super) struct Mlp {
    /// Between this rank's tokens and all, where hidden channels are split.
    gather: Option<AllGather>,
    batch: usize,
    /// Tokens of this rank, and all.
    seqlens: [usize; 2],
}

impl Mlp {
    pub(super) fn new(rank: &Rank<'_>, config: &Config, partition: &Partition) -> Self {
        let split = Split { axis: 1, partition: partition.clone() };
        let gather = (config.mlp == MlpKind::Tensor).then_some(AllGather(split));
        let seqlens = [partition.count(rank.comm.rank()), partition.seqlen()];
        Self { gather, batch: config.batch, seqlens }
    }

    /// The value, and the channels before the gelu, which the backward pass needs.
    pub(super) fn forward(
        &self,
        rank: &Rank<'_>,
        weights: &LayerParameters,
        m: Array2<f32>,
    ) -> Result<(Array2<f32>, Array2<f32>)> {
        let u = self.gathered(rank, m)?.dot(&weights.up);
        let z = u.mapv(gelu).dot(&weights.down);
        Ok((self.scattered(rank, z)?, u))
    }

    /// The gradient of m; those of the weights are added to `gradients`.
    pub(super) fn backward(
        &self,
        rank: &Rank<'_>,
        weights: &LayerParameters,
        (m, u): (Array2<f32>, Array2<f32>),
        dy: Array2<f32>,
        gradients: &mut LayerParameters,
    ) -> Result<Array2<f32>> {
        let dz = self.gathered(rank, dy)?;
        general_mat_mul(1.0, &u.mapv(gelu).t(), &dz, 1.0, &mut gradients.down);
        let mut du = dz.dot(&weights.down.t());
        drop(dz);
        Zip::from(&mut du).and(&u).for_each(|du, &u| *du *= gelu_slope(u));
        drop(u);
        let m = self.gathered(rank, m)?;
        general_mat_mul(1.0, &m.t(), &du, 1.0, &mut gradients.up);
        drop(m);
        self.scattered(rank, du.dot(&weights.up.t()))
    }

    /// Rows of all tokens, where this rank computes channels for all of them.
    fn gathered(&self, rank: &Rank<'_>, x: Array2<f32>) -> Result<Array2<f32>> {
        let shape = [self.batch, self.seqlens[0], x.ncols()];
        match &self.gather {
            Some(gather) => apply(rank, gather, x, &shape),
            None => Ok(x),
        }
    }

    /// Rows of this rank's tokens, summed over ranks: the adjoint.
    fn scattered(&self, rank: &Rank<'_>, x: Array2<f32>) -> Result<Array2<f32>> {
        let shape = [self.batch, self.seqlens[1], x.ncols()];
        match &self.gather {
            Some(gather) => apply(rank, &gather.adjoint(), x, &shape),
            None => Ok(x),
        }
    }
}

/// √(2/π) and the cubic coefficient of the tanh form of GELU (Hendrycks and Gimpel, 2016).
const GELU: [f32; 2] = [0.797_884_6, 0.044_715];

fn gelu(x: f32) -> f32 {
    0.5 * x * (1.0 + tanh_part(x))
}

fn gelu_slope(x: f32) -> f32 {
    let tanh = tanh_part(x);
    0.5 * (1.0 + tanh) + 0.5 * x * (1.0 - tanh * tanh) * GELU[0] * (1.0 + 3.0 * GELU[1] * x * x)
}

fn tanh_part(x: f32) -> f32 {
    (GELU[0] * (x + GELU[1] * x * x * x)).tanh()
}
