"""Compiled code as data: instructions, kernels, what the file says of their resources."""

from __future__ import annotations

from dataclasses import dataclass, field


class UnreadableCode(Exception):
    """A file that is not compiled code of a known kind, or lacks what is asked of it."""


@dataclass(frozen=True)
class Instruction:
    """One machine instruction.

    `op` is the opcode without its modifiers on NVIDIA (`HMMA` of `HMMA.16816.F32.BF16`), and the whole mnemonic on AMD.
    """

    address: int
    op: str
    modifiers: tuple[str, ...] = ()
    predicate: str = ""
    operands: str = ""
    target: int | None = None

    @property
    def idle(self) -> bool:
        """Whether it takes no slot: padding, or switched off by a predicate that is never true."""
        return self.op == "NOP" or self.predicate == "@!PT"


@dataclass
class Resources:
    """What one thread and one block take, as the file states it. AMD counts vector registers and AGPRs."""

    registers: int = 0
    accumulation_registers: int = 0
    spills: int = 0
    shared_bytes: int = 0


@dataclass
class Kernel:
    """One entry point: its name, architecture, code and resources."""

    name: str
    arch: str
    instructions: list[Instruction]
    resources: Resources = field(default_factory=Resources)
