//! The linear maps between ranks: every element of a copy where it must be, the adjoint identity to the bit, bad input as
//! typed errors on every rank.

#![allow(
    clippy::unwrap_used,
    clippy::panic,
    clippy::cast_possible_truncation,
    reason = "a panic in a test is a failed test"
)]

mod ranks;

use std::time::Duration;

use half::{bf16, f16};
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;
use ranks::on_ranks;
use tilefold_comm::sequence_parallel::maps::{
    AllGather, Copy, Gather, Map, Reduce, ReduceScatter, Scatter, Split, Switch,
};
use tilefold_comm::{CommError, Error, Partition, Rank, Reduction, Result};
use tilefold_core::{DType, ProblemError, Tensor, TensorView};

const DEADLINE: Duration = Duration::from_secs(120);
const WORLDS: [usize; 5] = [1, 2, 3, 5, 8];
const DTYPES: [DType; 3] = [DType::F32, DType::F16, DType::BF16];
const AXES: usize = 5;
/// Sizes of the axes that are whole.
const SHAPE: [usize; AXES] = [2, 3, 1, 2, 3];
const SEED: u64 = 0x6d61_7073;

/// Three ways to share out an axis: in order, in two chunks a rank, and unevenly with the chunks of a rank in no order.
fn partitions(size: usize, ranks: usize) -> [Partition; 3] {
    let mut uneven: Vec<Vec<_>> = (0..ranks).map(|rank| std::iter::once(rank..rank + 1).collect()).collect();
    let middle = usize::midpoint(ranks, size);
    uneven[ranks - 1].insert(0, ranks..middle);
    uneven[0].insert(0, middle..size);
    [Partition::contiguous(size, ranks), Partition::zigzag(size, ranks), Partition::new(size, uneven)]
        .map(Result::unwrap)
}

/// What each element says: its place in the whole tensor, as the bits of a finite number.
fn coded(codes: &[usize], dtype: DType, shape: &[usize]) -> Tensor {
    let bits = || codes.iter().map(|&code| u16::try_from(code).unwrap());
    match dtype {
        DType::F16 => Tensor::from_vec(bits().map(f16::from_bits).collect(), shape),
        DType::BF16 => Tensor::from_vec(bits().map(bf16::from_bits).collect(), shape),
        _ => Tensor::from_vec(bits().map(|bits| f32::from_bits(bits.into())).collect(), shape),
    }
    .unwrap()
}

fn codes(tensor: &Tensor) -> Vec<usize> {
    match tensor.dtype() {
        DType::F16 => tensor.as_slice::<f16>().unwrap().iter().map(|x| usize::from(x.to_bits())).collect(),
        DType::BF16 => tensor.as_slice::<bf16>().unwrap().iter().map(|x| usize::from(x.to_bits())).collect(),
        _ => tensor.as_slice::<f32>().unwrap().iter().map(|x| usize::try_from(x.to_bits()).unwrap()).collect(),
    }
}

/// Row-major codes of the positions of a tensor of which an axis may be split; several axes at once for a switch.
fn places(shape: &[usize], held: &[(usize, Vec<usize>)]) -> (Vec<usize>, Vec<usize>) {
    let own: Vec<Vec<usize>> = (0..shape.len())
        .map(|axis| {
            let split = held.iter().find(|(split, _)| *split == axis);
            split.map_or_else(|| (0..shape[axis]).collect(), |(_, positions)| positions.clone())
        })
        .collect();
    let codes = own.iter().zip(shape).fold(vec![0], |codes, (positions, size)| {
        codes.iter().flat_map(|code| positions.iter().map(move |position| code * size + position)).collect()
    });
    (codes, own.iter().map(Vec::len).collect())
}

/// The same tensor in other memory: axes in reverse order, with a gap after each element.
struct Strided {
    memory: Tensor,
    size: usize,
}

impl Strided {
    fn new(rank: &Rank<'_>, dense: &Tensor) -> Result<Self> {
        let size = dense.shape()[0];
        let mut shape: Vec<usize> = dense.shape().iter().rev().copied().collect();
        shape[dense.shape().len() - 1] *= 2;
        let mut memory = rank.zeros(dense.dtype(), &shape)?;
        let order: Vec<usize> = (0..shape.len()).rev().collect();
        rank.copy(dense.view(), memory.view_mut().permute(&order)?.slice(0, 0..2 * size, 2)?)?;
        Ok(Self { memory, size })
    }

