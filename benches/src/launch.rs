//! One attention with its operands and results in place, so that a timing holds the launches and nothing else.

use std::time::{Duration, Instant};

use tilefold::{
    AttentionPlan, AttentionProblem, Backend, Backward, BackwardArgs, DType, Device, DeviceError, Error, Forward,
    ForwardArgs, Gradients, Inputs, Options, Precision, ProblemError, Stream, StructuralMask, Tensor, TensorViewMut,
    Timing, all_gradients, problem,
};

use crate::operands::FULL_RANK;
use crate::{Omitted, Operands, Pass, Workload};

/// Axes of lse.
const LSE_RANK: usize = 4;

/// A planned attention and its memory.
#[derive(Debug)]
pub struct Launch {
    device: Device,
    stream: Stream,
    plan: AttentionPlan,
    operands: Operands,
    forward: Forward,
    backward: Option<Backward>,
}

impl Launch {
    /// Plans an attention and allocates everything it writes, each result with as many axes as its operand has.
    ///
    /// # Errors
    /// [`Error::Problem`] for operands that do not fit each other, `d_out` of gradients included, [`Error::Device`] for
    /// too little memory.
    pub fn new(device: &Device, operands: Operands, options: &Options, gradients: Gradients) -> Result<Self, Error> {
        let stream = device.stream()?;
        let operands = operands.into_device(device)?;
        let plan = device.plan_attention(&problem(&operands.inputs()?, options, gradients)?)?;
        let mut forward = forward_results(device, &plan.problem, &operands)?;
        let has_backward = gradients != Gradients::default();
        let mut backward = has_backward.then(|| gradient_results(device, &operands, gradients)).transpose()?;
        touch(device, &stream, &mut forward, backward.as_mut())?;
        if let Some(backward) = &mut backward {
            // What backward would refuse is refused before the work of forward.
            backward_args(&plan, &operands, &forward, backward)?;
        }
        Ok(Self { device: device.clone(), stream, plan, operands, forward, backward })
    }

    /// A workload with random inputs; with every gradient if the pass has any.
    ///
    /// # Errors
    /// As [`Launch::new`].
    pub fn of_workload(
        device: &Device,
        workload: &Workload,
        precision: impl Into<Precision>,
        pass: Pass,
    ) -> Result<Self, Error> {
        let Precision { dtype, products } = precision.into();
        let mask = StructuralMask { causal: workload.causal, ..StructuralMask::default() };
        let operands = Operands::random(workload, dtype, pass.has_gradients())?;
        let gradients = if pass.has_gradients() { all_gradients(&operands.inputs()?) } else { Gradients::default() };
        Self::new(device, operands, &Options { mask, products, ..Options::default() }, gradients)
    }

    /// The same with operands and results on the host, to be looked at; it cannot run again on a device with other memory.
    ///
    /// # Errors
    /// What the device reports.
    pub fn into_host(self) -> Result<Self, Error> {
        let device = &self.device;
        let operands = self.operands.into_host(device)?;
        let forward = self.forward.into_host(device)?;
        let backward = self.backward.map(|backward| backward.into_host(device)).transpose()?;
        Ok(Self { operands, forward, backward, ..self })
    }

    /// The problem that is solved.
    #[must_use]
    pub fn problem(&self) -> &AttentionProblem {
        &self.plan.problem
    }

    /// How the device solves it.
    #[must_use]
    pub fn plan(&self) -> &AttentionPlan {
        &self.plan
    }

    /// What is read.
    #[must_use]
    pub fn operands(&self) -> &Operands {
        &self.operands
    }

    /// What [`Launch::forward`] wrote.
    #[must_use]
    pub fn forward_results(&self) -> &Forward {
        &self.forward
    }

    /// What [`Launch::backward`] wrote, if gradients were asked for.
    #[must_use]
    pub fn backward_results(&self) -> Option<&Backward> {
        self.backward.as_ref()
    }

    /// Writes output and lse, and waits for them.
    ///
    /// # Errors
    /// What the device reports.
    pub fn forward(&mut self) -> Result<(), Error> {
        self.enqueue_forward()?;
        Ok(self.device.synchronize(&self.stream)?)
    }

    fn enqueue_forward(&mut self) -> Result<(), Error> {
        let omitted = self.operands.omitted;
        let Forward { out, lse, lse_low } = &mut self.forward;
        let out = omitted.lift_mut(out.view_mut(), FULL_RANK)?;
        let lse = omitted.lift_mut(lse.view_mut(), LSE_RANK)?;
        let lse_low = omitted.lift_mut(lse_low.view_mut(), LSE_RANK)?;
        let operands = self.operands.inputs()?.forward_operands(out, Some(lse), Some(lse_low));
        Ok(self.device.attention_forward(&self.stream, ForwardArgs::new(&self.plan, operands)?)?)
    }

