"""Reading AMD code and its prices; floors of the machines."""

from __future__ import annotations

import sys
import unittest
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import floor  # noqa: E402
import gcn  # noqa: E402
import loops  # noqa: E402
from floor import Workload  # noqa: E402
from machine_code import Resources  # noqa: E402
from model import Model, Shape  # noqa: E402
from tally import Tally, occupancy  # noqa: E402

CODE = """
0000000000001000 <demo>:
	s_mov_b32 s0, 0                                            // 000000001000: BE800080
	v_mfma_f32_32x32x8_bf16 v[0:15], v[16:17], v[18:19], v[0:15]  // 000000001004: D3E00000
	v_mfma_f32_16x16x16_f16 v[0:3], v[16:17], v[18:19], v[0:3]  // 00000000100C: D3E00000
	v_exp_f32_e32 v0, v0                                       // 000000001014: 7E004100
	v_add_f32_e32 v0, v0, v1                                   // 000000001018: 02000300
	ds_read_b128 v[0:3], v4                                    // 00000000101C: D9FE0000
	global_load_dwordx4 v[0:3], v[4:5], off                    // 000000001024: DC5C0000
	s_cbranch_scc1 65000                                       // 00000000102C: BF850000 <demo+0x4>
	s_endpgm                                                   // 000000001030: BF810000
"""
NOTES = """
amdhsa.kernels:
  - .agpr_count:     4
    .args:
      - .name:           params
        .size:           8
    .group_segment_fixed_size: 512
    .name:           demo
    .vgpr_count:     100
    .vgpr_spill_count: 2
    .sgpr_spill_count: 1
amdhsa.target:   amdgcn-amd-amdhsa--gfx942
"""


class Amd(unittest.TestCase):
    """Code and prices."""

    def test_code_and_resources(self) -> None:
        (kernel,) = gcn.parse(CODE, notes=NOTES)
        self.assertEqual((kernel.name, kernel.arch), ("demo", "gfx942"))
        self.assertEqual(kernel.resources, Resources(100, 4, 3, 512))
        self.assertEqual([loop.low for loop in loops.find(kernel)], [0x1004])

    def test_prices(self) -> None:
        for arch, mfma in (("gfx942", 32 + 16), ("gfx90a", 64 + 32)):
            (kernel,) = gcn.parse(CODE, arch)
            tally = Tally(arch, loops.find(kernel)[0].instructions)
            pipes = {pipe: tally.pipes[pipe] for pipe in ("mfma", "valu", "lds", "vmem")}
            self.assertEqual(pipes, {"mfma": mfma, "valu": 4 + 4 + 16 + 4, "lds": 32, "vmem": 64})
            self.assertEqual(tally.matrix_fma, 8192 + 4096)

    def test_few_waves_cannot_fill_the_ports(self) -> None:
        (kernel,) = gcn.parse(CODE, notes=NOTES)
        model = Model(kernel, Shape(tile=(32, 32), warps=1, products=1, head_dim=12))
        self.assertEqual(model.wave_issue(), 4 * 7 / min(5, model.occupancy))

    def test_occupancy(self) -> None:
        self.assertEqual(occupancy("gfx942", Resources(registers=128), 4, 0)[0], 4)
        self.assertEqual(occupancy("gfx90a", Resources(registers=132), 4, 0)[0], 3)


class Floors(unittest.TestCase):
    """Matrix work, exp2 and memory."""

    def test_cycles(self) -> None:
        self.assertEqual(floor.cycles("sm_80", 32, False), {"matrix": 256.0, "exp": 256.0})
        self.assertEqual(floor.cycles("sm_80", 32, True)["matrix"], 640.0)
        self.assertEqual(floor.cycles("gfx942", 8, False), {"matrix": 64.0, "exp": 256.0})

    def test_milliseconds(self) -> None:
        # 1024^3 * 4 scores, 256 cycles for 1024 of them, 432 sub-partitions at 1.41 GHz.
        self.assertAlmostEqual(floor.milliseconds("a100", Workload(1024, 1024, 1024, 4, 32), False), 1.763, delta=0.01)
        self.assertAlmostEqual(floor.milliseconds("mi300x", Workload(1024, 1024, 1024, 4, 32), False), 0.42, delta=0.01)

    def test_causality_halves_the_scores(self) -> None:
        whole = Workload(1, 4096, 4096, 64, 96)
        half = Workload(1, 4096, 4096, 64, 96, causal=True)
        self.assertEqual(2 * half.scores, whole.scores)


if __name__ == "__main__":
    unittest.main()