    fn view(&self) -> Result<TensorView<'_>> {
        let order: Vec<usize> = (0..self.memory.shape().len()).rev().collect();
        Ok(self.memory.view().permute(&order)?.slice(0, 0..2 * self.size, 2)?)
    }
}

/// Applies a map to a tensor and to a strided one of the same elements; both must give the same.
fn apply<M: Map>(rank: &Rank<'_>, map: &M, x: &Tensor) -> Result<Tensor> {
    let value = map.apply(rank, &x.view())?;
    let strided = Strided::new(rank, x)?;
    assert!(!strided.view()?.layout().is_contiguous());
    let again = map.apply(rank, &strided.view()?)?;
    assert_eq!((again.shape(), again.dtype()), (value.shape(), value.dtype()));
    assert_eq!(again.host(), value.host(), "strided input");
    Ok(value)
}

trait Host {
    fn host(&self) -> &[u8];
}

impl Host for Tensor {
    fn host(&self) -> &[u8] {
        self.storage().host_bytes().unwrap()
    }
}

/// A split of an axis in every way, and the shape that the whole tensor then has.
fn splits(ranks: usize) -> impl Iterator<Item = (Split, Vec<usize>)> {
    let size = 2 * ranks + 3;
    (0..AXES).flat_map(move |axis| {
        partitions(size, ranks).map(|partition| {
            let mut shape = SHAPE.to_vec();
            shape[axis] = size;
            (Split { axis, partition }, shape)
        })
    })
}

fn held(split: &Split, rank: usize) -> (usize, Vec<usize>) {
    (split.axis, split.partition.positions(rank).collect())
}

fn copies(rank: &Rank<'_>) -> Result<()> {
    let (here, ranks) = (rank.comm.rank(), rank.comm.world_size());
    for dtype in DTYPES {
        for (split, shape) in splits(ranks) {
            let (all, _) = places(&shape, &[]);
            let (own, own_shape) = places(&shape, &[held(&split, here)]);
            let (whole, part) = (coded(&all, dtype, &shape), coded(&own, dtype, &own_shape));
            let is = |got: &Tensor, codes_: &[usize], shape: &[usize], map: &str| {
                assert_eq!((got.shape(), got.dtype()), (shape, dtype), "{map} {split:?}");
                assert_eq!(codes(got), codes_, "{map} {split:?} {dtype}, rank {here}");
            };
            is(&apply(rank, &Copy, &whole)?, &all, &shape, "copy");
            is(&apply(rank, &Scatter(split.clone()), &whole)?, &own, &own_shape, "scatter");
            is(&apply(rank, &Gather(split.clone()), &part)?, &all, &shape, "gather");
            is(&apply(rank, &AllGather(split.clone()), &part)?, &all, &shape, "all_gather");
        }
    }
    Ok(())
}

fn switches(rank: &Rank<'_>) -> Result<()> {
    let (here, ranks) = (rank.comm.rank(), rank.comm.world_size());
    let (from_size, to_size) = (ranks + 3, 2 * ranks + 1);
    for (from_axis, to_axis) in (0..AXES).flat_map(|from| (0..AXES).map(move |to| (from, to))) {
        if from_axis == to_axis {
            continue;
        }
        let mut shape = SHAPE.to_vec();
        (shape[from_axis], shape[to_axis]) = (from_size, to_size);
        let ways = partitions(from_size, ranks).into_iter().zip(partitions(to_size, ranks).into_iter().rev());
        for ((from, to), dtype) in ways.zip(DTYPES) {
            let switch =
                Switch { from: Split { axis: from_axis, partition: from }, to: Split { axis: to_axis, partition: to } };
            let (before, before_shape) = places(&shape, &[held(&switch.from, here)]);
            let (after, after_shape) = places(&shape, &[held(&switch.to, here)]);
            let there = apply(rank, &switch, &coded(&before, dtype, &before_shape))?;
            assert_eq!((there.shape(), codes(&there)), (after_shape.as_slice(), after), "{switch:?} {dtype}");
            let back = apply(rank, &switch.adjoint(), &there)?;
            assert_eq!((back.shape(), codes(&back)), (before_shape.as_slice(), before), "{switch:?} back");
        }
    }
    Ok(())
}

