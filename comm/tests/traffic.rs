//! The table of bytes and memory in docs/sequence-parallel.md, row by row, against what communicator and device count.

#![allow(clippy::unwrap_used, reason = "a panic is a failed test")]

use std::any::Any;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use tilefold_backend_cpu::CpuBackend;
use tilefold_comm::sequence_parallel::maps::{AllGather, Copy, Map, Reduce, ReduceScatter, Split, Switch};
use tilefold_comm::sequence_parallel::position::PositionTable;
use tilefold_comm::{
    AxialAttention, Communicator, Partition, Rank, RingAttention, Shard, SharedBias, UlyssesAttention, on_threads,
};
use tilefold_core::{
    AccumulateArgs, AttentionPlan, AttentionProblem, AttentionSpec, Backend, BackwardArgs, BiasSpec, DType, DeviceInfo,
    DeviceResult, Event, ForwardArgs, MergeArgs, RelayoutArgs, RopeArgs, Storage, Stream, StructuralMask, Tensor,
    TensorViewMut,
};

/// Ranks.
const P: usize = 4;
/// Positions.
const S: usize = 64;
/// Heads and channels of one.
const H: usize = 8;
const D: usize = 16;
/// Bytes of f32.
const F32: usize = 4;
/// One of q, k, v, out of a rank.
const PART: usize = S / P * H * D * F32;
/// Its lse, one of two parts.
const LSE: usize = S / P * H * F32;

/// The CPU, with a count of the memory it has given.
#[derive(Debug)]
struct Counting {
    cpu: CpuBackend,
    live: Arc<AtomicUsize>,
    peak: AtomicUsize,
}

/// Memory that is counted until it is dropped.
struct Counted {
    _storage: Storage,
    bytes: usize,
    live: Arc<AtomicUsize>,
}

impl Drop for Counted {
    fn drop(&mut self) {
        self.live.fetch_sub(self.bytes, Ordering::Relaxed);
    }
}

impl Counting {
    fn new() -> Self {
        let cpu = CpuBackend::new().unwrap().with_threads(1).unwrap();
        Self { cpu, live: Arc::default(), peak: AtomicUsize::new(0) }
    }

    /// The most memory `work` had at a time, beyond what there was before.
    fn peak_of<T>(&self, work: impl FnOnce() -> T) -> (T, usize) {
        let before = self.live.load(Ordering::Relaxed);
        self.peak.store(before, Ordering::Relaxed);
        let result = work();
        (result, self.peak.load(Ordering::Relaxed) - before)
    }
}

