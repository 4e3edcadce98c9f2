//! The same inputs give the same bits: again, with any number of workers, with and without lse.

use std::sync::Arc;

use tilefold_core::Backend;

use crate::case::Case;
use crate::exchange;
use crate::suite::{Subject, Trial};
use crate::values::Inputs;

const GROUP: &str = "determinism";

/// Cases whose work is shared out in different ways: many rows, one row, long sums, parts of queries, all features.
const CASES: [&str; 14] = [
    "seqlen/1",
    "seqlen/97",
    "seqlen/257",
    "cross/1x1000",
    "outer/1x300x2/17",
    "outer/1x2x16/34",
    "bias/11hq1_alone",
    "bias/11hqk_alone",
    "bias/11111_alone",
    "bias/b1hqk",
    "gqa/6over2/70",
    "gqa/32over1/300/zero",
    "everything/97x200/1",
    "everything/130x65/2",
];

/// Trials of the cases of `table` named in this file, if they fit and have their turn by their number here; a name without
/// its case is a trial that fails.
pub(crate) fn trials(
    subject: &Subject,
    table: &[Case],
    fits: impl Fn(&Case) -> bool,
    has_turn: impl Fn(usize) -> bool,
) -> Vec<Trial> {
    let mut trials = Vec::new();
    for (_, name) in CASES.into_iter().enumerate().filter(|&(number, _)| has_turn(number)) {
        let found: Vec<&Case> = table.iter().filter(|case| name == format!("{}/{}", case.group, case.name)).collect();
        if let [case] = found[..] {
            if fits(case) {
                trials.extend(case_trials(subject, case));
            }
        } else {
            let message = format!("{name}: {} cases of the table have this name, expected one", found.len());
            trials.push(Trial::new(GROUP, format!("{GROUP}/{name}"), move || Err(message)));
        }
    }
    trials
}

fn case_trials(subject: &Subject, case: &Case) -> Vec<Trial> {
    let precision = case.spec.precision();
    let name = |what: &str| format!("{precision}/{GROUP}/{}/{}/{what}", case.group, case.name);
    let mut others = vec![("again".to_owned(), Arc::clone(&subject.device))];
    others.extend(subject.twins.iter().cloned());
    let mut trials = Vec::new();
    for (what, other) in others {
        let (device, case) = (Arc::clone(&subject.device), case.clone());
        trials.push(Trial::new(GROUP, name(&what), move || same_bits(&*device, &*other, &case)));
    }
    let (device, case) = (Arc::clone(&subject.device), case.clone());
    trials.push(Trial::new(GROUP, name("lse_is_optional"), move || lse_is_optional(&*device, &case)));
    trials
}

fn same_bits(device: &dyn Backend, other: &dyn Backend, case: &Case) -> Result<f64, String> {
    let inputs = Inputs::draw(case);
    let (first, second) = (exchange::run(device, case, &inputs)?, exchange::run(other, case, &inputs)?);
    for ((name, a), (_, b)) in first.iter().zip(&second) {
        if let Some(byte) = a.bytes.iter().zip(&b.bytes).position(|(a, b)| a != b) {
            let seed = case.seed;
            return Err(format!(
                "{}, seed {seed:#x}: {name} differs, first at byte {byte} of its buffer",
                case.title()
            ));
        }
    }
    Ok(0.0)
}

fn lse_is_optional(device: &dyn Backend, case: &Case) -> Result<f64, String> {
    let inputs = Inputs::draw(case);
    let full = exchange::run_forward(device, case, &inputs, [true, true])?;
    for wanted in [[false, false], [true, false], [false, true]] {
        if exchange::run_forward(device, case, &inputs, wanted)?.bytes != full.bytes {
            return Err(format!("{}: out differs with (lse, lse_low) = {wanted:?}", case.title()));
        }
    }
    Ok(0.0)
}