/// Sums of whole numbers that every dtype holds: of 7 r + place mod 5 over the ranks r.
fn sums(rank: &Rank<'_>) -> Result<()> {
    let (here, ranks) = (rank.comm.rank(), rank.comm.world_size());
    let sum = |code: &usize| (ranks * (code % 5) + 3 * (0..ranks).sum::<usize>()) as f64;
    for dtype in DTYPES {
        for (split, shape) in splits(ranks) {
            let (all, _) = places(&shape, &[]);
            let (own, own_shape) = places(&shape, &[held(&split, here)]);
            let mine: Vec<f64> = all.iter().map(|code| (code % 5 + 3 * here) as f64).collect();
            let mine = Tensor::from_f64(&mine, dtype, &shape)?;
            let whole = apply(rank, &Reduce, &mine)?;
            assert_eq!((whole.shape(), whole.dtype()), (shape.as_slice(), dtype));
            assert_eq!(whole.to_f64()?, all.iter().map(sum).collect::<Vec<_>>(), "reduce {dtype}");
            let part = apply(rank, &ReduceScatter(split.clone()), &mine)?;
            assert_eq!((part.shape(), part.dtype()), (own_shape.as_slice(), dtype));
            assert_eq!(part.to_f64()?, own.iter().map(sum).collect::<Vec<_>>(), "reduce_scatter {split:?} {dtype}");
        }
    }
    Ok(())
}

/// How a tensor counts in an inner product.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Kind {
    /// Once, the same on every rank.
    Replicated,
    /// Each rank's for itself: varying and sharded tensors.
    PerRank,
}

/// Whole numbers from -2 to 2: sums over ranks are exact in every dtype.
fn drawn(rank: &Rank<'_>, kind: Kind, salt: u64, dtype: DType, shape: &[usize]) -> Result<Tensor> {
    let of = if kind == Kind::Replicated { 0 } else { 1 + rank.comm.rank() as u64 };
    let mut random = ChaCha8Rng::seed_from_u64(SEED + 1000 * salt + of);
    let values: Vec<f64> = (0..shape.iter().product()).map(|_| f64::from(random.random_range(-2_i32..=2))).collect();
    Ok(Tensor::from_f64(&values, dtype, shape)?)
}

/// The inner product of tensors of a kind, the same on all ranks: whole numbers, so no order matters.
fn product(rank: &Rank<'_>, kind: Kind, a: &Tensor, b: &Tensor) -> Result<i32> {
    assert_eq!(a.shape(), b.shape());
    let own: f64 = a.to_f64()?.iter().zip(b.to_f64()?).map(|(a, b)| a * b).sum();
    assert_eq!(own, own.trunc());
    let own = [own as i32];
    let over = |reduction| {
        Ok::<_, Error>(rank.comm.all_reduce(&TensorView::from_slice(&own, &[1])?, reduction)?.as_slice::<i32>()?[0])
    };
    if kind == Kind::PerRank {
        return over(Reduction::Sum);
    }
    assert_eq!(over(Reduction::Max)?, own[0], "replicated, but ranks differ");
    assert_eq!(over(Reduction::Sum)?, own[0] * i32::try_from(rank.comm.world_size()).unwrap(), "ranks differ");
    Ok(own[0])
}

/// ⟨A x, y⟩ = ⟨x, Aᵀ y⟩; gives whether the product was anything but 0.
fn adjoint<M: Map>(
    rank: &Rank<'_>,
    map: &M,
    (from, to): (Kind, Kind),
    (x_shape, y_shape): (&[usize], &[usize]),
    (dtype, salt): (DType, u64),
) -> Result<bool> {
    let x = drawn(rank, from, 2 * salt, dtype, x_shape)?;
    let y = drawn(rank, to, 2 * salt + 1, dtype, y_shape)?;
    let there = product(rank, to, &map.apply(rank, &x.view())?, &y)?;
    let back = product(rank, from, &x, &map.adjoint().apply(rank, &y.view())?)?;
    assert_eq!(there, back, "{} {dtype}, seed {SEED:#x} {salt}", std::any::type_name::<M>());
    Ok(there != 0)
}

