//! A Linux kernel in Bochs with a test executable as its only program.

use anyhow::{Context, Result, bail, ensure};
use std::fs;
use std::fs::File;
use std::io::Read;
use std::io::Seek;
use std::io::SeekFrom;
use std::io::Write;
use std::path::Path;
use std::path::PathBuf;
use std::process::Command;
use std::process::Stdio;
use std::time::Duration;
use std::time::Instant;

use super::apt::{Apt, unpack};
use super::{
    BOCHS_ARCHIVE, BOCHS_RELEASE, BOCHS_SHA256, EXIT_MARK, GUEST_HZ, GUEST_MEMORY_MIB, PASSED_ON, Scratch,
    TIMEOUT_SECONDS, copy, files, quote, run, say, works, write,
};

/// A Linux kernel, and a BusyBox for the guest's few commands.
///
/// The cloud kernel has a serial console built in and little else to start up.
pub(super) fn guest_tools(home: &Path) -> Result<(PathBuf, PathBuf)> {
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
/// or a window, and has two mistakes in its BF16 instructions, which are put right here.
pub(super) fn bochs(home: &Path) -> Result<PathBuf> {
    let program = home.join("bochs-3.0-bf16");
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
    // A displacement of one byte counts whole vectors, not elements: the memory operand is a vector.
    let opcode = "&BX_CPU_C::VDPBF16PS_MASK_VpsHdqWdqR, BX_ISA_AVX512_BF16, OP_Vps, OP_Hdq, ";
    let opcodes = source.join("cpu/decoder/ia_opcodes_evex.def");
    patch(&opcodes, &format!("{opcode}OP_mVdq32,"), &format!("{opcode}OP_mVdq,"))?;
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
pub(super) fn patch(path: &Path, old: &str, new: &str) -> Result<()> {
    let text = fs::read_to_string(path).with_context(|| format!("cannot read {}", path.display()))?;
    ensure!(text.matches(old).count() == 1, "{} has changed: the patch no longer applies", path.display());
    write(path, text.replace(old, new))
}

// ---------------------------------------------------------------------------------------------------------------------
// The guest

/// A kernel image in Linux's boot format.
pub(super) struct Kernel {
    /// The header that a boot loader passes back to the kernel.
    header: Vec<u8>,
    /// The code that runs in protected mode.
    code: Vec<u8>,
}

/// Where in the boot parameters, and in the image, the header starts.
pub(super) const HEADER: usize = 0x1f1;

impl Kernel {
    pub(super) fn read(path: &Path) -> Result<Self> {
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
pub(super) struct Archive {
    bytes: Vec<u8>,
    entries: usize,
}

impl Archive {
    pub(super) fn entry(&mut self, name: &str, mode: u32, data: &[u8]) {
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

    pub(super) fn pad(&mut self) {
        self.bytes.resize(self.bytes.len().next_multiple_of(4), 0);
    }

    pub(super) fn folder(&mut self, name: &str) {
        self.entry(name, 0o40_755, &[]);
    }

    pub(super) fn program(&mut self, name: &str, path: &Path) -> Result<()> {
        let data = fs::read(path).with_context(|| format!("cannot read {}", path.display()))?;
        self.entry(name, 0o100_755, &data);
        Ok(())
    }
}

/// Makes the guest's file system: the test, its libraries, and a script that runs it as the first program.
pub(super) fn initrd(busybox: &Path, test: &Path, args: &[&str], folder: &Path) -> Result<Vec<u8>> {
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
pub(super) const LOADER: [u8; 182] = [
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
pub(super) const LOADER_AT: usize = 0xf000;
pub(super) const TABLE_AT: usize = 0xf800;
pub(super) const RESET_AT: usize = 0xfff0;

/// Where in the guest's memory its boot parameters, command line, kernel and file system go.
pub(super) const PARAMETERS_AT: u32 = 0x9_0000;
pub(super) const COMMAND_LINE_AT: u32 = 0x9_1000;
pub(super) const KERNEL_AT: u32 = 0x100_0000;
pub(super) const INITRD_AT: u32 = 0x800_0000;

/// Linux's boot parameters, with the command line after them.
pub(super) fn parameters(kernel: &Kernel, initrd: usize) -> Result<Vec<u8>> {
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
pub(super) fn put(buffer: &mut [u8], at: usize, bytes: &[u8]) -> Result<()> {
    buffer.get_mut(at..at + bytes.len()).context("a boot structure is too small")?.copy_from_slice(bytes);
    Ok(())
}

/// Boots the guest, passes its output on, and takes the test's exit status from it.
pub(super) fn boot(bochs: &Path, kernel: &Kernel, initrd: &[u8], folder: &Path) -> Result<()> {
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
pub(super) fn follow(bochs: &Path, folder: &Path) -> Result<()> {
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
pub(super) struct Passer {
    all: Vec<u8>,
    passed: usize,
}

impl Passer {
    /// Passes on what came since: whole lines, so that half a mark is not taken for output.
    pub(super) fn pass_on(&mut self, output: &Path) -> Result<()> {
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
pub(super) fn tail(path: &Path, keep: impl Fn(&str) -> bool) -> String {
    let bytes = fs::read(path).unwrap_or_default();
    let text = String::from_utf8_lossy(&bytes);
    let lines: Vec<&str> = text.lines().filter(|line| keep(line)).collect();
    lines.split_at(lines.len().saturating_sub(12)).1.iter().map(|line| format!("\n    {line}")).collect()
}

// ---------------------------------------------------------------------------------------------------------------------
// Small helpers
