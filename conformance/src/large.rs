//! Tensors of more than 2^31 elements: always by strides over memory nobody touches, and for real where memory
//! suffices.

use std::sync::Arc;

use tilefold_core::{
    AttentionPlan, AttentionProblem, AttentionSpec, Backend, BackwardArgs, BackwardOperands, BiasSpec, DType,
    DeviceError, ForwardArgs, ForwardOperands, Gradients, Layout, Precision, RelayoutArgs, Stream, Tensor, TensorView,
    TensorViewMut,
};

use crate::buffer::{Buffer, Downloaded};
use crate::case::{Case, Place, Values};
use crate::exchange::Results;
use crate::oracle::Expected;
use crate::packed::{Packed, pack, packed_shape, unpack};
use crate::suite::{Outcome, Trial};
use crate::values::{Host, Inputs};

const GROUP: &str = "large";

/// Elements from one row to the next: beyond unsigned 32-bit indices, or beyond signed ones where a system does not
/// give out so many addresses. Multiples of the step from one position of packed q, k and v to the next (3 · 2 heads · 8
/// channels), as in a slice of something larger.
const FAR: [i64; 2] = [(1 << 32) + 12_320, (1 << 31) + 12_304];

const _: () = assert!(FAR[0] % 48 == 0 && FAR[1] % 48 == 0);

/// Memory the problem of more than 2^31 elements needs: q and dq of 4.3 GB each, a small out, lse, and room to breathe.
const REAL_BYTES: u64 = 11 << 30;

/// In CI a machine with this much memory may not skip it.
const CI_BYTES: u64 = 20 << 30;

pub(crate) fn trials(device: &Arc<dyn Backend>, precision: Precision) -> Vec<Trial> {
    let trial = |name: &str, run: fn(&dyn Backend, Precision) -> Result<Outcome, String>| {
        let device = Arc::clone(device);
        Trial {
            group: GROUP,
            name: format!("{precision}/{GROUP}/{name}"),
            run: Box::new(move || run(&*device, precision)),
        }
    };
    let mut trials = vec![trial("far_strides", far_strides)];
    if precision.dtype == DType::BF16 {
        trials.push(trial("2^31_elements", many_elements));
    }
    trials
}

/// What a launch on a device needs besides data.
struct Launch<'a> {
    device: &'a dyn Backend,
    stream: Stream,
    /// Elements between rows that lie far apart.
    far: i64,
}

/// Memory that does not suffice, or a failure.
enum Obstacle {
    Memory(String),
    Failure(String),
}

impl From<String> for Obstacle {
    fn from(message: String) -> Self {
        Self::Failure(message)
    }
}

