//! Rotary position embedding against its f64 reference, and that the inverse is inverse and transpose.

use std::sync::Arc;

use tilefold_core::rope::reference;
use tilefold_core::{Backend, DType, RopeArgs, RopePairs, RopeSpec, Stream};

use crate::buffer::Buffer;
use crate::case::{DTYPES, Place};
use crate::suite::Trial;
use crate::values::{Host, round_to};

const GROUP: &str = "rope";

/// What a result may be off by before it is rounded, as a part of the length of its pair: `RopeSpec` promises it.
const F32_ERROR: f64 = 2.5 / 8_388_608.0;

/// Half the distance of subnormal f16.
const SMALLEST_F16: f64 = 2.98e-8;

/// One rotation.
#[derive(Clone)]
struct Case {
    name: &'static str,
    dtype: DType,
    spec: RopeSpec,
    shape: [usize; 5],
    source: Place,
    destination: Place,
}

type Check = fn(&Case, &dyn Backend) -> Result<f64, String>;

pub(crate) fn trials(device: &Arc<dyn Backend>) -> Vec<Trial> {
    let mut trials = Vec::new();
    let pairs = [(RopePairs::Interleaved, "interleaved"), (RopePairs::Halves, "halves")];
    for (dtype, (pairs, pairs_name)) in DTYPES.iter().flat_map(|&dtype| pairs.map(|pairs| (dtype, pairs))) {
        for case in cases(dtype, pairs) {
            let checks: [(&str, Check); 3] =
                [("forward", Case::check), ("inverse", Case::check_inverse), ("adjoint", Case::check_adjoint)];
            // Every case is compared with the reference; those by the formulas alone are enough for the identities.
            let count = if ["plain", "partial", "far"].contains(&case.name) { 3 } else { 1 };
            for (what, check) in checks.into_iter().take(count) {
                let (device, case) = (Arc::clone(device), case.clone());
                let name = format!("{GROUP}/{dtype}/{pairs_name}/{}/{what}", case.name);
                trials.push(Trial::new(GROUP, name, move || check(&case, &*device)));
            }
        }
    }
    trials
}

fn cases(dtype: DType, pairs: RopePairs) -> Vec<Case> {
    let dense = Place::default;
    let ordered = |order: &[usize]| Place { order: order.to_vec(), ..Place::default() };
    let spec = |rotary_dim| RopeSpec::new(rotary_dim, pairs);
    let case = |name, spec, shape| Case { name, dtype, spec, shape, source: dense(), destination: dense() };
    let at = |offset| RopeSpec { offset, ..spec(16) };
    let mut packed = case("packed", spec(8), [2, 2, 21, 3, 8]);
    packed.source = Place { gap: 3, ..dense() };
    packed.destination = Place { gap: 5, skip: 1, ..dense() };
    let mut heads_first = case("heads_first", at(70), [2, 1, 33, 4, 20]);
    (heads_first.source, heads_first.destination) = (ordered(&[0, 1, 3, 2, 4]), dense());
    let mut both_heads_first = case("both_heads_first", at(5), [1, 2, 35, 3, 16]);
    both_heads_first.source = ordered(&[0, 1, 3, 2, 4]);
    both_heads_first.destination = ordered(&[0, 3, 1, 2, 4]);
    let mut channels_first = case("channels_first", at(3), [2, 1, 9, 2, 17]);
    (channels_first.source, channels_first.destination) = (dense(), ordered(&[0, 4, 1, 3, 2]));
    let mut backwards = case("backwards", at(11), [1, 2, 18, 2, 18]);
    backwards.source = Place { reversed: vec![2, 4], ..dense() };
    backwards.destination = Place { reversed: vec![0, 1, 2, 3, 4], ..dense() };
    let mut broadcast = case("broadcast", at(1), [2, 3, 17, 2, 16]);
    broadcast.source = Place { repeated: vec![1, 3], ..dense() };
    vec![
        case("plain", spec(32), [2, 3, 37, 2, 32]),
        case("one_pair", spec(2), [1, 1, 1, 1, 2]),
        case("partial", RopeSpec { offset: 100, ..spec(10) }, [1, 3, 20, 2, 23]),
        case("wide", RopeSpec { offset: 4_000, ..spec(256) }, [1, 1, 19, 2, 260]),
        case("far", at((1 << 31) + 5), [1, 2, 19, 3, 16]),
        case("farther", at((1 << 53) + 1), [1, 1, 7, 1, 16]),
        case("before_0", at(-7), [1, 1, 20, 2, 16]),
        case("base", RopeSpec { base: 500_000.0, offset: 130_000, ..spec(64) }, [1, 1, 9, 1, 64]),
        case("stretched", RopeSpec { position_scale: 8.5, offset: 60_001, ..spec(16) }, [1, 2, 9, 2, 16]),
        case("turned_back", RopeSpec { inverse: true, offset: 33, ..spec(24) }, [1, 2, 9, 2, 24]),
        packed,
        heads_first,
        both_heads_first,
        channels_first,
        backwards,
        broadcast,
    ]
}

impl Case {
    /// Values of many sizes, different for different `seed`.
    fn host(&self, seed: f64) -> Host {
        let value = |index: usize| {
            let count = f64::from(u32::try_from(index).unwrap_or(0));
            let size = 2_f64.powi(i32::try_from(index % 11).unwrap_or(0) - 5);
            round_to(self.dtype, (count * 0.731 + seed).sin() * size)
        };
        let values = (0..self.shape.iter().product()).map(value).collect();
        Host { dtype: self.dtype, shape: self.shape.to_vec(), values }.repeat(&self.source.repeated)
    }

