"""The packed linear layer against the matrix that its file stands for, on the fast product and off it."""

import os
from dataclasses import replace

import pytest
import torch
from torch.nn.functional import linear

from llmq import doctor
from llmq.matrix import native, unpacking
from llmq.matrix import packed_linear as gptq_linear
from llmq.matrix.gptq_format import to_tensors
from llmq.matrix.grid import Quantized, round_to_nearest
from llmq.matrix.packed_linear import PackedLinear, by_operations, in_one_pass, most_rows, unpacked
from llmq.matrix.unpacking import compiled

GROUPS = [(96, 32), (96, -1), (256, 128), (576, 64), (576, -1)]
"""Inputs and group size."""
OUTPUTS = [192, 112, 16, 24]
"""Whole tiles of 64, the rest a multiple of 16, less than a tile, and what the kernel does not take."""

FAST = torch.backends.cpu.get_cpu_capability() == "AVX512"
"""Other processors lay the codes out otherwise, and all is unpacked."""
fast = pytest.mark.skipif(not FAST, reason="needs a processor with AVX-512")


pytestmark = pytest.mark.usefixtures("one_thread")


def quantized(inputs, outputs, bits=4, group_size=-1, sym=True, ordered=False):
    """A random matrix on its grid, the inputs of its groups scattered where they are `ordered`.

    The mean of its outputs goes from far below zero to far above, so that an asymmetric grid has its zero anywhere.
    """
    generator = torch.Generator().manual_seed(inputs + outputs)
    means = torch.linspace(-3, 3, outputs).unsqueeze(1)
    made = round_to_nearest(torch.randn(outputs, inputs, generator=generator) + means, bits, group_size, sym)
    order = torch.randperm(inputs, generator=generator) if ordered else torch.arange(inputs)
    return Quantized(made.codes[order], made.scales, made.zeros, made.g_idx[order], bits)


def layer_of(made, bias=None, dtype=torch.bfloat16, prepared=True):
    """The layer over a matrix's four tensors."""
    inputs, outputs = made.codes.shape
    layer = PackedLinear(inputs, outputs, bias is not None, made.bits, len(made.scales), "gptq", dtype)
    layer.load_state_dict(to_tensors(made) | ({} if bias is None else {"bias": bias}))
    if prepared:
        layer.prepare()
    return layer


def some(*shape, dtype=torch.bfloat16, mean=0.5):
    """Activations; their mean shows what is wrong with all of a group's weights alike."""
    return (torch.randn(shape, generator=torch.Generator().manual_seed(1)) + mean).to(dtype)


def relative(made, exact):
    """The error of a product, relative to its size."""
    return float((made.float() - exact.float()).norm() / exact.float().norm())


def fill_their_words(inputs, outputs, bits):
    """Whether the format can hold this shape."""
    return inputs * bits % 32 == 0 and outputs * bits % 32 == 0


@pytest.mark.parametrize("ordered", [False, True], ids=["in-order", "ordered"])
@pytest.mark.parametrize("sym", [False, True], ids=["asym", "sym"])
@pytest.mark.parametrize(("inputs", "group_size"), GROUPS)
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_weight_and_products_are_those_of_the_file(bits, inputs, group_size, sym, ordered):
    for outputs in OUTPUTS:
        if not fill_their_words(inputs, outputs, bits):
            continue
        made = quantized(inputs, outputs, bits, group_size, sym, ordered)
        exact, layer = made.weight(), layer_of(made)
        assert len(layer.planes) == (FAST and outputs % 16 == 0) * (2 if bits == 8 else 1)
        assert torch.equal(layer.weight, exact.bfloat16()), f"{outputs} outputs"
        for rows in (1, 3, most_rows(), 200):
            x = some(rows, inputs)
            assert relative(layer(x), linear(x.float(), exact)) < 0.015, f"{outputs} outputs, {rows} rows"


@pytest.mark.parametrize("sym", [False, True], ids=["asym", "sym"])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_a_weight_that_is_zero_in_the_file_is_zero(bits, sym):
    made = quantized(128, 192, bits, 32, sym)
    made.codes[::2] = made.zeros[made.g_idx.long()][::2].to(torch.uint8)
    assert (layer_of(made).weight[:, ::2] == 0).all()


