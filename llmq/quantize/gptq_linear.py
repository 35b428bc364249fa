"""A linear layer over packed integers that needs no compiled extension, for training and inference.

On a processor the codes are held as planes of 4 bits in the layout of PyTorch's packed int4 product: one plane for 2, 3
and 4 bits, two for 8 (`q = 16 * high + low`). A few rows go through that product; more are multiplied with the weight,
unpacked for the moment. Where shape or device have no such product, codes stay as in the file and are always unpacked.
"""

from typing import Any

import torch
from torch import Tensor, nn

from llmq.quantize.gptq_format import TENSORS, from_tensors
from llmq.quantize.grid import Quantized

ROWS = 80
"""Up to this many rows the packed product is the faster one (`scripts/bench_packed`)."""
KERNEL_GROUPS = (256, 128, 64, 32)
TILE = 64
"""Outputs that the packed layout interleaves: 32 in the low half of a byte, 32 in the high half."""


class PackedLinear(nn.Linear):  # type: ignore[misc]
    """A linear layer whose weight is packed as the GPTQ format has it. Its `weight` is unpacked at every look."""

    def __init__(self, inputs: int, outputs: int, bias: bool, bits: int, groups: int, stored_as: str, dtype: Any):
        nn.Module.__init__(self)
        self.in_features, self.out_features, self.bits, self.stored_as = inputs, outputs, bits, stored_as
        shapes = (inputs * bits // 32, outputs), (groups, outputs * bits // 32), (groups, outputs), (inputs,)
        dtypes = torch.int32, torch.int32, torch.float16, torch.int32
        for name, shape, its in zip(TENSORS, shapes, dtypes, strict=True):
            self.register_buffer(name, torch.empty(shape, dtype=its))
        self.bias = nn.Parameter(torch.empty(outputs, dtype=dtype), requires_grad=False) if bias else None
        self.compute_dtype = dtype
        self.planes = nn.ModuleList()
        self.order: Tensor | None = None

    def prepare(self) -> None:
        """Bring the codes into the layout of the fast product, where there is one; done once, after loading."""
        made = self.quantized()
        if not fits_kernel(made, self.compute_dtype):
            return
        order = made.g_idx.argsort(stable=True)
        if bool((order != torch.arange(self.in_features)).any()):
            self.order = order
        self.planes = planes_of(made, order)
        for name in TENSORS:
            delattr(self, name)

    def quantized(self) -> Quantized:
        """What the four tensors of the format hold."""
        return from_tensors({name: getattr(self, name) for name in TENSORS}, self.bits, self.stored_as)

    @property
    def weight(self) -> Tensor:
        """The float weight `[outputs, inputs]` in the dtype that the layer computes in."""
        if not self.planes:
            return self.quantized().weight().to(self.compute_dtype)
        rows = unpacked(self.planes)
        return rows.t() if self.order is None else rows[self.order.argsort()].t()

    def forward(self, input: Tensor) -> Tensor:
        """`input @ weight.T + bias`; the gradient goes to the input alone."""
        if input.requires_grad and torch.is_grad_enabled():
            made: Tensor = _Unpacking.apply(input, self)
            return made if self.bias is None else made + self.bias
        rows = input.numel() // self.in_features
        if not self.planes or not 0 < rows <= ROWS or input.dtype != torch.bfloat16:
            return nn.functional.linear(input, self.weight.to(input.dtype), self.bias)
        flat = input.reshape(rows, self.in_features)
        # The kernel takes rows for lying one after another.
        flat = flat.contiguous() if self.order is None else flat[:, self.order]
        made = self.planes[0].product(flat)
        for plane in self.planes[1:]:
            made = made + plane.product(flat)
        if self.bias is not None:
            made = made + self.bias
        return made.view(*input.shape[:-1], self.out_features)

    def extra_repr(self) -> str:
        """As a linear layer, with its bits."""
        return f"in_features={self.in_features}, out_features={self.out_features}, bits={self.bits}"


class Plane(nn.Module):  # type: ignore[misc]
    """Codes of 4 bits, packed for the processor's int4 product: weight = `(code - 8) * scale + shift`."""

    def __init__(self, codes: Tensor, scales: Tensor, shifts: Tensor):
        super().__init__()
        self.outputs = codes.shape[1]
        self.group = len(codes) // len(scales)
        self.shifted = bool(shifts.any())
        packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes.t().int().contiguous(), 1)
        self.register_buffer("packed", packed)
        self.register_buffer("scales", torch.stack([scales, shifts], -1).bfloat16().contiguous())

    def product(self, rows: Tensor) -> Tensor:
        """`rows @ weight.T`."""
        made: Tensor = torch.ops.aten._weight_int4pack_mm_for_cpu(rows, self.packed, self.group, self.scales)
        return made

    def codes(self) -> Tensor:
        """The codes `[inputs, outputs]` less 8, in bfloat16."""
        inputs = self.packed.shape[1] * 2
        whole = self.outputs // TILE * TILE
        made = torch.empty(inputs, self.outputs, dtype=torch.bfloat16)
        flat = self.packed.view(-1)
        low, high = ((part.view(torch.int8) - 8) for part in (flat & 15, flat >> 4))
        for half, codes in enumerate((low, high)):
            tiles = codes[: whole * inputs // 2].view(-1, inputs, TILE // 2)
            made[:, :whole].view(inputs, -1, 2, TILE // 2)[:, :, half] = tiles.transpose(0, 1)
            # An incomplete tile is packed pair by pair.
            made[:, whole + half :: 2] = codes[whole * inputs // 2 :].view(inputs, -1)
        return made


def unpacked(planes: Any) -> Tensor:
    """The weight `[inputs, outputs]` of all planes in bfloat16: whole numbers until the scale rounds them, once."""
    made: Tensor = planes[0].codes()
    for plane in planes[1:]:
        made.mul_(16).add_(plane.codes())
    last = planes[-1]
    scales, shifts = (each.contiguous() for each in last.scales.unbind(-1))  # or the product takes four times as long
    grouped = made.view(len(scales), last.group, last.outputs)
    if last.shifted:
        grouped += (shifts.float() / scales.float()).round().unsqueeze(1)
    grouped *= scales.unsqueeze(1)
    return made


class _Unpacking(torch.autograd.Function):  # type: ignore[misc]
    """The product of many rows, its weight unpacked anew for the gradient rather than kept."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, layer: PackedLinear) -> Tensor:
        ctx.layer = layer
        return rows @ layer.weight.to(rows.dtype).t()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return gradients[0] @ ctx.layer.weight.to(gradients[0].dtype), None


def fits_kernel(made: Quantized, dtype: Any) -> bool:
    """Whether the processor's packed product can take these codes."""
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
    """The largest group of the kernel that divides the groups of the matrix; 0 if none does."""
    size, rest = divmod(inputs, groups)
    return next((g for g in KERNEL_GROUPS if not rest and size % g == 0), 0)


def planes_of(made: Quantized, order: Tensor) -> "nn.ModuleList":
    """The planes of a matrix whose inputs are taken in `order`, so that its groups lie together."""
    codes, scales = made.codes[order], made.scales.bfloat16().float()
    repeats = len(codes) // len(scales) // kernel_group(len(codes), len(scales))
    zeros = made.zeros.float()
    middle = 2 ** (made.bits - 1)
    if made.bits < 8:
        # The middle of the grid to the middle of the plane: what is left to shift is nothing on a symmetric grid.
        parts = [(codes + (8 - middle), scales, (middle - zeros) * scales)]
    else:
        # (16 high + low - zero) s = (high - 8) 16 s + (low - 8) s + (136 - zero) s
        parts = [(codes >> 4, 16 * scales, torch.zeros_like(scales)), (codes & 15, scales, (136 - zeros) * scales)]
    return nn.ModuleList(
        Plane(c, s.repeat_interleave(repeats, 0), z.repeat_interleave(repeats, 0)) for c, s, z in parts
    )


def layout_is_known() -> bool:
    """Whether this processor's packed layout is the one that `Plane.codes` reads."""
    global _known
    if _known is None:
        _known = False
        codes = torch.randint(16, (64, 3 * TILE + 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
        plane = Plane(codes, torch.ones(2, codes.shape[1]), torch.zeros(2, codes.shape[1]))
        _known = torch.equal(plane.codes(), codes.bfloat16() - 8)
    return _known


_known: bool | None = None
