//! One warp: its lanes in groups of equal program counter.
//!
//! Divergence follows a min-PC scheme: of the groups that can go on, the one with the lowest program counter runs, and
//! groups that meet become one. Loops and branches re-converge at the end of their text with no analysis of the control
//! flow, and a layout in which they do not only costs speed: a `.sync` instruction makes its group wait for the lanes of
//! its mask, as the hardware does since Volta. Lanes that cannot come any more (they have left, or everybody waits)
//! are a fault. An immediate post-dominator stack would need the control flow graph, and would report such lanes where
//! an early return has moved the post-dominator to the end of the kernel.

use crate::block::reduced;
use crate::execute::Env;
use crate::execute::copies::Copies;
use crate::execute::local::Local;
use crate::fault::{FaultKind, Stop};
use crate::instruction::{BarrierKind, BarrierReduce, Guard, Op};
use crate::launch::Prepared;
use crate::registers::Registers;
use crate::special::Position;

#[derive(Clone, Copy, Debug)]
struct Group {
    pc: u32,
    lanes: u32,
    /// Waits at a `.sync` instruction for lanes of other groups.
    parked: bool,
}

/// A warp that has come to a barrier.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Arrival {
    pub(crate) id: u32,
    pub(crate) threads: Option<u32>,
    pub(crate) kind: BarrierKind,
    pub(crate) lanes: u32,
    pub(crate) predicate: u32,
    pub(crate) lane: u32,
}

/// Why a warp stopped running.
pub(crate) enum Outcome {
    Exited,
    Waits,
    /// `bar.arrive`: the warp goes on.
    Arrived(Arrival),
}

#[derive(Debug)]
pub(crate) struct Warp {
    pub(crate) index: u32,
    pub(crate) registers: Registers,
    pub(crate) copies: Copies,
    pub(crate) local: Local,
    /// Lanes that the block has, and those that have not left.
    exists: u32,
    alive: u32,
    pub(crate) pc: u32,
    pub(crate) active: u32,
    others: Vec<Group>,
    /// Lowest program counter of the other groups.
    limit: u32,
    waiting: Option<Arrival>,
}

impl Warp {
    pub(crate) fn new(prepared: &Prepared<'_>, index: u32) -> Self {
        let lanes = (prepared.threads - 32 * index).min(32);
        let exists = if lanes == 32 { u32::MAX } else { (1 << lanes) - 1 };
        let mut registers = prepared.registers.clone();
        for &(register, special) in &prepared.kernel.code.specials {
            for lane in 0..32 {
                let position = position(prepared, [0; 3], index, lane);
                registers.words[register as usize][lane as usize] = special.value(&position);
            }
        }
        Self {
            index,
            registers,
            copies: Copies::default(),
            local: Local::new(prepared.kernel.local_bytes),
            exists,
            alive: exists,
            pc: 0,
            active: exists,
            others: Vec::new(),
            limit: u32::MAX,
            waiting: None,
        }
    }

    /// Back to the first instruction, in another block.
    pub(crate) fn start(&mut self, prepared: &Prepared<'_>, block: [u32; 3]) {
        let position = position(prepared, block, self.index, 0);
        for &(register, special) in prepared.kernel.code.specials.iter().filter(|(_, special)| special.of_block()) {
            self.registers.words[register as usize] = [special.value(&position); 32];
        }
        self.registers.defined.fill(0);
        self.copies.clear();
        self.local.clear();
        self.alive = self.exists;
        self.pc = 0;
        self.active = self.exists;
        self.others.clear();
        self.limit = u32::MAX;
        self.waiting = None;
    }

    pub(crate) fn exited(&self) -> bool {
        self.alive == 0
    }

    pub(crate) fn runnable(&self) -> bool {
        self.alive != 0 && self.waiting.is_none()
    }

    pub(crate) fn waits_at(&self) -> Option<Arrival> {
        self.waiting
    }

    /// In words, for the fault of a barrier that never completes.
    pub(crate) fn state(&self) -> String {
        match self.waiting {
            Some(arrival) => format!("{} at barrier {}", self.index, arrival.id),
            None => format!("{} has left", self.index),
        }
    }

