"""Runs tilefold and its peers side by side on the same inputs, checks that they agree, and writes a table and a record.

Usage: ``python3 benches/peers/run.py --quick --only small``; README.md tells what is measured and how.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import tomllib
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

sys.dont_write_bytecode = True  # the repository stays clean of __pycache__

import machine  # noqa: E402
from child import TILEFOLD, Child, PeerFailed  # noqa: E402

if TYPE_CHECKING:
    from check import Reference, Workload

HERE = Path(__file__).resolve().parent
REPOSITORY = HERE.parents[1]
TARGET = REPOSITORY / "target"
VENV = TARGET / "peers-venv"
WORKLOADS = HERE.parent / "definitions" / "workloads.toml"
PASSES = ("fwd", "fwdbwd")
PEER_NAMES = ("torch-eager", "torch-sdpa", "torch-compile", "torch-chunked", "torch-sdpa-chunked", "torch-recompute",
              "ort-mha", "jax-jit")
# Least wanted speed of tilefold over the best peer (forward, forward + backward) on a machine with AVX-512.
FLOORS_AVX512: dict[tuple[str, str], tuple[float, float]] = {
    ("msa-row-initial", "f32"): (1.8, 2.4),
    ("triangle-initial", "f32"): (1.8, 2.4),
    ("msa-row-512", "f32"): (1.7, 2.1),
    ("extra-msa-256", "f32"): (3.8, 5.0),
    ("msa-row-initial", "bf16"): (2.5, 2.0),
    ("extra-msa-256", "bf16"): (4.0, 4.0),
    ("small", "f32"): (1.2, 1.5),
    ("small", "bf16"): (1.5, 1.5),
    ("extra-msa-finetuning", "f32"): (6.0, 6.0),
    ("extra-msa-finetuning", "bf16"): (6.0, 6.0),
}
# Passes that warm caches, compile and fault pages in: until two in a row agree, at most so many, for at most so long.
WARM_UP_PASSES, WARM_UP_S, WARM_UP_AGREEMENT = 6, 20.0, 1.2
# Threads that spin after their work have stopped by then.
PAUSE_S = 0.03
MOST_REPEATS = 50


@dataclass(frozen=True)
class Effort:
    """How long to measure: rounds of turns, a turn's length, and when a pass is slow enough for fewer rounds."""

    rounds: int
    turn_s: float
    slow_s: float
    slow_rounds: int
    peak_process: bool


FULL = Effort(rounds=9, turn_s=0.25, slow_s=8.0, slow_rounds=3, peak_process=True)
QUICK = Effort(rounds=3, turn_s=0.1, slow_s=3.0, slow_rounds=1, peak_process=False)


@dataclass(frozen=True)
class Row:
    """One line of the table: a workload in one type, forward or forward + backward."""

    workload: Workload
    dtype: str
    kind: str

    @property
    def title(self) -> str:
        """Name and shape."""
        w = self.workload
        return f"{w.name} ({w.rows}, {w.seqlen}, {w.heads}, {w.head_dim}) {self.dtype} {self.kind}"

    def load_request(self, inputs: Path) -> dict[str, Any]:
        """The `load` command for this row."""
        w = self.workload
        return {"cmd": "load", "inputs": str(inputs), "dtype": self.dtype, "pass": self.kind, "scale": w.scale,
                "causal": w.causal}


@dataclass
class Measured:
    """What came of one peer in one row."""

    peer: str
    reason: str = ""
    note: str = ""
    choice: Any = None
    seconds: list[float] = field(default_factory=list)
    # Medians of this peer and of tilefold in the same group of alternating processes.
    tilefold_ratio: float | None = None
    peak_bytes: int | None = None
    peak_over_loaded_bytes: int | None = None
    checks: dict[str, dict[str, float]] = field(default_factory=dict)
    wrong: list[str] = field(default_factory=list)

    @property
    def median(self) -> float:
        """Median seconds of a pass."""
        return statistics.median(self.seconds)


