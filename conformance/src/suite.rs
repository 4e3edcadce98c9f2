//! Every trial a device has to pass, made at run time: for the test binary, for `tilefold verify`, for whoever writes
//! a backend.

use std::sync::Arc;

use tilefold_core::{AttentionProblem, AttentionSpec, Backend, DType, DeviceInfo, DeviceKind, Precision};

use crate::case::{Case, DTYPES};
use crate::{
    cases, determinism, device_trials, hosted, large, merging, oracle, packed, relayouts, ropes, sharded, sums,
};

/// A device, and others that must give the same bits: the same device with another number of workers.
#[derive(Clone, Debug)]
pub struct Subject {
    /// The device under test.
    pub device: Arc<dyn Backend>,
    /// What each twin is (`3 threads`), and the twin.
    pub twins: Vec<(String, Arc<dyn Backend>)>,
}

/// Which trials to make.
#[derive(Clone, Debug)]
pub struct Filter {
    /// Dtypes of q. f32 brings a choice of cases with products of tf32, which [`Precision::TF32`] makes of all.
    pub precisions: Vec<Precision>,
    /// Only trials whose name contains this.
    pub contains: Option<String>,
    /// Whether to try problems that fill the memory: half a minute, and 11 GB where there are as many.
    pub large: bool,
    /// Only cases of at most so many tiles of 64 queries by 64 keys.
    pub most_tiles: usize,
    /// Every second case, from the first or from the second on, each in one of the dtypes in turn.
    pub in_turn: Option<usize>,
}

impl Default for Filter {
    fn default() -> Self {
        let precisions = DTYPES.map(Precision::from).to_vec();
        Self { precisions, contains: None, large: true, most_tiles: usize::MAX, in_turn: None }
    }
}

impl Filter {
    /// What a device gets through in minutes: everything. On a virtual one, which compiles a kernel for most cases and
    /// interprets it, every second of the small cases, each in one dtype. The same on wgpu devices, whose buffers are also
    /// smaller than the large problems: the other half with every other size of subgroups, so that runs with 4 and with 8
    /// have them all.
    #[must_use]
    pub fn for_device(device: &DeviceInfo) -> Self {
        let all = Self::default();
        let is_wgpu = device.id.kind == DeviceKind::Wgpu;
        let is_slow = device.is_virtual || is_wgpu;
        let half = if is_wgpu { device.lanes.max(1).ilog2() as usize % 2 } else { 0 };
        if is_slow { Self { large: false, most_tiles: 1000, in_turn: Some(half), ..all } } else { all }
    }
}

/// How a trial that did not fail ended.
#[derive(Clone, Debug, PartialEq)]
pub enum Outcome {
    /// Everything is within tolerance.
    Passed {
        /// Largest error as a fraction of what is allowed.
        worst: f64,
    },
    /// It could not run here.
    Skipped {
        /// Why.
        reason: String,
    },
}

/// One check of a device.
pub struct Trial {
    /// The feature: results are summed up by it.
    pub group: &'static str,
    /// Unique name: `dtype/group/case`.
    pub name: String,
    /// Runs it; the error is what went wrong, with everything needed to repeat it.
    pub run: Box<dyn FnOnce() -> Result<Outcome, String> + Send>,
}

impl std::fmt::Debug for Trial {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Trial").field("name", &self.name).finish_non_exhaustive()
    }
}

impl Trial {
    /// A trial that measures errors: it gives the largest as a fraction of what is allowed.
    pub(crate) fn new(
        group: &'static str,
        name: String,
        run: impl FnOnce() -> Result<f64, String> + Send + 'static,
    ) -> Self {
        Self { group, name, run: Box::new(|| run().map(|worst| Outcome::Passed { worst })) }
    }
}

/// The trials of a device, in the order of the table.
#[must_use]
pub fn trials(subject: &Subject, filter: &Filter) -> Vec<Trial> {
    let mut trials = device_trials::trials(&subject.device);
    for (turn, &precision) in filter.precisions.iter().enumerate() {
        let mut table = cases::all(precision, &tiles(&*subject.device, precision.dtype));
        let fits = |case: &Case| case.tiles() <= filter.most_tiles;
        let every = 2 * filter.precisions.len();
        let has_turn = |number: usize| filter.in_turn.is_none_or(|half| number % every == 2 * turn + half);
        trials.extend(determinism::trials(subject, &table, fits, has_turn));
        if precision == DType::F32.into() && !filter.precisions.contains(&Precision::TF32) {
            table.extend(cases::chosen_with_tf32());
        }
        let split: Vec<Case> = table
            .iter()
            .enumerate()
            .filter(|&(number, case)| has_turn(number) && fits(case))
            .map(|(_, case)| case.clone())
            .collect();
        trials.extend(sharded::trials(&subject.device, &split, filter.in_turn.is_some()));
        let cases = table.into_iter().enumerate().filter(|&(number, ref case)| has_turn(number) && fits(case));
        trials.extend(cases.map(|(_, case)| case_trial(&subject.device, case)));
        trials.extend(packed::trials(&subject.device, precision));
        trials.extend(merging::trials(&subject.device, precision));
        if filter.large {
            trials.extend(large::trials(&subject.device, precision));
        }
    }
    trials.extend(relayouts::trials(&subject.device));
    trials.extend(sums::trials(&subject.device));
    trials.extend(hosted::trials(&subject.device));
    trials.extend(ropes::trials(&subject.device));
    trials.retain(|trial| filter.contains.as_ref().is_none_or(|part| trial.name.contains(part)));
    trials
}

fn case_trial(device: &Arc<dyn Backend>, case: Case) -> Trial {
    let device = Arc::clone(device);
    Trial::new(case.group, case.title(), move || oracle::check_case(&*device, &case))
}

/// Tile sizes the device plans for a few problems.
fn tiles(device: &dyn Backend, dtype: DType) -> Vec<usize> {
    let plan = |head_dim| {
        let problem = AttentionProblem::new(AttentionSpec::new(dtype, 1, 2, 512, 2, head_dim)).ok()?;
        device.plan_attention(&problem).ok()
    };
    let mut tiles: Vec<usize> = [8, 32, 128].into_iter().filter_map(plan).flat_map(|p| [p.tile_q, p.tile_k]).collect();
    tiles.sort_unstable();
    tiles.dedup();
    tiles
}
