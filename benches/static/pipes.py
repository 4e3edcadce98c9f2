#!/usr/bin/env python3
"""Counts what the hot loop of a compiled attention kernel costs, without a GPU.

  pipes.py kernel.cubin --tile 128x64 --warps 4 --products 2 --depth 32
  pipes.py kernel.cubin --tile 128x64 --warps 4 --products 2 --depth 32 --replay --work 512,384,8,32
  pipes.py kernel.cubin --loops
  pipes.py --jobs jobs.json        many kernels at once, as `cargo xtask kernels model` asks: JSON in, JSON out

README.md beside this file says how it counts, and what the number is not.
"""

from __future__ import annotations

import argparse
import json
import sys
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import report
from floor import Workload
from machine_code import UnreadableCode
from machines import ARCHS, CHIPS, DEFAULT_CHIP
from model import Choice, Model, Shape
from read import read
from replay import GLOBAL_LATENCY, replay
from tally import Tally


def main() -> int:
    """Reads the command line; the exit status."""
    arguments = parser().parse_args()
    try:
        if arguments.jobs:
            json.dump(run_jobs(arguments.jobs), sys.stdout, indent=1)
            return 0
        if not arguments.file:
            parser().error("a file, or --jobs, is needed")
        print(one(arguments))
    except UnreadableCode as error:
        print(f"pipes: {error}", file=sys.stderr)
        return 1
    return 0


def one(arguments: argparse.Namespace) -> str:
    """The account of the file on the command line."""
    code = read(arguments.file, arguments.arch)
    shape = Shape(
        arguments.tile, arguments.warps, arguments.products, arguments.depth, arguments.walk,
        arguments.shared, arguments.unroll,
    )
    trips = {int(at, 16): float(times) for at, times in (each.split("=") for each in arguments.trips)}
    skip = tuple((int(low, 16), int(high, 16)) for low, high in (each.split("-") for each in arguments.skip))
    model = Model(code.kernel(arguments.kernel), shape, Choice(arguments.loop, trips, skip))
    if arguments.loops:
        return loops(model)
    text = report.words(model, arguments.work, arguments.chip)
    if arguments.replay:
        cycles, warps = replay(model, code.controls, global_latency=arguments.latency)
        text += f"\nREPLAY {cycles:.0f} cycles of a sub-partition for 1024 scores with {warps:g} warps"
    return text


def loops(model: Model) -> str:
    """Every loop, and the branches inside the hot one."""
    lines = []
    for loop in model.loops:
        tally = Tally(model.arch, loop.instructions)
        pipe, cycles = tally.bound()
        hot = "  <- hot" if loop is model.loop else ""
        lines.append(
            f"{loop.low:#x}..{loop.high:#x}  {len(loop.instructions)} instructions, {tally.matrix_fma:g} multiply-adds of "
            f"matrices, {cycles:.0f} cycles by {pipe}{hot}"
        )
    return "\n".join(lines)


def run_jobs(path: Path) -> list[dict[str, Any]]:
    """Answers a list of jobs, in their order."""
    jobs = json.loads(path.read_text())
    with ProcessPoolExecutor() as pool:
        return list(pool.map(run_job, jobs))


def run_job(job: dict[str, Any]) -> dict[str, Any]:
    """One kernel: its numbers, its replay where asked, static floors of its workloads."""
    code = read(Path(job["file"]), job["arch"])
    shape = Shape(
        (job["tile_q"], job["tile_k"]), job["warps"], job["products"], job["depth"], job["walk"], job["shared_bytes"],
    )
    model = Model(code.kernel(job["kernel"]), shape)
    answer = report.data(model)
    if job["replay"]:
        answer["replay"] = round(replay(model, code.controls)[0], 1)
    works = [(each["name"], workload(each)) for each in job["workloads"]]
    answer["floors"] = report.launches(model, works, DEFAULT_CHIP[model.arch], job["backward"])
    return answer


def workload(entry: dict[str, Any]) -> Workload:
    """An entry of workloads.toml."""
    keys = entry.get("seqlen_k") or entry["seqlen"]
    return Workload(
        entry["rows"], entry["seqlen"], keys, entry["heads"], entry["head_dim"], entry["pair_bias"], entry["key_mask"],
        entry.get("causal", False),
    )


def sizes(text: str) -> tuple[int, int]:
    """`128x64`."""
    queries, keys = text.split("x")
    return int(queries), int(keys)


def work(text: str) -> Workload:
    """`rows,seqlen,heads,head_dim`."""
    rows, seqlen, heads, head_dim = (int(each) for each in text.split(","))
    return Workload(rows, seqlen, seqlen, heads, head_dim)


def parser() -> argparse.ArgumentParser:
    """The command line."""
    found = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    found.add_argument("file", nargs="?", type=Path, help="a cubin, a code object, or a disassembler's text")
    found.add_argument("--arch", choices=sorted(ARCHS), help="where the file does not say it")
    found.add_argument("--kernel", help="part of the kernel's name; the longest kernel otherwise")
    found.add_argument("--tile", type=sizes, help="queries x keys of a block in one step, such as 128x64")
    found.add_argument("--warps", type=int, default=4, help="warps of a block (default 4)")
    found.add_argument("--products", type=float, help="matrix products of each score in the loop (forward 2)")
    found.add_argument("--depth", type=int, help="channels of a product, padding included")
    found.add_argument("--walk", choices=("keys", "queries", "rows"), default="keys", help="what a block walks over")
    found.add_argument("--shared", type=int, help="bytes of dynamic shared memory of a block")
    found.add_argument("--unroll", type=float, help="steps in a trip of the compiled loop, where counting finds them wrong")
    found.add_argument("--loop", type=lambda text: int(text, 16), help="address of the hot loop (see --loops)")
    found.add_argument("--trips", action="append", default=[], metavar="ADDRESS=COUNT", help="of an inner loop, each trip")
    found.add_argument("--skip", action="append", default=[], metavar="LOW-HIGH", help="what the steady state jumps over")
    found.add_argument("--work", type=work, metavar="ROWS,SEQLEN,HEADS,HEAD_DIM", help="prints the static floor of a launch")
    found.add_argument("--chip", choices=sorted(CHIPS), help="for --work")
    found.add_argument("--loops", action="store_true", help="lists the loops and stops")
    found.add_argument("--replay", action="store_true", help="replays the loop with latencies (sm_80, sm_86)")
    found.add_argument("--latency", type=float, default=GLOBAL_LATENCY, help="cycles until global memory answers")
    found.add_argument("--jobs", type=Path, help="a JSON list of kernels; answers with a JSON list")
    return found


if __name__ == "__main__":
    sys.exit(main())
