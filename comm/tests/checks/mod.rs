//! What every engine must do, whatever the number of ranks: called by each rank of a group.

use std::sync::Arc;

use half::{bf16, f16};
use tilefold_comm::{CommError, Communicator, Error, Reduction, Result, near_equal};
use tilefold_core::{DType, Tensor, TensorView};

/// All checks, in an order that is the same on all ranks.
pub(crate) fn all(comm: &Communicator) -> Result<()> {
    gathers(comm)?;
    exchanges(comm)?;
    reduces(comm)?;
    rounds_once(comm)?;
    adds_in_order(comm)?;
    broadcasts(comm)?;
    shifts(comm)?;
    splits(comm)?;
    agrees(comm)?;
    comm.barrier()
}

/// Element `index` of what rank `from` has for rank `to`: no two are alike.
fn coded(from: usize, to: usize, index: usize) -> i32 {
    i32::try_from(10_000 * from + 100 * to + index).unwrap()
}

fn row(from: usize, to: usize, count: usize) -> Vec<i32> {
    (0..count).map(|index| coded(from, to, index)).collect()
}

/// Rank r has r + 1 rows of 3.
fn gathers(comm: &Communicator) -> Result<()> {
    let mine = row(comm.rank(), 0, 3 * (comm.rank() + 1));
    let parts = comm.all_gather(&TensorView::from_slice(&mine, &[comm.rank() + 1, 3])?)?;
    assert_eq!(parts.len(), comm.world_size());
    for (rank, part) in parts.iter().enumerate() {
        assert_eq!(part.shape(), [rank + 1, 3]);
        assert_eq!(part.as_slice::<i32>()?, row(rank, 0, 3 * (rank + 1)));
    }
    Ok(())
}

/// Rank r has 1 + (r + 2 · to) % 4 elements for rank `to`.
fn exchanges(comm: &Communicator) -> Result<()> {
    let (rank, ranks) = (comm.rank(), comm.world_size());
    let count = |from: usize, to: usize| 1 + (from + 2 * to) % 4;
    let rows: Vec<Vec<i32>> = (0..ranks).map(|to| row(rank, to, count(rank, to))).collect();
    let views =
        rows.iter().map(|row| TensorView::from_slice(row, &[row.len()])).collect::<std::result::Result<Vec<_>, _>>()?;
    for (from, part) in comm.all_to_all(&views)?.iter().enumerate() {
        assert_eq!(part.as_slice::<i32>()?, row(from, rank, count(from, rank)));
    }
    // Nothing for some, several tensors of other dtypes for others.
    let parcel = |from: usize, to: usize| {
        let numbers = |_| Arc::new(Tensor::from_f64(&[from as f64, to as f64], DType::F16, &[2]).unwrap());
        (0..(from + to) % 3).map(numbers).collect::<Vec<_>>()
    };
    let got = comm.all_to_all_parcels((0..ranks).map(|to| parcel(rank, to)).collect())?;
    for (from, got) in got.iter().enumerate() {
        assert_eq!(got.len(), (from + rank) % 3);
        for tensor in got {
            assert_eq!((tensor.dtype(), tensor.to_f64()?), (DType::F16, vec![from as f64, rank as f64]));
        }
    }
    Ok(())
}

/// Sizes that ranks divide and that they do not, smaller than the number of ranks too.
fn reduces(comm: &Communicator) -> Result<()> {
    let (rank, ranks) = (comm.rank(), comm.world_size());
    for size in [1, 2, 7, 64] {
        let mine: Vec<i32> = (0..size).map(|i| i32::try_from(i * (rank + 1)).unwrap()).collect();
        let view = TensorView::from_slice(&mine, &[size])?;
        let total = (1..=ranks).sum::<usize>();
        let sum: Vec<i32> = (0..size).map(|i| i32::try_from(i * total).unwrap()).collect();
        assert_eq!(comm.all_reduce(&view, Reduction::Sum)?.as_slice::<i32>()?, sum);
        let largest: Vec<i32> = (0..size).map(|i| i32::try_from(i * ranks).unwrap()).collect();
        assert_eq!(comm.all_reduce(&view, Reduction::Max)?.as_slice::<i32>()?, largest);
    }
    let counts: Vec<usize> = (0..ranks).map(|rank| 1 + rank % 3).collect();
    let rows = counts.iter().sum::<usize>();
    let mine: Vec<f32> = (0..2 * rows).map(|i| i as f32 + rank as f32).collect();
    let part = comm.reduce_scatter(&TensorView::from_slice(&mine, &[rows, 2])?, &counts, Reduction::Sum)?;
    let (first, count) = (counts[..rank].iter().sum::<usize>(), counts[rank]);
    let ranks_sum = (0..ranks).sum::<usize>() as f32;
    let sum: Vec<f32> = (2 * first..2 * (first + count)).map(|i| (i * ranks) as f32 + ranks_sum).collect();
    assert_eq!((part.shape(), part.as_slice::<f32>()?), ([count, 2].as_slice(), sum.as_slice()));
    Ok(())
}

