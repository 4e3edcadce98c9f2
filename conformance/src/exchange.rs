//! Running a case on a device: operands there, both passes, results back.

use tilefold_core::{
    AttentionPlan, AttentionProblem, Backend, BackwardArgs, BackwardOperands, DType, ForwardArgs, ForwardOperands,
    Stream, TensorView,
};

use crate::buffer::{Buffer, Downloaded};
use crate::case::{Case, Place};
use crate::values::Inputs;

/// Every result of a case by its name: `out`, `lse`, `lse_low`, `dq`, ..., `dbias0`, ..., `d_gate`.
pub type Results = Vec<(String, Downloaded)>;

/// Inputs of a case on a device.
struct DeviceInputs {
    q: Buffer,
    k: Buffer,
    v: Buffer,
    biases: Vec<Buffer>,
    key_mask: Option<Buffer>,
    segments: Option<[Buffer; 2]>,
    gate: Option<Buffer>,
    d_out: Buffer,
}

/// Runs forward alone, with lse and lse_low as wanted; gives the output.
///
/// # Errors
/// As [`run`].
pub fn run_forward(
    device: &dyn Backend,
    case: &Case,
    inputs: &Inputs,
    wanted: [bool; 2],
) -> Result<Downloaded, String> {
    let (plan, stream) = prepare(device, case)?;
    let operands = DeviceInputs::upload(device, &stream, case, inputs)?;
    let [out, ..] = forward(device, &stream, case, &plan, &operands, wanted)?;
    out.download(device, &stream).map_err(|e| format!("out: {e}"))
}

fn prepare(device: &dyn Backend, case: &Case) -> Result<(AttentionPlan, Stream), String> {
    let problem = AttentionProblem::new(case.spec.clone()).map_err(|e| e.to_string())?;
    let plan = device.plan_attention(&problem).map_err(|e| e.to_string())?;
    Ok((plan, device.stream().map_err(|e| e.to_string())?))
}

/// Runs forward, and backward where the case asks for a gradient.
///
/// # Errors
/// What the contract or the device reports, or a write to an input or outside an output.
pub fn run(device: &dyn Backend, case: &Case, inputs: &Inputs) -> Result<Results, String> {
    let (plan, stream) = prepare(device, case)?;
    let operands = DeviceInputs::upload(device, &stream, case, inputs)?;
    let outputs = forward(device, &stream, case, &plan, &operands, [true; 2])?;
    let mut results = Results::new();
    for (name, buffer) in ["out", "lse", "lse_low"].into_iter().zip(&outputs) {
        let downloaded = buffer.download(device, &stream).map_err(|e| format!("{name}: {e}"))?;
        results.push((name.to_owned(), downloaded));
    }
    let asked = case.spec.gradients;
    if asked.q || asked.k || asked.v || asked.gate || asked.biases.contains(&true) {
        for (name, buffer) in backward(device, &stream, case, &plan, &operands, &outputs)? {
            let downloaded = buffer.download(device, &stream).map_err(|e| format!("{name}: {e}"))?;
            results.push((name, downloaded));
        }
    }
    operands.check_unchanged(device, &stream)?;
    Ok(results)
}

impl DeviceInputs {
    fn upload(device: &dyn Backend, stream: &Stream, case: &Case, inputs: &Inputs) -> Result<Self, String> {
        let places = &case.places;
        let put = |host, place| Buffer::input(device, stream, host, place);
        let biases = inputs.biases.iter().zip(&places.biases).map(|(host, place)| put(host, place));
        Ok(Self {
            q: put(&inputs.q, &places.q)?,
            k: put(&inputs.k, &places.k)?,
            v: put(&inputs.v, &places.v)?,
            biases: biases.collect::<Result<_, _>>()?,
            key_mask: inputs.key_mask.as_ref().map(|host| put(host, &places.masks)).transpose()?,
            segments: match &inputs.segments {
                Some([q, k]) => Some([put(q, &places.masks)?, put(k, &places.masks)?]),
                None => None,
            },
            gate: inputs.gate.as_ref().map(|host| put(host, &places.gate)).transpose()?,
            d_out: put(&inputs.d_out, &places.d_out)?,
        })
    }

    /// A launch only reads its inputs.
    fn check_unchanged(&self, device: &dyn Backend, stream: &Stream) -> Result<(), String> {
        let mut named = vec![("q", &self.q), ("k", &self.k), ("v", &self.v), ("d_out", &self.d_out)];
        named.extend(self.biases.iter().map(|bias| ("a bias", bias)));
        named.extend(self.key_mask.iter().map(|mask| ("key_mask", mask)));
        named.extend(self.segments.iter().flatten().map(|ids| ("segments", ids)));
        named.extend(self.gate.iter().map(|gate| ("gate", gate)));
        for (name, buffer) in named {
            if !buffer.is_unchanged(device, stream)? {
                return Err(format!("{name}: an input was written"));
            }
        }
        Ok(())
    }

