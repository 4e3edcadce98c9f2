//! An opcode split into its name and modifiers; every modifier has to be taken by someone.

use crate::ParseError;
use crate::instruction::{FloatMode, FloatType, IntegerType, Rounding, Type};
use crate::syntax::{Class, Statement};

pub(crate) struct Parts<'s> {
    statement: &'s Statement,
    parts: Vec<&'s str>,
    taken: Vec<bool>,
}

impl<'s> Parts<'s> {
    pub(crate) fn new(statement: &'s Statement) -> Self {
        let parts: Vec<&str> = statement.opcode.split('.').collect();
        let mut taken = vec![false; parts.len()];
        taken[0] = true;
        Self { statement, parts, taken }
    }

    pub(crate) fn name(&self) -> &'s str {
        self.parts[0]
    }

    pub(crate) fn take(&mut self, modifier: &str) -> bool {
        self.take_any(&[modifier]).is_some()
    }

    /// Takes the first modifier that is one of `modifiers`.
    pub(crate) fn take_any(&mut self, modifiers: &[&str]) -> Option<&'s str> {
        let free = (0..self.parts.len()).find(|&i| !self.taken[i] && modifiers.contains(&self.parts[i]))?;
        self.taken[free] = true;
        Some(self.parts[free])
    }

    /// Takes the next modifier, whatever it is.
    pub(crate) fn take_next(&mut self) -> Result<&'s str, ParseError> {
        let free = self.taken.iter().position(|taken| !taken);
        let free = free.ok_or_else(|| self.operands("a modifier or type is missing"))?;
        self.taken[free] = true;
        Ok(self.parts[free])
    }

    /// Errors name the first modifier that nobody took.
    pub(crate) fn finish(&self) -> Result<(), ParseError> {
        match self.taken.iter().position(|taken| !taken) {
            None => Ok(()),
            Some(left) => Err(self.unknown(self.parts[left])),
        }
    }

    pub(crate) fn unknown(&self, modifier: &str) -> ParseError {
        ParseError::UnknownModifier {
            line: self.statement.line,
            opcode: self.statement.opcode.clone(),
            modifier: format!(".{modifier}"),
        }
    }

    pub(crate) fn unknown_instruction(&self) -> ParseError {
        ParseError::UnknownInstruction { line: self.statement.line, opcode: self.statement.opcode.clone() }
    }

    pub(crate) fn operands(&self, what: &str) -> ParseError {
        ParseError::Operands { line: self.statement.line, opcode: self.statement.opcode.clone(), what: what.to_owned() }
    }

    pub(crate) fn integer_type(&mut self) -> Result<IntegerType, ParseError> {
        let name = self.take_next()?;
        integer_type(name).ok_or_else(|| self.unknown(name))
    }

    pub(crate) fn float_type(&mut self) -> Result<FloatType, ParseError> {
        let name = self.take_next()?;
        float_type(name).ok_or_else(|| self.unknown(name))
    }

    pub(crate) fn value_type(&mut self) -> Result<Type, ParseError> {
        let name = self.take_next()?;
        value_type(name).ok_or_else(|| self.unknown(name))
    }

    pub(crate) fn class(&mut self) -> Result<Class, ParseError> {
        let name = self.take_next()?;
        Class::of_type(&format!(".{name}")).ok_or_else(|| self.unknown(name))
    }

    /// `.rn .rz .rm .rp`, `.ftz`, `.sat`; nearest when none is given.
    pub(crate) fn float_mode(&mut self) -> FloatMode {
        let rounding = match self.take_any(&["rn", "rz", "rm", "rp"]) {
            Some("rz") => Rounding::Zero,
            Some("rm") => Rounding::Down,
            Some("rp") => Rounding::Up,
            _ => Rounding::Nearest,
        };
        FloatMode { rounding, ftz: self.take("ftz"), saturate: self.take("sat") }
    }

    /// The last modifier, where the type stands in most instructions, without taking it.
    pub(crate) fn last(&self) -> &'s str {
        self.parts[self.parts.len() - 1]
    }
}

pub(crate) fn integer_type(name: &str) -> Option<IntegerType> {
    Some(match name {
        "u16" | "b16" => IntegerType::U16,
        "s16" => IntegerType::S16,
        "u32" | "b32" => IntegerType::U32,
        "s32" => IntegerType::S32,
        "u64" | "b64" => IntegerType::U64,
        "s64" => IntegerType::S64,
        _ => return None,
    })
}

pub(crate) fn float_type(name: &str) -> Option<FloatType> {
    Some(match name {
        "f16" => FloatType::F16,
        "bf16" => FloatType::Bf16,
        "f16x2" => FloatType::F16x2,
        "bf16x2" => FloatType::Bf16x2,
        "f32" => FloatType::F32,
        "f64" => FloatType::F64,
        _ => return None,
    })
}

pub(crate) fn value_type(name: &str) -> Option<Type> {
    Some(match name {
        "u8" | "b8" => Type::U8,
        "s8" => Type::S8,
        "u16" | "b16" => Type::U16,
        "s16" => Type::S16,
        "u32" | "b32" => Type::U32,
        "s32" => Type::S32,
        "u64" | "b64" => Type::U64,
        "s64" => Type::S64,
        "f16" => Type::F16,
        "bf16" => Type::Bf16,
        "f32" => Type::F32,
        "f64" => Type::F64,
        _ => return None,
    })
}

impl IntegerType {
    pub(crate) fn class(self) -> Class {
        match self {
            Self::U16 | Self::S16 => Class::Half,
            Self::U32 | Self::S32 => Class::Word,
            Self::U64 | Self::S64 => Class::Double,
        }
    }
}

impl FloatType {
    pub(crate) fn class(self) -> Class {
        match self {
            Self::F16 | Self::Bf16 => Class::Half,
            Self::F16x2 | Self::Bf16x2 | Self::F32 => Class::Word,
            Self::F64 => Class::Double,
        }
    }
}

impl Type {
    pub(crate) fn class(self) -> Class {
        match self {
            Self::U8 | Self::S8 | Self::U16 | Self::S16 | Self::F16 | Self::Bf16 => Class::Half,
            Self::U32 | Self::S32 | Self::F32 => Class::Word,
            Self::U64 | Self::S64 | Self::F64 => Class::Double,
        }
    }

    pub(crate) fn is_float(self) -> bool {
        matches!(self, Self::F16 | Self::Bf16 | Self::F32 | Self::F64)
    }
}