    /// Line and text of the current instruction.
    pub(crate) fn statement(&self, prepared: &Prepared<'_>) -> (u32, String) {
        let code = &prepared.kernel.code;
        let statement = code.instructions.get(self.pc as usize).map_or(0, |i| i.statement as usize);
        code.statements.get(statement).cloned().unwrap_or_default()
    }

    /// The barrier is complete.
    pub(crate) fn release(&mut self, votes: (u32, u32)) {
        let Some(arrival) = self.waiting.take() else { return };
        if let Some((op, d, value)) = reduced(arrival.kind, votes) {
            let lanes = self.active;
            if op == BarrierReduce::Population {
                for lane in 0..32 {
                    if lanes >> lane & 1 == 1 {
                        self.registers.words[d as usize][lane] = value;
                    }
                }
            } else {
                self.registers.set_predicate(d, if value == 1 { lanes } else { 0 }, lanes);
            }
        }
        self.advance();
    }

    fn advance(&mut self) {
        self.pc += 1;
        if self.pc >= self.limit {
            self.merge();
        }
    }

    fn find_limit(&mut self) {
        self.limit = self.others.iter().map(|group| group.pc).min().unwrap_or(u32::MAX);
    }

    /// Joins the other groups at this program counter; then the lowest group that is not parked runs.
    fn merge(&mut self) {
        let pc = self.pc;
        let mut joined = self.active;
        self.others.retain(|group| {
            let same = group.pc == pc;
            joined |= if same { group.lanes } else { 0 };
            !same
        });
        self.active = joined;
        let lowest = self.others.iter().enumerate().filter(|(_, g)| !g.parked).min_by_key(|(_, g)| g.pc);
        if let Some((at, &group)) = lowest
            && (group.pc < self.pc || self.active == 0)
        {
            let mine = Group { pc: self.pc, lanes: self.active, parked: false };
            if self.active == 0 {
                self.others.swap_remove(at);
            } else {
                self.others[at] = mine;
            }
            self.pc = group.pc;
            self.active = group.lanes;
            // The group may itself meet parked ones.
            let meets = self.others.iter().any(|other| other.pc == self.pc);
            if meets {
                self.merge();
                return;
            }
        }
        self.find_limit();
    }

    /// After a branch: `lanes` of the active ones go to `target`, the others on.
    fn branch(&mut self, target: u32, lanes: u32) {
        if lanes == self.active {
            self.pc = target;
        } else {
            if lanes != 0 {
                self.others.push(Group { pc: target, lanes, parked: false });
                self.active &= !lanes;
            }
            self.pc += 1;
        }
        self.merge();
    }

    /// Whether all of `required` are here; else this group waits and another runs.
    fn gather(&mut self, required: u32) -> Result<bool, Box<Stop>> {
        let missing = required & !self.active;
        if missing == 0 {
            return Ok(true);
        }
        let lane = self.active.trailing_zeros();
        if missing & !self.alive != 0 {
            return Err(Stop::new(lane, FaultKind::PartialWarp { missing: missing & !self.alive }));
        }
        let (pc, lanes) = (self.pc, self.active);
        let runnable = self.others.iter().filter(|g| !g.parked).min_by_key(|g| g.pc).map(|g| g.pc);
        let Some(next) = runnable else {
            return Err(Stop::new(lane, FaultKind::PartialWarp { missing }));
        };
        self.others.push(Group { pc, lanes, parked: true });
        self.active = 0;
        self.pc = next;
        self.merge();
        Ok(false)
    }

    fn exit(&mut self, lanes: u32) {
        self.alive &= !lanes;
        self.active &= !lanes;
        self.pc += 1;
        self.merge();
    }

    #[inline]
    fn mask(&self, guard: Option<Guard>) -> Result<u32, Box<Stop>> {
        let Some(guard) = guard else { return Ok(self.active) };
        let unknown = self.active & !self.registers.defined[guard.predicate as usize];
        if unknown != 0 {
            return Err(Stop::new(unknown.trailing_zeros(), FaultKind::UndefinedValue));
        }
        let value = self.registers.predicates[guard.predicate as usize];
        Ok(self.active & if guard.negated { !value } else { value })
    }

