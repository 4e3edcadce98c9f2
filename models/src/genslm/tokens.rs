//! FASTA to tokens: one for each codon in frame 0, the first nucleotide of a record being the first of a codon.

use std::path::Path;

use super::error::{Error, Result};

/// Nucleotides of a codon.
const CODON: usize = 3;
/// The token of a codon with a letter that names no single nucleotide.
pub const UNKNOWN: u32 = 64;
/// The token before the first codon of a sequence.
pub const BEGIN: u32 = 65;
/// How many tokens there are: 64 codons and two more.
pub const VOCABULARY: usize = 66;
/// Letters for more than one nucleotide, and for none.
const AMBIGUOUS: &[u8] = b"NRYSWKMBDHVX-";

/// A genome as tokens.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Tokens {
    codons: Vec<u32>,
    nucleotides: usize,
}

/// Why a genome could not be read: the place, and what would do.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum GenomeError {
    /// The operating system would not give the file's bytes.
    #[error("cannot read genome {file}: {reason}; give the path of a FASTA file of nucleotides")]
    Unreadable {
        /// The file's path.
        file: String,
        /// What the operating system said.
        reason: std::io::Error,
    },
    /// The first line of content is no header.
    #[error("genome {file}, line {line}: no FASTA header; start each sequence with a line `>name`")]
    MissingHeader {
        /// The file's path.
        file: String,
        /// First line of content.
        line: usize,
    },
    /// A character that is no letter for nucleotides.
    #[error(
        "genome {file}, line {line}, column {column}: {character:?} stands for no nucleotide; expected A C G T U or a letter for several of them"
    )]
    IllegalCharacter {
        /// The file's path.
        file: String,
        /// The character's line.
        line: usize,
        /// The character's 1-based place in the line.
        column: usize,
        /// The character.
        character: char,
    },
    /// Not one codon.
    #[error("genome {file}: no codon in it; give a FASTA file with at least one sequence of {CODON} nucleotides")]
    NoCodons {
        /// The file's path.
        file: String,
    },
}

impl Tokens {
    /// Reads a file.
    ///
    /// # Errors
    /// [`GenomeError`] says which file, which line, and what to change.
    pub fn read(path: &Path) -> Result<Self, GenomeError> {
        let file = path.display().to_string();
        match std::fs::read(path) {
            Ok(bytes) => Self::parse(&bytes, &file),
            Err(reason) => Err(GenomeError::Unreadable { file, reason }),
        }
    }

    /// Reads the bytes of a file; `file` is its name in messages. Each record has a frame of its own; one or two nucleotides
    /// that are left at its end are dropped.
    ///
    /// ```
    /// use tilefold_models::genslm::{Tokens, UNKNOWN};
    /// let tokens = Tokens::parse(b">x\nAAAaac\nGTNtttG\n", "x.fna")?;
    /// assert_eq!(tokens.codons(), [0, 1, UNKNOWN, 63]);
    /// # Ok::<(), tilefold_models::genslm::GenomeError>(())
    /// ```
    ///
    /// # Errors
    /// As [`Tokens::read`].
    pub fn parse(bytes: &[u8], file: &str) -> Result<Self, GenomeError> {
        let (mut codons, mut nucleotides, mut record) = (Vec::new(), 0, None::<Vec<Option<u32>>>);
        for (index, line) in bytes.split(|&byte| byte == b'\n').enumerate() {
            let line = line.trim_ascii();
            if line.first() == Some(&b'>') {
                codons.extend(record.replace(Vec::new()).iter().flat_map(|letters| codons_of(letters)));
            } else if let Some(record) = &mut record {
                for (column, &byte) in line.iter().enumerate() {
                    record.push(nucleotide(byte).ok_or_else(|| GenomeError::IllegalCharacter {
                        file: file.to_owned(),
                        line: index + 1,
                        column: column + 1,
                        character: char::from(byte),
                    })?);
                    nucleotides += 1;
                }
            } else if !line.is_empty() {
                return Err(GenomeError::MissingHeader { file: file.to_owned(), line: index + 1 });
            }
        }
        codons.extend(record.iter().flat_map(|letters| codons_of(letters)));
        if codons.is_empty() {
            return Err(GenomeError::NoCodons { file: file.to_owned() });
        }
        Ok(Self { codons, nucleotides })
    }