impl Backend for Counting {
    fn info(&self) -> &DeviceInfo {
        self.cpu.info()
    }
    fn stream(&self) -> DeviceResult<Stream> {
        self.cpu.stream()
    }
    fn alloc(&self, stream: &Stream, bytes: usize) -> DeviceResult<Storage> {
        let storage = self.cpu.alloc(stream, bytes)?;
        let live = self.live.fetch_add(bytes, Ordering::Relaxed) + bytes;
        self.peak.fetch_max(live, Ordering::Relaxed);
        let (address, device) = (storage.address(), storage.device());
        let owner: Arc<dyn Any + Send + Sync> =
            Arc::new(Counted { _storage: storage, bytes, live: Arc::clone(&self.live) });
        // SAFETY: the owner keeps the storage whose memory this is, and gives no access to it.
        Ok(unsafe { Storage::from_raw(address, bytes, device, owner) })
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
    fn attention_backward(&self, stream: &Stream, args: BackwardArgs<'_>) -> DeviceResult<()> {
        self.cpu.attention_backward(stream, args)
    }
    fn merge(&self, stream: &Stream, args: MergeArgs<'_>) -> DeviceResult<()> {
        self.cpu.merge(stream, args)
    }
}

/// Bytes that a rank has sent under these names.
fn sent(comm: &Communicator, names: &[&str]) -> usize {
    let traffic = comm.traffic();
    let sent = names.iter().map(|name| traffic.get(name).map_or(0, |traffic| traffic.bytes_sent));
    usize::try_from(sent.sum::<u64>()).unwrap()
}

/// Calls `work` on each of P ranks with a device of its own.
fn on_ranks(work: impl Fn(&Rank<'_>, &Counting) + Sync) {
    let results = on_threads(P, |comm| {
        let device = Counting::new();
        let stream = device.stream().unwrap();
        work(&Rank { comm: &comm, device: &device, stream: &stream }, &device);
    });
    results.into_iter().for_each(Result::unwrap);
}

fn tensor(rank: &Rank<'_>, shape: &[usize]) -> Tensor {
    rank.zeros(DType::F32, shape).unwrap()
}

fn sequence() -> AttentionSpec {
    let mask = StructuralMask { causal: true, ..StructuralMask::default() };
    AttentionSpec { mask, ..AttentionSpec::new(DType::F32, 1, 1, S, H, D) }.with_all_gradients()
}

fn shard<'a>(q: &'a Tensor, k: &Arc<Tensor>, v: &Arc<Tensor>, biases: &'a [Tensor]) -> Shard<'a> {
    Shard {
        q: q.view(),
        k: Arc::clone(k),
        v: Arc::clone(v),
        biases: biases.iter().map(Tensor::view).collect(),
        key_mask: None,
        q_segments: None,
        k_segments: None,
        gate: None,
    }
}

#[test]
fn ring_attention() {
    on_ranks(|rank, device| {
        let partition = Partition::zigzag(S, P).unwrap();
        let ring = RingAttention::new(sequence(), partition.clone(), partition).unwrap();
        let shape = [1, 1, S / P, H, D];
        let (q, k, v) = (tensor(rank, &shape), Arc::new(tensor(rank, &shape)), Arc::new(tensor(rank, &shape)));
        let shard = shard(&q, &k, &v, &[]);
        let names = ["ring_attention keys", "ring_attention gradients"];

        let (forward, peak) = device.peak_of(|| ring.forward(rank, &shard).unwrap());
        assert_eq!(sent(rank.comm, &names), (P - 1) * 2 * PART, "forward");
        // out and lse, and those of half the queries, a chunk of two.
        assert_eq!(peak, (PART + 2 * LSE) * 3 / 2, "forward");
        // q, k, v, out and lse of one rank alone, to which attention in one launch adds nothing of that size.
        let alone = P * (4 * PART + 2 * LSE);
        assert!((3 * PART + peak) * 10 < alone * 3, "{} of {alone} bytes", 3 * PART + peak);

        let (_, peak) = device.peak_of(|| ring.backward(rank, &shard, &forward, &q.view()).unwrap());
        assert_eq!(sent(rank.comm, &names), 2 * (P - 1) * 2 * PART + P * 2 * PART, "backward");
        // dq; dk and dv of a block, and dq, dk, dv of half of it.
        assert!((3 * PART..=3 * PART + 3 * PART / 2 + 2 * PART).contains(&peak), "backward: {peak}, part {PART}");
    });
}

#[test]
fn ulysses_attention() {
    on_ranks(|rank, device| {
        let partition = Partition::contiguous(S, P).unwrap();
        let ulysses = UlyssesAttention::new(rank.comm, sequence(), partition.clone(), partition, P).unwrap();
        let shape = [1, 1, S / P, H, D];
        let (q, k, v) = (tensor(rank, &shape), Arc::new(tensor(rank, &shape)), Arc::new(tensor(rank, &shape)));
        let shard = shard(&q, &k, &v, &[]);
        let switched = |count: usize| u64::try_from(count * PART * (P - 1) / P).unwrap();
        let (forward, peak) = device.peak_of(|| ulysses.forward(rank, &shard).unwrap());
        assert_eq!(ulysses.traffic()["switch"].bytes_sent, switched(4), "forward");
        // q, k, v and out of this rank's heads, with lse; out once more in parts, and whole.
        assert!((4 * PART + 2 * LSE..=6 * PART + 2 * LSE).contains(&peak), "forward: {peak}, part {PART}");
        ulysses.backward(rank, &forward, &q.view()).unwrap();
        assert_eq!(ulysses.traffic()["switch"].bytes_sent, switched(8), "backward");
    });
}

#[test]
fn megatron_maps() {
    on_ranks(|rank, _| {
        let whole = tensor(rank, &[S, H * D]);
        let part = tensor(rank, &[S / P, H * D]);
        let split = Split::contiguous(0, S, P).unwrap();
        let bytes = |name: &str| sent(rank.comm, &[name]);
        AllGather(split.clone()).apply(rank, &part.view()).unwrap();
        assert_eq!(bytes("gather"), (P - 1) * PART);
        ReduceScatter(split.clone()).apply(rank, &whole.view()).unwrap();
        assert_eq!(bytes("reduce_scatter"), (P - 1) * PART);
        Reduce.apply(rank, &whole.view()).unwrap();
        assert_eq!(bytes("all_reduce"), 2 * (P - 1) * PART);
        Copy.apply(rank, &whole.view()).unwrap();
        let to = Split::contiguous(1, H * D, P).unwrap();
        Switch { from: split, to }.apply(rank, &part.view()).unwrap();
        assert_eq!(bytes("switch"), PART * (P - 1) / P);
        assert_eq!(rank.comm.traffic().len(), 4, "copy moves nothing: {:?}", rank.comm.traffic());
    });
}

#[test]
fn axial_attention() {
    const ROWS: usize = 8;
    const BIAS_PART: usize = H * S / P * S * F32;
    for shared in [SharedBias::Gathered, SharedBias::Travelling] {
        on_ranks(|rank, device| {
            let spec = AttentionSpec::new(DType::F32, 1, ROWS, S, H, D);
            let bias = BiasSpec { shape: [1, 1, H, S, S], dtype: DType::F32 };
            let spec = AttentionSpec { biases: vec![bias], ..spec }.with_all_gradients();
            let rows = Partition::contiguous(ROWS, P).unwrap();
            let axial = AxialAttention::new(spec, rows, Partition::contiguous(S, P).unwrap(), shared).unwrap();
            let shape = [1, ROWS / P, S, H, D];
            let (q, k, v) = (tensor(rank, &shape), Arc::new(tensor(rank, &shape)), Arc::new(tensor(rank, &shape)));
            let biases = [tensor(rank, &[1, 1, H, S / P, S])];
            let shard = shard(&q, &k, &v, &biases);
            let names = ["gather", "reduce_scatter", "axial_attention biases", "axial_attention gradients"];
            let (forward, peak) = device.peak_of(|| axial.forward(rank, &shard).unwrap());
            assert_eq!(sent(rank.comm, &names), (P - 1) * BIAS_PART, "{shared:?} forward");
            let out = ROWS / P * S * H * D * F32 + 2 * ROWS / P * S * H * F32;
            let bias = if shared == SharedBias::Gathered { P * BIAS_PART } else { BIAS_PART };
            assert!(
                (out + bias..=out + bias + BIAS_PART).contains(&peak),
                "{shared:?} forward: {peak}, {out} + {bias}"
            );
            axial.backward(rank, &shard, &forward, &q.view()).unwrap();
            let backward = if shared == SharedBias::Gathered { 2 * (P - 1) } else { P - 1 + P };
            assert_eq!(sent(rank.comm, &names), (P - 1 + backward) * BIAS_PART, "{shared:?} backward");
        });
    }
}

#[test]
fn position_table() {
    const WIDTH: usize = H * D;
    on_ranks(|rank, _| {
        let partition = Partition::contiguous(S, P).unwrap();
        let rows = Tensor::zeros(DType::F32, &[S / P, WIDTH]).unwrap();
        let table = PositionTable::new(rank.comm, partition, rows).unwrap();
        // One position of each rank.
        let positions: Vec<usize> = (0..P).map(|rank| rank * S / P).collect();
        table.lookup(rank.comm, &positions).unwrap();
        let others = P - 1;
        let asked = others * 8;
        let agreed = 0..1000;
        let moved = sent(rank.comm, &["position_lookup"]) - asked - others * WIDTH * F32;
        assert!(agreed.contains(&moved), "{moved} bytes beside rows and their numbers");
    });
}
