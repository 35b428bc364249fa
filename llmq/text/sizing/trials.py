"""The rates of a language model's passes, told by one block and a part of the head at their real widths."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from llmq.sketch import Trial, Unit

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

    from llmq.text.sizing.network import TextSketch

MOST = 1e10
"""Operations of a trial; a pass of more takes fewer tokens."""
WIDEST = 2048
"""The widest stream of a trial: wider ones run at the same rate, and their weights would fill the memory."""
RANK = 16
"""The rank of the adapters of a trial that learns."""
HEAD_ROWS, HEAD_OUTPUTS = 512, 2**15
GRID_WEIGHTS = 2**20
"""Weights that a trial rounds to a grid."""


@dataclass(frozen=True)
class _Shape:
    """The widths of a block, and the sequences that it sees."""

    dtype: str
    rows: int
    length: int
    hidden: int
    inner: int
    heads: int
    queries: int
    keys: int
    learns: bool

    @property
    def layers(self) -> dict[str, tuple[int, int]]:
        """`(outputs, inputs)` of the matrices of a block of Llama's kind, each input with a layer of its own."""
        hidden, inner, half = self.hidden, self.inner, self.keys // 2
        attention = {"q": (self.queries, hidden), "k": (half, hidden), "v": (half, hidden), "o": (hidden, self.queries)}
        return {**attention, "gate": (inner, hidden), "up": (inner, hidden), "down": (hidden, inner)}

    @property
    def operations(self) -> float:
        """Those of a pass forwards, of which each query sees half of the tokens."""
        weights = sum(outputs * inputs for outputs, inputs in self.layers.values())
        ranks = sum(RANK * (outputs + inputs) for outputs, inputs in self.layers.values()) if self.learns else 0
        return 2.0 * self.rows * self.length * (weights + ranks + self.length * self.queries)


def block(sketch: TextSketch, rows: int, length: int, learns: bool = False) -> Trial:
    """A block forwards; with `learns`, with adapters, and backwards as well. The rate counts operations forwards."""
    shape = _shape(sketch, rows, length, learns)
    name = f"block {shape.dtype} {shape.rows}x{shape.length}x{shape.hidden}{' and backwards' if learns else ''}"
    return Trial(name, lambda device: _unit(shape, device))


def head(sketch: TextSketch, rows: int) -> Trial:
    """The product with the head, of a part of the vocabulary."""
    rows, outputs = min(rows, HEAD_ROWS), min(sketch.vocabulary, HEAD_OUTPUTS)
    inputs = min(sketch.hidden, WIDEST)

    def unit(device: str) -> Unit:
        import torch

        dtype = getattr(torch, sketch.dtype)
        stream, weight = (torch.full((n, inputs), 0.01, dtype=dtype, device=device) for n in (rows, outputs))
        return lambda: torch.nn.functional.linear(stream, weight), 2.0 * rows * weight.numel()

    return Trial(f"head {sketch.dtype} {rows}x{inputs}x{outputs}", unit)


