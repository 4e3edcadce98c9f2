//! The statements of one kernel: register and variable declarations, labels, nested braces, instructions.

use std::collections::HashMap;

use crate::ParseError;
use crate::lexer::Kind;
use crate::parse::{Cursor, variable};
use crate::syntax::{Base, Body, Class, Operand, Register, Scope, StateSpace, Statement};

/// `%r<10>` declares `%r0` to `%r9`; a bare name has no count.
struct Declared {
    class: Class,
    first: u32,
    count: Option<u32>,
}

pub(crate) struct BodyParser<'c, 'a> {
    cursor: &'c mut Cursor<'a>,
    body: Body,
    /// One table of registers for each open brace.
    registers: Vec<HashMap<&'a str, Declared>>,
    scope: usize,
}

impl<'c, 'a> BodyParser<'c, 'a> {
    pub(crate) fn new(cursor: &'c mut Cursor<'a>) -> Self {
        Self { cursor, body: Body::default(), registers: Vec::new(), scope: 0 }
    }

    pub(crate) fn parse(mut self) -> Result<Body, ParseError> {
        self.cursor.expect('{')?;
        self.open(None);
        while !self.registers.is_empty() {
            self.statement()?;
        }
        Ok(self.body)
    }

    fn open(&mut self, parent: Option<usize>) {
        self.scope = self.body.scopes.len();
        self.body.scopes.push(Scope { parent, ..Scope::default() });
        self.registers.push(HashMap::new());
    }

    fn statement(&mut self) -> Result<(), ParseError> {
        if self.cursor.eat('{') {
            self.open(Some(self.scope));
            return Ok(());
        }
        if self.cursor.eat('}') {
            self.registers.pop();
            self.scope = self.body.scopes[self.scope].parent.unwrap_or(0);
            return Ok(());
        }
        if self.cursor.eat(';') {
            return Ok(());
        }
        if let (Some(&Kind::Word(name)), Some(Kind::Punctuation(':'))) = (self.cursor.peek(), self.cursor.peek_second())
        {
            self.cursor.at += 2;
            return self.label(name);
        }
        match self.cursor.peek() {
            Some(&Kind::Word(word)) if word.starts_with('.') => self.directive(word),
            _ => self.instruction(),
        }
    }

    fn label(&mut self, name: &str) -> Result<(), ParseError> {
        if self.cursor.eat_word(".branchtargets") {
            let mut names = vec![self.cursor.word()?.to_owned()];
            while self.cursor.eat(',') {
                names.push(self.cursor.word()?.to_owned());
            }
            self.body.scopes[self.scope].targets.insert(name.to_owned(), names);
            return self.cursor.expect(';');
        }
        let next = self.body.statements.len();
        self.body.scopes[self.scope].labels.insert(name.to_owned(), next);
        Ok(())
    }

    fn directive(&mut self, word: &str) -> Result<(), ParseError> {
        let line = self.cursor.line();
        if word == ".loc" || word == ".file" {
            self.cursor.skip_line();
            return Ok(());
        }
        self.cursor.at += 1;
        match word {
            ".reg" => self.declare_registers()?,
            ".shared" => self.declare(StateSpace::Shared)?,
            ".local" => self.declare(StateSpace::Local)?,
            ".pragma" => {
                self.cursor.next()?;
            }
            _ => return Err(ParseError::Unsupported { line, what: format!("directive `{word}`") }),
        }
        self.cursor.expect(';')
    }

    fn declare(&mut self, space: StateSpace) -> Result<(), ParseError> {
        let variable = variable(self.cursor, space)?;
        self.body.variables.push(variable);
        Ok(())
    }

    fn declare_registers(&mut self) -> Result<(), ParseError> {
        let line = self.cursor.line();
        let type_name = self.cursor.word()?;
        let class = Class::of_type(type_name)
            .ok_or_else(|| ParseError::Unsupported { line, what: format!("register type `{type_name}`") })?;
        loop {
            let name = self.cursor.word()?;
            let mut count = None;
            if self.cursor.eat('<') {
                let number = self.cursor.integer()?;
                count = Some(u32::try_from(number).map_err(|_| ParseError::syntax(line, "the number of registers"))?);
                self.cursor.expect('>')?;
            }
            let file = match class {
                Class::Predicate => &mut self.body.predicates,
                Class::Half | Class::Word => &mut self.body.words,
                Class::Double => &mut self.body.doubles,
            };
            let first = *file;
            *file = file
                .checked_add(count.unwrap_or(1))
                .filter(|&n| n < 1 << 24)
                .ok_or_else(|| ParseError::syntax(line, "the number of registers"))?;
            if let Some(table) = self.registers.last_mut() {
                table.insert(name, Declared { class, first, count });
            }
            if !self.cursor.eat(',') {
                return Ok(());
            }
        }
    }

