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

use std::ffi::OsStr;
use std::fs::{self, File};
use std::io::{Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};

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

/// `apt-get` with package lists and settings of its own.
struct Apt {
    config: PathBuf,
}

impl Apt {
    /// Writes the settings and fetches the package lists, from the mirror that the system's own apt uses.
    fn open(home: &Path) -> Result<Self> {
        for tool in ["apt-get", "apt-cache", "dpkg-deb"] {
            if !works(tool, "--version") {
                bail!("{tool} not found: the emulators come from Debian packages, so this needs Debian or a kin of it");
            }
        }
        let apt = home.join("apt");
        for folder in ["lists/partial", "cache/archives/partial", "parts"] {
            let path = apt.join(folder);
            fs::create_dir_all(&path).with_context(|| format!("cannot create {}", path.display()))?;
        }
        let config = apt.join("apt.conf");
        let at = |name: &str| apt.join(name).display().to_string();
        let settings = [
            format!("Dir::State::lists \"{}\";", at("lists")),
            format!("Dir::Cache \"{}\";", at("cache")),
            format!("Dir::Etc::sourcelist \"{}\";", at("sources.list")),
            format!("Dir::Etc::sourceparts \"{}\";", at("parts")),
            "APT::Architectures { \"amd64\"; \"arm64\"; };".to_owned(),
            // As root, apt would download as a user who may not be able to write here.
            "APT::Sandbox::User \"\";".to_owned(),
            "Acquire::Languages \"none\";".to_owned(),
            "Acquire::Retries \"3\";".to_owned(),
            "Acquire::IndexTargets::deb::DEP-11::DefaultEnabled \"false\";".to_owned(),
        ];
        write(&config, settings.join("\n") + "\n")?;
        write(&apt.join("sources.list"), sources()?)?;
        let lists = Self { config };
        // Two set-ups in a row need not fetch them twice.
        let stamp = apt.join("fetched");
        let age = fs::metadata(&stamp).and_then(|meta| meta.modified()).ok().and_then(|at| at.elapsed().ok());
        if age.is_none_or(|age| age > Duration::from_secs(3600)) {
            say("fetching Debian's package lists");
            run(lists.command("apt-get").args(["update", "--error-on=any", "-q"]))?;
            write(&stamp, "")?;
        }
        Ok(lists)
    }

    fn command(&self, tool: &str) -> Command {
        let mut command = Command::new(tool);
        command.env("APT_CONFIG", &self.config).env("LC_ALL", "C");
        command
    }

    /// Downloads packages into a folder; apt checks them against the signed lists.
    fn download(&self, packages: &[String], folder: &Path) -> Result<()> {
        say(&format!("downloading {}", packages.join(" ")));
        run(self.command("apt-get").current_dir(folder).args(["download", "-q"]).args(packages))
            .with_context(|| format!("cannot download {}", packages.join(" ")))?;
        Ok(())
    }

    /// The names of the packages that one depends on directly, those on a list of alternatives included.
    fn depends(&self, package: &str) -> Result<Vec<String>> {
        let lines = run(self.command("apt-cache").args(["depends", "--important", package]))?;
        Ok(lines.lines().filter_map(|line| line.trim().strip_prefix("Depends: ")).map(str::to_owned).collect())
    }

    /// The one direct dependency whose name starts so: a package whose name has a version in it.
    fn depends_on(&self, package: &str, start: &str) -> Result<String> {
        self.depends(package)?
            .into_iter()
            .find(|name| name.starts_with(start))
            .with_context(|| format!("{package} no longer depends on a {start}* package"))
    }

    /// A package and all that it needs, less what every machine with a compiler has in its own version.
    fn closure(&self, package: &str) -> Result<Vec<String>> {
        const HOST: [&str; 4] = ["libc6", "libgcc-s1", "libstdc++6", "gcc-12-base"];
        let lines = run(self.command("apt-cache").args(["depends", "--important", "--recurse", package]))?;
        Ok(lines
            .lines()
            .filter(|line| line.starts_with(|first: char| first.is_ascii_alphanumeric()) && !line.contains(':'))
            .filter(|name| !HOST.contains(name))
            .map(str::to_owned)
            .collect())
    }
}