    fn biases(&self) -> Vec<TensorView<'_>> {
        self.biases.iter().map(|bias| bias.tensor().view()).collect()
    }

    fn key_mask(&self) -> Option<TensorView<'_>> {
        self.key_mask.as_ref().map(|mask| mask.tensor().view())
    }

    fn segments(&self, which: usize) -> Option<TensorView<'_>> {
        self.segments.as_ref().map(|segments| segments[which].tensor().view())
    }

    fn gate(&self) -> Option<TensorView<'_>> {
        self.gate.as_ref().map(|gate| gate.tensor().view())
    }
}

/// Gives out, lse and lse_low.
fn forward(
    device: &dyn Backend,
    stream: &Stream,
    case: &Case,
    plan: &AttentionPlan,
    inputs: &DeviceInputs,
    [want_lse, want_low]: [bool; 2],
) -> Result<[Buffer; 3], String> {
    let (problem, places) = (&plan.problem, &case.places);
    let lse = || Buffer::output(device, stream, DType::F32, &problem.lse_shape(), &places.lse);
    let mut outputs =
        [Buffer::output(device, stream, case.spec.dtype, &problem.out_shape(), &places.out)?, lse()?, lse()?];
    let [out, lse, lse_low] = &mut outputs;
    let operands = ForwardOperands {
        q: inputs.q.tensor().view(),
        k: inputs.k.tensor().view(),
        v: inputs.v.tensor().view(),
        biases: inputs.biases(),
        key_mask: inputs.key_mask(),
        q_segments: inputs.segments(0),
        k_segments: inputs.segments(1),
        gate: inputs.gate(),
        out: out.tensor_mut().view_mut(),
        lse: want_lse.then(|| lse.tensor_mut().view_mut()),
        lse_low: want_low.then(|| lse_low.tensor_mut().view_mut()),
    };
    let args = ForwardArgs::new(plan, operands).map_err(|e| format!("forward arguments: {e}"))?;
    device.attention_forward(stream, args).map_err(|e| format!("forward: {e}"))?;
    device.synchronize(stream).map_err(|e| format!("forward: {e}"))?;
    Ok(outputs)
}

/// Gives the gradients the case asks for.
fn backward(
    device: &dyn Backend,
    stream: &Stream,
    case: &Case,
    plan: &AttentionPlan,
    inputs: &DeviceInputs,
    [out, lse, lse_low]: &[Buffer; 3],
) -> Result<Vec<(String, Buffer)>, String> {
    let (problem, spec, places) = (&plan.problem, &case.spec, &case.places);
    let gradient = |wanted: bool, dtype, shape: &[usize], place: &Place| {
        wanted.then(|| Buffer::output(device, stream, dtype, shape, place)).transpose()
    };
    let (asked, place) = (spec.gradients, &places.gradients);
    let mut dq = gradient(asked.q, spec.dtype, &problem.q_shape(), place)?;
    let mut dk = gradient(asked.k, spec.dtype, &problem.k_shape(), place)?;
    let mut dv = gradient(asked.v, spec.dtype, &problem.v_shape(), place)?;
    let mut d_gate = gradient(asked.gate, spec.dtype, &problem.out_shape(), place)?;
    let mut dbiases = Vec::new();
    for ((bias, place), wanted) in spec.biases.iter().zip(&places.biases).zip(asked.biases) {
        let dtype = if places.f32_dbiases { DType::F32 } else { bias.dtype };
        dbiases.push(gradient(wanted, dtype, &bias.shape, place)?);
    }
    let operands = BackwardOperands {
        q: inputs.q.tensor().view(),
        k: inputs.k.tensor().view(),
        v: inputs.v.tensor().view(),
        biases: inputs.biases(),
        key_mask: inputs.key_mask(),
        q_segments: inputs.segments(0),
        k_segments: inputs.segments(1),
        gate: inputs.gate(),
        out: out.tensor().view(),
        lse: lse.tensor().view(),
        lse_low: lse_low.tensor().view(),
        d_out: inputs.d_out.tensor().view(),
        dq: dq.as_mut().map(|b| b.tensor_mut().view_mut()),
        dk: dk.as_mut().map(|b| b.tensor_mut().view_mut()),
        dv: dv.as_mut().map(|b| b.tensor_mut().view_mut()),
        dbiases: dbiases.iter_mut().map(|b| b.as_mut().map(|b| b.tensor_mut().view_mut())).collect(),
        d_gate: d_gate.as_mut().map(|b| b.tensor_mut().view_mut()),
    };
    let args = BackwardArgs::new(plan, operands).map_err(|e| format!("backward arguments: {e}"))?;
    device.attention_backward(stream, args).map_err(|e| format!("backward: {e}"))?;
    device.synchronize(stream).map_err(|e| format!("backward: {e}"))?;
    let named = [("dq", dq), ("dk", dk), ("dv", dv), ("d_gate", d_gate)];
    let mut results: Vec<_> = named.into_iter().filter_map(|(name, b)| Some((name.to_owned(), b?))).collect();
    results.extend(dbiases.into_iter().enumerate().filter_map(|(i, b)| Some((format!("dbias{i}"), b?))));
    Ok(results)
}
