//! Decoding of branches, barriers, fences and of what lanes of a warp do together.

use super::parts::Parts;
use super::{Decoder, exactly};
use crate::ParseError;
use crate::instruction::{Barrier, BarrierKind, BarrierReduce, Op, ReduceOp, ShuffleMode, VoteMode};
use crate::syntax::{Class, Operand, Statement};

impl Decoder<'_> {
    pub(super) fn control(&mut self, parts: &mut Parts<'_>, statement: &Statement) -> Result<Op, ParseError> {
        let operands = statement.operands.as_slice();
        match parts.name() {
            "bra" => {
                parts.take("uni");
                let [target] = exactly(parts, operands)?;
                Ok(Op::Branch { target: self.target_of(parts, statement.scope, target)? })
            }
            "brx" => self.branch_table(parts, statement),
            "ret" | "exit" => {
                parts.take("uni");
                exactly::<0>(parts, operands)?;
                Ok(Op::Exit)
            }
            "trap" => Ok(Op::Trap),
            "membar" => {
                let scope = parts.take_any(&["cta", "gl", "sys"]);
                if scope.is_some() { Ok(Op::Nothing) } else { Err(parts.unknown(parts.last())) }
            }
            "fence" => {
                parts.take_any(&["sc", "acq_rel"]);
                let scope = parts.take_any(&["cta", "gpu", "sys"]);
                if scope.is_some() { Ok(Op::Nothing) } else { Err(parts.unknown(parts.last())) }
            }
            "nanosleep" => {
                parts.take("u32");
                Ok(Op::Nothing)
            }
            "prefetch" | "prefetchu" => {
                parts.take("global");
                let level = parts.take_any(&["L1", "L2", "L2::evict_last", "L2::evict_normal"]);
                if level.is_some() { Ok(Op::Nothing) } else { Err(parts.unknown(parts.last())) }
            }
            "bar" if parts.take("warp") => {
                if !parts.take("sync") {
                    return Err(parts.unknown(parts.last()));
                }
                self.strict = true;
                let [members] = exactly(parts, operands)?;
                Ok(Op::WarpBarrier { members: self.source(parts, Class::Word, members)? })
            }
            "bar" | "barrier" => self.barrier(parts, operands),
            "shfl" => self.shuffle(parts, operands),
            "vote" => self.vote(parts, operands),
            "match" => self.matching(parts, operands),
            "redux" => self.reduce(parts, operands),
            "activemask" => {
                self.only_b32(parts)?;
                let [d] = exactly(parts, operands)?;
                Ok(Op::ActiveMask { d: self.result(parts, Class::Word, d)? })
            }
            _ => Err(parts.unknown_instruction()),
        }
    }

    fn only_b32(&mut self, parts: &mut Parts<'_>) -> Result<(), ParseError> {
        if parts.take("b32") { Ok(()) } else { Err(parts.unknown(parts.last())) }
    }

    fn sync(&mut self, parts: &mut Parts<'_>) -> Result<(), ParseError> {
        self.strict = true;
        if parts.take("sync") { Ok(()) } else { Err(parts.unknown(parts.last())) }
    }

    fn target_of(&self, parts: &Parts<'_>, scope: usize, operand: &Operand) -> Result<u32, ParseError> {
        match operand {
            Operand::Symbol(name, 0) => {
                self.label(scope, name).ok_or_else(|| parts.operands(&format!("the label `{name}` is not there")))
            }
            _ => Err(parts.operands("a label is due")),
        }
    }

    fn branch_table(&mut self, parts: &mut Parts<'_>, statement: &Statement) -> Result<Op, ParseError> {
        if !parts.take("idx") {
            return Err(parts.unknown(parts.last()));
        }
        parts.take("uni");
        let [index, table] = exactly(parts, &statement.operands)?;
        self.strict = true;
        let index = self.source(parts, Class::Word, index)?;
        let Operand::Symbol(name, 0) = table else { return Err(parts.operands("a list of labels is due")) };
        let list = self.body.scopes.iter().find_map(|scope| scope.targets.get(name));
        let list = list.ok_or_else(|| parts.operands(&format!("the list `{name}` is not there")))?;
        let targets: Result<Vec<u32>, ParseError> = list
            .iter()
            .map(|label| self.target_of(parts, statement.scope, &Operand::Symbol(label.clone(), 0)))
            .collect();
        Ok(Op::BranchTable { index, targets: targets? })
    }

    fn barrier(&mut self, parts: &mut Parts<'_>, operands: &[Operand]) -> Result<Op, ParseError> {
        parts.take("cta");
        let kind = parts.take_any(&["sync", "arrive", "red"]);
        parts.take("aligned");
        self.strict = true;
        let (kind, rest) = match (kind, operands) {
            (Some("sync"), rest) => (BarrierKind::Sync, rest),
            (Some("arrive"), rest) => (BarrierKind::Arrive, rest),
            (Some("red"), [d, rest @ .., predicate]) => {
                let op = match parts.take_any(&["popc", "and", "or"]) {
                    Some("popc") => BarrierReduce::Population,
                    Some("and") => BarrierReduce::And,
                    Some(_) => BarrierReduce::Or,
                    None => return Err(parts.unknown(parts.last())),
                };
                let class = if op == BarrierReduce::Population { Class::Word } else { Class::Predicate };
                if parts.take_any(&["u32", "pred"]) != Some(if class == Class::Word { "u32" } else { "pred" }) {
                    return Err(parts.unknown(parts.last()));
                }
                let (predicate, negated) = self.signed_predicate(parts, predicate)?;
                (BarrierKind::Reduce { op, predicate, negated, d: self.result(parts, class, d)? }, rest)
            }
            _ => return Err(parts.unknown(parts.last())),
        };
        let (id, threads) = match rest {
            [id] if kind != BarrierKind::Arrive => (id, None),
            [id, threads] => (id, Some(threads)),
            _ => return Err(parts.operands("a wrong number of operands")),
        };
        let id = self.source(parts, Class::Word, id)?;
        let threads = match threads {
            Some(threads) => Some(self.source(parts, Class::Word, threads)?),
            None => None,
        };
        Ok(Op::Barrier(Barrier { kind, id, threads }))
    }

    fn shuffle(&mut self, parts: &mut Parts<'_>, operands: &[Operand]) -> Result<Op, ParseError> {
        self.sync(parts)?;
        self.strict = false;
        let name = parts.take_next()?;
        let mode = match name {
            "up" => ShuffleMode::Up,
            "down" => ShuffleMode::Down,
            "bfly" => ShuffleMode::Butterfly,
            "idx" => ShuffleMode::Index,
            _ => return Err(parts.unknown(name)),
        };
        self.only_b32(parts)?;
        let [d, a, lane, clamp, members] = exactly(parts, operands)?;
        let mut s = [0; 4];
        for (index, operand) in s.iter_mut().zip([a, lane, clamp, members]) {
            *index = self.source(parts, Class::Word, operand)?;
        }
        let (d, p) = self.result_pair(parts, Class::Word, d)?;
        Ok(Op::Shuffle { mode, d, p, s })
    }

    fn vote(&mut self, parts: &mut Parts<'_>, operands: &[Operand]) -> Result<Op, ParseError> {
        self.sync(parts)?;
        let name = parts.take_next()?;
        let mode = match name {
            "all" => VoteMode::All,
            "any" => VoteMode::Any,
            "uni" => VoteMode::Uniform,
            "ballot" => VoteMode::Ballot,
            _ => return Err(parts.unknown(name)),
        };
        let class = if mode == VoteMode::Ballot { Class::Word } else { Class::Predicate };
        if parts.take_any(&["b32", "pred"]) != Some(if class == Class::Word { "b32" } else { "pred" }) {
            return Err(parts.unknown(parts.last()));
        }
        let [d, a, members] = exactly(parts, operands)?;
        let (a, negated) = self.signed_predicate(parts, a)?;
        let members = self.source(parts, Class::Word, members)?;
        Ok(Op::Vote { mode, a, negated, members, d: self.result(parts, class, d)? })
    }

    fn matching(&mut self, parts: &mut Parts<'_>, operands: &[Operand]) -> Result<Op, ParseError> {
        let all = match parts.take_any(&["any", "all"]) {
            Some(name) => name == "all",
            None => return Err(parts.unknown(parts.last())),
        };
        self.sync(parts)?;
        let class = parts.class()?;
        if !matches!(class, Class::Word | Class::Double) {
            return Err(parts.unknown(parts.last()));
        }
        let [d, a, members] = exactly(parts, operands)?;
        let a = self.source(parts, class, a)?;
        let members = self.source(parts, Class::Word, members)?;
        let (d, p) = self.result_pair(parts, Class::Word, d)?;
        Ok(Op::Match { all, double: class == Class::Double, d, p, a, members })
    }

    fn reduce(&mut self, parts: &mut Parts<'_>, operands: &[Operand]) -> Result<Op, ParseError> {
        self.sync(parts)?;
        let name = parts.take_next()?;
        let op = match name {
            "add" => ReduceOp::Add,
            "min" => ReduceOp::Min,
            "max" => ReduceOp::Max,
            "and" => ReduceOp::And,
            "or" => ReduceOp::Or,
            "xor" => ReduceOp::Xor,
            _ => return Err(parts.unknown(name)),
        };
        let signed = match parts.take_any(&["s32", "u32", "b32"]) {
            Some(ty) => ty == "s32",
            None => return Err(parts.unknown(parts.last())),
        };
        let [d, a, members] = exactly(parts, operands)?;
        let a = self.source(parts, Class::Word, a)?;
        let members = self.source(parts, Class::Word, members)?;
        Ok(Op::Reduce { op, signed, a, members, d: self.result(parts, Class::Word, d)? })
    }
}