/// The package sources, from where the system takes its own.
fn sources() -> Result<String> {
    let format = "$(REPO_URI)";
    let known = run(Command::new("apt-get").args(["indextargets", "--format", format, "Identifier: Packages"]))?;
    let mirror = |name: &str| known.lines().map(|uri| uri.trim_end_matches('/')).find(|uri| uri.ends_with(name));
    let main = mirror("/debian").context("apt knows no Debian mirror (a source whose address ends in /debian)")?;
    let keyring = "/usr/share/keyrings/debian-archive-keyring.gpg";
    let signed = if Path::new(keyring).exists() { format!(" [signed-by={keyring}]") } else { String::new() };
    let mut sources = format!("deb{signed} {main} {RELEASE} main\ndeb-src{signed} {main} {BOCHS_RELEASE} main\n");
    if let Some(security) = mirror("/debian-security") {
        sources += &format!("deb{signed} {security} {RELEASE}-security main\n");
    }
    Ok(sources)
}

/// Unpacks all packages in a folder into a root, without installing them.
fn unpack(packages: &Path, root: &Path) -> Result<()> {
    for package in files(packages)? {
        run(Command::new("dpkg-deb").arg("--extract").arg(&package).arg(root))?;
    }
    Ok(())
}

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
        let mut archive = Command::new("dpkg-deb")
            .arg("--fsys-tarfile")
            .arg(&package)
            .stdout(Stdio::piped())
            .spawn()
            .context("cannot start dpkg-deb")?;
        let stream = archive.stdout.take().context("dpkg-deb has no output")?;
        let mut tar = Command::new("tar");
        tar.arg("-xC").arg(&new.0).arg("./usr/bin/qemu-aarch64-static").stdin(stream);
        run(&mut tar)?;
        archive.wait().context("dpkg-deb")?;
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

/// A Linux kernel, and a BusyBox for the guest's few commands.
///
/// The cloud kernel has a serial console built in and little else to start up.
fn guest_tools(home: &Path) -> Result<(PathBuf, PathBuf)> {
    let root = home.join("guest");
    let found = (root.join("vmlinuz"), root.join("busybox"));
    if root.exists() {
        return Ok(found);
    }
    let apt = Apt::open(home)?;
    let new = Scratch::new(home.join("guest.new"))?;
    let debs = Scratch::new(home.join("guest.debs"))?;
    let kernel = apt.depends_on("linux-image-cloud-amd64:amd64", "linux-image-")?;
    apt.download(&[format!("{kernel}:amd64"), "busybox-static:amd64".to_owned()], &debs.0)?;
    let unpacked = Scratch::new(home.join("guest.unpacked"))?;
    unpack(&debs.0, &unpacked.0)?;
    let kernel = files(&unpacked.0.join("boot"))?
        .into_iter()
        .find(|path| path.file_name().is_some_and(|name| name.as_encoded_bytes().starts_with(b"vmlinuz-")))
        .context("the kernel package has no kernel in it")?;
    copy(&kernel, &new.0.join("vmlinuz"))?;
    copy(&unpacked.0.join("bin/busybox"), &new.0.join("busybox"))?;
    new.keep(&root)?;
    Ok(found)
}

// ---------------------------------------------------------------------------------------------------------------------
// Bochs

