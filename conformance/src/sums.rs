//! `destination += source`, exact to the bit.

use std::sync::Arc;

use tilefold_core::{AccumulateArgs, Backend, DType, RelayoutArgs};

use crate::buffer::Buffer;
use crate::case::{DTYPES, Place};
use crate::relayouts::{SPECIAL, cast, compare};
use crate::suite::Trial;
use crate::values::{Host, round_to};

const GROUP: &str = "accumulate";

pub(crate) fn trials(device: &Arc<dyn Backend>) -> Vec<Trial> {
    let mut trials = Vec::new();
    for (from, to) in DTYPES.iter().flat_map(|&from| DTYPES.map(|to| (from, to))) {
        for sum in sums(from, to) {
            let device = Arc::clone(device);
            let name = format!("{GROUP}/{from}_to_{to}/{}", sum.name);
            trials.push(Trial::new(GROUP, name, move || sum.run(&*device).map(|()| 0.0)));
        }
    }
    trials
}

/// A sum of tensors of one shape.
struct Sum {
    name: &'static str,
    dtypes: (DType, DType),
    shape: Vec<usize>,
    source: Place,
    destination: Place,
}

fn sums(from: DType, to: DType) -> Vec<Sum> {
    let dense = Place::default;
    let ordered = |order: &[usize]| Place { order: order.to_vec(), ..Place::default() };
    let repeated = |axes: &[usize]| Place { repeated: axes.to_vec(), ..Place::default() };
    let sliced = Place { gap: 3, skip: 1, ..Place::default() };
    let sum = |name, shape: &[usize], source, destination| Sum {
        name,
        dtypes: (from, to),
        shape: shape.to_vec(),
        source,
        destination,
    };
    vec![
        sum("one", &[1], dense(), dense()),
        sum("flat", &[1003], dense(), dense()),
        sum("long_rows", &[2, 20_001], dense(), Place { gap: 1, ..dense() }),
        sum("transpose", &[37, 65], ordered(&[1, 0]), dense()),
        sum("heads_first", &[2, 3, 19, 4, 8], dense(), ordered(&[0, 1, 3, 2, 4])),
        sum("into_a_slice", &[6, 7, 11], dense(), sliced.clone()),
        sum("out_of_a_slice", &[6, 7, 11], sliced.clone(), Place { reversed: vec![2], ..sliced }),
        sum("broadcast", &[4, 9, 5], repeated(&[0, 2]), dense()),
        sum("one_number", &[8, 40], repeated(&[0, 1]), ordered(&[1, 0])),
    ]
}

impl Sum {
    fn run(&self, device: &dyn Backend) -> Result<(), String> {
        let stream = device.stream().map_err(|e| e.to_string())?;
        let host = |dtype, shift: usize| {
            let values = (0..self.shape.iter().product()).map(|index| round_to(dtype, value(index + shift))).collect();
            Host { dtype, shape: self.shape.clone(), values }
        };
        let part = host(self.dtypes.0, 0).repeat(&self.source.repeated);
        // Of another period than the table of special values: each meets ordinary numbers and other special ones.
        let before = host(self.dtypes.1, 41);
        let source = Buffer::input(device, &stream, &part, &self.source)?;
        let dense = Buffer::input(device, &stream, &before, &Place::default())?;
        let mut sum = Buffer::output(device, &stream, self.dtypes.1, &self.shape, &self.destination)?;
        let start = RelayoutArgs::new(dense.tensor().view(), sum.tensor_mut().view_mut()).map_err(|e| e.to_string())?;
        device.relayout(&stream, start).map_err(|e| format!("relayout: {e}"))?;
        let args = AccumulateArgs::new(source.tensor().view(), sum.tensor_mut().view_mut());
        device.accumulate(&stream, args.map_err(|e| e.to_string())?).map_err(|e| format!("accumulate: {e}"))?;
        device.synchronize(&stream).map_err(|e| e.to_string())?;
        let expected: Vec<f64> = (part.values.iter().zip(&before.values))
            .map(|(part, before)| cast(self.dtypes.1, round_to(DType::F32, part + before)))
            .collect();
        compare(&sum.download(device, &stream)?.values, &expected)?;
        if source.is_unchanged(device, &stream)? { Ok(()) } else { Err("the source has changed".into()) }
    }
}

/// Special values and ordinary ones, of both signs and many sizes.
fn value(index: usize) -> f64 {
    let count = f64::from(u32::try_from(index).unwrap_or(0));
    let size = 2_f64.powi(i32::try_from(index % 13).unwrap_or(0) - 6);
    SPECIAL.get(index % 89).copied().unwrap_or((count * 0.73).sin() * size)
}
