//! A device whose memory and forward pass are the CPU's, and whose backward pass is the kernels in the interpreter.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, OnceLock};

use tilefold_backend_cpu::CpuBackend;
use tilefold_core::{
    AttentionPlan, AttentionProblem, Backend, BackwardArgs, DType, DeviceError, DeviceInfo, DeviceResult, Event,
    ForwardArgs, MergeArgs, RelayoutArgs, Storage, Stream, TensorView, TensorViewMut,
};
use tilefold_emulator_nvrtc::{Nvrtc, Release, Target};
use tilefold_emulator_ptx::{Launch, Memory, Module, run};
use tilefold_kernels::params::{Operand, Params};
use tilefold_kernels::{
    AttentionOperands, BackwardLaunch, BackwardOperands, Kernel, backward, backward_workspace_bytes,
    kv_lengths_strides,
};

/// The device.
#[derive(Debug)]
pub struct EmulatedBackward {
    cpu: CpuBackend,
    nvrtc: Nvrtc,
    /// Parsed kernels by the hash of their source.
    modules: Mutex<HashMap<String, Arc<Module>>>,
}

/// A view's place in the interpreter's memory.
struct Placed {
    address: u64,
    first: i64,
    size: usize,
}

fn failure(message: String) -> DeviceError {
    DeviceError::Driver { call: "interpreter", status: 1, message }
}

impl EmulatedBackward {
    /// The one device of this process.
    pub fn shared() -> Result<&'static Self, String> {
        static DEVICE: OnceLock<Result<EmulatedBackward, String>> = OnceLock::new();
        let make = || {
            let nvrtc = match std::env::var_os("TILEFOLD_NVRTC") {
                Some(path) => Nvrtc::load(path.as_ref()),
                None => Nvrtc::fetched(Release::Newest),
            };
            let nvrtc = nvrtc.map_err(|e| e.to_string())?;
            let cpu = CpuBackend::new().map_err(|e| e.to_string())?;
            Ok(EmulatedBackward { cpu, nvrtc, modules: Mutex::default() })
        };
        DEVICE.get_or_init(make).as_ref().map_err(Clone::clone)
    }

    fn module(&self, kernel: &Kernel) -> Result<Arc<Module>, String> {
        if let Some(module) = self.modules.lock().unwrap().get(&kernel.hash) {
            return Ok(Arc::clone(module));
        }
        let compiled = self.nvrtc.compile(&kernel.source, Target::Ptx("compute_80"), &["--std=c++17"]);
        let compiled = compiled.map_err(|e| format!("{}: {e}", kernel.name))?;
        let module = Module::parse(compiled.text().map_err(|e| e.to_string())?);
        let module = Arc::new(module.map_err(|e| format!("{}: {e}", kernel.name))?);
        self.modules.lock().unwrap().insert(kernel.hash.clone(), Arc::clone(&module));
        Ok(module)
    }

    fn launch<P: Params>(&self, memory: &Memory, launch: &tilefold_kernels::Launch<P>) -> Result<(), String> {
        let module = self.module(&launch.kernel)?;
        let kernel = module.kernel(launch.kernel.entry).ok_or("no such entry")?;
        for (blocks, params) in launch.parts() {
            let launched = Launch {
                kernel,
                module: &module,
                grid: [blocks, 1, 1],
                block: [launch.kernel.block_threads, 1, 1],
                dynamic_shared_bytes: launch.kernel.dynamic_shared_bytes,
                parameters: bytemuck::bytes_of(&params),
            };
            run(memory, &launched).map_err(|fault| format!("{}: {fault}", launch.kernel.name))?;
        }
        Ok(())
    }

    fn backward(&self, args: BackwardArgs<'_>) -> Result<(), String> {
        let problem = &args.plan().problem;
        let spec = problem.spec();
        let mut o = args.into_operands();
        let memory = Memory::new(1 << 30);
        let put = |view: &TensorView<'_>| put(&memory, view);
        let operand = |view: &TensorView<'_>| put(view).map(|placed| placed.operand(view));
        let optional = |view: &Option<TensorView<'_>>| view.as_ref().map(operand).transpose();
        let list = |bytes: &[u8]| -> Result<u64, String> {
            let address = memory.allocate(bytes.len() as u64).map_err(|e| e.to_string())?;
            memory.write(address, bytes).map_err(|e| e.to_string())?;
            Ok(address)
        };
        let kv_lengths = match &spec.kv_lengths {
            Some(lengths) => {
                let [batch, row] = kv_lengths_strides(problem);
                Some(Operand { data: list(bytemuck::cast_slice(lengths))?, strides: [batch, row, 0, 0, 0] })
            }
            None => None,
        };
        let slopes = spec.mask.alibi_slopes.as_ref();
        let segments = match (optional(&o.q_segments)?, optional(&o.k_segments)?) {
            (Some(q), Some(k)) => Some([q, k]),
            _ => None,
        };
        let inputs = AttentionOperands {
            q: operand(&o.q)?,
            k: operand(&o.k)?,
            v: operand(&o.v)?,
            biases: o.biases.iter().map(operand).collect::<Result<_, _>>()?,
            key_mask: optional(&o.key_mask)?,
            segments,
            kv_lengths,
            alibi_slopes: slopes.map(|slopes| list(bytemuck::cast_slice(slopes))).transpose()?,
            gate: optional(&o.gate)?,
        };
        let mut results: Vec<(Placed, &mut TensorViewMut<'_>)> = Vec::new();
        let mut result = |view: &mut TensorViewMut<'_>| -> Result<(Placed, Operand), String> {
            let placed = put(view.as_view())?;
            let operand = placed.operand(view.as_view());
            Ok((placed, operand))
        };
        let mut outputs = [None; 4];
        for (to, view) in outputs.iter_mut().zip([&mut o.dq, &mut o.dk, &mut o.dv, &mut o.d_gate]) {
            if let Some(view) = view {
                let (placed, operand) = result(view)?;
                results.push((placed, view));
                *to = Some(operand);
            }
        }
        let mut dbiases = Vec::new();
        for view in &mut o.dbiases {
            dbiases.push(None);
            if let Some(view) = view {
                let (placed, operand) = result(view)?;
                let dtype = view.as_view().dtype();
                results.push((placed, view));
                dbiases.pop();
                dbiases.push(Some((operand, dtype)));
            }
        }
        let [dq, dk, dv, d_gate] = outputs;
        let operands = BackwardOperands {
            inputs,
            out: operand(&o.out)?,
            lse: operand(&o.lse)?,
            lse_low: operand(&o.lse_low)?,
            d_out: operand(&o.d_out)?,
            dq,
            dk,
            dv,
            dbiases,
            d_gate,
        };
        let bytes = backward_workspace_bytes(problem).max(1);
        let workspace = memory.allocate(bytes).map_err(|e| e.to_string())?;
        for launch in backward(problem, &operands, workspace).map_err(|e| e.to_string())? {
            match &launch {
                BackwardLaunch::Attention(launch) => self.launch(&memory, launch)?,
                BackwardLaunch::Sums(launch) => self.launch(&memory, launch)?,
            }
        }
        results.into_iter().try_for_each(|(placed, view)| placed.take_back(&memory, view))
    }
}

