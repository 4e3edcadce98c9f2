//! Statements to decoded instructions: one pass over a body, then branch targets and register slots are fixed.

mod arithmetic;
mod control;
mod data;
mod matrix;
mod operands;
pub(crate) mod parts;
mod transfer;

use std::collections::HashMap;

use crate::ParseError;
use crate::instruction::{Guard, Index, Instruction, Op};
use crate::layout::{Place, Symbols};
use crate::special::Special;
use crate::syntax::{Body, Class, Operand, Register, Statement};
use parts::Parts;

/// A kernel ready to run.
#[derive(Debug)]
pub(crate) struct Code {
    pub(crate) instructions: Vec<Instruction>,
    /// Register slots that instructions refer to by range: predicates, then words, then doubles.
    pub(crate) slots: Vec<u32>,
    /// Line and text of every statement.
    pub(crate) statements: Vec<(u32, String)>,
    pub(crate) predicates: u32,
    pub(crate) words: u32,
    pub(crate) doubles: u32,
    /// Registers that the text declares; those after them are constants and special registers.
    pub(crate) declared_words: u32,
    pub(crate) declared_doubles: u32,
    pub(crate) predicate_constants: Vec<(Index, bool)>,
    pub(crate) word_constants: Vec<(Index, u32)>,
    pub(crate) double_constants: Vec<(Index, u64)>,
    pub(crate) specials: Vec<(Index, Special)>,
    /// Doubles that hold the address of a global variable: register, variable, offset.
    pub(crate) relocations: Vec<(Index, usize, i64)>,
}

impl Code {
    /// Whether the register holds a constant or a special register.
    pub(crate) fn is_constant(&self, double: bool, index: Index) -> bool {
        index >= if double { self.declared_doubles } else { self.declared_words }
    }
}

/// What decoding one kernel knows and collects.
pub(crate) struct Decoder<'a> {
    body: &'a Body,
    symbols: &'a Symbols,
    target: u32,
    predicates: u32,
    words: u32,
    doubles: u32,
    predicate_constants: HashMap<bool, Index>,
    word_constants: HashMap<u32, Index>,
    double_constants: HashMap<u64, Index>,
    specials: HashMap<Special, Index>,
    relocations: HashMap<(usize, i64), Index>,
    scratch: Vec<(Class, Index)>,
    sources: Vec<Register>,
    results: Vec<Register>,
    strict: bool,
}

pub(crate) fn decode(body: &Body, symbols: &Symbols, target: u32) -> Result<Code, ParseError> {
    let mut decoder = Decoder {
        body,
        symbols,
        target,
        predicates: body.predicates,
        words: body.words,
        doubles: body.doubles,
        predicate_constants: HashMap::new(),
        word_constants: HashMap::new(),
        double_constants: HashMap::new(),
        specials: HashMap::new(),
        relocations: HashMap::new(),
        scratch: Vec::new(),
        sources: Vec::new(),
        results: Vec::new(),
        strict: false,
    };
    let mut instructions = Vec::with_capacity(body.statements.len() + 1);
    let mut registers = Vec::new();
    for (at, statement) in body.statements.iter().enumerate() {
        instructions.push(decoder.statement(statement, at, &mut registers)?);
    }
    // Control that runs off the end leaves the kernel.
    instructions.push(Instruction {
        op: Op::Exit,
        guard: None,
        sources: (0, 0),
        results: (0, 0),
        strict: false,
        statement: u32::try_from(body.statements.len()).unwrap_or(u32::MAX),
    });
    let slots = registers.iter().map(|&register| decoder.slot(register)).collect();
    let mut statements: Vec<(u32, String)> = body.statements.iter().map(|s| (s.line, s.text.clone())).collect();
    statements.push((body.statements.last().map_or(0, |s| s.line), "(end of the kernel)".to_owned()));
    Ok(Code {
        instructions,
        slots,
        statements,
        predicates: decoder.predicates,
        words: decoder.words,
        doubles: decoder.doubles,
        declared_words: body.words,
        declared_doubles: body.doubles,
        predicate_constants: decoder.predicate_constants.into_iter().map(|(value, index)| (index, value)).collect(),
        word_constants: decoder.word_constants.into_iter().map(|(value, index)| (index, value)).collect(),
        double_constants: decoder.double_constants.into_iter().map(|(value, index)| (index, value)).collect(),
        specials: decoder.specials.into_iter().map(|(special, index)| (index, special)).collect(),
        relocations: decoder.relocations.into_iter().map(|((variable, at), index)| (index, variable, at)).collect(),
    })
}

