//! A table of positions that no rank holds whole.
//!
//! Each rank has the rows of some positions; whoever needs a row asks the rank that has it, whatever positions its own tokens
//! have. (Slicing tokens by rank and summing a table's parts over ranks, as for a vocabulary, would add rows of different
//! tokens.)

use std::sync::Arc;

use tilefold_core::{ProblemError, Tensor, TensorView, TensorViewMut};

use crate::communicator::Communicator;
use crate::error::{CommError, Result};
use crate::host;
use crate::partition::Partition;

/// Numbers for each rank.
type ByRank = Vec<Vec<usize>>;

/// One rank's rows of a table `[positions, width]`, on the host.
///
/// *Memory*: `width · count(rank)` numbers, and the rows that a lookup asks for. *Numerics*: lookups are copies; gradients are
/// summed in f32, in the order of ranks and then of their tokens. *Determinism*: the same bits on every run.
#[derive(Debug)]
pub struct PositionTable {
    partition: Partition,
    rows: Tensor,
}

impl PositionTable {
    /// This rank's rows, `[count(rank), width]`.
    ///
    /// # Errors
    /// [`CommError::WorldSize`] for a partition over other ranks: see [`PositionTable::from_saved`]; [`ProblemError`] for rows
    /// that are not as many as the partition says.
    pub fn new(comm: &Communicator, partition: Partition, rows: Tensor) -> Result<Self> {
        check_rows(comm, &partition, &rows)?;
        Ok(Self { partition, rows })
    }

    /// A rank's rows from a table that was saved in parts, by any number of ranks: part `i` has the positions that rank `i` of
    /// `saved` holds.
    ///
    /// # Errors
    /// As [`PositionTable::new`]; [`CommError::Counts`] when `saved` has other positions, or names the part that does not fit it or
    /// the first part's dtype and width.
    pub fn from_saved(comm: &Communicator, parts: &[TensorView<'_>], saved: &Partition, to: Partition) -> Result<Self> {
        check_ranks(comm, &to)?;
        if saved.ranks() != parts.len() || saved.seqlen() != to.seqlen() {
            let expected = format!("{} parts of a table of {} positions", saved.ranks(), to.seqlen());
            let got = format!("{} parts of {}", parts.len(), saved.seqlen());
            return Err(CommError::Counts { list: "parts", expected, got }.into());
        }
        let (dtype, width) = (parts[0].dtype(), parts[0].shape().last().copied().unwrap_or(0));
        for (part, view) in parts.iter().enumerate() {
            let shape = [saved.count(part), width];
            if view.shape() != shape || view.dtype() != dtype {
                let expected = format!("part {part} of {dtype} {shape:?}");
                let got = format!("{} {:?}", view.dtype(), view.shape());
                return Err(CommError::Counts { list: "parts", expected, got }.into());
            }
        }
        let owners = saved.owners();
        let row_bytes = width * dtype.size_bytes();
        let mut bytes = Vec::new();
        for position in to.positions(comm.rank()) {
            let Some((part, row)) = owners.of(position) else {
                let (expected, got) = (format!("positions below {}", saved.seqlen()), position.to_string());
                return Err(CommError::Counts { list: "to", expected, got }.into());
            };
            bytes.extend_from_slice(&parts[part].as_bytes()?[row * row_bytes..(row + 1) * row_bytes]);
        }
        let rows = host::tensor(&bytes, dtype, &[to.count(comm.rank()), width])?;
        Self::new(comm, to, rows)
    }

    /// Who holds which position.
    #[must_use]
    pub fn partition(&self) -> &Partition {
        &self.partition
    }

    /// This rank's rows.
    #[must_use]
    pub fn rows(&self) -> &Tensor {
        &self.rows
    }

    /// This rank's rows, to be updated in place.
    #[must_use]
    pub fn rows_mut(&mut self) -> TensorViewMut<'_> {
        self.rows.view_mut()
    }

