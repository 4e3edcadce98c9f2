//! One sequence as its file wrote it, and which characters it may hold.

use super::AlignmentError;

/// A named row, before it is known which of its columns are match columns.
#[derive(Debug)]
pub(super) struct Record {
    /// The row's name.
    pub(super) name: String,
    /// 1-based line on which the row starts.
    pub(super) line: usize,
    /// ASCII letters in the file's case, `-` for a gap, `.` for the padding of other rows' insertions.
    pub(super) symbols: Vec<u8>,
}

impl Record {
    pub(super) fn new(name: &str, line: usize) -> Self {
        Self { name: name.to_owned(), line, symbols: Vec::new() }
    }

    /// Appends the residues of `text`, skipping blanks.
    ///
    /// `first_column` is the 0-based place of `text` in its line, for messages.
    pub(super) fn extend(
        &mut self,
        text: &str,
        file: &str,
        line: usize,
        first_column: usize,
    ) -> Result<(), AlignmentError> {
        self.symbols.try_reserve(text.len()).map_err(|_| self.no_memory(file))?;
        for (offset, character) in text.chars().enumerate() {
            if character.is_whitespace() {
                continue;
            }
            let symbol = symbol(character).ok_or_else(|| AlignmentError::IllegalCharacter {
                file: file.to_owned(),
                line,
                column: first_column + offset + 1,
                character,
            })?;
            self.symbols.push(symbol);
        }
        Ok(())
    }

    pub(super) fn no_memory(&self, file: &str) -> AlignmentError {
        AlignmentError::NoMemory { file: file.to_owned(), line: self.line, name: self.name.clone() }
    }
}

/// Reads one character: letters stand for themselves, `.` for padding, every other gap sign for `-`.
///
/// `*` (a stop codon) holds a column but no residue, so it is a gap here.
fn symbol(character: char) -> Option<u8> {
    match character {
        '-' | '_' | '~' | '*' => Some(b'-'),
        '.' => Some(b'.'),
        letter if letter.is_ascii_alphabetic() => u8::try_from(letter).ok(),
        _ => None,
    }
}
