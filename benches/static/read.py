"""Reads a file of compiled code, whichever kind it is."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from dataclasses import dataclass, field
from pathlib import Path

import gcn
import sass
from machine_code import Kernel, UnreadableCode
from sass import Control

ELF = b"\x7fELF"
# The e_machine field of an ELF file.
CUDA, AMDGPU = 190, 224
# Folders of the disassemblers, searched after PATH.
TOOLS = "TILEFOLD_CUDA_TOOLS"


@dataclass
class Code:
    """The kernels of a file, and the scheduling bits of NVIDIA's code."""

    kernels: list[Kernel]
    controls: dict[int, Control] = field(default_factory=dict)

    def kernel(self, name: str | None = None) -> Kernel:
        """The longest kernel, of those whose names hold `name`."""
        found = [kernel for kernel in self.kernels if name is None or name in kernel.name]
        if not found:
            raise UnreadableCode(f"no kernel {name or ''} in the file")
        return max(found, key=lambda kernel: len(kernel.instructions))


def tool(*names: str) -> str:
    """The first of these programs that is there."""
    folders = os.pathsep.join([os.environ.get("PATH", ""), os.environ.get(TOOLS, "")])
    for name in names:
        if found := shutil.which(name, path=folders):
            return found
    raise UnreadableCode(f"none of {', '.join(names)} found: put it on PATH, or name its folder in {TOOLS}")


def output(*command: str) -> str:
    """What a program prints."""
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise UnreadableCode(f"{' '.join(command)}: {done.stderr.strip() or done.returncode}")
    return done.stdout


def read(path: Path, arch: str | None = None) -> Code:
    """A cubin, an AMDGPU code object, or the text of a disassembler."""
    try:
        content = path.read_bytes()
    except OSError as error:
        raise UnreadableCode(f"{path}: {error.strerror}") from error
    if content[:4] == ELF:
        return from_elf(path, int.from_bytes(content[18:20], "little"), arch)
    text = content.decode(errors="replace")
    if re.search(r"\bs_endpgm\b", text):
        return Code(gcn.parse(text, arch))
    return Code(sass.parse(text, arch), sass.controls(text))


def from_elf(path: Path, machine: int, arch: str | None) -> Code:
    """Disassembles."""
    if machine == CUDA:
        text = output(tool("nvdisasm"), "-c", "-hex", str(path))
        return Code(sass.parse(text, arch), sass.controls(text))
    if machine == AMDGPU:
        text = output(tool("llvm-objdump-19", "llvm-objdump"), "-d", "--no-show-raw-insn", str(path))
        notes = output(tool("llvm-readelf-19", "llvm-readelf"), "--notes", str(path))
        return Code(gcn.parse(text, arch, notes))
    raise UnreadableCode(f"{path}: ELF machine {machine} is neither CUDA nor AMDGPU")