    /// Writes the gradients asked for from what [`Launch::forward`] wrote, and waits for them.
    ///
    /// # Errors
    /// [`ProblemError::Missing`] for a launch without `d_out` or gradients, and what the device reports.
    pub fn backward(&mut self) -> Result<(), Error> {
        self.enqueue_backward()?;
        Ok(self.device.synchronize(&self.stream)?)
    }

    fn enqueue_backward(&mut self) -> Result<(), Error> {
        let Some(backward) = &mut self.backward else {
            return Err(ProblemError::Missing { tensor: "d_out", reason: NO_BACKWARD }.into());
        };
        let args = backward_args(&self.plan, &self.operands, &self.forward, backward)?;
        Ok(self.device.attention_backward(&self.stream, args)?)
    }

    fn enqueue(&mut self, pass: Pass) -> Result<(), Error> {
        if pass != Pass::Backward {
            self.enqueue_forward()?;
        }
        if pass.has_gradients() {
            self.enqueue_backward()?;
        }
        Ok(())
    }

    /// Runs a pass and says how long it took by the best clock that the device has.
    ///
    /// # Errors
    /// As [`Launch::forward`] and [`Launch::backward`].
    pub fn clocked(&mut self, pass: Pass) -> Result<Timing, Error> {
        let (device, stream, mut result) = (self.device.clone(), self.stream.clone(), Ok(()));
        let timing = device.timed(&stream, &mut || result = self.enqueue(pass))?;
        result.map(|()| timing)
    }

    /// Runs a pass and says how long it took by the host's clock.
    ///
    /// # Errors
    /// As [`Launch::forward`] and [`Launch::backward`].
    pub fn timed(&mut self, pass: Pass) -> Result<Duration, Error> {
        let start = Instant::now();
        self.enqueue(pass)?;
        self.device.synchronize(&self.stream)?;
        Ok(start.elapsed())
    }
}

const NO_BACKWARD: &str = "a backward pass needs it, and gradients to write";

/// A backward launch, checked.
fn backward_args<'a>(
    plan: &'a AttentionPlan,
    operands: &'a Operands,
    forward: &'a Forward,
    backward: &'a mut Backward,
) -> Result<BackwardArgs<'a>, ProblemError> {
    let omitted = operands.omitted;
    let d_out = operands.d_out.as_ref().ok_or(ProblemError::Missing { tensor: "d_out", reason: NO_BACKWARD })?;
    let mut views = operands.inputs()?.backward_operands(forward, &operands.full(d_out)?, backward);
    views.out = omitted.lift(&views.out, FULL_RANK)?;
    views.lse = omitted.lift(&views.lse, LSE_RANK)?;
    views.lse_low = omitted.lift(&views.lse_low, LSE_RANK)?;
    for gradient in [&mut views.dq, &mut views.dk, &mut views.dv, &mut views.d_gate] {
        lift_in_place(gradient, omitted)?;
    }
    views.dbiases.iter_mut().try_for_each(|gradient| lift_in_place(gradient, omitted))?;
    BackwardArgs::new(plan, views)
}

fn lift_in_place(view: &mut Option<TensorViewMut<'_>>, omitted: Omitted) -> Result<(), ProblemError> {
    *view = view.take().map(|view| omitted.lift_mut(view, FULL_RANK)).transpose()?;
    Ok(())
}

/// Memory for out and lse with as many axes as q.
fn forward_results(device: &Device, problem: &AttentionProblem, operands: &Operands) -> Result<Forward, Error> {
    let rank = operands.q.shape().len();
    let zeros = |dtype, full: &[usize]| {
        let left_out = FULL_RANK.saturating_sub(rank);
        device.zeros(dtype, &operands.omitted.lower(full, full.len() - left_out))
    };
    let lse = || zeros(DType::F32, &problem.lse_shape());
    Ok(Forward { out: zeros(problem.spec().dtype, &problem.out_shape())?, lse: lse()?, lse_low: lse()? })
}

/// Memory for the gradients asked for, each shaped like its operand.
fn gradient_results(device: &Device, operands: &Operands, gradients: Gradients) -> Result<Backward, Error> {
    // As given, without the axes that `Operands::inputs` inserts.
    let mut given = Inputs::new(operands.q.view(), operands.k.view(), operands.v.view());
    given.biases = operands.biases.iter().map(Tensor::view).collect();
    given.gate = operands.gate.as_ref().map(Tensor::view);
    Backward::zeros(device, &given, gradients)
}

