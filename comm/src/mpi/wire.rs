//! What processes say to each other: headers, as bytes.
//!
//! A header is numbers of 8 bytes, least first, and texts with their length before them. Bytes of tensors follow it as
//! messages of their own.

use std::time::Duration;

use tilefold_core::DType;

use super::ffi::{CALLS, driver};
use crate::error::CommError;

const DTYPES: [DType; 5] = [DType::F32, DType::F16, DType::BF16, DType::I32, DType::Bool];

/// One message.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Header {
    /// The group it is for.
    pub(super) group: String,
    /// The sender's number there.
    pub(super) from: usize,
    /// The most bytes of a message that carries a part of a tensor.
    pub(super) chunk_bytes: usize,
    pub(super) said: Said,
    /// Dtypes and shapes of the tensors that follow.
    pub(super) tensors: Vec<(DType, Vec<usize>)>,
}

/// What a rank says.
#[derive(Clone, Debug, PartialEq)]
pub(super) enum Said {
    /// Its part in an exchange.
    Post { number: u64, operation: String },
    /// A letter.
    Letter { operation: String },
    /// It has dropped its place in the group.
    Gone { panicked: bool },
    /// The group has failed.
    Failed(CommError),
    /// Its process ends: the last header it sends, for every group.
    Bye,
}

impl Header {
    pub(super) fn encode(&self) -> Vec<u8> {
        let mut out = Writer(Vec::new());
        out.text(&self.group);
        out.size(self.from);
        out.size(self.chunk_bytes);
        match &self.said {
            Said::Post { number, operation } => {
                out.number(0);
                out.number(*number);
                out.text(operation);
            }
            Said::Letter { operation } => {
                out.number(1);
                out.text(operation);
            }
            Said::Gone { panicked } => {
                out.number(2);
                out.number((*panicked).into());
            }
            Said::Failed(error) => {
                out.number(3);
                out.error(error, self.from);
            }
            Said::Bye => out.number(4),
        }
        out.size(self.tensors.len());
        for (dtype, shape) in &self.tensors {
            out.text(&dtype.to_string());
            out.sizes(shape);
        }
        out.0
    }

    /// # Errors
    /// [`CommError::Driver`] when these are no bytes of [`Header::encode`].
    pub(super) fn decode(bytes: &[u8]) -> Result<Self, CommError> {
        let mut input = Reader(bytes);
        let header = input.header().filter(|_| input.0.is_empty());
        header.ok_or_else(|| driver("a header", 0, "unreadable: do all processes run the same program?"))
    }
}

/// Appends.
struct Writer(Vec<u8>);

impl Writer {
    fn number(&mut self, number: u64) {
        self.0.extend(number.to_le_bytes());
    }

    fn size(&mut self, size: usize) {
        self.number(size as u64);
    }

    fn text(&mut self, text: &str) {
        self.size(text.len());
        self.0.extend(text.as_bytes());
    }

    fn sizes(&mut self, sizes: &[usize]) {
        self.size(sizes.len());
        sizes.iter().for_each(|&size| self.size(size));
    }

    fn error(&mut self, error: &CommError, from: usize) {
        match error {
            CommError::Mismatch { ranks, operations } => {
                self.number(0);
                ranks.iter().for_each(|&rank| self.size(rank));
                operations.iter().for_each(|operation| self.text(operation));
            }
            CommError::Lost { rank, panicked, operation } => {
                self.number(1);
                self.size(*rank);
                self.number((*panicked).into());
                self.text(operation);
            }
            CommError::Deadline { operation, deadline, missing } => {
                self.number(2);
                self.text(operation);
                self.number(deadline.as_secs());
                self.number(deadline.subsec_nanos().into());
                self.sizes(missing);
            }
            CommError::Driver { call, status, message } => {
                self.number(3);
                self.text(call);
                self.number(status.cast_unsigned());
                self.text(message);
            }
            CommError::Refused { operation, rank, message } => self.refusal(operation, *rank, message),
            // No other is a failure of a whole group.
            other => self.refusal("", from, &other.to_string()),
        }
    }

    fn refusal(&mut self, operation: &str, rank: usize, message: &str) {
        self.number(4);
        self.text(operation);
        self.size(rank);
        self.text(message);
    }
}

/// Takes from the front; `None` where that does not fit.
struct Reader<'a>(&'a [u8]);

