"""What outputs are held against: seeded inputs, an f64 reference on a crop, tolerances from rounding analysis.

The crop is a few (row, head) pairs with all their queries and keys for out, dq, dk and dv; and a few query rows of the
same heads, summed over all rows, for dbias. Each reference value comes with a magnitude: the root of the sum of squares
of the terms that are rounded independently on the way to it. A result is right when

    |result - reference| <= SIGMAS · (eta · magnitude + u · |reference|)

with u the rounding unit of the stored type and eta the relative error of one probability (see `Tolerance`). Rounding
errors of either sign grow with the root of their number (Higham and Mary, "A new approach to probabilistic rounding
error analysis", 2019), so this is tight enough to find a wrong formula and loose enough for any order of operations.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from safetensors import safe_open
from safetensors.numpy import save_file

ROUNDING_UNIT = {"f32": 2.0**-24, "bf16": 2.0**-9}
NUMPY_TYPE = {"f32": np.float32, "bf16": ml_dtypes.bfloat16}
SIGMAS = 6.0
# Error of one exponential in units in the last place: fast vector versions are within 4.
EXP_ULPS = 8.0
MASKED_SHARE = 0.1
CROP_ROWS, CROP_HEADS, CROP_QUERIES = 3, 2, 8
QUERY_BLOCK = 512


@dataclass(frozen=True)
class Workload:
    """One entry of workloads.toml."""

    name: str
    rows: int
    seqlen: int
    heads: int
    head_dim: int
    pair_bias: bool
    key_mask: bool
    dtypes: list[str]
    source: str
    seqlen_k: int = 0
    causal: bool = False
    compare: bool = False

    @property
    def keys(self) -> int:
        """Number of keys."""
        return self.seqlen_k or self.seqlen

    @property
    def scale(self) -> float:
        """The softmax scale."""
        return self.head_dim**-0.5

    def flops(self, backward: bool) -> float:
        """Two matrix products forward, five more backward: 4 N H L² D and 3.5 times that."""
        forward = 4.0 * self.rows * self.heads * self.seqlen * self.keys * self.head_dim
        return forward * (3.5 if backward else 1.0) * (0.5 if self.causal else 1.0)


def write_inputs(workload: Workload, dtype: str, path: Path, seed: int) -> None:
    """Standard normal q, k, v, d_out and bias; a tenth of the keys masked, never the first one."""
    rng = np.random.default_rng(seed)
    numpy_type = NUMPY_TYPE[dtype]

    def normal(*shape: int) -> np.ndarray:
        return rng.standard_normal(shape, dtype=np.float32).astype(numpy_type, copy=False)

    w = workload
    tensors = {"q": normal(w.rows, w.seqlen, w.heads, w.head_dim)}
    tensors |= {name: normal(w.rows, w.keys, w.heads, w.head_dim) for name in ("k", "v")}
    tensors["d_out"] = normal(w.rows, w.seqlen, w.heads, w.head_dim)
    if w.pair_bias:
        tensors["bias"] = normal(w.heads, w.seqlen, w.keys)
    if w.key_mask:
        mask = (rng.random((w.rows, w.keys)) >= MASKED_SHARE).astype(np.uint8)
        mask[:, 0] = 1
        tensors["mask"] = mask
    save_file(tensors, path)


@dataclass
class Checked:
    """A reference value of a crop, its magnitude, and where the crop lies in the tensor."""

    tensor: str
    index: tuple[Any, ...]
    value: np.ndarray
    magnitude: np.ndarray


@dataclass(frozen=True)
class Tolerance:
    """Relative error of one probability or one term of dS, by first-order analysis.

    A logit of size s is wrong by about (√D + 4) u s when it is summed in f32, which is the relative error of its
    exponential; the row sum adds √L u. In bf16 unfused code rounds the logit after the product and after each bias, and
    then p, dP and dS.
    """

    eta: float
    unit: float

    @staticmethod
    def of(workload: Workload, dtype: str, largest_logit: float) -> Tolerance:
        """The tolerance of a workload whose unmasked logits reach `largest_logit`."""
        u32, unit = ROUNDING_UNIT["f32"], ROUNDING_UNIT[dtype]
        f32_part = u32 * ((math.sqrt(workload.head_dim) + 4) * largest_logit + math.sqrt(workload.keys) + EXP_ULPS)
        stored_part = unit * (2 * largest_logit + 4) if dtype != "f32" else 0.0
        return Tolerance(f32_part + stored_part, unit)

    def of_crop(self, crop: Checked) -> np.ndarray:
        """The largest error allowed for each element."""
        return SIGMAS * (self.eta * crop.magnitude + self.unit * np.abs(crop.value))


class Reference:
    """f64 values of a crop of the outputs, computed from the inputs file."""

    def __init__(self, workload: Workload, dtype: str, inputs: Path, backward: bool) -> None:
        self.workload, self.largest_logit = workload, 0.0
        self.crops: list[Checked] = []
        rows = sorted({0, workload.rows // 2, workload.rows - 1})[:CROP_ROWS]
        heads = sorted({0, workload.heads - 1})[:CROP_HEADS]
        with safe_open(inputs, "np") as self.file:
            names = set(self.file.keys())
            self.mask = self.file.get_tensor("mask") if "mask" in names else None
            self.bias = self.file.get_tensor("bias") if "bias" in names else None
            for row in rows:
                for head in heads:
                    self.crops += self.pair(row, head, backward)
            if backward and self.bias is not None:
                self.crops += [self.bias_gradient(head) for head in heads]
        self.tolerance = Tolerance.of(workload, dtype, self.largest_logit)

    def read(self, name: str, row: int, head: int) -> np.ndarray:
        """[L, D] of one row and head."""
        return self.file.get_slice(name)[row : row + 1, :, head : head + 1, :][0, :, 0, :].astype(np.float64)

    def probabilities(self, q: np.ndarray, k: np.ndarray, row: int, head: int, queries: np.ndarray) -> np.ndarray:
        """p [queries, keys] of one row and head; a masked key has probability 0."""
        logits = self.workload.scale * q[queries] @ k.T
        if self.bias is not None:
            logits += self.bias[head][queries].astype(np.float64)
        keep = np.ones_like(logits, dtype=bool)
        if self.mask is not None:
            keep &= self.mask[row] != 0
        if self.workload.causal:
            keep &= np.arange(k.shape[0]) <= queries[:, None]
        self.largest_logit = max(self.largest_logit, float(np.abs(logits[keep]).max()))
        logits = np.where(keep, logits, -np.inf)
        p = np.exp(logits - logits.max(-1, keepdims=True))
        return p / p.sum(-1, keepdims=True)

    def pair(self, row: int, head: int, backward: bool) -> list[Checked]:
        """out, and dq, dk, dv, of one row and head, over blocks of queries."""
        q, k, v, d_out = (self.read(name, row, head) for name in ("q", "k", "v", "d_out"))
        scale = self.workload.scale
        names = {"out": q, "dq": q, "dk": k, "dv": k} if backward else {"out": q}
        value = {name: np.zeros_like(like) for name, like in names.items()}
        square = {name: np.zeros_like(like) for name, like in names.items()}
        for start in range(0, q.shape[0], QUERY_BLOCK):
            block = np.arange(start, min(start + QUERY_BLOCK, q.shape[0]))
            p = self.probabilities(q, k, row, head, block)
            value["out"][block], square["out"][block] = p @ v, p**2 @ v**2
            if not backward:
                continue
            ds, ds_size, delta_size = score_gradient(p, d_out[block] @ v.T)
            value["dv"] += p.T @ d_out[block]
            square["dv"] += (p**2).T @ d_out[block] ** 2
            value["dq"][block] = scale * ds @ k
            square["dq"][block] = scale**2 * (ds_size**2 @ k**2 + (delta_size * (p @ k)) ** 2)
            value["dk"] += scale * ds.T @ q[block]
            square["dk"] += scale**2 * (ds_size**2).T @ q[block] ** 2
        where = (row, slice(None), head)
        return [Checked(name, where, value[name], np.sqrt(square[name])) for name in names]

    def bias_gradient(self, head: int) -> Checked:
        """A few query rows of one head's dbias: the sum of dS over all rows."""
        count = self.workload.seqlen
        queries = np.unique(np.linspace(0, count - 1, CROP_QUERIES).astype(int))
        value = np.zeros((len(queries), self.workload.keys))
        square = np.zeros_like(value)
        for row in range(self.workload.rows):
            q, k, v, d_out = (self.read(name, row, head) for name in ("q", "k", "v", "d_out"))
            ds, ds_size, _ = score_gradient(self.probabilities(q, k, row, head, queries), d_out[queries] @ v.T)
            value += ds
            square += ds_size**2
        return Checked("dbias", (head, queries), value, np.sqrt(square))

    def judge(self, outputs: Path) -> dict[str, dict[str, float]]:
        """For each tensor the largest |error|, that over its tolerance, and the RMS error relative to the RMS value."""
        report: dict[str, dict[str, float]] = {}
        with safe_open(outputs, "np") as file:
            present = set(file.keys())
            for name in dict.fromkeys(crop.tensor for crop in self.crops):
                if name not in present:
                    report[name] = {"max_error": math.inf, "of_tolerance": math.inf, "relative_rms": math.inf}
                    continue
                tensor = file.get_tensor(name)
                crops = [crop for crop in self.crops if crop.tensor == name]
                errors = [np.abs(tensor[crop.index].astype(np.float64) - crop.value) for crop in crops]
                shares = [share(error, self.tolerance.of_crop(crop)) for error, crop in zip(errors, crops)]
                report[name] = {
                    "max_error": max(float(error.max()) for error in errors),
                    "of_tolerance": max(shares),
                    "relative_rms": rms(errors) / rms([crop.value for crop in crops]),
                }
        return report

    def allowed_rms(self, name: str) -> float:
        """RMS of the tolerance relative to the RMS value: what two right results may differ by, in full, twice over."""
        crops = [crop for crop in self.crops if crop.tensor == name]
        return rms([self.tolerance.of_crop(crop) for crop in crops]) / rms([crop.value for crop in crops])