@fast
@pytest.mark.parametrize("sym", [False, True], ids=["asym", "sym"])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_scales_of_others_that_bfloat16_does_not_hold_are_rounded_and_nothing_else(bits, sym):
    made = quantized(128, 192, bits, 32, sym)
    odd = made.scales * (torch.rand(made.scales.shape, generator=torch.Generator().manual_seed(3)) + 1)
    made = replace(made, scales=odd.half())
    layer, exact = layer_of(made), replace(made, scales=made.scales.bfloat16()).weight()
    assert torch.equal(layer.weight, exact.bfloat16())
    x = some(3, 128)
    assert relative(layer(x), linear(x.float(), made.weight())) < 0.015


@pytest.mark.parametrize("outputs", [192, 112, 24])
@pytest.mark.parametrize("ordered", [False, True])
def test_preparing_changes_neither_weight_nor_products(outputs, ordered):
    made = quantized(128, outputs, 4, 64, ordered=ordered)
    before, after = layer_of(made, prepared=False), layer_of(made)
    assert torch.equal(after.weight, before.weight)
    x = some(3, 128)
    assert relative(after(x), before(x)) < 0.01


@fast
def test_a_few_rows_go_through_the_fast_product_and_only_they(monkeypatch):
    taken = []
    product = gptq_linear.Plane.product
    monkeypatch.setattr(gptq_linear.Plane, "product", lambda self, rows: taken.append(len(rows)) or product(self, rows))
    layer = layer_of(quantized(128, 64, 4, 64))
    assert not hasattr(layer, "qweight") or layer.qweight is None, "the codes are held twice"
    for x in (some(1, 128), some(most_rows(), 128), some(most_rows() + 1, 128), some(2, 128, dtype=torch.float32)):
        assert layer(x).dtype == x.dtype
    with torch.no_grad():
        layer(some(5, 128).requires_grad_())
    assert taken == [1, most_rows(), 5]


@pytest.mark.parametrize(
    ("inputs", "outputs", "dtype"),
    [(128, 24, torch.bfloat16), (40, 64, torch.bfloat16), (128, 64, torch.float32), (128, 64, torch.float16)],
)
def test_what_the_kernel_does_not_take_stays_as_in_the_file(inputs, outputs, dtype):
    made = quantized(inputs, outputs)
    layer = layer_of(made, dtype=dtype)
    assert not layer.planes
    assert torch.equal(layer.weight, made.weight().to(dtype))
    x = some(3, inputs, dtype=dtype)
    assert torch.equal(layer(x), linear(x, layer.weight))


def test_groups_of_unlike_sizes_stay_as_in_the_file():
    made = quantized(128, 64, 4, 64)
    made.g_idx[:70] = 0
    made.g_idx[70:] = 1
    layer = layer_of(made)
    assert not layer.planes
    assert torch.equal(layer.weight, made.weight().bfloat16())


@pytest.mark.parametrize("rows", [1, 3, 200])
@pytest.mark.parametrize("outputs", [64, 24])
@pytest.mark.parametrize("bits", [4, 8])
def test_a_bias_is_added(rows, outputs, bits):
    made, bias = quantized(128, outputs, bits, 32), 10 * some(outputs)
    x = some(rows, 128)
    assert relative(layer_of(made, bias)(x), linear(x.float(), made.weight(), bias.float())) < 0.01


@pytest.mark.parametrize("shape", [(128,), (2, 3, 128), (2, 100, 128), (0, 128), (1, 1, 128)])
@pytest.mark.parametrize("outputs", [64, 24])
def test_leading_dimensions_are_kept(shape, outputs):
    made = quantized(128, outputs)
    x = some(*shape)
    out = layer_of(made, some(outputs))(x)
    assert out.shape == (*shape[:-1], outputs)
    if x.numel():
        assert relative(out, linear(x.float(), made.weight(), some(outputs).float())) < 0.01


@pytest.mark.parametrize("ordered", [False, True])
@pytest.mark.parametrize(
    "view",
    [lambda x: x[:, -1:], lambda x: x[::2, :3], lambda x: x[:1, :1].expand(3, 2, -1), lambda x: x[..., 0, :]],
    ids=["last token", "every second row", "expanded", "one token"],
)
def test_activations_need_not_lie_in_a_row(view, ordered):
    made = quantized(128, 64, 4, 32, ordered=ordered)
    x = view(some(4, 5, 128))
    assert relative(layer_of(made)(x), linear(x.float(), made.weight())) < 0.01


