//! Loads, stores, atomics and asynchronous copies.

use super::copies::Copy;
use super::{Env, Executed, lanes};
use crate::fault::{Access, FaultKind, Stop};
use crate::instruction::{Address, AddressBase, AtomicOp, Elements, Index, IntegerType, Space};
use crate::layout::{CONSTANT_WINDOW, LOCAL_WINDOW, PARAMETER_WINDOW, SHARED_WINDOW, START, WINDOWS_END};
use crate::shared::Actor;
use crate::warp::Warp;

impl Warp {
    #[inline]
    pub(super) fn address(&self, address: Address, lane: usize) -> u64 {
        match address.base {
            AddressBase::None => address.offset.cast_unsigned(),
            AddressBase::Word(index) => {
                u64::from(self.registers.words[index as usize][lane].wrapping_add(address.offset as u32))
            }
            AddressBase::Double(index) => {
                self.registers.doubles[index as usize][lane].wrapping_add_signed(address.offset)
            }
        }
    }

    fn thread(&self, lane: usize) -> u32 {
        32 * self.index + lane as u32
    }

    /// The bytes, and whether they are all defined.
    #[inline]
    pub(super) fn read(
        &self,
        env: &mut Env<'_, '_>,
        space: Space,
        lane: usize,
        address: u64,
        bytes: u32,
        strong: bool,
    ) -> Result<(u128, bool), FaultKind> {
        let value = match space {
            Space::Global => env.prepared.global.read(address, bytes, env.block, strong)?,
            Space::Shared => {
                let actor = Actor { thread: self.thread(lane), seen: &env.seen[self.index as usize] };
                env.shared.read(address, bytes, actor)?
            }
            Space::Local => return self.local.read(lane, address, bytes),
            Space::Parameter => read_only("parameter", env.prepared.parameters, address, bytes)?,
            Space::Constant => read_only("constant", env.prepared.constants, address, bytes)?,
            Space::Generic => {
                let (space, address) = resolve(address);
                return self.read(env, space, lane, address, bytes, strong);
            }
        };
        Ok((value, true))
    }

    /// Gives the lanes whose loaded values are defined.
    pub(super) fn load(
        &mut self,
        env: &mut Env<'_, '_>,
        address: Address,
        (signed, strong): (bool, bool),
        elements: &Elements,
        mask: u32,
    ) -> Executed<u32> {
        let bytes = elements.width * elements.count;
        let mut defined = 0;
        if address.base == AddressBase::None && matches!(address.space, Space::Parameter | Space::Constant) {
            let lane = mask.trailing_zeros();
            let at = self.address(address, 0);
            let (value, _) =
                self.read(env, address.space, 0, at, bytes, strong).map_err(|kind| Stop::new(lane, kind))?;
            for lane in lanes(mask) {
                self.scatter(elements, signed, lane, value);
            }
            return Ok(mask);
        }
        for lane in lanes(mask) {
            let at = self.address(address, lane);
            let (value, set) =
                self.read(env, address.space, lane, at, bytes, strong).map_err(|kind| Stop::new(lane as u32, kind))?;
            defined |= u32::from(set) << lane;
            self.scatter(elements, signed, lane, value);
        }
        Ok(defined)
    }

    #[inline]
    fn scatter(&mut self, elements: &Elements, signed: bool, lane: usize, value: u128) {
        let bits = 8 * elements.width;
        for at in 0..elements.count {
            let mut piece = (value >> (bits * at)) as u64;
            if bits < 64 {
                piece &= (1 << bits) - 1;
                if signed {
                    piece = (piece << (64 - bits)).cast_signed().wrapping_shr(64 - bits).cast_unsigned();
                }
            }
            let register = elements.registers[at as usize] as usize;
            if elements.double {
                self.registers.doubles[register][lane] = piece;
            } else {
                self.registers.words[register][lane] = piece as u32 & if elements.half { 0xFFFF } else { u32::MAX };
            }
        }
    }

    #[inline]
    fn gathered(&self, elements: &Elements, lane: usize) -> u128 {
        let bits = 8 * elements.width;
        let mut value = 0;
        for at in 0..elements.count {
            let register = elements.registers[at as usize] as usize;
            let piece = if elements.double {
                self.registers.doubles[register][lane]
            } else {
                u64::from(self.registers.words[register][lane])
            };
            let piece = if bits < 64 { piece & ((1 << bits) - 1) } else { piece };
            value |= u128::from(piece) << (bits * at);
        }
        value
    }

