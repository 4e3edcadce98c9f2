//! The backend on the devices of this machine, with less than they have, and when something goes wrong.

#![allow(
    clippy::unwrap_used,
    clippy::panic,
    clippy::print_stdout,
    reason = "a panic here is a failed test, which lints see only in the usual harness"
)]

mod harness;

use std::process::ExitCode;
use std::sync::Arc;
use std::time::{Duration, Instant};

use tilefold_backend_wgpu::{WgpuBackend, WgpuOptions};
use tilefold_conformance::case::Case;
use tilefold_conformance::oracle::check_case;
use tilefold_conformance::report::Report;
use tilefold_conformance::suite::{Filter, Subject, trials};
use tilefold_core::{
    AttentionProblem, AttentionSpec, Backend, BiasSpec, Clock, DType, DeviceError, DeviceId, DeviceKind, Event, Layout,
    OpenError, Stream, StructuralMask, Tensor,
};

const TESTS: &[harness::Test] = &[
    ("devices_that_are_not_there_are_named", bad_ordinal),
    ("with_what_browsers_have_everything_works", portable),
    ("rows_in_the_workgroups_memory_give_the_same", staged),
    ("the_kernels_of_gpus_give_the_same", kernels_of_gpus),
    ("calls_are_cut_where_bindings_are_small", small_bindings),
    ("a_head_that_no_binding_shows_is_refused", too_small_bindings),
    ("workgroups_are_folded_where_an_axis_is_short", short_axes),
    ("calls_are_cut_where_loops_are_short", short_loops),
    ("loops_that_a_driver_cuts_off_are_cut_or_refused", long_loops),
    ("kernels_that_were_given_up_are_compiled_again", few_pipelines),
    ("too_few_storage_buffers_are_refused", few_buffers),
    ("backends_of_one_device_share_its_memory", shared),
    ("streams_and_events_of_another_maker_are_refused", foreign_handles),
    ("memory_of_another_device_is_refused", foreign_memory),
    ("memory_is_given_out_again_and_zeroed", memory_returns),
    ("threads_share_a_device", threads),
    ("work_is_timed_by_the_device_or_by_the_host", timed),
    ("all_devices_compute_at_once", all_devices),
    ("subgroups_are_those_of_the_driver", subgroups),
    #[cfg(target_os = "linux")]
    ("memory_that_the_driver_refuses_is_an_error", refused_memory),
    #[cfg(target_os = "linux")]
    ("without_a_driver_it_says_how_to_install_one", no_driver),
];

fn main() -> ExitCode {
    harness::run(TESTS)
}

fn with(edit: impl FnOnce(&mut WgpuOptions)) -> WgpuBackend {
    let mut options = WgpuOptions::default();
    edit(&mut options);
    WgpuBackend::with_options(0, options).unwrap()
}

/// Runs the conformance trials whose names contain this.
fn conforms(device: WgpuBackend, contains: &str) {
    let subject = Subject { device: Arc::new(device), twins: Vec::new() };
    let filter = Filter { contains: Some(contains.to_owned()), large: false, ..Filter::default() };
    let report = Report::of(trials(&subject, &filter), |_| ());
    let failures: Vec<_> = report.failures().collect();
    assert!(failures.is_empty(), "{failures:#?}");
    assert!(report.groups().iter().map(|group| group.passed).sum::<usize>() >= 3, "{contains}: no such trials");
}

fn bad_ordinal() {
    let count = WgpuBackend::count();
    for ordinal in [count, usize::MAX] {
        let error = WgpuBackend::new(ordinal).unwrap_err();
        let OpenError::NoSuchDevice { name, known } = error else { panic!("{error}") };
        assert_eq!(name, format!("wgpu:{ordinal}"));
        assert!(known.starts_with("wgpu:0"), "{known}");
    }
}

/// No subgroups, and so few storage buffers that masks and biases are gathered.
fn portable() {
    for dtype in ["f32", "f16", "bf16"] {
        let device = WgpuBackend::with_options(0, WgpuOptions::portable()).unwrap();
        conforms(device, &format!("{dtype}/everything/97x200"));
    }
    conforms(WgpuBackend::with_options(0, WgpuOptions::portable()).unwrap(), "f32/everything/40x70");
}