    /// One token for each codon.
    #[must_use]
    pub fn codons(&self) -> &[u32] {
        &self.codons
    }

    /// Nucleotides that were read.
    #[must_use]
    pub fn nucleotides(&self) -> usize {
        self.nucleotides
    }

    /// Sequences to learn from, `batch` of them, one after the other: each is [`BEGIN`] and `seqlen` consecutive codons. The
    /// genome is cut into such sequences, which are taken in turn, from number `first` on.
    ///
    /// # Errors
    /// [`Error::Config`] when the genome is shorter than one sequence, a sequence is empty, or memory too small.
    pub fn windows(&self, first: usize, batch: usize, seqlen: usize) -> Result<Vec<u32>> {
        let count = self.codons.len().checked_div(seqlen).unwrap_or(0);
        if count == 0 {
            let expected = format!("1 to {}, the codons of the genome", self.codons.len());
            return Err(Error::Config { field: "tokens", expected, got: seqlen.to_string() });
        }
        let mut windows = Vec::new();
        let length = batch.checked_mul(seqlen + 1).filter(|&length| windows.try_reserve_exact(length).is_ok());
        if length.is_none() {
            let expected = format!("as many sequences of {seqlen} codons as memory holds");
            return Err(Error::Config { field: "batch", expected, got: batch.to_string() });
        }
        for window in 0..batch {
            let start = (first % count + window) % count * seqlen;
            windows.push(BEGIN);
            windows.extend_from_slice(&self.codons[start..start + seqlen]);
        }
        Ok(windows)
    }
}

/// The number of a nucleotide; `Some(None)` for a letter that names no single one.
fn nucleotide(letter: u8) -> Option<Option<u32>> {
    Some(match letter.to_ascii_uppercase() {
        b'A' => Some(0),
        b'C' => Some(1),
        b'G' => Some(2),
        b'T' | b'U' => Some(3),
        other if AMBIGUOUS.contains(&other) => None,
        _ => return None,
    })
}

fn codons_of(letters: &[Option<u32>]) -> impl Iterator<Item = u32> + '_ {
    letters.chunks_exact(CODON).map(|codon| match *codon {
        [Some(first), Some(second), Some(third)] => 16 * first + 4 * second + third,
        _ => UNKNOWN,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_record_has_its_frame() {
        let tokens = Tokens::parse(b"\n>a\nACGTA\n>b\r\nuUu\r\n", "x").unwrap();
        assert_eq!((tokens.codons(), tokens.nucleotides()), (&[6, 63][..], 8));
    }

    #[test]
    fn what_is_no_genome_is_named() {
        let message = |bytes: &[u8]| Tokens::parse(bytes, "x").unwrap_err().to_string();
        assert!(message(b"\nACGT").starts_with("genome x, line 2: no FASTA header"));
        assert!(message(b">a\nAC\nG?").starts_with("genome x, line 3, column 2: '?'"));
        assert!(message(b">a\nAC").starts_with("genome x: no codon"));
        assert!(message(b"").starts_with("genome x: no codon"));
        let missing = Tokens::read(Path::new("/nowhere/x.fna")).unwrap_err();
        assert!(missing.to_string().starts_with("cannot read genome /nowhere/x.fna: "));
    }

    #[test]
    fn windows_follow_each_other_and_start_again() {
        let tokens = Tokens { codons: (0..7).collect(), nucleotides: 21 };
        assert_eq!(tokens.windows(0, 2, 3).unwrap(), [BEGIN, 0, 1, 2, BEGIN, 3, 4, 5]);
        assert_eq!(tokens.windows(2, 1, 3).unwrap(), [BEGIN, 0, 1, 2]);
        for (batch, seqlen) in [(1, 8), (1, 0), (usize::MAX, 1), (usize::MAX / 16, 3)] {
            assert!(tokens.windows(0, batch, seqlen).is_err());
        }
    }
}
