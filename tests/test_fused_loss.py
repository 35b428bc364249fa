"""The loss without logits against PyTorch's cross-entropy, forwards and backwards."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import cross_entropy

from llmq.text.examples import IGNORED
from llmq.text.fused_loss import ROWS_AT_A_TIME, linear_cross_entropy

D, VOCABULARY = 5, 11


pytestmark = pytest.mark.usefixtures("one_thread")


def problem(tokens, dtype=torch.float32, bias=False, seed=0):
    """Hidden states that ask for gradients, a frozen head, and targets of which every third is ignored."""
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(tokens, D, generator=generator, dtype=dtype, requires_grad=True)
    head = torch.nn.Linear(D, VOCABULARY, bias=bias, dtype=dtype).requires_grad_(False)
    for parameter in head.parameters():
        parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=dtype))
    targets = torch.randint(VOCABULARY, (tokens,), generator=generator)
    targets[::3] = IGNORED
    return hidden, head, targets


def reference(hidden, head, targets):
    return cross_entropy(head(hidden), targets, ignore_index=IGNORED, reduction="sum")


def assert_same(hidden, head, targets):
    ours, theirs = linear_cross_entropy(hidden, head, targets, IGNORED), reference(hidden, head, targets)
    # The logits are float32 even for a float64 head.
    torch.testing.assert_close(ours.double(), theirs.double(), rtol=1e-5, atol=1e-5)
    (mine,), (its,) = (torch.autograd.grad(loss, hidden) for loss in (ours, theirs))
    assert mine.dtype == hidden.dtype
    torch.testing.assert_close(mine, its, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("bias", [False, True])
def test_value_and_gradient_are_those_of_cross_entropy_over_many_chunks(dtype, bias):
    assert_same(*problem(4 * ROWS_AT_A_TIME + 17, dtype, bias))


@settings(max_examples=15, deadline=None, database=None)
@given(st.integers(1, 2 * ROWS_AT_A_TIME + 2), st.integers(0, 1000))
def test_any_number_of_tokens_will_do(tokens, seed):
    assert_same(*problem(tokens, seed=seed))


@pytest.mark.parametrize("tokens", [ROWS_AT_A_TIME - 1, ROWS_AT_A_TIME, ROWS_AT_A_TIME + 1])
def test_no_token_is_lost_at_the_border_of_a_chunk(tokens):
    hidden, head, targets = problem(tokens)
    targets[:] = 3
    assert_same(hidden, head, targets)


def test_ignored_targets_contribute_nothing():
    hidden, head, targets = problem(50)
    kept = targets != IGNORED
    loss = linear_cross_entropy(hidden, head, targets, IGNORED)
    torch.testing.assert_close(loss, linear_cross_entropy(hidden[kept], head, targets[kept], IGNORED))
    loss.backward()
    assert (hidden.grad[~kept] == 0).all()
    assert (hidden.grad[kept].abs().sum(1) > 0).all()


def test_a_batch_of_nothing_but_ignored_targets_has_no_loss_and_no_gradient():
    hidden, head, targets = problem(8)
    loss = linear_cross_entropy(hidden, head, torch.full_like(targets, IGNORED), IGNORED)
    loss.backward()
    assert loss == 0
    assert (hidden.grad == 0).all()


def test_a_frozen_head_gets_no_gradient():
    hidden, head, targets = problem(20, bias=True)
    linear_cross_entropy(hidden, head, targets, IGNORED).backward()
    assert head.weight.grad is None
    assert head.bias.grad is None
    assert hidden.grad is not None


def test_the_gradient_scales_with_that_of_what_follows():
    hidden, head, targets = problem(30)
    (once,) = torch.autograd.grad(linear_cross_entropy(hidden, head, targets, IGNORED), hidden)
    (scaled,) = torch.autograd.grad(-2.5 * linear_cross_entropy(hidden, head, targets, IGNORED), hidden)
    torch.testing.assert_close(scaled, -2.5 * once)


def test_the_loss_may_be_asked_for_without_gradients():
    hidden, head, targets = problem(30)
    with torch.no_grad():
        loss = linear_cross_entropy(hidden, head, targets, IGNORED)
    assert not loss.requires_grad
    torch.testing.assert_close(loss, reference(hidden, head, targets).detach())


def test_logits_far_from_nought_do_not_overflow():
    hidden, head, targets = problem(10)
    assert_same((hidden.detach() * 1e4).requires_grad_(), head, targets)


def test_hidden_states_and_head_may_differ_in_precision():
    hidden, head, targets = problem(40)
    loss = linear_cross_entropy(hidden, head.bfloat16(), targets, IGNORED)
    assert loss.dtype == torch.float32
    (gradient,) = torch.autograd.grad(loss, hidden)
    assert gradient.dtype == torch.float32
    (exact,) = torch.autograd.grad(reference(hidden, head.float(), targets), hidden)
    torch.testing.assert_close(gradient, exact, rtol=0.05, atol=0.05)
