"""Which weights go: exact counts, and SparseGPT against its equations done slowly."""

import itertools

import gptq_reference
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llmq.matrix.alps import alps
from llmq.matrix.masks import by_magnitude, by_wanda, lowest, sparsegpt
from llmq.matrix.solver import elimination

quickly = settings(max_examples=25, deadline=None, database=None)
PATTERNS = [(1, 2), (2, 4), (4, 8), (1, 4)]
SHARES = [0.0, 0.1, 0.5, 0.95]
BOTH = [*((share, None) for share in SHARES), *((1 - n / m, (n, m)) for n, m in PATTERNS)]
DAMP = 0.01


pytestmark = pytest.mark.usefixtures("one_thread")


def problem(outputs, inputs, seed=0):
    """A weight, and the Hessian of strongly correlated inputs of unlike sizes."""
    generator = torch.Generator().manual_seed(seed)
    causes = torch.randn(3 * inputs, 1 + inputs // 6, generator=generator, dtype=torch.float64)
    samples = causes @ torch.randn(causes.shape[1], inputs, generator=generator, dtype=torch.float64)
    samples += 0.3 * torch.randn(samples.shape, generator=generator, dtype=torch.float64)
    samples *= torch.rand(inputs, generator=generator, dtype=torch.float64) * 2 + 0.1
    return torch.randn(outputs, inputs, generator=generator, dtype=torch.float64), samples.t() @ samples


def pruned(method, weight, hessian, share=0.5, of_each=None):
    """What one of the methods makes of a weight."""
    if method == "alps":
        return alps(weight, hessian, DAMP, share, of_each)
    if method == "sparsegpt":
        return sparsegpt(weight, elimination(hessian, DAMP)[0], share, of_each)
    its = by_magnitude(weight, share, of_each)
    if method == "wanda":
        its = by_wanda(weight, hessian.diagonal(), share, of_each)
    return weight.masked_fill(its, 0)


def harm(weight, made, hessian):
    """`||XW - XP||^2`."""
    return float((((made - weight) @ hessian) * (made - weight)).sum())


@pytest.mark.parametrize("method", ["magnitude", "wanda", "sparsegpt", "alps"])
@pytest.mark.parametrize("of_each", PATTERNS, ids=lambda p: f"{p[0]}:{p[1]}")
@quickly
@given(st.integers(1, 5), st.integers(1, 40), st.integers(0, 1000))
def test_exactly_n_of_every_m_stay(method, of_each, outputs, groups, seed):
    stay, among = of_each
    made = pruned(method, *problem(outputs, among * groups, seed), of_each=of_each)
    assert ((made != 0).view(outputs, groups, among).sum(-1) == stay).all()


@pytest.mark.parametrize("among", [16, 32])
def test_wide_patterns_are_exact_too(among):
    for method in ("magnitude", "wanda", "sparsegpt", "alps"):
        made = pruned(method, *problem(3, 160), of_each=(5, among))
        assert ((made != 0).view(3, -1, among).sum(-1) == 5).all()


@pytest.mark.parametrize("share", SHARES)
@quickly
@given(st.integers(1, 9), st.integers(1, 300), st.integers(0, 1000))
def test_the_share_is_exact(share, outputs, inputs, seed):
    weight = torch.randn(outputs, inputs, generator=torch.Generator().manual_seed(seed))
    assert int(by_magnitude(weight, share, None).sum()) == round(share * weight.numel())
    assert (by_wanda(weight, torch.rand(inputs) + 0.1, share, None).sum(1) == round(share * inputs)).all()


@pytest.mark.parametrize("share", SHARES)
@pytest.mark.parametrize("inputs", [40, 128, 200])
def test_sparsegpt_takes_the_share_of_every_128_inputs(share, inputs):
    made = pruned("sparsegpt", *problem(7, inputs), share)
    for block in made.split(128, 1):
        assert int((block == 0).sum()) == round(share * block.numel())


@quickly
@given(st.floats(0, 0.95), st.integers(0, 1000))
def test_what_goes_is_never_greater_than_what_stays(share, seed):
    scores = torch.rand(5, 37, generator=torch.Generator().manual_seed(seed))
    gone = lowest(scores, share)
    assert (scores.masked_fill(~gone, 0).amax(1) <= scores.masked_fill(gone, 2).amin(1)).all()


@pytest.mark.parametrize(("share", "of_each"), BOTH)
def test_ties_and_zeros_are_counted_like_others(share, of_each):
    for weight in (torch.zeros(4, 40), torch.ones(4, 40), torch.ones(4, 40).bfloat16()):
        for gone in (by_magnitude(weight, share, of_each), by_wanda(weight, torch.ones(40), share, of_each)):
            assert int(gone.sum()) == round(share * 160)


@pytest.mark.parametrize(("share", "of_each"), BOTH)
def test_wanda_with_inputs_all_alike_is_magnitude_in_each_row(share, of_each):
    weight, _ = problem(6, 48)
    gone = by_wanda(weight, torch.full((48,), 3.0), share, of_each)
    assert torch.equal(gone, torch.cat([by_magnitude(row[None], share, of_each) for row in weight]))


def test_wanda_drops_the_greatest_weight_of_an_input_that_never_fires():
    weight, squares = torch.tensor([[9.0, 1.0, 2.0, 3.0]]), torch.tensor([0.0, 1.0, 1.0, 1.0])
    assert by_wanda(weight, squares, 0.25, None).tolist() == [[True, False, False, False]]


def test_wanda_weighs_by_the_norm_and_not_by_its_square():
    weight, squares = torch.tensor([[1.0, 3.0]]), torch.tensor([4.0, 1.0])
    assert by_wanda(weight, squares, 0.5, None).tolist() == [[True, False]]


@pytest.mark.parametrize(("share", "of_each"), BOTH)
@pytest.mark.parametrize("shape", [(5, 24), (3, 128), (4, 200), (1, 160)])
def test_sparsegpt_is_that_of_the_paper(shape, share, of_each):
    weight, hessian = problem(*shape)
    rows = gptq_reference.eliminated(gptq_reference.damped(hessian.numpy(), DAMP))
    theirs = gptq_reference.sparsegpt(weight.numpy(), rows, share, of_each)
    made = pruned("sparsegpt", weight.clone(), hessian, share, of_each).numpy()
    np.testing.assert_array_equal(made == 0, theirs == 0)
    np.testing.assert_allclose(made, theirs, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("share", SHARES)
def test_alps_takes_the_share_of_the_whole_matrix(share):
    made = pruned("alps", *problem(7, 40), share)
    assert int((made == 0).sum()) == round(share * made.numel())


@pytest.mark.parametrize("of_each", [None, (2, 4)])
def test_what_alps_leaves_is_the_least_error_of_its_mask(of_each):
    weight, hessian = problem(5, 16)
    made = pruned("alps", weight, hessian, of_each=of_each)
    damped = hessian + DAMP * hessian.diagonal().mean() * torch.eye(16, dtype=torch.float64)
    for row, best in zip(weight, made, strict=True):
        on = best != 0
        exact = torch.linalg.solve(damped[on][:, on], damped[on] @ row)
        torch.testing.assert_close(best[on], exact, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("seed", range(4))
def test_alps_finds_the_best_mask_of_a_small_row(seed):
    weight, hessian = problem(1, 8, seed)
    damped = hessian + DAMP * hessian.diagonal().mean() * torch.eye(8, dtype=torch.float64)
    errors = []
    for places in itertools.combinations(range(8), 4):
        on, best = list(places), torch.zeros_like(weight)
        best[0, on] = torch.linalg.solve(damped[on][:, on], damped[on] @ weight[0])
        errors.append(harm(weight, best, damped))
    assert harm(weight, pruned("alps", weight, hessian), damped) <= 1.0001 * min(errors)


@pytest.mark.parametrize("method", ["sparsegpt", "alps"])
@pytest.mark.parametrize("outputs", [1, 3])
def test_the_weight_given_is_left_as_it_was(method, outputs):
    given, hessian = problem(outputs, 24)
    weight = given.clone()
    pruned(method, weight, hessian)
    assert torch.equal(weight, given)


@pytest.mark.parametrize("of_each", [None, (2, 4)])
@quickly
@given(st.integers(0, 1000))
def test_on_correlated_inputs_alps_harms_less_than_sparsegpt_than_wanda_than_magnitude(of_each, seed):
    weight, hessian = problem(32, 96, seed)
    methods = ("alps", "sparsegpt", "wanda", "magnitude")
    least, less, more, most = (harm(weight, pruned(m, weight, hessian, of_each=of_each), hessian) for m in methods)
    assert least < less < more < most