def score_gradient(p: np.ndarray, dp: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """dS = p (dP - delta), the size of its independently rounded terms, and that of each query's delta."""
    delta = (p * dp).sum(-1, keepdims=True)
    delta_size = np.sqrt((p**2 * dp**2).sum(-1, keepdims=True))
    return p * (dp - delta), p * (np.abs(dp) + np.abs(delta) + delta_size), delta_size


def share(error: np.ndarray, allowed: np.ndarray) -> float:
    """The largest error over its tolerance; NaN counts as infinitely wrong."""
    ratio = np.where(error > 0, error / np.maximum(allowed, np.finfo(np.float64).tiny), error)
    largest = float(ratio.max())
    return math.inf if math.isnan(largest) else largest


def rms(arrays: list[np.ndarray]) -> float:
    """Root of the mean of the squares over all arrays."""
    total = sum(float((array.astype(np.float64) ** 2).sum()) for array in arrays)
    return math.sqrt(total / sum(array.size for array in arrays))


def difference(first: Path, second: Path) -> dict[str, float]:
    """RMS difference of two peers' whole tensors, relative to the first one's RMS value."""
    found: dict[str, float] = {}
    with safe_open(first, "np") as a, safe_open(second, "np") as b:
        for name in a.keys():
            if name in set(b.keys()):
                # f32 keeps the largest workload's differences in memory.
                left, right = (file.get_tensor(name).astype(np.float32) for file in (a, b))
                scale = float(np.sqrt(np.mean(np.square(left), dtype=np.float64)))
                found[name] = float(np.sqrt(np.mean(np.square(right - left), dtype=np.float64))) / scale
    return found
