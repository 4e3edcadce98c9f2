//! What moves memory, against a plain copy of as many bytes, between memory that the device
//! gave, so that pages are the same: `cargo bench -p tilefold-benches --bench moves`.
//!
//! `-- --json FILE` writes the table to a file as well. Every operation is timed in turn with the copy, on the same threads;
//! printed are medians, and the ratio of the bytes a second that are read and written. The CPU should reach 0.7 on large
//! tensors without gaps.

#![allow(clippy::print_stdout, reason = "the table is what it is for")]

use std::time::Instant;

use rayon::prelude::*;
use tilefold::{DType, Device, Error, MergeOperands, RopePairs, RopeSpec, Tensor, accumulate, merge, relayout, rope};

/// Batch, rows, seqlen, heads, head_dim: 32 million elements.
const SHAPE: [usize; 5] = [1, 1, 8192, 32, 128];
const ROUNDS: usize = 9;

/// One operation: its name, bytes read and written, and what runs it.
struct Move<'a> {
    name: &'static str,
    bytes: usize,
    run: Box<dyn FnMut() -> Result<(), Error> + 'a>,
}

fn main() -> Result<(), Box<dyn std::error::Error>> {
    // `cargo test --benches` only asks whether it is there.
    if std::env::args().any(|argument| argument == "--test") {
        return Ok(());
    }
    let device = Device::cpu()?;
    println!("{:<24} {:>5} {:>8} {:>8} {:>6}", "operation", "dtype", "GB/s", "copy", "ratio");
    let mut rows = Vec::new();
    for dtype in [DType::F32, DType::F16, DType::BF16] {
        measure(&device, dtype, &mut rows)?;
    }
    if let Some(file) = std::env::args().skip_while(|argument| argument != "--json").nth(1) {
        let record = serde_json::json!({ "shape": SHAPE, "rounds": ROUNDS, "rows": rows });
        std::fs::write(file, format!("{record:#}\n"))?;
    }
    Ok(())
}

fn measure(device: &Device, dtype: DType, rows: &mut Vec<serde_json::Value>) -> Result<(), Error> {
    let count: usize = SHAPE.iter().product();
    let bytes = count * dtype.size_bytes();
    let mut filled = device.zeros(dtype, &SHAPE)?;
    // Pages that nobody wrote are all the same one.
    accumulate(device, Tensor::from_f64(&[1.0], DType::F32, &[1; 5])?.view().expand(&SHAPE)?, filled.view_mut())?;
    let source = filled;
    let (mut dense, mut sum, mut halves, mut interleaved, mut wide, mut acc) = (
        device.zeros(dtype, &SHAPE)?,
        device.zeros(dtype, &SHAPE)?,
        device.zeros(dtype, &SHAPE)?,
        device.zeros(dtype, &SHAPE)?,
        device.zeros(DType::F32, &SHAPE)?,
        device.zeros(dtype, &SHAPE)?,
    );
    let lse_shape = [SHAPE[0], SHAPE[1], SHAPE[3], SHAPE[2]];
    let of_lse = || device.zeros(DType::F32, &lse_shape);
    let (lse, mut acc_lse, mut acc_low) = (of_lse()?, of_lse()?, of_lse()?);
    let (mut wide_acc, mut wide_lse, mut wide_low) = (device.zeros(DType::F32, &SHAPE)?, of_lse()?, of_lse()?);
    let heads_first = [SHAPE[0], SHAPE[1], SHAPE[3], SHAPE[2], SHAPE[4]];
    let mut by_head = device.zeros(dtype, &heads_first)?;
    let spec = |pairs| RopeSpec { offset: 1 << 20, ..RopeSpec::new(SHAPE[4], pairs) };
    let moves = vec![
        Move {
            name: "relayout, dense",
            bytes: 2 * bytes,
            run: Box::new(|| relayout(device, source.view(), dense.view_mut())),
        },
        Move {
            name: "relayout, heads first",
            bytes: 2 * bytes,
            run: Box::new(|| relayout(device, source.view().permute(&[0, 1, 3, 2, 4])?, by_head.view_mut())),
        },
        Move {
            name: "relayout, to f32",
            bytes: bytes + 4 * count,
            run: Box::new(|| relayout(device, source.view(), wide.view_mut())),
        },
        Move {
            name: "accumulate",
            bytes: 3 * bytes,
            run: Box::new(|| accumulate(device, source.view(), sum.view_mut())),
        },
        Move {
            name: "rope, halves",
            bytes: 2 * bytes,
            run: Box::new(|| rope(device, &spec(RopePairs::Halves), source.view(), halves.view_mut())),
        },
        Move {
            name: "rope, interleaved",
            bytes: 2 * bytes,
            run: Box::new(|| rope(device, &spec(RopePairs::Interleaved), source.view(), interleaved.view_mut())),
        },
        Move {
            name: "merge",
            bytes: 3 * bytes,
            run: Box::new(|| add(device, &source, &lse, [&mut acc, &mut acc_lse, &mut acc_low])),
        },
        // As ring attention does.
        Move {
            name: "merge, into f32",
            bytes: bytes + 8 * count,
            run: Box::new(|| add(device, &source, &lse, [&mut wide_acc, &mut wide_lse, &mut wide_low])),
        },
    ];
    let from = source.view();
    let from = from.as_bytes()?;
    let mut to = device.zeros(dtype, &SHAPE)?;
    let to = to.host_bytes_mut().unwrap_or_default();
    assert_eq!(to.len(), from.len(), "the CPU's tensors are host memory");
    for mut operation in moves {
        let (mut copies, mut runs) = (Vec::new(), Vec::new());
        for _ in 0..ROUNDS {
            copies.push(seconds(|| {
                copy(from, to);
                Ok(())
            })?);
            runs.push(seconds(&mut operation.run)?);
        }
        let (copy, run) = (rate(2 * bytes, &mut copies), rate(operation.bytes, &mut runs));
        println!("{:<24} {dtype:>5} {run:>8.1} {copy:>8.1} {:>6.2}", operation.name, run / copy);
        rows.push(serde_json::json!({
            "operation": operation.name, "dtype": dtype.to_string(), "gb_per_s": run, "copy_gb_per_s": copy,
            "ratio": run / copy,
        }));
    }
    Ok(())
}

/// Merges a part into an accumulator, its out and lse.
fn add(device: &Device, out: &Tensor, lse: &Tensor, acc: [&mut Tensor; 3]) -> Result<(), Error> {
    let [acc_out, acc_lse, acc_lse_low] = acc.map(Tensor::view_mut);
    merge(
        device,
        MergeOperands { out: out.view(), lse: lse.view(), lse_low: lse.view(), acc_out, acc_lse, acc_lse_low },
    )
}

/// As many bytes as there are, by all threads at once.
fn copy(from: &[u8], to: &mut [u8]) {
    let part = from.len().div_ceil(rayon::current_num_threads());
    to.par_chunks_mut(part).zip(from.par_chunks(part)).for_each(|(to, from)| to.copy_from_slice(from));
}

fn seconds(mut run: impl FnMut() -> Result<(), Error>) -> Result<f64, Error> {
    let start = Instant::now();
    run()?;
    Ok(start.elapsed().as_secs_f64())
}

/// GB a second by the median time.
#[allow(clippy::cast_precision_loss, reason = "three digits are printed")]
fn rate(bytes: usize, seconds: &mut [f64]) -> f64 {
    seconds.sort_by(f64::total_cmp);
    bytes as f64 / seconds[seconds.len() / 2] / 1e9
}
