//! The kernels for AMD behind the contract of every backend: the backward pass runs lane by lane, all else is the CPU
//! backend's (the forward pass has a test of its own).

use tilefold_backend_cpu::CpuBackend;
use tilefold_core::{
    AccumulateArgs, AttentionPlan, AttentionProblem, Backend, BackwardArgs, DeviceError, DeviceInfo, DeviceResult,
    Event, ForwardArgs, MergeArgs, RelayoutArgs, RopeArgs, Storage, Stream, TensorViewMut,
};
use tilefold_kernels::params::Operand;
use tilefold_kernels::{
    BackwardLaunch, BackwardOperands, DeviceLists, Vendor, backward, backward_workspace_bytes, kv_lengths_strides,
};

use crate::host;

/// What workspaces hold before a launch, and behind their ends after it: NaN in every float type.
const UNWRITTEN: u8 = 0xff;
const ALIGNMENT: usize = 256;
const GUARD_BYTES: usize = 4096;

/// The device.
#[derive(Debug)]
pub(crate) struct Lanes {
    cpu: CpuBackend,
}

fn wrong(what: impl ToString) -> DeviceError {
    DeviceError::Unsupported { limit: what.to_string() }
}

impl Lanes {
    pub(crate) fn new() -> Self {
        Self { cpu: CpuBackend::new().unwrap() }
    }
}

/// Lists that are read where the problem has them.
fn lists(problem: &AttentionProblem) -> DeviceLists {
    let spec = problem.spec();
    let [batch, row] = kv_lengths_strides(problem);
    let lengths = spec.kv_lengths.as_ref().map(|lengths| lengths.as_ptr().addr() as u64);
    let slopes = spec.mask.alibi_slopes.as_ref().map(|slopes| slopes.as_ptr().addr() as u64);
    let kv_lengths = lengths.map(|data| Operand { data, strides: [batch, row, 0, 0, 0] });
    DeviceLists { kv_lengths, alibi_slopes: slopes }
}

impl Backend for Lanes {
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

    fn accumulate(&self, stream: &Stream, args: AccumulateArgs<'_>) -> DeviceResult<()> {
        self.cpu.accumulate(stream, args)
    }

    fn rope(&self, stream: &Stream, args: RopeArgs<'_>) -> DeviceResult<()> {
        self.cpu.rope(stream, args)
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
        let problem = &args.plan().problem;
        let operands = BackwardOperands::of(&args.into_operands(), lists(problem));
        let bytes = usize::try_from(backward_workspace_bytes(Vendor::Amd, problem)).map_err(wrong)?;
        let mut workspace = vec![UNWRITTEN; ALIGNMENT + bytes + GUARD_BYTES];
        let start = workspace.as_ptr().align_offset(ALIGNMENT);
        let address = workspace[start..].as_mut_ptr().addr() as u64;
        for launch in backward(Vendor::Amd, problem, &operands, address).map_err(wrong)? {
            match launch {
                BackwardLaunch::Attention(launch) => host::run(&launch, "BackwardParams"),
                BackwardLaunch::Sums(launch) => host::run(&launch, "SumParams"),
            }
            .map_err(wrong)?;
        }
        let beside = |(at, &byte): (usize, &u8)| !(start..start + bytes).contains(&at) && byte != UNWRITTEN;
        if workspace.iter().enumerate().any(beside) {
            Err(wrong("something beside the workspace was written"))
        } else {
            Ok(())
        }
    }

    fn merge(&self, stream: &Stream, args: MergeArgs<'_>) -> DeviceResult<()> {
        self.cpu.merge(stream, args)
    }
}
