//! Copies, fills and merges, compiled by NVRTC and interpreted: the conformance suite's own trials, and what it has not.
#![cfg(all(target_os = "linux", target_arch = "x86_64"))]
#![allow(clippy::unwrap_used, clippy::panic, reason = "a test fails by panicking")]

mod interpreted;

use std::sync::Arc;

use interpreted::Interpreted;
use tilefold_conformance::suite::{Filter, Outcome, Subject, trials};
use tilefold_core::{Backend, DType, Layout, Storage, Stream, Tensor};
use tilefold_emulator_nvrtc::Release;
use tilefold_kernels::relayout;

/// Runs every trial whose name contains a text.
fn pass(release: Release, dtypes: &[DType], contains: &str) {
    let subject = Subject { device: Arc::new(Interpreted::new(release)), twins: Vec::new() };
    let filter = Filter { dtypes: dtypes.to_vec(), contains: Some(contains.to_owned()), large: false };
    let trials = trials(&subject, &filter);
    assert!(!trials.is_empty(), "no trial {contains}");
    for trial in trials {
        let name = trial.name;
        let outcome = (trial.run)().unwrap_or_else(|error| panic!("{name}: {error}"));
        assert!(matches!(outcome, Outcome::Passed { .. }), "{name}: {outcome:?}");
    }
}

#[test]
fn copies_and_fills_are_exact() {
    pass(Release::Newest, &[DType::F32], "relayout/");
}

#[test]
fn copies_are_exact_with_the_oldest_compiler() {
    pass(Release::Oldest, &[DType::F32], "/both_ways");
}

#[test]
fn merges_are_those_of_the_equations() {
    pass(Release::Newest, &[DType::F32, DType::F16, DType::BF16], "merge/arithmetic");
}

#[test]
fn merges_with_the_oldest_compiler() {
    pass(Release::Oldest, &[DType::F32], "merge/arithmetic");
}

#[test]
fn merged_parts_are_the_whole() {
    pass(Release::Newest, &[DType::BF16], "merge/");
}

/// A tensor on the device with these bytes.
fn tensor(device: &Interpreted, stream: &Stream, bytes: &[u8], dtype: DType, layout: Layout) -> Tensor {
    let mut storage = device.alloc(stream, bytes.len()).unwrap();
    device.upload(stream, bytes, &mut storage).unwrap();
    Tensor::new(storage, dtype, layout).unwrap()
}

fn download(device: &Interpreted, stream: &Stream, storage: &Storage) -> Vec<u8> {
    let mut bytes = vec![0; storage.bytes()];
    device.download(stream, storage, &mut bytes).unwrap();
    bytes
}

#[test]
fn a_fill_may_overlap_itself() {
    let device = Interpreted::new(Release::Newest);
    let stream = device.stream().unwrap();
    // Rows of three that start at every second element; and all rows in one place.
    for (strides, written) in [([2, 1], 9), ([0, 1], 3)] {
        let layout = Layout::new(&[4, 3], &strides, 1).unwrap();
        let mut tensor = tensor(&device, &stream, &[7; 24], DType::F16, layout);
        device.fill(&stream, tensor.view_mut(), 1.0).unwrap();
        let one = half::f16::ONE.to_bits().to_le_bytes();
        let expected: Vec<u8> = (0..12).flat_map(|at| if (1..=written).contains(&at) { one } else { [7; 2] }).collect();
        assert_eq!(download(&device, &stream, tensor.storage()), expected, "{strides:?}");
    }
}

#[test]
fn equal_dtypes_keep_their_bits() {
    let device = Interpreted::new(Release::Newest);
    let stream = device.stream().unwrap();
    // NaN of both signs with payloads, and a bool that is neither 0 nor 1.
    let bytes: Vec<u8> = [0x7fa0_0001_u32, 0xffff_1234, 0x0000_0001, 0x0203_ff80].map(u32::to_le_bytes).concat();
    for (dtype, count) in [(DType::F32, 4), (DType::F16, 8), (DType::BF16, 8), (DType::I32, 4), (DType::Bool, 16)] {
        let dense = Layout::contiguous(&[2, count / 2]).unwrap();
        let source = tensor(&device, &stream, &bytes, dtype, dense.clone());
        let destination = tensor(&device, &stream, &[0; 16], dtype, dense);
        device.launch(&relayout(&source.view(), &destination.view()).unwrap()).unwrap();
        assert_eq!(download(&device, &stream, destination.storage()), bytes, "{dtype}");
    }
}

#[test]
fn strides_are_64_bits_wide() {
    let device = Interpreted::new(Release::Newest);
    let stream = device.stream().unwrap();
    let row = |bytes: &[u8]| tensor(&device, &stream, bytes, DType::I32, Layout::contiguous(&[4]).unwrap());
    let rows = [row(&[1; 16]), row(&[2; 16])];
    let [first, second] = rows.each_ref().map(|row| row.view().origin().addr() as u64);
    let stride = i64::try_from((second - first) / 4).unwrap();
    assert!(stride > i64::from(i32::MAX), "allocations are {stride} elements apart");
    // The launch of a copy from rows 8 elements apart, given rows that are two allocations: as the outer axis of the
    // destination and as the inner one.
    for (shape, source, expected) in
        [([2, 4], [8, 1], [[1_u8; 16], [2; 16]].concat()), ([4, 2], [1, 8], [[1; 4], [2; 4]].concat().repeat(4))]
    {
        let source = tensor(&device, &stream, &[0; 48], DType::I32, Layout::new(&shape, &source, 0).unwrap());
        let destination = tensor(&device, &stream, &[0; 32], DType::I32, Layout::contiguous(&shape).unwrap());
        let mut launch = relayout(&source.view(), &destination.view()).unwrap();
        let apart = launch.params.source_strides.iter().position(|&stride| stride == 8).unwrap();
        (launch.params.source, launch.params.source_strides[apart]) = (first, stride);
        device.launch(&launch).unwrap();
        assert_eq!(download(&device, &stream, destination.storage()), expected, "{shape:?}");
    }
}