    pub(super) fn store(
        &mut self,
        env: &mut Env<'_, '_>,
        address: Address,
        strong: bool,
        elements: &Elements,
        mask: u32,
        defined: u32,
    ) -> Executed<()> {
        let bytes = elements.width * elements.count;
        for lane in lanes(mask) {
            let value = self.gathered(elements, lane);
            let at = self.address(address, lane);
            let (space, place) = match address.space {
                Space::Generic => resolve(at),
                space => (space, at),
            };
            let stored = match space {
                Space::Global => env.prepared.global.write(place, bytes, value, env.block, strong),
                Space::Shared => {
                    let actor = Actor { thread: self.thread(lane), seen: &env.seen[self.index as usize] };
                    let written = env.shared.write(place, bytes, value, actor);
                    match written {
                        Err(kind) if self.same_store(&kind, address, elements, at, value, mask) => Ok(()),
                        other => other,
                    }
                }
                Space::Local => self.local.write(lane, place, bytes, value, defined >> lane & 1 == 1),
                Space::Parameter | Space::Constant | Space::Generic => {
                    let detail = "the space is read only".to_owned();
                    Err(FaultKind::OutOfBounds { space: "parameter or constant", address: place, bytes, detail })
                }
            };
            stored.map_err(|kind| Stop::new(lane as u32, kind))?;
        }
        Ok(())
    }

    /// Lanes of one store instruction may write the same value to the same place.
    fn same_store(
        &self,
        kind: &FaultKind,
        address: Address,
        elements: &Elements,
        at: u64,
        value: u128,
        mask: u32,
    ) -> bool {
        let FaultKind::SharedRace { access: Access::Write, earlier: Access::Write, other, .. } = *kind else {
            return false;
        };
        let lane = (other % 32) as usize;
        other / 32 == self.index
            && mask >> lane & 1 == 1
            && self.address(address, lane) == at
            && self.gathered(elements, lane) == value
    }

    pub(super) fn atomic(
        &mut self,
        env: &mut Env<'_, '_>,
        address: Address,
        (op, ty): (AtomicOp, IntegerType),
        d: Option<Index>,
        [b, c]: [Index; 2],
        mask: u32,
    ) -> Executed<()> {
        let double = matches!(ty, IntegerType::U64 | IntegerType::S64);
        let bytes = if double { 8 } else { 4 };
        let (b, c) = (self.bits(b, double), self.bits(c, double));
        for lane in lanes(mask) {
            let at = self.address(address, lane);
            let (space, place) = match address.space {
                Space::Generic => resolve(at),
                space => (space, at),
            };
            let change = |old: u64| apply(op, ty, old, b[lane], c[lane]);
            let old = match space {
                Space::Global => env.prepared.global.update(place, bytes, env.block, change),
                Space::Shared => {
                    let actor = Actor { thread: self.thread(lane), seen: &env.seen[self.index as usize] };
                    env.shared.update(place, bytes, actor, change)
                }
                _ => {
                    let detail = "atomics work on global and shared memory".to_owned();
                    Err(FaultKind::OutOfBounds { space: "generic", address: at, bytes, detail })
                }
            };
            let old = old.map_err(|kind| Stop::new(lane as u32, kind))?;
            match d {
                Some(d) if double => self.registers.doubles[d as usize][lane] = old,
                Some(d) => self.registers.words[d as usize][lane] = old as u32,
                None => {}
            }
        }
        Ok(())
    }

    pub(super) fn copy_async(
        &mut self,
        env: &mut Env<'_, '_>,
        [to, from]: [Address; 2],
        bytes: u32,
        source_bytes: Option<Index>,
        mask: u32,
    ) -> Executed<()> {
        for lane in lanes(mask) {
            let (to, from) = (self.address(to, lane), self.address(from, lane));
            let source = source_bytes.map_or(bytes, |index| self.registers.words[index as usize][lane]);
            let started = copied(env, from, bytes, source).and_then(|value| {
                let actor = Actor { thread: self.thread(lane), seen: &env.seen[self.index as usize] };
                env.shared.start_copy(to, bytes, actor)?;
                Ok(value)
            });
            let value = started.map_err(|kind| Stop::new(lane as u32, kind))?;
            self.copies.start(lane as u32, to, bytes, value);
        }
        Ok(())
    }

