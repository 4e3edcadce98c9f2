//! Merging attention over disjoint sets of keys: what ring attention and split keys need.

use crate::{DType, DeviceId, ProblemError, TensorView, TensorViewMut};

/// Tensors of a merge: `(out, lse)` is added into `(acc_out, acc_lse)`.
///
/// *Shapes*: out `[batch, rows, seqlen_q, heads, head_dim_v]`, lse and lse_low `[batch, rows, heads, seqlen_q]` f32. The
/// outputs must be without gate, and computed with [`crate::EmptyRows::Zero`]: apply the gate, and the mean of v for rows
/// that are still empty, after the last merge. *Numerics*: docs/mathematics.md, equations (17)-(18); in
/// f32, whatever the dtypes. Keep the accumulator in f32 in a ring: rounding each merge to half precision adds up.
#[derive(Debug)]
pub struct MergeOperands<'a> {
    /// The part to add: f32, f16 or bf16.
    pub out: TensorView<'a>,
    /// Its log-sum-exp.
    pub lse: TensorView<'a>,
    /// The low part of its log-sum-exp.
    pub lse_low: TensorView<'a>,
    /// The accumulator: f32, f16 or bf16.
    pub acc_out: TensorViewMut<'a>,
    /// Its log-sum-exp.
    pub acc_lse: TensorViewMut<'a>,
    /// The low part of its log-sum-exp.
    pub acc_lse_low: TensorViewMut<'a>,
}

/// A merge whose operands fit together.
#[derive(Debug)]
pub struct MergeArgs<'a>(MergeOperands<'a>);

impl<'a> MergeArgs<'a> {
    /// Checks shapes, dtypes, devices and aliasing.
    ///
    /// # Errors
    /// A [`ProblemError`] that names the tensor.
    pub fn new(operands: MergeOperands<'a>) -> Result<Self, ProblemError> {
        let o = &operands;
        let device = o.out.device();
        let &[batch, rows, seqlen, heads, _] = o.out.shape() else {
            return Err(ProblemError::Rank { tensor: "out", expected: 5, got: o.out.shape().len() });
        };
        let lse_shape = [batch, rows, heads, seqlen];
        let out_axes = ["batch", "rows", "seqlen_q", "heads", "head_dim_v"].as_slice();
        let lse_axes = ["batch", "rows", "heads", "seqlen_q"].as_slice();
        let floats = [DType::F32, DType::F16, DType::BF16].as_slice();
        let single = [DType::F32].as_slice();
        let views = [
            ("out", &o.out, o.out.shape(), out_axes, floats),
            ("lse", &o.lse, &lse_shape, lse_axes, single),
            ("lse_low", &o.lse_low, &lse_shape, lse_axes, single),
            ("acc_out", o.acc_out.as_view(), o.out.shape(), out_axes, floats),
            ("acc_lse", o.acc_lse.as_view(), &lse_shape, lse_axes, single),
            ("acc_lse_low", o.acc_lse_low.as_view(), &lse_shape, lse_axes, single),
        ];
        for (i, &(tensor, view, shape, axes, dtypes)) in views.iter().enumerate() {
            check_view(tensor, view, shape, axes, dtypes, device)?;
            if i < 3 {
                continue;
            }
            if view.layout().overlaps_itself() {
                return Err(ProblemError::SelfOverlap { tensor, strides: view.layout().strides().to_vec() });
            }
            if let Some((other, ..)) = views[..i].iter().find(|(_, other, ..)| view.overlaps(other)) {
                return Err(ProblemError::Overlap { output: tensor, other });
            }
        }
        Ok(Self(operands))
    }

    /// The device all operands are on.
    #[must_use]
    pub fn device(&self) -> DeviceId {
        self.0.out.device()
    }

    /// The operands.
    #[must_use]
    pub fn into_operands(self) -> MergeOperands<'a> {
        self.0
    }
}

fn check_view(
    tensor: &'static str,
    view: &TensorView<'_>,
    shape: &[usize],
    axes: &[&'static str],
    dtypes: &[DType],
    device: DeviceId,
) -> Result<(), ProblemError> {
    if view.device() != device {
        return Err(ProblemError::WrongDevice { tensor, expected: device, got: view.device() });
    }
    if !dtypes.contains(&view.dtype()) {
        let names: Vec<String> = dtypes.iter().map(DType::to_string).collect();
        return Err(ProblemError::UnsupportedDType { tensor, expected: names.join(" or "), got: view.dtype() });
    }
    if view.shape().len() != shape.len() {
        return Err(ProblemError::Rank { tensor, expected: shape.len(), got: view.shape().len() });
    }
    for ((&got, &expected), &dimension) in view.shape().iter().zip(shape).zip(axes) {
        if got != expected {
            return Err(ProblemError::Shape { tensor, dimension, expected, got });
        }
    }
    Ok(())
}