def eight_bit(sketch: TextSketch, rows: int) -> Trial:
    """The product of LLM.int8() with a matrix of the mean size; small ones take the time of their copies."""
    weights = [part.weights for part in sketch.linears]
    inputs = min(sketch.hidden, WIDEST)
    outputs = max(16, sum(weights) // max(1, len(weights)) // inputs // 16 * 16)
    rows = max(1, min(rows, int(MOST / (2 * inputs * outputs))))

    def unit(device: str) -> Unit:
        import torch
        from bitsandbytes.nn import Int8Params, Linear8bitLt

        dtype = getattr(torch, sketch.dtype)
        layer = Linear8bitLt(inputs, outputs, bias=False, has_fp16_weights=False)
        weight = torch.full((outputs, inputs), 0.01, dtype=dtype)
        layer.weight = Int8Params(weight, requires_grad=False, has_fp16_weights=False)
        layer, stream = layer.to(device), torch.full((rows, inputs), 0.01, dtype=dtype, device=device)

        def run() -> None:
            with torch.inference_mode():
                layer(stream)

        return run, 2.0 * rows * inputs * outputs

    return Trial(f"int8 {rows}x{inputs}x{outputs}", unit)


def divergence(vocabulary: int) -> Trial:
    """Softmax in float64 of the logits of a few tokens of two models, and their divergence; the rate counts logits."""
    outputs = min(vocabulary, HEAD_OUTPUTS)

    def unit(device: str) -> Unit:
        import torch

        from llmq.text.losses import ROWS, divergence_of

        ours, theirs = (torch.full((ROWS, outputs), value, device=device) for value in (0.01, 0.02))
        return lambda: divergence_of(ours, theirs), float(ours.numel())

    return Trial(f"divergence {outputs}", unit)


def grid(outputs: int, inputs: int) -> Trial:
    """The search for the ranges of a matrix in groups, and its rounding; the rate counts weights."""
    inputs = min(inputs, WIDEST)
    outputs = max(1, min(outputs, GRID_WEIGHTS // inputs))
    size = next((size for size in (128, 64, 32) if inputs % size == 0), -1)

    def unit(device: str) -> Unit:
        import torch

        from llmq.matrix.grid import round_to_nearest

        generator = torch.Generator(device).manual_seed(0)
        weight = torch.randn(outputs, inputs, generator=generator, device=device)
        return lambda: round_to_nearest(weight, 4, size, True, mse=True), float(weight.numel())

    return Trial(f"grid {outputs}x{inputs}", unit)


def _shape(sketch: TextSketch, rows: int, length: int, learns: bool) -> _Shape:
    factor = max(1, -(-sketch.hidden // WIDEST))
    heads = max(1, sketch.heads // factor)
    width = max(2, sketch.queries // max(1, sketch.heads) // 2 * 2)
    shared = max(1, sketch.keys // 2 // width // factor)
    heads = -(-heads // shared) * shared  # whole groups of queries
    hidden, inner = sketch.hidden // factor, max(1, sketch.inner // factor)
    one = _Shape(sketch.dtype, 1, length, hidden, inner, heads, heads * width, 2 * shared * width, learns)
    most = MOST / (3 if learns else 1)
    rows = max(1, min(rows, int(most / one.operations)))
    return _Shape(**{**vars(one), "rows": rows, "length": max(1, min(length, int(length * most / one.operations)))})


def _unit(shape: _Shape, device: str) -> Unit:
    import torch

    dtype = getattr(torch, shape.dtype)
    weights = {n: torch.full(s, 0.01, dtype=dtype, device=device) for n, s in shape.layers.items()}
    stream = torch.ones(shape.rows, shape.length, shape.hidden, dtype=dtype, device=device)
    down, up = (
        {n: torch.full(size(*s), 0.01, device=device, requires_grad=True) for n, s in shape.layers.items()}
        for size in (lambda outputs, inputs: (RANK, inputs), lambda outputs, inputs: (outputs, RANK))
    )

    def adapted(name: str, given: Tensor) -> Tensor:
        made = torch.nn.functional.linear(given, weights[name])
        return made + (given @ down[name].to(dtype).T) @ up[name].to(dtype).T

    def plain(name: str, given: Tensor) -> Tensor:
        return torch.nn.functional.linear(given, weights[name])

    def forwards() -> None:
        with torch.inference_mode():
            _block(shape, stream, plain)

    def both() -> None:
        # The stream has a gradient, as behind an earlier block.
        _block(shape, stream.clone().requires_grad_(), adapted).sum().backward()  # type: ignore[no-untyped-call]

    return both if shape.learns else forwards, shape.operations


def _block(shape: _Shape, stream: Tensor, linear: Callable[[str, Tensor], Tensor]) -> Tensor:
    """A block of Llama's kind: attention and a gated MLP, each after a norm and with a shortcut."""
    from torch.nn.functional import scaled_dot_product_attention, silu

    normed = _norm(stream)
    queries, keys, values = (_heads(shape, linear(name, normed)) for name in "qkv")  # (rows, heads, length, width)
    keys, values = (x.repeat_interleave(queries.shape[1] // x.shape[1], 1) for x in (keys, values))
    mixed = scaled_dot_product_attention(_turned(queries), _turned(keys), values, is_causal=True)
    stream = stream + linear("o", mixed.transpose(1, 2).flatten(2))
    normed = _norm(stream)
    return stream + linear("down", silu(linear("gate", normed)) * linear("up", normed))


def _norm(stream: Tensor) -> Tensor:
    wide = stream.float()
    return (wide * (wide.pow(2).mean(-1, keepdim=True) + 1e-6).rsqrt()).to(stream.dtype)


def _heads(shape: _Shape, made: Tensor) -> Tensor:
    return made.reshape(shape.rows, shape.length, -1, shape.queries // shape.heads).transpose(1, 2)


def _turned(heads: Tensor) -> Tensor:
    """The work of a rotary embedding."""
    import torch

    first, second = heads.chunk(2, -1)
    return heads * 0.5 + torch.cat((-second, first), -1) * 0.5
