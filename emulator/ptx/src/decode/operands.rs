//! Operands to register indices; immediates, special registers and addresses become constant registers.

use super::Decoder;
use super::parts::Parts;
use crate::ParseError;
use crate::instruction::{Address, AddressBase, Index, Space};
use crate::layout::Place;
use crate::special::Special;
use crate::syntax::{Base, Class, Operand, Register, StateSpace};

impl Decoder<'_> {
    fn word_constant(&mut self, value: u32) -> Index {
        *self.word_constants.entry(value).or_insert_with(|| {
            self.words += 1;
            self.words - 1
        })
    }

    fn double_constant(&mut self, value: u64) -> Index {
        *self.double_constants.entry(value).or_insert_with(|| {
            self.doubles += 1;
            self.doubles - 1
        })
    }

    pub(super) fn constant(&mut self, class: Class, value: u64) -> Index {
        if class == Class::Double { self.double_constant(value) } else { self.word_constant(value as u32) }
    }

    /// A register whose value nobody reads, for results that are dropped.
    fn scratch(&mut self, class: Class) -> Index {
        if let Some(&(_, index)) = self.scratch.iter().find(|(found, _)| *found == class) {
            return index;
        }
        let file = match class {
            Class::Predicate => &mut self.predicates,
            Class::Half | Class::Word => &mut self.words,
            Class::Double => &mut self.doubles,
        };
        *file += 1;
        let index = *file - 1;
        self.scratch.push((class, index));
        index
    }

    fn relocation(&mut self, variable: usize, offset: i64) -> Index {
        *self.relocations.entry((variable, offset)).or_insert_with(|| {
            self.doubles += 1;
            self.doubles - 1
        })
    }

    fn special(&mut self, parts: &Parts<'_>, name: &str) -> Result<Index, ParseError> {
        let special =
            Special::named(name).ok_or_else(|| parts.operands(&format!("the special register `{name}` is unknown")))?;
        Ok(*self.specials.entry(special).or_insert_with(|| {
            self.words += 1;
            self.words - 1
        }))
    }

    pub(super) fn read(&mut self, register: Register) -> Index {
        self.sources.push(register);
        register.index
    }

    /// A source of the given class.
    pub(super) fn source(&mut self, parts: &Parts<'_>, class: Class, operand: &Operand) -> Result<Index, ParseError> {
        match operand {
            Operand::Register(register) if register.class == class => Ok(self.read(*register)),
            Operand::Register(_) => Err(parts.operands("a register of another width than the type")),
            Operand::Special(name) if class == Class::Word => self.special(parts, name),
            Operand::Symbol(name, offset) if class == Class::Word || class == Class::Double => {
                match self.place(parts, name)? {
                    Place::Fixed { address, .. } => {
                        let address = address.wrapping_add_signed(*offset);
                        Ok(self.constant(class, address))
                    }
                    Place::Global { variable } if class == Class::Double => Ok(self.relocation(variable, *offset)),
                    Place::Global { .. } => Err(parts.operands("a global address in 32 bits")),
                }
            }
            _ => {
                let value = immediate(class, operand).ok_or_else(|| parts.operands("an operand that does not fit"))?;
                Ok(self.constant(class, value))
            }
        }
    }

    pub(super) fn predicate(&mut self, parts: &Parts<'_>, operand: &Operand) -> Result<Index, ParseError> {
        match operand {
            Operand::Register(register) if register.class == Class::Predicate => Ok(self.read(*register)),
            Operand::Integer(value) => Ok(*self.predicate_constants.entry(*value != 0).or_insert_with(|| {
                self.predicates += 1;
                self.predicates - 1
            })),
            _ => Err(parts.operands("a predicate is due")),
        }
    }

    /// A predicate, possibly negated.
    pub(super) fn signed_predicate(
        &mut self,
        parts: &Parts<'_>,
        operand: &Operand,
    ) -> Result<(Index, bool), ParseError> {
        match operand {
            Operand::Not(register) => Ok((self.read(*register), true)),
            _ => Ok((self.predicate(parts, operand)?, false)),
        }
    }

    pub(super) fn write(&mut self, register: Register) -> Index {
        self.results.push(register);
        register.index
    }

    pub(super) fn result(&mut self, parts: &Parts<'_>, class: Class, operand: &Operand) -> Result<Index, ParseError> {
        match operand {
            Operand::Register(register) if register.class == class => Ok(self.write(*register)),
            Operand::Sink => Ok(self.scratch(class)),
            Operand::Register(_) => Err(parts.operands("a result register of another width than the type")),
            _ => Err(parts.operands("a result register is due")),
        }
    }

    /// `d|p`, or `d` alone.
    pub(super) fn result_pair(
        &mut self,
        parts: &Parts<'_>,
        class: Class,
        operand: &Operand,
    ) -> Result<(Index, Option<Index>), ParseError> {
        let Operand::Pair(first, second) = operand else {
            return Ok((self.result(parts, class, operand)?, None));
        };
        let first = first.map_or(Operand::Sink, Operand::Register);
        let d = self.result(parts, class, &first)?;
        let p = match second {
            Some(register) => Some(self.result(parts, Class::Predicate, &Operand::Register(*register))?),
            None => None,
        };
        Ok((d, p))
    }

    /// An address operand in the given space.
    pub(super) fn address(
        &mut self,
        parts: &Parts<'_>,
        space: Space,
        operand: &Operand,
    ) -> Result<Address, ParseError> {
        let (base, offset) = match operand {
            Operand::Address(base, offset) => (base, *offset),
            _ => return Err(parts.operands("an address in brackets is due")),
        };
        let (base, offset) = match base {
            Base::Absolute => (AddressBase::None, offset),
            Base::Register(register) if register.class == Class::Double => {
                (AddressBase::Double(self.read(*register)), offset)
            }
            Base::Register(register) => (AddressBase::Word(self.read(*register)), offset),
            Base::Symbol(name) => match self.place(parts, name)? {
                Place::Global { variable } => (AddressBase::Double(self.relocation(variable, 0)), offset),
                Place::Fixed { space: at, address } => {
                    let fits = match space {
                        Space::Parameter => at == StateSpace::Parameter,
                        Space::Constant => at == StateSpace::Constant,
                        Space::Shared => at == StateSpace::Shared,
                        Space::Local => at == StateSpace::Local,
                        Space::Global | Space::Generic => false,
                    };
                    if !fits {
                        return Err(parts.operands(&format!("`{name}` lies in another state space")));
                    }
                    (AddressBase::None, address.wrapping_add_signed(offset).cast_signed())
                }
            },
        };
        Ok(Address { space, base, offset })
    }
}

/// Bits of an immediate for a register class, or `None` where it does not fit.
fn immediate(class: Class, operand: &Operand) -> Option<u64> {
    match (operand, class) {
        (Operand::Integer(value), Class::Double) => Some(*value),
        (Operand::Integer(value), Class::Word) => {
            let fits = u32::try_from(*value).is_ok() || i32::try_from(value.cast_signed()).is_ok();
            fits.then_some(*value & 0xFFFF_FFFF)
        }
        (Operand::Integer(value), Class::Half) => {
            let fits = u16::try_from(*value).is_ok() || i16::try_from(value.cast_signed()).is_ok();
            fits.then_some(*value & 0xFFFF)
        }
        (Operand::Float32(bits), Class::Word) => Some(u64::from(*bits)),
        (Operand::Float32(bits), Class::Double) => Some(f64::from(f32::from_bits(*bits)).to_bits()),
        (Operand::Float64(bits), Class::Double) => Some(*bits),
        (Operand::Float64(bits), Class::Word) => Some(u64::from((f64::from_bits(*bits) as f32).to_bits())),
        _ => None,
    }
}