/// Compiles Bochs, and returns the program.
///
/// Debian's own build would do, but it has the debugger compiled in, which more than halves its speed, wants a terminal
/// or a window, and converts the upper half of a `vcvtne2ps2bf16` wrongly.
fn bochs(home: &Path) -> Result<PathBuf> {
    let program = home.join("bochs-3.0");
    if program.exists() {
        return Ok(program);
    }
    for (tool, package) in [("g++", "g++"), ("make", "make"), ("tar", "tar"), ("xz", "xz-utils")] {
        ensure!(works(tool, "--version"), "{tool} not found, which compiles Bochs: apt-get install {package}");
    }
    let apt = Apt::open(home)?;
    let folder = Scratch::new(home.join("bochs.new"))?;
    say("downloading the source of Bochs");
    // Only the archive counts, so a mirror without the description that goes with it will do. The digest decides.
    let fetched = run(apt.command("apt-get").current_dir(&folder.0).args([
        "source",
        "--download-only",
        "--only-source",
        "-q",
        &format!("bochs/{BOCHS_RELEASE}"),
    ]));
    let archive = folder.0.join(BOCHS_ARCHIVE);
    if !archive.exists() {
        fetched?;
        bail!("Debian {BOCHS_RELEASE} no longer has {BOCHS_ARCHIVE}");
    }
    let digest = run(Command::new("sha256sum").arg(&archive))?;
    ensure!(digest.starts_with(BOCHS_SHA256), "{BOCHS_ARCHIVE} is not the file expected: its SHA-256 is {digest}");
    run(Command::new("tar").arg("-xf").arg(&archive).arg("-C").arg(&folder.0))?;
    let source = folder.0.join("bochs-3.0");
    // The second source's elements go to the upper half of the result, but are numbered from zero.
    patch(
        &source.join("cpu/avx/avx512_bf16.cc"),
        "dst.vmm16u(n) = convert_ne_fp32_to_bfloat16(op1.vmm32u(n));",
        "dst.vmm16u(n) = convert_ne_fp32_to_bfloat16(op1.vmm32u(n - DWORD_ELEMENTS(len)));",
    )?;
    say("compiling Bochs: some minutes, once");
    run(Command::new("./configure").current_dir(&source).env("CFLAGS", "-O2 -w").env("CXXFLAGS", "-O2 -w").args([
        "--with-nogui",
        "--enable-x86-64",
        "--enable-cpu-level=6",
        "--enable-fpu",
        "--enable-avx",
        "--enable-evex",
        "--enable-all-optimizations",
        "--disable-plugins",
        "--disable-docbook",
        "--disable-large-ramfile",
        "--disable-show-ips",
    ]))?;
    let jobs = std::thread::available_parallelism().map_or(1, usize::from);
    run(Command::new("make").current_dir(&source).arg(format!("-j{jobs}")))?;
    // A rename is atomic: the program is there whole or not at all.
    let built = source.join("bochs");
    fs::rename(&built, &program).with_context(|| format!("the build of Bochs left no {}", built.display()))?;
    Ok(program)
}

/// Replaces text that must be there exactly once.
fn patch(path: &Path, old: &str, new: &str) -> Result<()> {
    let text = fs::read_to_string(path).with_context(|| format!("cannot read {}", path.display()))?;
    ensure!(text.matches(old).count() == 1, "{} has changed: the patch no longer applies", path.display());
    write(path, text.replace(old, new))
}

// ---------------------------------------------------------------------------------------------------------------------
// The guest

/// A kernel image in Linux's boot format.
struct Kernel {
    /// The header that a boot loader passes back to the kernel.
    header: Vec<u8>,
    /// The code that runs in protected mode.
    code: Vec<u8>,
}

/// Where in the boot parameters, and in the image, the header starts.
const HEADER: usize = 0x1f1;

impl Kernel {
    fn read(path: &Path) -> Result<Self> {
        let image = fs::read(path).with_context(|| format!("cannot read {}", path.display()))?;
        let byte = |at: usize| image.get(at).copied().map(usize::from).context("the kernel image is cut short");
        ensure!(image.get(0x202..0x206) == Some(b"HdrS"), "{} is no Linux kernel", path.display());
        let setup_sectors = match byte(HEADER)? {
            0 => 4,
            sectors => sectors,
        };
        let header = image.get(HEADER..0x202 + byte(0x201)?).context("the kernel image is cut short")?.to_vec();
        let code = image.get((setup_sectors + 1) * 512..).context("the kernel image is cut short")?.to_vec();
        Ok(Self { header, code })
    }
}

/// The guest's file system, as a `cpio` archive.
#[derive(Default)]
struct Archive {
    bytes: Vec<u8>,
    entries: usize,
}

impl Archive {
    fn entry(&mut self, name: &str, mode: u32, data: &[u8]) {
        self.entries += 1;
        let fields = [self.entries, mode as usize, 0, 0, 1, 0, data.len(), 0, 0, 0, 0, name.len() + 1, 0];
        self.bytes.extend_from_slice(b"070701");
        for field in fields {
            self.bytes.extend_from_slice(format!("{field:08x}").as_bytes());
        }
        self.bytes.extend_from_slice(name.as_bytes());
        self.bytes.push(0);
        self.pad();
        self.bytes.extend_from_slice(data);
        self.pad();
    }

    fn pad(&mut self) {
        self.bytes.resize(self.bytes.len().next_multiple_of(4), 0);
    }

    fn folder(&mut self, name: &str) {
        self.entry(name, 0o40_755, &[]);
    }

    fn program(&mut self, name: &str, path: &Path) -> Result<()> {
        let data = fs::read(path).with_context(|| format!("cannot read {}", path.display()))?;
        self.entry(name, 0o100_755, &data);
        Ok(())
    }
}

