//! What each instruction does to a warp.

mod convert;
pub(crate) mod copies;
mod float;
mod integer;
mod lanes;
pub(crate) mod local;
mod matrix;
mod memory;

use crate::fault::{FaultKind, Stop};
use crate::instruction::{Index, Logic, Op, Space};
use crate::launch::{Prepared, Statistics};
use crate::layout::{CONSTANT_WINDOW, LOCAL_WINDOW, PARAMETER_WINDOW, SHARED_WINDOW};
use crate::registers::LANES;
use crate::shadow::Seen;
use crate::shared::Shared;
use crate::warp::Warp;

/// What a warp works on besides itself.
pub(crate) struct Env<'e, 'l> {
    pub(crate) prepared: &'e Prepared<'l>,
    pub(crate) shared: &'e mut Shared,
    pub(crate) seen: &'e mut [Seen],
    /// Linear index of the block.
    pub(crate) block: u32,
    pub(crate) statistics: &'e mut Statistics,
}

pub(crate) type Executed<T> = Result<T, Box<Stop>>;

/// The lanes of a mask, lowest first.
pub(crate) fn lanes(mask: u32) -> impl Iterator<Item = usize> {
    let mut left = mask;
    std::iter::from_fn(move || {
        let lane = left.trailing_zeros();
        left &= left.wrapping_sub(1);
        (lane < 32).then_some(lane as usize)
    })
}

impl Warp {
    /// Executes one instruction for the lanes of `mask`, of which `defined` have defined sources; gives the lanes whose
    /// results are defined.
    pub(crate) fn execute(&mut self, env: &mut Env<'_, '_>, op: &Op, mask: u32, defined: u32) -> Executed<u32> {
        let registers = &mut self.registers;
        match *op {
            Op::Move32 { d, a } => registers.map1(d, a, mask, |a: u32| a),
            Op::Move64 { d, a } => registers.map1(d, a, mask, |a: u64| a),
            Op::MovePredicate { d, a } => {
                let value = registers.predicates[a as usize];
                registers.set_predicate(d, value, mask);
            }
            Op::Pack { d, double, bits, ref parts } => self.pack(d, double, bits, parts, mask),
            Op::Unpack { a, double, bits, ref parts } => self.unpack(a, double, bits, parts, mask),
            Op::Integer { op, ty, d, s } => self.integer(op, ty, d, s, mask)?,
            Op::Wide { ty, d, a, b, c } => self.wide(ty, d, [a, b], c, mask),
            Op::Count { op, ty, d, a } => self.count(op, ty, d, a, mask),
            Op::Lop3 { table, d, s } => self.lop3(table, d, s, mask),
            Op::Permute { d, s } => self.permute(d, s, mask),
            Op::FunnelShift { left, wrap, d, s } => self.funnel_shift(left, wrap, d, s, mask),
            Op::SetPredicate { compare, ty, ftz, combine, p, q, a, b } => {
                let held = self.compare(compare, ty, ftz, a, b);
                self.combine(held, combine, p, q, mask);
            }
            Op::Select { double, d, a, b, p } => return Ok(self.select(env, double, d, [a, b], p, mask)),
            Op::SelectSign { double, float, ftz, d, a, b, c } => {
                self.select_sign(double, (float, ftz), d, [a, b, c], mask);
            }
            Op::Predicate { logic, d, a, b } => {
                let (a, b) = (registers.predicates[a as usize], registers.predicates[b as usize]);
                registers.set_predicate(d, combined(logic, a, b), mask);
            }
            Op::NotPredicate { d, a } => {
                let value = !registers.predicates[a as usize];
                registers.set_predicate(d, value, mask);
            }
            Op::Float { op, ty, mode, d, s } => self.float(op, ty, mode, d, s, mask),
            Op::Convert { to, from, mode, integral, d, a, double_source, double_result } => {
                self.convert((to, double_result), (from, double_source), mode, integral, [d, a], mask);
            }
            Op::ConvertPair { bf16, rounding, relu, d, a, b } => {
                self.convert_pair(bf16, rounding, relu, d, [a, b], mask)
            }
            Op::ConvertTf32 { rounding, d, a } => self.convert_tf32(rounding, d, a, mask),
            Op::ToSpace { space, to, d, a } => self.between_spaces(space, to, d, a, mask),
            Op::Load { address, signed, strong, elements } => {
                return self.load(env, address, (signed, strong), &elements, mask);
            }
            Op::Store { address, strong, elements } => self.store(env, address, strong, &elements, mask, defined)?,
            Op::Atomic { address, op, ty, d, b, c } => self.atomic(env, address, (op, ty), d, [b, c], mask)?,
            Op::CopyAsync { to, from, bytes, source_bytes } => {
                self.copy_async(env, [to, from], bytes, source_bytes, mask)?;
            }
            Op::CommitGroup => self.copies.commit(mask),
            Op::WaitGroup { pending } => self.wait(env, Some(pending), mask)?,
            Op::WaitAll => self.wait(env, None, mask)?,
            Op::LoadMatrix { address, count, transposed, d } => {
                self.load_matrix(env, address, count as usize, transposed, d, mask)?;
            }
            Op::Mma(ref mma) => {
                env.statistics.matrix_instructions += 1;
                self.mma(mma);
            }
            Op::Shuffle { mode, d, p, s } => return Ok(self.shuffle(env, mode, d, p, s, mask)),
            Op::Vote { mode, d, a, negated, members } => self.vote(mode, d, (a, negated), members, mask),
            Op::Match { all, double, d, p, a, members } => self.matching((all, double), d, p, [a, members], mask),
            Op::Reduce { op, signed, d, a, members } => self.reduce(op, signed, d, [a, members], mask),
            Op::ActiveMask { d } => {
                let active = self.active;
                self.registers.map1(d, d, mask, |_: u32| active);
            }
            Op::Clock { d, double: false } => {
                let now = env.statistics.warp_instructions as u32;
                registers.map1(d, d, mask, |_: u32| now);
            }
            Op::Clock { d, double: true } => {
                let now = env.statistics.warp_instructions;
                registers.map1(d, d, mask, |_: u64| now);
            }
            Op::WarpBarrier { .. } => self.warp_barrier(env),
            Op::Trap => return Err(Stop::new(mask.trailing_zeros(), FaultKind::Trap)),
            Op::Nothing => {}
            // The warp itself takes these.
            Op::Branch { .. } | Op::BranchTable { .. } | Op::Exit | Op::Barrier(_) => {}
        }
        Ok(defined)
    }

