//! The table of bytes and memory in docs/sequence-parallel.md, row by row, against what communicator and device count.

#![allow(clippy::unwrap_used, reason = "a panic is a failed test")]

use std::alloc::{GlobalAlloc, Layout as Block, System};
use std::cell::Cell;
use std::ops::RangeInclusive;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use tilefold_backend_cpu::CpuBackend;
use tilefold_comm::activation::Keep;
use tilefold_comm::sequence_parallel::maps::{AllGather, Copy, Map, Reduce, ReduceScatter, Split, Switch};
use tilefold_comm::sequence_parallel::position::PositionTable;
use tilefold_comm::{
    AxialAttention, Communicator, Partition, Rank, RingAttention, Shard, SharedBias, Traffic, UlyssesAttention,
    on_threads,
};
use tilefold_core::{AttentionSpec, Backend, BiasSpec, DType, StructuralMask, Tensor};

/// Ranks.
const P: usize = 4;
/// Positions.
const S: usize = 512;
/// Heads and channels of one.
const H: usize = 8;
const D: usize = 16;
/// Bytes of f32.
const F32: usize = 4;
/// One of q, k, v, out of a rank.
const PART: usize = S / P * H * D * F32;
/// Its lse, one of two parts.
const LSE: usize = S / P * H * F32;
/// Lists, names and messages.
const SMALL: usize = PART / 8;

/// The system's allocator, which counts what each rank has asked for, whoever frees it.
struct Counting;

#[global_allocator]
static COUNTING: Counting = Counting;

/// Bytes of each rank that are in use, and the most there were.
static LIVE: [AtomicUsize; P] = [const { AtomicUsize::new(0) }; P];
static PEAK: [AtomicUsize; P] = [const { AtomicUsize::new(0) }; P];

thread_local! {
    /// The rank this thread is; P where it is none.
    static RANK: Cell<usize> = const { Cell::new(P) };
}

/// A block with room for the number of its rank in front, at any alignment.
fn with_owner(block: Block) -> Option<(Block, usize)> {
    Block::new::<usize>().extend(block).ok()
}

// SAFETY: each block is the system's, of the layout that `with_owner` makes of the caller's, less what lies in front of it.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, block: Block) -> *mut u8 {
        let Some((whole, offset)) = with_owner(block) else { return std::ptr::null_mut() };
        // SAFETY: not empty, as it has an owner.
        let address = unsafe { System.alloc(whole) };
        if address.is_null() {
            return address;
        }
        let owner = RANK.try_with(Cell::get).unwrap_or(P);
        if owner < P {
            let live = LIVE[owner].fetch_add(block.size(), Ordering::Relaxed) + block.size();
            PEAK[owner].fetch_max(live, Ordering::Relaxed);
        }
        // SAFETY: the front of a block has room for it, and is aligned for it; the rest begins at its offset.
        unsafe {
            address.cast::<usize>().write(owner);
            address.add(offset)
        }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, block: Block) {
        let Some((whole, offset)) = with_owner(block) else { return };
        // SAFETY: `alloc` gave it, so its owner lies in front.
        unsafe {
            let address = pointer.sub(offset);
            let owner = address.cast::<usize>().read();
            if owner < P {
                LIVE[owner].fetch_sub(block.size(), Ordering::Relaxed);
            }
            System.dealloc(address, whole);
        }
    }
}

/// Runs `work` and checks the most memory this rank has asked for in it beyond what it had: so many bytes, the higher number
/// where other ranks keep what they got from it as long as they can.
fn holding<T>(rank: &Rank<'_>, what: &str, bytes: RangeInclusive<usize>, work: impl FnOnce() -> T) -> T {
    let here = rank.comm.rank();
    // Nobody holds anything of what came before.
    rank.comm.barrier().unwrap();
    let before = LIVE[here].load(Ordering::Relaxed);
    PEAK[here].store(before, Ordering::Relaxed);
    let result = work();
    let peak = PEAK[here].load(Ordering::Relaxed) - before;
    let accepted = bytes.start() - SMALL.min(*bytes.start())..=bytes.end() + SMALL;
    assert!(accepted.contains(&peak), "{what}, rank {here}: {peak} bytes, expected {bytes:?}");
    result
}

