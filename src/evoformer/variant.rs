//! The four variants as views: which axis attention runs along, and which way round the pair bias lies.

use crate::attention::{Inputs as Attend, Options, attention_backward_into, attention_into, problem};
use crate::evoformer::Inputs;
use crate::{
    AttentionPlan, Backend, Backward, Device, Error, Forward, Gradients, ProblemError, TensorView, TensorViewMut,
};

/// One of the four attentions of an Evoformer block.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Variant {
    /// Residues of one sequence of the alignment.
    MsaRow,
    /// Sequences at one residue of the alignment.
    MsaColumn,
    /// Edges that start at the same residue.
    TriangleStarting,
    /// Edges that end at the same residue.
    TriangleEnding,
}

impl Variant {
    /// All four, in the order of an Evoformer block.
    pub const ALL: [Self; 4] = [Self::MsaRow, Self::MsaColumn, Self::TriangleStarting, Self::TriangleEnding];

    /// Its name, as the functions of this module are called.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::MsaRow => "msa_row",
            Self::MsaColumn => "msa_column",
            Self::TriangleStarting => "triangle_starting",
            Self::TriangleEnding => "triangle_ending",
        }
    }

    /// Forward.
    ///
    /// *Shapes*: out as q, with the last axis of v; lse and lse_low in the order the attention runs in, `[batch, rows,
    /// heads, queries]`.
    ///
    /// # Errors
    /// [`Error::Problem`] that names the tensor and dimension; [`Error::Device`].
    pub fn forward(self, device: &Device, inputs: &Inputs<'_>) -> Result<Forward, Error> {
        let (attend, plan) = self.plan(device, inputs, Gradients::default())?;
        let out = device.zeros(inputs.q.dtype(), inputs.v.shape())?;
        let mut forward = Forward::with_out(out, device, &plan.problem)?;
        let Forward { out, lse, lse_low } = &mut forward;
        let out = out.view_mut().permute(self.order())?;
        attention_into(device, &plan, attend.forward_operands(out, Some(lse.view_mut()), Some(lse_low.view_mut())))?;
        Ok(forward)
    }

    /// Gradients in the shapes of the inputs; that of the pair bias is `dbiases[0]`.
    ///
    /// # Errors
    /// As [`Variant::forward`]; [`ProblemError::Unexpected`] for a gradient of an operand that is not there.
    pub fn backward(
        self,
        device: &Device,
        inputs: &Inputs<'_>,
        forward: &Forward,
        d_out: &TensorView<'_>,
        gradients: Gradients,
    ) -> Result<Backward, Error> {
        let (attend, plan) = self.plan(device, inputs, gradients)?;
        check("d_out", d_out, inputs.v.shape(), self.axes(), false)?;
        let mut backward = Backward::zeros(device, &as_given(inputs), gradients)?;
        let mut operands = attend.backward_operands(forward, d_out, &mut backward);
        operands.out = operands.out.permute(self.order())?;
        operands.d_out = operands.d_out.permute(self.order())?;
        operands.dq = self.turn(operands.dq)?;
        operands.dk = self.turn(operands.dk)?;
        operands.dv = self.turn(operands.dv)?;
        operands.d_gate = self.turn(operands.d_gate)?;
        for dbias in &mut operands.dbiases {
            let turned = dbias.take().map(|view| view.permute(self.bias_order())?.unsqueeze(1));
            *dbias = turned.transpose()?;
        }
        attention_backward_into(device, &plan, operands)?;
        Ok(backward)
    }

    fn plan<'a>(
        self,
        device: &Device,
        inputs: &Inputs<'a>,
        gradients: Gradients,
    ) -> Result<(Attend<'a>, AttentionPlan), Error> {
        let attend = self.views(inputs)?;
        let options = Options { empty_rows: inputs.empty_rows, products: inputs.products, ..Options::default() };
        let plan = device.plan_attention(&problem(&attend, &options, gradients)?)?;
        Ok((attend, plan))
    }

    /// The tensors as attention takes them: `[batch, rows, seqlen, heads, head_dim]` and bias `[batch, 1, heads, q, k]`.
    fn views<'a>(self, inputs: &Inputs<'a>) -> Result<Attend<'a>, ProblemError> {
        self.check(inputs)?;
        let turn = |view: &TensorView<'a>| view.permute(self.order());
        let mut attend = Attend::new(turn(&inputs.q)?, turn(&inputs.k)?, turn(&inputs.v)?);
        attend.gate = inputs.gate.as_ref().map(turn).transpose()?;
        attend.key_mask = inputs.mask.as_ref().map(|mask| mask.permute(&self.order()[..3])).transpose()?;
        if let Some(bias) = &inputs.pair_bias {
            attend.biases.push(bias.permute(self.bias_order())?.unsqueeze(1)?);
        }
        Ok(attend)
    }

    fn turn(self, gradient: Option<TensorViewMut<'_>>) -> Result<Option<TensorViewMut<'_>>, ProblemError> {
        gradient.map(|view| view.permute(self.order())).transpose()
    }

    /// Puts the axis that attention shares a launch over in front of the axis it runs along.
    fn order(self) -> &'static [usize] {
        match self {
            Self::MsaRow | Self::TriangleStarting => &[0, 1, 2, 3, 4],
            Self::MsaColumn | Self::TriangleEnding => &[0, 2, 1, 3, 4],
        }
    }

    /// Around the ending node the query's index is the bias's second: b_ki.
    fn bias_order(self) -> &'static [usize] {
        match self {
            Self::TriangleEnding => &[0, 1, 3, 2],
            _ => &[0, 1, 2, 3],
        }
    }

    fn axes(self) -> [&'static str; 5] {
        match self {
            Self::MsaRow | Self::MsaColumn => ["batch", "n_seq", "n_res", "heads", "head_dim"],
            Self::TriangleStarting | Self::TriangleEnding => {
                ["batch", "n_res (start)", "n_res (end)", "heads", "head_dim"]
            }
        }
    }

    fn check(self, inputs: &Inputs<'_>) -> Result<(), ProblemError> {
        let &[batch, n_seq, n_res, heads, head_dim] = inputs.q.shape() else {
            return Err(ProblemError::Rank { tensor: "q", expected: 5, got: inputs.q.shape().len() });
        };
        if matches!(self, Self::TriangleStarting | Self::TriangleEnding) && n_seq != n_res {
            return Err(ProblemError::Shape { tensor: "q", dimension: "n_res (end)", expected: n_seq, got: n_res });
        }
        if self == Self::MsaColumn && inputs.pair_bias.is_some() {
            let reason = "column-wise attention takes no pair bias; leave it out";
            return Err(ProblemError::Unexpected { tensor: "pair_bias", reason });
        }
        let axes = self.axes();
        let head_dim_v = inputs.v.shape().last().copied().unwrap_or(head_dim);
        let values = [batch, n_seq, n_res, heads, head_dim_v];
        check("k", &inputs.k, &[batch, n_seq, n_res, heads, head_dim], axes, false)?;
        check("v", &inputs.v, &values, axes, false)?;
        if let Some(gate) = &inputs.gate {
            check("gate", gate, &values, axes, false)?;
        }
        if let Some(mask) = &inputs.mask {
            check("mask", mask, &[batch, n_seq, n_res], [axes[0], axes[1], axes[2]], true)?;
        }
        match &inputs.pair_bias {
            Some(bias) => check("pair_bias", bias, &[batch, heads, n_res, n_res], PAIR_AXES, true),
            None => Ok(()),
        }
    }
}

const PAIR_AXES: [&str; 4] = ["batch", "heads", "n_res (i)", "n_res (j)"];

/// The inputs in the caller's axis order: what gradients are shaped like.
fn as_given<'a>(inputs: &Inputs<'a>) -> Attend<'a> {
    let mut given = Attend::new(inputs.q.clone(), inputs.k.clone(), inputs.v.clone());
    given.biases.extend(inputs.pair_bias.clone());
    given.gate.clone_from(&inputs.gate);
    given
}

pub(super) fn check<const N: usize>(
    tensor: &'static str,
    view: &TensorView<'_>,
    shape: &[usize],
    axes: [&'static str; N],
    broadcast: bool,
) -> Result<(), ProblemError> {
    if view.shape().len() != shape.len() {
        return Err(ProblemError::Rank { tensor, expected: shape.len(), got: view.shape().len() });
    }
    for ((&got, &expected), dimension) in view.shape().iter().zip(shape).zip(axes) {
        if got == expected || (broadcast && got == 1) {
            continue;
        }
        return Err(if broadcast {
            ProblemError::NotBroadcastable { tensor, dimension, expected, got }
        } else {
            ProblemError::Shape { tensor, dimension, expected, got }
        });
    }
    Ok(())
}
