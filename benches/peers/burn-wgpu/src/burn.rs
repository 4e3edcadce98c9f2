//! burn's side: its own attention function and the same written out, with and without its fusion of elementwise work.
//!
//! With a bias burn takes none of its fused attention kernels: all logits of all rows are in memory.

use anyhow::{Context, Result, anyhow};
use burn_autodiff::Autodiff;
use burn_backend::ops::AttentionModuleOptions;
use burn_backend::tensor::{Device, FloatTensor};
use burn_backend::{AutodiffBackend, Backend, TensorData, TensorMetadata};
use burn_wgpu::graphics::AutoGraphicsApi;
use burn_wgpu::{CubeBackend, RuntimeOptions, Wgpu, WgpuDevice, init_setup};
use tilefold_conformance::values::Inputs;

use crate::task::Task;
use crate::turns::Contender;

/// The adapter that burn computes on.
pub(crate) struct Adapter {
    pub(crate) name: String,
    pub(crate) driver: String,
    /// burn's name of its backend, which tells the language of its shaders.
    pub(crate) compiler: String,
    device: Device<CubeBackend>,
}

impl Adapter {
    /// Opens burn's default adapter.
    pub(crate) fn open() -> Result<Self> {
        let device = WgpuDevice::default();
        let info = init_setup::<AutoGraphicsApi>(&device, RuntimeOptions::default()).adapter.get_info();
        let device = device.into();
        let compiler = CubeBackend::name(&device);
        Ok(Self { name: info.name, driver: format!("{} {}", info.driver, info.driver_info), compiler, device })
    }

    /// Every way to compute the task's attention.
    pub(crate) fn contenders(&self, task: &Task, gradients: bool) -> Vec<(String, Box<dyn Contender>)> {
        let mut contenders = Vec::new();
        for formula in [Formula::Library, Formula::Composed] {
            let name = match formula {
                Formula::Library => "burn attention()",
                Formula::Composed => "burn, composed",
            };
            let fusing = boxed::<Wgpu>(&self.device, task, formula, gradients);
            let plain = boxed::<CubeBackend>(&self.device, task, formula, gradients);
            contenders.extend([(name.to_owned(), fusing), (format!("{name}, no fusion"), plain)]);
        }
        contenders
    }
}

fn boxed<B: Backend>(device: &Device<B>, task: &Task, formula: Formula, gradients: bool) -> Box<dyn Contender> {
    if gradients {
        Box::new(Training::<Autodiff<B>>::new(device, task, formula))
    } else {
        Box::new(Inference::<B>::new(device, task, formula))
    }
}

/// How attention is written.
#[derive(Clone, Copy)]
enum Formula {
    /// burn's function of that name.
    Library,
    /// Two products and a softmax, with the scale on q, the smallest place for it.
    Composed,
}

impl Formula {
    fn compute<B: Backend>(self, [q, k, v, bias]: [FloatTensor<B>; 4]) -> FloatTensor<B> {
        match self {
            Self::Library => B::attention(q, k, v, None, Some(bias), AttentionModuleOptions::default()),
            Self::Composed => {
                let scale = (q.shape().dims::<4>()[3] as f64).sqrt().recip();
                let logits = B::float_matmul(B::float_mul_scalar(q, scale.into()), B::float_transpose(k));
                B::float_matmul(B::softmax(B::float_add(logits, bias), 3), v)
            }
        }
    }
}

/// The output alone.
struct Inference<B: Backend> {
    device: Device<B>,
    formula: Formula,
    inputs: [FloatTensor<B>; 4],
    out: Option<FloatTensor<B>>,
}

impl<B: Backend> Inference<B> {
    fn new(device: &Device<B>, task: &Task, formula: Formula) -> Self {
        Self { device: device.clone(), formula, inputs: inputs::<B>(device, task), out: None }
    }
}

impl<B: Backend> Contender for Inference<B> {
    fn run(&mut self) -> Result<()> {
        // Its memory is free for this pass.
        self.out = None;
        self.out = Some(self.formula.compute::<B>(self.inputs.clone()));
        B::sync(&self.device).map_err(|error| anyhow!("{error:?}"))
    }

