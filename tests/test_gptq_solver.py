"""The GPTQ solver against the paper's equations done slowly, and where it must equal plain rounding."""

from functools import cache, partial

import gptq_reference
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llmq.errors import UserError
from llmq.matrix.grid import round_to_nearest
from llmq.matrix.solver import elimination, solve

quickly = settings(max_examples=15, deadline=None, database=None)
DAMP = 0.01
SHAPES = {
    32: [(32, 3), (160, 5)],
    64: [(64, 1), (192, 4)],
    128: [(128, 3), (256, 2)],
    -1: [(1, 2), (7, 3), (96, 2), (131, 5)],
}
"""Group size -> inputs and outputs."""


pytestmark = pytest.mark.usefixtures("one_thread")


@cache
def problem(inputs, outputs, seed=0):
    """A weight and the Hessian of strongly correlated inputs, in float64."""
    generator = torch.Generator().manual_seed(seed)
    randn = partial(torch.randn, generator=generator, dtype=torch.float64)
    causes = -(-inputs // 6)
    samples = randn(3 * inputs, causes) @ randn(causes, inputs) + causes**0.5 / 10 * randn(3 * inputs, inputs)
    return randn(outputs, inputs), samples.t() @ samples


def in_order(hessian, desc_act):
    """The order that inputs are taken in."""
    return hessian.diagonal().argsort(descending=True, stable=True) if desc_act else torch.arange(len(hessian))


def gptq(weight, hessian, bits=4, group_size=-1, sym=True, mse=False, desc_act=False, damp=DAMP, **kwargs):
    order = in_order(hessian, desc_act)
    upper, _ = elimination(hessian, damp, order)
    return solve(weight, upper, bits, group_size, sym, mse, order if desc_act else None, **kwargs)


@cache
def eliminated(inputs, outputs, desc_act):
    """What the reference knows of a problem: the same for every grid."""
    hessian = problem(inputs, outputs)[1]
    order = in_order(hessian, desc_act).numpy()
    return gptq_reference.eliminated(gptq_reference.damped(hessian.numpy()[order][:, order], DAMP)), order


def harm(weight, made, hessian):
    """`||XW - XQ||^2`."""
    error = made.weight().double() - weight
    return float(((error @ hessian) * error).sum())


def assert_same(made, theirs):
    assert torch.equal(made.codes, theirs.codes)
    assert torch.equal(made.scales, theirs.scales)
    assert torch.equal(made.zeros, theirs.zeros)
    assert torch.equal(made.g_idx, theirs.g_idx)


@pytest.mark.parametrize("static_groups", [False, True], ids=["dynamic", "static"])
@pytest.mark.parametrize("desc_act", [False, True], ids=["in-order", "desc_act"])
@pytest.mark.parametrize("mse", [False, True], ids=["range", "mse"])
@pytest.mark.parametrize("sym", [False, True], ids=["asym", "sym"])
@pytest.mark.parametrize("group_size", SHAPES)
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_codes_and_grids_are_those_of_the_paper(bits, group_size, sym, mse, desc_act, static_groups):
    for shape in SHAPES[group_size]:
        weight, hessian = problem(*shape)
        rows, order = eliminated(*shape, desc_act)
        theirs = gptq_reference.gptq(weight.numpy(), rows, bits, group_size, sym, mse, order, static_groups)
        made = gptq(weight.clone(), hessian, bits, group_size, sym, mse, desc_act, static_groups=static_groups)
        for mine, its in zip((made.codes, made.scales, made.zeros, made.g_idx), theirs, strict=True):
            np.testing.assert_array_equal(mine.t().numpy(), its, f"{shape}")


@pytest.mark.parametrize("shape", [(1, 3), (64, 1), (64, 3)])
def test_the_weight_given_is_left_as_it_was(shape):
    given, hessian = problem(*shape)
    weight = given.clone()
    gptq(weight, hessian)
    assert torch.equal(weight, given)


@pytest.mark.parametrize("inputs", [1, 2, 37, 128, 200])
@pytest.mark.parametrize("damp", [0.001, 0.05, 0.9])
def test_the_factor_is_the_upper_cholesky_factor_of_the_damped_inverse(inputs, damp):
    _, hessian = problem(inputs, 1)
    upper, used = elimination(hessian, damp)
    inverse = torch.linalg.inv(hessian + damp * hessian.diagonal().mean() * torch.eye(inputs, dtype=torch.float64))
    expected = torch.linalg.cholesky(inverse, upper=True)
    torch.testing.assert_close(upper, expected, rtol=0, atol=1e-11 * float(expected.max()))
    assert used == damp


def test_rows_of_the_factor_are_those_of_the_inverse_once_the_inputs_before_are_eliminated():
    _, hessian = problem(37, 1)
    upper, _ = elimination(hessian, DAMP)
    for i, row in enumerate(gptq_reference.eliminated(gptq_reference.damped(hessian.numpy(), DAMP))):
        np.testing.assert_allclose(upper[i, i:].numpy(), row[i:] / np.sqrt(row[i]), rtol=1e-7, atol=1e-12)


def test_inputs_are_eliminated_in_the_order_given_and_the_hessian_is_left_as_it_was():
    hessian = problem(40, 1)[1].clone()
    order = torch.randperm(40, generator=torch.Generator().manual_seed(0))
    (mine, used), (its, same) = elimination(hessian, DAMP, order), elimination(hessian[order][:, order], DAMP)
    torch.testing.assert_close(mine, its)
    assert used == same
    assert torch.equal(hessian, problem(40, 1)[1])


@pytest.mark.parametrize(
    ("hessian", "raised"),
    [
        (torch.ones(3, 3), 0.0125),  # of rank 1
        (torch.tensor([[1, 1.02], [1.02, 1]]), 0.0375),  # 0.0125 + 2 · 0.0125
        (torch.tensor([[1, 1.5], [1.5, 1]]), 0.7875),  # 0.0125 · (1 + 2 + 4 + 8 + 16 + 32)
    ],
    ids=["singular", "hardly definite", "indefinite"],
)
def test_damping_rises_until_the_hessian_can_be_factorized(hessian, raised):
    upper, used = elimination(hessian.double(), 0.0)
    assert used == pytest.approx(raised)
    assert torch.isfinite(upper).all()
    assert torch.equal(upper, elimination(hessian.double(), used)[0])


def test_a_hessian_that_no_damping_helps_is_named():
    with pytest.raises(UserError, match="cannot be factorized"):
        elimination(torch.tensor([[1.0, 3.0], [3.0, 1.0]]), DAMP)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_activations_that_are_not_finite_are_named(value):
    hessian = torch.eye(8)
    hessian[3, 3] = value
    with pytest.raises(UserError, match="not finite"):
        elimination(hessian, DAMP)


@pytest.mark.parametrize("desc_act", [False, True])
@pytest.mark.parametrize("static_groups", [False, True])
@pytest.mark.parametrize("mse", [False, True])
@pytest.mark.parametrize("sym", [False, True])
@pytest.mark.parametrize(("inputs", "group_size"), [(131, -1), (192, 32), (256, 128)])
def test_without_one_token_or_with_boundless_damping_it_is_rounding_to_nearest(
    inputs, group_size, sym, mse, static_groups, desc_act
):
    weight, hessian = problem(inputs, 3)
    nearest = round_to_nearest(weight, 3, group_size, sym, mse)
    assert_same(gptq(weight, torch.zeros_like(hessian), 3, group_size, sym, mse, desc_act), nearest)
    if static_groups or not desc_act or group_size == -1:  # or groups are others
        made = gptq(weight, hessian, 3, group_size, sym, mse, desc_act, damp=1e15, static_groups=static_groups)
        assert_same(made, nearest)


def test_a_dead_input_is_rounded_to_nearest_and_the_others_as_without_it():
    weight, hessian = (x.clone() for x in problem(150, 4))
    dead, others = 70, torch.arange(150) != 70
    hessian[dead] = hessian[:, dead] = 0
    weight[:, dead] /= 100  # and so has no part in the grid
    upper, used = elimination(hessian, DAMP)
    expected, _ = elimination(hessian[others][:, others], DAMP)
    torch.testing.assert_close(upper[others][:, others], expected)
    assert (upper[dead, dead + 1 :] == 0).all()
    assert (upper[:dead, dead] == 0).all()
    mean = hessian.diagonal().sum() / 149
    torch.testing.assert_close(upper[dead, dead], (mean * (1 + DAMP)).rsqrt())
    assert used == DAMP
    made = gptq(weight, hessian)
    assert torch.equal(made.codes[others], gptq(weight[:, others], hessian[others][:, others]).codes)
    assert torch.equal(made.codes[dead], round_to_nearest(weight, 4, -1, True).codes[dead])


@pytest.mark.parametrize("desc_act", [False, True])
def test_one_token_will_do(desc_act):
    token = torch.randn(1, 64, generator=torch.Generator().manual_seed(0)).bfloat16().float()
    weight, hessian = problem(64, 8)[0].float(), token.t() @ token
    made = gptq(weight, hessian, 4, 32, desc_act=desc_act, static_groups=True, damp=0.05)
    assert torch.isfinite(made.weight()).all()
    assert harm(weight, made, hessian.double()) < harm(weight, round_to_nearest(weight, 4, 32, True), hessian.double())


@pytest.mark.parametrize("desc_act", [False, True])
@pytest.mark.parametrize("static_groups", [False, True])
@pytest.mark.parametrize("keep_zeros", [False, True])
@quickly
@given(st.sampled_from([2, 3, 4, 8]), st.sampled_from([32, -1]), st.booleans(), st.booleans(), st.integers(0, 1000))
def test_it_is_no_worse_than_rounding_to_nearest_and_keeps_zeros(
    keep_zeros, static_groups, desc_act, bits, group_size, sym, mse, seed
):
    weight, hessian = problem(96, 64, seed)
    if keep_zeros:
        weight = weight * (torch.rand(weight.shape, generator=torch.Generator().manual_seed(seed)) < 0.5)
    made = gptq(
        weight, hessian, bits, group_size, sym, mse, desc_act, static_groups=static_groups, keep_zeros=keep_zeros
    )
    assert harm(weight, made, hessian) <= harm(weight, round_to_nearest(weight, bits, group_size, sym, mse), hessian)
    assert not keep_zeros or (made.weight()[weight == 0] == 0).all()


@quickly
@given(st.sampled_from([2, 3, 4, 8]), st.booleans(), st.booleans(), st.integers(0, 1000))
def test_outputs_are_solved_alike_together_or_alone(bits, sym, mse, seed):
    weight, hessian = problem(96, 6, seed)
    together = gptq(weight, hessian, bits, 32, sym, mse)
    for made, part in zip(together.split([1, 2, 3]), weight.split([1, 2, 3]), strict=True):
        assert_same(made, gptq(part, hessian, bits, 32, sym, mse))


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_weights_beyond_the_scales_of_the_format_are_named(bits):
    """float16 ends at 65504, and bfloat16 holds 65280 before it: 7.5 steps of that on each side at 4 bits."""
    fits = 65280 * (2**bits - 1) / 2
    made = round_to_nearest(torch.full((32, 32), 0.99 * fits), bits, 32, True)
    torch.testing.assert_close(made.weight(), torch.full((32, 32), 0.99 * fits), rtol=0.4, atol=0)
    with pytest.raises(UserError, match="do not fit scales in float16"):
        round_to_nearest(torch.full((32, 32), 1.01 * fits), bits, 32, True)
