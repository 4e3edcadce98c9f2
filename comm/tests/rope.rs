//! Rotary position embedding of shards is that of the whole sequence.

#![allow(clippy::unwrap_used, reason = "a test that stops where something fails")]

mod ranks;

use std::time::Duration;

use ranks::on_ranks;
use tilefold_backend_cpu::CpuBackend;
use tilefold_comm::sequence_parallel::maps::{Gather, Map, Split};
use tilefold_comm::sequence_parallel::rope;
use tilefold_comm::{CommError, Communicator, Error, Partition, Rank};
use tilefold_core::{Backend, DType, ProblemError, RopeArgs, RopePairs, RopeSpec, Tensor};

const SHAPE: [usize; 5] = [2, 1, 37, 3, 12];

fn numbers() -> Tensor {
    let values: Vec<f64> =
        (0..SHAPE.iter().product::<usize>()).map(|i| ((i * 37 % 101) as f64 - 50.0) / 20.0).collect();
    Tensor::from_f64(&values, DType::F32, &SHAPE).unwrap()
}

#[test]
fn shards_are_turned_by_their_global_positions() {
    let device = CpuBackend::new().unwrap().with_threads(1).unwrap();
    for (ranks, zigzag) in [(1, false), (2, true), (3, false), (5, true), (8, true)] {
        for (pairs, inverse) in [(RopePairs::Interleaved, false), (RopePairs::Halves, true)] {
            let spec = RopeSpec { offset: (1 << 31) + 5, inverse, ..RopeSpec::new(8, pairs) };
            let partition =
                if zigzag { Partition::zigzag(SHAPE[2], ranks) } else { Partition::contiguous(SHAPE[2], ranks) };
            let partition = partition.unwrap();
            let whole = numbers();
            let mut expected = Tensor::zeros(DType::F32, &SHAPE).unwrap();
            let stream = device.stream().unwrap();
            let args = RopeArgs::new(&spec, whole.view(), expected.view_mut()).unwrap();
            device.rope(&stream, args).unwrap();
            on_ranks(ranks, Duration::from_secs(20), |rank| {
                let split = Split { axis: 2, partition: partition.clone() };
                let shard = Gather(split.clone()).adjoint().apply(rank, &whole.view()).unwrap();
                let turned = rope(rank, &spec, &partition, &shard.view()).unwrap();
                let all = Gather(split).apply(rank, &turned.view()).unwrap();
                assert_eq!(all.as_slice::<f32>(), expected.as_slice::<f32>(), "{ranks} ranks");
            });
        }
    }
}

#[test]
fn shards_that_do_not_fit_are_named() {
    let (device, comm) = (CpuBackend::new().unwrap(), Communicator::alone());
    let stream = device.stream().unwrap();
    let rank = Rank { comm: &comm, device: &device, stream: &stream };
    let (x, spec) = (numbers(), RopeSpec::new(8, RopePairs::Halves));
    let error = rope(&rank, &spec, &Partition::contiguous(38, 1).unwrap(), &x.view()).unwrap_err();
    assert!(matches!(error, Error::Problem(ProblemError::Shape { expected: 38, got: 37, .. })), "{error}");
    let error = rope(&rank, &spec, &Partition::contiguous(37, 2).unwrap(), &x.view()).unwrap_err();
    assert_eq!(error, CommError::WorldSize { what: "partition", expected: 2, got: 1 }.into());
}
