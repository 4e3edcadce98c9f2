//! Tensors one attention reads, owned: random ones, or the caller's.

use tilefold::{DType, Device, Error, Inputs, ProblemError, Tensor, TensorView};

use crate::{Omitted, Workload, normal, random_bools};

/// Axes of q, k, v, gate, out and of a bias.
pub(crate) const FULL_RANK: usize = 5;
/// Axes of a mask and of segment ids.
const MASK_RANK: usize = 3;

/// Tensors one attention reads, owned.
///
/// *Shapes*: as in [`Inputs`], or without the axes that [`Operands::omitted`] names; `d_out` has the shape of out.
#[derive(Debug)]
pub struct Operands {
    /// Queries.
    pub q: Tensor,
    /// Keys.
    pub k: Tensor,
    /// Values.
    pub v: Tensor,
    /// Additive biases.
    pub biases: Vec<Tensor>,
    /// Keys that count.
    pub key_mask: Option<Tensor>,
    /// Segment of each query.
    pub q_segments: Option<Tensor>,
    /// Segment of each key.
    pub k_segments: Option<Tensor>,
    /// Gate before its sigmoid.
    pub gate: Option<Tensor>,
    /// Gradient of the output, for a backward pass.
    pub d_out: Option<Tensor>,
    /// What tensors with one axis less leave out.
    pub omitted: Omitted,
}

impl Operands {
    /// Plain attention, forward only.
    #[must_use]
    pub fn new(q: Tensor, k: Tensor, v: Tensor) -> Self {
        let (biases, omitted) = (Vec::new(), Omitted::default());
        let [key_mask, q_segments, k_segments, gate, d_out] = [const { None }; 5];
        Self { q, k, v, biases, key_mask, q_segments, k_segments, gate, d_out, omitted }
    }

    /// Seeded normal inputs of a workload, on the host; with `d_out` for gradients.
    ///
    /// # Errors
    /// [`ProblemError`] for sizes that cannot be held.
    pub fn random(workload: &Workload, dtype: DType, gradients: bool) -> Result<Self, ProblemError> {
        let Workload { rows, seqlen, heads, head_dim, .. } = *workload;
        let seqlen_k = workload.seqlen_k();
        let (queries, keys) = ([1, rows, seqlen, heads, head_dim], [1, rows, seqlen_k, heads, head_dim]);
        let bias = || normal(dtype, &[1, 1, heads, seqlen, seqlen_k], 4);
        let mut operands = Self::new(normal(dtype, &queries, 1)?, normal(dtype, &keys, 2)?, normal(dtype, &keys, 3)?);
        operands.biases = workload.pair_bias.then(bias).into_iter().collect::<Result<_, _>>()?;
        operands.key_mask = workload.key_mask.then(|| random_bools(&[1, rows, seqlen_k], 5)).transpose()?;
        operands.d_out = gradients.then(|| normal(dtype, &queries, 6)).transpose()?;
        Ok(operands)
    }

    /// Views of the tensors with all axes.
    ///
    /// # Errors
    /// As [`Omitted::lift`].
    pub fn inputs(&self) -> Result<Inputs<'_>, ProblemError> {
        let mut inputs = Inputs::new(self.full(&self.q)?, self.full(&self.k)?, self.full(&self.v)?);
        inputs.biases = self.biases.iter().map(|bias| self.full(bias)).collect::<Result<_, _>>()?;
        inputs.key_mask = self.mask(self.key_mask.as_ref())?;
        inputs.q_segments = self.mask(self.q_segments.as_ref())?;
        inputs.k_segments = self.mask(self.k_segments.as_ref())?;
        inputs.gate = self.gate.as_ref().map(|gate| self.full(gate)).transpose()?;
        Ok(inputs)
    }

    /// A tensor of the rank of q with all axes.
    pub(crate) fn full<'a>(&self, tensor: &'a Tensor) -> Result<TensorView<'a>, ProblemError> {
        self.omitted.lift(&tensor.view(), FULL_RANK)
    }

    fn mask<'a>(&self, tensor: Option<&'a Tensor>) -> Result<Option<TensorView<'a>>, ProblemError> {
        tensor.map(|tensor| self.omitted.lift(&tensor.view(), MASK_RANK)).transpose()
    }

    /// The same tensors on a device; host memory is kept where the device can read it.
    pub(crate) fn into_device(self, device: &Device) -> Result<Self, Error> {
        self.moved(|tensor| device.upload_tensor(tensor))
    }

    /// The same tensors on the host.
    pub(crate) fn into_host(self, device: &Device) -> Result<Self, Error> {
        self.moved(|tensor| device.download_tensor(tensor))
    }

    fn moved(self, to: impl Fn(Tensor) -> Result<Tensor, Error>) -> Result<Self, Error> {
        let optional = |tensor: Option<Tensor>| tensor.map(&to).transpose();
        Ok(Self {
            q: to(self.q)?,
            k: to(self.k)?,
            v: to(self.v)?,
            biases: self.biases.into_iter().map(&to).collect::<Result<_, _>>()?,
            key_mask: optional(self.key_mask)?,
            q_segments: optional(self.q_segments)?,
            k_segments: optional(self.k_segments)?,
            gate: optional(self.gate)?,
            d_out: optional(self.d_out)?,
            omitted: self.omitted,
        })
    }
}