/// Copies a view's extent into the interpreter's memory.
fn put(memory: &Memory, view: &TensorView<'_>) -> Result<Placed, String> {
    let (size, extent) = (view.dtype().size_bytes(), view.layout().extent());
    let count = usize::try_from(extent.end - extent.start).map_err(|e| e.to_string())?;
    // As aligned as on the host, where kernels decide by the address.
    let first = view.origin().wrapping_offset(isize::try_from(extent.start - view.layout().offset()).unwrap() * isize::try_from(size).unwrap());
    let shift = first.addr() % 256;
    let base = memory.allocate((count * size + shift) as u64).map_err(|e| e.to_string())?;
    let address = base + shift as u64;
    // SAFETY: a view's extent lies in its storage, which is host memory.
    let bytes = unsafe { std::slice::from_raw_parts(first, count * size) };
    memory.write(address, bytes).map_err(|e| e.to_string())?;
    Ok(Placed { address, first: extent.start, size })
}

impl Placed {
    fn operand(&self, view: &TensorView<'_>) -> Operand {
        let steps = view.layout().offset() - self.first;
        let data = self.address.wrapping_add_signed(steps * i64::try_from(self.size).unwrap());
        Operand::new(data, view.shape(), view.layout().strides())
    }

    /// Copies the elements of a result back.
    fn take_back(&self, memory: &Memory, view: &mut TensorViewMut<'_>) -> Result<(), String> {
        let layout = view.as_view().layout().clone();
        let origin = view.origin();
        for position in layout.positions() {
            let bytes = (position - self.first) * i64::try_from(self.size).unwrap();
            let mut element = [0; 8];
            let element = &mut element[..self.size];
            memory.read(self.address.wrapping_add_signed(bytes), element).map_err(|e| e.to_string())?;
            let steps = isize::try_from((position - layout.offset()) * i64::try_from(self.size).unwrap()).unwrap();
            // SAFETY: an element of the view, in host memory, which the view borrows mutably.
            unsafe { std::ptr::copy_nonoverlapping(element.as_ptr(), origin.wrapping_offset(steps), self.size) };
        }
        Ok(())
    }
}

impl Backend for EmulatedBackward {
    fn info(&self) -> &DeviceInfo {
        self.cpu.info()
    }
    fn stream(&self) -> DeviceResult<Stream> {
        self.cpu.stream()
    }
    fn alloc(&self, stream: &Stream, bytes: usize) -> DeviceResult<Storage> {
        self.cpu.alloc(stream, bytes)
    }
    fn upload(&self, stream: &Stream, source: &[u8], destination: &mut Storage) -> DeviceResult<()> {
        self.cpu.upload(stream, source, destination)
    }
    fn download(&self, stream: &Stream, source: &Storage, destination: &mut [u8]) -> DeviceResult<()> {
        self.cpu.download(stream, source, destination)
    }
    fn fill(&self, stream: &Stream, destination: TensorViewMut<'_>, value: f64) -> DeviceResult<()> {
        self.cpu.fill(stream, destination, value)
    }
    fn relayout(&self, stream: &Stream, args: RelayoutArgs<'_>) -> DeviceResult<()> {
        self.cpu.relayout(stream, args)
    }
    fn record(&self, stream: &Stream) -> DeviceResult<Event> {
        self.cpu.record(stream)
    }
    fn wait(&self, stream: &Stream, event: &Event) -> DeviceResult<()> {
        self.cpu.wait(stream, event)
    }
    fn synchronize(&self, stream: &Stream) -> DeviceResult<()> {
        self.cpu.synchronize(stream)
    }
    fn plan_attention(&self, problem: &AttentionProblem) -> DeviceResult<AttentionPlan> {
        self.cpu.plan_attention(problem)
    }
    fn attention_forward(&self, stream: &Stream, args: ForwardArgs<'_>) -> DeviceResult<()> {
        self.cpu.attention_forward(stream, args)
    }
    fn attention_backward(&self, _: &Stream, args: BackwardArgs<'_>) -> DeviceResult<()> {
        self.backward(args).map_err(failure)
    }
    fn merge(&self, stream: &Stream, args: MergeArgs<'_>) -> DeviceResult<()> {
        self.cpu.merge(stream, args)
    }
}