fn adjoints(rank: &Rank<'_>) -> Result<()> {
    use Kind::{PerRank, Replicated};
    let (here, ranks) = (rank.comm.rank(), rank.comm.world_size());
    let (mut salt, mut nonzero) = (0, 0);
    for dtype in DTYPES {
        for (split, shape) in splits(ranks) {
            let (_, part) = places(&shape, &[held(&split, here)]);
            let (whole, part) = (shape.as_slice(), part.as_slice());
            salt += 10;
            let with = |number: u64| (dtype, salt + number);
            let (scatter, gather) = (Scatter(split.clone()), Gather(split.clone()));
            let (all_gather, reduce_scatter) = (AllGather(split.clone()), ReduceScatter(split.clone()));
            let results = [
                adjoint(rank, &Copy, (Replicated, PerRank), (whole, whole), with(0))?,
                adjoint(rank, &Reduce, (PerRank, Replicated), (whole, whole), with(1))?,
                adjoint(rank, &scatter, (Replicated, PerRank), (whole, part), with(2))?,
                adjoint(rank, &gather, (PerRank, Replicated), (part, whole), with(3))?,
                adjoint(rank, &all_gather, (PerRank, PerRank), (part, whole), with(4))?,
                adjoint(rank, &reduce_scatter, (PerRank, PerRank), (whole, part), with(5))?,
            ];
            nonzero += results.iter().filter(|&&is| is).count();
            // The same size along another axis, split as unlike as can be.
            let other = (split.axis + 1) % AXES;
            let mut both = shape.clone();
            both[other] = 2 * ranks + 1;
            for to in partitions(both[other], ranks) {
                let switch = Switch { from: split.clone(), to: Split { axis: other, partition: to } };
                let (_, before) = places(&both, &[held(&switch.from, here)]);
                let (_, after) = places(&both, &[held(&switch.to, here)]);
                nonzero += usize::from(adjoint(rank, &switch, (PerRank, PerRank), (&before, &after), with(6))?);
            }
        }
    }
    assert!(nonzero > 300, "most products are not 0: {nonzero} of {}", 3 * 15 * 9);
    Ok(())
}

