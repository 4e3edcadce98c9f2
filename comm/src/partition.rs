//! Which positions of a sequence each rank holds.

use std::ops::Range;

use crate::communicator::near_equal;
use crate::error::{CommError, Result};

/// A sequence cut into chunks of consecutive positions, and the rank that holds each.
///
/// A rank's shard of a tensor is its chunks one after the other along the sequence, in the order of [`Partition::chunks`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Partition {
    seqlen: usize,
    chunks: Vec<Vec<Range<usize>>>,
}

/// Chunks in the order of the sequence: first position, rank, and where it lies in the rank's shard.
pub(crate) struct Owners {
    seqlen: usize,
    chunks: Vec<(usize, usize, usize)>,
}

impl Owners {
    /// The rank that holds a position, and where it lies in the rank's shard; none beyond the sequence.
    pub(crate) fn of(&self, position: usize) -> Option<(usize, usize)> {
        let behind = self.chunks.partition_point(|&(start, ..)| start <= position);
        let &(start, rank, local) = self.chunks.get(behind.checked_sub(1)?)?;
        (position < self.seqlen).then(|| (rank, local + position - start))
    }
}

/// Whether there is a position for every rank: found before a list of them is made, however many are asked for.
fn enough(seqlen: usize, ranks: usize) -> Result<()> {
    if ranks > seqlen { Err(CommError::EmptyShard { rank: seqlen, seqlen }.into()) } else { Ok(()) }
}

impl Partition {
    /// One chunk for each rank, in the order of ranks; the first ranks get one position more where it does not come out even.
    ///
    /// # Errors
    /// [`CommError::EmptyShard`] with more ranks than positions.
    pub fn contiguous(seqlen: usize, ranks: usize) -> Result<Self> {
        enough(seqlen, ranks)?;
        let mut chunks = runs(seqlen, ranks).into_iter();
        Self::new(seqlen, (0..ranks).map(|_| chunks.next().into_iter().collect()).collect())
    }

    /// Two chunks for each rank, one from the front and one from the back: rank r of p holds chunks r and 2p-1-r of 2p, so
    /// that with a causal mask every rank has the same work.
    ///
    /// # Errors
    /// As [`Partition::contiguous`].
    pub fn zigzag(seqlen: usize, ranks: usize) -> Result<Self> {
        enough(seqlen, ranks)?;
        let chunks = runs(seqlen, 2 * ranks);
        let held = |rank: usize| [rank, 2 * ranks - 1 - rank].map(|chunk| chunks[chunk].clone()).to_vec();
        Self::new(seqlen, (0..ranks).map(held).collect())
    }

    /// Any chunks, by rank. Empty ones are left out.
    ///
    /// # Errors
    /// [`CommError::EmptyShard`]; [`CommError::Cover`] when a position belongs to no rank, or to two; [`CommError::Counts`]
    /// without ranks.
    pub fn new(seqlen: usize, mut chunks: Vec<Vec<Range<usize>>>) -> Result<Self> {
        if chunks.is_empty() {
            let expected = "at least one rank".into();
            return Err(CommError::Counts { list: "chunks", expected, got: "none".into() }.into());
        }
        for (rank, held) in chunks.iter_mut().enumerate() {
            held.retain(|chunk| !chunk.is_empty());
            if held.is_empty() {
                return Err(CommError::EmptyShard { rank, seqlen }.into());
            }
        }
        let mut all: Vec<&Range<usize>> = chunks.iter().flatten().collect();
        all.sort_unstable_by_key(|chunk| chunk.start);
        let mut next = 0;
        for chunk in all {
            if chunk.start != next || chunk.end > seqlen {
                let position = chunk.start.min(next);
                return Err(CommError::Cover { seqlen, position, owners: owners(&chunks, position) }.into());
            }
            next = chunk.end;
        }
        if next != seqlen {
            return Err(CommError::Cover { seqlen, position: next, owners: Vec::new() }.into());
        }
        Ok(Self { seqlen, chunks })
    }