/// Bytes that a rank has sent under these names.
fn sent(comm: &Communicator, names: &[&str]) -> usize {
    let traffic = comm.traffic();
    let sent = names.iter().map(|name| traffic.get(name).map_or(0, |traffic| traffic.bytes_sent));
    usize::try_from(sent.sum::<u64>()).unwrap()
}

/// Calls `work` on each of P ranks with a device of its own.
fn on_ranks(work: impl Fn(&Rank<'_>) + Sync) {
    on(P, work);
}

/// Calls `work` on each of some ranks.
fn on(ranks: usize, work: impl Fn(&Rank<'_>) + Sync) {
    static ONE_AT_A_TIME: Mutex<()> = Mutex::new(());
    let _counted = ONE_AT_A_TIME.lock().unwrap_or_else(PoisonError::into_inner);
    let results = on_threads(ranks, |comm| {
        let device = CpuBackend::new().unwrap().with_threads(1).unwrap();
        let stream = device.stream().unwrap();
        RANK.set(comm.rank());
        work(&Rank { comm: &comm, device: &device, stream: &stream });
        RANK.set(P);
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
    for dtype in [DType::F32, DType::BF16] {
        // q, k, v, out and lse of one rank alone.
        let alone = P * (4 * PART / F32 * dtype.size_bytes() + 2 * LSE);
        on(1, |rank| {
            let [rows, positions] = [1, S].map(|count| Partition::contiguous(count, 1).unwrap());
            let spec = AttentionSpec { dtype, ..sequence() };
            let attention = AxialAttention::new(spec, rows, positions, SharedBias::Gathered).unwrap();
            holding(rank, "alone", alone..=alone, || {
                let zeros = || rank.zeros(dtype, &[1, 1, S, H, D]).unwrap();
                let (q, k, v) = (zeros(), Arc::new(zeros()), Arc::new(zeros()));
                attention.forward(rank, &shard(&q, &k, &v, &[])).unwrap()
            });
        });
        on_ranks(|rank| {
            let partition = Partition::zigzag(S, P).unwrap();
            let spec = AttentionSpec { dtype, ..sequence() };
            let ring = RingAttention::new(spec, partition.clone(), partition).unwrap();
            let part = PART / F32 * dtype.size_bytes();
            let zeros = || rank.zeros(dtype, &[1, 1, S / P, H, D]).unwrap();
            let (q, k, v) = (zeros(), Arc::new(zeros()), Arc::new(zeros()));
            let shard = shard(&q, &k, &v, &[]);
            let names = ["ring_attention keys", "ring_attention gradients"];

            // out in f32 and lse, with those of half the queries, a chunk of two; or with out in its own dtype.
            let chunk = part / 2 + LSE;
            let outputs = PART + 2 * LSE + if dtype == DType::F32 { chunk } else { chunk.max(part) };
            let forward = holding(rank, "forward", outputs..=outputs, || ring.forward(rank, &shard).unwrap());
            assert_eq!(sent(rank.comm, &names), (P - 1) * 2 * part, "forward");
            let here = 3 * part + outputs + SMALL;
            let percent = if dtype == DType::F32 { 30 } else { 40 };
            assert!(100 * here < percent * alone, "{here} of {alone} bytes");

            // dq, and dk and dv of a block, in f32; dq, dk, dv of half of it; dk and dv that have gone on.
            let gradients = 3 * PART + 3 * part / 2;
            holding(rank, "backward", gradients..=gradients + 2 * PART, || {
                ring.backward(rank, &shard, &forward, &q.view()).unwrap();
            });
            assert_eq!(sent(rank.comm, &names), 2 * (P - 1) * 2 * part + P * 2 * PART, "backward");
        });
    }
}

#[test]
fn ulysses_attention() {
    on_ranks(|rank| {
        let partition = Partition::contiguous(S, P).unwrap();
        let ulysses = UlyssesAttention::new(rank.comm, sequence(), partition.clone(), partition, P).unwrap();
        let shape = [1, 1, S / P, H, D];
        let (q, k, v) = (tensor(rank, &shape), Arc::new(tensor(rank, &shape)), Arc::new(tensor(rank, &shape)));
        let shard = shard(&q, &k, &v, &[]);
        let switched = |count: usize| u64::try_from(count * PART * (P - 1) / P).unwrap();
        // q, k, v and out of this rank's heads, with lse; out on its way, and of this rank's positions.
        let heads = 4 * PART + 2 * LSE;
        let forward =
            holding(rank, "forward", heads + PART..=heads + 2 * PART, || ulysses.forward(rank, &shard).unwrap());
        assert_eq!(ulysses.traffic()["switch"].bytes_sent, switched(4), "forward");
        // d_out, dq, dk and dv of this rank's heads; each on its way, and of this rank's positions, in place of the one before.
        holding(rank, "backward", 5 * PART..=7 * PART, || {
            ulysses.backward(rank, &forward, &q.view()).unwrap();
        });
        assert_eq!(ulysses.traffic()["switch"].bytes_sent, switched(8), "backward");
    });
}

/// Groups of two ranks that split heads, of which two stand in a ring.
#[test]
fn hybrid_attention() {
    const GROUP: usize = 2;
    on_ranks(|rank| {
        let partition = Partition::contiguous(S, P).unwrap();
        let hybrid = UlyssesAttention::new(rank.comm, sequence(), partition.clone(), partition, GROUP).unwrap();
        let shape = [1, 1, S / P, H, D];
        let (q, k, v) = (tensor(rank, &shape), Arc::new(tensor(rank, &shape)), Arc::new(tensor(rank, &shape)));
        let sent = || {
            let traffic = hybrid.traffic();
            let of = |name| traffic.get(name).map_or(0, |traffic: &Traffic| traffic.bytes_sent);
            [of("switch"), of("ring_attention keys") + of("ring_attention gradients")]
        };
        let parts = |count: usize| u64::try_from(count * PART).unwrap();
        let shard = shard(&q, &k, &v, &[]);
        // As without a ring, whose chunk of out and lse is gone before out is on its way.
        let heads = 4 * PART + 2 * LSE;
        let forward =
            holding(rank, "hybrid forward", heads + PART..=heads + 2 * PART, || hybrid.forward(rank, &shard).unwrap());
        let (switched, round) = (4 * (GROUP - 1), P / GROUP - 1);
        assert_eq!(sent(), [parts(switched) / GROUP as u64, parts(2 * round)], "forward");
        // dq, and dk, dv of a block; dq, dk, dv of a chunk, here all of it; d_out of its heads; dk and dv that have gone on.
        holding(rank, "hybrid backward", 6 * PART..=9 * PART, || {
            hybrid.backward(rank, &forward, &q.view()).unwrap();
        });
        let backward = 2 * round + P / GROUP * 2;
        assert_eq!(sent(), [2 * parts(switched) / GROUP as u64, parts(2 * round + backward)], "backward");
    });
}

/// What is kept is a part; all of it comes back together.
#[test]
fn activations_in_parts() {
    on_ranks(|rank| {
        let whole = Arc::new(tensor(rank, &[S, H * D]));
        let keep = Keep::Partitioned(rank.comm);
        let mut kept = None;
        holding(rank, "kept", PART..=2 * PART, || kept = Some(keep.keep(rank, Arc::clone(&whole)).unwrap()));
        let before = sent(rank.comm, &["gather"]);
        let got = kept.unwrap().restore(rank).unwrap();
        assert_eq!(got.shape(), whole.shape());
        assert_eq!(sent(rank.comm, &["gather"]) - before, (P - 1) * PART);
    });
}

#[test]
fn megatron_maps() {
    on_ranks(|rank| {
        let whole = tensor(rank, &[S, H * D]);
        let part = tensor(rank, &[S / P, H * D]);
        let split = Split::contiguous(0, S, P).unwrap();
        let bytes = |name: &str| sent(rank.comm, &[name]);
        // The whole, and this rank's part on its way.
        let apply = |map: &dyn Fn() -> Tensor, what, parts: RangeInclusive<usize>| {
            holding(rank, what, parts.start() * PART..=parts.end() * PART, map);
        };
        let gather = AllGather(split.clone());
        apply(&|| gather.apply(rank, &part.view()).unwrap(), "AllGather", P..=P + 1);
        assert_eq!(bytes("gather"), (P - 1) * PART);
        // All parts on their way, this rank's sum, and the part that is being added to it.
        let scatter = ReduceScatter(split.clone());
        apply(&|| scatter.apply(rank, &whole.view()).unwrap(), "ReduceScatter", P..=P + 2);
        assert_eq!(bytes("reduce_scatter"), (P - 1) * PART);
        // The same; parts are gone before the whole is there.
        apply(&|| Reduce.apply(rank, &whole.view()).unwrap(), "Reduce", P + 1..=P + 2);
        assert_eq!(bytes("all_reduce"), 2 * (P - 1) * PART);
        Copy.apply(rank, &whole.view()).unwrap();
        let to = Split::contiguous(1, H * D, P).unwrap();
        let switch = Switch { from: split, to };
        apply(&|| switch.apply(rank, &part.view()).unwrap(), "Switch", 1..=2);
        assert_eq!(bytes("switch"), PART * (P - 1) / P);
        let mut traffic = rank.comm.traffic();
        traffic.remove("barrier");
        assert_eq!(traffic.len(), 4, "copy moves nothing: {traffic:?}");
    });
}

#[test]
fn axial_attention() {
    const ROWS: usize = 8;
    const BIAS_PART: usize = H * S / P * S * F32;
    for shared in [SharedBias::Gathered, SharedBias::Travelling] {
        on_ranks(|rank| {
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
            let rows = ROWS / P * S * H * D * F32;
            let out = rows + 2 * ROWS / P * S * H * F32;
            // The bias, and this rank's part on its way.
            let bias = if shared == SharedBias::Gathered { P * BIAS_PART } else { 0 };
            let forward =
                holding(rank, "forward", out + bias..=out + bias + BIAS_PART, || axial.forward(rank, &shard).unwrap());
            assert_eq!(sent(rank.comm, &names), (P - 1) * BIAS_PART, "{shared:?} forward");
            let (least, most) = match shared {
                // dq, dk, dv; the bias and its gradient; this in parts, on their way and added.
                SharedBias::Gathered => (3 * rows + 2 * P * BIAS_PART, 3 * rows + (2 * P + 2) * BIAS_PART),
                // dq, dk, dv, and dk, dv of a part; the bias on its way; its gradient here and on its way.
                SharedBias::Travelling => (3 * rows + BIAS_PART, 5 * rows + 3 * BIAS_PART),
            };
            holding(rank, "backward", least..=most, || {
                axial.backward(rank, &shard, &forward, &q.view()).unwrap();
            });
            let backward = if shared == SharedBias::Gathered { 2 * (P - 1) } else { P - 1 + P };
            assert_eq!(sent(rank.comm, &names), (P - 1 + backward) * BIAS_PART, "{shared:?} backward");
        });
    }
}

#[test]
fn position_table() {
    const WIDTH: usize = H * D;
    on_ranks(|rank| {
        let partition = Partition::contiguous(S, P).unwrap();
        let rows = Tensor::zeros(DType::F32, &[S / P, WIDTH]).unwrap();
        let table = PositionTable::new(rank.comm, partition, rows).unwrap();
        // As many of each rank.
        let positions: Vec<usize> = (0..S).step_by(2).collect();
        // The rows, and those that this rank sends.
        let rows = S / 2 * WIDTH * F32;
        holding(rank, "lookup", rows..=2 * rows, || table.lookup(rank.comm, &positions).unwrap());
        // Of each other rank, and for each.
        let others = (P - 1) * S / 2 / P;
        let agreed = 0..1000;
        let moved = sent(rank.comm, &["position_lookup"]) - others * 8 - others * WIDTH * F32;
        assert!(agreed.contains(&moved), "{moved} bytes beside rows and their numbers");
        let d_rows = tensor(rank, &[S / 2, WIDTH]);
        // The rows that it sends, one part once more, and the sum; rows are gone when their owners have added them.
        let sum = S / P * WIDTH * F32;
        holding(rank, "gradient", rows..=rows + rows / P + sum, || {
            table.gradient(rank.comm, &positions, &d_rows.view()).unwrap();
        });
        let moved = sent(rank.comm, &["position_gradient"]) - others * WIDTH * F32;
        assert!(agreed.contains(&moved), "{moved} bytes beside gradients");
    });
}
