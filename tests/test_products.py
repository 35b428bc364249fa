"""bfloat16 products in float32: the sums of float32, rounded once; gradients, autocast and tracing as before."""

import subprocess
import sys

import pytest
import torch

from llmq.matrix import products

BFLOAT16 = torch.bfloat16


@pytest.fixture(autouse=True)
def _widened():
    """Products are widened on every processor."""
    library = products.override()
    yield
    library._destroy()


def two(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape))).to(BFLOAT16)


@pytest.mark.parametrize("rows", [products.ROWS, 33, 256])
@pytest.mark.parametrize("bias", [False, True])
def test_a_product_is_that_of_float32_rounded_once(rows, bias):
    given, weight, added = two(rows, 100), two(70, 100), two(70) if bias else None
    made = torch.nn.functional.linear(given, weight, added)
    exact = torch.nn.functional.linear(given.double(), weight.double(), added.double() if bias else None)
    assert made.dtype == BFLOAT16
    assert (made == exact.to(BFLOAT16)).float().mean() > 0.99
    torch.testing.assert_close(made.double(), exact, rtol=2**-8, atol=1e-5)


def test_batches_of_matrices_and_scalars_are_widened_too():
    left, right, added = two(3, 32, 40), two(3, 40, 24), two(3, 32, 24)
    exact = left.double() @ right.double()
    torch.testing.assert_close((left @ right).double(), exact, rtol=2**-8, atol=1e-5)
    made = torch.baddbmm(added, left, right, beta=0.5, alpha=2)
    torch.testing.assert_close(made.double(), 0.5 * added.double() + 2 * exact, rtol=2**-8, atol=1e-5)


def test_gradients_pass_and_other_dtypes_are_left_alone():
    given, weight = two(64, 48).requires_grad_(), two(32, 48).requires_grad_()
    torch.nn.functional.linear(given, weight).sum().backward()
    torch.testing.assert_close(
        given.grad.double(), weight.detach().double().sum(0).expand(64, 48), rtol=0.02, atol=0.02
    )
    assert given.grad.dtype == weight.grad.dtype == BFLOAT16
    for dtype in (torch.float32, torch.float64):
        assert (given.to(dtype) @ weight.to(dtype).t()).dtype == dtype
    with torch.autocast("cpu", BFLOAT16):
        assert (given.float() @ weight.float().t()).dtype == BFLOAT16


@pytest.mark.slow
def test_a_processor_with_bfloat16_keeps_its_own_kernel():
    code = (
        "import torch; torch.cpu.get_capabilities = lambda: {'architecture': 'x86_64', 'amx_bf16': True};"
        "from llmq.matrix import products; assert products.widen() is None"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
