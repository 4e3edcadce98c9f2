//! q, k and v packed in one tensor, and their gradients in another: how a fused projection leaves and wants them.

use std::sync::Arc;

use tilefold_core::{
    AttentionPlan, AttentionProblem, AttentionSpec, Backend, BackwardArgs, BackwardOperands, DType, ForwardArgs,
    ForwardOperands, Precision, Stream, Tensor,
};

use crate::buffer::{Buffer, Downloaded};
use crate::case::{Case, Place};
use crate::exchange::Results;
use crate::oracle::Expected;
use crate::suite::Trial;
use crate::values::{Host, Inputs};

/// Axis of the heads, along which the three are packed.
const HEADS: usize = 3;

/// Operands of both passes, with q, k and v in one tensor and their gradients in one.
pub(crate) struct Packed<'a> {
    pub(crate) qkv: &'a Tensor,
    pub(crate) bias: Option<&'a Tensor>,
    pub(crate) d_out: &'a Tensor,
    pub(crate) out: &'a mut Tensor,
    pub(crate) lse: &'a mut Tensor,
    pub(crate) lse_low: &'a mut Tensor,
    pub(crate) gradients: &'a mut Tensor,
    pub(crate) dbias: Option<&'a mut Tensor>,
}

impl Packed<'_> {
    /// Both passes.
    pub(crate) fn run(self, device: &dyn Backend, stream: &Stream, plan: &AttentionPlan) -> Result<(), String> {
        let heads = plan.problem.spec().heads;
        let part = |i: usize| self.qkv.view().slice(HEADS, i * heads..(i + 1) * heads, 1).map_err(|e| e.to_string());
        let biases = || self.bias.iter().map(|bias| bias.view()).collect::<Vec<_>>();
        let operands = ForwardOperands {
            q: part(0)?,
            k: part(1)?,
            v: part(2)?,
            biases: biases(),
            key_mask: None,
            q_segments: None,
            k_segments: None,
            gate: None,
            out: self.out.view_mut(),
            lse: Some(self.lse.view_mut()),
            lse_low: Some(self.lse_low.view_mut()),
        };
        let args = ForwardArgs::new(plan, operands).map_err(|e| format!("forward arguments: {e}"))?;
        device.attention_forward(stream, args).map_err(|e| format!("forward: {e}"))?;
        let (dq, rest) = self.gradients.view_mut().split_at(HEADS, heads).map_err(|e| e.to_string())?;
        let (dk, dv) = rest.split_at(HEADS, heads).map_err(|e| e.to_string())?;
        let operands = BackwardOperands {
            q: part(0)?,
            k: part(1)?,
            v: part(2)?,
            biases: biases(),
            key_mask: None,
            q_segments: None,
            k_segments: None,
            gate: None,
            out: self.out.view(),
            lse: self.lse.view(),
            lse_low: self.lse_low.view(),
            d_out: self.d_out.view(),
            dq: Some(dq),
            dk: Some(dk),
            dv: Some(dv),
            dbiases: self.dbias.into_iter().map(|dbias| Some(dbias.view_mut())).collect(),
            d_gate: None,
        };
        let args = BackwardArgs::new(plan, operands).map_err(|e| format!("backward arguments: {e}"))?;
        device.attention_backward(stream, args).map_err(|e| format!("backward: {e}"))?;
        device.synchronize(stream).map_err(|e| e.to_string())
    }
}

/// q, k and v side by side along the heads.
pub(crate) fn pack(inputs: &Inputs) -> Host {
    let (q, width) = (&inputs.q, inputs.q.shape[HEADS] * inputs.q.shape[4]);
    let parts = q.values.chunks(width).zip(inputs.k.values.chunks(width)).zip(inputs.v.values.chunks(width));
    let values = parts.flat_map(|((q, k), v)| [q, k, v].concat()).collect();
    Host { dtype: q.dtype, shape: packed_shape(&q.shape), values }
}

/// The packed gradients as three results.
pub(crate) fn unpack(packed: &[f64], width: usize) -> Results {
    let part = |i: usize| packed.chunks(3 * width).flat_map(|row| row[i * width..(i + 1) * width].to_vec()).collect();
    let named = ["dq", "dk", "dv"].into_iter().enumerate();
    named.map(|(i, name)| (name.to_owned(), Downloaded { values: part(i), bytes: Vec::new() })).collect()
}

/// Three times the heads.
pub(crate) fn packed_shape(shape: &[usize]) -> Vec<usize> {
    shape.iter().enumerate().map(|(axis, &size)| if axis == HEADS { 3 * size } else { size }).collect()
}

pub(crate) fn trials(device: &Arc<dyn Backend>, precision: Precision) -> Vec<Trial> {
    let list = [(3, 21, 4, 8), (2, 70, 2, 33)];
    let trial = |&(rows, length, heads, head_dim): &(usize, usize, usize, usize)| {
        let mut spec = AttentionSpec::new(precision.dtype, 1, rows, length, heads, head_dim).with_all_gradients();
        (spec.products, spec.mask.causal) = (precision.products, true);
        let case = Case::new("layout", format!("packed/{length}x{heads}x{head_dim}"), spec);
        let device = Arc::clone(device);
        Trial::new("layout", case.title(), move || {
            check(&*device, &case).map_err(|message| format!("{}, seed {:#x}: {message}", case.title(), case.seed))
        })
    };
    list.iter().map(trial).collect()
}

fn check(device: &dyn Backend, case: &Case) -> Result<f64, String> {
    let problem = AttentionProblem::new(case.spec.clone()).map_err(|e| e.to_string())?;
    let plan = device.plan_attention(&problem).map_err(|e| e.to_string())?;
    let stream = device.stream().map_err(|e| e.to_string())?;
    let inputs = Inputs::draw(case);
    let put = |host: &Host| Buffer::input(device, &stream, host, &Place::default());
    let output = |dtype, shape: &[usize]| Buffer::output(device, &stream, dtype, shape, &Place::default());
    let (qkv, d_out) = (put(&pack(&inputs))?, put(&inputs.d_out)?);
    let mut out = output(case.spec.dtype, &problem.out_shape())?;
    let mut lse = output(DType::F32, &problem.lse_shape())?;
    let mut lse_low = output(DType::F32, &problem.lse_shape())?;
    let mut gradients = output(case.spec.dtype, &packed_shape(&problem.q_shape()))?;
    let packed = Packed {
        qkv: qkv.tensor(),
        bias: None,
        d_out: d_out.tensor(),
        out: out.tensor_mut(),
        lse: lse.tensor_mut(),
        lse_low: lse_low.tensor_mut(),
        gradients: gradients.tensor_mut(),
        dbias: None,
    };
    packed.run(device, &stream, &plan)?;
    let mut results = unpack(&gradients.download(device, &stream)?.values, case.spec.heads * case.spec.head_dim);
    results.push(("out".to_owned(), out.download(device, &stream)?));
    results.push(("lse".to_owned(), lse.download(device, &stream)?));
    Expected::of(case, &inputs)?.check(case, &results)
}
