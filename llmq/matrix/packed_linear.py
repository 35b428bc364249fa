"""A linear layer over packed integers that needs no compiled extension, for training and inference.

On a processor the codes are held as planes of 4 bits in the layout of PyTorch's packed int4 product: one plane for 2, 3
and 4 bits, two for 8 (`q = 16 * high + low`). A few rows go through that product; more are multiplied with the weight,
unpacked for the moment. Codes whose shape or device has no such product stay as in the file, and are always unpacked.
"""

from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor, nn

from llmq.matrix import pack_quantized
from llmq.matrix.gptq_format import TENSORS, from_tensors
from llmq.matrix.grid import Quantized
from llmq.matrix.products import lacks_bfloat16
from llmq.matrix.unpacking import compiled

if TYPE_CHECKING:
    from torch.autograd.function import FunctionCtx

ROWS, ROWS_BESIDE_ONE_PASS = 80, 24
"""Up to this many rows the packed product is the faster one (`scripts/bench_packed`)."""
KERNEL_GROUPS = (256, 128, 64, 32)
TILE = 64
"""Outputs that the packed layout interleaves: 32 in the low half of a byte, 32 in the high half."""


class PackedLinear(nn.Linear):
    """A linear layer whose weight is packed as the GPTQ format has it. Every read of `weight` unpacks the codes."""

    def __init__(
        self, inputs: int, outputs: int, bias: bool, bits: int, groups: int, stored_as: str, dtype: torch.dtype
    ):
        nn.Module.__init__(self)
        self._begin(inputs, outputs, bias, bits, dtype)
        self.stored_as = stored_as
        shapes = (inputs * bits // 32, outputs), (groups, outputs * bits // 32), (groups, outputs), (inputs,)
        dtypes = torch.int32, torch.int32, torch.float16, torch.int32
        for name, shape, stored in zip(TENSORS, shapes, dtypes, strict=True):
            self.register_buffer(name, torch.empty(shape, dtype=stored))

    def _begin(self, inputs: int, outputs: int, bias: bool, bits: int, dtype: torch.dtype) -> None:
        """Everything but the codes."""
        self.in_features, self.out_features, self.bits = inputs, outputs, bits
        added = nn.Parameter(torch.empty(outputs, dtype=dtype), requires_grad=False) if bias else None
        self.register_parameter("bias", added)
        self.compute_dtype = dtype
        self.planes = nn.ModuleList()
        self.order: Tensor | None = None  # (inputs,): the order of the planes, if another

    def prepare(self) -> None:
        """Bring the codes into the layout of the packed product, if they fit it; called once, after loading."""
        made = self.quantized()
        if not fits_kernel(made, self.compute_dtype):
            return
        order = made.g_idx.argsort(stable=True)
        self.planes = nn.ModuleList(planes_of(made, order))
        for name in [*self._buffers]:
            delattr(self, name)
        if bool((order != torch.arange(self.in_features)).any()):
            self.order = order

    def quantized(self) -> Quantized:
        """The quantized matrix in the four tensors of the format."""
        return from_tensors({name: getattr(self, name) for name in TENSORS}, self.bits, self.stored_as)

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        """The float weight `[outputs, inputs]` in the dtype that the layer computes in."""
        planes = self._planes()
        if not planes:
            return self.quantized().weight().to(self.compute_dtype)
        rows = unpacked(planes)  # (inputs, outputs)
        return rows.t() if self.order is None else rows[self.order.argsort()].t()

    def _planes(self) -> list["Plane"]:
        return cast(list[Plane], list(self.planes))

    def forward(self, input: Tensor) -> Tensor:
        """`input @ weight.T + bias`; the gradient goes to the input alone."""
        if input.requires_grad and torch.is_grad_enabled():
            made: Tensor = _Unpacking.apply(input, self)
            return made if self.bias is None else made + self.bias
        rows = input.numel() // self.in_features
        if not self.planes or not 0 < rows <= most_rows() or input.dtype != torch.bfloat16:
            return nn.functional.linear(input, self.weight.to(input.dtype), self.bias)
        return self.product(input.reshape(rows, self.in_features)).view(*input.shape[:-1], self.out_features)

    def product(self, rows: Tensor) -> Tensor:
        """`rows @ weight.T + bias` by the packed product, for a few rows `(rows, inputs)` in bfloat16."""
        # The kernel reads the rows as one piece of memory.
        rows = rows.contiguous() if self.order is None else rows[:, self.order]
        first, *rest = self._planes()
        made = first.product(rows)
        for plane in rest:
            made = made + plane.product(rows)
        return made if self.bias is None else made + self.bias

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, bits={self.bits}"


class PackQuantizedLinear(PackedLinear):
    """The same over the tensors of compressed-tensors; `shapes` has the shape and dtype of each tensor in the file."""

    def __init__(
        self,
        inputs: int,
        outputs: int,
        bias: bool,
        shapes: Mapping[str, tuple[Sequence[int], torch.dtype]],
        dtype: torch.dtype,
    ):
        nn.Module.__init__(self)
        self._begin(inputs, outputs, bias, shapes["weight_packed"][0][1] * 32 // inputs, dtype)
        for name, (shape, stored) in shapes.items():
            self.register_buffer(name, torch.empty(tuple(shape), dtype=stored))

    def quantized(self) -> Quantized:
        """The quantized matrix in the tensors of the format."""
        return pack_quantized.to_quantized({name: t for name, t in self._buffers.items() if t is not None})


class Plane(nn.Module):
    """Codes of 4 bits, packed for the processor's int4 product: weight = `(code - 8) * scale + shift`."""

    def __init__(self, codes: Tensor, scales: Tensor, shifts: Tensor):
        super().__init__()
        self.outputs = codes.shape[1]
        self.group = len(codes) // len(scales)
        self.shifted = bool(shifts.any())
        packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes.t().int().contiguous(), 1)
        self.packed: Tensor
        self.scales: Tensor
        self.register_buffer("packed", packed)  # bytes (outputs, inputs / 2)
        self.register_buffer(
            "scales", torch.stack([scales, shifts], -1).bfloat16().contiguous()
        )  # (groups, outputs, 2)

    def product(self, rows: Tensor) -> Tensor:
        """`rows @ weight.T`."""
        made: Tensor = torch.ops.aten._weight_int4pack_mm_for_cpu(rows, self.packed, self.group, self.scales)
        return made

    def codes(self) -> Tensor:
        """The codes `[inputs, outputs]` less 8, in bfloat16."""
        inputs = self.packed.shape[1] * 2
        whole = self.outputs // TILE * TILE  # outputs in complete tiles
        made = torch.empty(inputs, self.outputs, dtype=torch.bfloat16)
        flat = self.packed.view(-1)
        low, high = ((part.view(torch.int8) - 8) for part in (flat & 15, flat >> 4))
        for half, codes in enumerate((low, high)):
            tiles = codes[: whole * inputs // 2].view(-1, inputs, TILE // 2)  # (tiles, inputs, half a tile)
            made[:, :whole].view(inputs, -1, 2, TILE // 2)[:, :, half] = tiles.transpose(0, 1)
            # An incomplete tile is packed pair by pair.
            made[:, whole + half :: 2] = codes[whole * inputs // 2 :].view(inputs, -1)
        return made


def unpacked(planes: list[Plane]) -> Tensor:
    """The weight `[inputs, outputs]` of all planes in bfloat16; numbers are whole until the scale rounds them, once."""
    if one_pass_is_right() and not torch.jit.is_tracing():  # type: ignore[attr-defined,no-untyped-call]
        return in_one_pass(planes)
    return by_operations(planes)


def in_one_pass(planes: list[Plane]) -> Tensor:
    """The weight by the function in C."""
    unpack = compiled()
    assert unpack is not None
    last, packed, scales = planes[-1], planes[-1].packed, planes[-1].scales
    scales = scales if scales.dtype == torch.bfloat16 else scales.bfloat16()
    made = torch.empty(packed.shape[1] * 2, last.outputs, dtype=torch.bfloat16)
    unpack(packed, planes[0].packed if len(planes) > 1 else None, scales, made, last.group)
    return made


def by_operations(planes: list[Plane]) -> Tensor:
    """The weight by operations of PyTorch."""
    *before, last = planes
    made = planes[0].codes()
    if before:  # two planes hold 8 bits
        made.mul_(16).add_(last.codes())
    scales, shifts = (each.contiguous() for each in last.scales.unbind(-1))  # or the product takes four times as long
    grouped = made.view(len(scales), last.group, last.outputs)  # (groups, inputs of a group, outputs)
    if last.shifted:
        grouped += (shifts.float() / scales.float()).nan_to_num().round().unsqueeze(1)  # 0 / 0 where all weights are 0
    grouped *= scales.unsqueeze(1)
    return made


class _Unpacking(torch.autograd.Function):
    """The product of many rows, its weight unpacked again for the gradient rather than kept in memory."""

    @staticmethod
    def forward(ctx: "FunctionCtx", rows: Tensor, layer: PackedLinear) -> Tensor:
        ctx.layer = layer  # type: ignore[attr-defined]
        return rows @ layer.weight.to(rows.dtype).t()

    @staticmethod
    def backward(ctx: "FunctionCtx", *gradients: Tensor) -> tuple[Tensor, None]:
        layer: PackedLinear = ctx.layer  # type: ignore[attr-defined]
        return gradients[0] @ layer.weight.to(gradients[0].dtype), None


def fits_kernel(made: Quantized, dtype: torch.dtype) -> bool:
    """True if the processor's packed product takes these codes: all groups have one size that the kernel knows."""
    inputs, outputs = made.codes.shape
    return bool(
        made.codes.device.type == "cpu"
        and dtype == torch.bfloat16
        and outputs % 16 == 0
        and kernel_group(inputs, len(made.scales))
        and torch.equal(made.g_idx.bincount(), torch.full((len(made.scales),), inputs // len(made.scales)))
        and layout_is_known()
    )


def kernel_group(inputs: int, groups: int) -> int:
    """The largest group size of the kernel that divides the group size of the matrix; 0 if there is none."""
    size, rest = divmod(inputs, groups)
    return next((g for g in KERNEL_GROUPS if not rest and size % g == 0), 0)


def planes_of(made: Quantized, order: Tensor) -> Iterable[Plane]:
    """The planes of a matrix whose inputs are taken in `order`, so that its groups lie together."""
    codes, scales = made.codes[order], made.scales.bfloat16().float()  # (inputs, outputs), (groups, outputs)
    # Groups of the kernel in one group of the matrix, which all get its scale.
    repeats = len(codes) // len(scales) // kernel_group(len(codes), len(scales))
    zeros = made.zeros.float()
    middle = 2 ** (made.bits - 1)
    if made.bits < 8:
        # The middle of the grid lies in the middle of the plane: a symmetric grid then needs no shift.
        parts = [(codes + (8 - middle), scales, (middle - zeros) * scales)]
    else:
        # (16 high + low - zero) s = (high - 8) 16 s + (low - 8) s + (136 - zero) s
        parts = [(codes >> 4, 16 * scales, torch.zeros_like(scales)), (codes & 15, scales, (136 - zeros) * scales)]
    return (Plane(c, s.repeat_interleave(repeats, 0), z.repeat_interleave(repeats, 0)) for c, s, z in parts)


@cache
def layout_is_known() -> bool:
    """True if this processor packs codes in the layout that `Plane.codes` reads."""
    codes = torch.randint(16, (64, 3 * TILE + 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    plane = Plane(codes, torch.ones(2, codes.shape[1]), torch.zeros(2, codes.shape[1]))
    return torch.equal(plane.codes(), codes.bfloat16() - 8)


@cache
def most_rows() -> int:
    """The most rows that go through the packed product; fewer where the rest is unpacked and multiplied quickly.

    The processor alone decides: with a compiler and without one the same products give the same bytes.
    """
    return ROWS if lacks_bfloat16() else ROWS_BESIDE_ONE_PASS


@cache
def one_pass_is_right() -> bool:
    """True if the function in C is there, and unpacks to the bits of PyTorch's operations on this processor."""
    if compiled() is None:
        return False
    random = torch.Generator().manual_seed(0)
    shape = 64, 3 * TILE + 16  # with an incomplete tile
    high, low = (torch.randint(16, shape, dtype=torch.uint8, generator=random) for _ in range(2))
    scales = torch.rand(2, shape[1], generator=random).bfloat16().float()
    shifts = torch.randint(-8, 9, (2, shape[1]), generator=random) * scales
    planes = [Plane(high, 16 * scales, torch.zeros_like(scales)), Plane(low, scales, shifts)]
    return all(torch.equal(in_one_pass(some), by_operations(some)) for some in (planes, planes[1:]))