/// Makes the guest's file system: the test, its libraries, and a script that runs it as the first program.
fn initrd(busybox: &Path, test: &Path, args: &[&str], folder: &Path) -> Result<Vec<u8>> {
    let mut archive = Archive::default();
    for name in ["dev", "proc", "sys", "tmp"] {
        archive.folder(name);
    }
    archive.program("busybox", busybox)?;

    let libraries = run(Command::new("ldd").arg(test).env("LC_ALL", "C"));
    let mut folders = Vec::new();
    // A static executable is no failure, though ldd exits with one.
    for line in libraries.as_deref().unwrap_or_default().lines() {
        ensure!(!line.contains("not found"), "{} lacks a library: {}", test.display(), line.trim());
        let Some(path) = line.split_whitespace().find(|word| word.starts_with('/')) else { continue };
        let name = path.trim_start_matches('/');
        for (at, _) in name.match_indices('/') {
            let parent = name.split_at(at).0.to_owned();
            if !folders.contains(&parent) {
                archive.folder(&parent);
                folders.push(parent);
            }
        }
        archive.program(name, Path::new(path))?;
    }

    // Debug information is most of a test executable, and finding places in it is slow in the guest.
    let stripped = folder.join("test");
    let strip = run(Command::new("strip").arg("--strip-debug").arg("-o").arg(&stripped).arg(test));
    archive.program("test", if strip.is_ok() { &stripped } else { test })?;

    let mut exports = String::new();
    for (name, value) in std::env::vars() {
        if PASSED_ON.iter().any(|start| name.starts_with(start)) {
            exports += &format!("export {name}={}\n", quote(&value));
        }
    }
    let args = args.iter().map(|arg| quote(arg)).collect::<Vec<_>>().join(" ");
    // The tests' output goes to the second serial line, which is a file on the host; the kernel's goes to the first.
    // Changing a line's settings waits until it has sent everything.
    let init = format!(
        "#!/busybox sh
/busybox mount -t devtmpfs dev /dev
/busybox mount -t proc proc /proc
/busybox mount -t sysfs sys /sys
/busybox stty -F /dev/ttyS1 raw 115200
export TMPDIR=/tmp HOME=/tmp
{exports}cd /tmp
/test {args} < /dev/null > /dev/ttyS1 2>&1
printf '\\n%s%s\\n' '{EXIT_MARK}' \"$?\" > /dev/ttyS1
/busybox stty -F /dev/ttyS1 sane
/busybox reboot -f
"
    );
    archive.entry("init", 0o100_755, init.as_bytes());
    archive.entry("TRAILER!!!", 0, &[]);
    Ok(archive.bytes)
}

