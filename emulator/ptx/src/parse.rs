//! Tokens to the parsed form: module directives, variables, entries and the statements of their bodies.

use crate::ParseError;
use crate::lexer::{Kind, Token, tokens};
use crate::parse_body::BodyParser;
use crate::syntax::{Entry, StateSpace, Text, Variable};

pub(crate) struct Cursor<'a> {
    pub(crate) text: &'a str,
    pub(crate) tokens: Vec<Token<'a>>,
    pub(crate) at: usize,
}

impl<'a> Cursor<'a> {
    pub(crate) fn peek(&self) -> Option<&Kind<'a>> {
        self.tokens.get(self.at).map(|t| &t.kind)
    }

    pub(crate) fn peek_second(&self) -> Option<&Kind<'a>> {
        self.tokens.get(self.at + 1).map(|t| &t.kind)
    }

    pub(crate) fn line(&self) -> u32 {
        self.tokens.get(self.at).or(self.tokens.last()).map_or(1, |t| t.line)
    }

    pub(crate) fn next(&mut self) -> Result<Kind<'a>, ParseError> {
        let token = self.tokens.get(self.at).ok_or_else(|| ParseError::syntax(self.line(), "the end of the text"))?;
        self.at += 1;
        Ok(token.kind.clone())
    }

    pub(crate) fn is(&self, punctuation: char) -> bool {
        self.peek() == Some(&Kind::Punctuation(punctuation))
    }

    pub(crate) fn eat(&mut self, punctuation: char) -> bool {
        let found = self.is(punctuation);
        self.at += usize::from(found);
        found
    }

    pub(crate) fn eat_word(&mut self, word: &str) -> bool {
        let found = self.peek() == Some(&Kind::Word(word));
        self.at += usize::from(found);
        found
    }

    pub(crate) fn expect(&mut self, punctuation: char) -> Result<(), ParseError> {
        if self.eat(punctuation) { Ok(()) } else { Err(self.unexpected(&format!("`{punctuation}`"))) }
    }

    pub(crate) fn word(&mut self) -> Result<&'a str, ParseError> {
        match self.peek() {
            Some(&Kind::Word(word)) => {
                self.at += 1;
                Ok(word)
            }
            _ => Err(self.unexpected("a name")),
        }
    }

    /// An integer, possibly negative (two's complement).
    pub(crate) fn integer(&mut self) -> Result<u64, ParseError> {
        let negative = self.eat('-');
        match self.next()? {
            Kind::Integer(value) => Ok(if negative { value.wrapping_neg() } else { value }),
            _ => {
                self.at -= 1;
                Err(self.unexpected("an integer"))
            }
        }
    }

    pub(crate) fn unexpected(&self, wanted: &str) -> ParseError {
        let found = self.tokens.get(self.at).map_or("the end of the text", |t| &self.text[t.start..t.end]);
        ParseError::syntax(self.line(), &format!("`{found}` where {wanted} is due"))
    }

    pub(crate) fn skip_line(&mut self) {
        let line = self.line();
        while self.tokens.get(self.at).is_some_and(|t| t.line == line) {
            self.at += 1;
        }
    }

    fn skip_braces(&mut self) -> Result<(), ParseError> {
        self.expect('{')?;
        let mut depth = 1;
        while depth > 0 {
            match self.next()? {
                Kind::Punctuation('{') => depth += 1,
                Kind::Punctuation('}') => depth -= 1,
                _ => {}
            }
        }
        Ok(())
    }
}

