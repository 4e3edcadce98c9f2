//! Reads a multiple sequence alignment (Stockholm, A3M or aligned FASTA) into match columns and deletion counts.
//!
//! The format is found from the content, never from the file's name:
//!
//! | starts with | format | match columns |
//! |---|---|---|
//! | `# STOCKHOLM` | Stockholm | columns in which less than half of the rows have a gap: a family's seed has no query row |
//! | `>`, lower case or unlike lengths | A3M | upper case and `-`; lower case is an insertion, `.` is padding |
//! | `>`, otherwise | aligned FASTA | all |
//!
//! A residue outside the match columns becomes part of the *deletion count* of the next match column of its row, as in
//! AlphaFold; what follows the last match column is dropped. Letters that name no single amino acid (`B J O U X Z`)
//! are kept as written; `*`, `_` and `~` are gaps.

mod error;
mod fasta;
mod record;
mod stockholm;
#[cfg(test)]
mod tests;

use std::fs::File;
use std::io::Read;
use std::path::Path;

pub(crate) use error::AlignmentError;
use record::Record;

/// Most bytes a file may have: far beyond the paper's 5120 sequences of 384 residues, within reach of memory.
const LIMIT_BYTES: u64 = 1 << 29;

/// Sign of a gap in [`Alignment::rows`].
pub(crate) const GAP: u8 = b'-';

/// Aligned protein sequences: at least one row, one match column and one residue in it, all rows of one length.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Alignment {
    names: Vec<String>,
    rows: Vec<Vec<u8>>,
    deletions: Vec<Vec<u32>>,
}

impl Alignment {
    /// Reads the file at `path`.
    ///
    /// # Errors
    ///
    /// [`AlignmentError`] says which file, which line, and what to change.
    pub(crate) fn read(path: &Path) -> Result<Self, AlignmentError> {
        read_at_most(path, LIMIT_BYTES)
    }

    /// Reads the bytes of a file; `file` is its name in messages.
    ///
    /// # Errors
    ///
    /// As [`Alignment::read`].
    pub(crate) fn from_bytes(bytes: &[u8], file: &str) -> Result<Self, AlignmentError> {
        match std::str::from_utf8(bytes) {
            Ok(text) => Self::parse(text, file),
            Err(error) => Err(AlignmentError::NotUtf8 {
                file: file.to_owned(),
                line: 1 + bytes.iter().take(error.valid_up_to()).filter(|&&byte| byte == b'\n').count(),
            }),
        }
    }

    /// Reads the text of a file; `file` is its name in messages.
    ///
    /// # Errors
    ///
    /// As [`Alignment::read`].
    pub(crate) fn parse(text: &str, file: &str) -> Result<Self, AlignmentError> {
        let text = text.strip_prefix('\u{feff}').unwrap_or(text);
        let (records, is_stockholm) = match container(text, file)? {
            Container::Stockholm => (stockholm::records(text, file)?, true),
            Container::Fasta => (fasta::records(text, file)?, false),
        };
        if records.is_empty() {
            return Err(AlignmentError::NoSequences { file: file.to_owned() });
        }
        let columns = if is_stockholm {
            check_lengths(&records, file, "columns", |record| record.symbols.len())?;
            MatchColumns::Listed(mostly_residues(&records))
        } else if is_a3m(&records) {
            check_lengths(&records, file, "match columns", |record| {
                record.symbols.iter().filter(|&&symbol| is_a3m_match(symbol)).count()
            })?;
            MatchColumns::UpperCase
        } else {
            MatchColumns::All
        };
        Self::fold(records, &columns, file)
    }

    /// Keeps the match columns and counts the rest.
    fn fold(records: Vec<Record>, columns: &MatchColumns, file: &str) -> Result<Self, AlignmentError> {
        let mut alignment = Self { names: Vec::new(), rows: Vec::new(), deletions: Vec::new() };
        for record in records {
            let (row, deletions) = fold_row(&record, columns, file)?;
            alignment.names.push(record.name);
            alignment.rows.push(row);
            alignment.deletions.push(deletions);
        }
        if alignment.n_columns() == 0 {
            return Err(AlignmentError::NoMatchColumns { file: file.to_owned() });
        }
        if alignment.rows.iter().flatten().all(|&symbol| symbol == GAP) {
            return Err(AlignmentError::OnlyGaps { file: file.to_owned() });
        }
        Ok(alignment)
    }

    /// Names of the sequences, as the file gives them.
    pub(crate) fn names(&self) -> &[String] {
        &self.names
    }

    /// One row a sequence, all [`n_columns`](Self::n_columns) long: `A`-`Z`, or [`GAP`].
    pub(crate) fn rows(&self) -> &[Vec<u8>] {
        &self.rows
    }

    /// Residues inserted before each match column; the shape of [`rows`](Self::rows).
    pub(crate) fn deletions(&self) -> &[Vec<u32>] {
        &self.deletions
    }

    /// Number of sequences, at least 1.
    pub(crate) fn n_seq(&self) -> usize {
        self.rows.len()
    }

    /// Number of match columns, at least 1.
    pub(crate) fn n_columns(&self) -> usize {
        self.rows.first().map_or(0, Vec::len)
    }
}

