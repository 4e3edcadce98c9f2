"""Reading NVIDIA code, loops, prices, the model and the replay, on a probe whose source is beside it."""

from __future__ import annotations

import sys
import unittest
from pathlib import Path

FOLDER = Path(__file__).parent
sys.path.insert(0, str(FOLDER.parent))

import loops  # noqa: E402
import sass  # noqa: E402
from floor import Workload  # noqa: E402
from machine_code import Instruction, Kernel, Resources, UnreadableCode  # noqa: E402
from model import Choice, Model, Shape  # noqa: E402
from read import read  # noqa: E402
from replay import replay, waits  # noqa: E402
from tally import Tally, occupancy  # noqa: E402

PROBE = FOLDER / "fixtures" / "probe.sass"
SHAPE = Shape(tile=(64, 8), warps=4, products=1, head_dim=16)


def probe() -> Kernel:
    """The fixture's kernel, fresh: a model may take instructions out."""
    return read(PROBE).kernel()


class Reading(unittest.TestCase):
    """What is in the text."""

    def test_name_architecture_and_resources(self) -> None:
        kernel = probe()
        self.assertEqual((kernel.name, kernel.arch), ("probe", "sm_80"))
        self.assertEqual((kernel.resources.registers, kernel.resources.spills), (18, 0))

    def test_branches_have_targets(self) -> None:
        back = [each for each in probe().instructions if each.target is not None and each.target < each.address]
        self.assertIn((0x250, 0xE0), [(each.address, each.target) for each in back])

    def test_scheduling_bits(self) -> None:
        controls = read(PROBE).controls
        # 0x000fc60003f06270: stall 3, no barriers.
        self.assertEqual(controls[0x140], sass.Control(3, 7, 7, 0))
        # S2R sets barrier 0 when its result is there: 0x000e620000002100.
        self.assertEqual(controls[0x20].write_barrier, 1)

    def test_a_text_without_an_architecture_is_refused(self) -> None:
        with self.assertRaises(UnreadableCode):
            sass.parse("nothing")


class Counting(unittest.TestCase):
    """Loops and prices."""

    def test_the_loop_is_found(self) -> None:
        found = loops.hottest(loops.find(probe()))
        assert found
        self.assertEqual((found.low, found.high), (0xE0, 0x250))

    def test_prices_of_the_loop(self) -> None:
        found = loops.hottest(loops.find(probe()))
        assert found
        tally = Tally("sm_80", found.instructions)
        self.assertEqual(tally.unpriced(), [])
        # One m16n8k16 product: 2048 multiply-adds in 8 cycles; 16 bytes a lane by cp.async and four matrices: 16 each,
        # and a shuffle, for four sub-partitions; one exp2.
        pipes = {pipe: tally.pipes[pipe] for pipe in ("tensor", "lsu", "xu")}
        self.assertEqual(pipes, {"tensor": 8, "lsu": 16 + 16 + 4, "xu": 8})
        self.assertEqual(tally.matrix_fma, 2048)
        # @!PT never runs.
        self.assertEqual(tally.instructions, sum(not each.idle for each in found.instructions))

    def test_what_has_no_price_is_named(self) -> None:
        self.assertEqual(Tally("sm_80", [Instruction(0, "NEWOP")]).unpriced(), ["NEWOP"])

    def test_occupancy(self) -> None:
        self.assertEqual(occupancy("sm_80", Resources(registers=72), 4, 16384), (7.0, "registers"))
        self.assertEqual(occupancy("sm_80", Resources(registers=255), 1, 0)[0], 2)
        self.assertEqual(occupancy("sm_86", Resources(registers=32), 4, 40 * 1024), (2.0, "shared"))