@pytest.mark.parametrize("rows", [1, 3, 200])
@pytest.mark.parametrize(("outputs", "ordered"), [(64, False), (64, True), (24, False)])
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_the_gradient_of_the_input_is_that_through_the_dense_weight(bits, outputs, ordered, rows, dtype):
    made, bias = quantized(128, outputs, bits, 32, ordered=ordered), some(outputs)
    layer, x = layer_of(made, bias), some(rows, 128, dtype=dtype).requires_grad_()
    out, weight = layer(x), layer.weight.to(dtype)
    direction = torch.randn(out.shape, generator=torch.Generator().manual_seed(2)).to(out.dtype)
    (mine,) = torch.autograd.grad((out * direction).sum(), x)
    (its,) = torch.autograd.grad((linear(x, weight, bias.to(dtype)) * direction).sum(), x)
    assert mine.dtype == dtype
    torch.testing.assert_close(mine, its)
    assert relative(out.detach(), linear(x.detach().float(), made.weight(), bias.float())) < 0.01


def test_nothing_packed_gets_a_gradient():
    layer = layer_of(quantized(128, 64), some(64))
    layer(some(3, 128).requires_grad_()).sum().backward()
    assert not any(p.requires_grad or p.grad is not None for p in layer.parameters())


@fast
@pytest.mark.skipif(compiled() is None, reason="needs a C compiler")
@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("sym", [True, False])
@pytest.mark.parametrize("outputs", [192, 112, 16])
def test_one_pass_gives_the_bits_of_the_operations(bits, sym, outputs):
    planes = layer_of(quantized(256, outputs, bits, 64, sym))._planes()
    assert torch.equal(in_one_pass(planes), by_operations(planes))


@fast
@pytest.mark.parametrize("bits", [4, 8])
def test_weights_whose_scale_is_zero_are_zero(bits):
    """Other makers write such scales for rows that are zero; the other rows have zeros beside the middle."""
    made = quantized(128, 64, bits, 64, False)
    made.scales[:, ::3] = 0
    planes = layer_of(made)._planes()
    assert torch.equal(by_operations(planes).t(), made.weight().bfloat16())
    assert torch.equal(unpacked(planes), by_operations(planes))


@pytest.mark.skipif(compiled() is None, reason="needs a C compiler")
def test_a_compiler_may_have_arguments_and_the_cache_a_space(monkeypatch, tmp_path):
    monkeypatch.setenv("LLMQ_CACHE", str(tmp_path / "a place"))
    monkeypatch.setenv("CC", f"{os.environ.get('CC', 'cc')} -g0")
    assert native.library.__wrapped__("unpack") is not None
    (tmp_path / "file").touch()
    monkeypatch.setenv("LLMQ_CACHE", str(tmp_path / "file"))  # nothing can be kept there
    assert native.library.__wrapped__("unpack") is not None


@pytest.mark.parametrize("compiler", ["false", "no-such-compiler", "true"])
def test_without_a_compiler_operations_unpack(compiler, monkeypatch, tmp_path):
    monkeypatch.setenv("LLMQ_CACHE", str(tmp_path))
    monkeypatch.setenv("CC", compiler)  # `true` ends well, and makes nothing
    monkeypatch.setattr(unpacking, "library", native.library.__wrapped__)
    monkeypatch.setattr(gptq_linear, "compiled", compiled.__wrapped__)
    monkeypatch.setattr(gptq_linear, "one_pass_is_right", gptq_linear.one_pass_is_right.__wrapped__)
    made = quantized(128, 64, 4, 64, False)
    assert compiled.__wrapped__() is None
    assert relative(layer_of(made).weight.t(), made.weight().t()) < 0.01
    assert "unpacked by PyTorch's operations" in doctor._unpacking()
    layer, rows = (
        layer_of(made),
        torch.randn(40, 128).bfloat16(),
    )  # more than a processor with bfloat16 multiplies packed
    without = layer(rows)
    monkeypatch.undo()
    assert torch.equal(layer(rows), without)


def test_doctor_knows_a_processor_with_another_layout(monkeypatch):
    """There no layer is held in planes, and the function is of no use."""
    monkeypatch.setattr(gptq_linear, "layout_is_known", lambda: False)
    assert doctor._unpacking().endswith("has another layout")
