//! Attention over ranks that were given something wrong, or do not agree: typed errors on every rank, none hangs, none panics.

#![allow(clippy::unwrap_used, clippy::panic, reason = "a panic in a test is a failed test")]

mod failing;
mod ranks;

use std::sync::Arc;
use std::time::{Duration, Instant};

use failing::{FAULT, Failing};
use ranks::on_ranks;
use tilefold_comm::{
    AxialAttention, CommError, Communicator, Error, Partition, Rank, Result, RingAttention, Shard, ShardBackward,
    ShardForward, SharedBias, UlyssesAttention, UlyssesForward,
};
use tilefold_core::{
    AttentionSpec, BiasSpec, DType, DeviceError, EmptyRows, Gradients, ProblemError, Tensor, TensorView,
};

/// Long enough for a loaded machine: what takes as long is a hang.
const DEADLINE: Duration = Duration::from_secs(60);
const SOON: Duration = Duration::from_millis(300);
const RANKS: usize = 4;
/// The rank that is given something else.
const ODD: usize = 1;
const SEQLEN: usize = 9;
const ROWS: usize = 6;
const HEADS: usize = 4;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Way {
    Ring,
    /// Heads split over a group of so many.
    Ulysses(usize),
    Axial(SharedBias),
}

const WAYS: [Way; 5] =
    [Way::Ring, Way::Ulysses(4), Way::Ulysses(2), Way::Axial(SharedBias::Gathered), Way::Axial(SharedBias::Travelling)];

enum Attention {
    Ring(Box<RingAttention>),
    Ulysses(Box<UlyssesAttention>),
    Axial(Box<AxialAttention>),
}

enum Forward {
    Shard(Box<ShardForward>),
    Ulysses(Box<UlyssesForward>),
}

/// What a rank is given.
#[derive(Clone, Debug)]
struct Given {
    spec: AttentionSpec,
    /// Of queries and keys; of an axial attention's rows.
    partition: Partition,
    /// What the tensors have, if not what the problem says.
    head_dim: usize,
    dtype: DType,
    /// Positions or rows more than the partition says.
    more: usize,
    biases: usize,
    /// Channels of d_out.
    d_out: usize,
}

impl Given {
    fn new(way: Way) -> Self {
        let mut spec = AttentionSpec::new(DType::F32, 1, ROWS, SEQLEN, HEADS, 8);
        spec.biases = vec![BiasSpec { shape: [1, 1, 1, SEQLEN, SEQLEN], dtype: DType::F32 }];
        spec.gradients = Gradients { q: true, k: true, v: true, gate: false, biases: [true, false, false, false] };
        let partition = Partition::contiguous(Self::size(way), RANKS).unwrap();
        Self { spec, partition, head_dim: 8, dtype: DType::F32, more: 0, biases: 1, d_out: 8 }
    }

    /// Of the axis that is split.
    fn size(way: Way) -> usize {
        if let Way::Axial(_) = way { ROWS } else { SEQLEN }
    }

    fn attention(&self, way: Way, comm: &Communicator) -> Result<Attention> {
        let (spec, partition) = (self.spec.clone(), self.partition.clone());
        Ok(match way {
            Way::Ring => Attention::Ring(RingAttention::new(spec, partition.clone(), partition)?.into()),
            Way::Ulysses(group) => {
                Attention::Ulysses(UlyssesAttention::new(comm, spec, partition.clone(), partition, group)?.into())
            }
            Way::Axial(shared) => {
                let queries = Partition::contiguous(SEQLEN, partition.ranks())?;
                Attention::Axial(AxialAttention::new(spec, partition, queries, shared)?.into())
            }
        })
    }

    /// `[batch, rows, seqlen, heads, channels]` of this rank.
    fn shape(&self, way: Way, rank: usize, channels: usize) -> [usize; 5] {
        // What a rank beyond the partition would have is of no matter.
        let count = if rank < self.partition.ranks() { self.partition.count(rank) } else { 1 } + self.more;
        match way {
            Way::Axial(_) => [1, count, SEQLEN, HEADS, channels],
            _ => [1, ROWS, count, HEADS, channels],
        }
    }