impl Decoder<'_> {
    fn statement(
        &mut self,
        statement: &Statement,
        at: usize,
        registers: &mut Vec<Register>,
    ) -> Result<Instruction, ParseError> {
        self.sources.clear();
        self.results.clear();
        self.strict = false;
        let mut parts = Parts::new(statement);
        let op = self.op(&mut parts, statement)?;
        parts.finish()?;
        let guard = statement.guard.map(|(register, negated)| Guard { predicate: register.index, negated });
        let mut keep = |list: &[Register]| {
            let start = registers.len();
            registers.extend_from_slice(list);
            let range = |n| u32::try_from(n).map_err(|_| ParseError::syntax(statement.line, "so many operands"));
            Ok((range(start)?, range(registers.len())?))
        };
        let (sources, results) = (keep(&self.sources)?, keep(&self.results)?);
        let statement = u32::try_from(at).map_err(|_| ParseError::syntax(statement.line, "so many statements"))?;
        Ok(Instruction { op, guard, sources, results, strict: self.strict, statement })
    }

    fn slot(&self, register: Register) -> u32 {
        match register.class {
            Class::Predicate => register.index,
            Class::Half | Class::Word => self.predicates + register.index,
            Class::Double => self.predicates + self.words + register.index,
        }
    }

    fn op(&mut self, parts: &mut Parts<'_>, statement: &Statement) -> Result<Op, ParseError> {
        let operands = statement.operands.as_slice();
        match parts.name() {
            "mov" => self.mov(parts, operands),
            "cvt" => self.convert(parts, operands),
            "cvta" => self.between_spaces(parts, operands),
            "selp" => self.select(parts, operands),
            "slct" => self.select_sign(parts, operands),
            "setp" => self.set_predicate(parts, operands),
            "add" | "sub" | "mul" | "mad" | "fma" | "div" | "rem" | "min" | "max" | "abs" | "neg" | "and" | "or"
            | "xor" | "not" | "cnot" | "shl" | "shr" | "sad" | "bfe" | "bfi" | "brev" | "popc" | "clz" | "bfind"
            | "lop3" | "prmt" | "shf" | "rcp" | "sqrt" | "rsqrt" | "ex2" | "lg2" | "sin" | "cos" | "tanh"
            | "copysign" => self.arithmetic(parts, operands),
            "ld" | "ldu" | "st" => self.load_or_store(parts, operands),
            "atom" | "red" => self.atomic(parts, operands),
            "cp" => self.copy_async(parts, operands),
            "ldmatrix" => self.load_matrix(parts, operands),
            "mma" => self.mma(parts, operands),
            "shfl" | "vote" | "match" | "redux" | "activemask" | "bar" | "barrier" | "bra" | "brx" | "ret" | "exit"
            | "trap" | "brkpt" | "membar" | "fence" | "nanosleep" | "call" | "prefetch" | "prefetchu" | "discard" => {
                self.control(parts, statement)
            }
            _ => Err(parts.unknown_instruction()),
        }
    }

    fn label(&self, scope: usize, name: &str) -> Option<u32> {
        let mut scope = Some(scope);
        while let Some(at) = scope {
            if let Some(&found) = self.body.scopes[at].labels.get(name) {
                return u32::try_from(found).ok();
            }
            scope = self.body.scopes[at].parent;
        }
        None
    }

    fn place(&self, parts: &Parts<'_>, name: &str) -> Result<Place, ParseError> {
        self.symbols.find(name).ok_or_else(|| parts.operands(&format!("the name `{name}` is not declared")))
    }
}

/// Exactly `N` operands.
fn exactly<'o, const N: usize>(parts: &Parts<'_>, operands: &'o [Operand]) -> Result<&'o [Operand; N], ParseError> {
    operands.try_into().map_err(|_| parts.operands(&format!("{N} operands are due, found {}", operands.len())))
}