class TheModel(unittest.TestCase):
    """Bounds."""

    def test_cycles_of_1024_scores(self) -> None:
        model = Model(probe(), SHAPE)
        self.assertEqual((model.scores, model.unroll, model.redundancy), (128, 1, 1))
        self.assertAlmostEqual(model.body.pipes["lsu"] * model.per_1024, 36 * 8)
        self.assertEqual(model.bound()[0], "l2")

    def test_two_trips_for_a_step(self) -> None:
        model = Model(probe(), Shape(tile=(128, 8), warps=4, products=1, head_dim=16))
        self.assertEqual((model.unroll, model.scores), (0.5, 128))

    def test_a_launch_counts_every_block(self) -> None:
        model = Model(probe(), SHAPE)
        few = model.launch(Workload(1, 64, 64, 1, 16), "a100")
        many = model.launch(Workload(1080, 64, 64, 1, 16), "a100")
        self.assertEqual((few.blocks, many.blocks), (1, 1080))
        self.assertAlmostEqual(many.milliseconds / few.milliseconds, 10)

    def test_a_wrong_loop_is_refused(self) -> None:
        with self.assertRaises(UnreadableCode):
            Model(probe(), SHAPE, Choice(loop=0x10))

    def test_a_second_path_with_the_same_products_is_left_out(self) -> None:
        product = lambda at: Instruction(at, "HMMA", ("16816", "F32", "BF16"))  # noqa: E731
        plain = [product(0x10), Instruction(0x20, "BRA", predicate="@P0", target=0x200)]
        general = [Instruction(at, "FSEL") for at in range(0x30, 0x130, 0x10)] + [product(0x130)]
        rest = [Instruction(0x200, "FADD"), Instruction(0x210, "BRA", target=0x10)]
        model = Model(Kernel("two", "sm_80", plain + general + rest), SHAPE)
        self.assertEqual(model.left_out, len(general))
        self.assertEqual((model.body.pipes["tensor"], model.body.pipes["alu"]), (8, 0))
        # With the products of two steps, nothing is repeated.
        both = Model(Kernel("two", "sm_80", plain + general + rest), Shape((128, 8), 4, 1, 16))
        self.assertEqual((both.left_out, both.body.pipes["tensor"]), (0, 16))

    def test_what_may_be_jumped_over_counts(self) -> None:
        code = [
            Instruction(0x10, "HMMA", ("16816", "F32", "BF16")),
            Instruction(0x20, "BRA", predicate="@P0", target=0x40),
            Instruction(0x30, "LDGSTS", ("E", "BYPASS", "128")),
            Instruction(0x40, "BRA", predicate="@P1", target=0x60),
            Instruction(0x50, "FSEL"),
            Instruction(0x60, "BRA", predicate="@P2", target=0x10),
        ]
        model = Model(Kernel("next", "sm_80", code), SHAPE)
        self.assertEqual((model.body.classes["cp.async"], model.body.classes["alu"]), (1, 1))

    def test_the_cheaper_of_two_branches_is_taken(self) -> None:
        code = [
            Instruction(0x10, "HMMA", ("16816", "F32", "BF16")),
            Instruction(0x20, "BRA", predicate="@P0", target=0x60),
            *[Instruction(at, "FSEL") for at in (0x30, 0x40)],
            Instruction(0x50, "BRA", target=0x70),
            Instruction(0x60, "FADD"),
            Instruction(0x70, "BRA", predicate="@P1", target=0x10),
        ]
        model = Model(Kernel("either", "sm_80", code), SHAPE)
        self.assertEqual((model.body.classes["alu"], model.body.classes["fp32"]), (0, 1))

    def test_a_way_without_the_exponentials_is_none(self) -> None:
        # Four for each lane, by the tile.
        code = [
            Instruction(0x10, "HMMA", ("16816", "F32", "BF16")),
            Instruction(0x20, "BRA", predicate="@P0", target=0x80),
            *[Instruction(at, "MUFU", ("EX2",)) for at in (0x30, 0x40, 0x50, 0x60)],
            Instruction(0x70, "BRA", target=0x90),
            Instruction(0x80, "FADD"),
            Instruction(0x90, "BRA", predicate="@P1", target=0x10),
        ]
        model = Model(Kernel("flags", "sm_80", code), SHAPE)
        self.assertEqual((model.body.classes["ex2"], model.body.classes["fp32"]), (4, 0))


class TheReplay(unittest.TestCase):
    """Latencies."""

    def test_latency_costs_more_than_the_bound_of_its_pipes(self) -> None:
        code = read(PROBE)
        model = Model(code.kernel(), SHAPE)
        cycles, warps = replay(model, code.controls)
        self.assertEqual(warps, 16)
        self.assertGreater(cycles, model.body.pipes["lsu"] * model.per_1024)
        slow, _ = replay(model, code.controls, global_latency=2000)
        self.assertGreater(slow, 2 * cycles)

    def test_the_program_order_of_one_warp(self) -> None:
        # One block of one warp: the trip takes at least its loads' latencies and all stall counts.
        code = read(PROBE)
        model = Model(code.kernel(), Shape(tile=(16, 8), warps=1, products=1, head_dim=16, shared_bytes=160 * 1024))
        cycles, warps = replay(model, code.controls)
        self.assertEqual(warps, 0.25)
        self.assertGreater(cycles / 8 * 0.25, 250 + 33 + 22)

    def test_groups_of_copies(self) -> None:
        self.assertEqual(waits(Instruction(0, "DEPBAR", ("LE",), operands="SB0, 0x1")), 1)
        self.assertIsNone(waits(Instruction(0, "DEPBAR", ("LE",), operands="SB3, 0x1")))
        with self.assertRaises(ValueError):
            replay(Model(probe(), SHAPE), {}, trips=3)


if __name__ == "__main__":
    unittest.main()