    fn tensor(&self, way: Way, rank: usize) -> Result<Tensor> {
        Ok(Tensor::zeros(self.dtype, &self.shape(way, rank, self.head_dim))?)
    }

    fn bias(&self, way: Way, rank: usize) -> Result<Tensor> {
        let queries = match way {
            Way::Axial(_) => Partition::contiguous(SEQLEN, RANKS)?.count(rank),
            _ => self.shape(way, rank, 1)[2],
        };
        Ok(Tensor::zeros(DType::F32, &[1, 1, 1, queries, SEQLEN])?)
    }

    fn d_out(&self, way: Way, rank: usize) -> Result<Tensor> {
        Ok(Tensor::zeros(self.dtype, &self.shape(way, rank, self.d_out))?)
    }
}

/// A rank's tensors.
struct Operands {
    q: Tensor,
    keys: Arc<Tensor>,
    bias: Tensor,
    d_out: Tensor,
    biases: usize,
}

impl Operands {
    fn new(given: &Given, way: Way, rank: usize) -> Result<Self> {
        let (q, keys) = (given.tensor(way, rank)?, Arc::new(given.tensor(way, rank)?));
        Ok(Self { q, keys, bias: given.bias(way, rank)?, d_out: given.d_out(way, rank)?, biases: given.biases })
    }

    fn shard(&self) -> Shard<'_> {
        Shard {
            q: self.q.view(),
            k: Arc::clone(&self.keys),
            v: Arc::clone(&self.keys),
            biases: vec![self.bias.view(); self.biases],
            key_mask: None,
            q_segments: None,
            k_segments: None,
            gate: None,
        }
    }
}

impl Attention {
    fn forward(&self, rank: &Rank<'_>, shard: &Shard<'_>) -> Result<Forward> {
        Ok(match self {
            Self::Ring(ring) => Forward::Shard(ring.forward(rank, shard)?.into()),
            Self::Ulysses(ulysses) => Forward::Ulysses(ulysses.forward(rank, shard)?.into()),
            Self::Axial(axial) => Forward::Shard(axial.forward(rank, shard)?.into()),
        })
    }

    fn backward(
        &self,
        rank: &Rank<'_>,
        shard: &Shard<'_>,
        forward: &Forward,
        d_out: &TensorView<'_>,
    ) -> Result<ShardBackward> {
        match (self, forward) {
            (Self::Ring(ring), Forward::Shard(forward)) => ring.backward(rank, shard, forward, d_out),
            (Self::Axial(axial), Forward::Shard(forward)) => axial.backward(rank, shard, forward, d_out),
            (Self::Ulysses(ulysses), Forward::Ulysses(forward)) => ulysses.backward(rank, forward, d_out),
            _ => panic!("a forward pass of another attention"),
        }
    }
}

/// Both passes with what a rank is given.
fn run(way: Way, rank: &Rank<'_>, given: &Given) -> Result<()> {
    let attention = given.attention(way, rank.comm)?;
    let operands = Operands::new(given, way, rank.comm.rank())?;
    let forward = attention.forward(rank, &operands.shard())?;
    attention.backward(rank, &operands.shard(), &forward, &operands.d_out.view()).map(|_| ())
}