/// What stands in for a BIOS and a boot loader, in 182 bytes: it enters protected mode, copies the rows of a table from
/// the first disk to memory, and enters the kernel by Linux's 32-bit boot protocol. It spares the guest a real BIOS's
/// start-up and spares this file a boot loader's installation.
///
/// ```text
///         cli
///         lgdtl   %cs:gdtr                # a flat code (0x10) and data (0x18) segment
///         movl    $0x11, %eax
///         movl    %eax, %cr0
///         ljmpl   $0x10, $1f
/// 1:      movl    $0x18, %eax
///         movl    %eax, %ds
///         movl    %eax, %es
///         movl    %eax, %ss
///         movl    $table, %ebp            # rows of: address, first sector, number of sectors
///         cld
/// row:    movl    (%ebp), %edi
///         movl    4(%ebp), %ebx
///         movl    8(%ebp), %esi
///         testl   %esi, %esi
///         jz      done
/// sector: movl    $0x1f7, %edx
/// 2:      inb     %dx, %al
///         testb   $0x80, %al              # the disk is busy
///         jnz     2b
///         movl    $0x1f2, %edx            # one sector, then its number's four bytes
///         movb    $1, %al
///         outb    %al, %dx
///         movl    %ebx, %eax
///         incl    %edx
///         outb    %al, %dx
///         shrl    $8, %eax
///         incl    %edx
///         outb    %al, %dx
///         shrl    $8, %eax
///         incl    %edx
///         outb    %al, %dx
///         shrl    $8, %eax
///         orb     $0xe0, %al
///         incl    %edx
///         outb    %al, %dx
///         incl    %edx
///         movb    $0x20, %al              # read
///         outb    %al, %dx
/// 3:      inb     %dx, %al
///         testb   $0x08, %al              # data is there
///         jz      3b
///         movl    $0x1f0, %edx
///         movl    $256, %ecx
///         rep insw
///         incl    %ebx
///         decl    %esi
///         jnz     sector
///         addl    $12, %ebp
///         jmp     row
/// done:   movl    %edi, %esi              # the last row: the boot parameters' address and the kernel's entry
///         xorl    %edi, %edi
///         xorl    %ebx, %ebx
///         movl    4(%ebp), %eax
///         xorl    %ebp, %ebp
///         jmp     *%eax
///         .balign 8
/// gdt:    .quad   0, 0, 0x00cf9a000000ffff, 0x00cf92000000ffff
/// gdtr:   .word   31
///         .long   gdt
/// ```
#[rustfmt::skip]
const LOADER: [u8; 182] = [
    0xfa, 0x2e, 0x66, 0x0f, 0x01, 0x16, 0xb0, 0xf0, 0x66, 0xb8, 0x11, 0x00, 0x00, 0x00, 0x0f, 0x22, 0xc0, 0x66, 0xea,
    0x19, 0xf0, 0xff, 0xff, 0x10, 0x00, 0xb8, 0x18, 0x00, 0x00, 0x00, 0x8e, 0xd8, 0x8e, 0xc0, 0x8e, 0xd0, 0xbd, 0x00,
    0xf8, 0xff, 0xff, 0xfc, 0x8b, 0x7d, 0x00, 0x8b, 0x5d, 0x04, 0x8b, 0x75, 0x08, 0x85, 0xf6, 0x74, 0x46, 0xba, 0xf7,
    0x01, 0x00, 0x00, 0xec, 0xa8, 0x80, 0x75, 0xfb, 0xba, 0xf2, 0x01, 0x00, 0x00, 0xb0, 0x01, 0xee, 0x89, 0xd8, 0x42,
    0xee, 0xc1, 0xe8, 0x08, 0x42, 0xee, 0xc1, 0xe8, 0x08, 0x42, 0xee, 0xc1, 0xe8, 0x08, 0x0c, 0xe0, 0x42, 0xee, 0x42,
    0xb0, 0x20, 0xee, 0xec, 0xa8, 0x08, 0x74, 0xfb, 0xba, 0xf0, 0x01, 0x00, 0x00, 0xb9, 0x00, 0x01, 0x00, 0x00, 0x66,
    0xf3, 0x6d, 0x43, 0x4e, 0x75, 0xbf, 0x83, 0xc5, 0x0c, 0xeb, 0xad, 0x89, 0xfe, 0x31, 0xff, 0x31, 0xdb, 0x8b, 0x45,
    0x04, 0x31, 0xed, 0xff, 0xe0, 0x8d, 0xb6, 0x00, 0x00, 0x00, 0x00, 0x00, 0x00, 0x00, 0x00, 0x00, 0x00, 0x00, 0x00,
    0x00, 0x00, 0x00, 0x00, 0x00, 0x00, 0x00, 0x00, 0xff, 0xff, 0x00, 0x00, 0x00, 0x9a, 0xcf, 0x00, 0xff, 0xff, 0x00,
    0x00, 0x00, 0x92, 0xcf, 0x00, 0x1f, 0x00, 0x90, 0xf0, 0xff, 0xff,
];

/// Where in the 64 KiB below 4 GiB the loader and its table are, and where a processor starts.
const LOADER_AT: usize = 0xf000;
const TABLE_AT: usize = 0xf800;
const RESET_AT: usize = 0xfff0;

/// Where in the guest's memory its boot parameters, command line, kernel and file system go.
const PARAMETERS_AT: u32 = 0x9_0000;
const COMMAND_LINE_AT: u32 = 0x9_1000;
const KERNEL_AT: u32 = 0x100_0000;
const INITRD_AT: u32 = 0x800_0000;

