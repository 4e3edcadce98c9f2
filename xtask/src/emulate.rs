//! Runs tests on instruction sets that this machine's processor lacks.
//!
//! A kernel that only compiles is untested, and few machines have both AVX-512 with BF16 and NEON. Emulators do:
//!
//! - [`neon`] cross-compiles for 64-bit Arm and runs the tests under user-mode QEMU.
//! - [`avx512`] boots a Linux kernel in Bochs, the one free emulator of AVX-512 and its BF16 dot product, with the test
//!   executable as the only program. QEMU stops at AVX2.
//!
//! All tools come from Debian, through `apt-get` with lists of its own, and are unpacked below `target/emulate` (see
//! [`home`]). Nothing is installed, so neither root nor a change to the system's packages is needed, and the `rustc` in
//! PATH stays the one in use elsewhere. The first run downloads (and, for Bochs, compiles); later ones start at once.

pub(crate) mod apt;
mod guest;

use std::ffi::OsStr;
use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail, ensure};

use apt::{Apt, unpack, unpack_files};
use guest::{Kernel, bochs, boot, guest_tools, initrd};

/// The Debian release that the ready-made programs are taken from: its C library is old enough for most machines.
const RELEASE: &str = "bookworm";

/// The Debian release whose Bochs is compiled here: the earlier ones have AVX-512 without BF16.
const BOCHS_RELEASE: &str = "trixie";

/// The Bochs source, whose digest is pinned since it is patched by exact text.
const BOCHS_ARCHIVE: &str = "bochs_3.0+dfsg.orig.tar.xz";
const BOCHS_SHA256: &str = "78f6c73d4a6472d5130a87ab9dc306d02c7c71ed8e25b3a8ef642e2a7acd282b";

/// Emulated instructions for each second of the guest's clock.
///
/// Low, so that a character on the emulated serial line, which takes 87 µs of that clock, costs few instructions; high
/// enough that the guest's 250 timer interrupts a second stay cheap.
const GUEST_HZ: u64 = 50_000_000;

/// The guest's memory in MiB. The host pays only for what the guest touches.
const GUEST_MEMORY_MIB: u64 = 2048;

/// How long one run in the emulator may take, unless `TILEFOLD_EMULATE_TIMEOUT` has another number of seconds.
const TIMEOUT_SECONDS: u64 = 3600;

/// What the guest writes before the test's exit status, and nothing else does.
const EXIT_MARK: &str = "@@tilefold-guest-exit ";

/// Host variables that the guest's test gets too, by their start.
const PASSED_ON: [&str; 5] = ["RUST_", "TILEFOLD_", "PROPTEST_", "RAYON_", "INSTA_"];

const TRIPLE: &str = "aarch64-unknown-linux-gnu";

/// Runs `cargo test` for 64-bit Arm with NEON under QEMU.
///
/// `args` is what follows `cargo test`, e.g. `["-p", "tilefold-backend-cpu", "--lib", "--", "--test-threads=2"]`.
///
/// The compiler is Debian's, since it brings a standard library for Arm that no rustup download is needed for; the
/// cargo in PATH drives it. The tests are linked statically and so need no Arm root file system.
///
/// # Errors
///
/// When a tool is missing and cannot be downloaded, or when the build or a test fails.
pub(crate) fn neon(args: &[&str]) -> Result<()> {
    let home = home()?;
    let root = {
        let _lock = lock(&home)?;
        arm_tools(&home)?
    };
    let cargo = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    let mut command = Command::new(cargo);
    command
        .args(["test", "--target", TRIPLE])
        .args(args)
        .env("RUSTC", root.join("rustc.sh"))
        .env("CARGO_TARGET_DIR", target_dir()?.join("aarch64"))
        .env("CARGO_TARGET_AARCH64_UNKNOWN_LINUX_GNU_LINKER", root.join("cc.sh"))
        .env("CARGO_TARGET_AARCH64_UNKNOWN_LINUX_GNU_RUNNER", root.join("usr/bin/qemu-aarch64-static"))
        .env("CARGO_TARGET_AARCH64_UNKNOWN_LINUX_GNU_RUSTFLAGS", "-C target-feature=+crt-static")
        // These would take the place of the flags above, or name a component for another compiler.
        .env_remove("RUSTFLAGS")
        .env_remove("CARGO_ENCODED_RUSTFLAGS")
        .env_remove("RUSTC_WRAPPER")
        .env_remove("RUSTC_WORKSPACE_WRAPPER");
    let status = command.status().context("cannot start cargo")?;
    ensure!(status.success(), "cargo test for {TRIPLE} failed: {status}");
    Ok(())
}