impl Launch<'_> {
    /// Whether allocated memory costs nothing until it is used: tried with 1 GiB.
    fn maps_lazily(&self) -> Result<bool, String> {
        let before = resident_pages();
        let storage = self.device.alloc(&self.stream, 1 << 30).map_err(|e| e.to_string())?;
        let after = resident_pages();
        drop(storage);
        // Pages are 4 KiB or larger.
        Ok(before.zip(after).is_some_and(|(before, after)| after.saturating_sub(before) < 1 << 14))
    }

    fn alloc(&self, dtype: DType, layout: Layout) -> Result<Tensor, Obstacle> {
        let elements = usize::try_from(layout.extent().end).map_err(|e| e.to_string())?;
        let storage = self.device.alloc(&self.stream, elements * dtype.size_bytes()).map_err(|error| match error {
            DeviceError::OutOfMemory { .. } => Obstacle::Memory(error.to_string()),
            error => Obstacle::Failure(error.to_string()),
        })?;
        Ok(Tensor::new(storage, dtype, layout).map_err(|e| e.to_string())?)
    }

    fn dense(&self, dtype: DType, shape: &[usize]) -> Result<Tensor, Obstacle> {
        self.alloc(dtype, Layout::contiguous(shape).map_err(|e| e.to_string())?)
    }

    fn upload(&self, host: &Host) -> Result<Buffer, String> {
        Buffer::input(self.device, &self.stream, host, &Place::default())
    }

    fn copy(&self, source: TensorView<'_>, destination: TensorViewMut<'_>) -> Result<(), String> {
        let args = RelayoutArgs::new(source, destination).map_err(|e| format!("relayout arguments: {e}"))?;
        self.device.relayout(&self.stream, args).map_err(|e| format!("relayout: {e}"))
    }

    fn read(&self, view: TensorView<'_>) -> Result<Downloaded, String> {
        let mut buffer = Buffer::output(self.device, &self.stream, view.dtype(), view.shape(), &Place::default())?;
        self.copy(view, buffer.tensor_mut().view_mut())?;
        buffer.download(self.device, &self.stream)
    }

    /// A tensor whose rows (axis 1) lie far apart.
    fn far(&self, dtype: DType, shape: &[usize]) -> Result<Tensor, Obstacle> {
        let mut strides = Layout::contiguous(shape).map_err(|e| e.to_string())?.strides().to_vec();
        strides[1] = self.far;
        self.alloc(dtype, Layout::new(shape, &strides, 0).map_err(|e| e.to_string())?)
    }

    fn upload_far(&self, host: &Host) -> Result<Tensor, Obstacle> {
        let mut tensor = self.far(host.dtype, &host.shape)?;
        self.copy(self.upload(host)?.tensor().view(), tensor.view_mut())?;
        Ok(tensor)
    }
}

fn launch(device: &dyn Backend) -> Result<Launch<'_>, String> {
    Ok(Launch { device, stream: device.stream().map_err(|e| e.to_string())?, far: FAR[0] })
}

fn outcome(result: Result<f64, Obstacle>) -> Result<Outcome, String> {
    match result {
        Ok(worst) => Ok(Outcome::Passed { worst }),
        Err(Obstacle::Memory(reason)) => Ok(Outcome::Skipped { reason }),
        Err(Obstacle::Failure(message)) => Err(message),
    }
}

/// Two rows 2^32 elements apart: positions no 32-bit index reaches, in memory that is mapped but hardly touched.
fn far_strides(device: &dyn Backend, precision: Precision) -> Result<Outcome, String> {
    let Precision { dtype, products } = precision;
    let mut spec = AttentionSpec::new(dtype, 1, 2, 37, 2, 8).with_all_gradients();
    spec.products = products;
    spec.biases = vec![BiasSpec { shape: [1, 2, 2, 37, 37], dtype }];
    let mut case = Case::new(GROUP, "far_strides", spec.with_all_gradients());
    case.spec.mask.causal = true;
    let mut launch = launch(device)?;
    // q, k and v; bias; d_out; out; gradients; dbias; lse and lse_low.
    let bytes = u64::try_from(FAR[1]).unwrap_or(0) * u64::try_from(6 * dtype.size_bytes() + 2 * 4).unwrap_or(0);
    let [_, available] = memory_bytes(device);
    if available < bytes && !launch.maps_lazily()? {
        let reason =
            format!("needs {bytes} bytes of address space, {available} are available, and allocation touches memory");
        return Ok(Outcome::Skipped { reason });
    }
    let mut result = check_far(&launch, &case);
    if let Err(Obstacle::Memory(_)) = result {
        launch.far = FAR[1];
        result = check_far(&launch, &case);
    }
    outcome(result)
}

/// Memory in all, and what is free of it now: to this process, where a container allows it less. All of it on devices
/// that cannot tell.
fn memory_bytes(device: &dyn Backend) -> [u64; 2] {
    let info = device.info();
    if !info.id.is_host() {
        return [info.memory_bytes; 2];
    }
    let memory = tilefold::host_memory();
    [memory.total_bytes, memory.available_bytes]
}

/// Resident pages of this process; `None` where the system does not say.
fn resident_pages() -> Option<u64> {
    std::fs::read_to_string("/proc/self/statm").ok()?.split(' ').nth(1)?.parse().ok()
}