/// Linux's boot parameters, with the command line after them.
fn parameters(kernel: &Kernel, initrd: usize) -> Result<Vec<u8>> {
    let mut page = vec![0; 4096];
    put(&mut page, HEADER, &kernel.header)?;
    put(&mut page, 0x210, &[0xff])?;
    let flags = page.get(0x211).copied().unwrap_or_default();
    put(&mut page, 0x211, &[flags | 1])?;
    put(&mut page, 0x218, &INITRD_AT.to_le_bytes())?;
    put(&mut page, 0x21c, &u32::try_from(initrd).context("the guest's files are too large")?.to_le_bytes())?;
    put(&mut page, 0x228, &COMMAND_LINE_AT.to_le_bytes())?;
    // The memory map: what is below the legacy devices, and what is above.
    put(&mut page, 0x1e8, &[2])?;
    let high = 0x10_0000_u64;
    for (row, (start, length)) in [(0, 0x9_f000), (high, (GUEST_MEMORY_MIB << 20) - high)].into_iter().enumerate() {
        let at = 0x2d0 + 20 * row;
        put(&mut page, at, &start.to_le_bytes())?;
        put(&mut page, at + 8, &length.to_le_bytes())?;
        put(&mut page, at + 16, &1_u32.to_le_bytes())?;
    }
    // - No BIOS: no ACPI tables, and a reboot by triple fault, at which the emulator exits.
    // - The processor's identification has another clock rate than this guest's.
    // - FSRM (feature 580) without ERMS: a BIOS would have switched ERMS on, and the kernel's memmove takes one to mean
    //   the other and never ends.
    // - The rest saves time.
    let kilohertz = GUEST_HZ / 1000;
    let line = format!(
        "console=ttyS0 quiet acpi=off reboot=t panic=-1 nokaslr mitigations=off init_on_alloc=0 clearcpuid=580 \
         tsc_early_khz={kilohertz}\0"
    );
    page.extend_from_slice(line.as_bytes());
    Ok(page)
}

/// Overwrites part of a buffer.
fn put(buffer: &mut [u8], at: usize, bytes: &[u8]) -> Result<()> {
    buffer.get_mut(at..at + bytes.len()).context("a boot structure is too small")?.copy_from_slice(bytes);
    Ok(())
}

/// Boots the guest, passes its output on, and takes the test's exit status from it.
fn boot(bochs: &Path, kernel: &Kernel, initrd: &[u8], folder: &Path) -> Result<()> {
    let parameters = parameters(kernel, initrd.len())?;
    let (mut disk, mut table) = (Vec::new(), Vec::new());
    for (address, data) in [(PARAMETERS_AT, &*parameters), (KERNEL_AT, &kernel.code), (INITRD_AT, initrd)] {
        let sectors = data.len().div_ceil(512);
        for word in [usize::try_from(address)?, disk.len() / 512, sectors] {
            table.extend_from_slice(&u32::try_from(word).context("the guest's disk is too large")?.to_le_bytes());
        }
        disk.extend_from_slice(data);
        disk.resize(disk.len().next_multiple_of(512), 0);
    }
    for word in [PARAMETERS_AT, KERNEL_AT, 0] {
        table.extend_from_slice(&word.to_le_bytes());
    }
    // Bochs takes whole cylinders of 16 heads with 63 sectors.
    disk.resize(disk.len().next_multiple_of(16 * 63 * 512), 0);
    write(&folder.join("disk"), &disk)?;

    let mut rom = vec![0xf4; 0x1_0000];
    put(&mut rom, LOADER_AT, &LOADER)?;
    put(&mut rom, TABLE_AT, &table)?;
    let jump = u16::try_from(LOADER_AT)?.wrapping_sub(u16::try_from(RESET_AT + 3)?);
    put(&mut rom, RESET_AT, &[0xe9])?;
    put(&mut rom, RESET_AT + 1, &jump.to_le_bytes())?;
    write(&folder.join("rom"), &rom)?;

    // Nothing runs it, but Bochs wants one: a signature, one block, a return, and a sum of zero.
    let mut video = vec![0; 512];
    put(&mut video, 0, &[0x55, 0xaa, 1, 0xcb])?;
    let sum = video.iter().fold(0_u8, |sum, byte| sum.wrapping_add(*byte));
    put(&mut video, 511, &[sum.wrapping_neg()])?;
    write(&folder.join("video"), &video)?;

    let settings = [
        "display_library: nogui".to_owned(),
        "romimage: file=rom".to_owned(),
        "vgaromimage: file=video".to_owned(),
        format!("memory: guest={GUEST_MEMORY_MIB}, host={GUEST_MEMORY_MIB}"),
        format!("cpu: model=sapphire_rapids, count=1, ips={GUEST_HZ}, reset_on_triple_fault=0"),
        "clock: sync=none".to_owned(),
        "pci: enabled=0".to_owned(),
        "ata0: enabled=1, ioaddr1=0x1f0, ioaddr2=0x3f0, irq=14".to_owned(),
        "ata0-master: type=disk, path=disk, mode=flat".to_owned(),
        "com1: enabled=1, mode=file, dev=console".to_owned(),
        "com2: enabled=1, mode=file, dev=output".to_owned(),
        "boot: disk".to_owned(),
        "mouse: enabled=0".to_owned(),
        "speaker: enabled=0".to_owned(),
        "log: log".to_owned(),
        "panic: action=fatal".to_owned(),
    ];
    write(&folder.join("bochsrc"), settings.join("\n") + "\n")?;
    follow(bochs, folder)
}

