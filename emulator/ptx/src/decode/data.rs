//! Decoding of moves, conversions, comparisons and selections.

use super::parts::Parts;
use super::{Decoder, exactly};
use crate::ParseError;
use crate::instruction::{Combine, Compare, FloatMode, Index, Logic, Op, Rounding, Space, Type};
use crate::syntax::{Class, Operand};

/// First target with bf16 conversions other than those from f32.
const BF16_CONVERSIONS: u32 = 90;

impl Decoder<'_> {
    pub(super) fn mov(&mut self, parts: &mut Parts<'_>, operands: &[Operand]) -> Result<Op, ParseError> {
        let class = parts.class()?;
        let [d, a] = exactly(parts, operands)?;
        match (d, a) {
            (Operand::Vector(into), _) => self.unpack(parts, class, into, a),
            (_, Operand::Vector(from)) => self.pack(parts, class, d, from),
            (_, Operand::Special(name)) if name == "%clock" && class == Class::Word => {
                Ok(Op::Clock { double: false, d: self.result(parts, class, d)? })
            }
            (_, Operand::Special(name)) if name == "%clock64" && class == Class::Double => {
                Ok(Op::Clock { double: true, d: self.result(parts, class, d)? })
            }
            _ if class == Class::Predicate => {
                let a = self.predicate(parts, a)?;
                Ok(Op::MovePredicate { a, d: self.result(parts, class, d)? })
            }
            _ => {
                let a = self.source(parts, class, a)?;
                let d = self.result(parts, class, d)?;
                Ok(if class == Class::Double { Op::Move64 { d, a } } else { Op::Move32 { d, a } })
            }
        }
    }

    fn part_class(parts: &Parts<'_>, class: Class, count: usize) -> Result<(Class, u32), ParseError> {
        match (class, count) {
            (Class::Word, 2) | (Class::Double, 4) => Ok((Class::Half, 16)),
            (Class::Double, 2) => Ok((Class::Word, 32)),
            _ => Err(parts.operands("a vector of another length than the type needs")),
        }
    }

    fn pack(&mut self, parts: &Parts<'_>, class: Class, d: &Operand, from: &[Operand]) -> Result<Op, ParseError> {
        let (part, bits) = Self::part_class(parts, class, from.len())?;
        let sources: Result<Vec<Index>, ParseError> = from.iter().map(|o| self.source(parts, part, o)).collect();
        let d = self.result(parts, class, d)?;
        Ok(Op::Pack { d, double: class == Class::Double, bits, parts: sources? })
    }

    fn unpack(&mut self, parts: &Parts<'_>, class: Class, into: &[Operand], a: &Operand) -> Result<Op, ParseError> {
        let (part, bits) = Self::part_class(parts, class, into.len())?;
        let a = self.source(parts, class, a)?;
        let results: Result<Vec<Index>, ParseError> = into.iter().map(|o| self.result(parts, part, o)).collect();
        Ok(Op::Unpack { a, double: class == Class::Double, bits, parts: results? })
    }

    pub(super) fn convert(&mut self, parts: &mut Parts<'_>, operands: &[Operand]) -> Result<Op, ParseError> {
        let rounding = parts.take_any(&["rn", "rz", "rm", "rp", "rna", "rni", "rzi", "rmi", "rpi"]);
        let integral = rounding.is_some_and(|r| r.ends_with('i'));
        let mode = FloatMode {
            rounding: match rounding {
                Some("rz" | "rzi") => Rounding::Zero,
                Some("rm" | "rmi") => Rounding::Down,
                Some("rp" | "rpi") => Rounding::Up,
                Some("rna") => Rounding::Away,
                _ => Rounding::Nearest,
            },
            ftz: parts.take("ftz"),
            saturate: parts.take("sat"),
        };
        let relu = parts.take("relu");
        if let Some(packed) = parts.take_any(&["f16x2", "bf16x2"]) {
            return self.convert_pair(parts, operands, packed == "bf16x2", mode, relu);
        }
        if relu {
            return Err(parts.unknown("relu"));
        }
        if parts.take("tf32") {
            return self.convert_tf32(parts, operands, rounding);
        }
        if rounding == Some("rna") {
            return Err(parts.unknown("rna"));
        }
        let (to, from) = (parts.value_type()?, parts.value_type()?);
        let [d, a] = exactly(parts, operands)?;
        self.check_rounding(parts, to, from, rounding)?;
        let (a, double_source) = match a {
            Operand::Register(register) => {
                fits(parts, register.class, from)?;
                (self.read(*register), register.class == Class::Double)
            }
            _ => (self.source(parts, from.class(), a)?, from.class() == Class::Double),
        };
        let (d, double_result) = match d {
            Operand::Register(register) => {
                fits(parts, register.class, to)?;
                (self.write(*register), register.class == Class::Double)
            }
            _ => (self.result(parts, to.class(), d)?, to.class() == Class::Double),
        };
        Ok(Op::Convert { to, from, mode, integral, d, a, double_source, double_result })
    }

    fn check_rounding(&self, parts: &Parts<'_>, to: Type, from: Type, given: Option<&str>) -> Result<(), ParseError> {
        let bf16 = to == Type::Bf16 || from == Type::Bf16;
        if bf16 && self.target < BF16_CONVERSIONS && !(to == Type::Bf16 && from == Type::F32) {
            return Err(parts.operands("this bf16 conversion needs the target sm_90"));
        }
        let integral = given.is_some_and(|r| r.ends_with('i'));
        match (to.is_float(), from.is_float()) {
            (false, true) if !integral => Err(parts.operands("a rounding to an integer (`.rzi`, ...) is due")),
            (true, false) if given.is_none() || integral => Err(parts.operands("a rounding (`.rn`, ...) is due")),
            (true, true) if to.class().bytes() < from.class().bytes() && given.is_none() => {
                Err(parts.operands("a rounding (`.rn`, ...) is due"))
            }
            (false, false) if given.is_some() => Err(parts.operands("a rounding between integers")),
            _ => Ok(()),
        }
    }

    fn convert_pair(
        &mut self,
        parts: &mut Parts<'_>,
        operands: &[Operand],
        bf16: bool,
        mode: FloatMode,
        relu: bool,
    ) -> Result<Op, ParseError> {
        if !parts.take("f32")
            || !matches!(mode.rounding, Rounding::Nearest | Rounding::Zero)
            || mode.saturate
            || mode.ftz
        {
            return Err(parts.unknown(parts.last()));
        }
        let [d, a, b] = exactly(parts, operands)?;
        let (a, b) = (self.source(parts, Class::Word, a)?, self.source(parts, Class::Word, b)?);
        let d = self.result(parts, Class::Word, d)?;
        Ok(Op::ConvertPair { bf16, rounding: mode.rounding, relu, d, a, b })
    }

    fn convert_tf32(
        &mut self,
        parts: &mut Parts<'_>,
        operands: &[Operand],
        rounding: Option<&str>,
    ) -> Result<Op, ParseError> {
        let rounding = match rounding {
            Some("rna") => Rounding::Away,
            Some("rn") if self.target >= BF16_CONVERSIONS => Rounding::Nearest,
            Some("rz") if self.target >= BF16_CONVERSIONS => Rounding::Zero,
            _ => return Err(parts.unknown(parts.last())),
        };
        if !parts.take("f32") {
            return Err(parts.unknown(parts.last()));
        }
        let [d, a] = exactly(parts, operands)?;
        let a = self.source(parts, Class::Word, a)?;
        Ok(Op::ConvertTf32 { rounding, a, d: self.result(parts, Class::Word, d)? })
    }

    pub(super) fn between_spaces(&mut self, parts: &mut Parts<'_>, operands: &[Operand]) -> Result<Op, ParseError> {
        let to = parts.take("to");
        let space =
            match parts.take_any(&["global", "shared", "shared::cta", "local", "const", "param", "param::entry"]) {
                Some("global") => Space::Global,
                Some("shared" | "shared::cta") => Space::Shared,
                Some("local") => Space::Local,
                Some("const") => Space::Constant,
                Some(_) => Space::Parameter,
                None => return Err(parts.operands("a state space is due")),
            };
        if !parts.take("u64") {
            return Err(parts.unknown(parts.last()));
        }
        let [d, a] = exactly(parts, operands)?;
        let a = self.source(parts, Class::Double, a)?;
        let d = self.result(parts, Class::Double, d)?;
        Ok(if space == Space::Global { Op::Move64 { d, a } } else { Op::ToSpace { space, to, d, a } })
    }

    pub(super) fn select(&mut self, parts: &mut Parts<'_>, operands: &[Operand]) -> Result<Op, ParseError> {
        let class = parts.class()?;
        if class == Class::Predicate {
            return Err(parts.unknown("pred"));
        }
        let [d, a, b, p] = exactly(parts, operands)?;
        let (a, b) = (self.source(parts, class, a)?, self.source(parts, class, b)?);
        let p = self.predicate(parts, p)?;
        Ok(Op::Select { double: class == Class::Double, a, b, p, d: self.result(parts, class, d)? })
    }

    pub(super) fn select_sign(&mut self, parts: &mut Parts<'_>, operands: &[Operand]) -> Result<Op, ParseError> {
        let ftz = parts.take("ftz");
        let class = parts.class()?;
        let float = match parts.take_any(&["s32", "f32"]) {
            Some(name) => name == "f32",
            None => return Err(parts.unknown(parts.last())),
        };
        if ftz && !float {
            return Err(parts.unknown("ftz"));
        }
        let [d, a, b, c] = exactly(parts, operands)?;
        let (a, b) = (self.source(parts, class, a)?, self.source(parts, class, b)?);
        let c = self.source(parts, Class::Word, c)?;
        let d = self.result(parts, class, d)?;
        Ok(Op::SelectSign { double: class == Class::Double, float, ftz, d, a, b, c })
    }

    pub(super) fn set_predicate(&mut self, parts: &mut Parts<'_>, operands: &[Operand]) -> Result<Op, ParseError> {
        let compare = compare(parts)?;
        let logic = parts.take_any(&["and", "or", "xor"]).map(|name| match name {
            "and" => Logic::And,
            "or" => Logic::Or,
            _ => Logic::Xor,
        });
        let ftz = parts.take("ftz");
        let ty = parts.value_type()?;
        if matches!(ty, Type::U8 | Type::S8) || (ftz && !ty.is_float()) {
            return Err(parts.unknown(parts.last()));
        }
        let unordered = !matches!(
            compare,
            Compare::Equal
                | Compare::NotEqual
                | Compare::Less
                | Compare::LessEqual
                | Compare::Greater
                | Compare::GreaterEqual
        );
        if unordered && !ty.is_float() {
            return Err(parts.operands("a comparison of floats between integers"));
        }
        let (d, a, b, c) = match operands {
            [d, a, b] if logic.is_none() => (d, a, b, None),
            [d, a, b, c] if logic.is_some() => (d, a, b, Some(c)),
            _ => return Err(parts.operands("a wrong number of operands")),
        };
        let (a, b) = (self.source(parts, ty.class(), a)?, self.source(parts, ty.class(), b)?);
        let combine = match (logic, c) {
            (Some(logic), Some(c)) => {
                let (predicate, negated) = self.signed_predicate(parts, c)?;
                Some(Combine { logic, predicate, negated })
            }
            _ => None,
        };
        let (p, q) = self.result_pair(parts, Class::Predicate, d)?;
        Ok(Op::SetPredicate { compare, ty, ftz, combine, p, q, a, b })
    }
}

/// Conversions may use registers wider than their type.
fn fits(parts: &Parts<'_>, register: Class, ty: Type) -> Result<(), ParseError> {
    let needed = ty.class().bytes();
    let exact = ty.is_float();
    if register.bytes() == needed || (!exact && register.bytes() > needed) {
        return Ok(());
    }
    Err(parts.operands("a register of another width than the type"))
}

fn compare(parts: &mut Parts<'_>) -> Result<Compare, ParseError> {
    let name = parts.take_next()?;
    Ok(match name {
        "eq" => Compare::Equal,
        "ne" => Compare::NotEqual,
        "lt" | "lo" => Compare::Less,
        "le" | "ls" => Compare::LessEqual,
        "gt" | "hi" => Compare::Greater,
        "ge" | "hs" => Compare::GreaterEqual,
        "equ" => Compare::EqualU,
        "neu" => Compare::NotEqualU,
        "ltu" => Compare::LessU,
        "leu" => Compare::LessEqualU,
        "gtu" => Compare::GreaterU,
        "geu" => Compare::GreaterEqualU,
        "num" => Compare::Ordered,
        "nan" => Compare::Unordered,
        _ => return Err(parts.unknown(name)),
    })
}