/// What GPUs do: with keys enough for several tiles, and a head too wide for a whole tile.
fn staged() {
    for dtype in ["f32", "bf16"] {
        let device = with(|options| options.workgroup_memory = Some(true));
        conforms(device, &format!("{dtype}/everything/65x130"));
    }
    conforms(with(|options| options.workgroup_memory = Some(true)), "f32/everything/40x70");
    let device = with(|options| options.workgroup_memory = Some(true));
    for head_dim in [8, 160] {
        let spec = AttentionSpec::new(DType::F32, 1, 2, 50, 2, head_dim).with_all_gradients();
        let worst = check_case(&device, &Case::new("staged", format!("head_dim {head_dim}"), spec));
        assert!(worst.is_ok(), "{worst:?}");
    }
}

/// Other numbers of rows for a thread, the device's own exponential, rows in the workgroup's memory; and without that.
fn kernels_of_gpus() {
    for workgroup_memory in [None, Some(false)] {
        for dtype in ["f32", "bf16"] {
            let device = with(|options| (options.software, options.workgroup_memory) = (Some(false), workgroup_memory));
            assert!(!device.is_software());
            conforms(device, &format!("{dtype}/everything/65x130"));
        }
        let device = with(|options| (options.software, options.workgroup_memory) = (Some(false), workgroup_memory));
        for case in [cut_case(DType::F32), cut_case(DType::F16)] {
            let worst = check_case(&device, &case);
            assert!(worst.is_ok(), "{workgroup_memory:?}: {worst:?}");
        }
    }
}

/// Batches, rows and heads that do not share out evenly, with a bias of every kind.
fn cut_case(dtype: DType) -> Case {
    let mut spec = AttentionSpec::new(dtype, 3, 5, 21, 6, 8);
    (spec.kv_heads, spec.seqlen_k) = (3, 35);
    let shapes = [[3, 5, 1, 1, 35], [3, 1, 6, 21, 35], [1, 5, 6, 21, 1], [1, 1, 1, 21, 35]];
    spec.biases = shapes.map(|shape| BiasSpec { shape, dtype }).to_vec();
    spec.key_mask = true;
    spec.gate = true;
    spec.segments = true;
    spec.mask = StructuralMask { causal: true, k_offset: -9, alibi_slopes: Some(vec![0.1; 6]), ..Default::default() };
    Case::new("cut", "every_bias", spec.with_all_gradients())
}

fn small_bindings() {
    for dtype in [DType::F32, DType::F16, DType::BF16] {
        let case = cut_case(dtype);
        // From parts of several rows down to one head of one row.
        for bytes in [1 << 20, 40_000, 20_000, 9_000] {
            let device = with(|options| options.max_binding_bytes = bytes);
            let worst = check_case(&device, &case);
            assert!(worst.is_ok(), "{dtype} {bytes}: {worst:?}");
        }
    }
    for (moves, bytes) in [("relayout/", 4096), ("accumulate/", 4096), ("merge/arithmetic", 4096), ("rope/f32", 40_000)]
    {
        conforms(with(|options| options.max_binding_bytes = bytes), moves);
    }
}

fn too_small_bindings() {
    let device = with(|options| options.max_binding_bytes = 1024);
    let error = check_case(&device, &cut_case(DType::F32)).unwrap_err();
    assert!(error.contains("max_storage_buffer_binding_size") && error.contains("at most 1024"), "{error}");
}

/// Walks over rows, sums over all of them, down to one head of one row at a time.
/// wgpu itself refuses a dispatch of more.
fn short_axes() {
    for dtype in [DType::F32, DType::BF16] {
        let worst = check_case(&with(|options| options.max_workgroups = 24), &cut_case(dtype));
        assert!(worst.is_ok(), "{dtype}: {worst:?}");
    }
    for moves in ["relayout/", "f32/merge", "accumulate/", "rope/f32"] {
        conforms(with(|options| options.max_workgroups = 100), moves);
    }
    let error = check_case(&with(|options| options.max_workgroups = 2), &cut_case(DType::F32)).unwrap_err();
    assert!(error.contains("number of workgroups") && error.contains("at most 4"), "{error}");
}