/// 256, then ones: in bf16 each 256 + 1 would round to 256 again; in f32 the ones count.
fn rounds_once(comm: &Communicator) -> Result<()> {
    let ranks = comm.world_size();
    let mine = [bf16::from_f32(if comm.rank() == 0 { 256.0 } else { 1.0 })];
    let sum = comm.all_reduce(&TensorView::from_slice(&mine, &[1])?, Reduction::Sum)?;
    assert_eq!(sum.as_slice::<bf16>()?, [bf16::from_f32(255.0 + ranks as f32)]);
    let mine = vec![f16::from_f32(if comm.rank() == 0 { 2048.0 } else { 1.0 }); ranks];
    let sum = comm.reduce_scatter(&TensorView::from_slice(&mine, &[ranks])?, &vec![1; ranks], Reduction::Sum)?;
    assert_eq!(sum.as_slice::<f16>()?, [f16::from_f32(2047.0 + ranks as f32)]);
    Ok(())
}

/// Sums of floats are those of the ranks in their order: 1 is lost beside 2²⁵, and would not be after -2²⁵ has taken it away.
fn adds_in_order(comm: &Communicator) -> Result<()> {
    let large = (1 << 25) as f32;
    let of_rank = |rank: usize| [1.0, large, -large].get(rank).copied().unwrap_or(0.0);
    let expected = (0..comm.world_size()).fold(0.0, |sum, rank| sum + of_rank(rank));
    let mine = vec![of_rank(comm.rank()); comm.world_size()];
    let view = TensorView::from_slice(&mine, &[comm.world_size()])?;
    assert_eq!(comm.all_reduce(&view, Reduction::Sum)?.as_slice::<f32>()?, vec![expected; comm.world_size()]);
    let part = comm.reduce_scatter(&view, &vec![1; comm.world_size()], Reduction::Sum)?;
    assert_eq!(part.as_slice::<f32>()?, [expected]);
    Ok(())
}

fn broadcasts(comm: &Communicator) -> Result<()> {
    for root in 0..comm.world_size() {
        let data = row(root, 1, 5);
        let view = TensorView::from_slice(&data, &[5])?;
        let got = comm.broadcast(root, (comm.rank() == root).then_some(&view))?;
        assert_eq!(got.as_slice::<i32>()?, row(root, 1, 5));
    }
    Ok(())
}

/// Round the ring until everything is home again.
fn shifts(comm: &Communicator) -> Result<()> {
    let (rank, ranks) = (comm.rank(), comm.world_size());
    let mut travelling = vec![Arc::new(Tensor::from_vec(row(rank, 2, rank + 1), &[rank + 1])?)];
    for step in 1..=ranks {
        travelling = comm.send_recv(comm.neighbour(1), travelling, comm.neighbour(-1))?;
        let from = (rank + ranks - step % ranks) % ranks;
        assert_eq!(travelling[0].as_slice::<i32>()?, row(from, 2, from + 1));
    }
    // Letters arrive in the order they were sent, and may wait.
    for letter in 0..3 {
        comm.send(comm.neighbour(1), vec![Arc::new(Tensor::from_vec(vec![letter], &[1])?)])?;
    }
    comm.barrier()?;
    for letter in 0..3 {
        assert_eq!(comm.receive(comm.neighbour(-1))?[0].as_slice::<i32>()?, [letter]);
    }
    Ok(())
}

/// Even and odd ranks, in reverse order.
fn splits(comm: &Communicator) -> Result<()> {
    let (rank, ranks) = (comm.rank(), comm.world_size());
    let group = comm.split(u32::try_from(rank % 2).unwrap(), -i32::try_from(rank).unwrap())?;
    let members: Vec<usize> = (0..ranks).rev().filter(|member| member % 2 == rank % 2).collect();
    assert_eq!((group.world_size(), members[group.rank()]), (members.len(), rank));
    let parts = group.all_gather(&TensorView::from_slice(&[coded(rank, 3, 0)], &[1])?)?;
    let got: Vec<i32> = parts.iter().map(|part| part.as_slice::<i32>().unwrap()[0]).collect();
    assert_eq!(got, members.iter().map(|&rank| coded(rank, 3, 0)).collect::<Vec<_>>());
    let again = group.split(0, 0)?;
    assert_eq!((again.rank(), again.world_size()), (group.rank(), group.world_size()));
    again.barrier()
}

fn agrees(comm: &Communicator) -> Result<()> {
    comm.agree("plan", Ok("the same".into()))?;
    let last = comm.world_size() - 1;
    if last == 0 {
        return Ok(());
    }
    let differing = comm.agree("plan", Ok(if comm.rank() == last { "b".into() } else { "a".into() }));
    let operations = ["plan a".to_owned(), "plan b".to_owned()];
    let ranks = [0, last];
    assert_eq!(differing, Err(CommError::Mismatch { ranks, operations }.into()));
    let own = || Error::from(CommError::ZeroDeadline);
    let refused = comm.agree("plan", if comm.rank() == last { Err(own()) } else { Ok("a".into()) });
    let message = own().to_string();
    let told = CommError::Refused { operation: "plan".into(), rank: last, message }.into();
    assert_eq!(refused, Err(if comm.rank() == last { own() } else { told }));
    assert!(comm.is_usable());
    assert_eq!(near_equal(7, 3), [3, 2, 2]);
    Ok(())
}
