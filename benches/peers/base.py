"""What every Python peer shares: reading the inputs, the additive biases, the memory guard, timing and saving."""

from __future__ import annotations

import os
import time
from typing import Any

import ml_dtypes  # noqa: F401  (gives numpy its bfloat16, which safetensors asks for by name)
import numpy as np
from safetensors import safe_open
from safetensors.numpy import save_file

from machine import memory_available_bytes

MASKED = -1e9
OUTPUTS = ("out", "dq", "dk", "dv", "dbias")


class Refusal(Exception):
    """A peer cannot run this workload; the message says why, `need_bytes` how much memory it would take."""

    def __init__(self, reason: str, need_bytes: int | None = None) -> None:
        super().__init__(reason)
        self.need_bytes = need_bytes


class Peer:
    """What all peers share: the inputs, the shape, and the additive biases in the order they are added."""

    # Peak memory in whole copies of the [N, H, L, L] logits, forward and forward + backward (measured).
    logit_copies = (2.0, 4.0)
    # What tuning found best, sent back in a later `load` to skip the tuning.
    choice: list[Any] | None = None

    def load(self, request: dict[str, Any]) -> str:
        """Reads the inputs, prepares the biases and returns a note on what was chosen (may be empty)."""
        self.dtype: str = request["dtype"]
        self.backward: bool = request["pass"] == "fwdbwd"
        self.scale: float = request["scale"]
        self.causal: bool = request.get("causal", False)
        self.choice = request.get("choice")
        with safe_open(request["inputs"], "np") as file:
            self.rows, self.seqlen, self.heads, self.head_dim = file.get_slice("q").get_shape()
            self.seqlen_k: int = file.get_slice("k").get_shape()[1]
            self.refuse_if_too_large()
            self.inputs = {name: file.get_tensor(name) for name in file.keys()}
        if "mask" in self.inputs:
            additive = np.where(self.inputs["mask"] != 0, 0.0, MASKED)[:, None, None, :]
            self.inputs["mask_bias"] = additive.astype(self.inputs["q"].dtype)
        if "bias" in self.inputs:
            self.inputs["bias"] = self.inputs["bias"][None]
        if self.causal:
            keep = np.tri(self.seqlen, self.seqlen_k, dtype=bool)[None, None]
            self.inputs["causal_bias"] = np.where(keep, 0.0, MASKED).astype(self.inputs["q"].dtype)
        return self.prepare()

    def need_bytes(self) -> int:
        """Peak memory expected: inputs, outputs, and this peer's copies of the logits."""
        item = 4 if self.dtype == "f32" else 2
        tensors = self.rows * (self.seqlen + self.seqlen_k) * self.heads * self.head_dim * item
        logits = self.rows * self.heads * self.seqlen * self.seqlen_k * item
        return int(tensors * (6 if self.backward else 3) + logits * self.logit_copies[self.backward])

    def refuse_if_too_large(self) -> None:
        """Refuses what would not fit into the memory that is free now."""
        need = self.need_bytes()
        if need > memory_available_bytes():
            raise Refusal(f"needs {need / 1e9:.1f} GB", need)

    def prepare(self) -> str:
        """Brings the inputs into the library's own tensors and builds what is called in `step`."""
        raise NotImplementedError

    def step(self) -> tuple[Any, ...]:
        """One timed pass: (out,) or (out, dq, dk, dv[, dbias])."""
        raise NotImplementedError

    def to_numpy(self, tensor: Any) -> np.ndarray:
        """One result as an array."""
        return np.asarray(tensor)

    def run(self, repeats: int) -> list[float]:
        """Seconds of each of `repeats` passes; the last results are kept for `save`."""
        seconds = []
        for _ in range(repeats):
            self.results: tuple[Any, ...] = ()
            start = time.perf_counter()
            self.results = self.step()
            seconds.append(time.perf_counter() - start)
        return seconds

    def save(self, path: str) -> None:
        """Writes the results of the last pass."""
        shapes = {name: self.inputs["q"].shape for name in ("out", "dq")}
        shapes |= {name: self.inputs["k"].shape for name in ("dk", "dv")}
        shapes["dbias"] = (self.heads, self.seqlen, self.seqlen_k)
        arrays = [np.ascontiguousarray(self.to_numpy(result)) for result in self.results]
        save_file({name: array.reshape(shapes[name]) for name, array in zip(OUTPUTS, arrays)}, path)


def threads() -> int:
    """How many threads a peer may use: the processors it is bound to."""
    return len(os.sched_getaffinity(0))