    /// Rows `[positions, width]` of any positions, in any order, repeated or not. Called by all ranks, each with its own
    /// positions, at least one.
    ///
    /// # Errors
    /// [`CommError::Counts`] for a position beyond the table, or none at all, which the other ranks see as
    /// [`CommError::Refused`]; [`CommError::WorldSize`] for a table of other ranks.
    pub fn lookup(&self, comm: &Communicator, positions: &[usize]) -> Result<Tensor> {
        let (wanted, asked) = self.asked(comm, positions)?;
        let row_bytes = self.row_bytes();
        let answers = asked.iter().map(|rows| {
            let mut bytes = Vec::with_capacity(rows.len() * row_bytes);
            let own = self.rows.view();
            for row in rows {
                bytes.extend_from_slice(&own.as_bytes()?[row * row_bytes..(row + 1) * row_bytes]);
            }
            self.parcel(&bytes, rows.len())
        });
        let answers = comm.checked("position_lookup", answers.collect::<Result<_>>())?;
        let answers = comm.exchange("position_lookup", "rows", answers)?;
        let mut found = Tensor::zeros(self.rows.dtype(), &[positions.len(), self.width()])?;
        let memory = found.host_bytes_mut().unwrap_or_default();
        for (answer, tokens) in answers.iter().flatten().zip(wanted.iter().filter(|tokens| !tokens.is_empty())) {
            let view = answer.view();
            for (row, token) in view.as_bytes()?.chunks(row_bytes).zip(tokens) {
                memory[token * row_bytes..(token + 1) * row_bytes].copy_from_slice(row);
            }
        }
        Ok(found)
    }

    /// The gradient of this rank's rows, f32 `[count(rank), width]`, from that of what [`PositionTable::lookup`] gave for the
    /// same positions, `[positions, width]`. Called by all ranks.
    ///
    /// # Errors
    /// As [`PositionTable::lookup`]; [`ProblemError`] for a gradient of another shape.
    pub fn gradient(&self, comm: &Communicator, positions: &[usize], d_rows: &TensorView<'_>) -> Result<Tensor> {
        let expected = [positions.len(), self.width()];
        let shape = crate::shape::exact("d_rows", d_rows, &expected, self.rows.dtype());
        comm.agree("position_gradient", shape.map(|()| String::new()))?;
        let (wanted, asked) = self.asked(comm, positions)?;
        let row_bytes = self.row_bytes();
        let parcels = wanted.iter().map(|tokens| {
            let mut bytes = Vec::with_capacity(tokens.len() * row_bytes);
            for token in tokens {
                bytes.extend_from_slice(&d_rows.as_bytes()?[token * row_bytes..(token + 1) * row_bytes]);
            }
            self.parcel(&bytes, tokens.len())
        });
        let parcels = comm.checked("position_gradient", parcels.collect::<Result<_>>())?;
        let parts = comm.exchange("position_gradient", "rows", parcels)?;
        let mut sum = vec![0_f32; self.rows.layout().len()];
        for (part, rows) in parts.iter().flatten().zip(asked.iter().filter(|rows| !rows.is_empty())) {
            let values = host::singles(part)?;
            for (values, row) in values.chunks(self.width()).zip(rows) {
                let place = &mut sum[row * self.width()..(row + 1) * self.width()];
                place.iter_mut().zip(values).for_each(|(sum, value)| *sum += value);
            }
        }
        Ok(Tensor::from_vec(sum, self.rows.shape())?)
    }

    /// The same table cut in another way, over the same ranks. Called by all of them.
    ///
    /// # Errors
    /// [`CommError::Counts`] for other positions; [`CommError::WorldSize`].
    pub fn reshard(&self, comm: &Communicator, to: Partition) -> Result<Self> {
        let fits = if to.seqlen() == self.partition.seqlen() && to.ranks() == comm.world_size() {
            Ok(format!("{to:?}"))
        } else {
            let expected = format!("{} positions over {} ranks", self.partition.seqlen(), comm.world_size());
            let got = format!("{} over {}", to.seqlen(), to.ranks());
            Err(CommError::Counts { list: "partition", expected, got }.into())
        };
        comm.agree("reshard", fits)?;
        let positions: Vec<usize> = to.positions(comm.rank()).collect();
        let rows = self.lookup(comm, &positions)?;
        Self::new(comm, to, rows)
    }

