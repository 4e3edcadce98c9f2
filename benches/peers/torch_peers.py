"""The PyTorch peers: the plain formula, the fused op, the compiler, and loops over chunks of rows."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import Any

import ml_dtypes
import numpy as np

from base import Peer, Refusal, threads

# Row chunks are tried at these sizes of one chunk's logits: from a core's cache to well past a shared cache.
CHUNK_LOGIT_BYTES = (1 << 19, 1 << 21, 1 << 23, 1 << 25, 1 << 27)
# Trial passes of one choice: so many, or until they took so long.
TUNING_PASSES, SLOW_TUNING_S = 4, 0.5


class TorchPeer(Peer):
    """The plain formula, as OpenFold writes it: q scaled first, biases added in place."""

    def prepare(self) -> str:
        import torch

        torch.set_num_threads(threads())
        self.torch = torch
        self.tensors = {name: self.from_numpy(array) for name, array in self.inputs.items() if name != "mask"}
        self.qkv = [self.tensors[name] for name in ("q", "k", "v")]
        names = [name for name in ("mask_bias", "bias", "causal_bias") if name in self.tensors]
        self.biases = [self.tensors[name] for name in names]
        self.wanted = self.qkv + ([self.tensors["bias"]] if "bias" in self.tensors else [])
        if self.backward:
            for tensor in self.wanted:
                tensor.requires_grad_()
        self.forward = self.build()
        return ""

    def from_numpy(self, array: np.ndarray) -> Any:
        """A torch tensor; bf16 goes through its bits, since numpy has no such type of its own."""
        if array.dtype == ml_dtypes.bfloat16:
            return self.torch.from_numpy(array.view(np.uint16)).view(self.torch.bfloat16)
        return self.torch.from_numpy(array)

    def to_numpy(self, tensor: Any) -> np.ndarray:
        tensor = tensor.detach().contiguous()
        if tensor.dtype == self.torch.bfloat16:
            return tensor.view(self.torch.uint16).numpy().view(ml_dtypes.bfloat16)
        return tensor.numpy()

    def build(self) -> Callable[..., Any]:
        """The forward function of (q, k, v, *biases)."""
        return self.attend

    def attend(self, q: Any, k: Any, v: Any, *biases: Any) -> Any:
        """softmax(scale q k^T + biases) v, unfused."""
        logits = (q * self.scale).transpose(1, 2) @ k.permute(0, 2, 3, 1)
        for bias in biases:
            logits += bias
        probabilities = self.torch.softmax(logits, -1)
        return (probabilities @ v.transpose(1, 2)).transpose(1, 2).contiguous()

    def step(self) -> tuple[Any, ...]:
        if not self.backward:
            with self.torch.no_grad():
                return (self.forward(*self.qkv, *self.biases),)
        out = self.forward(*self.qkv, *self.biases)
        return (out, *self.torch.autograd.grad(out, self.wanted, self.tensors["d_out"]))


class TorchSdpa(TorchPeer):
    """`scaled_dot_product_attention` with the summed biases as attn_mask; one that wants a gradient is not fused."""

    logit_copies = (2.2, 6.0)

    def attend(self, q: Any, k: Any, v: Any, *biases: Any) -> Any:
        q, k, v = (tensor.transpose(1, 2) for tensor in (q, k, v))
        sdpa = self.torch.nn.functional.scaled_dot_product_attention
        if self.causal and len(biases) == 1:
            out = sdpa(q, k, v, is_causal=True, scale=self.scale)
        else:
            out = sdpa(q, k, v, attn_mask=sum(biases) if biases else None, scale=self.scale)
        return out.transpose(1, 2).contiguous()


class TorchCompile(TorchPeer):
    """torch.compile of the plain formula."""

    logit_copies = (2.2, 5.0)

    def build(self) -> Callable[..., Any]:
        return self.torch.compile(self.attend, dynamic=False)


class Chunked(TorchPeer):
    """Mixed in before a torch peer: loops over chunks of rows, at the chunk size and inner type that ran fastest."""

    inner_types: tuple[str, ...] = ("f32", "same")

    def prepare(self) -> str:
        super().prepare()
        if self.rows == 1:
            raise Refusal("one row: nothing to chunk")
        self.choice = self.choice or self.tune()
        self.chunk, self.inner = self.choice
        return f"{self.chunk} rows a chunk" + (", f32 inside" if self.inner == "f32" and self.dtype != "f32" else "")

    def tune(self) -> list[Any]:
        """The fastest chunk size and inner type."""
        best_seconds, best = math.inf, [1, "same"]
        for inner in self.inner_types if self.dtype != "f32" else ("same",):
            for chunk in self.chunk_sizes():
                seconds = self.seconds_per_row(chunk, inner)
                if seconds < best_seconds:
                    best_seconds, best = seconds, [chunk, inner]
                if seconds > 3 * best_seconds:  # bf16 products without instructions for them: other sizes do not help
                    break
        return best

    def chunk_sizes(self) -> list[int]:
        """Rows of a chunk to try, the smallest first."""
        row_bytes = self.heads * self.seqlen * self.seqlen_k * 4
        return sorted({min(self.rows, max(1, size // row_bytes)) for size in CHUNK_LOGIT_BYTES})

    def seconds_per_row(self, chunk: int, inner: str) -> float:
        """Best of a few passes over a few rows; of one where that is slow."""
        self.chunk, self.inner = chunk, inner
        rows = min(self.rows, max(16, chunk))
        seconds = []
        while len(seconds) < TUNING_PASSES and sum(seconds) < SLOW_TUNING_S:
            start = time.perf_counter()
            self.pass_over(rows)
            seconds.append(time.perf_counter() - start)
        return min(seconds) / rows

    def step(self) -> tuple[Any, ...]:
        return self.pass_over(self.rows)

    def inner_type(self, *tensors: Any) -> list[Any]:
        """The tensors in the type that a chunk is computed in."""
        return [tensor.float() if self.inner == "f32" else tensor for tensor in tensors]

    def slices(self, rows: int) -> list[slice]:
        """The row ranges of one pass."""
        return [slice(start, min(start + self.chunk, rows)) for start in range(0, rows, self.chunk)]

    def chunk_biases(self, part: slice) -> list[Any]:
        """The biases of a row range: those shared by all rows stay whole."""
        return [bias[part] if bias.shape[0] > 1 else bias for bias in self.biases]

    def pass_over(self, rows: int) -> tuple[Any, ...]:
        torch = self.torch
        if not self.backward:
            out = torch.empty_like(self.qkv[0][:rows])
            with torch.no_grad():
                for part in self.slices(rows):
                    chunk = self.inner_type(*(tensor[part] for tensor in self.qkv), *self.chunk_biases(part))
                    out[part] = self.attend(*chunk)
            return (out,)
        # `split` has one backward for all chunks, where a slice would fill a whole gradient tensor for each.
        splits = zip(*(tensor[:rows].split(self.chunk) for tensor in self.qkv))
        pieces = []
        for part, qkv in zip(self.slices(rows), splits):
            chunk = self.inner_type(*qkv, *self.chunk_biases(part))
            pieces.append(self.attend(*chunk).to(self.qkv[0].dtype))
        out = torch.cat(pieces)
        return (out, *torch.autograd.grad(out, self.wanted, self.tensors["d_out"][:rows]))


class TorchChunked(Chunked):
    """OpenFold's chunk_layer around the plain formula; autograd keeps every chunk's probabilities."""

    logit_copies = (0.1, 2.5)

    def need_bytes(self) -> int:
        return super().need_bytes() + 4 * CHUNK_LOGIT_BYTES[-1]


class TorchSdpaChunked(Chunked, TorchSdpa):
    """The same loop around `scaled_dot_product_attention`: the summed mask exists for one chunk only."""

    logit_copies = (0.1, 4.0)
    inner_types = ("same",)

    def need_bytes(self) -> int:
        return super().need_bytes() + 4 * CHUNK_LOGIT_BYTES[-1]


class TorchRecompute(Chunked):
    """Chunks that keep nothing: the backward, written by hand, computes each chunk's probabilities again."""

    logit_copies = (0.0, 0.0)

    def need_bytes(self) -> int:
        return super().need_bytes() + 6 * CHUNK_LOGIT_BYTES[-1]

    def prepare(self) -> str:
        note = super().prepare()
        for tensor in self.wanted:
            tensor.requires_grad_(False)
        return note

    def probabilities(self, part: slice) -> tuple[Any, Any, Any, Any]:
        """p [n H, L, L] with scaled q, k and v as [n H, L, D]: biases first, so that q k^T adds to them in place."""
        torch = self.torch
        q, k, v = (self.batched(tensor[part]) for tensor in self.qkv)
        q = q * self.scale
        biases = self.inner_type(*self.chunk_biases(part))
        shape = (part.stop - part.start, self.heads, self.seqlen, self.seqlen_k)
        logits = torch.zeros(shape, dtype=q.dtype) if not biases else torch.empty(shape, dtype=q.dtype)
        if len(biases) == 1:
            logits.copy_(biases[0])
        elif biases:
            torch.add(biases[0], sum(biases[2:], biases[1]), out=logits)
        logits = logits.view(-1, self.seqlen, self.seqlen_k).baddbmm_(q, k.transpose(1, 2))
        return torch.softmax(logits, -1), q, k, v

    def batched(self, tensor: Any) -> Any:
        """[n, L, H, D] as a contiguous [n H, L, D] in the inner type."""
        (tensor,) = self.inner_type(tensor)
        return tensor.transpose(1, 2).reshape(-1, tensor.shape[1], self.head_dim)

    def unbatched(self, tensor: Any) -> Any:
        """The inverse of `batched`, as a view."""
        return tensor.view(-1, self.heads, tensor.shape[1], self.head_dim).transpose(1, 2)

    def pass_over(self, rows: int) -> tuple[Any, ...]:
        torch = self.torch
        with torch.no_grad():
            out = torch.empty_like(self.qkv[0][:rows])
            for part in self.slices(rows):
                p, _, _, v = self.probabilities(part)
                out[part] = self.unbatched(torch.bmm(p, v))
            if not self.backward:
                return (out,)
            dq, dk, dv = (torch.empty_like(tensor[:rows]) for tensor in self.qkv)
            dbias = torch.zeros(self.heads, self.seqlen, self.seqlen_k)
            for part in self.slices(rows):
                p, q, k, v = self.probabilities(part)
                d_out = self.batched(self.tensors["d_out"][part])
                dv[part] = self.unbatched(torch.bmm(p.transpose(1, 2), d_out))
                dp = torch.bmm(d_out, v.transpose(1, 2))
                ds = torch.ops.aten._softmax_backward_data(dp, p, -1, p.dtype)
                dq[part] = self.unbatched(torch.bmm(ds, k)) * self.scale
                dk[part] = self.unbatched(torch.bmm(ds.transpose(1, 2), q))
                if "bias" in self.tensors:
                    dbias += ds.view(-1, self.heads, self.seqlen, self.seqlen_k).sum(0)
        return (out, dq, dk, dv, *([dbias.to(out.dtype)] if "bias" in self.tensors else []))