fn for_every_world(check: impl Fn(&Rank<'_>) -> Result<()> + Sync) {
    for ranks in WORLDS {
        for result in on_ranks(ranks, DEADLINE, &check) {
            assert_eq!(result, Ok(()), "{ranks} ranks");
        }
    }
}

#[test]
fn copies_put_every_element_where_it_belongs() {
    for_every_world(copies);
}

#[test]
fn switches_put_every_element_where_it_belongs() {
    for_every_world(switches);
}

#[test]
fn sums_are_of_all_ranks() {
    for_every_world(sums);
}

#[test]
fn adjoints_are_adjoint() {
    for_every_world(adjoints);
}

/// A map over the axis 1 of size 6 or, for a switch, on to axis 0 of size 7.
fn named(name: &str, rank: &Rank<'_>, over: usize, axis: usize, x: &TensorView<'_>) -> Result<Tensor> {
    let split = Split::contiguous(axis, 6, over)?;
    match name {
        "scatter" => Scatter(split).apply(rank, x),
        "gather" => Gather(split).apply(rank, x),
        "all_gather" => AllGather(split).apply(rank, x),
        "reduce_scatter" => ReduceScatter(split).apply(rank, x),
        "switch" => Switch { from: split, to: Split::contiguous(0, 7, over)? }.apply(rank, x),
        "switch_to" => Switch { from: Split::contiguous(0, 7, over)?, to: split }.apply(rank, x),
        _ => panic!("no such map: {name}"),
    }
}

/// What a map over three ranks takes.
fn taken(name: &str, rank: usize) -> [usize; 2] {
    match name {
        "scatter" | "reduce_scatter" => [7, 6],
        "switch_to" => [[3, 2, 2][rank], 6],
        _ => [7, 2],
    }
}

const SPLITTING: [&str; 6] = ["scatter", "gather", "all_gather", "reduce_scatter", "switch", "switch_to"];

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Bad {
    Axis,
    Size,
    World,
    Dimensions,
}

fn call(name: &str, rank: &Rank<'_>, bad: Option<Bad>) -> Result<Tensor> {
    let mut shape = taken(name, rank.comm.rank()).to_vec();
    let (mut over, mut axis) = (3, 1);
    match bad {
        Some(Bad::Axis) => axis = 2,
        Some(Bad::Size) => shape[1] += 1,
        Some(Bad::World) => over = 2,
        Some(Bad::Dimensions) => shape.truncate(1),
        None => {}
    }
    named(name, rank, over, axis, &Tensor::zeros(DType::F32, &shape)?.view())
}

fn is_own(error: &Error, bad: Bad) -> bool {
    match bad {
        Bad::Axis => matches!(error, Error::Problem(ProblemError::Rank { tensor: "x", expected: 3, got: 2 })),
        Bad::Dimensions => matches!(error, Error::Problem(ProblemError::Rank { tensor: "x", expected: 2, got: 1 })),
        Bad::Size => matches!(error, Error::Problem(ProblemError::Shape { tensor: "x", .. })),
        Bad::World => matches!(error, Error::Comm(CommError::WorldSize { expected: 2, got: 3, .. })),
    }
}

#[test]
fn good_input_is_accepted() {
    for name in SPLITTING {
        for result in on_ranks(3, DEADLINE, |rank| call(name, rank, None)) {
            assert!(result.is_ok(), "{name}: {result:?}");
        }
    }
}

#[test]
fn bad_input_of_all_ranks_is_each_ranks_own_error() {
    for (name, bad) in
        SPLITTING.iter().flat_map(|name| [Bad::Axis, Bad::Size, Bad::World, Bad::Dimensions].map(|bad| (name, bad)))
    {
        for result in on_ranks(3, DEADLINE, |rank| call(name, rank, Some(bad))) {
            let error = result.unwrap_err();
            assert!(is_own(&error, bad), "{name} {bad:?}: {error:?}");
        }
    }
}

/// What does not communicate cannot tell: a scatter fails on the rank alone.
#[test]
fn bad_input_of_one_rank_is_told_to_the_others() {
    for (name, bad) in
        SPLITTING.iter().flat_map(|name| [Bad::Axis, Bad::Size, Bad::World, Bad::Dimensions].map(|bad| (name, bad)))
    {
        let results = on_ranks(3, DEADLINE, |rank| call(name, rank, (rank.comm.rank() == 1).then_some(bad)));
        for (rank, result) in results.into_iter().enumerate() {
            match result {
                Err(error) if rank == 1 => assert!(is_own(&error, bad), "{name} {bad:?}: {error:?}"),
                Err(Error::Comm(CommError::Refused { rank: 1, .. })) => assert_ne!(*name, "scatter"),
                Ok(_) => assert!(*name == "scatter" && rank != 1, "{name} {bad:?}: rank {rank} saw nothing"),
                Err(error) => panic!("{name} {bad:?}, rank {rank}: {error:?}"),
            }
        }
    }
}

/// Rank 2 has another dtype, another size of an axis that is whole, or another partition.
#[test]
fn ranks_that_differ_are_told_so() {
    let odd = |rank: &Rank<'_>| rank.comm.rank() == 2;
    let mismatch = |name: &str, results: Vec<Result<Tensor>>| {
        for result in results {
            assert!(matches!(result, Err(Error::Comm(CommError::Mismatch { .. }))), "{name}: {result:?}");
        }
    };
    for name in SPLITTING.iter().filter(|&&name| name != "scatter") {
        mismatch(
            name,
            on_ranks(3, DEADLINE, |rank| {
                let dtype = if odd(rank) { DType::BF16 } else { DType::F16 };
                named(name, rank, 3, 1, &Tensor::zeros(dtype, &taken(name, rank.comm.rank()))?.view())
            }),
        );
        mismatch(
            name,
            on_ranks(3, DEADLINE, |rank| {
                let mut shape = taken(name, rank.comm.rank()).to_vec();
                shape.push(if odd(rank) { 4 } else { 5 });
                named(name, rank, 3, 1, &Tensor::zeros(DType::F32, &shape)?.view())
            }),
        );
    }
    mismatch(
        "reduce",
        on_ranks(3, DEADLINE, |rank| {
            Reduce.apply(rank, &Tensor::zeros(DType::F32, &[if odd(rank) { 4 } else { 5 }])?.view())
        }),
    );
    // Each rank holds two positions in either: which ones is the difference.
    let partition = |odd: bool| if odd { Partition::zigzag(6, 3) } else { Partition::contiguous(6, 3) };
    mismatch(
        "partition",
        on_ranks(3, DEADLINE, |rank| {
            let split = Split { axis: 0, partition: partition(odd(rank))? };
            Gather(split).apply(rank, &Tensor::zeros(DType::F32, &[2])?.view())
        }),
    );
}