pub(crate) fn parse(text: &str) -> Result<Text, ParseError> {
    let mut cursor = Cursor { text, tokens: tokens(text)?, at: 0 };
    let mut parsed = Text::default();
    while cursor.peek().is_some() {
        let line = cursor.line();
        match cursor.word()? {
            ".version" | ".address_size" => {
                cursor.next()?;
            }
            ".target" => parsed.target = target(&mut cursor)?,
            ".file" | ".loc" => {
                cursor.at -= 1;
                cursor.skip_line();
            }
            ".section" => {
                cursor.word()?;
                cursor.skip_braces()?;
            }
            ".pragma" => {
                cursor.next()?;
                cursor.expect(';')?;
            }
            ".visible" | ".weak" | ".common" => {}
            ".extern" => {
                let space = cursor.word()?;
                if space == ".func" {
                    return Err(function(&mut cursor, line));
                }
                let space = state_space(space).ok_or_else(|| cursor.unexpected("a variable"))?;
                let mut variable = variable(&mut cursor, space)?;
                if space != StateSpace::Shared {
                    return Err(ParseError::Unsupported {
                        line,
                        what: format!("external variable `{}`", variable.name),
                    });
                }
                variable.dynamic = true;
                cursor.expect(';')?;
                parsed.variables.push(variable);
            }
            ".entry" => {
                let entry = entry(&mut cursor, line)?;
                parsed.entries.push(entry);
            }
            ".func" => return Err(function(&mut cursor, line)),
            word => {
                let space = state_space(word)
                    .ok_or_else(|| ParseError::Unsupported { line, what: format!("directive `{word}`") })?;
                let variable = variable(&mut cursor, space)?;
                cursor.expect(';')?;
                parsed.variables.push(variable);
            }
        }
    }
    Ok(parsed)
}

fn target(cursor: &mut Cursor<'_>) -> Result<u32, ParseError> {
    let line = cursor.line();
    let name = cursor.word()?;
    while cursor.eat(',') {
        cursor.word()?;
    }
    let digits = name.strip_prefix("sm_").map(|n| n.trim_end_matches(|c: char| c.is_ascii_alphabetic()));
    digits
        .and_then(|n| n.parse().ok())
        .ok_or_else(|| ParseError::Unsupported { line, what: format!("target `{name}`") })
}

/// Device functions are inlined by NVRTC; one that is left is refused by name.
fn function(cursor: &mut Cursor<'_>, line: u32) -> ParseError {
    let mut depth = 0;
    while let Ok(kind) = cursor.next() {
        match kind {
            Kind::Punctuation('(') => depth += 1,
            Kind::Punctuation(')') => depth -= 1,
            Kind::Word(name) if depth == 0 => {
                return ParseError::Unsupported { line, what: format!("device function `{name}`") };
            }
            _ => {}
        }
    }
    ParseError::syntax(line, "a function without a name")
}

fn state_space(word: &str) -> Option<StateSpace> {
    Some(match word {
        ".global" => StateSpace::Global,
        ".const" => StateSpace::Constant,
        ".shared" => StateSpace::Shared,
        ".local" => StateSpace::Local,
        ".param" => StateSpace::Parameter,
        _ => return None,
    })
}

fn type_bytes(name: &str) -> Option<u32> {
    Some(match name {
        ".b8" | ".u8" | ".s8" => 1,
        ".b16" | ".u16" | ".s16" | ".f16" | ".bf16" => 2,
        ".b32" | ".u32" | ".s32" | ".f32" | ".f16x2" | ".bf16x2" => 4,
        ".b64" | ".u64" | ".s64" | ".f64" => 8,
        ".b128" => 16,
        _ => return None,
    })
}

