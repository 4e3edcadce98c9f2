//! Strided copies, casts and fills, exact to the bit.

use std::sync::Arc;

use half::{bf16, f16};
use tilefold_core::{Backend, DType, RelayoutArgs};

use crate::buffer::Buffer;
use crate::case::{DTYPES, Place};
use crate::suite::Trial;
use crate::values::{Host, round_to};

const GROUP: &str = "relayout";

/// Numbers that casts go wrong on: ties, subnormals, the edges of each range.
pub(crate) const SPECIAL: [f64; 30] = [
    0.0,
    -0.0,
    1.0,
    -1.0,
    f64::NAN,
    f64::INFINITY,
    f64::NEG_INFINITY,
    1.401_298_464_324_817e-45,
    -1.175_494_350_822_287_5e-38,
    5.960_464_477_539_063e-8,
    2.980_232_238_769_531_3e-8,
    2.980_232_594_040_899e-8,
    6.097_555_160_522_461e-5,
    65_504.0,
    65_519.996_093_75,
    65_520.0,
    -70_000.0,
    3.389_531_389_251_535_5e38,
    3.396_177_370_829_344_5e38,
    3.402_823_466_385_288_6e38,
    // Ties of bf16 and f16 to even below and above, and one f32 step beside them.
    1.003_906_25,
    1.011_718_75,
    1.003_906_369_209_289_6,
    1.003_906_130_790_710_4,
    1.000_488_281_25,
    1.001_464_843_75,
    1.000_488_400_459_289_6,
    1.000_488_162_040_710_4,
    -1e9,
    0.1,
];

type Run = Box<dyn FnOnce(&dyn Backend) -> Result<(), String> + Send>;

pub(crate) fn trials(device: &Arc<dyn Backend>) -> Vec<Trial> {
    let mut trials = Vec::new();
    let mut add = |name: String, run: Run| {
        let device = Arc::clone(device);
        trials.push(Trial::new(GROUP, format!("{GROUP}/{name}"), move || run(&*device).map(|()| 0.0)));
    };
    let pairs = DTYPES.iter().flat_map(|&from| DTYPES.map(|to| (from, to)));
    let same = [(DType::I32, DType::I32), (DType::Bool, DType::Bool)];
    for (from, to) in pairs.chain(same) {
        for (name, shape, source, destination) in copies() {
            let run = move |device: &dyn Backend| copy(device, from, to, &shape, &source, &destination);
            add(format!("{from}_to_{to}/{name}"), Box::new(run));
        }
    }
    for dtype in DTYPES.into_iter().chain([DType::I32, DType::Bool]) {
        add(format!("fill/{dtype}"), Box::new(move |device: &dyn Backend| fill(device, dtype)));
    }
    trials
}

/// Name, shape, place of the source, place of the destination.
fn copies() -> Vec<(&'static str, Vec<usize>, Place, Place)> {
    let dense = Place::default;
    let ordered = |order: &[usize]| Place { order: order.to_vec(), ..Place::default() };
    let reversed = |axes: &[usize]| Place { reversed: axes.to_vec(), ..Place::default() };
    let sliced = Place { gap: 3, skip: 1, ..Place::default() };
    vec![
        ("one", vec![1], dense(), dense()),
        ("flat", vec![1001], dense(), dense()),
        ("transpose", vec![70, 130], ordered(&[1, 0]), dense()),
        ("transpose_back", vec![33, 65], dense(), ordered(&[1, 0])),
        ("both_ways", vec![17, 4, 9], ordered(&[2, 0, 1]), ordered(&[1, 2, 0])),
        ("heads_first", vec![2, 3, 19, 4, 8], dense(), ordered(&[0, 1, 3, 2, 4])),
        ("column_wise", vec![2, 5, 7, 3, 6], ordered(&[0, 2, 1, 3, 4]), dense()),
        ("backwards", vec![5, 31], reversed(&[1]), reversed(&[0, 1])),
        ("into_a_slice", vec![6, 7, 11], dense(), sliced.clone()),
        ("out_of_a_slice", vec![6, 7, 11], sliced.clone(), Place { reversed: vec![2], ..sliced }),
        ("broadcast", vec![4, 9, 5], Place { repeated: vec![0, 2], ..dense() }, dense()),
        ("one_number", vec![8, 40], Place { repeated: vec![0, 1], ..dense() }, ordered(&[1, 0])),
    ]
}

