//! Contenders in turns: each is warmed up, then timed once a turn, then held against the oracle.

use std::any::Any;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::thread::sleep;
use std::time::{Duration, Instant};

use anyhow::{Result, anyhow};
use cpu_time::ProcessTime;
use serde::Serialize;

use crate::task::Task;

/// Passes before the timed ones: the first compile kernels and try which are fastest.
const WARM_UP: usize = 5;
/// How long the process does nothing, to see what threads take that wait.
const IDLE: Duration = Duration::from_millis(500);

/// Something that computes the attention of a [`Task`] again and again.
pub(crate) trait Contender {
    /// One pass, from inputs on the device to results there; returns when they are written.
    fn run(&mut self) -> Result<()>;

    /// What the last pass wrote, with the names and axes that [`Task::check`] wants.
    fn results(self: Box<Self>) -> Result<Vec<(&'static str, Vec<f64>)>>;
}

/// What came of a contender.
#[derive(Serialize)]
pub(crate) struct Outcome {
    pub(crate) name: String,
    #[serde(flatten)]
    pub(crate) result: Measured,
}

#[derive(Serialize)]
#[serde(untagged)]
pub(crate) enum Measured {
    Times {
        /// Median processor time of one pass, over all threads of the process.
        cpu_ms: f64,
        /// Median wall time of one pass.
        wall_ms: f64,
        /// Wall time of the first pass.
        first_ms: f64,
        /// The largest error as a share of three times that of plain f32 arithmetic.
        error_share: f64,
    },
    Failed {
        failed: String,
    },
}

impl Outcome {
    pub(crate) fn cpu_ms(&self) -> Option<f64> {
        if let Measured::Times { cpu_ms, .. } = self.result { Some(cpu_ms) } else { None }
    }

    pub(crate) fn wall_ms(&self) -> Option<f64> {
        if let Measured::Times { wall_ms, .. } = self.result { Some(wall_ms) } else { None }
    }
}

/// Warms all up, times them in turns and checks their results; one that fails is left out and says why.
///
/// Gives also what waiting threads take of one processor: it is in everybody's processor time. burn's look for work
/// thousands of times a second.
pub(crate) fn run(task: &Task, contenders: Vec<(String, Box<dyn Contender>)>, turns: usize) -> (f64, Vec<Outcome>) {
    let mut racers: Vec<Racer> = contenders
        .into_iter()
        .enumerate()
        .map(|(place, (name, contender))| Racer { place, name, contender: Ok(contender), passes: Vec::new() })
        .collect();
    for racer in &mut racers {
        (0..WARM_UP).for_each(|_| racer.pass());
    }
    let start = ProcessTime::now();
    sleep(IDLE);
    let idle_share = start.elapsed().as_secs_f64() / IDLE.as_secs_f64();
    for _ in 0..turns {
        racers.iter_mut().for_each(Racer::pass);
        // Nobody always comes after the same one, whose data is in the caches.
        racers.rotate_left(1);
    }
    racers.sort_by_key(|racer| racer.place);
    (idle_share, racers.into_iter().map(|racer| racer.finish(task)).collect())
}

/// Processor and wall time in milliseconds.
type Pass = [f64; 2];

/// A contender and its passes so far.
struct Racer {
    place: usize,
    name: String,
    /// Or why it failed.
    contender: Result<Box<dyn Contender>>,
    passes: Vec<Pass>,
}

impl Racer {
    fn pass(&mut self) {
        let Ok(contender) = &mut self.contender else { return };
        let (cpu, wall) = (ProcessTime::now(), Instant::now());
        match caught(|| contender.run()) {
            Ok(()) => self.passes.push([cpu.elapsed(), wall.elapsed()].map(|time| 1e3 * time.as_secs_f64())),
            Err(error) => self.contender = Err(error),
        }
    }

    fn finish(self, task: &Task) -> Outcome {
        let checked = self.contender.and_then(|contender| task.check(caught(|| contender.results())?));
        let median = |which: usize| {
            let mut times: Vec<f64> = self.passes.iter().skip(WARM_UP).map(|pass| pass[which]).collect();
            times.sort_by(f64::total_cmp);
            times[times.len() / 2]
        };
        let result = match checked {
            Ok(error_share) => {
                Measured::Times { cpu_ms: median(0), wall_ms: median(1), first_ms: self.passes[0][1], error_share }
            }
            Err(error) => Measured::Failed { failed: format!("{error:#}") },
        };
        Outcome { name: self.name, result }
    }
}

/// A panic as an error: burn reports what an adapter cannot do by one.
fn caught<T>(work: impl FnOnce() -> Result<T>) -> Result<T> {
    catch_unwind(AssertUnwindSafe(work)).unwrap_or_else(|panic| Err(anyhow!("panicked: {}", message(&*panic))))
}

fn message(panic: &(dyn Any + Send)) -> &str {
    let text = panic.downcast_ref::<String>().map(String::as_str);
    text.or_else(|| panic.downcast_ref::<&str>().copied()).unwrap_or("no message")
}