    /// Runs until the warp leaves or comes to a barrier.
    pub(crate) fn run(&mut self, env: &mut Env<'_, '_>) -> Result<Outcome, Box<Stop>> {
        let code = &*env.prepared.kernel.code;
        let budget = env.prepared.limits.warp_instructions_per_block;
        loop {
            if self.active == 0 {
                if self.alive == 0 {
                    return Ok(Outcome::Exited);
                }
                self.wake();
            }
            let instruction = &code.instructions[self.pc as usize];
            let mask = self.mask(instruction.guard)?;
            if env.statistics.warp_instructions >= budget {
                let kind = FaultKind::BudgetExhausted { warp_instructions: budget };
                return Err(Stop::new(self.active.trailing_zeros(), kind));
            }
            env.statistics.warp_instructions += 1;
            env.statistics.thread_instructions += u64::from(self.active.count_ones());
            match &instruction.op {
                Op::Branch { target } => {
                    self.branch(*target, mask);
                    continue;
                }
                Op::Exit => {
                    self.exit(mask);
                    continue;
                }
                op if needs_warp(op) => {
                    if mask == 0 {
                        self.advance();
                        continue;
                    }
                    // Lanes that the guard excludes go on by themselves.
                    if mask != self.active {
                        self.others.push(Group { pc: self.pc + 1, lanes: self.active & !mask, parked: false });
                        self.active = mask;
                        self.find_limit();
                    }
                    if !self.gather(self.required(op)?)? {
                        continue;
                    }
                }
                _ => {}
            }
            let mask = if needs_warp(&instruction.op) { self.active } else { mask };
            let defined = self.defined(env, instruction, mask)?;
            match &instruction.op {
                Op::BranchTable { index, targets } => {
                    self.branch_table(*index, targets, mask)?;
                    continue;
                }
                Op::Barrier(barrier) => {
                    let arrival = self.arrive(barrier, mask)?;
                    if let Op::Barrier(crate::instruction::Barrier { kind: BarrierKind::Arrive, .. }) = instruction.op {
                        self.advance();
                        return Ok(Outcome::Arrived(arrival));
                    }
                    self.define(env, instruction, mask, defined);
                    self.waiting = Some(arrival);
                    return Ok(Outcome::Waits);
                }
                op => {
                    if mask != 0 {
                        let defined = self.execute(env, op, mask, defined)?;
                        self.define(env, instruction, mask, defined);
                    }
                }
            }
            self.advance();
        }
    }

    /// Nobody can run, but some wait at `.sync` instructions: the lowest of them looks again, since lanes may have left.
    fn wake(&mut self) {
        let lowest = self.others.iter().enumerate().min_by_key(|(_, group)| group.pc);
        if let Some((at, &group)) = lowest {
            self.others.swap_remove(at);
            self.pc = group.pc;
            self.active = group.lanes;
            self.find_limit();
        }
    }

    /// Lanes that have to come to a `.sync` instruction.
    fn required(&self, op: &Op) -> Result<u32, Box<Stop>> {
        let members = match op {
            Op::Shuffle { s, .. } => s[3],
            Op::Vote { members, .. } | Op::Match { members, .. } | Op::Reduce { members, .. } => *members,
            Op::WarpBarrier { members } => *members,
            // Barriers count whole warps; lanes that have left count as arrived.
            Op::Barrier(_) => return Ok(self.alive),
            // `.aligned`: all 32 lanes.
            _ => return Ok(u32::MAX),
        };
        let mut required = 0;
        for lane in 0..32 {
            if self.active >> lane & 1 == 1 {
                let members = self.registers.words[members as usize][lane as usize];
                if members >> lane & 1 == 0 {
                    return Err(Stop::new(lane, FaultKind::NotAMember { members }));
                }
                required |= members;
            }
        }
        Ok(required)
    }

