"""How tilefold's time and memory grow with the length, and what a second thread brings.

Usage: ``python3 benches/peers/scaling.py``; some minutes. README.md tells what is measured.
"""

from __future__ import annotations

import argparse
import datetime
import json
import math
import os
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

sys.dont_write_bytecode = True  # the repository stays clean of __pycache__

import machine  # noqa: E402

REPOSITORY = Path(__file__).resolve().parents[2]
TARGET = Path(os.environ.get("CARGO_TARGET_DIR", REPOSITORY / "target"))
ROWS, HEADS, HEAD_DIM = 16, 4, 32
LENGTHS = (128, 256, 512, 1024, 2048)
THREADED_LENGTH = 512
DTYPES = ("f32", "bf16")
# Wanted: time grows as length ** 2 within 5 %, and a second thread brings 1.8 times the speed where the machine can.
EXPONENT, EXPONENT_WITHIN, SPEED_UP = 2.0, 0.1, 1.8


def start(cpus: list[int], length: int, threads: int, repeats: int) -> subprocess.Popen[str]:
    """Starts a benchmark of one length in both types, bound to processors."""
    shape = f"{ROWS},{length},{HEADS},{HEAD_DIM}"
    command = [str(TARGET / "release" / "tilefold"), "bench", "--device", "cpu", "--shape", shape, "--dtype",
               ",".join(DTYPES), "--threads", str(threads), "--repeats", str(repeats), "--json=-"]
    pin = lambda: os.sched_setaffinity(0, cpus)  # noqa: E731
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, preexec_fn=pin)


def finish(process: subprocess.Popen[str]) -> dict[tuple[str, str], dict[str, Any]]:
    """Entries by dtype and pass."""
    printed, _ = process.communicate()
    if process.returncode:
        sys.exit(f"{' '.join(process.args)} failed with status {process.returncode}")
    return {(entry["dtype"], entry["pass"]): entry for entry in json.loads(printed)["entries"]}


def slope(points: list[tuple[float, float]]) -> float:
    """Least-squares slope of y over x."""
    mean_x, mean_y = (sum(values) / len(points) for values in zip(*points))
    return (sum((x - mean_x) * (y - mean_y) for x, y in points) / sum((x - mean_x) ** 2 for x, _ in points))


def main() -> int:
    """Measures, prints, records; the exit status is 1 when something failed, never for a slow machine."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5, help="turns of each")
    parser.add_argument("--repeats", type=int, default=9, help="timed runs in a turn")
    parser.add_argument("--cpus", help="two processors, as 0,1; default the first two")
    parser.add_argument("--out", type=Path, help="the record's file")
    options = parser.parse_args()
    cpus = [int(cpu) for cpu in options.cpus.split(",")] if options.cpus else sorted(os.sched_getaffinity(0))[:2]
    if len(cpus) != 2:
        sys.exit(f"two processors are needed, got {cpus}")
    subprocess.run(["cargo", "build", "--release", "--quiet", "-p", "tilefold-cli"], cwd=REPOSITORY, check=True)

    # All in turns, so that a slow minute of the machine falls on each: medians over turns of medians, and of ratios
    # within a turn. The second thread: alone on one processor, two on two, and two processes of one thread side by
    # side, which is what the machine itself can do.
    by_length, speed_ups = [], []
    for turn in range(options.rounds):
        by_length.append({length: finish(start(cpus, length, 2, options.repeats)) for length in LENGTHS})
        alone = finish(start([cpus[turn % 2]], THREADED_LENGTH, 1, options.repeats))
        together = finish(start(cpus, THREADED_LENGTH, 2, options.repeats))
        beside = [finish(process) for process in [start([cpu], THREADED_LENGTH, 1, options.repeats) for cpu in cpus]]
        speed_ups.append({
            key: (alone[key]["median_ms"] / together[key]["median_ms"],
                  sum(alone[key]["median_ms"] / entries[key]["median_ms"] for entries in beside))
            for key in alone
        })

    rows = []
    print(f"{'':<15}{'exponent':>9}{'workspace, 2048 over 1024':>27}{'2 threads':>11}{'the machine':>13}")
    for key in speed_ups[0]:
        times = {length: statistics.median(entries[length][key]["median_ms"] for entries in by_length)
                 for length in LENGTHS}
        workspaces = {length: by_length[0][length][key]["workspace_bytes"] for length in LENGTHS}
        threads, processes = (statistics.median(ratios) for ratios in zip(*(turn[key] for turn in speed_ups)))
        row = {
            "dtype": key[0], "pass": key[1], "rows": ROWS, "heads": HEADS, "head_dim": HEAD_DIM,
            "median_ms": times,
            "exponent": slope([(math.log(length), math.log(time)) for length, time in times.items()]),
            "workspace_bytes": workspaces,
            "peak_bytes": {length: by_length[0][length][key]["peak_bytes"] for length in LENGTHS},
            "two_threads_over_one": threads, "two_processes_over_one": processes,
        }
        rows.append(row)
        growth = workspaces[2048] / workspaces[1024]
        notes = [] if abs(row["exponent"] - EXPONENT) <= EXPONENT_WITHIN else ["exponent off"]
        if threads < SPEED_UP <= processes:
            notes.append("threads below 1.8")
        print(f"{' '.join(key):<15}{row['exponent']:>9.3f}{growth:>27.2f}{threads:>11.2f}{processes:>13.2f}  "
              f"{', '.join(notes)}")
    today = datetime.datetime.now(datetime.UTC)
    folder = REPOSITORY / "benches" / "record" / machine.slug(2)
    out = options.out or folder / f"{today.date().isoformat()}-scaling.json"
    record = {"machine": machine.describe(2), "tilefold": machine.commit(REPOSITORY),
              "time": today.isoformat(timespec="seconds"), "rounds": options.rounds, "repeats": options.repeats,
              "rows": rows}
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(record, indent=1) + "\n")
    print(f"record: {out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
