//! What a process sees only once: no driver, an old one, no compiler, failures, the cache of compiled kernels.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};

use libtest_mimic::{Completion, Failed, Trial};
use tilefold_backend_cuda::{CACHE_VARIABLE, CudaBackend, NVRTC_VARIABLE};
use tilefold_core::{Backend, DType, DeviceError, Layout, OpenError, Tensor};
use tilefold_emulator_cuda::settings;
use tilefold_emulator_nvrtc::Release;

use crate::process::{command, driver_folder, folder_without, missing_compiler};

/// Makes the process of a scenario, with folders first on its library path.
type Start<'a> = &'a dyn Fn(&[PathBuf]) -> Command;

/// Something that happens in processes of their own.
pub(crate) struct Scenario {
    name: &'static str,
    /// Starts the processes; its argument makes one that runs `inside`, and a folder to use.
    outside: fn(Start<'_>, &Path),
    /// What such a process does.
    inside: fn(),
}

pub(crate) const ALL: &[Scenario] = &[
    Scenario { name: "no_driver", outside: without_driver, inside: no_driver },
    Scenario { name: "a_driver_without_the_calls", outside: with_other_library, inside: incomplete_driver },
    Scenario {
        name: "a_driver_too_old",
        outside: |start, _| set(start, settings::DRIVER, "11080"),
        inside: old_driver,
    },
    Scenario {
        name: "a_driver_without_devices",
        outside: |start, _| set(start, settings::DEVICES, "0"),
        inside: empty,
    },
    Scenario { name: "a_device_too_old", outside: |start, _| set(start, settings::ARCH, "75"), inside: old_device },
    Scenario {
        name: "settings_of_the_stand_in_that_cannot_be_used",
        outside: |start, _| set(start, settings::DEVICES, "many"),
        inside: bad_settings,
    },
    Scenario { name: "no_compiler", outside: without_compiler, inside: no_compiler },
    Scenario {
        name: "a_compiler_that_is_none",
        outside: |start, _| set(start, NVRTC_VARIABLE, "/nowhere/libnvrtc.so"),
        inside: bad_compiler,
    },
    Scenario { name: "the_oldest_compiler", outside: with_oldest_compiler, inside: fill },
    Scenario {
        name: "a_launch_that_fails_late",
        outside: |start, _| set(start, settings::FAIL_LAUNCH, "1"),
        inside: failing_launch,
    },
    Scenario {
        name: "memory_runs_out_and_comes_back",
        outside: |start, _| set(start, settings::MEMORY, "1000000"),
        inside: little_memory,
    },
    Scenario { name: "a_device_without_pools", outside: |start, _| set(start, settings::POOLS, "0"), inside: fill },
    Scenario { name: "kernels_are_kept_and_damaged_files_replaced", outside: damaged_cache, inside: fill },
    Scenario { name: "a_cache_that_cannot_be_written", outside: unwritable_cache, inside: fill },
    Scenario { name: "processes_share_the_cache", outside: shared_cache, inside: fill },
];

impl Scenario {
    pub(crate) fn trial(&'static self) -> Trial {
        Trial::ignorable_test(self.name, move || {
            if let Some(reason) = missing_compiler()? {
                return Ok(Completion::ignored_with(reason));
            }
            let folder = tempfile::tempdir().map_err(Failed::from)?;
            let start = |folders: &[PathBuf]| {
                let mut started = command(self.name, folders);
                for name in [settings::DEVICES, CACHE_VARIABLE] {
                    started.env_remove(name);
                }
                started.env(CACHE_VARIABLE, "");
                started
            };
            (self.outside)(&start, folder.path());
            Ok(Completion::Completed)
        })
    }
}

/// Runs one as a process of its own; a failed assertion ends it.
pub(crate) fn run(name: &str) -> ExitCode {
    match ALL.iter().find(|scenario| scenario.name == name) {
        Some(scenario) => {
            (scenario.inside)();
            ExitCode::SUCCESS
        }
        None => ExitCode::FAILURE,
    }
}

/// Waits for a process and shows what it said when it failed.
fn succeed(command: &mut Command) {
    let output = command.output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
}

fn set(start: Start<'_>, variable: &str, value: &str) {
    succeed(start(&[driver_folder()]).env(variable, value));
}

fn open_error() -> OpenError {
    CudaBackend::new(0).unwrap_err()
}

fn without_driver(start: Start<'_>, folder: &Path) {
    folder_without(&["libcuda.so", "libcuda.so.1"], folder);
    succeed(&mut start(&[folder.to_owned()]));
}

fn no_driver() {
    let error = open_error();
    assert!(matches!(&error, OpenError::NoDriver { library, .. } if library == "libcuda.so.1"), "{error}");
    assert_eq!(error.to_string(), "cannot load libcuda.so.1; install NVIDIA's driver 525 (CUDA 12.0) or newer");
    assert_eq!(CudaBackend::count().unwrap_err(), error);
}

/// NVRTC's library under the driver's name has none of its calls.
fn with_other_library(start: Start<'_>, folder: &Path) {
    std::os::unix::fs::symlink(Release::Newest.library(), folder.join("libcuda.so")).unwrap();
    succeed(&mut start(&[folder.to_owned()]));
}

fn incomplete_driver() {
    let error = open_error();
    assert!(matches!(&error, OpenError::TooOld { found, .. } if found == "one without cuInit"), "{error}");
}

fn old_driver() {
    assert_eq!(
        open_error().to_string(),
        "libcuda.so.1 is CUDA 11.8, and CUDA 12.0 or newer is needed; install NVIDIA's driver 525 (CUDA 12.0) or newer"
    );
}

fn empty() {
    assert_eq!(CudaBackend::count(), Ok(0));
    let error = open_error();
    assert!(matches!(&error, OpenError::NoSuchDevice { known, .. } if known.contains("sees no GPU")), "{error}");
}

fn old_device() {
    let error = open_error();
    let OpenError::Device(DeviceError::Unsupported { limit }) = &error else { panic!("{error}") };
    assert!(limit.contains("sm_75") && limit.contains("need sm_80"), "{limit}");
}

fn bad_settings() {
    let error = open_error();
    let OpenError::Device(DeviceError::Driver { call, status: 1, message }) = &error else { panic!("{error}") };
    assert!(call.starts_with("cu") && message.contains("CUDA_ERROR_INVALID_VALUE"), "{error}");
}

fn without_compiler(start: Start<'_>, folder: &Path) {
    folder_without(&["libnvrtc.so", "libnvrtc.so.12", "libnvrtc.so.13"], folder);
    succeed(start(&[driver_folder(), folder.to_owned()]).env_remove(NVRTC_VARIABLE));
}

fn no_compiler() {
    let error = open_error();
    let OpenError::NoDriver { library, hint } = &error else { panic!("{error}") };
    assert!(library.starts_with("NVRTC (libnvrtc.so.13") && hint.contains("pip install"), "{error}");
}

fn bad_compiler() {
    let error = open_error();
    assert!(matches!(error, OpenError::BadSetting { variable: NVRTC_VARIABLE, .. }), "{error}");
}

fn with_oldest_compiler(start: Start<'_>, _: &Path) {
    succeed(start(&[driver_folder()]).env(NVRTC_VARIABLE, Release::Oldest.library()));
}

/// Fills a tensor, with a kernel that is compiled or read from the cache, and looks at it.
fn fill() {
    let device = CudaBackend::new(0).unwrap();
    assert_eq!(filled(&device).unwrap(), [7.0_f32.to_le_bytes(); 1000].concat());
}

fn filled(device: &CudaBackend) -> Result<Vec<u8>, DeviceError> {
    let stream = device.stream()?;
    let storage = device.alloc(&stream, 4000)?;
    let mut tensor = Tensor::new(storage, DType::F32, Layout::contiguous(&[1000]).unwrap()).unwrap();
    device.fill(&stream, tensor.view_mut(), 7.0)?;
    device.synchronize(&stream)?;
    let mut bytes = vec![0; 4000];
    device.download(&stream, tensor.storage(), &mut bytes)?;
    Ok(bytes)
}

fn failing_launch() {
    let device = CudaBackend::new(0).unwrap();
    let error = filled(&device).unwrap_err();
    let DeviceError::Driver { call, status: 719, message } = &error else { panic!("{error}") };
    assert_eq!(*call, "cuStreamSynchronize", "the launch itself only enqueues");
    for part in ["CUDA_ERROR_LAUNCH_FAILED", "a failure that the environment asked for", "start it again"] {
        assert!(message.contains(part), "{message}");
    }
    assert!(filled(&device).is_ok(), "the stand-in forgets");
}

fn little_memory() {
    let device = CudaBackend::new(0).unwrap();
    let stream = device.stream().unwrap();
    let mut held: Vec<_> = (0..3).map(|_| device.alloc(&stream, 300_000).unwrap()).collect();
    let error = device.alloc(&stream, 300_000).unwrap_err();
    let DeviceError::OutOfMemory { asked: 300_000, free } = error else { panic!("{error}") };
    assert!(free <= 100_000, "{free}");
    held.pop();
    device.alloc(&stream, 300_000).unwrap();
}

fn files(folder: &Path) -> Vec<PathBuf> {
    fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path()).collect()
}

