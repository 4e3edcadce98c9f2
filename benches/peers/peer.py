"""One peer library in one process: answers JSON lines on stdin with JSON lines on stdout.

Usage: ``python peer.py torch-eager``; the protocol is described in README.md and spoken by tilefold's own peer too.
Every peer takes q, k, v as [N, L, H, D], an additive key mask [N, 1, 1, L] of 0 and -1e9 and a pair bias [1, H, L, L],
and gives out (and dq, dk, dv, dbias) in the same layout: where a library wants another, the change is timed.
"""

from __future__ import annotations

import gc
import importlib
import json
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np

from base import MASKED, Peer, Refusal, threads
from machine import proc_bytes


class OrtAttention(Peer):
    """ONNX Runtime's com.microsoft.MultiHeadAttention: key mask and pair bias go in apart, nothing is summed."""

    logit_copies = (1.2, 0.0)

    def prepare(self) -> str:
        import onnx
        import onnxruntime

        if self.backward:
            raise Refusal("forward only")
        if self.dtype != "f32":
            raise Refusal("MultiHeadAttention has no bf16 kernel for CPU")
        feeds = {name: self.inputs[name].reshape(self.rows, -1, self.heads * self.head_dim) for name in ("q", "k", "v")}
        if "mask" in self.inputs:
            feeds["mask"] = self.inputs["mask"].astype(np.int32)
        if "bias" in self.inputs:
            feeds["bias"] = self.inputs["bias"]
        helper, types = onnx.helper, onnx.TensorProto
        optional = [name if name in feeds else "" for name in ("mask", "bias")]
        attributes = {"num_heads": self.heads, "scale": self.scale, "mask_filter_value": MASKED}
        node = helper.make_node("MultiHeadAttention", ["q", "k", "v", "", *optional], ["out"], domain="com.microsoft",
                                unidirectional=int(self.causal), **attributes)
        declared = [helper.make_tensor_value_info(name, types.INT32 if name == "mask" else types.FLOAT, array.shape)
                    for name, array in feeds.items()]
        out = helper.make_tensor_value_info("out", types.FLOAT, feeds["q"].shape)
        opsets = [helper.make_opsetid("", 17), helper.make_opsetid("com.microsoft", 1)]
        graph = helper.make_graph([node], "attention", declared, [out])
        model = helper.make_model(graph, opset_imports=opsets, ir_version=9)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads()
        # A thread pool that spins after its run would take a core from the next peer's turn.
        options.add_session_config_entry("session.force_spinning_stop", "1")
        self.session = onnxruntime.InferenceSession(model.SerializeToString(), options, ["CPUExecutionProvider"])
        self.feeds = {name: onnxruntime.OrtValue.ortvalue_from_numpy(array) for name, array in feeds.items()}
        return ""

    def step(self) -> tuple[Any, ...]:
        return tuple(self.session.run_with_ort_values(["out"], self.feeds))

    def to_numpy(self, tensor: Any) -> np.ndarray:
        return tensor.numpy()


class JaxJit(Peer):
    """jax.jit of the plain formula; jax.vjp of it for the gradients, compiled as one function."""

    logit_copies = (2.2, 4.5)

    def prepare(self) -> str:
        os.environ.setdefault("JAX_PLATFORMS", "cpu")
        import jax
        import jax.numpy as jnp

        self.jax = jax
        arrays = {name: jnp.asarray(array) for name, array in self.inputs.items()}
        constants = [arrays[name] for name in ("mask_bias", "causal_bias") if name in arrays]

        def attend(q: Any, k: Any, v: Any, *biases: Any) -> Any:
            logits = jnp.einsum("nqhd,nkhd->nhqk", q * q.dtype.type(self.scale), k)
            for bias in biases:
                logits = logits + bias
            return jnp.einsum("nhqk,nkhd->nqhd", jax.nn.softmax(logits, axis=-1), v)

        def forward(constants: list[Any], *wanted: Any) -> tuple[Any, ...]:
            return (attend(*wanted, *constants),)

        def both(d_out: Any, constants: list[Any], *wanted: Any) -> tuple[Any, ...]:
            out, pull_back = jax.vjp(lambda *leaves: attend(*leaves, *constants), *wanted)
            return (out, *pull_back(d_out))

        wanted = [arrays[name] for name in ("q", "k", "v", "bias") if name in arrays]
        self.arguments = [constants, *wanted]
        self.compiled = jax.jit(both if self.backward else forward)
        if self.backward:
            self.arguments.insert(0, arrays["d_out"])
        return ""

    def step(self) -> tuple[Any, ...]:
        return self.jax.block_until_ready(self.compiled(*self.arguments))


# The class of each peer, as module and name, so that a process imports its own library only.
PEERS = {
    "torch-eager": ("torch_peers", "TorchPeer"),
    "torch-sdpa": ("torch_peers", "TorchSdpa"),
    "torch-compile": ("torch_peers", "TorchCompile"),
    "torch-chunked": ("torch_peers", "TorchChunked"),
    "torch-sdpa-chunked": ("torch_peers", "TorchSdpaChunked"),
    "torch-recompute": ("torch_peers", "TorchRecompute"),
    "ort-mha": ("__main__", "OrtAttention"),
    "jax-jit": ("__main__", "JaxJit"),
}


def answer(peer: Peer, request: dict[str, Any]) -> dict[str, Any]:
    """Carries out one command."""
    match request["cmd"]:
        case "load":
            try:
                note = peer.load(request)
            except Refusal as refusal:
                return {"ok": False, "reason": str(refusal), "need_bytes": refusal.need_bytes}
            # From here on the peak is that of the passes, not of reading and tuning.
            Path("/proc/self/clear_refs").write_text("5")
            return {"ok": True, "note": note, "choice": peer.choice}
        case "run":
            return {"seconds": peer.run(request["repeats"])}
        case "save":
            peer.save(request["path"])
            return {"ok": True}
        case "peak":
            return {"rss_peak_bytes": proc_bytes("/proc/self/status", "VmHWM")}
        case other:
            return {"ok": False, "reason": f"unknown command {other!r}"}


def main() -> int:
    """Serves one peer until `quit` or the end of stdin."""
    if len(sys.argv) != 2 or sys.argv[1] not in PEERS:
        print(f"usage: peer.py {'|'.join(PEERS)}", file=sys.stderr)
        return 2
    # Libraries print what they like to stdout: keep the real one for the protocol.
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    # Should memory run out all the same, this process goes first.
    Path("/proc/self/oom_score_adj").write_text("1000")
    gc.disable()
    module, class_name = PEERS[sys.argv[1]]
    peer: Peer = getattr(importlib.import_module(module), class_name)()
    for line in sys.stdin:
        request = json.loads(line)
        if request["cmd"] == "quit":
            break
        try:
            reply = answer(peer, request)
        except Exception as error:  # A peer that fails is a row in the table, not the end of the run.
            first = str(error).strip().splitlines() or [""]
            reply = {"ok": False, "reason": f"{type(error).__name__}: {first[0][:200]}"}
        replies.write(json.dumps(reply) + "\n")
        replies.flush()
    return 0


if __name__ == "__main__":
    sys.exit(main())
