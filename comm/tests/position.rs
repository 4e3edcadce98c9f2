//! The table of positions against one that is whole: lookups, gradients, other partitions, memory, bad input.

#![allow(clippy::unwrap_used, reason = "a panic in a test is a failed test")]

mod ranks;

use std::time::Duration;

use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;
use ranks::on_ranks;
use tilefold_comm::sequence_parallel::position::PositionTable;
use tilefold_comm::{CommError, Communicator, Error, Partition, Rank, Reduction, Result, near_equal};
use tilefold_core::{DType, Element, ProblemError, Tensor, TensorView};

const DEADLINE: Duration = Duration::from_secs(120);
const WORLDS: [usize; 5] = [1, 2, 3, 5, 8];
const DTYPES: [DType; 3] = [DType::F32, DType::F16, DType::BF16];
const POSITIONS: usize = 43;
const WIDTH: usize = 3;
const SEED: u64 = 0x7461_626c;

fn partitions(ranks: usize) -> [Partition; 3] {
    // Rank r holds r + 1 positions from the end backwards, one chunk each; rank 0 the rest.
    let mut next = POSITIONS;
    let mut chunks: Vec<Vec<_>> = (0..ranks)
        .map(|rank| {
            let held = (0..=rank).map(|_| {
                next -= 1;
                next..next + 1
            });
            held.collect()
        })
        .collect();
    chunks[0].push(0..next);
    let uneven = Partition::new(POSITIONS, chunks);
    [Partition::contiguous(POSITIONS, ranks), Partition::zigzag(POSITIONS, ranks), uneven].map(Result::unwrap)
}

/// Row `position` of the whole table: whole numbers that every dtype holds, no two rows alike.
fn row(position: usize) -> [f64; WIDTH] {
    [position as f64, 100.0 - position as f64, -1.0]
}

fn rows(positions: impl IntoIterator<Item = usize>, dtype: DType) -> Tensor {
    let values: Vec<f64> = positions.into_iter().flat_map(row).collect();
    Tensor::from_f64(&values, dtype, &[values.len() / WIDTH, WIDTH]).unwrap()
}

fn table(comm: &Communicator, partition: &Partition, dtype: DType) -> Result<PositionTable> {
    PositionTable::new(comm, partition.clone(), rows(partition.positions(comm.rank()), dtype))
}

/// What a rank asks for: unordered, repeated, of other ranks and of none but one; another number of tokens on each rank.
fn asked(rank: usize, round: u64) -> Vec<usize> {
    let mut random = ChaCha8Rng::seed_from_u64(SEED + 100 * round + rank as u64);
    match round {
        0 => (0..POSITIONS).rev().collect(),
        1 => vec![POSITIONS - 1; rank + 1],
        2 => vec![7],
        _ => (0..20 + 5 * rank).map(|_| random.random_range(0..POSITIONS)).collect(),
    }
}

const ROUNDS: u64 = 5;

fn lookups(rank: &Rank<'_>) -> Result<()> {
    for (partition, dtype) in partitions(rank.comm.world_size()).iter().zip(DTYPES) {
        let table = table(rank.comm, partition, dtype)?;
        for round in 0..ROUNDS {
            let positions = asked(rank.comm.rank(), round);
            let found = table.lookup(rank.comm, &positions)?;
            assert_eq!((found.shape(), found.dtype()), ([positions.len(), WIDTH].as_slice(), dtype));
            assert_eq!(found.to_f64()?, rows(positions, dtype).to_f64()?, "round {round}, {partition:?}");
        }
    }
    Ok(())
}

/// The gradient of token `token` of a rank: whole numbers, so that no order of sums matters.
fn d_row(rank: usize, token: usize) -> [f64; WIDTH] {
    [(rank % 4) as f64, (token % 3) as f64 - 1.0, 1.0]
}