    /// Which of this rank's tokens each rank has the row of, and which of its rows each rank asks for.
    fn asked(&self, comm: &Communicator, positions: &[usize]) -> Result<(ByRank, ByRank)> {
        let name = "position_lookup";
        let owners = self.partition.owners();
        let mut wanted = vec![Vec::new(); comm.world_size()];
        let mut rows = vec![Vec::new(); comm.world_size()];
        let checked = check_ranks(comm, &self.partition).and_then(|()| {
            if positions.is_empty() {
                let (expected, got) = ("at least one".into(), "none".into());
                return Err(CommError::Counts { list: "positions", expected, got }.into());
            }
            positions.iter().enumerate().try_for_each(|(token, &position)| {
                let Some((owner, row)) = owners.of(position) else {
                    let expected = format!("positions below {}", self.partition.seqlen());
                    return Err(CommError::Counts { list: "positions", expected, got: position.to_string() }.into());
                };
                wanted[owner].push(token);
                rows[owner].push(row);
                Ok(())
            })
        });
        comm.agree(name, checked.map(|()| format!("{} {:?} {}", self.rows.dtype(), self.partition, self.width())))?;
        let parcel = |rows: Vec<usize>| {
            // Rows as bytes of u64: a table may have more than i32 counts.
            let bytes: Vec<u8> = rows.iter().flat_map(|&row| (row as u64).to_le_bytes()).collect();
            let count = bytes.len();
            if count == 0 { Ok(Vec::new()) } else { Ok(vec![Arc::new(Tensor::from_vec(bytes, &[count])?)]) }
        };
        let parcels = rows.into_iter().map(parcel).collect::<Result<_>>()?;
        let mut asked = Vec::new();
        for parcel in comm.exchange(name, "which", parcels)? {
            let mut rows = Vec::new();
            for tensor in &parcel {
                let numbers = tensor.as_slice::<u8>()?.chunks_exact(8);
                let number = |bytes: &[u8]| u64::from_le_bytes(bytes.try_into().unwrap_or_default());
                rows.extend(numbers.map(number).map(|row| usize::try_from(row).unwrap_or(usize::MAX)));
            }
            asked.push(rows);
        }
        Ok((wanted, asked))
    }

    fn parcel(&self, bytes: &[u8], count: usize) -> Result<crate::Parcel> {
        if count == 0 {
            return Ok(Vec::new());
        }
        Ok(vec![Arc::new(host::tensor(bytes, self.rows.dtype(), &[count, self.width()])?)])
    }

    fn width(&self) -> usize {
        self.rows.shape()[1]
    }

    fn row_bytes(&self) -> usize {
        self.width() * self.rows.dtype().size_bytes()
    }
}

fn check_ranks(comm: &Communicator, partition: &Partition) -> Result<()> {
    let (what, expected, got) = ("table of positions", partition.ranks(), comm.world_size());
    if expected == got { Ok(()) } else { Err(CommError::WorldSize { what, expected, got }.into()) }
}

fn check_rows(comm: &Communicator, partition: &Partition, rows: &Tensor) -> Result<()> {
    check_ranks(comm, partition)?;
    let tensor = "rows";
    if !rows.dtype().is_float() {
        let expected = "f32, f16 or bf16".into();
        return Err(ProblemError::UnsupportedDType { tensor, expected, got: rows.dtype() }.into());
    }
    let &[count, _] = rows.shape() else {
        return Err(ProblemError::Rank { tensor, expected: 2, got: rows.shape().len() }.into());
    };
    let expected = partition.count(comm.rank());
    if count != expected {
        return Err(ProblemError::Shape { tensor, dimension: "positions", expected, got: count }.into());
    }
    host::dense(tensor, &rows.view())
}