/// Which symbols of a row stand in match columns.
enum MatchColumns {
    /// Every one (aligned FASTA).
    All,
    /// Those in the columns marked `true` (Stockholm).
    Listed(Vec<bool>),
    /// Upper case and gaps (A3M).
    UpperCase,
}

impl MatchColumns {
    /// Whether the symbol in a column of the file stands in one of them.
    fn hold(&self, column: usize, symbol: u8) -> bool {
        match self {
            Self::All => true,
            Self::Listed(marks) => marks.get(column).copied().unwrap_or(false),
            Self::UpperCase => is_a3m_match(symbol),
        }
    }
}

/// What a file's first line of content says it is.
enum Container {
    Stockholm,
    Fasta,
}

/// Reads up to `limit_bytes`, so that an endless file ends in an error.
fn read_at_most(path: &Path, limit_bytes: u64) -> Result<Alignment, AlignmentError> {
    let file = path.display().to_string();
    let mut bytes = Vec::new();
    let read = File::open(path).and_then(|opened| opened.take(limit_bytes.saturating_add(1)).read_to_end(&mut bytes));
    match read {
        Err(reason) => Err(AlignmentError::Unreadable { file, reason }),
        Ok(length) if u64::try_from(length).map_or(true, |length| length > limit_bytes) => {
            Err(AlignmentError::TooLarge { file, limit_bytes })
        }
        Ok(_) => Alignment::from_bytes(&bytes, &file),
    }
}

/// Finds the format's family from the first line that is not blank (nor, for FASTA, a comment).
fn container(text: &str, file: &str) -> Result<Container, AlignmentError> {
    let mut content = text.lines().enumerate().filter(|(_, line)| !line.trim().is_empty()).peekable();
    match content.peek() {
        None => return Err(AlignmentError::Empty { file: file.to_owned() }),
        Some((_, line)) if line.starts_with(stockholm::HEADER) => return Ok(Container::Stockholm),
        Some(_) => (),
    }
    match content.find(|(_, line)| !line.starts_with('#')) {
        Some((_, line)) if line.starts_with(fasta::RECORD_START) => Ok(Container::Fasta),
        Some((index, _)) => Err(AlignmentError::MissingHeader { file: file.to_owned(), line: index + 1 }),
        None => Err(AlignmentError::NoSequences { file: file.to_owned() }),
    }
}

/// Checks that `length` gives the same number for every row.
fn check_lengths(
    records: &[Record],
    file: &str,
    unit: &'static str,
    length: impl Fn(&Record) -> usize,
) -> Result<(), AlignmentError> {
    let expected = records.first().map_or(0, &length);
    match records.iter().find(|record| length(record) != expected) {
        None => Ok(()),
        Some(record) => Err(AlignmentError::WrongLength {
            file: file.to_owned(),
            line: record.line,
            name: record.name.clone(),
            expected,
            got: length(record),
            unit,
        }),
    }
}

/// Marks the columns in which less than half of the rows have a gap; rows are of one length.
fn mostly_residues(records: &[Record]) -> Vec<bool> {
    let width = records.first().map_or(0, |record| record.symbols.len());
    let mut gaps = vec![0_usize; width];
    for record in records {
        for (gaps, symbol) in gaps.iter_mut().zip(&record.symbols) {
            *gaps += usize::from(!symbol.is_ascii_alphabetic());
        }
    }
    gaps.iter().map(|&gaps| gaps < records.len() - gaps).collect()
}

/// Tells A3M from aligned FASTA: insertions are written in lower case and make the rows' lengths differ.
fn is_a3m(records: &[Record]) -> bool {
    let width = records.first().map_or(0, |record| record.symbols.len());
    records.iter().any(|record| record.symbols.len() != width || record.symbols.iter().any(u8::is_ascii_lowercase))
}

/// Whether an A3M symbol stands in a match column.
fn is_a3m_match(symbol: u8) -> bool {
    symbol == GAP || symbol.is_ascii_uppercase()
}

/// Splits a row into its match columns and the residues before each.
fn fold_row(record: &Record, columns: &MatchColumns, file: &str) -> Result<(Vec<u8>, Vec<u32>), AlignmentError> {
    let symbols = || record.symbols.iter().copied().enumerate();
    let count = symbols().filter(|&(column, symbol)| columns.hold(column, symbol)).count();
    let (mut row, mut deletions, mut inserted) = (Vec::new(), Vec::new(), 0_u32);
    let reserved = row.try_reserve_exact(count).and_then(|()| deletions.try_reserve_exact(count));
    reserved.map_err(|_| record.no_memory(file))?;
    for (column, symbol) in symbols() {
        if columns.hold(column, symbol) {
            row.push(if symbol.is_ascii_alphabetic() { symbol.to_ascii_uppercase() } else { GAP });
            deletions.push(std::mem::take(&mut inserted));
        } else if symbol.is_ascii_alphabetic() {
            inserted = inserted.checked_add(1).ok_or_else(|| AlignmentError::InsertionTooLong {
                file: file.to_owned(),
                line: record.line,
                name: record.name.clone(),
            })?;
        }
    }
    Ok((row, deletions))
}