fn short_loops() {
    for dtype in [DType::F32, DType::F16, DType::BF16] {
        let case = cut_case(dtype);
        for rounds in [2_000, 600, 300] {
            let worst = check_case(&with(|options| options.max_loop_rounds = rounds), &case);
            assert!(worst.is_ok(), "{dtype} {rounds}: {worst:?}");
        }
    }
    let error = check_case(&with(|options| options.max_loop_rounds = 100), &cut_case(DType::F32)).unwrap_err();
    assert!(error.contains("rounds of one thread's loops") && error.contains("at most 100"), "{error}");
}

/// On llvmpipe, which ends loops after 65 535 rounds of all of them together. Lengths just within what is accepted are right,
/// and so is a walk over as many rows as one likes.
fn long_loops() {
    let device = WgpuBackend::new(0).unwrap();
    let spec = |rows, [seqlen_q, seqlen_k]: [usize; 2], heads, head_dim| AttentionSpec {
        seqlen_k,
        ..AttentionSpec::new(DType::F32, 1, rows, seqlen_q, heads, head_dim)
    };
    let pair = |spec: AttentionSpec| {
        let shape = [1, 1, spec.heads, spec.seqlen_q, spec.seqlen_k];
        AttentionSpec { biases: vec![BiasSpec { shape, dtype: DType::F32 }], ..spec }
    };
    let right = [
        ("rows", pair(spec(40, [4, 2_000], 32, 4))),
        ("keys", spec(1, [3, 30_000], 1, 8)),
        ("queries", spec(1, [30_000, 3], 1, 8)),
        ("wide keys", pair(spec(1, [3, 4_400], 1, 72))),
        ("wide queries", spec(1, [3_500, 3], 1, 72)),
        ("widest keys", spec(1, [3, 1_300], 1, 256)),
        ("widest queries", spec(1, [1_100, 3], 1, 256)),
    ];
    for (name, spec) in right {
        let worst = check_case(&device, &Case::new("long", name, spec.with_all_gradients()));
        assert!(worst.is_ok(), "{name}: {worst:?}");
    }
    let long = [("keys", spec(1, [3, 140_000], 1, 8)), ("wide keys", spec(1, [3, 20_000], 1, 72))];
    for (name, spec) in long {
        match check_case(&device, &Case::new("long", name, spec)) {
            Err(error) if device.info().arch.contains("llvmpipe") => {
                assert!(error.contains("rounds of one thread's loops, which grows"), "{name}: {error}");
            }
            worst => assert!(worst.is_ok() && !device.info().arch.contains("llvmpipe"), "{name}: {worst:?}"),
        }
    }
}

/// Forward and backward are more kernels than that; the second time they come as calls that hold theirs.
fn few_pipelines() {
    let device = with(|options| options.max_pipelines = 1);
    for dtype in [DType::F32, DType::BF16, DType::F32] {
        let worst = check_case(&device, &cut_case(dtype));
        assert!(worst.is_ok(), "{dtype}: {worst:?}");
    }
}

fn few_buffers() {
    let mut options = WgpuOptions::default();
    options.max_storage_buffers = 8;
    let error = WgpuBackend::with_options(0, options).unwrap_err();
    assert!(error.to_string().contains("max_storage_buffers_per_shader_stage 8"), "{error}");
}

fn shared() {
    let (first, second) = (WgpuBackend::new(0).unwrap(), WgpuBackend::new(0).unwrap());
    let mut storage = first.alloc(&first.stream().unwrap(), 100).unwrap();
    let stream = second.stream().unwrap();
    second.upload(&stream, &[7; 99], &mut storage).unwrap();
    let mut bytes = [1; 100];
    first.download(&stream, &storage, &mut bytes).unwrap();
    assert_eq!((bytes[98], bytes[99]), (7, 0));
}

