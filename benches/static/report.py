"""A model in words and numbers."""

from __future__ import annotations

from typing import Any

import floor
from floor import Workload
from machines import DEFAULT_CHIP
from model import Model


def words(model: Model, work: Workload | None = None, chip: str | None = None) -> str:
    """The whole account of one kernel."""
    kernel, body, resources = model.kernel, model.body, model.kernel.resources
    accumulators = f" (AGPR {resources.accumulation_registers})" if resources.accumulation_registers else ""
    lines = [
        f"{kernel.name}  {model.arch}  {len(kernel.instructions)} instructions, {len(model.loops)} loops",
        f"registers {resources.registers}{accumulators}, spills {resources.spills}, shared {model.shared_bytes} B, "
        f"{model.shape.warps} warps a block: {model.occupancy:g} warps of a sub-partition (limit: {model.limit})",
    ]
    if model.loop:
        lines.append(f"hot loop {model.loop.low:#x}..{model.loop.high:#x}, {len(model.loop.instructions)} instructions")
    if model.left_out:
        lines.append(f"{model.left_out} instructions of the loop are not on its steady path")
    lines.append("classes: " + "  ".join(f"{kind} {count:g}" for kind, count in body.classes.most_common()))
    if unpriced := body.unpriced():
        lines.append("WARNING: without a price: " + " ".join(unpriced))
    if model.scores:
        lines += scores(model)
    if work and model.shape.tile:
        launch = model.launch(work, chip)
        chip = chip or DEFAULT_CHIP[model.arch]
        lines.append(
            f"static floor on {chip}: {launch.milliseconds:.3f} ms, by {launch.pipe}; {launch.blocks} blocks fill it "
            f"{launch.waves:.2f} times"
        )
    return "\n".join(lines)


def scores(model: Model) -> list[str]:
    """Cycles by pipe."""
    per_1024 = model.per_1024
    tile = model.shape.tile or (0, 0)
    redundancy = f", matrix work {model.redundancy:.2f} of the need" if model.redundancy else ""
    lines = [
        f"tile {tile[0]}x{tile[1]}, {model.unroll:g} steps in a trip, {model.scores:g} scores of a warp{redundancy}",
        f"{'pipe':14}{'cycles of a trip':>18}{'of 1024 scores':>16}",
    ]
    for pipe, cycles in sorted(model.body.pipes.items(), key=lambda item: -item[1]):
        lines.append(f"{pipe:14}{cycles:18.1f}{cycles * per_1024:16.1f}")
    pipe, cycles = model.bound()
    lines.append(
        f"BOUND {cycles:.0f} cycles of a sub-partition for 1024 scores, by {pipe}; {model.body.instructions * per_1024:.0f} "
        f"instructions, {model.body.serial() * per_1024:.0f} cycles without overlap"
    )
    return lines


def data(model: Model) -> dict[str, Any]:
    """The same for programs."""
    resources = model.kernel.resources
    found: dict[str, Any] = {
        "kernel": model.kernel.name,
        "arch": model.arch,
        "registers": resources.registers,
        "spills": resources.spills,
        "warps": model.occupancy,
        "limit": model.limit,
        "unpriced": model.body.unpriced(),
    }
    if model.scores:
        pipe, cycles = model.bound()
        found |= {
            "bound": round(cycles, 1),
            "pipe": pipe,
            "instructions": round(model.body.instructions * model.per_1024, 1),
            "matrix_work": round(model.redundancy, 3) if model.redundancy else None,
            "pipes": {pipe: round(cycles * model.per_1024, 1) for pipe, cycles in sorted(model.body.pipes.items())},
        }
    return found


def launches(model: Model, workloads: list[tuple[str, Workload]], chip: str, backward: bool) -> dict[str, Any]:
    """Static floors by workload, beside the ideal ones."""
    return {
        name: {
            "floor_ms": model.launch(work, chip).milliseconds,
            "ideal_ms": floor.milliseconds(chip, work, backward),
        }
        for name, work in workloads
    }
