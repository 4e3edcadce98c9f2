//! Criterion benches over the shared workload definitions: `cargo bench -p tilefold-benches -- small/f32`.

use std::hint::black_box;

use criterion::{Criterion, SamplingMode, Throughput};
use tilefold::{AttentionProblem, DType, Device, Error};
use tilefold_benches::{DefinitionError, Launch, Pass, Workload, definitions};

/// Workloads with more logits than this take seconds a pass: `tilefold bench` times them.
const LIMIT_LOGITS: f64 = 1e9;

/// Passes of one workload are repeated this often.
const SAMPLES: usize = 10;

/// Why the benches cannot run.
#[derive(Debug, thiserror::Error)]
enum BenchError {
    #[error(transparent)]
    Definition(#[from] DefinitionError),
    #[error(transparent)]
    Tilefold(#[from] Error),
}

fn main() -> Result<(), BenchError> {
    let mut criterion = Criterion::default().configure_from_args();
    let device = Device::best().map_err(Error::from)?;
    for workload in definitions()? {
        for (name, dtype) in [("f32", DType::F32), ("f16", DType::F16), ("bf16", DType::BF16)] {
            let problem = AttentionProblem::new(workload.spec(dtype, true)).map_err(Error::from)?;
            if workload.dtypes.iter().any(|wanted| wanted == name) && problem.logits() <= LIMIT_LOGITS {
                bench(&mut criterion, &device, &workload, dtype, &problem);
            }
        }
    }
    criterion.final_summary();
    Ok(())
}

/// Every pass of one workload in one dtype; the reported elements are floating-point operations.
fn bench(criterion: &mut Criterion, device: &Device, workload: &Workload, dtype: DType, problem: &AttentionProblem) {
    let mut group = criterion.benchmark_group(format!("{}/{dtype}", workload.name));
    group.sample_size(SAMPLES).sampling_mode(SamplingMode::Flat);
    for pass in Pass::ALL {
        #[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "a positive count far below 2^53")]
        group.throughput(Throughput::Elements(pass.flops(problem) as u64));
        // Made inside, so that a filtered-out bench allocates nothing; a failure fails the bench.
        group.bench_function(pass.to_string(), |bencher| match Launch::of_workload(device, workload, dtype, pass) {
            Ok(mut launch) => {
                let ready = launch.timed(if pass.has_gradients() { Pass::Both } else { Pass::Forward });
                bencher.iter(|| black_box(launch.timed(pass)));
                report(workload, &ready.and_then(|_| launch.timed(pass)));
            }
            Err(error) => {
                report(workload, &Err::<(), _>(error));
                bencher.iter(|| ());
            }
        });
    }
    group.finish();
}

/// Ends the program when a pass failed: its times would mean nothing.
fn report<T>(workload: &Workload, result: &Result<T, Error>) {
    if let Err(error) = result {
        eprintln!("{}: {error}", workload.name);
        std::process::exit(1);
    }
}