    fn register(&self, name: &str) -> Option<Register> {
        let stem = name.trim_end_matches(|c: char| c.is_ascii_digit());
        let number: Option<u32> = name[stem.len()..].parse().ok();
        self.registers.iter().rev().find_map(|table| {
            if let Some(found) = table.get(name).filter(|d| d.count.is_none()) {
                return Some(Register { class: found.class, index: found.first });
            }
            let (found, number) = (table.get(stem)?, number?);
            found.count.filter(|&count| number < count)?;
            Some(Register { class: found.class, index: found.first + number })
        })
    }

    fn instruction(&mut self) -> Result<(), ParseError> {
        let line = self.cursor.line();
        let start = self.cursor.tokens.get(self.cursor.at).map_or(0, |t| t.start);
        let mut guard = None;
        if self.cursor.eat('@') {
            let negated = self.cursor.eat('!');
            let name = self.cursor.word()?;
            let register = self.register(name).filter(|r| r.class == Class::Predicate);
            let register = register.ok_or_else(|| ParseError::syntax(line, &format!("the guard `{name}`")))?;
            guard = Some((register, negated));
        }
        let opcode = self.cursor.word()?.to_owned();
        let mut operands = Vec::new();
        while !self.cursor.is(';') {
            operands.push(self.operand()?);
            if !self.cursor.is(';') {
                self.cursor.expect(',')?;
            }
        }
        let end = self.cursor.tokens.get(self.cursor.at).map_or(start, |t| t.end);
        self.cursor.at += 1;
        let text = self.cursor.text[start..end].split_whitespace().collect::<Vec<_>>().join(" ");
        self.body.statements.push(Statement { line, text, guard, opcode, operands, scope: self.scope });
        Ok(())
    }

    fn operand(&mut self) -> Result<Operand, ParseError> {
        if self.cursor.eat('{') {
            let mut parts = Vec::new();
            while !self.cursor.eat('}') {
                parts.push(self.operand()?);
                if !self.cursor.is('}') {
                    self.cursor.expect(',')?;
                }
            }
            return Ok(Operand::Vector(parts));
        }
        if self.cursor.eat('[') {
            let address = self.address()?;
            self.cursor.expect(']')?;
            return Ok(address);
        }
        if self.cursor.eat('!') {
            let line = self.cursor.line();
            let name = self.cursor.word()?;
            let register = self.register(name).filter(|r| r.class == Class::Predicate);
            return register.map(Operand::Not).ok_or_else(|| ParseError::syntax(line, &format!("`!{name}`")));
        }
        match self.cursor.peek() {
            Some(&Kind::Float32(bits)) => {
                self.cursor.at += 1;
                Ok(Operand::Float32(bits))
            }
            Some(&Kind::Float64(bits)) => {
                self.cursor.at += 1;
                Ok(Operand::Float64(bits))
            }
            Some(&Kind::Word(name)) => {
                self.cursor.at += 1;
                self.named(name)
            }
            _ => Ok(Operand::Integer(self.cursor.integer()?)),
        }
    }

    fn named(&mut self, name: &str) -> Result<Operand, ParseError> {
        let line = self.cursor.line();
        let first = if name == "_" { None } else { self.register(name) };
        if self.cursor.eat('|') {
            let second = self.cursor.word()?;
            let other = if second == "_" { None } else { self.register(second) };
            if (first.is_none() && name != "_") || (other.is_none() && second != "_") {
                return Err(ParseError::syntax(line, &format!("the registers `{name}|{second}`")));
            }
            return Ok(Operand::Pair(first, other));
        }
        if name == "_" {
            return Ok(Operand::Sink);
        }
        if let Some(register) = first {
            return Ok(Operand::Register(register));
        }
        if name.starts_with('%') {
            return Ok(Operand::Special(name.to_owned()));
        }
        let offset = self.offset()?;
        Ok(Operand::Symbol(name.to_owned(), offset))
    }

    fn offset(&mut self) -> Result<i64, ParseError> {
        if self.cursor.eat('+') {
            return Ok(self.cursor.integer()?.cast_signed());
        }
        if self.cursor.is('-') {
            return Ok(self.cursor.integer()?.cast_signed());
        }
        Ok(0)
    }

    fn address(&mut self) -> Result<Operand, ParseError> {
        let line = self.cursor.line();
        if let Some(&Kind::Word(name)) = self.cursor.peek() {
            self.cursor.at += 1;
            let base = match self.register(name) {
                Some(register) if register.class == Class::Predicate || register.class == Class::Half => {
                    return Err(ParseError::syntax(line, &format!("the address register `{name}`")));
                }
                Some(register) => Base::Register(register),
                None if name.starts_with('%') => {
                    return Err(ParseError::syntax(line, &format!("the undeclared register `{name}`")));
                }
                None => Base::Symbol(name.to_owned()),
            };
            return Ok(Operand::Address(base, self.offset()?));
        }
        Ok(Operand::Address(Base::Absolute, self.cursor.integer()?.cast_signed()))
    }
}