/// Small numbers for the types that hold whole ones, otherwise the special values and everything around them.
fn value(dtype: DType, index: usize) -> f64 {
    let count = f64::from(u32::try_from(index).unwrap_or(0));
    match dtype {
        DType::Bool => count % 2.0,
        DType::I32 => count * 1_000_003.0 % 2_147_483_647.0 - 1e9,
        _ => SPECIAL
            .get(index % 97)
            .copied()
            .unwrap_or((count * 0.37).sin() * 10_f64.powi(index.rem_euclid(9).try_into().unwrap_or(0))),
    }
}

/// What a cast must give: one rounding from the source's value, which f32 holds exactly.
pub(crate) fn cast(to: DType, value: f64) -> f64 {
    let (DType::F16 | DType::BF16) = to else { return round_to(to, value) };
    #[allow(clippy::cast_possible_truncation, reason = "every source dtype fits in f32")]
    let single = value as f32;
    if to == DType::F16 { f16::from_f32(single).to_f64() } else { bf16::from_f32(single).to_f64() }
}

fn copy(
    device: &dyn Backend,
    from: DType,
    to: DType,
    shape: &[usize],
    source: &Place,
    destination: &Place,
) -> Result<(), String> {
    let stream = device.stream().map_err(|e| e.to_string())?;
    let values = (0..shape.iter().product()).map(|index| round_to(from, value(from, index))).collect();
    let host = Host { dtype: from, shape: shape.to_vec(), values }.repeat(&source.repeated);
    let input = Buffer::input(device, &stream, &host, source)?;
    let mut output = Buffer::output(device, &stream, to, shape, destination)?;
    let args = RelayoutArgs::new(input.tensor().view(), output.tensor_mut().view_mut()).map_err(|e| e.to_string())?;
    device.relayout(&stream, args).map_err(|e| e.to_string())?;
    device.synchronize(&stream).map_err(|e| e.to_string())?;
    let got = output.download(device, &stream)?.values;
    let expected: Vec<f64> = host.values.iter().map(|&value| cast(to, value)).collect();
    compare(&got, &expected)
}

fn fill(device: &dyn Backend, dtype: DType) -> Result<(), String> {
    let stream = device.stream().map_err(|e| e.to_string())?;
    let places = [
        Place::default(),
        Place { order: vec![1, 2, 0], gap: 2, reversed: vec![1], ..Place::default() },
        Place { skip: 2, ..Place::default() },
    ];
    for place in places {
        let values: &[f64] =
            if dtype.is_float() { &[0.0, -1.5, f64::NEG_INFINITY, f64::NAN, 1e-3] } else { &[0.0, 1.0] };
        for &value in values {
            let mut buffer = Buffer::output(device, &stream, dtype, &[5, 33, 7], &place)?;
            device.fill(&stream, buffer.tensor_mut().view_mut(), value).map_err(|e| e.to_string())?;
            device.synchronize(&stream).map_err(|e| e.to_string())?;
            compare(&buffer.download(device, &stream)?.values, &vec![round_to(dtype, value); 5 * 33 * 7])?;
        }
    }
    Ok(())
}

/// Equal numbers, signs of zero included; NaN for NaN.
pub(crate) fn compare(got: &[f64], expected: &[f64]) -> Result<(), String> {
    let differs =
        |(got, expected): (&f64, &f64)| got.to_bits() != expected.to_bits() && !(got.is_nan() && expected.is_nan());
    match got.iter().zip(expected).position(differs) {
        Some(index) => Err(format!("element {index}: expected {:e}, got {:e}", expected[index], got[index])),
        None => Ok(()),
    }
}