@dataclass
class Turn:
    """A started peer, its results so far, and how many passes fill its turn."""

    child: Child
    measured: Measured
    repeats: int
    rounds: int
    seconds: list[float] = field(default_factory=list)


def start_group(row: Row, inputs: Path, waiting: list[str], results: dict[str, Measured], options: argparse.Namespace,
                effort: Effort, free_bytes: int) -> tuple[list[Turn], list[str]]:
    """Starts, loads and warms up what fits into memory together; returns it and the peers that must wait for room."""
    turns: list[Turn] = []
    later: list[str] = []
    for name in waiting:
        measured = results.setdefault(name, Measured(name))
        child: Child | None = None
        try:
            child = Child(name, options, keep_pages=True)
            reply = child.load(row.load_request(inputs))
            if not reply["ok"]:
                child.close()
                measured.reason = reply["reason"]
                if reply.get("need_bytes") and reply["need_bytes"] < free_bytes and turns:
                    later.append(name)
                continue
            measured.note, measured.reason, measured.choice = reply.get("note") or "", "", reply.get("choice")
            pass_s = warm_up(child)
            slow = pass_s > effort.slow_s
            repeats = max(1, min(MOST_REPEATS, int(effort.turn_s / pass_s)))
            rounds = min(effort.rounds, effort.slow_rounds) if slow else effort.rounds
            turns.append(Turn(child, measured, repeats, rounds))
        except PeerFailed as failure:
            measured.reason = str(failure)
            if child:
                child.close()
        except BaseException:
            for started in [turn.child for turn in turns] + ([child] if child else []):
                started.close()
            raise
    return turns, later


def warm_up(child: Child) -> float:
    """Runs until two passes agree; returns the seconds of the last."""
    started, before = time.monotonic(), 0.0
    for _ in range(WARM_UP_PASSES):
        (seconds,) = child.run(1)
        settled = before and max(before, seconds) < WARM_UP_AGREEMENT * min(before, seconds)
        if settled or time.monotonic() - started > WARM_UP_S:
            break
        before = seconds
    return seconds


def alternate(turns: list[Turn], rounds: int) -> None:
    """A B C A B C ...: each round gives every peer one turn."""
    for index in range(rounds):
        for turn in turns:
            if index < turn.rounds and not turn.measured.reason:
                try:
                    turn.seconds += turn.child.run(turn.repeats)
                except PeerFailed as failure:
                    turn.measured.reason = str(failure)
                time.sleep(PAUSE_S)


def finish_group(turns: list[Turn], reference: Reference, folder: Path) -> None:
    """Ratios within the group, then outputs: against the reference, and against the first peer that saved its own."""
    from check import difference

    tilefold = next((turn for turn in turns if turn.measured.peer == TILEFOLD and turn.seconds), None)
    for turn in turns:
        measured = turn.measured
        if not turn.seconds or measured.reason:
            continue
        measured.seconds += turn.seconds
        if tilefold and turn is not tilefold:
            measured.tilefold_ratio = statistics.median(turn.seconds) / statistics.median(tilefold.seconds)
        first, path = folder / "first.safetensors", folder / "outputs.safetensors"
        try:
            turn.child.save(path)
            measured.peak_bytes, measured.peak_over_loaded_bytes = turn.child.peak()
        except PeerFailed as failure:
            measured.wrong.append(str(failure))
            continue
        measured.checks = reference.judge(path)
        measured.wrong = [f"{name} {check['of_tolerance']:.1f}x tolerance" for name, check in measured.checks.items()
                          if not check["of_tolerance"] <= 1.0]
        if not first.exists():
            # A wrong result is nobody's yardstick.
            if not measured.wrong:
                path.rename(first)
            continue
        for name, value in difference(first, path).items():
            measured.checks[name]["difference_to_first"] = value
            if not value <= 2 * reference.allowed_rms(name):
                measured.wrong.append(f"{name} differs from the first peer by {value:.1e}")
        path.unlink()