fn damaged_cache(start: Start<'_>, folder: &Path) {
    let run = || succeed(start(&[driver_folder()]).env(CACHE_VARIABLE, folder));
    run();
    let kept: Vec<_> = files(folder).into_iter().map(|path| (fs::read(&path).unwrap(), path)).collect();
    assert_eq!(kept.len(), 2, "machine code, which the stand-in refuses, and PTX");
    for (whole, path) in &kept {
        fs::write(path, &whole[..whole.len() / 2]).unwrap();
    }
    run();
    assert!(kept.iter().all(|(whole, path)| fs::read(path).unwrap() == *whole), "the same compiler writes the same");
    let written = |path: &PathBuf| fs::metadata(path).unwrap().modified().unwrap();
    let before: Vec<_> = kept.iter().map(|(_, path)| written(path)).collect();
    run();
    assert_eq!(before, kept.iter().map(|(_, path)| written(path)).collect::<Vec<_>>(), "whole files are read");
}

fn unwritable_cache(start: Start<'_>, folder: &Path) {
    let file = folder.join("file");
    fs::write(&file, "").unwrap();
    succeed(start(&[driver_folder()]).env(CACHE_VARIABLE, file.join("below a file")));
}

fn shared_cache(start: Start<'_>, folder: &Path) {
    let begin = |_| start(&[driver_folder()]).env(CACHE_VARIABLE, folder).spawn().unwrap();
    let processes: Vec<_> = (0..4).map(begin).collect();
    for mut process in processes {
        assert!(process.wait().unwrap().success());
    }
    assert_eq!(files(folder).len(), 2, "no temporary file is left");
}