    fn results(self: Box<Self>) -> Result<Vec<(&'static str, Vec<f64>)>> {
        Ok(vec![("out", download::<B>("out", self.out.context("no pass")?)?)])
    }
}

/// The output, and the gradients of all inputs by burn's automatic differentiation.
struct Training<A: AutodiffBackend> {
    device: Device<A>,
    formula: Formula,
    inputs: [FloatTensor<A>; 4],
    d_out: FloatTensor<A>,
    results: Vec<FloatTensor<A::InnerBackend>>,
}

impl<A: AutodiffBackend> Training<A> {
    fn new(device: &Device<A>, task: &Task, formula: Formula) -> Self {
        let inputs = inputs::<A>(device, task).map(|input| A::float_set_require_grad(input, true));
        let d_out = heads_first::<A>(device, task, &task.inputs.d_out.values);
        Self { device: device.clone(), formula, inputs, d_out, results: Vec::new() }
    }
}

impl<A: AutodiffBackend> Contender for Training<A> {
    fn run(&mut self) -> Result<()> {
        self.results.clear();
        let out = self.formula.compute::<A>(self.inputs.clone());
        self.results.push(A::inner(out.clone()));
        // The gradient of this sum with respect to out is d_out.
        let mut gradients = A::backward(A::float_sum(A::float_mul(out, self.d_out.clone())));
        for input in &self.inputs {
            self.results.push(A::grad_remove(input, &mut gradients).context("no gradient")?);
        }
        A::sync(&self.device).map_err(|error| anyhow!("{error:?}"))
    }

    fn results(self: Box<Self>) -> Result<Vec<(&'static str, Vec<f64>)>> {
        let names = ["out", "dq", "dk", "dv", "dbias0"];
        let results = names.into_iter().zip(self.results);
        results.map(|(name, tensor)| Ok((name, download::<A::InnerBackend>(name, tensor)?))).collect()
    }
}

/// q, k, v and the bias, in the order of axes that burn wants: `[rows, heads, L, channels]`, `[1, heads, L, L]`.
fn inputs<B: Backend>(device: &Device<B>, task: &Task) -> [FloatTensor<B>; 4] {
    let Inputs { q, k, v, biases, .. } = &task.inputs;
    let [_, length, heads, _] = task.shape;
    let bias = upload::<B>(device, &biases[0].values, [1, heads, length, length]);
    let [q, k, v] = [q, k, v].map(|host| heads_first::<B>(device, task, &host.values));
    [q, k, v, bias]
}

/// A tensor from values with the axes of q.
fn heads_first<B: Backend>(device: &Device<B>, task: &Task, values: &[f64]) -> FloatTensor<B> {
    let [rows, length, heads, channels] = task.shape;
    upload::<B>(device, &swapped(values, task.shape), [rows, heads, length, channels])
}

fn upload<B: Backend>(device: &Device<B>, values: &[f64], shape: [usize; 4]) -> FloatTensor<B> {
    let values: Vec<f32> = values.iter().map(|&value| value as f32).collect();
    B::float_from_data(TensorData::new(values, shape), device)
}

/// A result's values with tilefold's order of axes; a bias has the same in both.
fn download<B: Backend>(name: &str, tensor: FloatTensor<B>) -> Result<Vec<f64>> {
    let shape = tensor.shape().dims::<4>();
    let data = pollster::block_on(B::float_into_data(tensor)).map_err(|error| anyhow!("{error:?}"))?;
    let values: Vec<f32> = data.try_into_vec().map_err(|error| anyhow!("{error:?}"))?;
    let values: Vec<f64> = values.into_iter().map(f64::from).collect();
    Ok(if name == "dbias0" { values } else { swapped(&values, shape) })
}

/// Row-major values with the second and third axis swapped.
fn swapped(values: &[f64], [rows, second, third, last]: [usize; 4]) -> Vec<f64> {
    let at = |row: usize, i: usize, j: usize| ((row * second + i) * third + j) * last;
    let order = (0..rows).flat_map(|row| (0..third).flat_map(move |j| (0..second).map(move |i| (row, i, j))));
    order.flat_map(|(row, i, j)| &values[at(row, i, j)..][..last]).copied().collect()
}
