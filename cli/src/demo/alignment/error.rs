//! What can be wrong with an alignment file, said with its place and its fix.

use std::io;

/// Why an alignment could not be read.
///
/// Every message names the file, the 1-based line where there is one, and what would make the file readable.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub(crate) enum AlignmentError {
    /// The operating system would not give the file's bytes.
    #[error("cannot read alignment {file}: {reason}; give the path of a readable Stockholm, A3M or FASTA file")]
    Unreadable {
        /// The file's path.
        file: String,
        /// What the operating system said.
        reason: io::Error,
    },
    /// The file is larger than this program reads.
    #[error("alignment {file} has more than {limit_bytes} bytes; keep fewer sequences or columns")]
    TooLarge {
        /// The file's path.
        file: String,
        /// Most bytes this program reads.
        limit_bytes: u64,
    },
    /// The file holds bytes that are no text.
    #[error(
        "alignment {file}, line {line}: not UTF-8 text; unpack the file if it is compressed, or re-save it as UTF-8"
    )]
    NotUtf8 {
        /// The file's path.
        file: String,
        /// Line of the first such byte.
        line: usize,
    },
    /// The file holds nothing, or blanks only.
    #[error("alignment {file} is empty; give a Stockholm, A3M or FASTA file with at least one sequence")]
    Empty {
        /// The file's path.
        file: String,
    },
    /// The first line of content belongs to none of the three formats.
    #[error(
        "alignment {file}, line {line}: no header; start the file with `# STOCKHOLM 1.0`, or each sequence with \
         `>name`"
    )]
    MissingHeader {
        /// The file's path.
        file: String,
        /// First line of content.
        line: usize,
    },
    /// A Stockholm file ended without `//`.
    #[error(
        "alignment {file}, line {line}: the file ends without the `//` terminator; it may be cut off: fetch it \
         again, or add a last line `//`"
    )]
    MissingTerminator {
        /// The file's path.
        file: String,
        /// The last line.
        line: usize,
    },
    /// A Stockholm file goes on after its alignment.
    #[error(
        "alignment {file}, line {line}: text after the first alignment; keep one alignment in a file, ended by \
         one `//`"
    )]
    MoreThanOneAlignment {
        /// The file's path.
        file: String,
        /// First line after the first alignment.
        line: usize,
    },
    /// A format's header without any sequence.
    #[error("alignment {file} has a header but no sequences; add at least one")]
    NoSequences {
        /// The file's path.
        file: String,
    },
    /// A sequence without a name.
    #[error("alignment {file}, line {line}: sequence without a name; write the name first, without leading blanks")]
    NoName {
        /// The file's path.
        file: String,
        /// The sequence's line.
        line: usize,
    },
    /// A name without a sequence.
    #[error("alignment {file}, line {line}: sequence {name} has no residues; add them or remove the record")]
    NoResidues {
        /// The file's path.
        file: String,
        /// Line of the name.
        line: usize,
        /// The name.
        name: String,
    },
    /// A Stockholm block names a sequence twice, so the rows cannot be told apart.
    #[error(
        "alignment {file}, line {line}: sequence {name} was already given on line {first_line} of this block; \
         give each sequence its own name, or put a blank line between wrapped blocks"
    )]
    DuplicateName {
        /// The file's path.
        file: String,
        /// Line of the second row.
        line: usize,
        /// The name.
        name: String,
        /// Line of the first row.
        first_line: usize,
    },
    /// A character that is neither a residue nor a gap.
    #[error(
        "alignment {file}, line {line}, column {column}: character {character:?} is neither a residue letter \
         nor a gap (`-`, `.`, `_`, `~`, `*`); remove it"
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
    /// Rows of unlike length.
    #[error(
        "alignment {file}, line {line}: sequence {name} has {got} {unit}, expected {expected} as in the first \
         sequence; align the sequences first, or restore the missing part"
    )]
    WrongLength {
        /// The file's path.
        file: String,
        /// Line on which the sequence starts.
        line: usize,
        /// The sequence's name.
        name: String,
        /// Columns of the first sequence.
        expected: usize,
        /// Columns of this sequence.
        got: usize,
        /// What is counted: all columns, or an A3M's match columns.
        unit: &'static str,
    },
    /// No column is left to work on.
    #[error(
        "alignment {file} has no match columns; give sequences in which at least one column is an upper-case \
         residue (A3M) or mostly residues (Stockholm)"
    )]
    NoMatchColumns {
        /// The file's path.
        file: String,
    },
    /// Rows of nothing but gaps.
    #[error("alignment {file} has only gaps in its match columns; give sequences with residues")]
    OnlyGaps {
        /// The file's path.
        file: String,
    },
    /// The system gives no memory for a sequence.
    #[error("alignment {file}, line {line}: no memory for sequence {name}; keep fewer sequences, or allow more memory")]
    NoMemory {
        /// The file's path.
        file: String,
        /// Line on which the sequence starts.
        line: usize,
        /// The sequence's name.
        name: String,
    },
    /// More inserted residues between two columns than a deletion count holds.
    #[error(
        "alignment {file}, line {line}: sequence {name} has more than {limit} inserted residues in one place; \
         shorten the insertion",
        limit = u32::MAX
    )]
    InsertionTooLong {
        /// The file's path.
        file: String,
        /// Line on which the sequence starts.
        line: usize,
        /// The sequence's name.
        name: String,
    },
}