/// Runs a test executable of this machine's own target on an emulated processor with AVX-512 and BF16.
///
/// The executable and the shared libraries that it names become the guest's whole file system: tests that read other
/// files, start other programs or use the network fail there. The guest has one core. Its output is passed on as it
/// comes; environment variables that start with `RUST_`, `TILEFOLD_`, `PROPTEST_`, `RAYON_` or `INSTA_` are too.
///
/// # Errors
///
/// When a tool is missing and cannot be had, when the guest stops before the test does, or when the test fails.
pub(crate) fn avx512(test_binary: &Path, args: &[&str]) -> Result<()> {
    ensure!(cfg!(all(target_arch = "x86_64", target_os = "linux")), "AVX-512 tests are emulated on x86-64 Linux only");
    let home = home()?;
    let (bochs, kernel, busybox) = {
        let _lock = lock(&home)?;
        let (kernel, busybox) = guest_tools(&home)?;
        (bochs(&home)?, kernel, busybox)
    };
    // One folder for each run, so that runs side by side do not meet.
    let folder = Scratch::new(home.join(format!("run-{}", std::process::id())))?;
    let kernel = Kernel::read(&kernel)?;
    let initrd = initrd(&busybox, test_binary, args, &folder.0)?;
    boot(&bochs, &kernel, &initrd, &folder.0)
}

// ---------------------------------------------------------------------------------------------------------------------
// Where things are kept

/// The workspace's build folder.
fn target_dir() -> Result<PathBuf> {
    if let Some(chosen) = std::env::var_os("CARGO_TARGET_DIR") {
        return std::path::absolute(chosen).context("CARGO_TARGET_DIR");
    }
    let workspace = Path::new(env!("CARGO_MANIFEST_DIR")).parent().context("xtask has no parent folder")?;
    Ok(workspace.join("target"))
}

/// Where the tools are kept: `TILEFOLD_EMULATE_DIR`, for a cache that outlives `cargo clean`, or `target/emulate`.
fn home() -> Result<PathBuf> {
    let home = match std::env::var_os("TILEFOLD_EMULATE_DIR") {
        Some(chosen) => std::path::absolute(chosen).context("TILEFOLD_EMULATE_DIR")?,
        None => target_dir()?.join("emulate"),
    };
    fs::create_dir_all(&home).with_context(|| format!("cannot create {}", home.display()))?;
    Ok(home)
}

/// Keeps a second run from setting up at the same time, until dropped.
fn lock(home: &Path) -> Result<File> {
    let path = home.join("lock");
    let file = File::create(&path).with_context(|| format!("cannot create {}", path.display()))?;
    file.lock().with_context(|| format!("cannot lock {}", path.display()))?;
    Ok(file)
}

/// A folder that goes when it is dropped.
struct Scratch(PathBuf);

impl Scratch {
    fn new(path: PathBuf) -> Result<Self> {
        if path.exists() {
            fs::remove_dir_all(&path).with_context(|| format!("cannot remove {}", path.display()))?;
        }
        fs::create_dir_all(&path).with_context(|| format!("cannot create {}", path.display()))?;
        Ok(Self(path))
    }

    /// Gives the finished folder its lasting name: a set-up that was cut short leaves nothing that looks complete.
    fn keep(self, name: &Path) -> Result<()> {
        fs::rename(&self.0, name).with_context(|| format!("cannot rename {} to {}", self.0.display(), name.display()))
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        // Best effort: what is left is removed before the next use of the name.
        _ = fs::remove_dir_all(&self.0);
    }
}

// ---------------------------------------------------------------------------------------------------------------------
// Debian packages

