//! One block: its warps take turns from barrier to barrier.

use crate::execute::Env;
use crate::fault::{Fault, FaultKind, Stop};
use crate::instruction::{BarrierKind, BarrierReduce};
use crate::launch::{Prepared, Statistics};
use crate::shadow::Seen;
use crate::shared::Shared;
use crate::warp::{Arrival, Outcome, Warp};

pub(crate) struct Block<'l> {
    prepared: &'l Prepared<'l>,
    shared: Shared,
    warps: Vec<Warp>,
    seen: Vec<Seen>,
    /// `bar.arrive` that no barrier has used up.
    arrived: Vec<(u32, Arrival)>,
    statistics: Statistics,
}

impl<'l> Block<'l> {
    pub(crate) fn new(prepared: &'l Prepared<'l>) -> Self {
        let kernel = prepared.kernel;
        let dynamic = (kernel.dynamic_shared, u64::from(prepared.dynamic_shared_bytes));
        let shared = Shared::new(&kernel.shared_ranges, dynamic);
        let warps = (0..prepared.threads.div_ceil(32)).map(|index| Warp::new(prepared, index)).collect();
        Self { prepared, shared, warps, seen: Vec::new(), arrived: Vec::new(), statistics: Statistics::default() }
    }

    /// Runs the block of this linear index from start to end.
    pub(crate) fn run(&mut self, index: u64) -> Result<Statistics, Box<Fault>> {
        let [x, y, _] = self.prepared.grid.map(u64::from);
        let narrow = |value: u64| value as u32;
        let block = [narrow(index % x), narrow(index / x % y), narrow(index / x / y)];
        self.shared.reset();
        self.seen = vec![Seen::new(self.warps.len(), self.shared.time); self.warps.len()];
        self.arrived.clear();
        self.statistics = Statistics { blocks: 1, ..Statistics::default() };
        for warp in &mut self.warps {
            warp.start(self.prepared, block);
        }
        loop {
            for at in 0..self.warps.len() {
                self.turn(at, narrow(index)).map_err(|stop| self.fault(at, block, *stop))?;
            }
            if self.warps.iter().all(Warp::exited) {
                return Ok(self.statistics);
            }
            if let Err((at, stop)) = self.barriers() {
                return Err(self.fault(at, block, *stop));
            }
        }
    }

    fn turn(&mut self, at: usize, linear: u32) -> Result<(), Box<Stop>> {
        let warp = &mut self.warps[at];
        if !warp.runnable() {
            return Ok(());
        }
        let mut env = Env {
            prepared: self.prepared,
            shared: &mut self.shared,
            seen: &mut self.seen,
            block: linear,
            statistics: &mut self.statistics,
        };
        loop {
            match warp.run(&mut env)? {
                Outcome::Exited | Outcome::Waits => return Ok(()),
                Outcome::Arrived(arrival) => self.arrived.push((warp.index, arrival)),
            }
        }
    }

    /// Releases every barrier that is complete; a fault when none is, since no warp can go on then.
    fn barriers(&mut self) -> Result<(), (usize, Box<Stop>)> {
        let mut waiting: Vec<(usize, Arrival)> =
            self.warps.iter().enumerate().filter_map(|(at, warp)| warp.waits_at().map(|a| (at, a))).collect();
        let mut ids: Vec<u32> = waiting.iter().map(|(_, arrival)| arrival.id).collect();
        ids.sort_unstable();
        ids.dedup();
        let mut released = false;
        for id in ids {
            let here: Vec<usize> = waiting.iter().filter(|(_, a)| a.id == id).map(|&(at, _)| at).collect();
            released |= self.barrier(id, &here)?;
        }
        if released {
            return Ok(());
        }
        waiting.sort_by_key(|&(at, _)| at);
        let Some(&(at, arrival)) = waiting.first() else {
            // Not reached: a warp that neither runs nor waits has exited, and then the block is done.
            return Err((0, Stop::new(0, FaultKind::Barrier { id: 0, what: "no warp can go on".to_owned() })));
        };
        let others: Vec<String> = self.warps.iter().map(Warp::state).collect();
        let what = format!("never completes; warps: {}", others.join(", "));
        Err((at, Stop::new(arrival.lane, FaultKind::Barrier { id: arrival.id, what })))
    }