impl Reader<'_> {
    fn number(&mut self) -> Option<u64> {
        let (number, rest) = self.0.split_first_chunk()?;
        self.0 = rest;
        Some(u64::from_le_bytes(*number))
    }

    fn size(&mut self) -> Option<usize> {
        self.number()?.try_into().ok()
    }

    fn flag(&mut self) -> Option<bool> {
        Some(self.number()? != 0)
    }

    fn text(&mut self) -> Option<String> {
        let length = self.size()?;
        let (text, rest) = self.0.split_at_checked(length)?;
        self.0 = rest;
        String::from_utf8(text.to_vec()).ok()
    }

    fn sizes(&mut self) -> Option<Vec<usize>> {
        let count = self.size()?;
        (0..count).map(|_| self.size()).collect()
    }

    fn header(&mut self) -> Option<Header> {
        let (group, from, chunk_bytes) = (self.text()?, self.size()?, self.size()?);
        let said = match self.number()? {
            0 => Said::Post { number: self.number()?, operation: self.text()? },
            1 => Said::Letter { operation: self.text()? },
            2 => Said::Gone { panicked: self.flag()? },
            3 => Said::Failed(self.error()?),
            4 => Said::Bye,
            _ => return None,
        };
        let count = self.size()?;
        let tensors = (0..count).map(|_| self.tensor()).collect::<Option<_>>()?;
        Some(Header { group, from, chunk_bytes, said, tensors })
    }

    fn tensor(&mut self) -> Option<(DType, Vec<usize>)> {
        let name = self.text()?;
        let dtype = DTYPES.into_iter().find(|dtype| dtype.to_string() == name)?;
        Some((dtype, self.sizes()?))
    }

    fn error(&mut self) -> Option<CommError> {
        Some(match self.number()? {
            0 => {
                let ranks = [self.size()?, self.size()?];
                CommError::Mismatch { ranks, operations: [self.text()?, self.text()?] }
            }
            1 => CommError::Lost { rank: self.size()?, panicked: self.flag()?, operation: self.text()? },
            2 => {
                let (operation, seconds) = (self.text()?, self.number()?);
                let deadline = Duration::new(seconds, self.number()?.try_into().ok()?);
                CommError::Deadline { operation, deadline, missing: self.sizes()? }
            }
            3 => {
                let name = self.text()?;
                let call = CALLS.into_iter().find(|call| *call == name).unwrap_or("MPI");
                CommError::Driver { call, status: self.number()?.cast_signed(), message: self.text()? }
            }
            4 => CommError::Refused { operation: self.text()?, rank: self.size()?, message: self.text()? },
            _ => return None,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn header(said: Said) -> Header {
        let tensors = DTYPES.into_iter().enumerate().map(|(i, dtype)| (dtype, vec![i + 1, 1 << 40])).collect();
        Header { group: "0/3".into(), from: 2, chunk_bytes: 1 << 30, said, tensors }
    }

    fn all_said() -> Vec<Said> {
        let operations = ["all_reduce sum f32 [4]".to_owned(), "barrier".to_owned()];
        let (operation, message) = (operations[0].clone(), String::from("ungültig"));
        let errors = [
            CommError::Mismatch { ranks: [0, 7], operations: operations.clone() },
            CommError::Lost { rank: 3, panicked: true, operation: operation.clone() },
            CommError::Deadline { operation: operation.clone(), deadline: Duration::MAX, missing: vec![1, 4] },
            CommError::Driver { call: "MPI_Test", status: -5, message: message.clone() },
            CommError::Refused { operation: operation.clone(), rank: 1, message },
        ];
        let mut said: Vec<Said> = errors.into_iter().map(Said::Failed).collect();
        said.extend([Said::Post { number: u64::MAX, operation: operation.clone() }, Said::Letter { operation }]);
        said.extend([Said::Gone { panicked: true }, Said::Gone { panicked: false }, Said::Bye]);
        said
    }

    #[test]
    fn headers_come_back_as_they_were() {
        for said in all_said() {
            let header = header(said);
            assert_eq!(Header::decode(&header.encode()), Ok(header));
        }
    }

    #[test]
    fn other_errors_come_back_as_a_refusal() {
        let said = Said::Failed(CommError::ZeroDeadline);
        let told = Header::decode(&header(said).encode()).unwrap().said;
        let message = CommError::ZeroDeadline.to_string();
        assert_eq!(told, Said::Failed(CommError::Refused { operation: String::new(), rank: 2, message }));
    }

    #[test]
    fn bytes_cut_short_or_added_are_an_error() {
        for said in all_said() {
            let mut bytes = header(said).encode();
            for length in 0..bytes.len() {
                assert!(Header::decode(&bytes[..length]).is_err(), "{length} of {}", bytes.len());
            }
            bytes.push(0);
            assert!(Header::decode(&bytes).is_err());
        }
    }
}