fn check_far(launch: &Launch<'_>, case: &Case) -> Result<f64, Obstacle> {
    let problem = AttentionProblem::new(case.spec.clone()).map_err(|e| e.to_string())?;
    let plan = launch.device.plan_attention(&problem).map_err(|e| e.to_string())?;
    let (inputs, dtype) = (Inputs::draw(case), case.spec.dtype);
    let qkv = launch.upload_far(&pack(&inputs))?;
    let (bias, d_out) = (launch.upload_far(&inputs.biases[0])?, launch.upload_far(&inputs.d_out)?);
    let mut out = launch.far(dtype, &problem.out_shape())?;
    let mut lse = launch.far(DType::F32, &problem.lse_shape())?;
    let mut lse_low = launch.far(DType::F32, &problem.lse_shape())?;
    let mut gradients = launch.far(dtype, &packed_shape(&problem.q_shape()))?;
    let mut dbias = launch.far(dtype, &inputs.biases[0].shape)?;
    let packed = Packed {
        qkv: &qkv,
        bias: Some(&bias),
        d_out: &d_out,
        out: &mut out,
        lse: &mut lse,
        lse_low: &mut lse_low,
        gradients: &mut gradients,
        dbias: Some(&mut dbias),
    };
    packed.run(launch.device, &launch.stream, &plan)?;
    let mut results = unpack(&launch.read(gradients.view())?.values, case.spec.heads * case.spec.head_dim);
    for (name, tensor) in [("out", &out), ("lse", &lse), ("lse_low", &lse_low), ("dbias0", &dbias)] {
        results.push((name.to_owned(), launch.read(tensor.view())?));
    }
    Ok(Expected::of(case, &inputs)?.check(case, &results)?)
}

/// q and dq of more than 2^31 elements each. All rows but the last are alike; k, v and d_out are shared.
fn many_elements(device: &dyn Backend, precision: Precision) -> Result<Outcome, String> {
    let [total, available] = memory_bytes(device);
    if available < REAL_BYTES {
        let reason = format!("needs {REAL_BYTES} bytes of memory, {available} are available");
        let in_ci = std::env::var("CI").is_ok_and(|value| value == "true");
        let must = in_ci && device.info().id.is_host() && total >= CI_BYTES;
        return if must { Err(reason) } else { Ok(Outcome::Skipped { reason }) };
    }
    let mut spec = AttentionSpec::new(precision.dtype, 1, 2, 64, 8, 64);
    spec.products = precision.products;
    (spec.seqlen_k, spec.head_dim_v) = (4, 8);
    spec.gradients = Gradients { q: true, ..Gradients::default() };
    // Two rows stand for all: the first ones, and the last.
    let mut case = Case::new(GROUP, "2^31_elements", spec);
    case.places.k.repeated = vec![1];
    case.places.v.repeated = vec![1];
    case.places.d_out.repeated = vec![1];
    case.fill.q = Values::Normal(1.0);
    outcome(check_many(&launch(device)?, &case))
}

/// Tensors of the large problem.
struct Many {
    q: Tensor,
    out: Tensor,
    lse: Tensor,
    lse_low: Tensor,
    dq: Tensor,
}