type Edit = fn(&mut Given, Way);
/// A name, what is changed, and whether an error is the one that this gives.
type Case = (&'static str, Edit, fn(&ProblemError) -> bool);

/// What the ranks get when one of them is given something else.
fn with_odd(way: Way, edit: Edit) -> Vec<Result<()>> {
    on_ranks(RANKS, DEADLINE, |rank| {
        let mut given = Given::new(way);
        if rank.comm.rank() == ODD {
            edit(&mut given, way);
        }
        run(way, rank, &given)
    })
}

fn is_mismatch(error: &Error) -> bool {
    matches!(error, Error::Comm(CommError::Mismatch { .. }))
}

#[test]
fn good_input_is_accepted() {
    for way in WAYS {
        for result in with_odd(way, |_, _| ()) {
            assert_eq!(result, Ok(()), "{way:?}");
        }
    }
}

/// The rank has its own error, that names tensor and dimension; the others learn which rank refused.
#[test]
fn tensors_of_one_rank_that_do_not_fit() {
    let edits: [Case; 6] = [
        (
            "channels",
            |given, _| given.head_dim = 9,
            |error| matches!(error, ProblemError::Shape { tensor: "q", expected: 8, got: 9, .. }),
        ),
        (
            "dtype",
            |given, _| given.dtype = DType::F16,
            |error| matches!(error, ProblemError::UnsupportedDType { tensor: "q", got: DType::F16, .. }),
        ),
        ("positions", |given, _| given.more = 1, |error| matches!(error, ProblemError::Shape { tensor: "q", .. })),
        (
            "no bias",
            |given, _| given.biases = 0,
            |error| matches!(error, ProblemError::Length { list: "biases", got: 0, .. }),
        ),
        (
            "two biases",
            |given, _| given.biases = 2,
            |error| matches!(error, ProblemError::Length { list: "biases", got: 2, .. }),
        ),
        (
            "d_out",
            |given, _| given.d_out = 7,
            |error| matches!(error, ProblemError::Shape { tensor: "d_out", expected: 8, got: 7, .. }),
        ),
    ];
    for (way, (name, edit, is_own)) in WAYS.iter().flat_map(|way| edits.map(|edit| (*way, edit))) {
        for (rank, result) in with_odd(way, edit).into_iter().enumerate() {
            let is_expected = match &result {
                Err(Error::Problem(error)) => rank == ODD && is_own(error),
                Err(Error::Comm(CommError::Refused { rank: ODD, .. })) => rank != ODD,
                _ => false,
            };
            assert!(is_expected, "{way:?}, {name}, rank {rank}: {result:?}");
        }
    }
}

#[test]
fn problems_and_partitions_of_one_rank_that_differ() {
    let edits: [(&str, Edit); 5] = [
        ("scale", |given, _| given.spec.softmax_scale = Some(0.5)),
        ("mask", |given, _| given.spec.mask.causal = true),
        ("gradients", |given, _| given.spec.gradients.k = false),
        ("dtype", |given, _| (given.spec.dtype, given.dtype) = (DType::BF16, DType::BF16)),
        ("partition", |given, way| given.partition = Partition::zigzag(Given::size(way), RANKS).unwrap()),
    ];
    for (way, (name, edit)) in WAYS.iter().flat_map(|way| edits.map(|edit| (*way, edit))) {
        for (rank, result) in with_odd(way, edit).into_iter().enumerate() {
            assert!(result.as_ref().is_err_and(is_mismatch), "{way:?}, {name}, rank {rank}: {result:?}");
        }
    }
}

/// An error that the problem itself has, on one rank.
#[test]
fn a_problem_of_one_rank_that_is_none() {
    for way in WAYS {
        let results = on_ranks(RANKS, SOON, |rank| {
            let mut given = Given::new(way);
            if rank.comm.rank() == ODD {
                given.spec.kv_heads = 3;
            }
            run(way, rank, &given)
        });
        for (rank, result) in results.into_iter().enumerate() {
            // A rank whose problem is none leaves before any exchange, where making it is no collective.
            let is_expected = match &result {
                Err(Error::Problem(_)) => rank == ODD,
                Err(Error::Comm(CommError::Refused { rank: ODD, .. })) => rank != ODD && matches!(way, Way::Ulysses(_)),
                Err(Error::Comm(CommError::Lost { rank: ODD, .. } | CommError::Deadline { .. })) => rank != ODD,
                _ => false,
            };
            assert!(is_expected, "{way:?}, rank {rank}: {result:?}");
        }
    }
}

/// Under a causal mask each rank has 2p + 1 pairs of chunks of which there is anything to attend, out of 4p: as many scores as
/// any other.
#[test]
fn zigzag_gives_each_rank_as_much_to_do() {
    const S: usize = 64;
    for ranks in [2, 4, 8] {
        let launches = on_ranks(ranks, DEADLINE, |rank| {
            let device = Failing::after(usize::MAX);
            let rank = Rank { device: &device, ..*rank };
            let mut spec = AttentionSpec::new(DType::F32, 1, 1, S, 1, 8).with_all_gradients();
            spec.mask.causal = true;
            let partition = Partition::zigzag(S, ranks)?;
            let ring = RingAttention::new(spec, partition.clone(), partition)?;
            let q = rank.zeros(DType::F32, &[1, 1, S / ranks, 1, 8])?;
            let keys = Arc::new(rank.dense(&q.view())?);
            let shard = Shard::new(q.view(), Arc::clone(&keys), keys);
            let forward = ring.forward(&rank, &shard)?;
            let one_way = device.launches();
            ring.backward(&rank, &shard, &forward, &q.view())?;
            Ok::<_, Error>([one_way, device.launches()])
        });
        let expected = 2 * ranks + 1;
        for launches in launches {
            assert_eq!(launches.unwrap(), [expected, 2 * expected], "{ranks} ranks");
        }
    }
}

/// At whatever launch a rank's device fails, all ranks hear of it, and none takes what was left on its way for another pass.
#[test]
fn a_device_of_one_rank_that_fails_on_the_way() {
    for way in WAYS {
        let mut launches = 0;
        loop {
            let results = on_ranks(RANKS, DEADLINE, |rank| {
                let device = Failing::after(if rank.comm.rank() == ODD { launches } else { usize::MAX });
                let rank = Rank { device: &device, ..*rank };
                [(); 2].map(|()| run(way, &rank, &Given::new(way)))
            });
            if results[ODD][0].is_ok() {
                break;
            }
            for (rank, [first, again]) in results.into_iter().enumerate() {
                let is_told = |result: &Result<()>| match result {
                    Err(Error::Device(DeviceError::Unsupported { limit })) => rank == ODD && limit == FAULT,
                    Err(Error::Comm(error @ CommError::Refused { .. })) => {
                        rank != ODD && error.to_string().contains(FAULT)
                    }
                    _ => false,
                };
                let is_unusable = matches!(again, Err(Error::Comm(CommError::Unusable { .. })));
                // A rank that needed nothing more of the other hears of it in its next call.
                let is_late = rank != ODD && first.is_ok() && is_told(&again);
                let expected = (is_told(&first) && is_unusable) || is_late;
                assert!(expected, "{way:?}, launch {launches}, rank {rank}: {first:?}, then {again:?}");
            }
            launches += 1;
        }
        assert!(launches >= 2, "{way:?}: both passes launch");
    }
}

/// One rank goes forward again where the others go back, goes back first, or does something else.
#[test]
fn calls_in_another_order() {
    type Calls = fn(&Rank<'_>, &Attention, &Operands) -> Result<()>;
    let forward_twice: Calls = |rank, attention, operands| {
        let forward = attention.forward(rank, &operands.shard())?;
        if rank.comm.rank() == ODD {
            return attention.forward(rank, &operands.shard()).map(|_| ());
        }
        attention.backward(rank, &operands.shard(), &forward, &operands.d_out.view()).map(|_| ())
    };
    let backward_twice: Calls = |rank, attention, operands| {
        let forward = attention.forward(rank, &operands.shard())?;
        attention.backward(rank, &operands.shard(), &forward, &operands.d_out.view())?;
        if rank.comm.rank() == ODD {
            return attention.backward(rank, &operands.shard(), &forward, &operands.d_out.view()).map(|_| ());
        }
        attention.forward(rank, &operands.shard()).map(|_| ())
    };
    let barrier: Calls = |rank, attention, operands| {
        if rank.comm.rank() == ODD {
            return rank.comm.barrier();
        }
        attention.forward(rank, &operands.shard()).map(|_| ())
    };
    for (way, calls) in WAYS.iter().flat_map(|way| [forward_twice, backward_twice, barrier].map(|calls| (*way, calls)))
    {
        let results = on_ranks(RANKS, DEADLINE, |rank| {
            let given = Given::new(way);
            let attention = given.attention(way, rank.comm)?;
            calls(rank, &attention, &Operands::new(&given, way, rank.comm.rank())?)
        });
        for (rank, result) in results.into_iter().enumerate() {
            assert!(result.as_ref().is_err_and(is_mismatch), "{way:?}, rank {rank}: {result:?}");
        }
    }
}

/// Two attentions over the same ranks, called in another order by one rank: layers swapped.
#[test]
fn attentions_in_another_order() {
    for way in WAYS {
        let results = on_ranks(RANKS, DEADLINE, |rank| {
            let given = Given::new(way);
            let mut other = given.clone();
            other.spec.mask.causal = true;
            let attentions = [given.attention(way, rank.comm)?, other.attention(way, rank.comm)?];
            let operands = Operands::new(&given, way, rank.comm.rank())?;
            let first = usize::from(rank.comm.rank() == ODD);
            attentions[first].forward(rank, &operands.shard())?;
            attentions[1 - first].forward(rank, &operands.shard()).map(|_| ())
        });
        for (rank, result) in results.into_iter().enumerate() {
            assert!(result.as_ref().is_err_and(is_mismatch), "{way:?}, rank {rank}: {result:?}");
        }
    }
}

#[test]
fn a_rank_that_leaves_or_is_late() {
    for (way, leaves) in WAYS.iter().flat_map(|way| [true, false].map(|leaves| (*way, leaves))) {
        let started = Instant::now();
        let results = on_ranks(RANKS, DEADLINE, |rank| {
            let given = Given::new(way);
            // Groups have the deadline of the communicator that they are made from.
            if !leaves {
                rank.comm.barrier()?;
                rank.comm.set_deadline(SOON)?;
            }
            let attention = given.attention(way, rank.comm)?;
            let operands = Operands::new(&given, way, rank.comm.rank())?;
            if rank.comm.rank() == ODD {
                if leaves {
                    return Ok(());
                }
                std::thread::sleep(4 * SOON);
            }
            attention.forward(rank, &operands.shard()).map(|_| ())
        });
        assert!(started.elapsed() < DEADLINE, "{way:?}: {:?}", started.elapsed());
        for (rank, result) in results.into_iter().enumerate() {
            let is_expected = match &result {
                Ok(()) => leaves && rank == ODD,
                Err(Error::Comm(CommError::Lost { rank: ODD, panicked: false, .. })) => leaves,
                Err(Error::Comm(CommError::Deadline { deadline, .. })) => !leaves && *deadline == SOON,
                _ => false,
            };
            assert!(is_expected, "{way:?}, leaves {leaves}, rank {rank}: {result:?}");
        }
    }
}

fn is_counts(error: &Error, name: &str) -> bool {
    matches!(error, Error::Comm(CommError::Counts { list, .. }) if *list == name)
}

#[test]
fn more_ranks_than_heads() {
    let results = on_ranks(5, DEADLINE, |rank| {
        let spec = AttentionSpec::new(DType::F32, 1, 1, 10, 3, 8);
        let partition = Partition::contiguous(10, 5)?;
        UlyssesAttention::new(rank.comm, spec, partition.clone(), partition, 5)
    });
    for result in results {
        assert!(result.as_ref().is_err_and(|error| is_counts(error, "group")), "{result:?}");
    }
}

#[test]
fn groups_that_do_not_come_out_even() {
    for group in [0, 3, 5, usize::MAX] {
        for result in on_ranks(RANKS, DEADLINE, |rank| run(Way::Ulysses(group), rank, &Given::new(Way::Ring))) {
            assert!(result.as_ref().is_err_and(|error| is_counts(error, "group")), "{group}: {result:?}");
        }
    }
}

/// What a partition refuses never reaches a rank.
#[test]
fn more_ranks_than_positions_empty_shards_and_overlapping_chunks() {
    let error = |chunks| match Partition::new(SEQLEN, chunks) {
        Err(Error::Comm(error)) => error,
        other => panic!("{other:?}"),
    };
    for (made, ranks) in
        [Partition::contiguous, Partition::zigzag].iter().flat_map(|made| [(made, 4), (made, usize::MAX)])
    {
        assert_eq!(made(3, ranks), Err(CommError::EmptyShard { rank: 3, seqlen: 3 }.into()), "{ranks}");
    }
    assert_eq!(error(vec![vec![0..9], vec![9..9]]), CommError::EmptyShard { rank: 1, seqlen: SEQLEN });
    let cover = |position, owners: &[usize]| CommError::Cover { seqlen: SEQLEN, position, owners: owners.to_vec() };
    assert_eq!(error(vec![vec![0..5], vec![4..9]]), cover(4, &[0, 1]));
    assert_eq!(error(vec![vec![0..9, 0..9], vec![3..4]]), cover(0, &[0]));
    assert_eq!(error(vec![vec![0..5], vec![5..9, 2..3]]), cover(2, &[0, 1]));
    assert_eq!(error(vec![vec![0..usize::MAX], vec![usize::MAX - 1..usize::MAX]]), cover(0, &[0]));
    assert!(Partition::contiguous(SEQLEN, 0).is_err());
}

#[test]
fn partitions_of_another_length_or_of_unlike_ranks() {
    let of = |size, ranks| Partition::contiguous(size, ranks).unwrap();
    let pairs = [
        ("queries", of(SEQLEN + 1, RANKS), of(SEQLEN, RANKS)),
        ("keys", of(SEQLEN, RANKS), of(SEQLEN - 1, RANKS)),
        ("keys", of(SEQLEN, RANKS), of(SEQLEN, RANKS - 1)),
        ("keys", of(SEQLEN, RANKS), of(SEQLEN, RANKS + 1)),
    ];
    for (list, queries, keys) in pairs {
        let spec = Given::new(Way::Ring).spec;
        let ring = RingAttention::new(spec.clone(), queries.clone(), keys.clone());
        assert!(ring.as_ref().is_err_and(|error| is_counts(error, list)), "{ring:?}");
        for group in [RANKS, 2] {
            let made = on_ranks(RANKS, DEADLINE, |rank| {
                UlyssesAttention::new(rank.comm, spec.clone(), queries.clone(), keys.clone(), group).map(|_| ())
            });
            for made in made {
                assert!(made.as_ref().is_err_and(|error| is_counts(error, list)), "{group}: {made:?}");
            }
        }
    }
    for (list, rows, queries) in [
        ("rows", of(ROWS + 1, 2), of(SEQLEN, 2)),
        ("queries", of(ROWS, 2), of(SEQLEN + 1, 2)),
        ("queries", of(ROWS, 2), of(SEQLEN, 3)),
    ] {
        let axial = AxialAttention::new(Given::new(Way::Ring).spec, rows, queries, SharedBias::Gathered);
        assert!(axial.as_ref().is_err_and(|error| is_counts(error, list)), "{axial:?}");
    }
}

/// What each way leaves to its caller, or to another way.
#[test]
fn settings_that_a_way_does_not_take() {
    let of = |size| Partition::contiguous(size, RANKS).unwrap();
    type EditSpec = fn(&mut AttentionSpec);
    let spec = |edit: EditSpec| {
        let mut spec = Given::new(Way::Ring).spec;
        edit(&mut spec);
        spec
    };
    let edits: [(&str, EditSpec); 2] =
        [("gate", |spec| spec.gate = true), ("empty_rows", |spec| spec.empty_rows = EmptyRows::Uniform)];
    let is_own = |error: &Error, name: &str| matches!(error, Error::Problem(ProblemError::Unexpected { tensor, .. }) if *tensor == name);
    for (name, edit) in edits {
        let ring = RingAttention::new(spec(edit), of(SEQLEN), of(SEQLEN));
        assert!(ring.as_ref().is_err_and(|error| is_own(error, name)), "{name}: {ring:?}");
        let hybrid = on_ranks(RANKS, DEADLINE, |rank| {
            UlyssesAttention::new(rank.comm, spec(edit), of(SEQLEN), of(SEQLEN), 2).map(|_| ())
        });
        for (rank, made) in hybrid.into_iter().enumerate() {
            // The first rank that is heard refuses for all, who find the same.
            assert!(made.as_ref().is_err_and(|error| is_own(error, name)), "{name}, rank {rank}: {made:?}");
        }
    }
    let by_row = spec(|spec| spec.kv_lengths = Some(vec![SEQLEN as i64; ROWS]));
    for shared in [SharedBias::Gathered, SharedBias::Travelling] {
        let axial = AxialAttention::new(by_row.clone(), of(ROWS), of(SEQLEN), shared);
        assert!(matches!(axial, Err(Error::Problem(_))), "{axial:?}");
    }
}

fn is_world_size(error: &Error, made_for: usize) -> bool {
    matches!(error, Error::Comm(CommError::WorldSize { expected, got: RANKS, .. }) if *expected == made_for)
}

#[test]
fn a_partition_of_other_ranks() {
    for (way, made_for) in WAYS.iter().flat_map(|way| [1, 2, 3, 5].map(|made_for| (*way, made_for))) {
        let results = on_ranks(RANKS, DEADLINE, |rank| {
            let mut given = Given::new(way);
            given.partition = Partition::contiguous(Given::size(way), made_for)?;
            let result = run(way, rank, &given);
            assert!(rank.comm.is_usable());
            result
        });
        for result in results {
            assert!(
                result.as_ref().is_err_and(|error| is_world_size(error, made_for)),
                "{way:?} {made_for}: {result:?}"
            );
        }
    }
}

/// The backward pass of what was made, and went forward, on one rank by itself.
#[test]
fn a_backward_pass_among_other_ranks() {
    for way in WAYS {
        let results = on_ranks(RANKS, DEADLINE, |rank| {
            let (way, alone) = (if let Way::Ulysses(_) = way { Way::Ulysses(1) } else { way }, Communicator::alone());
            let mut given = Given::new(way);
            given.partition = Partition::contiguous(Given::size(way), 1)?;
            let attention = given.attention(way, &alone)?;
            let mut operands = Operands::new(&given, way, 0)?;
            operands.bias = Tensor::zeros(DType::F32, &[1, 1, 1, SEQLEN, SEQLEN])?;
            let forward = attention.forward(&Rank { comm: &alone, ..*rank }, &operands.shard())?;
            attention.backward(rank, &operands.shard(), &forward, &operands.d_out.view())
        });
        for result in results {
            assert!(result.as_ref().is_err_and(|error| is_world_size(error, 1)), "{way:?}: {result:?}");
        }
    }
}

/// A forward pass's lse that is another's, on one rank.
#[test]
fn outputs_that_do_not_fit() {
    for way in WAYS {
        if let Way::Ulysses(_) = way {
            continue; // Its outputs are of its own make.
        }
        let results = on_ranks(RANKS, DEADLINE, |rank| {
            let given = Given::new(way);
            let attention = given.attention(way, rank.comm)?;
            let operands = Operands::new(&given, way, rank.comm.rank())?;
            let mut forward = attention.forward(rank, &operands.shard())?;
            if let (Forward::Shard(forward), ODD) = (&mut forward, rank.comm.rank()) {
                forward.lse = Tensor::zeros(DType::F32, &[1, 1, HEADS, 1])?;
            }
            attention.backward(rank, &operands.shard(), &forward, &operands.d_out.view())
        });
        for (rank, result) in results.into_iter().enumerate() {
            let is_expected = match &result {
                Err(Error::Problem(ProblemError::Shape { tensor: "lse", .. })) => rank == ODD,
                Err(Error::Comm(CommError::Refused { rank: ODD, .. })) => rank != ODD,
                _ => false,
            };
            assert!(is_expected, "{way:?}, rank {rank}: {result:?}");
        }
    }
}
