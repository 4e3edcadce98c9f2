"""One peer's process as the orchestrator sees it: started, asked line by line, and always ended by its own handle."""

from __future__ import annotations

import argparse
import json
import os
import selectors
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import machine

TILEFOLD = "tilefold"
QUIT_S = 5.0
READ_BYTES = 1 << 16
# An allocator that keeps its pages, huge ones where the kernel gives them: no peer pays for page faults in every pass.
KEEP_PAGES = {
    "MALLOC_TRIM_THRESHOLD_": str(1 << 40),
    "MALLOC_MMAP_THRESHOLD_": str(1 << 40),
    "MALLOC_MMAP_MAX_": "0",
    "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1",
}


class PeerFailed(Exception):
    """A peer is absent, died, answered nonsense or not in time; the message is its line in the table."""


class Child:
    """A peer's process; a context manager, or `close` it."""

    def __init__(self, name: str, options: argparse.Namespace, keep_pages: bool) -> None:
        self.name, self.options, self.pending, self.busy = name, options, b"", False
        if name == TILEFOLD:
            if not options.tilefold.exists():
                raise PeerFailed(f"absent: {options.tilefold.name} is not built")
            command = [str(options.tilefold)]
        else:
            command = [sys.executable, str(Path(__file__).with_name("peer.py")), name]
        logs = options.target / "peers-log"
        logs.mkdir(parents=True, exist_ok=True)
        self.log = logs / f"{name}.txt"
        with self.log.open("wb") as log:
            # Its own session: an interrupt reaches the orchestrator alone, which then ends its children.
            self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log,
                                            env=self.environment(keep_pages), start_new_session=True)
        self.loaded_bytes = 0

    def environment(self, keep_pages: bool) -> dict[str, str]:
        """The same for every peer: thread counts, and an allocator that keeps its pages where asked."""
        threads = str(len(self.options.cpus))
        counts = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "RAYON_NUM_THREADS")
        own = {"PYTHONDONTWRITEBYTECODE": "1", "JAX_PLATFORMS": "cpu", "CUDA_VISIBLE_DEVICES": "",
               "TORCHINDUCTOR_COMPILE_THREADS": "1", "TORCHINDUCTOR_CACHE_DIR": str(self.options.target / "peers-inductor")}
        inherited = {name: value for name, value in os.environ.items() if name not in KEEP_PAGES}
        return inherited | dict.fromkeys(counts, threads) | own | (KEEP_PAGES if keep_pages else {})

    def ask(self, request: dict[str, Any]) -> dict[str, Any]:
        """Sends one command and waits for its answer."""
        self.busy = True
        try:
            self.process.stdin.write(json.dumps(request).encode() + b"\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            raise PeerFailed(self.ended()) from None
        line = self.read_line(time.monotonic() + self.options.timeout)
        self.busy = False
        try:
            return json.loads(line)
        except ValueError:
            raise PeerFailed(f"answered {line[:80]!r}, which is not JSON") from None

    def read_line(self, deadline: float) -> bytes:
        """One line of the peer's stdout."""
        with selectors.DefaultSelector() as selector:
            selector.register(self.process.stdout, selectors.EVENT_READ)
            while b"\n" not in self.pending:
                if not selector.select(max(0.0, deadline - time.monotonic())):
                    raise PeerFailed(f"no answer within {self.options.timeout:.0f} s")
                piece = os.read(self.process.stdout.fileno(), READ_BYTES)
                if not piece:
                    raise PeerFailed(self.ended())
                self.pending += piece
        line, _, self.pending = self.pending.partition(b"\n")
        return line

    def ended(self) -> str:
        """How the process ended, with the last line that it wrote to stderr."""
        try:
            code = self.process.wait(QUIT_S)
        except subprocess.TimeoutExpired:
            return "closed its output"
        if code == -signal.SIGKILL:
            return "killed from outside: most likely the machine ran out of memory"
        last = (self.log.read_text(errors="replace").strip().splitlines() or [""])[-1]
        return f"ended with status {code}: {last[:160]}"

    def load(self, request: dict[str, Any]) -> dict[str, Any]:
        """`load`; remembers the memory in use before the first pass."""
        reply = self.ask(request)
        if reply.get("ok"):
            self.loaded_bytes = machine.proc_bytes(f"/proc/{self.process.pid}/status", "VmRSS")
        elif "reason" not in reply:
            raise PeerFailed(f"answered {reply} to load")
        return reply

    def run(self, repeats: int) -> list[float]:
        """Seconds of `repeats` passes."""
        reply = self.ask({"cmd": "run", "repeats": repeats})
        if "seconds" not in reply:
            raise PeerFailed(str(reply.get("reason", reply)))
        return [float(seconds) for seconds in reply["seconds"]]

    def save(self, path: Path) -> None:
        """Has the last outputs written."""
        reply = self.ask({"cmd": "save", "path": str(path)})
        if not path.exists():
            raise PeerFailed(f"saved nothing: {reply.get('reason', reply)}")

    def peak(self) -> tuple[int, int]:
        """Peak memory since `load`, whole and beyond what was in use then."""
        peak = int(self.ask({"cmd": "peak"})["rss_peak_bytes"])
        return peak, max(0, peak - self.loaded_bytes)

    def close(self) -> None:
        """Asks it to quit, and ends it when it does not; at once when it still owes an answer."""
        if self.busy:
            self.process.kill()
        try:
            self.process.stdin.write(b'{"cmd":"quit"}\n')
            self.process.stdin.close()
            self.process.wait(QUIT_S)
        except (OSError, subprocess.TimeoutExpired):
            self.process.kill()
            self.process.wait()
        self.process.stdout.close()

    def __enter__(self) -> Child:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