fn check_many(launch: &Launch<'_>, case: &Case) -> Result<f64, Obstacle> {
    let inputs = Inputs::draw(case);
    let row = case.spec.seqlen_q * case.spec.heads * case.spec.head_dim;
    let rows = (1_usize << 31) / row + 3;
    let mut spec = case.spec.clone();
    spec.rows = rows;
    let problem = AttentionProblem::new(spec).map_err(|e| e.to_string())?;
    let plan = launch.device.plan_attention(&problem).map_err(|e| e.to_string())?;
    let q_shape = problem.q_shape();
    let mut many = Many {
        q: launch.dense(case.spec.dtype, &q_shape)?,
        out: launch.dense(case.spec.dtype, &problem.out_shape())?,
        lse: launch.dense(DType::F32, &problem.lse_shape())?,
        lse_low: launch.dense(DType::F32, &problem.lse_shape())?,
        dq: launch.dense(case.spec.dtype, &q_shape)?,
    };
    let (q, last) = (launch.upload(&inputs.q)?, rows - 1);
    let two = q.tensor().view();
    let one = |row: usize| two.slice(1, row..row + 1, 1).map_err(|e| e.to_string());
    launch.copy(one(0)?.expand(&q_shape).map_err(|e| e.to_string())?, many.q.view_mut())?;
    launch.copy(one(1)?, many.q.view_mut().slice(1, last..rows, 1).map_err(|e| e.to_string())?)?;
    run_many(launch, &plan, &inputs, &mut many)?;

    let expected = Expected::of(case, &inputs)?;
    let boundary = (1_usize << 31) / row;
    let mut worst = 0.0_f64;
    for sample in [0, 1, rows / 2, boundary - 1, boundary, boundary + 1] {
        worst = worst.max(expected.check(case, &many.rows(launch, sample, last)?)?);
    }
    Ok(worst)
}

impl Many {
    /// Results of two rows, as the small case has them.
    fn rows(&self, launch: &Launch<'_>, first: usize, last: usize) -> Result<Results, String> {
        let named = [("out", &self.out), ("lse", &self.lse), ("lse_low", &self.lse_low), ("dq", &self.dq)];
        let mut results = Results::new();
        for (name, tensor) in named {
            let read = |row: usize| launch.read(tensor.view().slice(1, row..row + 1, 1).map_err(|e| e.to_string())?);
            let values = [read(first)?.values, read(last)?.values].concat();
            results.push((name.to_owned(), Downloaded { values, bytes: Vec::new() }));
        }
        Ok(results)
    }
}

/// Row 0 of a tensor for every row, with a stride of 0.
fn first_row_everywhere(view: TensorView<'_>, shape: [usize; 5]) -> Result<TensorView<'_>, String> {
    view.slice(1, 0..1, 1).and_then(|row| row.expand(&shape)).map_err(|e| e.to_string())
}

fn run_many(launch: &Launch<'_>, plan: &AttentionPlan, inputs: &Inputs, many: &mut Many) -> Result<(), String> {
    let shared = [&inputs.k, &inputs.v, &inputs.d_out].map(|host| launch.upload(host));
    let [k, v, d_out] = shared;
    let (k, v, d_out) = (k?, v?, d_out?);
    let problem = &plan.problem;
    let k_view = first_row_everywhere(k.tensor().view(), problem.k_shape())?;
    let v_view = first_row_everywhere(v.tensor().view(), problem.v_shape())?;
    let d_view = first_row_everywhere(d_out.tensor().view(), problem.out_shape())?;
    let operands = ForwardOperands {
        q: many.q.view(),
        k: k_view.clone(),
        v: v_view.clone(),
        biases: Vec::new(),
        key_mask: None,
        q_segments: None,
        k_segments: None,
        gate: None,
        out: many.out.view_mut(),
        lse: Some(many.lse.view_mut()),
        lse_low: Some(many.lse_low.view_mut()),
    };
    let args = ForwardArgs::new(plan, operands).map_err(|e| e.to_string())?;
    launch.device.attention_forward(&launch.stream, args).map_err(|e| format!("forward: {e}"))?;
    let operands = BackwardOperands {
        q: many.q.view(),
        k: k_view,
        v: v_view,
        biases: Vec::new(),
        key_mask: None,
        q_segments: None,
        k_segments: None,
        gate: None,
        out: many.out.view(),
        lse: many.lse.view(),
        lse_low: many.lse_low.view(),
        d_out: d_view,
        dq: Some(many.dq.view_mut()),
        dk: None,
        dv: None,
        dbiases: Vec::new(),
        d_gate: None,
    };
    let args = BackwardArgs::new(plan, operands).map_err(|e| e.to_string())?;
    launch.device.attention_backward(&launch.stream, args).map_err(|e| format!("backward: {e}"))?;
    launch.device.synchronize(&launch.stream).map_err(|e| e.to_string())
}
