//! Decoding of integer and float arithmetic and of bit manipulation.

use super::parts::{Parts, float_type};
use super::{Decoder, exactly};
use crate::ParseError;
use crate::instruction::{CountOp, FloatOp, FloatType, IntegerOp, IntegerType, Logic, Op, Rounding};
use crate::syntax::{Class, Operand};

/// First target that has bf16 addition and multiplication apart from fma.
const BF16_ARITHMETIC: u32 = 90;

impl Decoder<'_> {
    pub(super) fn arithmetic(&mut self, parts: &mut Parts<'_>, operands: &[Operand]) -> Result<Op, ParseError> {
        match parts.name() {
            "popc" => self.count(parts, operands, CountOp::Population),
            "clz" => self.count(parts, operands, CountOp::LeadingZeros),
            "bfind" if parts.take("shiftamt") => self.count(parts, operands, CountOp::FindLeadingShift),
            "bfind" => self.count(parts, operands, CountOp::FindLeading),
            "lop3" => self.lop3(parts, operands),
            "prmt" => {
                self.b32(parts)?;
                let [d, a, b, c] = exactly(parts, operands)?;
                let s = self.words(parts, [a, b, c])?;
                Ok(Op::Permute { s, d: self.result(parts, Class::Word, d)? })
            }
            "shf" => {
                let left = match parts.take_any(&["l", "r"]) {
                    Some(side) => side == "l",
                    None => return Err(parts.operands("a direction is due")),
                };
                let wrap = match parts.take_any(&["wrap", "clamp"]) {
                    Some(mode) => mode == "wrap",
                    None => return Err(parts.operands("`.wrap` or `.clamp` is due")),
                };
                self.b32(parts)?;
                let [d, a, b, c] = exactly(parts, operands)?;
                let s = self.words(parts, [a, b, c])?;
                Ok(Op::FunnelShift { left, wrap, s, d: self.result(parts, Class::Word, d)? })
            }
            "and" | "or" | "xor" | "not" if parts.take("pred") => self.predicate_logic(parts, operands),
            _ if float_type(parts.last()).is_some() => self.float(parts, operands),
            _ => self.integer(parts, operands),
        }
    }

    fn b32(&mut self, parts: &mut Parts<'_>) -> Result<(), ParseError> {
        if parts.take("b32") { Ok(()) } else { Err(parts.unknown(parts.last())) }
    }

    fn words<const N: usize>(&mut self, parts: &Parts<'_>, operands: [&Operand; N]) -> Result<[u32; N], ParseError> {
        let mut found = [0; N];
        for (index, operand) in found.iter_mut().zip(operands) {
            *index = self.source(parts, Class::Word, operand)?;
        }
        Ok(found)
    }

    fn count(&mut self, parts: &mut Parts<'_>, operands: &[Operand], op: CountOp) -> Result<Op, ParseError> {
        let ty = parts.integer_type()?;
        if ty.class() == Class::Half {
            return Err(parts.unknown(parts.last()));
        }
        let [d, a] = exactly(parts, operands)?;
        let a = self.source(parts, ty.class(), a)?;
        Ok(Op::Count { op, ty, a, d: self.result(parts, Class::Word, d)? })
    }

    fn lop3(&mut self, parts: &mut Parts<'_>, operands: &[Operand]) -> Result<Op, ParseError> {
        self.b32(parts)?;
        let [d, a, b, c, table] = exactly(parts, operands)?;
        let table = match table {
            Operand::Integer(value) => u8::try_from(*value).ok(),
            _ => None,
        };
        let table = table.ok_or_else(|| parts.operands("the table has to be a number below 256"))?;
        let s = self.words(parts, [a, b, c])?;
        Ok(Op::Lop3 { table, s, d: self.result(parts, Class::Word, d)? })
    }

    fn predicate_logic(&mut self, parts: &mut Parts<'_>, operands: &[Operand]) -> Result<Op, ParseError> {
        if parts.name() == "not" {
            let [d, a] = exactly(parts, operands)?;
            let a = self.predicate(parts, a)?;
            return Ok(Op::NotPredicate { a, d: self.result(parts, Class::Predicate, d)? });
        }
        let logic = match parts.name() {
            "and" => Logic::And,
            "or" => Logic::Or,
            _ => Logic::Xor,
        };
        let [d, a, b] = exactly(parts, operands)?;
        let (a, b) = (self.predicate(parts, a)?, self.predicate(parts, b)?);
        Ok(Op::Predicate { logic, a, b, d: self.result(parts, Class::Predicate, d)? })
    }

    fn integer(&mut self, parts: &mut Parts<'_>, operands: &[Operand]) -> Result<Op, ParseError> {
        let name = parts.name();
        let (low, high, wide) = match name {
            "mul" | "mad" => (parts.take("lo"), parts.take("hi"), parts.take("wide")),
            _ => (false, false, false),
        };
        if matches!(name, "mul" | "mad") && u8::from(low) + u8::from(high) + u8::from(wide) != 1 {
            return Err(parts.operands("one of `.lo`, `.hi`, `.wide` is due"));
        }
        if wide {
            return self.wide(parts, operands);
        }
        let saturating = matches!(name, "add" | "sub") && parts.take("sat");
        let ty = parts.integer_type()?;
        let op = match name {
            "add" if saturating => IntegerOp::AddSaturating,
            "sub" if saturating => IntegerOp::SubSaturating,
            "add" => IntegerOp::Add,
            "sub" => IntegerOp::Sub,
            "mul" if low => IntegerOp::MulLow,
            "mul" => IntegerOp::MulHigh,
            "mad" if low => IntegerOp::MadLow,
            "mad" => IntegerOp::MadHigh,
            "sad" => IntegerOp::Sad,
            "div" => IntegerOp::Div,
            "rem" => IntegerOp::Rem,
            "min" => IntegerOp::Min,
            "max" => IntegerOp::Max,
            "abs" => IntegerOp::Abs,
            "neg" => IntegerOp::Neg,
            "and" => IntegerOp::And,
            "or" => IntegerOp::Or,
            "xor" => IntegerOp::Xor,
            "not" => IntegerOp::Not,
            "cnot" => IntegerOp::LogicalNot,
            "shl" => IntegerOp::ShiftLeft,
            "shr" => IntegerOp::ShiftRight,
            "bfe" => IntegerOp::ExtractField,
            "bfi" => IntegerOp::InsertField,
            "brev" => IntegerOp::Reverse,
            _ => return Err(parts.unknown_instruction()),
        };
        if saturating && ty != IntegerType::S32 {
            return Err(parts.unknown("sat"));
        }
        let class = ty.class();
        let classes: &[Class] = match op {
            IntegerOp::Abs | IntegerOp::Neg | IntegerOp::Not | IntegerOp::LogicalNot | IntegerOp::Reverse => &[class],
            IntegerOp::MadLow | IntegerOp::MadHigh | IntegerOp::Sad => &[class, class, class],
            IntegerOp::ShiftLeft | IntegerOp::ShiftRight => &[class, Class::Word],
            IntegerOp::ExtractField => &[class, Class::Word, Class::Word],
            IntegerOp::InsertField => &[class, class, Class::Word, Class::Word],
            _ => &[class, class],
        };
        if operands.len() != classes.len() + 1 {
            return Err(parts.operands("a wrong number of operands"));
        }
        let mut s = [0; 4];
        for (index, (class, operand)) in s.iter_mut().zip(classes.iter().zip(&operands[1..])) {
            *index = self.source(parts, *class, operand)?;
        }
        Ok(Op::Integer { op, ty, s, d: self.result(parts, class, &operands[0])? })
    }

    fn wide(&mut self, parts: &mut Parts<'_>, operands: &[Operand]) -> Result<Op, ParseError> {
        let ty = parts.integer_type()?;
        let result = match ty.class() {
            Class::Half => Class::Word,
            Class::Word => Class::Double,
            _ => return Err(parts.unknown(parts.last())),
        };
        let (d, a, b, c) = match operands {
            [d, a, b] if parts.name() == "mul" => (d, a, b, None),
            [d, a, b, c] if parts.name() == "mad" => (d, a, b, Some(c)),
            _ => return Err(parts.operands("a wrong number of operands")),
        };
        let (a, b) = (self.source(parts, ty.class(), a)?, self.source(parts, ty.class(), b)?);
        let c = match c {
            Some(c) => Some(self.source(parts, result, c)?),
            None => None,
        };
        Ok(Op::Wide { ty, a, b, c, d: self.result(parts, result, d)? })
    }

    fn float(&mut self, parts: &mut Parts<'_>, operands: &[Operand]) -> Result<Op, ParseError> {
        let (op, sources) = self.float_op(parts)?;
        let mode = parts.float_mode();
        let ty = parts.float_type()?;
        let directed = mode.rounding != Rounding::Nearest;
        if directed && ty != FloatType::F32 {
            return Err(parts.operands("a rounding other than `.rn` is known for f32 alone"));
        }
        let bf16 = matches!(ty, FloatType::Bf16 | FloatType::Bf16x2);
        if bf16 && self.target < BF16_ARITHMETIC && matches!(op, FloatOp::Add | FloatOp::Sub | FloatOp::Mul) {
            return Err(parts.operands("bf16 needs the target sm_90 here"));
        }
        let packed = matches!(ty, FloatType::F16x2 | FloatType::Bf16x2);
        let half = packed || matches!(ty, FloatType::F16 | FloatType::Bf16);
        let for_half = matches!(
            op,
            FloatOp::Add
                | FloatOp::Sub
                | FloatOp::Mul
                | FloatOp::Fma
                | FloatOp::FmaRelu
                | FloatOp::Min
                | FloatOp::Max
                | FloatOp::MinNan
                | FloatOp::MaxNan
                | FloatOp::Abs
                | FloatOp::Neg
                | FloatOp::Exp2
                | FloatOp::Tanh
        );
        if ty == FloatType::F64 && matches!(op, FloatOp::MinNan | FloatOp::MaxNan) {
            return Err(parts.unknown("NaN"));
        }
        if (half && !for_half) || (!half && op == FloatOp::FmaRelu) {
            return Err(parts.unknown(parts.last()));
        }
        if operands.len() != sources + 1 {
            return Err(parts.operands("a wrong number of operands"));
        }
        let class = ty.class();
        let mut s = [0; 3];
        for (index, operand) in s.iter_mut().zip(&operands[1..]) {
            *index = self.source(parts, class, operand)?;
        }
        Ok(Op::Float { op, ty, mode, s, d: self.result(parts, class, &operands[0])? })
    }

    /// The operation and its number of sources.
    fn float_op(&mut self, parts: &mut Parts<'_>) -> Result<(FloatOp, usize), ParseError> {
        match parts.name() {
            "div" | "rcp" | "sqrt" => {
                parts.take_any(&["approx", "full"]);
            }
            "rsqrt" | "ex2" | "lg2" | "sin" | "cos" | "tanh" if !parts.take("approx") => {
                return Err(parts.operands("`.approx` is due"));
            }
            _ => {}
        }
        let nan = matches!(parts.name(), "min" | "max") && parts.take("NaN");
        let relu = parts.name() == "fma" && parts.take("relu");
        Ok(match parts.name() {
            "add" => (FloatOp::Add, 2),
            "sub" => (FloatOp::Sub, 2),
            "mul" => (FloatOp::Mul, 2),
            "fma" if relu => (FloatOp::FmaRelu, 3),
            "fma" | "mad" => (FloatOp::Fma, 3),
            "div" => (FloatOp::Div, 2),
            "min" => (if nan { FloatOp::MinNan } else { FloatOp::Min }, 2),
            "max" => (if nan { FloatOp::MaxNan } else { FloatOp::Max }, 2),
            "abs" => (FloatOp::Abs, 1),
            "neg" => (FloatOp::Neg, 1),
            "copysign" => (FloatOp::CopySign, 2),
            "rcp" => (FloatOp::Reciprocal, 1),
            "sqrt" => (FloatOp::Sqrt, 1),
            "rsqrt" => (FloatOp::ReciprocalSqrt, 1),
            "ex2" => (FloatOp::Exp2, 1),
            "lg2" => (FloatOp::Log2, 1),
            "sin" => (FloatOp::Sin, 1),
            "cos" => (FloatOp::Cos, 1),
            "tanh" => (FloatOp::Tanh, 1),
            _ => return Err(parts.unknown(parts.last())),
        })
    }
}
