//! Decoding of matrix instructions.

use super::parts::Parts;
use super::{Decoder, exactly};
use crate::ParseError;
use crate::instruction::{Index, MatrixType, Mma, Op, Space};
use crate::syntax::{Class, Operand};

impl Decoder<'_> {
    pub(super) fn load_matrix(&mut self, parts: &mut Parts<'_>, operands: &[Operand]) -> Result<Op, ParseError> {
        if !(parts.take("sync") && parts.take("aligned") && parts.take("m8n8")) {
            return Err(parts.unknown(parts.last()));
        }
        let count = match parts.take_any(&["x1", "x2", "x4"]) {
            Some("x1") => 1,
            Some("x2") => 2,
            Some(_) => 4,
            None => return Err(parts.operands("`.x1`, `.x2` or `.x4` is due")),
        };
        let transposed = parts.take("trans");
        let space = match parts.take_any(&["shared", "shared::cta"]) {
            Some(_) => Space::Shared,
            None => Space::Generic,
        };
        if !parts.take("b16") {
            return Err(parts.unknown(parts.last()));
        }
        let [into, address] = exactly(parts, operands)?;
        self.strict = true;
        let address = self.address(parts, space, address)?;
        let mut d = [0; 4];
        self.fragment(parts, into, &mut d[..count], true)?;
        Ok(Op::LoadMatrix { address, count: count as u32, transposed, d })
    }

    fn fragment(
        &mut self,
        parts: &Parts<'_>,
        operand: &Operand,
        into: &mut [Index],
        result: bool,
    ) -> Result<(), ParseError> {
        let list = match operand {
            Operand::Vector(list) => list.as_slice(),
            single => std::slice::from_ref(single),
        };
        if list.len() != into.len() {
            return Err(parts.operands("a fragment of another length than the shape needs"));
        }
        for (index, operand) in into.iter_mut().zip(list) {
            *index = if result {
                self.result(parts, Class::Word, operand)?
            } else {
                self.source(parts, Class::Word, operand)?
            };
        }
        Ok(())
    }

    pub(super) fn mma(&mut self, parts: &mut Parts<'_>, operands: &[Operand]) -> Result<Op, ParseError> {
        if !(parts.take("sync") && parts.take("aligned")) {
            return Err(parts.unknown(parts.last()));
        }
        let shape = parts.take_next()?;
        if !(parts.take("row") && parts.take("col")) {
            return Err(parts.operands("`.row.col` is due"));
        }
        let mut types = [""; 4];
        for ty in &mut types {
            *ty = parts.take_next()?;
        }
        let input = match types {
            ["f32", "f16", "f16", "f32"] => MatrixType::F16,
            ["f32", "bf16", "bf16", "f32"] => MatrixType::Bf16,
            ["f32", "tf32", "tf32", "f32"] => MatrixType::Tf32,
            _ => return Err(parts.unknown(&types.join("."))),
        };
        let (depth, of_a, of_b) = match (shape, input) {
            ("m16n8k4", MatrixType::Tf32) => (4, 2, 1),
            ("m16n8k8", MatrixType::Tf32) => (8, 4, 2),
            ("m16n8k8", _) => (8, 2, 1),
            ("m16n8k16", MatrixType::F16 | MatrixType::Bf16) => (16, 4, 2),
            _ => return Err(parts.unknown(shape)),
        };
        let [d, a, b, c] = exactly(parts, operands)?;
        let mut mma = Mma { depth, input, d: [0; 4], a: [0; 4], b: [0; 2], c: [0; 4] };
        self.strict = true;
        self.fragment(parts, a, &mut mma.a[..of_a], false)?;
        self.fragment(parts, b, &mut mma.b[..of_b], false)?;
        self.fragment(parts, c, &mut mma.c, false)?;
        self.fragment(parts, d, &mut mma.d, true)?;
        Ok(Op::Mma(mma))
    }
}
