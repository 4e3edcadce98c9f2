//! A device that compiles kernels with NVRTC to PTX and interprets them: enough of a backend for attention.

use std::any::Any;
use std::collections::HashMap;
use std::sync::{Arc, Mutex};

use bytemuck::bytes_of;
use tilefold_core::{
    AttentionPlan, AttentionProblem, Backend, BackwardArgs, DType, DeviceError, DeviceId, DeviceInfo, DeviceKind,
    DeviceResult, Event, ForwardArgs, MergeArgs, RelayoutArgs, Storage, Stream, TensorView, TensorViewMut,
};
use tilefold_emulator_nvrtc::{Nvrtc, Release, Target};
use tilefold_emulator_ptx::{Launch as Run, Memory, Module, run};
use tilefold_kernels::params::{Operand, Params};
use tilefold_kernels::{
    AttentionOperands, BackwardLaunch, BackwardOperands, ForwardOutputs, Kernel, Launch, backward,
    backward_workspace_bytes, fill_view, forward, kv_lengths_strides, merge, relayout,
};

const ID: DeviceId = DeviceId { kind: DeviceKind::Custom, ordinal: 0 };

/// The device.
pub(crate) struct Interpreted {
    info: DeviceInfo,
    nvrtc: Nvrtc,
    memory: Arc<Memory>,
    modules: Mutex<HashMap<String, Arc<Module>>>,
}

impl std::fmt::Debug for Interpreted {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Interpreted")
    }
}

/// Frees an allocation when its last user is gone.
struct Owner {
    memory: Arc<Memory>,
    address: u64,
}

impl Drop for Owner {
    fn drop(&mut self) {
        self.memory.free(self.address).unwrap();
    }
}

fn failed(call: &'static str, message: impl ToString) -> DeviceError {
    DeviceError::Driver { call, status: 1, message: message.to_string() }
}

impl Interpreted {
    /// A device with a release of NVRTC.
    pub(crate) fn new(release: Release) -> Self {
        let info = DeviceInfo {
            id: ID,
            name: "interpreter of PTX".into(),
            vendor: "tilefold".into(),
            arch: "sm_80".into(),
            memory_bytes: 1 << 32,
            parallelism: 1,
            lanes: 32,
            dtypes: vec![DType::F32, DType::F16, DType::BF16],
            is_virtual: true,
        };
        let nvrtc = Nvrtc::fetched(release).unwrap();
        Self { info, nvrtc, memory: Arc::new(Memory::new(1 << 32)), modules: Mutex::default() }
    }

    fn module(&self, kernel: &Kernel) -> DeviceResult<Arc<Module>> {
        let mut modules = self.modules.lock().unwrap();
        if let Some(module) = modules.get(&kernel.hash) {
            return Ok(module.clone());
        }
        let compiled = self.nvrtc.compile(&kernel.source, Target::Ptx("compute_80"), &["--std=c++17"]);
        let compiled = compiled.map_err(|e| failed("nvrtcCompileProgram", e))?;
        let text = compiled.text().map_err(|e| failed("nvrtcGetPTX", e))?;
        let module =
            Arc::new(Module::parse(text).map_err(|e| failed("cuModuleLoadData", format!("{}: {e}", kernel.name)))?);
        modules.insert(kernel.hash.clone(), module.clone());
        Ok(module)
    }

    /// Compiles and runs one launch.
    pub(crate) fn launch<P: Params>(&self, launch: &Launch<P>) -> DeviceResult<()> {
        let module = self.module(&launch.kernel)?;
        let kernel = module.kernel(launch.kernel.entry).ok_or_else(|| failed("cuModuleGetFunction", "not found"))?;
        for (blocks, params) in launch.parts() {
            let launch = Run {
                kernel,
                module: &module,
                grid: [blocks, 1, 1],
                block: [launch.kernel.block_threads, 1, 1],
                dynamic_shared_bytes: launch.kernel.dynamic_shared_bytes,
                parameters: bytes_of(&params),
            };
            run(&self.memory, &launch).map_err(|fault| failed("cuLaunchKernel", fault))?;
        }
        Ok(())
    }

    /// A list on the device, kept as long as its storage.
    fn list<T: bytemuck::Pod>(&self, stream: &Stream, values: &[T]) -> DeviceResult<Storage> {
        let bytes = bytemuck::cast_slice(values);
        let mut storage = self.alloc(stream, bytes.len())?;
        self.upload(stream, bytes, &mut storage)?;
        Ok(storage)
    }
}

/// The problem's own lists on the device, kept until its launches have run.
struct Lists {
    lengths: Option<Storage>,
    slopes: Option<Storage>,
}

impl Interpreted {
    fn lists(&self, stream: &Stream, problem: &AttentionProblem) -> DeviceResult<Lists> {
        let spec = problem.spec();
        Ok(Lists {
            lengths: spec.kv_lengths.as_ref().map(|lengths| self.list(stream, lengths)).transpose()?,
            slopes: spec.mask.alibi_slopes.as_ref().map(|slopes| self.list(stream, slopes)).transpose()?,
        })
    }
}