fn foreign_handles() {
    let device = WgpuBackend::new(0).unwrap();
    let id = device.info().id;
    let unsupported = |result: Result<(), DeviceError>| matches!(result, Err(DeviceError::Unsupported { .. }));
    assert!(unsupported(device.synchronize(&Stream::new(id, Arc::new(())))));
    let own = device.stream().unwrap();
    assert!(unsupported(device.wait(&own, &Event::new(id, Arc::new(())))));
    // Another backend of the same device, with a queue of its own.
    assert!(unsupported(device.synchronize(&with(|_| ()).stream().unwrap())));
    let elsewhere = DeviceId { kind: DeviceKind::Wgpu, ordinal: 77 };
    let expected = Err(DeviceError::WrongDevice { what: "stream", expected: id, got: elsewhere });
    assert_eq!(device.synchronize(&Stream::new(elsewhere, Arc::new(()))), expected);
    let expected = Err(DeviceError::WrongDevice { what: "event", expected: id, got: elsewhere });
    assert_eq!(device.wait(&own, &Event::new(elsewhere, Arc::new(()))), expected);
}

fn foreign_memory() {
    let (device, other) = (WgpuBackend::new(0).unwrap(), with(|_| ()));
    let storage = other.alloc(&other.stream().unwrap(), 64).unwrap();
    let mut tensor = Tensor::new(storage, DType::F32, Layout::contiguous(&[16]).unwrap()).unwrap();
    let error = device.fill(&device.stream().unwrap(), tensor.view_mut(), 1.0).unwrap_err();
    assert!(error.to_string().contains("is of no memory in use on this device"), "{error}");
}

fn memory_returns() {
    let device = with(|_| ());
    let stream = device.stream().unwrap();
    let bytes = 1 << 20;
    for _ in 0..5 {
        let mut storage = device.alloc(&stream, bytes).unwrap();
        let mut read = vec![1; bytes];
        device.download(&stream, &storage, &mut read).unwrap();
        assert!(read.iter().all(|&byte| byte == 0));
        device.upload(&stream, &vec![9; bytes], &mut storage).unwrap();
    }
    let [in_use, peak] = device.memory_bytes();
    assert_eq!((in_use, peak), (0, 1 << 20));
}

fn threads() {
    let device = Arc::new(WgpuBackend::new(0).unwrap());
    let handles: Vec<_> = (0..4_u32)
        .map(|number| {
            let device = Arc::clone(&device);
            std::thread::spawn(move || {
                let mut case = cut_case(DType::F32);
                case.seed += u64::from(number);
                // Again and again, so that some calls are known already, and want the same workspace.
                (0..4).map(|_| check_case(&*device, &case)).collect::<Result<Vec<_>, _>>()
            })
        })
        .collect();
    for handle in handles {
        let worst = handle.join().unwrap();
        assert!(worst.is_ok(), "{worst:?}");
    }
}

fn timed() {
    let layout = Layout::contiguous(&[1 << 18]).unwrap();
    for timestamps in [true, false] {
        let device = with(|options| options.timestamps = timestamps);
        let stream = device.stream().unwrap();
        let new = || Tensor::new(device.alloc(&stream, 1 << 20).unwrap(), DType::F32, layout.clone()).unwrap();
        let mut tensor = new();
        let mut time = |fills: u32| {
            let started = Instant::now();
            let mut work = || (0..fills).for_each(|_| device.fill(&stream, tensor.view_mut(), 1.0).unwrap());
            let timing = device.timed(&stream, &mut work).unwrap();
            assert!(timing.elapsed <= started.elapsed(), "{timing:?}");
            timing
        };
        time(1);
        // The shortest of several: other tests have the machine's cores at times.
        let mut shortest = |fills| (0..8).map(|_| time(fills)).min_by_key(|timing| timing.elapsed).unwrap();
        let (few, many) = (shortest(2), shortest(100));
        let has_clock = device.raw_device().features().contains(wgpu::Features::TIMESTAMP_QUERY);
        assert!(timestamps || !has_clock);
        let clock = if has_clock { Clock::Device } else { Clock::Host };
        assert_eq!((few.clock, many.clock), (clock, clock));
        assert!(few.elapsed > Duration::ZERO && many.elapsed > 5 * few.elapsed, "{few:?} {many:?}");
    }
    let device = with(|_| ());
    let stream = device.stream().unwrap();
    let nothing =
        (0..8).map(|_| device.timed(&stream, &mut || ()).unwrap()).min_by_key(|timing| timing.elapsed).unwrap();
    assert!(nothing.elapsed < Duration::from_millis(50), "{nothing:?}");
}

