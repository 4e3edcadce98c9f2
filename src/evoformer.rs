//! The attentions of the Evoformer, by their names: each only turns views and calls [`attention`](crate::attention()).
//!
//! | function | rows | query, key | bias | AlphaFold 2, supplement |
//! |---|---|---|---|---|
//! | [`msa_row`] | sequence s | q_si, k_sj | b_ij | algorithm 7 |
//! | [`msa_column`] | residue i | q_si, k_ti | none | algorithm 8 |
//! | [`triangle_starting`] | start i | q_ij, k_ik | b_jk | algorithm 13 |
//! | [`triangle_ending`] | end j | q_ij, k_kj | b_ki | algorithm 14 |
//!
//! Column-wise attention and attention around the ending node are the same launch over permuted views: nothing is copied,
//! and every result has the caller's order of axes. [`evoformer_attention`] takes the shapes of DeepSpeed4Science.

use crate::{Backward, Device, EmptyRows, Error, Forward, Gradients, Products, TensorView};

mod ds4sci;
mod variant;

pub use ds4sci::{evoformer_attention, evoformer_attention_backward};
pub use variant::Variant;

/// Tensors of one Evoformer attention, in the axis order of its representation.
///
/// *Shapes*: for the two MSA variants `n_seq` and `n_res` as written, for the two triangles both are n_res: tensors of the
/// pair representation are `[batch, n_res, n_res, heads, head_dim]`.
#[derive(Clone, Debug)]
pub struct Inputs<'a> {
    /// `[batch, n_seq, n_res, heads, head_dim]`
    pub q: TensorView<'a>,
    /// As q.
    pub k: TensorView<'a>,
    /// As q; the last axis may have its own size.
    pub v: TensorView<'a>,
    /// Bool, `[batch, n_seq, n_res]` with any axes of size 1; true keeps the position as a key.
    pub mask: Option<TensorView<'a>>,
    /// `[batch, heads, n_res, n_res]` with any axes of size 1: b_ij as the pair representation's element ij gave it.
    pub pair_bias: Option<TensorView<'a>>,
    /// As v, before the sigmoid.
    pub gate: Option<TensorView<'a>>,
    /// What a row without keys gives; [`EmptyRows::Uniform`] is what AlphaFold's `-1e9` gives.
    pub empty_rows: EmptyRows,
    /// Whether the factors of products may be rounded to tf32, in f32 alone: as in [`Options`](crate::Options).
    pub products: Products,
}

impl<'a> Inputs<'a> {
    /// Without mask, bias and gate.
    #[must_use]
    pub fn new(q: TensorView<'a>, k: TensorView<'a>, v: TensorView<'a>) -> Self {
        let (empty_rows, products) = (EmptyRows::default(), Products::default());
        Self { q, k, v, mask: None, pair_bias: None, gate: None, empty_rows, products }
    }

    /// Every gradient these inputs have; that of the pair bias is `biases[0]`.
    #[must_use]
    pub fn all_gradients(&self) -> Gradients {
        let biases = std::array::from_fn(|i| i == 0 && self.pair_bias.is_some());
        Gradients { q: true, k: true, v: true, gate: self.gate.is_some(), biases }
    }
}

/// Row-wise gated self-attention with pair bias: over the residues of each sequence.
///
/// *Shapes*: as [`Inputs`]; out in the same order. *Source*: Jumper et al. 2021, supplement, algorithm 7.
///
/// ```
/// use tilefold::evoformer::{Inputs, msa_row, msa_row_backward};
/// # use tilefold::{Device, TensorView};
/// let device = Device::cpu()?;
/// let data: Vec<f32> = (0_u8..24).map(|i| f32::from(i % 7) - 3.0).collect();
/// let x = TensorView::from_slice(&data, &[1, 2, 3, 1, 4])?; // 2 sequences, 3 residues, 1 head of 4 channels
/// let inputs = Inputs::new(x.clone(), x.clone(), x.clone());
/// let forward = msa_row(&device, &inputs)?;
/// let backward = msa_row_backward(&device, &inputs, &forward, &x, inputs.all_gradients())?;
/// assert_eq!(forward.out.shape(), x.shape());
/// assert_eq!(backward.dq.map(|dq| dq.shape().to_vec()), Some(vec![1, 2, 3, 1, 4]));
/// # Ok::<(), tilefold::Error>(())
/// ```
///
/// # Errors
/// [`Error::Problem`] that names the tensor and dimension; [`Error::Device`].
pub fn msa_row(device: &Device, inputs: &Inputs<'_>) -> Result<Forward, Error> {
    Variant::MsaRow.forward(device, inputs)
}

/// Gradients of [`msa_row`]; that of the pair bias is `dbiases[0]`.
///
/// # Errors
/// As [`msa_row`]; [`crate::ProblemError::Unexpected`] for a gradient of an operand that is not there.
pub fn msa_row_backward(
    device: &Device,
    inputs: &Inputs<'_>,
    forward: &Forward,
    d_out: &TensorView<'_>,
    gradients: Gradients,
) -> Result<Backward, Error> {
    Variant::MsaRow.backward(device, inputs, forward, d_out, gradients)
}

