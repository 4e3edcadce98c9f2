"""The machine and the versions that a record was made with."""

from __future__ import annotations

import os
import platform
import re
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

PACKAGES = ("torch", "onnxruntime", "jax", "jaxlib", "numpy")
FLAGS_OF_INTEREST = (
    "avx", "avx2", "fma", "f16c", "avx512f", "avx512bw", "avx512vl", "avx512_bf16", "avx512_fp16", "avx512_vnni",
    "avx_vnni", "amx_tile", "amx_bf16", "asimd", "asimdhp", "bf16", "sve", "sve2", "i8mm",
)


def cpu_field(name: str) -> str:
    """The first processor's field of /proc/cpuinfo, or an empty string."""
    found = re.search(rf"^{re.escape(name)}\s*:\s*(.*)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    return found.group(1).strip() if found else ""


def flags() -> list[str]:
    """Instruction sets that matter to attention."""
    present = set((cpu_field("flags") or cpu_field("Features")).split())
    return [flag for flag in FLAGS_OF_INTEREST if flag in present]


def has_avx512() -> bool:
    """Whether the floors measured on such a machine apply."""
    return "avx512f" in flags()


def slug(threads: int) -> str:
    """A folder name: model, family and model number, and threads."""
    model = cpu_field("model name") or platform.machine()
    numbers = f"-{cpu_field('cpu family')}-{cpu_field('model')}" if cpu_field("cpu family") else ""
    name = re.sub(r"[^a-z0-9]+", "-", re.sub(r"\((r|tm)\)|@.*|cpu|processor", "", model.lower())).strip("-")
    return f"{name}{numbers}-{threads}t"


def describe(threads: int) -> dict[str, Any]:
    """CPU, caches, memory and kernel."""
    caches = {}
    for index in sorted(Path("/sys/devices/system/cpu/cpu0/cache").glob("index*")):
        level, kind, size = ((index / name).read_text().strip() for name in ("level", "type", "size"))
        caches[f"L{level} {kind.lower()}"] = size
    huge_pages = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    return {
        "cpu": cpu_field("model name") or platform.machine(),
        "cpu_family_model_stepping": [cpu_field(name) for name in ("cpu family", "model", "stepping")],
        "flags": flags(),
        "caches": caches,
        "processors": os.cpu_count(),
        "threads": threads,
        "memory_bytes": proc_bytes("/proc/meminfo", "MemTotal"),
        "huge_pages": huge_pages.read_text().strip() if huge_pages.exists() else "none",
        "kernel": f"{platform.system()} {platform.release().split('-')[0]}",
    }


def commit(repository: Path) -> str:
    """The commit checked out, marked where more than the records differs from it."""
    def git(*arguments: str) -> str:
        return subprocess.run(["git", *arguments], cwd=repository, capture_output=True, text=True).stdout.strip()

    changed = git("status", "--porcelain", "--untracked-files=no", "--", ".", ":!benches/record")
    return (git("rev-parse", "--short", "HEAD") or "not committed") + ("-dirty" if changed else "")


def versions() -> dict[str, str]:
    """Python and the peers' packages."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = "absent"
    return found


def memory_available_bytes() -> int:
    """What the kernel says can still be allocated without swapping."""
    return proc_bytes("/proc/meminfo", "MemAvailable")


def proc_bytes(path: str, name: str) -> int:
    """A "Field:  123 kB" line of a proc file, in bytes."""
    for line in Path(path).read_text().splitlines():
        if line.startswith(name + ":"):
            return int(line.split()[1]) * 1024
    raise KeyError(f"{path} has no {name}")