/// Writes to all results once: the system gives pages on first use, and that is no part of an attention's time.
fn touch(
    device: &Device,
    stream: &Stream,
    forward: &mut Forward,
    backward: Option<&mut Backward>,
) -> Result<(), DeviceError> {
    let mut results = vec![&mut forward.out, &mut forward.lse, &mut forward.lse_low];
    if let Some(Backward { dq, dk, dv, d_gate, dbiases }) = backward {
        results.extend([dq, dk, dv, d_gate].into_iter().flatten());
        results.extend(dbiases.iter_mut().flatten());
    }
    results.into_iter().try_for_each(|result| device.fill(stream, result.view_mut(), 0.0))?;
    device.synchronize(stream)
}

#[cfg(test)]
mod tests {
    use tilefold::reference::{self, ReferenceInputs};

    use super::*;
    use crate::find;

    fn small(pass: Pass) -> Launch {
        let workload = Workload { rows: 2, seqlen: 9, ..find("small").unwrap() };
        Launch::of_workload(&Device::cpu().unwrap(), &workload, DType::F32, pass).unwrap()
    }

    #[test]
    fn a_launch_computes_its_workload() {
        let mut launch = small(Pass::Both);
        launch.timed(Pass::Both).unwrap();
        let inputs = launch.operands().inputs().unwrap();
        let (q, k, v, mask) = (&inputs.q, &inputs.k, &inputs.v, inputs.key_mask.as_ref());
        let exact =
            ReferenceInputs::from_views(launch.problem(), q, k, v, &inputs.biases, mask, None, None, None).unwrap();
        let d_out = launch.operands().d_out.as_ref().unwrap().to_f64().unwrap();
        let expected = reference::backward(launch.problem(), &exact, &d_out);
        let got = launch.backward_results().unwrap().dbiases[0].as_ref().unwrap().to_f64().unwrap();
        assert!(got.iter().zip(&expected.dbiases[0]).all(|(got, expected)| (got - expected).abs() < 1e-4));
        let expected = reference::forward(launch.problem(), &exact).out;
        let got = launch.forward_results().out.to_f64().unwrap();
        assert!(got.iter().zip(&expected).all(|(got, expected)| (got - expected).abs() < 1e-4));
    }

    #[test]
    fn axes_that_are_left_out_change_no_value() {
        let mut full = small(Pass::Both);
        full.timed(Pass::Both).unwrap();
        let again = |tensor: &Tensor, shape: &[usize]| {
            Tensor::from_f64(&tensor.to_f64().unwrap(), tensor.dtype(), shape).unwrap()
        };
        let from = full.operands();
        let [q, k, v] = [&from.q, &from.k, &from.v].map(|tensor| again(tensor, &[2, 9, 4, 32]));
        let mut operands = Operands::new(q, k, v);
        operands.biases.push(again(&from.biases[0], &[4, 9, 9]));
        operands.key_mask = from.key_mask.as_ref().map(|mask| again(mask, &[2, 9]));
        operands.d_out = from.d_out.as_ref().map(|d_out| again(d_out, &[2, 9, 4, 32]));
        let wanted = all_gradients(&operands.inputs().unwrap());
        let mut lifted = Launch::new(&full.device, operands, &Options::default(), wanted).unwrap();
        lifted.timed(Pass::Both).unwrap();
        assert_eq!(lifted.forward_results().lse.shape(), [2, 4, 9]);
        assert_eq!(lifted.forward_results().out.to_f64(), full.forward_results().out.to_f64());
        let dbias = |launch: &Launch| launch.backward_results().unwrap().dbiases[0].as_ref().unwrap().to_f64();
        assert_eq!(dbias(&lifted), dbias(&full));
    }

    #[test]
    fn a_wrong_d_out_is_refused_before_any_work() {
        let launch = small(Pass::Both);
        let mut operands = launch.operands;
        operands.d_out = Some(Tensor::from_f64(&[0.0; 4], DType::F32, &[1, 1, 1, 1, 4]).unwrap());
        let wanted = all_gradients(&operands.inputs().unwrap());
        let refused = Launch::new(&launch.device, operands, &Options::default(), wanted).unwrap_err();
        assert!(matches!(refused, Error::Problem(ProblemError::Shape { tensor: "d_out", .. })), "{refused}");
    }

    #[test]
    fn a_forward_launch_has_no_backward() {
        let result = small(Pass::Forward).backward();
        assert!(matches!(result, Err(Error::Problem(ProblemError::Missing { tensor: "d_out", .. }))));
    }
}