fn gradients(rank: &Rank<'_>) -> Result<()> {
    let (here, ranks) = (rank.comm.rank(), rank.comm.world_size());
    for (partition, dtype) in partitions(ranks).iter().zip(DTYPES) {
        let table = table(rank.comm, partition, dtype)?;
        for round in 0..ROUNDS {
            let positions = asked(here, round);
            let d_rows: Vec<f64> = (0..positions.len()).flat_map(|token| d_row(here, token)).collect();
            let d_rows = Tensor::from_f64(&d_rows, dtype, &[positions.len(), WIDTH])?;
            let gradient = table.gradient(rank.comm, &positions, &d_rows.view())?;
            let mut whole = vec![[0.0; WIDTH]; POSITIONS];
            for other in 0..ranks {
                for (token, position) in asked(other, round).into_iter().enumerate() {
                    whole[position].iter_mut().zip(d_row(other, token)).for_each(|(sum, value)| *sum += value);
                }
            }
            let own: Vec<f64> = partition.positions(here).flat_map(|position| whole[position]).collect();
            assert_eq!((gradient.shape(), gradient.dtype()), ([partition.count(here), WIDTH].as_slice(), DType::F32));
            assert_eq!(gradient.to_f64()?, own, "round {round}, {partition:?}");
        }
    }
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
fn lookups_give_the_rows_of_the_whole_table() {
    for_every_world(lookups);
}

#[test]
fn gradients_are_those_of_the_whole_table() {
    for_every_world(gradients);
}

/// In f32, rank by rank and token by token: 2^24 + 1 + 1 is 2^24 in this order, and 2^24 + 2 in the other.
#[test]
fn gradients_are_summed_in_the_order_of_ranks() {
    let sums = on_ranks(3, DEADLINE, |rank| {
        let table = table(rank.comm, &Partition::contiguous(POSITIONS, 3)?, DType::F32)?;
        let first = if rank.comm.rank() == 0 { 16_777_216.0 } else { 1.0 };
        let d_rows = [first, 0.0, 0.0];
        table.gradient(rank.comm, &[0], &TensorView::from_slice(&d_rows, &[1, WIDTH])?)
    });
    assert_eq!(sums[0].as_ref().unwrap().as_slice::<f32>().unwrap()[0], 16_777_216.0);
}

/// Slicing tokens by rank and then summing the parts of a table over ranks, as for a vocabulary, adds rows of different
/// tokens: with four ranks 15 of 16 come out wrong. The table asks whoever has the row.
#[test]
fn rows_of_different_tokens_are_not_added() {
    let ranks = 4;
    let count = 16 * ranks;
    let wrong = on_ranks(ranks, DEADLINE, |rank| {
        let partition = Partition::contiguous(count, ranks)?;
        let table = table(rank.comm, &partition, DType::F32)?;
        // Tokens of each rank have other positions than those of the others, but for the first.
        let mut positions: Vec<usize> =
            (0..16).map(|token| (token * 7 + 16 * (rank.comm.rank() + 1) + 1) % count).collect();
        positions[0] = 5;
        let right = rows(positions.clone(), DType::F32).to_f64()?;
        assert_eq!(table.lookup(rank.comm, &positions)?.to_f64()?, right);
        let held: Vec<usize> = partition.positions(rank.comm.rank()).collect();
        let masked: Vec<f32> = positions
            .iter()
            .flat_map(|position| if held.contains(position) { row(*position) } else { [0.0; WIDTH] })
            .map(f32::from_f64)
            .collect();
        let summed = rank.comm.all_reduce(&TensorView::from_slice(&masked, &[16, WIDTH])?, Reduction::Sum)?.to_f64()?;
        Ok::<_, Error>(summed.chunks(WIDTH).zip(right.chunks(WIDTH)).filter(|(summed, right)| summed != right).count())
    });
    for wrong in wrong {
        assert_eq!(wrong.unwrap(), 15, "the test has to tell the two apart");
    }
}

#[test]
fn a_table_cut_in_another_way_has_the_same_rows() {
    for_every_world(|rank| {
        let ways = partitions(rank.comm.world_size());
        for (from, to) in ways.iter().zip(ways.iter().cycle().skip(1)) {
            for dtype in DTYPES {
                let there = table(rank.comm, from, dtype)?.reshard(rank.comm, to.clone())?;
                assert_eq!(there.partition(), to);
                assert_eq!(there.rows().to_f64()?, rows(to.positions(rank.comm.rank()), dtype).to_f64()?);
            }
        }
        Ok(())
    });
}

#[test]
fn a_saved_table_is_restored_to_any_number_of_ranks() {
    for saved_over in WORLDS {
        for (saved, dtype) in partitions(saved_over).into_iter().zip(DTYPES) {
            let parts: Vec<Tensor> = (0..saved_over).map(|part| rows(saved.positions(part), dtype)).collect();
            for_every_world(|rank| {
                let views: Vec<_> = parts.iter().map(Tensor::view).collect();
                for to in partitions(rank.comm.world_size()) {
                    let table = PositionTable::from_saved(rank.comm, &views, &saved, to.clone())?;
                    let own = rows(to.positions(rank.comm.rank()), dtype);
                    assert_eq!((table.rows().dtype(), table.rows().to_f64()?), (dtype, own.to_f64()?));
                    let found = table.lookup(rank.comm, &[POSITIONS - 1, 0])?;
                    assert_eq!(found.to_f64()?, rows([POSITIONS - 1, 0], dtype).to_f64()?);
                }
                Ok(())
            });
        }
    }
}

#[test]
fn a_rank_holds_its_share_of_the_memory() {
    let (positions, width) = (4096, 8);
    let whole = positions * width * 4;
    for ranks in WORLDS {
        let bytes = on_ranks(ranks, DEADLINE, |rank| {
            let partition = Partition::zigzag(positions, ranks)?;
            let rows = Tensor::zeros(DType::F32, &[partition.count(rank.comm.rank()), width])?;
            Ok::<_, Error>(PositionTable::new(rank.comm, partition, rows)?.rows().storage().bytes())
        });
        let bytes: Vec<usize> = bytes.into_iter().map(Result::unwrap).collect();
        assert_eq!(bytes.iter().sum::<usize>(), whole, "{ranks} ranks");
        let largest = (near_equal(positions, ranks)[0] + 1) * width * 4;
        assert!(bytes.iter().all(|&bytes| bytes <= largest), "{ranks} ranks: {bytes:?}");
    }
}

fn has_counts(error: &Error, name: &str) -> bool {
    matches!(error, Error::Comm(CommError::Counts { list, .. }) if *list == name)
}

#[test]
fn bad_positions_of_one_rank_are_told_to_all_and_the_communicator_stays_usable() {
    type Call = fn(&PositionTable, &Communicator, &[usize]) -> Result<Tensor>;
    let calls: [Call; 2] = [
        |table, comm, positions| table.lookup(comm, positions),
        |table, comm, positions| {
            let d_rows = Tensor::zeros(DType::F32, &[positions.len().max(1), WIDTH])?;
            table.gradient(comm, positions, &d_rows.view())
        },
    ];
    let none: &[usize] = &[];
    for (call, bad) in calls.iter().flat_map(|call| [none, &[POSITIONS], &[0, usize::MAX]].map(|bad| (call, bad))) {
        let results = on_ranks(3, DEADLINE, |rank| {
            let table = table(rank.comm, &Partition::contiguous(POSITIONS, 3)?, DType::F32)?;
            let result = call(&table, rank.comm, if rank.comm.rank() == 1 { bad } else { &[1, 2] });
            assert!(rank.comm.is_usable());
            let again = table.lookup(rank.comm, &[3])?;
            assert_eq!(again.to_f64()?, row(3));
            result
        });
        for (rank, result) in results.into_iter().enumerate() {
            let error = result.unwrap_err();
            let is_own = has_counts(&error, "positions")
                || matches!(error, Error::Problem(ProblemError::Shape { tensor: "d_rows", .. }));
            let is_told = matches!(error, Error::Comm(CommError::Refused { rank: 1, .. }));
            assert!(if rank == 1 { is_own } else { is_told }, "rank {rank}, {bad:?}: {error:?}");
        }
    }
}

#[test]
fn a_bad_gradient_of_one_rank_is_told_to_all() {
    let shapes: [(&[usize], DType); 3] =
        [(&[2, WIDTH + 1], DType::F32), (&[3, WIDTH], DType::F32), (&[2, WIDTH], DType::BF16)];
    for (shape, dtype) in shapes {
        let results = on_ranks(3, DEADLINE, |rank| {
            let table = table(rank.comm, &Partition::contiguous(POSITIONS, 3)?, DType::F32)?;
            let (shape, dtype) = if rank.comm.rank() == 2 { (shape, dtype) } else { (&[2, WIDTH][..], DType::F32) };
            table.gradient(rank.comm, &[1, 2], &Tensor::zeros(dtype, shape)?.view())
        });
        for (rank, result) in results.into_iter().enumerate() {
            let error = result.unwrap_err();
            let is_expected = match &error {
                Error::Problem(ProblemError::Shape { .. } | ProblemError::UnsupportedDType { .. }) => rank == 2,
                Error::Comm(CommError::Refused { rank: 2, .. }) => rank != 2,
                _ => false,
            };
            assert!(is_expected, "rank {rank}, {shape:?} {dtype}: {error:?}");
        }
    }
}

#[test]
fn a_strided_gradient_is_refused_on_all_ranks() {
    let results = on_ranks(3, DEADLINE, |rank| {
        let table = table(rank.comm, &Partition::contiguous(POSITIONS, 3)?, DType::F32)?;
        let d_rows = Tensor::zeros(DType::F32, &[WIDTH, 2])?;
        let dense = Tensor::zeros(DType::F32, &[2, WIDTH])?;
        let view = if rank.comm.rank() == 2 { d_rows.view().permute(&[1, 0])? } else { dense.view() };
        table.gradient(rank.comm, &[1, 2], &view)
    });
    for (rank, result) in results.into_iter().enumerate() {
        let error = result.unwrap_err();
        let is_expected = match &error {
            Error::Problem(ProblemError::NotContiguous { .. }) => rank == 2,
            Error::Comm(CommError::Refused { rank: 2, .. }) => rank != 2,
            _ => false,
        };
        assert!(is_expected, "rank {rank}: {error:?}");
    }
}

#[test]
fn rows_and_partitions_that_do_not_fit_are_refused() {
    let comm = Communicator::alone();
    let whole = || Partition::contiguous(4, 1).unwrap();
    let new = |partition, dtype, shape: &[usize]| {
        PositionTable::new(&comm, partition, Tensor::zeros(dtype, shape).unwrap()).unwrap_err()
    };
    let two = Partition::contiguous(4, 2).unwrap();
    let error = new(two.clone(), DType::F32, &[2, 3]);
    assert!(matches!(error, Error::Comm(CommError::WorldSize { expected: 2, got: 1, .. })), "{error:?}");
    let error = new(whole(), DType::I32, &[4, 3]);
    assert!(matches!(error, Error::Problem(ProblemError::UnsupportedDType { .. })), "{error:?}");
    let error = new(whole(), DType::F32, &[4]);
    assert!(matches!(error, Error::Problem(ProblemError::Rank { expected: 2, got: 1, .. })), "{error:?}");
    let error = new(whole(), DType::F32, &[3, 3]);
    assert!(matches!(error, Error::Problem(ProblemError::Shape { expected: 4, got: 3, .. })), "{error:?}");

    let part = |rows: usize, width| Tensor::zeros(DType::F32, &[rows, width]).unwrap();
    let saved = |parts: &[Tensor], saved: &Partition, to| {
        let views: Vec<_> = parts.iter().map(Tensor::view).collect();
        PositionTable::from_saved(&comm, &views, saved, to).unwrap_err()
    };
    assert!(has_counts(&saved(&[part(4, 3)], &two, whole()), "parts"));
    assert!(has_counts(&saved(&[], &two, whole()), "parts"));
    let five = Partition::contiguous(5, 1).unwrap();
    assert!(has_counts(&saved(&[part(2, 3), part(2, 3)], &two, five), "parts"));
    let half = Tensor::zeros(DType::F16, &[2, 3]).unwrap();
    for (second, got) in [(part(3, 3), "f32 [3, 3]"), (part(2, 4), "f32 [2, 4]"), (half, "f16 [2, 3]")] {
        let error = saved(&[part(2, 3), second], &two, whole()).to_string();
        assert!(error.contains("part 1 of f32 [2, 3]") && error.contains(got), "{error}");
    }
    let error = saved(&[part(2, 3), part(2, 3)], &two, two.clone());
    assert!(matches!(error, Error::Comm(CommError::WorldSize { expected: 2, got: 1, .. })), "{error:?}");
}

/// A table, or the partition to restore one to, that was made for fewer ranks than now call, or for more.
#[test]
fn a_table_of_other_ranks_is_refused_on_all_ranks() {
    for (made_for, ranks) in [(2, 3), (3, 2)] {
        let results = on_ranks(ranks, DEADLINE, |rank| {
            let partition = Partition::contiguous(POSITIONS, made_for)?;
            let of_others = &Communicator::threads(made_for)[rank.comm.rank() % made_for];
            let table = table(of_others, &partition, DType::F32)?;
            let d_rows = [0_f32; WIDTH];
            let whole = rows(0..POSITIONS, DType::F32);
            Ok::<_, Error>([
                table.lookup(rank.comm, &[POSITIONS - 1]).err(),
                table.gradient(rank.comm, &[POSITIONS - 1], &TensorView::from_slice(&d_rows, &[1, WIDTH])?).err(),
                table.reshard(rank.comm, Partition::contiguous(POSITIONS, ranks)?).err(),
                PositionTable::from_saved(rank.comm, &[whole.view()], &Partition::contiguous(POSITIONS, 1)?, partition)
                    .err(),
            ])
        });
        for error in results.into_iter().flat_map(Result::unwrap) {
            let is_refused = |error: &Error| matches!(error, Error::Comm(CommError::WorldSize { expected, got, .. }) if (*expected, *got) == (made_for, ranks));
            assert!(error.as_ref().is_some_and(is_refused), "{made_for} for {ranks}: {error:?}");
        }
    }
}

#[test]
fn ranks_with_different_tables_are_told_so() {
    let results = on_ranks(3, DEADLINE, |rank| {
        let odd = rank.comm.rank() == 1;
        let partition = if odd { Partition::zigzag(POSITIONS, 3) } else { Partition::contiguous(POSITIONS, 3) }?;
        let by_partition = table(rank.comm, &partition, DType::F32)?.lookup(rank.comm, &[1]).err();
        let dtype = if odd { DType::F16 } else { DType::F32 };
        let by_dtype = table(rank.comm, &Partition::contiguous(POSITIONS, 3)?, dtype)?.lookup(rank.comm, &[1]).err();
        let to =
            table(rank.comm, &Partition::contiguous(POSITIONS, 3)?, DType::F32)?.reshard(rank.comm, partition).err();
        Ok::<_, Error>([by_partition, by_dtype, to])
    });
    for error in results.into_iter().flat_map(Result::unwrap) {
        assert!(matches!(error, Some(Error::Comm(CommError::Mismatch { .. }))), "{error:?}");
    }
}