    /// Positions of the whole sequence.
    #[must_use]
    pub fn seqlen(&self) -> usize {
        self.seqlen
    }

    /// How many ranks hold it.
    #[must_use]
    pub fn ranks(&self) -> usize {
        self.chunks.len()
    }

    /// The chunks a rank holds, in the order of its shard.
    ///
    /// # Panics
    /// For a rank that is not below [`Partition::ranks`], as are the functions below.
    #[must_use]
    pub fn chunks(&self, rank: usize) -> &[Range<usize>] {
        &self.chunks[rank]
    }

    /// Positions a rank holds.
    #[must_use]
    pub fn count(&self, rank: usize) -> usize {
        self.chunks[rank].iter().map(Range::len).sum()
    }

    /// The positions a rank holds, in the order of its shard.
    pub fn positions(&self, rank: usize) -> impl Iterator<Item = usize> + '_ {
        self.chunks[rank].iter().cloned().flatten()
    }

    /// Who holds which position, to be looked up.
    pub(crate) fn owners(&self) -> Owners {
        let mut chunks = Vec::new();
        for rank in 0..self.ranks() {
            chunks.extend(self.places(rank).into_iter().map(|(local, start)| (start, rank, local.start)));
        }
        chunks.sort_unstable();
        Owners { seqlen: self.seqlen, chunks }
    }

    /// A rank's chunks: where each lies in its shard, and its first global position.
    pub(crate) fn places(&self, rank: usize) -> Vec<(Range<usize>, usize)> {
        let mut local = 0;
        let place = |chunk: &Range<usize>| {
            let at = local..local + chunk.len();
            local = at.end;
            (at, chunk.start)
        };
        self.chunks[rank].iter().map(place).collect()
    }

    /// The partition over groups of `size` neighbouring ranks, each of which holds what its members hold, one after the other.
    ///
    /// # Errors
    /// [`CommError::Counts`] when groups do not come out even.
    pub fn grouped(&self, size: usize) -> Result<Self> {
        if size == 0 || !self.ranks().is_multiple_of(size) {
            let expected = format!("a divisor of {} ranks", self.ranks());
            return Err(CommError::Counts { list: "group", expected, got: size.to_string() }.into());
        }
        let chunks = self.chunks.chunks(size).map(|members| members.concat()).collect();
        Ok(Self { seqlen: self.seqlen, chunks })
    }

    /// The members of a group among themselves: positions of the whole sequence where there is one group, else of what the
    /// group holds, in the order of [`Partition::grouped`].
    pub(crate) fn within_group(&self, group: usize, size: usize) -> Self {
        if size == self.ranks() {
            return self.clone();
        }
        let mut seqlen = 0;
        let run = |rank: usize| {
            seqlen += self.count(rank);
            std::iter::once(seqlen - self.count(rank)..seqlen).collect()
        };
        let chunks = (group * size..(group + 1) * size).map(run).collect();
        Self { seqlen, chunks }
    }
}