/// Runs the emulator in a folder with its settings, and passes the guest's output on until it exits.
fn follow(bochs: &Path, folder: &Path) -> Result<()> {
    let seconds = match std::env::var("TILEFOLD_EMULATE_TIMEOUT") {
        Ok(seconds) => seconds.parse().context("TILEFOLD_EMULATE_TIMEOUT is no number of seconds")?,
        Err(_) => TIMEOUT_SECONDS,
    };
    let output = folder.join("output");
    write(&output, "")?;
    let mut emulator = Command::new(bochs)
        .args(["-q", "-f", "bochsrc"])
        .current_dir(folder)
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .with_context(|| format!("cannot start {}", bochs.display()))?;
    let start = Instant::now();
    let mut seen = Passer::default();
    let stopped = loop {
        let stopped = emulator.try_wait().context("cannot wait for Bochs")?;
        if let Err(error) = seen.pass_on(&output) {
            // Nobody reads the output any more: the guest would run to its end for nothing.
            _ = emulator.kill();
            _ = emulator.wait();
            return Err(error);
        }
        if stopped.is_some() {
            break true;
        }
        if start.elapsed() > Duration::from_secs(seconds) {
            emulator.kill().context("cannot end Bochs")?;
            emulator.wait().context("cannot wait for Bochs")?;
            break false;
        }
        std::thread::sleep(Duration::from_millis(50));
    };
    // Bochs exits with 1 however the guest ends: only the guest's own word counts.
    let text = String::from_utf8_lossy(&seen.all).into_owned();
    match text.rsplit_once(EXIT_MARK).map(|(_, status)| status.trim()) {
        Some("0") => Ok(()),
        Some(status) => bail!("the test failed on the emulated processor: exit status {status}"),
        None if !stopped => bail!("the test did not end within {seconds} s in the emulator (TILEFOLD_EMULATE_TIMEOUT)"),
        None => bail!(
            "the guest stopped before the test did\nits console: {}\nthe emulator's log: {}",
            tail(&folder.join("console"), |_| true),
            tail(&folder.join("log"), |line| line.contains("PANIC") || line.contains("CPU0")),
        ),
    }
}

/// Passes the guest's output on, less the line with the exit status.
#[derive(Default)]
struct Passer {
    all: Vec<u8>,
    passed: usize,
}

impl Passer {
    /// Passes on what came since: whole lines, so that half a mark is not taken for output.
    fn pass_on(&mut self, output: &Path) -> Result<()> {
        let mut file = File::open(output).context("the guest's output is gone")?;
        file.seek(SeekFrom::Start(self.all.len() as u64)).context("the guest's output")?;
        file.read_to_end(&mut self.all).context("the guest's output")?;
        let fresh = self.all.get(self.passed..).unwrap_or_default();
        let whole = fresh.iter().rposition(|byte| *byte == b'\n').map_or(0, |at| at + 1);
        let (lines, _) = fresh.split_at(whole);
        let mut terminal = std::io::stdout().lock();
        for line in lines.split_inclusive(|byte| *byte == b'\n') {
            if !line.starts_with(EXIT_MARK.as_bytes()) {
                terminal.write_all(line).context("standard output")?;
            }
        }
        terminal.flush().context("standard output")?;
        self.passed += whole;
        Ok(())
    }
}

/// The last lines of a log that are worth showing.
fn tail(path: &Path, keep: impl Fn(&str) -> bool) -> String {
    let bytes = fs::read(path).unwrap_or_default();
    let text = String::from_utf8_lossy(&bytes);
    let lines: Vec<&str> = text.lines().filter(|line| keep(line)).collect();
    lines.split_at(lines.len().saturating_sub(12)).1.iter().map(|line| format!("\n    {line}")).collect()
}

// ---------------------------------------------------------------------------------------------------------------------
// Small helpers

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