def measure_row(row: Row, names: list[str], options: argparse.Namespace, effort: Effort,
                folder: Path) -> list[Measured]:
    """All peers on one row: in one group where memory allows, else in several, each with tilefold in it."""
    from check import Reference, write_inputs

    inputs = folder / "inputs.safetensors"
    write_inputs(row.workload, row.dtype, inputs, options.seed)
    reference = Reference(row.workload, row.dtype, inputs, row.kind == "fwdbwd")
    results: dict[str, Measured] = {}
    waiting = names
    while waiting:
        turns, later = start_group(row, inputs, waiting, results, options, effort, machine.memory_available_bytes())
        try:
            alternate(turns, effort.rounds)
            finish_group(turns, reference, folder)
        finally:
            for turn in turns:
                turn.child.close()
        progress = any(turn.measured.peer != TILEFOLD for turn in turns)
        waiting = ([TILEFOLD] if TILEFOLD in names else []) + later if later and progress else []
    if effort.peak_process:
        for measured in results.values():
            if measured.seconds and not measured.reason:
                peak_of(row, inputs, measured, options)
    return list(results.values())


def peak_of(row: Row, inputs: Path, measured: Measured, options: argparse.Namespace) -> None:
    """Peak memory of one pass in a fresh process whose allocator gives pages back, as a user's does."""
    try:
        with Child(measured.peer, options, keep_pages=False) as child:
            request = row.load_request(inputs) | {"choice": measured.choice}
            if child.load(request)["ok"]:
                child.run(1)
                measured.peak_bytes, measured.peak_over_loaded_bytes = child.peak()
    except PeerFailed as failure:
        print(f"  no peak for {measured.peer}: {failure}", file=sys.stderr)


def summary(row: Row, results: list[Measured]) -> dict[str, Any]:
    """The best right peer, tilefold's speed over it, and the floor."""
    peers = [m for m in results if m.peer != TILEFOLD and m.seconds and not m.wrong and not m.reason]
    best = min(peers, key=lambda m: m.tilefold_ratio or m.median, default=None)
    floors = FLOORS_AVX512.get((row.workload.name, row.dtype))
    return {
        "best_peer": best.peer if best else None,
        "ratio": best.tilefold_ratio if best else None,
        "floor_avx512": floors[PASSES.index(row.kind)] if floors else None,
    }


def print_row(row: Row, results: list[Measured], verdict: dict[str, Any]) -> None:
    """One block of the table."""
    flops = row.workload.flops(row.kind == "fwdbwd")
    print(f"\n{row.title}")
    columns = f"{'median ms':>10}{'min ms':>10}{'GF/s':>8}{'tilefold':>10}{'peak MB':>9}{'+MB':>8}"
    print(f"  {'':<19}{columns}  outputs, notes")
    for m in results:
        if m.reason or not m.seconds:
            print(f"  {m.peer:<19}{'-':>10}  {m.reason or 'not measured'}")
            continue
        ratio = f"{m.tilefold_ratio:.2f}x" if m.tilefold_ratio else ""
        peak = f"{m.peak_bytes / 1e6:.0f}" if m.peak_bytes else "?"
        extra = f"{m.peak_over_loaded_bytes / 1e6:.0f}" if m.peak_over_loaded_bytes is not None else "?"
        worst = max((check["of_tolerance"] for check in m.checks.values()), default=float("nan"))
        judged = "WRONG: " + "; ".join(m.wrong) if m.wrong else f"ok ({worst:.2f} of tolerance)"
        note = f"; {m.note}" if m.note else ""
        print(f"  {m.peer:<19}{m.median * 1e3:>10.2f}{min(m.seconds) * 1e3:>10.2f}{flops / m.median / 1e9:>8.1f}"
              f"{ratio:>10}{peak:>9}{extra:>8}  {judged}{note}")
    floor = f", floor on AVX-512 {verdict['floor_avx512']}x" if verdict["floor_avx512"] else ""
    if verdict["ratio"]:
        floor += " MISSED" if missed(verdict) else ""
        print(f"  => {verdict['ratio']:.2f}x the best peer ({verdict['best_peer']}){floor}")
    elif verdict["best_peer"]:
        print(f"  => best peer {verdict['best_peer']}{floor}")