/// Debian's Rust compiler with a standard library for Arm, a linker and QEMU.
fn arm_tools(home: &Path) -> Result<PathBuf> {
    let root = home.join("aarch64");
    if root.join("cc.sh").exists() {
        return Ok(root);
    }
    let apt = Apt::open(home)?;
    let new = Scratch::new(home.join("aarch64.new"))?;
    let debs = Scratch::new(home.join("aarch64.debs"))?;
    // The library package has the compiler's release in its name, and LLVM's has LLVM's.
    let driver = apt.depends_on("libstd-rust-web-dev", "libstd-rust-web-")?;
    let llvm = apt.depends_on(&driver, "libllvm")?;
    let mut packages = apt.closure(&llvm)?;
    packages.push(driver);
    packages.extend(
        [
            "rustc-web",
            // For build scripts and procedural macros, then for the tests.
            "libstd-rust-web-dev",
            "libstd-rust-web-dev:arm64",
            "gcc-12-aarch64-linux-gnu",
            "binutils-aarch64-linux-gnu",
            "libgcc-12-dev-arm64-cross",
            "libgcc-s1-arm64-cross",
            "libc6-arm64-cross",
            "libc6-dev-arm64-cross",
        ]
        .map(str::to_owned),
    );
    apt.download(&packages, &debs.0)?;
    say("unpacking the compiler for Arm");
    unpack(&debs.0, &new.0)?;
    drop(debs);

    // Of this large package, one of many emulators is needed.
    let debs = Scratch::new(home.join("aarch64.debs"))?;
    apt.download(&["qemu-user-static".to_owned()], &debs.0)?;
    for package in files(&debs.0)? {
        unpack_files(&package, &new.0, &["./usr/bin/qemu-aarch64-static"])?;
    }

    // The compilers find their own files relative to where they are; their libraries need to be told.
    let shell = |path: &str| quote(&root.join(path).display().to_string());
    let libraries = shell("usr/lib/x86_64-linux-gnu");
    let script = |program: &str| {
        format!(
            "#!/bin/sh\nLD_LIBRARY_PATH={libraries}${{LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}} \\\n    exec {} \"$@\"\n",
            shell(program)
        )
    };
    executable(&new.0.join("rustc.sh"), &script("usr/bin/rustc"))?;
    executable(&new.0.join("cc.sh"), &script("usr/bin/aarch64-linux-gnu-gcc-12"))?;
    if root.exists() {
        fs::remove_dir_all(&root).with_context(|| format!("cannot remove {}", root.display()))?;
    }
    new.keep(&root)?;
    let version = run(Command::new(root.join("rustc.sh")).arg("--version"))
        .context("Debian's rustc does not start on this machine");
    if version.is_err() {
        _ = fs::remove_dir_all(&root);
    }
    say(&format!("tests for Arm are compiled by {}", version?.trim()));
    Ok(root)
}

/// Runs a program quietly: its standard output is the result, and all of its output is shown if it fails.
fn run(command: &mut Command) -> Result<String> {
    let spelt = format!("{command:?}");
    let output = command.stderr(Stdio::piped()).output().with_context(|| format!("cannot start {spelt}"))?;
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    if !output.status.success() {
        let errors = String::from_utf8_lossy(&output.stderr);
        let shown: Vec<&str> = text.lines().chain(errors.lines()).collect();
        let (_, last) = shown.split_at(shown.len().saturating_sub(20));
        bail!("{spelt}: {}\n{}", output.status, last.join("\n"));
    }
    Ok(text)
}

/// Whether a program can be started.
fn works(program: impl AsRef<OsStr>, argument: &str) -> bool {
    Command::new(program).arg(argument).stdout(Stdio::null()).stderr(Stdio::null()).status().is_ok()
}

/// Tells what takes a while.
fn say(what: &str) {
    eprintln!("emulate: {what}");
}

/// Quotes text for a POSIX shell.
fn quote(text: &str) -> String {
    format!("'{}'", text.replace('\'', r"'\''"))
}

fn write(path: &Path, contents: impl AsRef<[u8]>) -> Result<()> {
    fs::write(path, contents).with_context(|| format!("cannot write {}", path.display()))
}

fn copy(from: &Path, to: &Path) -> Result<()> {
    fs::copy(from, to).map(drop).with_context(|| format!("cannot copy {} to {}", from.display(), to.display()))
}

fn executable(path: &Path, script: &str) -> Result<()> {
    write(path, script)?;
    run(Command::new("chmod").arg("+x").arg(path)).map(drop)
}

/// The files in a folder.
fn files(folder: &Path) -> Result<Vec<PathBuf>> {
    let failed = || format!("cannot read the folder {}", folder.display());
    let mut paths = Vec::new();
    for entry in fs::read_dir(folder).with_context(failed)? {
        paths.push(entry.with_context(failed)?.path());
    }
    Ok(paths)
}
