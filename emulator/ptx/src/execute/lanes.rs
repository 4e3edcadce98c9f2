//! What lanes of a warp do together: shuffles, votes, matches, reductions.

use super::{Env, lanes};
use crate::instruction::{Index, ReduceOp, ShuffleMode, VoteMode};
use crate::registers::LANES;
use crate::warp::Warp;

impl Warp {
    /// `s`: value, lane operand, clamp and segment mask, members. Gives the lanes whose result is defined: those whose
    /// source lane takes part and has a defined value.
    pub(super) fn shuffle(
        &mut self,
        env: &Env<'_, '_>,
        mode: ShuffleMode,
        d: Index,
        p: Option<Index>,
        s: [Index; 4],
        mask: u32,
    ) -> u32 {
        let words = &self.registers.words;
        let [values, by, clamp, members] = s.map(|index| words[index as usize]);
        let code = &env.prepared.kernel.code;
        let known = if code.is_constant(false, s[0]) {
            u32::MAX
        } else {
            self.registers.defined[(code.predicates + s[0]) as usize]
        };
        let (mut result, mut inside, mut defined) = (values, 0u32, 0u32);
        for lane in lanes(mask) {
            let (by, limit, segment) = (by[lane] & 31, clamp[lane] & 31, clamp[lane] >> 8 & 31);
            let own = lane as u32;
            let last = own & segment | limit & !segment;
            let first = own & segment;
            let (source, valid) = match mode {
                ShuffleMode::Up => (own.wrapping_sub(by), own.cast_signed() - by.cast_signed() >= last.cast_signed()),
                ShuffleMode::Down => (own + by, own + by <= last),
                ShuffleMode::Butterfly => (own ^ by, own ^ by <= last),
                ShuffleMode::Index => {
                    let source = first | by & !segment;
                    (source, source <= last)
                }
            };
            let source = if valid { source & 31 } else { own };
            result[lane] = values[source as usize];
            inside |= u32::from(valid) << lane;
            let takes_part = mask & members[lane] & known;
            defined |= (takes_part >> source & 1) << lane;
        }
        self.put_bits(d, false, &result.map(u64::from), mask);
        if let Some(p) = p {
            self.registers.set_predicate(p, inside, mask);
        }
        defined
    }

    pub(super) fn vote(&mut self, mode: VoteMode, d: Index, (a, negated): (Index, bool), members: Index, mask: u32) {
        let votes = self.registers.predicates[a as usize];
        let votes = if negated { !votes } else { votes };
        let members = self.registers.words[members as usize];
        let (mut counted, mut held) = ([0; LANES], 0);
        for lane in lanes(mask) {
            let members = members[lane] & mask;
            let yes = votes & members;
            counted[lane] = u64::from(yes);
            let holds = match mode {
                VoteMode::All => yes == members,
                VoteMode::Any => yes != 0,
                VoteMode::Uniform => yes == members || yes == 0,
                VoteMode::Ballot => false,
            };
            held |= u32::from(holds) << lane;
        }
        if mode == VoteMode::Ballot {
            self.put_bits(d, false, &counted, mask);
        } else {
            self.registers.set_predicate(d, held, mask);
        }
    }

    pub(super) fn matching(
        &mut self,
        (all, double): (bool, bool),
        d: Index,
        p: Option<Index>,
        [a, members]: [Index; 2],
        mask: u32,
    ) {
        let values = self.bits(a, double);
        let members = self.registers.words[members as usize];
        let (mut found, mut held) = ([0; LANES], 0);
        for lane in lanes(mask) {
            let members = members[lane] & mask;
            let same = lanes(members).filter(|&l| values[l] == values[lane]).fold(0u32, |same, l| same | 1 << l);
            let agree = same == members;
            found[lane] = u64::from(if all && !agree { 0 } else { same });
            held |= u32::from(agree) << lane;
        }
        self.put_bits(d, false, &found, mask);
        if let Some(p) = p {
            self.registers.set_predicate(p, held, mask);
        }
    }

    pub(super) fn reduce(&mut self, op: ReduceOp, signed: bool, d: Index, [a, members]: [Index; 2], mask: u32) {
        let values = self.registers.words[a as usize];
        let members = self.registers.words[members as usize];
        let combine = |x: u32, y: u32| match op {
            ReduceOp::Add => x.wrapping_add(y),
            ReduceOp::Min if signed => x.cast_signed().min(y.cast_signed()).cast_unsigned(),
            ReduceOp::Max if signed => x.cast_signed().max(y.cast_signed()).cast_unsigned(),
            ReduceOp::Min => x.min(y),
            ReduceOp::Max => x.max(y),
            ReduceOp::And => x & y,
            ReduceOp::Or => x | y,
            ReduceOp::Xor => x ^ y,
        };
        let mut reduced = [0; LANES];
        for lane in lanes(mask) {
            let of = lanes(members[lane] & mask).map(|l| values[l]).reduce(combine);
            reduced[lane] = u64::from(of.unwrap_or(values[lane]));
        }
        self.put_bits(d, false, &reduced, mask);
    }
}