/// llvmpipe's are as wide as its vectors.
fn subgroups() {
    let lanes = WgpuBackend::new(0).unwrap().info().lanes;
    assert!(lanes.is_power_of_two(), "{lanes}");
    if let Ok(bits) = std::env::var("LP_NATIVE_VECTOR_WIDTH") {
        assert_eq!(lanes, bits.parse::<usize>().unwrap() / 32, "LP_NATIVE_VECTOR_WIDTH={bits}");
    }
}

/// This program again, with little memory; a driver for the CPU takes what the system gives.
#[cfg(target_os = "linux")]
fn refused_memory() {
    const LIMITED: &str = "TILEFOLD_TEST_LIMITED";
    let arch = WgpuBackend::new(0).unwrap().info().arch.clone();
    if !arch.contains("llvmpipe") {
        println!("left out: what {arch} does without memory, for it has its own");
        return;
    }
    if std::env::var_os(LIMITED).is_none() {
        let mut shell = std::process::Command::new("sh");
        shell.args(["-c", "ulimit -v 6000000; exec \"$@\"", "sh"]).arg(std::env::current_exe().unwrap());
        let output = shell.args(["--exact", "memory_that_the_driver_refuses_is_an_error"]).env(LIMITED, "1").output();
        let output = output.unwrap();
        assert!(output.status.success(), "{}{}", String::from_utf8_lossy(&output.stdout), output.status);
        return;
    }
    let device = with(|_| ());
    let stream = device.stream().unwrap();
    let bytes = 1 << 28;
    for _ in 0..2 {
        let mut held = Vec::new();
        let error = loop {
            match device.alloc(&stream, bytes) {
                Ok(storage) => held.push(storage),
                Err(error) => break error,
            }
            assert!(held.len() < 32, "more than the system gives");
        };
        assert!(matches!(error, DeviceError::OutOfMemory { asked, .. } if asked == bytes as u64), "{error}");
        assert!(held.len() > 4, "{error}");
        // What there is can still be used, and comes back.
        held.truncate(2);
        let mut read = [1; 64];
        device.download(&stream, &held[1], &mut read).unwrap();
        assert_eq!(read, [0; 64]);
    }
}

/// This program again, where the loader finds none.
#[cfg(target_os = "linux")]
fn no_driver() {
    let mut program = std::process::Command::new(std::env::current_exe().unwrap());
    program.arg("memory_is_given_out_again").env("TILEFOLD_REQUIRE", "wgpu").env("VK_DRIVER_FILES", "/nowhere");
    let output = program.output().unwrap();
    let text = String::from_utf8_lossy(&output.stdout);
    assert!(!output.status.success() && text.contains("install"), "{text}");
}

fn all_devices() {
    if let Some(drivers) = std::env::var_os("VK_DRIVER_FILES") {
        let (devices, drivers) = (WgpuBackend::count(), std::env::split_paths(&drivers).count());
        assert!(devices >= drivers, "{devices} devices of {drivers} drivers");
    }
    let handles: Vec<_> = (0..WgpuBackend::count())
        .map(|ordinal| {
            std::thread::spawn(move || {
                let device = WgpuBackend::new(ordinal).unwrap();
                assert_eq!(device.info().id.ordinal, ordinal);
                check_case(&device, &cut_case(DType::BF16)).map_err(|error| format!("{:?}: {error}", device.info()))
            })
        })
        .collect();
    for handle in handles {
        let worst = handle.join().unwrap();
        assert!(worst.is_ok(), "{worst:?}");
    }
    // What is one device's is not another's.
    for ordinal in 1..WgpuBackend::count() {
        let [first, other] = [0, ordinal].map(|ordinal| WgpuBackend::new(ordinal).unwrap());
        let plan = first.plan_attention(&AttentionProblem::new(cut_case(DType::F32).spec).unwrap()).unwrap();
        assert_eq!(plan.device, first.info().id);
        let mut storage = first.alloc(&first.stream().unwrap(), 64).unwrap();
        let (expected, got) = (other.info().id, first.info().id);
        let result = other.upload(&other.stream().unwrap(), &[1; 64], &mut storage);
        assert_eq!(result, Err(DeviceError::WrongDevice { what: "storage", expected, got }));
        let result = other.synchronize(&first.stream().unwrap());
        assert_eq!(result, Err(DeviceError::WrongDevice { what: "stream", expected, got }));
    }
}
