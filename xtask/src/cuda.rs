//! The CUDA compilers and disassemblers, fetched as wheels from PyPI into the build folder.
//!
//! Nothing is installed: the files of a wheel are unpacked into a folder of their own below
//! [`tilefold_emulator_nvrtc::cuda_folder`], with a file that names the version. Digests are pinned, since what comes is
//! loaded into the tests' processes.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail, ensure};
use tilefold_emulator_nvrtc::{Release, cuda_folder};

use crate::command::{output, run, succeeds};
use crate::report::Count;
use crate::setup;

/// A package on PyPI, by version and digest of its wheel for x86-64 Linux.
struct Wheel {
    package: &'static str,
    version: &'static str,
    sha256: &'static str,
}

const NVRTC_NEWEST: Wheel = Wheel {
    package: "nvidia-cuda-nvrtc",
    version: "13.5.37",
    sha256: "86b4d68058807988b7d9af5b44917a0601e9c337f35ccd657bfb3c759ff8d8bc",
};
const NVRTC_OLDEST: Wheel = Wheel {
    package: "nvidia-cuda-nvrtc-cu12",
    version: "12.0.140",
    sha256: "8e94e991d85c422de4da87bdc7472fdc1364367bd4aace7000b559cd33122071",
};
const NVDISASM: Wheel = Wheel {
    package: "nvidia-cuda-nvdisasm",
    version: "13.5.37",
    sha256: "d3fdbdd49fa53e2e4aacd3db8259d052bd2b049ececdcb69e92e083c6728e7ca",
};
const CUOBJDUMP: Wheel = Wheel {
    package: "nvidia-cuda-cuobjdump",
    version: "13.5.37",
    sha256: "38780fee50863252a0b8926357faa91615ca1c8346490563f33a06100cd73f58",
};

/// Whether the wheels fit this machine.
pub(crate) const SUPPORTED: bool = cfg!(all(target_os = "linux", target_arch = "x86_64"));

/// Fetches what is missing of both NVRTC releases, nvdisasm and cuobjdump.
pub(crate) fn fetch() -> Result<Count> {
    ensure!(SUPPORTED, "the CUDA tools are fetched for x86-64 Linux only");
    let home = cuda_folder();
    let sets = [
        (Release::Newest.folder(), &[NVRTC_NEWEST] as &[Wheel]),
        (Release::Oldest.folder(), &[NVRTC_OLDEST]),
        ("tools", &[NVDISASM, CUOBJDUMP]),
    ];
    for (name, wheels) in sets {
        fetch_set(&home.join(name), wheels)?;
    }
    Ok(Count::one())
}

/// The file in a finished folder that says what it holds.
const VERSIONS: &str = "versions";

fn fetch_set(folder: &Path, wheels: &[Wheel]) -> Result<()> {
    let wanted: String = wheels.iter().map(Wheel::requirement).collect();
    let named =
        wheels.iter().map(|wheel| format!("{} {}", wheel.package, wheel.version)).collect::<Vec<_>>().join(", ");
    if fs::read_to_string(folder.join(VERSIONS)).is_ok_and(|found| found == wanted) {
        println!("{named}: there");
        return Ok(());
    }
    println!("{named}: fetching into {}", folder.display());
    pip()?;
    // Complete before it has its name: a fetch that was cut short, or runs twice at once, leaves nothing half done.
    let new = folder.with_extension(format!("new-{}", std::process::id()));
    remove(&new)?;
    fs::create_dir_all(&new).with_context(|| format!("cannot make {}", new.display()))?;
    let fetched = fill(&new, &wanted).and_then(|()| {
        remove(folder)?;
        fs::rename(&new, folder).with_context(|| format!("cannot rename {} to {}", new.display(), folder.display()))
    });
    remove(&new)?;
    fetched.with_context(|| format!("cannot fetch {named}"))
}

impl Wheel {
    /// The line of a requirements file that asks for just this wheel.
    fn requirement(&self) -> String {
        format!("{}=={} --hash=sha256:{}\n", self.package, self.version, self.sha256)
    }
}

/// Downloads wheels and puts their libraries and programs into `folder`.
fn fill(folder: &Path, requirements: &str) -> Result<()> {
    let list = folder.join("requirements.txt");
    fs::write(&list, requirements).with_context(|| format!("cannot write {}", list.display()))?;
    let (wheels, unpacked) = (folder.join("wheels"), folder.join("unpacked"));
    let pip = ["python3", "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"];
    let choice =
        ["--only-binary", ":all:", "--require-hashes", "--dest", text(&wheels)?, "--requirement", text(&list)?];
    run(&[], &[&pip[..], &choice].concat())?;
    for wheel in entries(&wheels)? {
        output(&["python3", "-m", "zipfile", "-e", text(&wheel)?, text(&unpacked)?])?;
    }
    take(&unpacked, folder)?;
    remove(&wheels)?;
    remove(&unpacked)?;
    fs::rename(&list, folder.join(VERSIONS)).context("cannot rename the requirements")
}

/// Moves the files of all `lib` and `bin` folders; a wheel does not say which files are programs.
fn take(from: &Path, to: &Path) -> Result<()> {
    for entry in entries(from)? {
        if !entry.is_dir() {
            continue;
        }
        let program = entry.ends_with("bin");
        if !program && !entry.ends_with("lib") {
            take(&entry, to)?;
            continue;
        }
        for file in entries(&entry)? {
            if file.extension().is_some_and(|extension| extension == "py") {
                continue;
            }
            let name = file.file_name().context("a file without a name")?;
            let place = to.join(name);
            fs::rename(&file, &place).with_context(|| format!("cannot move {}", file.display()))?;
            if program {
                output(&["chmod", "+x", text(&place)?])?;
            }
        }
    }
    Ok(())
}

fn pip() -> Result<()> {
    if !succeeds(&["python3", "-m", "pip", "--version"]) {
        setup::programs(&[("pip3", "python3-pip")])?;
    }
    Ok(())
}

/// What is in a folder, in order of names.
fn entries(folder: &Path) -> Result<Vec<PathBuf>> {
    let listed = fs::read_dir(folder).with_context(|| format!("cannot list {}", folder.display()))?;
    let mut paths = listed.map(|entry| entry.map(|entry| entry.path())).collect::<Result<Vec<_>, _>>()?;
    paths.sort();
    Ok(paths)
}

fn remove(folder: &Path) -> Result<()> {
    match fs::remove_dir_all(folder) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
            bail!("cannot remove {}: {error}", folder.display())
        }
        _ => Ok(()),
    }
}

fn text(path: &Path) -> Result<&str> {
    path.to_str().with_context(|| format!("{} is no text", path.display()))
}