/// Checks two partitions against the sizes they cut, and against each other.
///
/// # Errors
/// [`CommError::Counts`] when one is of another length, or the second of another number of ranks.
pub(crate) fn check_alike(cut: [(&'static str, &Partition, usize); 2]) -> Result<()> {
    for (list, partition, size) in cut {
        if partition.seqlen() != size {
            let (expected, got) = (format!("a partition of {size}"), partition.seqlen().to_string());
            return Err(CommError::Counts { list, expected, got }.into());
        }
    }
    let [(first, one, _), (list, other, _)] = cut;
    if one.ranks() != other.ranks() {
        let (expected, got) = (format!("{} ranks, as {first} have", one.ranks()), other.ranks().to_string());
        return Err(CommError::Counts { list, expected, got }.into());
    }
    Ok(())
}

/// `count` consecutive runs of near-equal length.
fn runs(seqlen: usize, count: usize) -> Vec<Range<usize>> {
    let mut start = 0;
    let run = |length| {
        let run = start..start + length;
        start = run.end;
        run
    };
    near_equal(seqlen, count).into_iter().map(run).collect()
}

fn owners(chunks: &[Vec<Range<usize>>], position: usize) -> Vec<usize> {
    let holds = |held: &Vec<Range<usize>>| held.iter().any(|chunk| chunk.contains(&position));
    chunks.iter().enumerate().filter(|(_, held)| holds(held)).map(|(rank, _)| rank).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Error;

    #[test]
    fn every_position_has_one_place() {
        for ranks in [1, 2, 3, 5, 8] {
            for seqlen in [16, 17, 31, 100] {
                for partition in [Partition::contiguous(seqlen, ranks), Partition::zigzag(seqlen, ranks)] {
                    let partition = partition.unwrap();
                    let mut all: Vec<usize> = (0..ranks).flat_map(|rank| partition.positions(rank)).collect();
                    assert_eq!(all.len(), (0..ranks).map(|rank| partition.count(rank)).sum::<usize>());
                    all.sort_unstable();
                    assert_eq!(all, (0..seqlen).collect::<Vec<_>>());
                }
            }
        }
    }

    #[test]
    fn owners_are_found() {
        let partition = Partition::zigzag(31, 3).unwrap();
        let owners = partition.owners();
        for rank in 0..3 {
            for (local, position) in partition.positions(rank).enumerate() {
                assert_eq!(owners.of(position), Some((rank, local)));
            }
        }
        assert_eq!(owners.of(31), None);
    }

    #[test]
    fn zigzag_is_balanced_under_a_causal_mask() {
        for ranks in [2, 4, 8] {
            let partition = Partition::zigzag(16_384, ranks).unwrap();
            let scores = |rank| partition.positions(rank).map(|position| position + 1).sum::<usize>();
            let ideal = 16_384 * 16_385 / 2 / ranks;
            for rank in 0..ranks {
                assert!(scores(rank).abs_diff(ideal) * 20 < ideal, "{ranks} ranks: {} for {ideal}", scores(rank));
            }
            let plain = Partition::contiguous(16_384, ranks).unwrap();
            let last: usize = plain.positions(ranks - 1).map(|position| position + 1).sum();
            assert!(last > ideal * 14 / 10);
        }
    }

    #[test]
    fn gaps_overlaps_and_empty_shards_are_named() {
        let error = |chunks: Vec<Vec<Range<usize>>>| match Partition::new(10, chunks) {
            Err(Error::Comm(error)) => error,
            other => panic!("{other:?}"),
        };
        let cover = |position, owners: &[usize]| CommError::Cover { seqlen: 10, position, owners: owners.to_vec() };
        assert_eq!(error(vec![vec![0..4], vec![5..10]]), cover(4, &[]));
        assert_eq!(error(vec![vec![0..6], vec![5..10]]), cover(5, &[0, 1]));
        assert_eq!(error(vec![vec![0..6], vec![6..11]]), cover(6, &[1]));
        assert_eq!(error(vec![vec![0..6], vec![6..9]]), cover(9, &[]));
        assert_eq!(error(vec![vec![0..10], vec![]]), CommError::EmptyShard { rank: 1, seqlen: 10 });
        assert!(matches!(Partition::contiguous(3, 4), Err(Error::Comm(CommError::EmptyShard { rank: 3, .. }))));
        assert!(Partition::new(0, Vec::new()).is_err() && Partition::contiguous(5, 0).is_err());
        assert!(Partition::zigzag(4, 4).is_ok(), "half of the chunks are empty, no shard is");
    }

    #[test]
    fn groups_hold_what_their_members_hold() {
        let partition = Partition::zigzag(16, 4).unwrap();
        let groups = partition.grouped(2).unwrap();
        assert_eq!(groups.chunks(0), [0..2, 14..16, 2..4, 12..14]);
        assert_eq!(groups.places(1)[2], (4..6, 6));
        assert!(partition.grouped(3).is_err() && partition.grouped(0).is_err());
    }
}
