//! Why a PTX text was refused.

/// A PTX text that this interpreter does not take; every variant names the line.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum ParseError {
    /// The text does not follow the grammar.
    #[error("PTX line {line}: cannot read {what}")]
    Syntax {
        /// Line of the text, from 1.
        line: u32,
        /// What stood there.
        what: String,
    },
    /// An instruction that the interpreter does not know.
    #[error("PTX line {line}: unknown instruction `{opcode}`")]
    UnknownInstruction {
        /// Line of the text, from 1.
        line: u32,
        /// The opcode with its modifiers.
        opcode: String,
    },
    /// A known instruction with a modifier or type that the interpreter does not know.
    #[error("PTX line {line}: `{opcode}` with unknown modifier or type `{modifier}`")]
    UnknownModifier {
        /// Line of the text, from 1.
        line: u32,
        /// The opcode with its modifiers.
        opcode: String,
        /// The part that is not understood.
        modifier: String,
    },
    /// Operands that do not fit the instruction.
    #[error("PTX line {line}: `{opcode}`: {what}")]
    Operands {
        /// Line of the text, from 1.
        line: u32,
        /// The opcode with its modifiers.
        opcode: String,
        /// What does not fit.
        what: String,
    },
    /// Something of PTX that the interpreter leaves out.
    #[error("PTX line {line}: {what} is not supported")]
    Unsupported {
        /// Line of the text, from 1.
        line: u32,
        /// What is left out.
        what: String,
    },
}

impl ParseError {
    pub(crate) fn syntax(line: u32, what: &str) -> Self {
        Self::Syntax { line, what: what.to_owned() }
    }
}