/// Column-wise gated self-attention: over the sequences at each residue.
///
/// *Shapes*: as [`Inputs`]; out in the same order. *Source*: Jumper et al. 2021, supplement, algorithm 8.
///
/// ```
/// use tilefold::evoformer::{Inputs, msa_column, msa_column_backward};
/// # use tilefold::{Device, TensorView};
/// let device = Device::cpu()?;
/// let data: Vec<f32> = (0_u8..24).map(|i| f32::from(i % 7) - 3.0).collect();
/// let x = TensorView::from_slice(&data, &[1, 2, 3, 1, 4])?; // 2 sequences, 3 residues, 1 head of 4 channels
/// let inputs = Inputs::new(x.clone(), x.clone(), x.clone());
/// let forward = msa_column(&device, &inputs)?;
/// let backward = msa_column_backward(&device, &inputs, &forward, &x, inputs.all_gradients())?;
/// assert_eq!(forward.out.shape(), x.shape());
/// assert_eq!(backward.dq.map(|dq| dq.shape().to_vec()), Some(vec![1, 2, 3, 1, 4]));
/// # Ok::<(), tilefold::Error>(())
/// ```
///
/// # Errors
/// [`Error::Problem`] that names the tensor and dimension; [`Error::Device`].
pub fn msa_column(device: &Device, inputs: &Inputs<'_>) -> Result<Forward, Error> {
    Variant::MsaColumn.forward(device, inputs)
}

/// Gradients of [`msa_column`].
///
/// # Errors
/// As [`msa_column`]; [`crate::ProblemError::Unexpected`] for a gradient of an operand that is not there.
pub fn msa_column_backward(
    device: &Device,
    inputs: &Inputs<'_>,
    forward: &Forward,
    d_out: &TensorView<'_>,
    gradients: Gradients,
) -> Result<Backward, Error> {
    Variant::MsaColumn.backward(device, inputs, forward, d_out, gradients)
}

/// Triangular gated self-attention around the starting node: edge ij sees the edges ik.
///
/// *Shapes*: as [`Inputs`]; out in the same order. *Source*: Jumper et al. 2021, supplement, algorithm 13.
///
/// ```
/// use tilefold::evoformer::{Inputs, triangle_starting, triangle_starting_backward};
/// # use tilefold::{Device, TensorView};
/// let device = Device::cpu()?;
/// let data: Vec<f32> = (0_u8..36).map(|i| f32::from(i % 7) - 3.0).collect();
/// let x = TensorView::from_slice(&data, &[1, 3, 3, 1, 4])?; // 3 × 3 pairs of residues, 1 head of 4 channels
/// let inputs = Inputs::new(x.clone(), x.clone(), x.clone());
/// let forward = triangle_starting(&device, &inputs)?;
/// let backward = triangle_starting_backward(&device, &inputs, &forward, &x, inputs.all_gradients())?;
/// assert_eq!(forward.out.shape(), x.shape());
/// assert_eq!(backward.dq.map(|dq| dq.shape().to_vec()), Some(vec![1, 3, 3, 1, 4]));
/// # Ok::<(), tilefold::Error>(())
/// ```
///
/// # Errors
/// [`Error::Problem`] that names the tensor and dimension; [`Error::Device`].
pub fn triangle_starting(device: &Device, inputs: &Inputs<'_>) -> Result<Forward, Error> {
    Variant::TriangleStarting.forward(device, inputs)
}

/// Gradients of [`triangle_starting`]; that of the pair bias is `dbiases[0]`.
///
/// # Errors
/// As [`triangle_starting`]; [`crate::ProblemError::Unexpected`] for a gradient of an operand that is not there.
pub fn triangle_starting_backward(
    device: &Device,
    inputs: &Inputs<'_>,
    forward: &Forward,
    d_out: &TensorView<'_>,
    gradients: Gradients,
) -> Result<Backward, Error> {
    Variant::TriangleStarting.backward(device, inputs, forward, d_out, gradients)
}

/// Triangular gated self-attention around the ending node: edge ij sees the edges kj.
///
/// *Shapes*: as [`Inputs`]; out in the same order. *Source*: Jumper et al. 2021, supplement, algorithm 14.
///
/// ```
/// use tilefold::evoformer::{Inputs, triangle_ending, triangle_ending_backward};
/// # use tilefold::{Device, TensorView};
/// let device = Device::cpu()?;
/// let data: Vec<f32> = (0_u8..36).map(|i| f32::from(i % 7) - 3.0).collect();
/// let x = TensorView::from_slice(&data, &[1, 3, 3, 1, 4])?; // 3 × 3 pairs of residues, 1 head of 4 channels
/// let inputs = Inputs::new(x.clone(), x.clone(), x.clone());
/// let forward = triangle_ending(&device, &inputs)?;
/// let backward = triangle_ending_backward(&device, &inputs, &forward, &x, inputs.all_gradients())?;
/// assert_eq!(forward.out.shape(), x.shape());
/// assert_eq!(backward.dq.map(|dq| dq.shape().to_vec()), Some(vec![1, 3, 3, 1, 4]));
/// # Ok::<(), tilefold::Error>(())
/// ```
///
/// # Errors
/// [`Error::Problem`] that names the tensor and dimension; [`Error::Device`].
pub fn triangle_ending(device: &Device, inputs: &Inputs<'_>) -> Result<Forward, Error> {
    Variant::TriangleEnding.forward(device, inputs)
}

/// Gradients of [`triangle_ending`]; that of the pair bias is `dbiases[0]`.
///
/// # Errors
/// As [`triangle_ending`]; [`crate::ProblemError::Unexpected`] for a gradient of an operand that is not there.
pub fn triangle_ending_backward(
    device: &Device,
    inputs: &Inputs<'_>,
    forward: &Forward,
    d_out: &TensorView<'_>,
    gradients: Gradients,
) -> Result<Backward, Error> {
    Variant::TriangleEnding.backward(device, inputs, forward, d_out, gradients)
}

#[cfg(test)]
mod tests;
