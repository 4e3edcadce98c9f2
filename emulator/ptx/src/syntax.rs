//! The parsed form of a PTX text, before instructions are understood.

use std::collections::HashMap;

/// Register classes by storage: 16-bit registers live in 32-bit lanes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Class {
    Predicate,
    Half,
    Word,
    Double,
}

impl Class {
    pub(crate) fn of_type(name: &str) -> Option<Self> {
        Some(match name {
            ".pred" => Self::Predicate,
            ".b16" | ".u16" | ".s16" | ".f16" | ".bf16" => Self::Half,
            ".b32" | ".u32" | ".s32" | ".f32" | ".f16x2" | ".bf16x2" => Self::Word,
            ".b64" | ".u64" | ".s64" | ".f64" => Self::Double,
            _ => return None,
        })
    }

    pub(crate) fn bytes(self) -> u32 {
        match self {
            Self::Predicate => 0,
            Self::Half => 2,
            Self::Word => 4,
            Self::Double => 8,
        }
    }
}

/// `index` counts within the file that stores the class: predicates, 32-bit lanes (halves and words), 64-bit lanes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Register {
    pub(crate) class: Class,
    pub(crate) index: u32,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(crate) enum StateSpace {
    Global,
    Constant,
    Shared,
    Local,
    Parameter,
}

/// A variable or parameter.
#[derive(Clone, Debug)]
pub(crate) struct Variable {
    pub(crate) name: String,
    pub(crate) space: StateSpace,
    pub(crate) bytes: u64,
    pub(crate) align: u32,
    /// `extern .shared x[]`: placed after the static variables, sized by the launch.
    pub(crate) dynamic: bool,
    pub(crate) initial: Vec<u8>,
}

#[derive(Clone, Debug, PartialEq)]
pub(crate) enum Operand {
    Register(Register),
    /// `%tid.x` and its like.
    Special(String),
    Integer(u64),
    Float32(u32),
    Float64(u64),
    /// A variable (with an offset) or a label.
    Symbol(String, i64),
    Address(Base, i64),
    Vector(Vec<Operand>),
    /// `!%p`
    Not(Register),
    /// `%p|%q` or `%r|%p`; `None` is `_`.
    Pair(Option<Register>, Option<Register>),
    /// `_`: the result is dropped.
    Sink,
}

#[derive(Clone, Debug, PartialEq)]
pub(crate) enum Base {
    Register(Register),
    Symbol(String),
    Absolute,
}

#[derive(Clone, Debug)]
pub(crate) struct Statement {
    pub(crate) line: u32,
    pub(crate) text: String,
    /// Guard predicate, and whether it is negated.
    pub(crate) guard: Option<(Register, bool)>,
    pub(crate) opcode: String,
    pub(crate) operands: Vec<Operand>,
    /// The braces it stands in, for the look-up of labels.
    pub(crate) scope: usize,
}

/// Braces of a body: labels are seen from inside outwards.
#[derive(Debug, Default)]
pub(crate) struct Scope {
    pub(crate) parent: Option<usize>,
    /// Label to the index of the next statement.
    pub(crate) labels: HashMap<String, usize>,
    /// `.branchtargets` lists by their label.
    pub(crate) targets: HashMap<String, Vec<String>>,
}

#[derive(Debug, Default)]
pub(crate) struct Body {
    pub(crate) predicates: u32,
    pub(crate) words: u32,
    pub(crate) doubles: u32,
    pub(crate) variables: Vec<Variable>,
    pub(crate) statements: Vec<Statement>,
    pub(crate) scopes: Vec<Scope>,
}

#[derive(Debug)]
pub(crate) struct Entry {
    pub(crate) name: String,
    pub(crate) line: u32,
    pub(crate) parameters: Vec<Variable>,
    pub(crate) max_threads: Option<u32>,
    pub(crate) body: Body,
}

#[derive(Debug, Default)]
pub(crate) struct Text {
    /// The number in `.target sm_NN`.
    pub(crate) target: u32,
    pub(crate) variables: Vec<Variable>,
    pub(crate) entries: Vec<Entry>,
}