    /// What the device makes of `host`.
    fn run(&self, device: &dyn Backend, spec: &RopeSpec, host: &Host) -> Result<Vec<f64>, String> {
        let stream: Stream = device.stream().map_err(|e| e.to_string())?;
        let source = Buffer::input(device, &stream, host, &self.source)?;
        let mut destination = Buffer::output(device, &stream, self.dtype, &self.shape, &self.destination)?;
        let args = RopeArgs::new(spec, source.tensor().view(), destination.tensor_mut().view_mut());
        device.rope(&stream, args.map_err(|e| e.to_string())?).map_err(|e| format!("rope: {e}"))?;
        device.synchronize(&stream).map_err(|e| e.to_string())?;
        let values = destination.download(device, &stream)?.values;
        if source.is_unchanged(device, &stream)? { Ok(values) } else { Err("the source has changed".into()) }
    }

    fn check(&self, device: &dyn Backend) -> Result<f64, String> {
        let host = self.host(0.0);
        let got = self.run(device, &self.spec, &host)?;
        let expected = reference::rope(&self.spec, self.shape, &host.values);
        self.compare(&got, &expected, &self.allowed(&host.values, &expected, 1.0))
    }

    /// The rotation and its inverse give what there was.
    fn check_inverse(&self, device: &dyn Backend) -> Result<f64, String> {
        let host = self.host(1.0);
        let turned = self.run(device, &self.spec, &host)?;
        let turned = Host { values: turned, ..host.clone() };
        let got = self.run(device, &self.back(), &turned)?;
        // The first rounding is turned, and so lies in either channel of the pair.
        let allowed = self.allowed(&host.values, &host.values, 2.0);
        let lengths = self.lengths(&host.values);
        let rounded = allowed
            .iter()
            .zip(lengths)
            .map(|(allowed, length)| allowed + 2_f64.sqrt() * (self.dtype.unit_roundoff() * length + self.subnormal()));
        self.compare(&got, &host.values, &rounded.collect::<Vec<_>>())
    }

    /// `⟨R x, y⟩ = ⟨x, Rᵀ y⟩`
    fn check_adjoint(&self, device: &dyn Backend) -> Result<f64, String> {
        let (x, y) = (self.host(2.0), self.host(3.0));
        let (rx, ry) = (self.run(device, &self.spec, &x)?, self.run(device, &self.back(), &y)?);
        let dot = |a: &[f64], b: &[f64]| a.iter().zip(b).map(|(a, b)| a * b).sum::<f64>();
        let error = (dot(&rx, &y.values) - dot(&x.values, &ry)).abs();
        let size = |values: &[f64]| values.iter().map(|x| x.abs()).collect::<Vec<_>>();
        let allowed = dot(&self.allowed(&x.values, &rx, 1.0), &size(&y.values))
            + dot(&self.allowed(&y.values, &ry, 1.0), &size(&x.values));
        // The errors of single elements have no common sign: far less than their sum is seen.
        let ratio = error / (allowed / 8.0);
        if ratio <= 1.0 { Ok(ratio) } else { Err(format!("<Rx, y> - <x, R'y> = {error:e}, allowed {allowed:e} / 8")) }
    }

    fn back(&self) -> RopeSpec {
        RopeSpec { inverse: !self.spec.inverse, ..self.spec.clone() }
    }

    fn subnormal(&self) -> f64 {
        if self.dtype == DType::F16 { SMALLEST_F16 } else { 0.0 }
    }

    /// Length of the pair that each channel is of; 0 for those that are copied.
    fn lengths(&self, values: &[f64]) -> Vec<f64> {
        let mut lengths = vec![0.0; values.len()];
        for (row, lengths) in values.chunks(self.shape[4]).zip(lengths.chunks_mut(self.shape[4])) {
            for pair in 0..self.spec.pair_count() {
                let [a, b] = self.spec.channels(pair);
                (lengths[a], lengths[b]) = (row[a].hypot(row[b]), row[a].hypot(row[b]));
            }
        }
        lengths
    }

    /// Errors that results near `expected` may have after so many rotations of `values`: none where they are copied.
    fn allowed(&self, values: &[f64], expected: &[f64], rotations: f64) -> Vec<f64> {
        let one = |(length, y): (f64, &f64)| match length {
            0.0 => 0.0,
            _ => rotations * F32_ERROR * length + self.dtype.unit_roundoff() * y.abs() + self.subnormal(),
        };
        self.lengths(values).into_iter().zip(expected).map(one).collect()
    }

    fn compare(&self, got: &[f64], expected: &[f64], allowed: &[f64]) -> Result<f64, String> {
        let mut worst = 0.0_f64;
        for (index, ((got, expected), allowed)) in got.iter().zip(expected).zip(allowed).enumerate() {
            let error = (got - expected).abs();
            if error.is_nan() || error > *allowed {
                let (spec, shape) = (&self.spec, self.shape);
                return Err(format!(
                    "element {index} of {shape:?}: expected {expected:e}, got {got:e}, allowed error {allowed:.2e}; {spec:?}"
                ));
            }
            if error > 0.0 {
                worst = worst.max(error / allowed);
            }
        }
        Ok(worst)
    }
}
