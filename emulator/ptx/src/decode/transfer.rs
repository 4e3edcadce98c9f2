//! Decoding of loads, stores, atomics and asynchronous copies.

use super::parts::Parts;
use super::{Decoder, exactly};
use crate::ParseError;
use crate::instruction::{AtomicOp, Elements, IntegerType, Op, Space, Type};
use crate::syntax::{Class, Operand, Register};

/// Caching hints change no result.
const CACHE_HINTS: [&str; 15] = [
    "ca",
    "cg",
    "cs",
    "lu",
    "cv",
    "wb",
    "wt",
    "L1::evict_normal",
    "L1::evict_unchanged",
    "L1::evict_first",
    "L1::evict_last",
    "L1::no_allocate",
    "L2::64B",
    "L2::128B",
    "L2::256B",
];

impl Decoder<'_> {
    fn space(parts: &mut Parts<'_>) -> Space {
        let names = ["param", "param::entry", "const", "global", "shared", "shared::cta", "local"];
        match parts.take_any(&names) {
            Some("param" | "param::entry") => Space::Parameter,
            Some("const") => Space::Constant,
            Some("global") => Space::Global,
            Some("shared" | "shared::cta") => Space::Shared,
            Some("local") => Space::Local,
            _ => Space::Generic,
        }
    }

    /// Memory order and scope; whether the access is a strong one, which may meet others of its kind.
    fn order(parts: &mut Parts<'_>, orders: &[&str]) -> bool {
        let strong = parts.take_any(orders).is_some_and(|order| order != "weak");
        if strong {
            parts.take_any(&["cta", "gpu", "sys"]);
        }
        strong
    }

    pub(super) fn load_or_store(&mut self, parts: &mut Parts<'_>, operands: &[Operand]) -> Result<Op, ParseError> {
        let load = match parts.name() {
            "ld" => true,
            "st" => false,
            _ => return Err(parts.unknown_instruction()),
        };
        let orders: &[&str] = if load {
            &["weak", "volatile", "relaxed", "acquire"]
        } else {
            &["weak", "volatile", "relaxed", "release"]
        };
        let strong = Self::order(parts, orders);
        let space = Self::space(parts);
        while parts.take_any(&CACHE_HINTS).is_some() {}
        if load && space == Space::Global {
            parts.take("nc");
            while parts.take_any(&CACHE_HINTS).is_some() {}
        }
        let count = match parts.take_any(&["v2", "v4"]) {
            Some("v2") => 2,
            Some(_) => 4,
            None => 1,
        };
        let ty = parts.value_type()?;
        let (address, values) = match (load, operands) {
            (true, [values, address]) | (false, [address, values]) => (address, values),
            _ => return Err(parts.operands("two operands are due")),
        };
        if !load && matches!(space, Space::Parameter | Space::Constant) {
            return Err(parts.operands("a store to a space that is read only"));
        }
        let elements = self.elements(parts, ty, count, values, load)?;
        let address = self.address(parts, space, address)?;
        // Local variables may be copied about before they are set.
        self.strict = load || space != Space::Local;
        let signed = matches!(ty, Type::S8 | Type::S16 | Type::S32 | Type::S64);
        Ok(if load { Op::Load { address, signed, strong, elements } } else { Op::Store { address, strong, elements } })
    }

    fn elements(
        &mut self,
        parts: &Parts<'_>,
        ty: Type,
        count: u32,
        values: &Operand,
        load: bool,
    ) -> Result<Elements, ParseError> {
        let width = match ty {
            Type::U8 | Type::S8 => 1,
            _ => ty.class().bytes(),
        };
        if width * count > 16 {
            return Err(parts.operands("more than 16 bytes in one access"));
        }
        let list = match values {
            Operand::Vector(list) => list.as_slice(),
            single => std::slice::from_ref(single),
        };
        if list.len() != count as usize {
            return Err(parts.operands("a vector of another length than the type needs"));
        }
        // The registers of one access share a class, at least as wide as the type.
        let class = list.iter().find_map(|operand| match operand {
            Operand::Register(Register { class, .. }) => Some(*class),
            _ => None,
        });
        let class = class.unwrap_or(ty.class());
        let fits = if ty.is_float() { class.bytes() == width } else { class.bytes() >= width };
        if !fits {
            return Err(parts.operands("a register narrower than the type"));
        }
        let mut registers = [0; 4];
        for (index, operand) in registers.iter_mut().zip(list) {
            *index = if load { self.result(parts, class, operand)? } else { self.source(parts, class, operand)? };
        }
        Ok(Elements { width, count, registers, double: class == Class::Double, half: class == Class::Half })
    }

    pub(super) fn atomic(&mut self, parts: &mut Parts<'_>, operands: &[Operand]) -> Result<Op, ParseError> {
        parts.take_any(&["relaxed", "acquire", "release", "acq_rel"]);
        parts.take_any(&["cta", "gpu", "sys"]);
        let space = Self::space(parts);
        let name = parts.take_next()?;
        let op = match name {
            "add" => AtomicOp::Add,
            "min" => AtomicOp::Min,
            "max" => AtomicOp::Max,
            "and" => AtomicOp::And,
            "or" => AtomicOp::Or,
            "xor" => AtomicOp::Xor,
            "exch" => AtomicOp::Exchange,
            "cas" => AtomicOp::CompareExchange,
            "inc" => AtomicOp::Increment,
            "dec" => AtomicOp::Decrement,
            _ => return Err(parts.unknown(name)),
        };
        let ty = parts.integer_type()?;
        if ty.class() == Class::Half || !matches!(space, Space::Global | Space::Shared | Space::Generic) {
            return Err(parts.unknown(parts.last()));
        }
        if matches!(op, AtomicOp::Increment | AtomicOp::Decrement) && ty != IntegerType::U32 {
            return Err(parts.unknown(parts.last()));
        }
        let with_result = parts.name() == "atom";
        let (d, rest) = match operands {
            [d, rest @ ..] if with_result => (Some(d), rest),
            rest => (None, rest),
        };
        let (address, b, c) = match (op, rest) {
            (AtomicOp::CompareExchange, [address, b, c]) => (address, b, Some(c)),
            (AtomicOp::CompareExchange, _) => return Err(parts.operands("a wrong number of operands")),
            (_, [address, b]) => (address, b, None),
            _ => return Err(parts.operands("a wrong number of operands")),
        };
        self.strict = true;
        let address = self.address(parts, space, address)?;
        let b = self.source(parts, ty.class(), b)?;
        let c = match c {
            Some(c) => self.source(parts, ty.class(), c)?,
            None => b,
        };
        let d = match d {
            Some(d) => Some(self.result(parts, ty.class(), d)?),
            None => None,
        };
        Ok(Op::Atomic { address, op, ty, d, b, c })
    }

    pub(super) fn copy_async(&mut self, parts: &mut Parts<'_>, operands: &[Operand]) -> Result<Op, ParseError> {
        if !parts.take("async") {
            return Err(parts.unknown_instruction());
        }
        if parts.take("commit_group") {
            exactly::<0>(parts, operands)?;
            return Ok(Op::CommitGroup);
        }
        if parts.take("wait_all") {
            exactly::<0>(parts, operands)?;
            return Ok(Op::WaitAll);
        }
        if parts.take("wait_group") {
            return match operands {
                [Operand::Integer(pending)] => {
                    let pending = u32::try_from(*pending).map_err(|_| parts.operands("the number of groups"))?;
                    Ok(Op::WaitGroup { pending })
                }
                _ => Err(parts.operands("a number of groups is due")),
            };
        }
        let all = parts.take_any(&["ca", "cg"]) == Some("ca");
        if parts.take_any(&["shared", "shared::cta"]).is_none() || !parts.take("global") {
            return Err(parts.unknown(parts.last()));
        }
        parts.take_any(&["L2::64B", "L2::128B", "L2::256B"]);
        let (to, from, bytes, source) = match operands {
            [to, from, bytes] => (to, from, bytes, None),
            [to, from, bytes, source] => (to, from, bytes, Some(source)),
            _ => return Err(parts.operands("a wrong number of operands")),
        };
        let bytes = match bytes {
            Operand::Integer(16) => 16,
            Operand::Integer(8) if all => 8,
            Operand::Integer(4) if all => 4,
            _ => return Err(parts.operands("4, 8 or 16 bytes with `.ca`, 16 with `.cg`")),
        };
        self.strict = true;
        let to = self.address(parts, Space::Shared, to)?;
        let from = self.address(parts, Space::Global, from)?;
        let source_bytes = match source {
            Some(operand) => Some(self.source(parts, Class::Word, operand)?),
            None => None,
        };
        Ok(Op::CopyAsync { to, from, bytes, source_bytes })
    }
}