impl Lists {
    fn inputs(
        &self,
        problem: &AttentionProblem,
        [q, k, v]: [&TensorView<'_>; 3],
        biases: &[TensorView<'_>],
        [key_mask, gate]: [Option<&TensorView<'_>>; 2],
        segments: Option<(&TensorView<'_>, &TensorView<'_>)>,
    ) -> AttentionOperands {
        let [batch, row] = kv_lengths_strides(problem);
        let lengths = self.lengths.as_ref();
        AttentionOperands {
            q: Operand::of(q),
            k: Operand::of(k),
            v: Operand::of(v),
            biases: biases.iter().map(Operand::of).collect(),
            key_mask: key_mask.map(Operand::of),
            segments: segments.map(|(q, k)| [Operand::of(q), Operand::of(k)]),
            kv_lengths: lengths.map(|list| Operand { data: address(list), strides: [batch, row, 0, 0, 0] }),
            alibi_slopes: self.slopes.as_ref().map(address),
            gate: gate.map(Operand::of),
        }
    }
}

fn address(storage: &Storage) -> u64 {
    storage.address().addr() as u64
}

impl Backend for Interpreted {
    fn info(&self) -> &DeviceInfo {
        &self.info
    }

    fn stream(&self) -> DeviceResult<Stream> {
        Ok(Stream::new(ID, Arc::new(())))
    }

    fn alloc(&self, _: &Stream, bytes: usize) -> DeviceResult<Storage> {
        let address = self.memory.allocate(bytes as u64).map_err(|e| failed("cuMemAlloc", e))?;
        let owner: Arc<dyn Any + Send + Sync> = Arc::new(Owner { memory: self.memory.clone(), address });
        let pointer = std::ptr::without_provenance_mut(usize::try_from(address).unwrap());
        // SAFETY: the range was just allocated, and the owner keeps it; nobody dereferences it on the host.
        Ok(unsafe { Storage::from_raw(pointer, bytes, ID, owner) })
    }

    fn upload(&self, _: &Stream, source: &[u8], destination: &mut Storage) -> DeviceResult<()> {
        self.memory.write(address(destination), source).map_err(|e| failed("cuMemcpyHtoD", e))
    }

    fn download(&self, _: &Stream, source: &Storage, destination: &mut [u8]) -> DeviceResult<()> {
        self.memory.read(address(source), destination).map_err(|e| failed("cuMemcpyDtoH", e))
    }

    fn fill(&self, _: &Stream, destination: TensorViewMut<'_>, value: f64) -> DeviceResult<()> {
        self.launch(&fill_view(destination.as_view(), value).map_err(|e| failed("plan", e))?)
    }

    fn relayout(&self, _: &Stream, args: RelayoutArgs<'_>) -> DeviceResult<()> {
        let (source, destination) = args.into_parts();
        self.launch(&relayout(&source, destination.as_view()).map_err(|e| failed("plan", e))?)
    }

    fn record(&self, _: &Stream) -> DeviceResult<Event> {
        Ok(Event::new(ID, Arc::new(())))
    }

    fn wait(&self, _: &Stream, _: &Event) -> DeviceResult<()> {
        Ok(())
    }

    fn synchronize(&self, _: &Stream) -> DeviceResult<()> {
        Ok(())
    }

    fn plan_attention(&self, problem: &AttentionProblem) -> DeviceResult<AttentionPlan> {
        Ok(AttentionPlan {
            problem: problem.clone(),
            device: ID,
            kernel: "interpreted".into(),
            tile_q: 128,
            tile_k: 64,
            forward_workspace_bytes: 0,
            backward_workspace_bytes: 0,
            deterministic: true,
        })
    }

    fn attention_forward(&self, stream: &Stream, args: ForwardArgs<'_>) -> DeviceResult<()> {
        let problem = &args.plan().problem;
        let mut operands = args.into_operands();
        let lists = self.lists(stream, problem)?;
        let o = &operands;
        let segments = o.q_segments.as_ref().zip(o.k_segments.as_ref());
        let inputs =
            lists.inputs(problem, [&o.q, &o.k, &o.v], &o.biases, [o.key_mask.as_ref(), o.gate.as_ref()], segments);
        let written = |view: &mut TensorViewMut<'_>| Operand::of(view.as_view());
        let outputs = ForwardOutputs {
            out: written(&mut operands.out),
            lse: operands.lse.as_mut().map(written),
            lse_low: operands.lse_low.as_mut().map(written),
        };
        let launch = forward(problem, &inputs, &outputs).map_err(|e| failed("plan", e))?;
        self.launch(&launch)
    }

    fn attention_backward(&self, stream: &Stream, args: BackwardArgs<'_>) -> DeviceResult<()> {
        let problem = &args.plan().problem;
        let mut operands = args.into_operands();
        let lists = self.lists(stream, problem)?;
        let o = &operands;
        let segments = o.q_segments.as_ref().zip(o.k_segments.as_ref());
        let inputs =
            lists.inputs(problem, [&o.q, &o.k, &o.v], &o.biases, [o.key_mask.as_ref(), o.gate.as_ref()], segments);
        let written = |view: &mut TensorViewMut<'_>| Operand::of(view.as_view());
        let operands = BackwardOperands {
            inputs,
            out: Operand::of(&operands.out),
            lse: Operand::of(&operands.lse),
            lse_low: Operand::of(&operands.lse_low),
            d_out: Operand::of(&operands.d_out),
            dq: operands.dq.as_mut().map(written),
            dk: operands.dk.as_mut().map(written),
            dv: operands.dv.as_mut().map(written),
            dbiases: (operands.dbiases.iter_mut())
                .map(|view| view.as_mut().map(|view| (written(view), view.as_view().dtype())))
                .collect(),
            d_gate: operands.d_gate.as_mut().map(written),
        };
        let bytes = usize::try_from(backward_workspace_bytes(problem)).unwrap().max(1);
        let workspace = self.alloc(stream, bytes)?;
        for launch in backward(problem, &operands, address(&workspace)).map_err(|e| failed("plan", e))? {
            match &launch {
                BackwardLaunch::Attention(launch) => self.launch(launch)?,
                BackwardLaunch::Sums(launch) => self.launch(launch)?,
            }
        }
        Ok(())
    }

    fn merge(&self, _: &Stream, args: MergeArgs<'_>) -> DeviceResult<()> {
        self.launch(&merge(&args.into_operands()).map_err(|e| failed("plan", e))?)
    }
}