    /// Orders the memory accesses of the warp's lanes: the one warp-wide instruction that PTX says does so.
    fn warp_barrier(&mut self, env: &mut Env<'_, '_>) {
        let time = env.shared.advance();
        if time == 1 {
            let warps = env.seen.len();
            env.seen.fill(Seen::new(warps, time));
        }
        let seen = &mut env.seen[self.index as usize];
        seen.by_warp[self.index as usize] = time;
        seen.update();
    }

    fn pack(&mut self, d: Index, double: bool, bits: u32, parts: &[Index], mask: u32) {
        let low = (1u64 << bits) - 1;
        let mut packed = [0u64; LANES];
        for (at, &part) in parts.iter().enumerate() {
            let values = &self.registers.words[part as usize];
            for (into, &value) in packed.iter_mut().zip(values) {
                *into |= (u64::from(value) & low) << (bits * at as u32);
            }
        }
        self.put_bits(d, double, &packed, mask);
    }

    /// Stores the low bits of each lane.
    fn put_bits(&mut self, d: Index, double: bool, bits: &[u64; LANES], mask: u32) {
        for lane in lanes(mask) {
            if double {
                self.registers.doubles[d as usize][lane] = bits[lane];
            } else {
                self.registers.words[d as usize][lane] = bits[lane] as u32;
            }
        }
    }

    fn bits(&self, a: Index, double: bool) -> [u64; LANES] {
        if double { self.registers.doubles[a as usize] } else { self.registers.words[a as usize].map(u64::from) }
    }

    fn unpack(&mut self, a: Index, double: bool, bits: u32, parts: &[Index], mask: u32) {
        let values = self.bits(a, double);
        let low = (1u64 << bits) - 1;
        for (at, &part) in parts.iter().enumerate() {
            let shift = bits * at as u32;
            let piece = values.map(|value| value >> shift & low);
            self.put_bits(part, false, &piece, mask);
        }
    }

    /// Defined where the predicate and the chosen side are.
    fn select(&mut self, env: &Env<'_, '_>, double: bool, d: Index, [a, b]: [Index; 2], p: Index, mask: u32) -> u32 {
        let chosen = self.registers.predicates[p as usize];
        let code = &env.prepared.kernel.code;
        let first = code.predicates + if double { code.words } else { 0 };
        let known = |index: Index| {
            // Constants and special registers are no sources and always defined.
            if code.is_constant(double, index) { u32::MAX } else { self.registers.defined[(first + index) as usize] }
        };
        let defined = self.registers.defined[p as usize] & ((chosen & known(a)) | (!chosen & known(b)));
        if double {
            let (x, y) = (self.registers.doubles[a as usize], self.registers.doubles[b as usize]);
            let picked: [u64; LANES] = std::array::from_fn(|l| if chosen >> l & 1 == 1 { x[l] } else { y[l] });
            self.put_bits(d, true, &picked, mask);
        } else {
            let (x, y) = (self.registers.words[a as usize], self.registers.words[b as usize]);
            let picked: [u32; LANES] = std::array::from_fn(|l| if chosen >> l & 1 == 1 { x[l] } else { y[l] });
            crate::registers::Lane::put(&mut self.registers, d, picked, mask);
        }
        defined & mask
    }

    fn select_sign(&mut self, double: bool, (float, ftz): (bool, bool), d: Index, [a, b, c]: [Index; 3], mask: u32) {
        let signs = self.registers.words[c as usize];
        let first = signs.map(|bits| {
            if float {
                let value = f32::from_bits(bits);
                let value = if ftz { float::flush(value) } else { value };
                value >= 0.0
            } else {
                bits.cast_signed() >= 0
            }
        });
        let (x, y) = (self.bits(a, double), self.bits(b, double));
        let picked = std::array::from_fn(|l| if first[l] { x[l] } else { y[l] });
        self.put_bits(d, double, &picked, mask);
    }

    fn between_spaces(&mut self, space: Space, to: bool, d: Index, a: Index, mask: u32) {
        let window = match space {
            Space::Shared => SHARED_WINDOW,
            Space::Local => LOCAL_WINDOW,
            Space::Constant => CONSTANT_WINDOW,
            Space::Parameter => PARAMETER_WINDOW,
            Space::Global | Space::Generic => 0,
        };
        let shift = if to { window.wrapping_neg() } else { window };
        self.registers.map1(d, a, mask, |a: u64| a.wrapping_add(shift));
    }
}

fn combined(logic: Logic, a: u32, b: u32) -> u32 {
    match logic {
        Logic::And => a & b,
        Logic::Or => a | b,
        Logic::Xor => a ^ b,
    }
}