    pub(super) fn wait(&mut self, env: &mut Env<'_, '_>, pending: Option<u32>, mask: u32) -> Executed<()> {
        for Copy { lane, address, bytes, value, .. } in self.copies.take(pending, mask) {
            let actor = Actor { thread: self.thread(lane as usize), seen: &env.seen[self.index as usize] };
            env.shared.arrive(address, bytes, value, actor).map_err(|kind| Stop::new(lane, kind))?;
        }
        Ok(())
    }
}

/// The bytes that an asynchronous copy brings: `source` from memory, zeros for the rest.
fn copied(env: &Env<'_, '_>, from: u64, bytes: u32, source: u32) -> Result<u128, FaultKind> {
    if source > bytes {
        return Err(FaultKind::CopySize { source_bytes: source, bytes });
    }
    // Nothing is read, so that the address may be any.
    if source == 0 {
        return Ok(0);
    }
    let global = &env.prepared.global;
    if source == bytes {
        return global.read(from, bytes, env.block, false);
    }
    if !from.is_multiple_of(u64::from(bytes)) {
        return Err(FaultKind::Misaligned { space: "global", address: from, bytes });
    }
    (0..source).try_fold(0, |value, at| {
        let byte = global.read(from + u64::from(at), 1, env.block, false)?;
        Ok(value | byte << (8 * at))
    })
}

/// State space and address there of a generic address.
fn resolve(address: u64) -> (Space, u64) {
    match address {
        _ if !(SHARED_WINDOW..WINDOWS_END).contains(&address) => (Space::Global, address),
        _ if address >= PARAMETER_WINDOW => (Space::Parameter, address - PARAMETER_WINDOW),
        _ if address >= CONSTANT_WINDOW => (Space::Constant, address - CONSTANT_WINDOW),
        _ if address >= LOCAL_WINDOW => (Space::Local, address - LOCAL_WINDOW),
        _ => (Space::Shared, address - SHARED_WINDOW),
    }
}

fn read_only(space: &'static str, image: &[u8], address: u64, bytes: u32) -> Result<u128, FaultKind> {
    if !address.is_multiple_of(u64::from(bytes)) {
        return Err(FaultKind::Misaligned { space, address, bytes });
    }
    let start = usize::try_from(address.wrapping_sub(START)).unwrap_or(usize::MAX);
    let found = start.checked_add(bytes as usize).and_then(|end| image.get(start..end));
    let Some(found) = found else {
        let detail = format!("the space lies from {START:#x} to {:#x}", START + image.len() as u64);
        return Err(FaultKind::OutOfBounds { space, address, bytes, detail });
    };
    Ok(found.iter().rev().fold(0, |value, &byte| value << 8 | u128::from(byte)))
}

fn apply(op: AtomicOp, ty: IntegerType, old: u64, b: u64, c: u64) -> u64 {
    let signed = |bits: u64| if ty == IntegerType::S32 { i64::from(bits as i32) } else { bits.cast_signed() };
    let smaller = match ty {
        IntegerType::S32 | IntegerType::S64 => signed(b) < signed(old),
        _ => b < old,
    };
    match op {
        AtomicOp::Add => old.wrapping_add(b),
        AtomicOp::Min => {
            if smaller {
                b
            } else {
                old
            }
        }
        AtomicOp::Max => {
            if smaller {
                old
            } else {
                b
            }
        }
        AtomicOp::And => old & b,
        AtomicOp::Or => old | b,
        AtomicOp::Xor => old ^ b,
        AtomicOp::Exchange => b,
        AtomicOp::CompareExchange => {
            if old == b {
                c
            } else {
                old
            }
        }
        AtomicOp::Increment => {
            if old >= b {
                0
            } else {
                old + 1
            }
        }
        AtomicOp::Decrement => {
            if old == 0 || old > b {
                b
            } else {
                old - 1
            }
        }
    }
}
