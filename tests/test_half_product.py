"""Products with a weight in float16, and memory that is given back."""

from pathlib import Path

import numpy as np
import pytest
import torch

from llmq import resident
from llmq.matrix.half_product import is_quick, product

needs_c = pytest.mark.skipif(not is_quick(), reason="needs a C compiler and instructions for float16")


@needs_c
@pytest.mark.parametrize("outputs", [1, 7, 64])
@pytest.mark.parametrize("inputs", [16, 576])
def test_products_are_those_of_float64_and_of_each_row_alone(outputs, inputs):
    random = torch.Generator().manual_seed(outputs)
    rows, weight = torch.randn(70, inputs, generator=random), torch.randn(outputs, inputs, generator=random).half()
    made = product(rows, weight)
    assert torch.allclose(made.double(), rows.double() @ weight.double().t(), rtol=0, atol=1e-4)
    for n in (1, 2, 5):
        assert torch.equal(product(rows[64 : 64 + n], weight), made[64 : 64 + n])
    assert torch.equal(product(rows[::2], weight), made[::2])  # rows that do not lie together


@needs_c
def test_a_graph_without_its_head_has_the_same_logits():
    from openvino import Model, opset13

    from llmq.openvino_runtime import core
    from llmq.text.graph.pages import without_head

    weight = np.random.default_rng(0).normal(size=(40, 32)).astype(np.float16)

    def graph() -> tuple[Model, object]:
        x = opset13.parameter([-1, 1, 32], np.float32)
        last = opset13.matmul(x, opset13.convert(opset13.constant(weight), "f32"), False, True)
        return Model([last], [x], "head"), last

    x = np.random.default_rng(1).normal(size=(3, 1, 32)).astype(np.float32)
    whole = core().compile_model(graph()[0], "CPU", {"INFERENCE_PRECISION_HINT": "f32"})(x)[0]
    cut, last = graph()
    head = without_head(cut, last)  # type: ignore[arg-type]
    assert head is not None
    hidden = core().compile_model(cut, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})(x)[0]
    assert np.array_equal(hidden, x)
    assert np.abs(head(hidden) - whole).max() < 1e-4
    given = opset13.parameter([-1, 1, 32], np.float32)
    last = opset13.matmul(given, opset13.convert(opset13.constant(weight), "f32"), False, True)
    capped = Model([opset13.tanh(last)], [given], "capped")
    assert without_head(capped, last) is None, "more than a product makes these logits"


def resident_of(file: Path) -> int:
    """The bytes of a mapped file that lie in memory."""
    lines = iter(Path("/proc/self/smaps").read_text(encoding="utf-8").splitlines())
    sizes = [int(next(its for its in lines if its.startswith("Rss")).split()[1]) for line in lines if str(file) in line]
    return sum(sizes) * 1024


@pytest.mark.skipif(not Path("/proc/self/smaps").exists(), reason="needs Linux")
def test_pages_of_a_mapped_file_are_given_back_and_read_again(tmp_path):
    file, size = tmp_path / "weights.bin", 32 * 2**20
    file.write_bytes(b"\x01" * size)
    held, again = np.memmap(file, np.uint8, "r"), np.memmap(file, np.uint8, "r")  # as two processes map it
    assert held.sum(dtype=np.int64) == again.sum(dtype=np.int64) == size
    before = resident_of(file)
    resident.forget_file(file)
    assert before - resident_of(file) > 0.9 * size
    assert held.sum(dtype=np.int64) == size


def test_numbers_outlive_the_memory_that_was_given_back():
    """Two layers may share a tensor: what one gives back, the other still reads."""
    tensor = torch.arange(2**20)
    resident.forget([tensor])
    assert torch.equal(tensor, torch.arange(2**20))