    fn barrier(&mut self, id: u32, here: &[usize]) -> Result<bool, (usize, Box<Stop>)> {
        let early: Vec<usize> = self.arrived.iter().filter(|(_, a)| a.id == id).map(|(w, _)| *w as usize).collect();
        let arrivals: Vec<Arrival> = here
            .iter()
            .filter_map(|&at| self.warps[at].waits_at())
            .chain(self.arrived.iter().filter(|(_, a)| a.id == id).map(|(_, a)| *a))
            .collect();
        let Some(first) = arrivals.first() else { return Ok(false) };
        let bad = |what: String| Err((here[0], Stop::new(first.lane, FaultKind::Barrier { id, what })));
        if arrivals.iter().any(|a| a.threads != first.threads) {
            return bad("warps give different numbers of threads".to_owned());
        }
        let complete = match first.threads {
            // A whole warp counts 32 threads, also where the block has fewer.
            Some(threads) => {
                let came = 32 * u32::try_from(arrivals.len()).unwrap_or(u32::MAX);
                if came > threads {
                    return bad(format!("{came} threads came where {threads} were due"));
                }
                came == threads
            }
            None => {
                (0..self.warps.len()).all(|at| self.warps[at].exited() || here.contains(&at) || early.contains(&at))
            }
        };
        if complete {
            self.release(id, here, &early);
        }
        Ok(complete)
    }

    fn release(&mut self, id: u32, here: &[usize], early: &[usize]) {
        let time = self.shared.advance();
        if time == 1 {
            self.seen.fill(Seen::new(self.warps.len(), time));
        }
        // Who syncs has seen what any participant had seen, and what the participants did so far.
        let mut joined = vec![0; self.warps.len()];
        for &at in here.iter().chain(early) {
            for (known, &seen) in joined.iter_mut().zip(&self.seen[at].by_warp) {
                *known = (*known).max(seen);
            }
        }
        for &at in here.iter().chain(early) {
            joined[at] = time;
        }
        for &at in here {
            self.seen[at].by_warp.copy_from_slice(&joined);
            self.seen[at].update();
        }
        let votes = self.votes(here);
        for &at in here {
            self.warps[at].release(votes);
        }
        self.arrived.retain(|(_, arrival)| arrival.id != id);
    }

    /// Threads whose predicate holds, and all threads, of a `bar.red`.
    fn votes(&self, here: &[usize]) -> (u32, u32) {
        here.iter().filter_map(|&at| self.warps[at].waits_at()).fold((0, 0), |(yes, all), arrival| {
            (yes + arrival.predicate.count_ones(), all + arrival.lanes.count_ones())
        })
    }

    fn fault(&self, at: usize, block: [u32; 3], stop: Stop) -> Box<Fault> {
        let warp = &self.warps[at];
        let [x, y, _] = self.prepared.block;
        let linear = warp.index * 32 + stop.lane;
        let (line, instruction) = warp.statement(self.prepared);
        Box::new(Fault {
            kernel: self.prepared.kernel.name.as_str().into(),
            block,
            thread: [linear % x, linear / x % y, linear / x / y],
            line,
            instruction: instruction.into(),
            kind: stop.kind,
        })
    }
}

/// The result of a `bar.red` from the votes.
pub(crate) fn reduced(kind: BarrierKind, (yes, all): (u32, u32)) -> Option<(BarrierReduce, u32, u32)> {
    let BarrierKind::Reduce { op, d, .. } = kind else { return None };
    let value = match op {
        BarrierReduce::Population => yes,
        BarrierReduce::And => u32::from(yes == all),
        BarrierReduce::Or => u32::from(yes > 0),
    };
    Some((op, d, value))
}