def missed(verdict: dict[str, Any]) -> bool:
    """Whether a floor that applies to this machine was not reached."""
    floor, ratio = verdict["floor_avx512"], verdict["ratio"]
    return bool(floor and ratio and machine.has_avx512() and ratio < floor)


def row_record(row: Row, results: list[Measured], verdict: dict[str, Any], options: argparse.Namespace,
               effort: Effort) -> dict[str, Any]:
    """What the record keeps of a row: everything it takes to repeat it, since rows of one file come from several runs."""
    flops = row.workload.flops(row.kind == "fwdbwd")
    w = row.workload
    peers = {}
    for m in results:
        if m.reason or not m.seconds:
            peers[m.peer] = {"reason": m.reason or "not measured"}
            continue
        peers[m.peer] = {
            "median_s": m.median, "min_s": min(m.seconds), "max_s": max(m.seconds), "passes": len(m.seconds),
            "gflops": flops / m.median / 1e9, "median_over_tilefold": m.tilefold_ratio,
            "rss_peak_bytes": m.peak_bytes, "rss_peak_over_loaded_bytes": m.peak_over_loaded_bytes,
            "note": m.note, "wrong": m.wrong, "checks": m.checks,
        }
    return {
        "workload": w.name, "rows": w.rows, "seqlen": w.seqlen, "seqlen_k": w.keys, "heads": w.heads,
        "head_dim": w.head_dim, "dtype": row.dtype, "pass": row.kind, "time": now().isoformat(timespec="seconds"),
        "load_average": os.getloadavg()[0], "rounds": effort.rounds, "seed": options.seed,
        "versions": options.versions, **verdict, "peers": peers,
    }


def write_record(path: Path, rows: list[dict[str, Any]], options: argparse.Namespace) -> None:
    """Writes the record; rows of the same day that were not measured again stay."""
    def key(row: dict[str, Any]) -> tuple[str, str, str]:
        return row["workload"], row["dtype"], row["pass"]

    kept: list[dict[str, Any]] = []
    if path.exists():
        measured = {key(row) for row in rows}
        kept = [row for row in json.loads(path.read_text())["rows"] if key(row) not in measured]
    record = {"machine": machine.describe(len(options.cpus))}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(record | {"rows": kept + rows}, indent=1) + "\n")
    print(f"\nrecord: {path}")


def now() -> datetime.datetime:
    """The time, with its zone."""
    return datetime.datetime.now(datetime.UTC)


def parse_options() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", action="append", metavar="NAME", help="workload of workloads.toml; may be repeated")
    parser.add_argument("--dtype", choices=("f32", "bf16"))
    parser.add_argument("--pass", dest="kind", choices=PASSES)
    parser.add_argument("--peers", default=",".join(PEER_NAMES), help="comma-separated; tilefold always takes part")
    parser.add_argument("--rounds", type=int, help="turns of each peer")
    parser.add_argument("--quick", action="store_true", help="few rounds, and no record under benches/record")
    parser.add_argument("--out", type=Path, help="the record's file")
    parser.add_argument("--cpus", help="processors to bind to, as 0,1; default the first two")
    parser.add_argument("--timeout", type=float, default=900.0, help="seconds a peer may take to answer")
    parser.add_argument("--seed", type=int, default=2023)
    parser.add_argument("--tilefold", type=Path, help="tilefold's peer program; default: built here from this tree")
    options = parser.parse_args()
    unknown = [name for name in options.peers.split(",") if name and name not in PEER_NAMES]
    if unknown:
        parser.error(f"unknown peers {unknown}; there are {', '.join(PEER_NAMES)}")
    allowed = sorted(os.sched_getaffinity(0))
    options.cpus = [int(cpu) for cpu in options.cpus.split(",")] if options.cpus else allowed[:2]
    options.target = TARGET
    return options