    /// Lanes of `mask` whose sources are all defined.
    #[inline]
    fn defined(
        &self,
        env: &Env<'_, '_>,
        instruction: &crate::instruction::Instruction,
        mask: u32,
    ) -> Result<u32, Box<Stop>> {
        let (from, to) = instruction.sources;
        let slots = &env.prepared.kernel.code.slots[from as usize..to as usize];
        let defined = slots.iter().fold(mask, |defined, &slot| defined & self.registers.defined[slot as usize]);
        if instruction.strict && defined != mask {
            return Err(Stop::new((mask & !defined).trailing_zeros(), FaultKind::UndefinedValue));
        }
        Ok(defined)
    }

    #[inline]
    fn define(&mut self, env: &Env<'_, '_>, instruction: &crate::instruction::Instruction, mask: u32, defined: u32) {
        let (from, to) = instruction.results;
        for &slot in &env.prepared.kernel.code.slots[from as usize..to as usize] {
            let known = &mut self.registers.defined[slot as usize];
            *known = (*known & !mask) | (defined & mask);
        }
    }

    fn branch_table(&mut self, index: u32, targets: &[u32], mask: u32) -> Result<(), Box<Stop>> {
        let rest = self.active & !mask;
        if rest != 0 {
            self.others.push(Group { pc: self.pc + 1, lanes: rest, parked: false });
        }
        for lane in 0..32 {
            if mask >> lane & 1 == 1 {
                let index = self.registers.words[index as usize][lane as usize];
                let Some(&pc) = targets.get(index as usize) else {
                    return Err(Stop::new(lane, FaultKind::BranchIndex { index }));
                };
                match self.others.iter_mut().find(|group| group.pc == pc && !group.parked) {
                    Some(group) => group.lanes |= 1 << lane,
                    None => self.others.push(Group { pc, lanes: 1 << lane, parked: false }),
                }
            }
        }
        self.active = 0;
        self.merge();
        Ok(())
    }

    fn arrive(&self, barrier: &crate::instruction::Barrier, mask: u32) -> Result<Arrival, Box<Stop>> {
        let lane = mask.trailing_zeros();
        let uniform = |index: u32| {
            let values = &self.registers.words[index as usize];
            let value = values[lane as usize];
            let same = (0..32).all(|l| mask >> l & 1 == 0 || values[l] == value);
            if same {
                return Ok(value);
            }
            let what = "lanes of a warp give different operands".to_owned();
            Err(Stop::new(lane, FaultKind::Barrier { id: value, what }))
        };
        let id = uniform(barrier.id)?;
        let threads = match barrier.threads {
            Some(threads) => Some(uniform(threads)?),
            None => None,
        };
        let wrong = |what: String| Err(Stop::new(lane, FaultKind::Barrier { id, what }));
        if id >= 16 {
            return wrong("there are 16 barriers".to_owned());
        }
        if let Some(threads) = threads
            && (threads == 0 || !threads.is_multiple_of(32))
        {
            return wrong(format!("{threads} threads are no whole warps"));
        }
        let predicate = match barrier.kind {
            BarrierKind::Reduce { predicate, negated, .. } => {
                let value = self.registers.predicates[predicate as usize];
                mask & if negated { !value } else { value }
            }
            _ => 0,
        };
        Ok(Arrival { id, threads, kind: barrier.kind, lanes: mask, predicate, lane })
    }
}

fn needs_warp(op: &Op) -> bool {
    matches!(
        op,
        Op::Shuffle { .. }
            | Op::Vote { .. }
            | Op::Match { .. }
            | Op::Reduce { .. }
            | Op::WarpBarrier { .. }
            | Op::Barrier(_)
            | Op::LoadMatrix { .. }
            | Op::Mma(_)
    )
}

fn position(prepared: &Prepared<'_>, block: [u32; 3], warp: u32, lane: u32) -> Position {
    let [x, y, _] = prepared.block;
    let linear = 32 * warp + lane;
    Position {
        thread: [linear % x, linear / x % y, linear / x / y],
        block_size: prepared.block,
        block,
        grid_size: prepared.grid,
        lane,
        warp,
        warps: prepared.threads.div_ceil(32),
        dynamic_shared_bytes: prepared.dynamic_shared_bytes,
    }
}