/// `[.align n] .type name[n][m] [= value]`, after the state space.
pub(crate) fn variable(cursor: &mut Cursor<'_>, space: StateSpace) -> Result<Variable, ParseError> {
    let line = cursor.line();
    let (mut align, mut width) = (None, None);
    let name = loop {
        match cursor.word()? {
            ".align" => align = Some(power_of_two(cursor)?),
            // Hints on what a pointer parameter points to.
            ".ptr" | ".global" | ".const" | ".shared" | ".local" if space == StateSpace::Parameter => {
                if cursor.eat_word(".align") {
                    power_of_two(cursor)?;
                }
            }
            word if word.starts_with('.') => {
                let bytes = type_bytes(word)
                    .ok_or_else(|| ParseError::Unsupported { line, what: format!("type or attribute `{word}`") })?;
                width = Some(bytes);
            }
            name => break name.to_owned(),
        }
    };
    let width = width.ok_or_else(|| ParseError::syntax(line, &format!("`{name}` without a type")))?;
    let mut bytes = u64::from(width);
    let mut open = false;
    while cursor.eat('[') {
        if cursor.is(']') {
            open = true;
        } else {
            bytes = bytes
                .checked_mul(cursor.integer()?)
                .ok_or_else(|| ParseError::syntax(line, &format!("the size of `{name}`")))?;
        }
        cursor.expect(']')?;
    }
    let mut initial = Vec::new();
    if cursor.eat('=') {
        initializer(cursor, width, &mut initial)?;
    }
    if open {
        bytes = initial.len() as u64;
    }
    if initial.len() as u64 > bytes {
        return Err(ParseError::syntax(line, &format!("more values than `{name}` holds")));
    }
    Ok(Variable { name, space, bytes, align: align.unwrap_or(width), dynamic: false, initial })
}

fn power_of_two(cursor: &mut Cursor<'_>) -> Result<u32, ParseError> {
    let line = cursor.line();
    let value = cursor.integer()?;
    u32::try_from(value)
        .ok()
        .filter(|align| align.is_power_of_two())
        .ok_or_else(|| ParseError::syntax(line, &format!("the alignment {value}")))
}

fn initializer(cursor: &mut Cursor<'_>, width: u32, into: &mut Vec<u8>) -> Result<(), ParseError> {
    if cursor.eat('{') {
        while !cursor.eat('}') {
            initializer(cursor, width, into)?;
            if !cursor.is('}') {
                cursor.expect(',')?;
            }
        }
        return Ok(());
    }
    let value = match cursor.peek() {
        Some(&Kind::Float32(bits)) => {
            cursor.at += 1;
            u64::from(bits)
        }
        Some(&Kind::Float64(bits)) => {
            cursor.at += 1;
            bits
        }
        Some(&Kind::Word(name)) => {
            let what = format!("address of `{name}` as an initial value");
            return Err(ParseError::Unsupported { line: cursor.line(), what });
        }
        _ => cursor.integer()?,
    };
    into.extend(value.to_le_bytes().iter().chain([0; 8].iter()).take(width as usize));
    Ok(())
}

fn entry(cursor: &mut Cursor<'_>, line: u32) -> Result<Entry, ParseError> {
    let name = cursor.word()?.to_owned();
    let mut parameters = Vec::new();
    if cursor.eat('(') {
        while !cursor.eat(')') {
            if !cursor.eat_word(".param") {
                return Err(cursor.unexpected("`.param`"));
            }
            parameters.push(variable(cursor, StateSpace::Parameter)?);
            if !cursor.is(')') {
                cursor.expect(',')?;
            }
        }
    }
    let mut max_threads = None;
    while !cursor.is('{') {
        let line = cursor.line();
        match cursor.word()? {
            ".maxntid" => max_threads = Some(product(cursor)?),
            ".reqntid" => max_threads = Some(product(cursor)?),
            // Hints for the register allocator.
            ".minnctapersm" | ".maxnreg" | ".maxnctapersm" => {
                cursor.integer()?;
            }
            ".pragma" => {
                cursor.next()?;
                cursor.expect(';')?;
            }
            word => return Err(ParseError::Unsupported { line, what: format!("directive `{word}`") }),
        }
    }
    let body = BodyParser::new(cursor).parse()?;
    Ok(Entry { name, line, parameters, max_threads, body })
}

fn product(cursor: &mut Cursor<'_>) -> Result<u32, ParseError> {
    let line = cursor.line();
    let mut threads = cursor.integer()?;
    while cursor.eat(',') {
        threads = threads.saturating_mul(cursor.integer()?);
    }
    u32::try_from(threads).map_err(|_| ParseError::syntax(line, "the number of threads"))
}
