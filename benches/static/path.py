"""The steady state of a loop: the path through it that is taken while nothing is special.

A kernel's loop has branches: to a general path for strides and numbers that the plain one does not fit, over what the last
tile need not load, over masks that exclude nothing. Code alone does not say which way they go, so:

* Code that a branch jumps over, or does not, counts: the path is no shorter than that of a tile with everything in it.
* Of two alternatives, the shorter counts.
* Matrix products count once: of code that would do a step's products again, the least is taken.
* A way without the exponentials of a step is none: flags keep it from being taken.

This finds the plain path where the general one repeats the products or replaces code, and overestimates where a general
path is an addition without an alternative.
"""

from __future__ import annotations

from dataclasses import dataclass

import cost
from loops import Loop
from machine_code import Instruction, Kernel

JUMPS = ("BRA", "JMP", "s_branch")
ENDS = ("EXIT", "RET", "s_endpgm")


@dataclass(frozen=True)
class Way:
    """A way from the loop's head to the end of a block."""

    instructions: int
    blocks: tuple[int, ...]


# Ways by the matrix work and the exponentials that were done on them.
Done = tuple[float, int]
Ways = dict[Done, Way]


def steady(kernel: Kernel, loop: Loop, needed: Done) -> tuple[list[Instruction], set[int]] | None:
    """The instructions on the path, in order, and the addresses of all of the loop, wherever the compiler put them.

    `None` where no path has the work of a step: multiply-adds and exponentials of one warp.
    """
    blocks = split(kernel.instructions)
    starts = {block[0].address: number for number, block in enumerate(blocks)}
    head = starts[loop.low]
    onward = [successors(blocks, starts, number) for number in range(len(blocks))]
    order = in_order(onward, head)
    inside = returning(onward, head, order)
    order = [number for number in order if number in inside]
    place = {number: at for at, number in enumerate(order)}
    # Ways back to other blocks than the head end inner loops, whose bodies count once.
    forward = {
        number: [to for to in onward[number] if to == head or place.get(to, -1) > place[number]] for number in order
    }
    work = {number: sum(cost.matrix_fma(each) for each in blocks[number]) for number in order}
    powers = {number: sum(cost.of(each, kernel.arch)[0] == "ex2" for each in blocks[number]) for number in order}
    length = {number: sum(not each.idle for each in blocks[number]) for number in order}
    ways: dict[int, Ways] = {head: {(0.0, 0): Way(0, ())}}
    ends: Ways = {}
    for number in order:
        leaving = {
            (done + work[number], exponentials + powers[number]): Way(way.instructions + length[number], (*way.blocks, number))
            for (done, exponentials), way in ways.pop(number, {}).items()
        }
        for to in counted(forward, work, number, head):
            merge(ends if to == head else ways.setdefault(to, {}), leaving)
    enough = [done for done in ends if done[0] >= 0.9 * needed[0]]
    if not enough:
        return None
    # Code that is no softmax has fewer.
    exponentials = 0.9 * min(needed[1], max(exponentials for _, exponentials in enough))
    enough = [done for done in enough if done[1] >= exponentials]
    least = min(work for work, _ in enough)
    way = min((ends[done] for done in enough if done[0] == least), key=lambda way: way.instructions)
    kept = [each for number in way.blocks for each in blocks[number]]
    return kept, {each.address for number in inside for each in blocks[number]}


def counted(forward: dict[int, list[int]], work: dict[int, float], number: int, head: int) -> list[int]:
    """Ways out of a block but those that jump over code without products."""
    ways = forward[number]
    if len(ways) != 2 or head in ways:
        return ways
    for arm, join in (ways, ways[::-1]):
        through = between(forward, arm, join, head)
        if through and not any(work[each] for each in through):
            return [arm]
    return ways


def between(forward: dict[int, list[int]], arm: int, join: int, head: int) -> set[int]:
    """Blocks from `arm` on, before `join`; none where no way from `arm` comes to `join`."""
    found, stack, joins = set(), [arm], False
    while stack:
        number = stack.pop()
        if number == join:
            joins = True
        elif number not in found and number != head:
            found.add(number)
            stack += forward[number]
    return found if joins else set()


def successors(blocks: list[list[Instruction]], starts: dict[int, int], number: int) -> list[int]:
    """Blocks that may run after one."""
    last = blocks[number][-1]
    found = []
    if last.target in starts and last.op not in ("CALL",):
        found.append(starts[last.target])
    jumps_always = last.op in JUMPS and not last.predicate and not conditional(last)
    ends = last.op in ENDS and not last.predicate
    if not jumps_always and not ends and number + 1 < len(blocks):
        found.append(number + 1)
    return found


def conditional(jump: Instruction) -> bool:
    """Whether a jump has a condition among its operands: `BRA P0, ...`, `BRA.DIV ~URZ, ...`."""
    return "DIV" in jump.modifiers or "," in jump.operands


def in_order(onward: list[list[int]], head: int) -> list[int]:
    """Blocks that can be reached from the head, each after all from which it is reached but by ways back."""
    order: list[int] = []
    seen = {head}
    stack = [(head, iter(onward[head]))]
    while stack:
        number, rest = stack[-1]
        for to in rest:
            if to not in seen:
                seen.add(to)
                stack.append((to, iter(onward[to])))
                break
        else:
            order.append(number)
            stack.pop()
    return order[::-1]


def returning(onward: list[list[int]], head: int, order: list[int]) -> set[int]:
    """The loop: blocks from which there is a way back to the head."""
    found = {head}
    grown = True
    while grown:
        more = {number for number in order if number not in found and any(to in found for to in onward[number])}
        found |= more
        grown = bool(more)
    return found


def merge(into: Ways, ways: Ways) -> None:
    """Keeps the shorter of two ways that did the same."""
    for done, way in ways.items():
        if done not in into or way.instructions < into[done].instructions:
            into[done] = way


def split(instructions: list[Instruction]) -> list[list[Instruction]]:
    """Basic blocks: they end with a branch or an exit, or before a branch's target."""
    targets = {each.target for each in instructions if each.target is not None}
    blocks: list[list[Instruction]] = [[]]
    for each in instructions:
        last = blocks[-1][-1] if blocks[-1] else None
        if last and (each.address in targets or last.target is not None or last.op in ENDS):
            blocks.append([])
        blocks[-1].append(each)
    return blocks

