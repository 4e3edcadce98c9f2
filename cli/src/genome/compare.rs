//! Whether a number of ranks computes what one rank does.
//!
//! The same weights and tokens give the same numbers up to the order of sums: over tokens in weight gradients, over keys in
//! attention, over ranks. What order alone does is measured: one rank computes everything a second time with the sequence cut
//! as the ranks cut it, and its chunks taken from the last to the first. With d the largest difference of a weight's gradient
//! over its largest element, a number of ranks passes where `d <= FACTOR · max(d of that other order, FLOOR)` for every
//! weight, before and after training; so do losses. A gradient that misses a rank's part, or has it twice, is off by a good
//! part of 1, some 10^4 times more.

use tilefold_models::genslm::Parameters;

use super::job::Evaluated;
use super::report::Report;

/// How far ranks may be beyond two orders of one rank: one sample of a rounding error says little more than its size.
const FACTOR: f64 = 8.0;
/// Differences that two sums of a few rounded terms have anyway: 8 · 2^-24.
const FLOOR: f64 = 4.8e-7;

/// Loss and all gradients at some weights.
#[derive(Debug)]
pub(super) struct Point {
    pub(super) loss: f32,
    pub(super) gradients: Parameters,
}

/// Holds each number of ranks against the first, which is one rank, and writes what comes out into the report.
pub(super) fn judge(report: &mut Report, found: Vec<Evaluated>, other_order: Option<Evaluated>) {
    let mut found = found.into_iter();
    let Some(Evaluated { row, points: expected }) = found.next() else { return };
    report.rows.push(row);
    let noise = other_order.map(|other| differences(&other.points, &expected)).unwrap_or_default();
    report.order_difference = largest(&noise).map(|(difference, _)| difference);
    for Evaluated { mut row, points } in found {
        let differences = differences(&points, &expected);
        row.difference = largest(&differences).map(|(difference, _)| difference);
        let over = differences
            .iter()
            .zip(&noise)
            .map(|((difference, name), (noise, _))| (difference / (FACTOR * noise.max(FLOOR)), name.clone()));
        let over: Vec<_> = over.collect();
        let worst = largest(&over);
        row.of_tolerance = worst.as_ref().map(|(over, _)| *over);
        row.worst = worst.map(|(_, name)| name);
        report.passed &= row.passes();
        report.rows.push(row);
    }
}

/// The relative difference of each loss and of each weight's gradient, and its name.
fn differences(got: &[Point], expected: &[Point]) -> Vec<(f64, String)> {
    let mut differences = Vec::new();
    for ((got, expected), when) in got.iter().zip(expected).zip(["before", "after"]) {
        let loss = f64::from(expected.loss);
        differences.push(((f64::from(got.loss) - loss).abs() / loss, format!("loss {when} training")));
        let arrays = got.gradients.arrays().into_iter().zip(expected.gradients.arrays());
        for ((name, _), (got, expected)) in got.gradients.names().into_iter().zip(arrays) {
            let size = expected.iter().fold(f64::MIN_POSITIVE, |size, x| larger(size, f64::from(x.abs())));
            let pairs = got.iter().zip(expected);
            let apart = pairs.fold(0.0, |most, (got, x)| larger(most, (f64::from(*got) - f64::from(*x)).abs()));
            differences.push((apart / size, format!("gradient of {name}, {when} training")));
        }
    }
    differences
}

/// The larger of two numbers, or not a number if one of them is none: `f64::max` would pass over it.
fn larger(a: f64, b: f64) -> f64 {
    if a.is_nan() || a > b { a } else { b }
}

fn largest(differences: &[(f64, String)]) -> Option<(f64, String)> {
    let larger = |a: &(f64, String), b: &(f64, String)| a.0.is_nan() || a.0 > b.0;
    differences.iter().reduce(|a, b| if larger(a, b) { a } else { b }).cloned()
}

#[cfg(test)]
mod tests {
    use tilefold::Backend;
    use tilefold_models::genslm::{AttentionKind, Config, MlpKind, Positions, Tokens};

    use super::super::job::Job;
    use super::super::report::Row;
    use super::*;

    /// What a number of ranks found, with one number of one gradient moved.
    fn evaluated(config: &Config, moved: f32) -> Evaluated {
        let point = |moved: f32| {
            let mut gradients = Parameters::new(config, 1);
            gradients.arrays_mut()[2][[0, 0]] += moved;
            Point { loss: 4.0, gradients }
        };
        let [activation_bytes, state_bytes, bytes_sent, seconds] = [0.0; 4];
        let (difference, of_tolerance, worst) = (None, None, None);
        #[rustfmt::skip]
        let row = Row {
            ranks: 1, activation_bytes, state_bytes, bytes_sent, seconds, losses: Vec::new(), difference, of_tolerance, worst,
        };
        Evaluated { row, points: vec![point(0.0), point(moved)] }
    }

    #[test]
    fn one_number_off_fails() {
        let (positions, attention, mlp) = (Positions::Rope, AttentionKind::Ring, MlpKind::Replicated);
        let config =
            Config { layers: 1, hidden: 4, heads: 2, mlp_hidden: 4, seqlen: 2, batch: 1, positions, attention, mlp };
        let tokens = Tokens::parse(b">x\nACGTAC", "x").unwrap();
        let (config, file) = (config.clone(), String::new());
        let job = Job { config, tokens: &tokens, file, steps: 1, rate: 0.0, compares: true, says: false };
        let device = tilefold::Device::cpu().unwrap();
        let verdict = |moved: f32, order: f32| {
            let mut report = Report::new(&job, 2, 0, device.info());
            let found = vec![evaluated(&job.config, 0.0), evaluated(&job.config, moved)];
            judge(&mut report, found, Some(evaluated(&job.config, order)));
            (report.passed, report.rows[1].worst.clone().unwrap_or_default())
        };
        assert!(verdict(0.0, 0.0).0 && verdict(4e-7, 1e-7).0);
        for (moved, order) in [(1e-3, 1e-6), (f32::NAN, 1e-6), (f32::INFINITY, 0.0)] {
            assert_eq!(verdict(moved, order), (false, "gradient of layer0.query, after training".to_owned()));
        }
    }

    #[test]
    fn what_is_not_a_number_is_the_largest() {
        let named = |values: &[f64]| values.iter().map(|&value| (value, value.to_string())).collect::<Vec<_>>();
        assert_eq!(largest(&named(&[1.0, 3.0, 2.0])).unwrap().1, "3");
        for values in [[f64::NAN, 1.0], [1.0, f64::NAN]] {
            assert!(largest(&named(&values)).unwrap().0.is_nan());
            assert!(larger(values[0], values[1]).is_nan());
        }
    }
}