def build_tilefold(options: argparse.Namespace) -> str:
    """Builds tilefold's peer unless a program was given; returns what the record calls the version measured."""
    if options.tilefold:
        if not os.access(options.tilefold, os.X_OK):
            sys.exit(f"--tilefold {options.tilefold}: no such program")
        return f"program {options.tilefold.name} of unknown commit"
    command = ["cargo", "build", "--release", "--quiet", "-p", "tilefold-benches", "--bin", "tilefold-peer"]
    if subprocess.run(command, cwd=REPOSITORY).returncode:
        sys.exit(f"{' '.join(command)} failed; it must succeed before peers are measured")
    options.tilefold = Path(os.environ.get("CARGO_TARGET_DIR", TARGET)) / "release" / "tilefold-peer"
    return machine.commit(REPOSITORY)


def enter_environment() -> None:
    """Continues in the virtual environment of the peers, made here when it is missing or its requirements changed."""
    requirements, installed = HERE / "requirements.txt", VENV / "requirements.txt"
    if not installed.exists() or installed.read_text() != requirements.read_text():
        print(f"installing the peers into {VENV} (minutes, about 6 GB)", file=sys.stderr)
        subprocess.run([sys.executable, "-m", "venv", str(VENV)], check=True)
        subprocess.run([str(VENV / "bin" / "pip"), "install", "-q", "-r", str(requirements)], check=True)
        installed.write_text(requirements.read_text())
    if Path(sys.prefix).resolve() != VENV.resolve():
        os.execv(VENV / "bin" / "python", [str(VENV / "bin" / "python"), *sys.argv])


def selected_rows(options: argparse.Namespace) -> list[Row]:
    """The rows that the command line asks for."""
    from check import Workload

    workloads = [Workload(**entry) for entry in tomllib.loads(WORKLOADS.read_text())["workload"]]
    names = [workload.name for workload in workloads]
    unknown = [name for name in options.only or [] if name not in names]
    if unknown:
        sys.exit(f"unknown workloads {unknown}; there are {', '.join(names)}")
    chosen = [w for w in workloads if (w.name in options.only if options.only else w.compare)]
    return [Row(w, dtype, kind) for w in chosen for dtype in w.dtypes for kind in PASSES
            if options.dtype in (None, dtype) and options.kind in (None, kind)]


def main() -> int:
    """Measures the chosen rows and writes the record; an interrupt keeps what is complete."""
    options = parse_options()
    commit = build_tilefold(options)
    enter_environment()
    options.versions = machine.versions() | {"tilefold": commit}
    rows = selected_rows(options)
    effort = QUICK if options.quick else FULL
    if options.rounds:
        effort = Effort(options.rounds, effort.turn_s, effort.slow_s, effort.slow_rounds, effort.peak_process)
    os.sched_setaffinity(0, options.cpus)  # inherited by every peer, and by the libraries' thread counts
    signal.signal(signal.SIGINT, signal.default_int_handler)  # also where the shell started this in the background
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    names = [TILEFOLD, *(name for name in options.peers.split(",") if name)]
    base = TARGET / "peers-record" if options.quick else HERE.parent / "record" / machine.slug(len(options.cpus))
    out = options.out or base / f"{now().date().isoformat()}.json"
    records: list[dict[str, Any]] = []
    below: list[str] = []
    status = 0
    try:
        for row in rows:
            with tempfile.TemporaryDirectory(prefix="peers-", dir=TARGET) as folder:
                results = measure_row(row, names, options, effort, Path(folder))
            verdict = summary(row, results)
            print_row(row, results, verdict)
            sys.stdout.flush()
            records.append(row_record(row, results, verdict, options, effort))
            ours = next(measured for measured in results if measured.peer == TILEFOLD)
            status |= any(measured.wrong for measured in results) or not ours.seconds or bool(ours.reason)
            below += [row.title] if missed(verdict) else []
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
        status = 130
    finally:
        if records:
            write_record(out, records, options)
        for title in below:
            print(f"below its floor: {title}")
    return int(status)


if __name__ == "__main__":
    sys.exit(main())
