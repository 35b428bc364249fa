"""Attention within segments against PyTorch's own, forwards and backwards."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import scaled_dot_product_attention

from llmq.text.attention import causal, fused, segments_of, within_segments
from llmq.text.examples import Collator, Tokens

quickly = settings(max_examples=25, deadline=None, database=None)
HEADS, GROUPS, D, SCALING = 6, 2, 4, 0.37


pytestmark = pytest.mark.usefixtures("one_thread")


def states(rows, tokens, seed=0, heads=HEADS, groups=GROUPS):
    """Query, key and value that ask for gradients."""
    generator = torch.Generator().manual_seed(seed)
    shapes = [(rows, n, tokens, D) for n in (heads, groups, groups)]
    return [torch.randn(s, generator=generator, dtype=torch.float64, requires_grad=True) for s in shapes]


def reference(query, key, value):
    """The same by PyTorch, every group repeated for its heads; (rows, tokens, heads, d)."""
    key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], dim=1) for x in (key, value))
    return scaled_dot_product_attention(query, key, value, is_causal=True, scale=SCALING).transpose(1, 2)


def reference_by_segment(query, key, value, segments):
    """Every segment alone, put back where it lay."""
    rows, heads, tokens, d = query.shape
    out = torch.zeros(rows, tokens, heads, d, dtype=query.dtype)
    for row, start, end in segments:
        out[row, start:end] = reference(*(x[row : row + 1, :, start:end] for x in (query, key, value)))[0]
    return out


def gradients(out, inputs):
    direction = torch.randn(out.shape, generator=torch.Generator().manual_seed(9), dtype=out.dtype)
    return torch.autograd.grad((out * direction).sum(), inputs)


def assert_same(ours, theirs):
    # The softmax is float32 even for float64 inputs, so seven digits are what can agree.
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


def cut(lengths):
    """The same lengths in each row -> segments."""
    ends = [sum(lengths[: i + 1]) for i in range(len(lengths))]
    return [(end - n, end) for n, end in zip(lengths, ends, strict=True)]


@pytest.mark.parametrize(("heads", "groups"), [(6, 2), (4, 4), (3, 1)])
def test_one_segment_a_row_equals_causal_attention(heads, groups):
    inputs = states(3, 7, heads=heads, groups=groups)
    segments = [(row, 0, 7) for row in range(3)]
    ours, theirs = within_segments(*inputs, SCALING, segments), reference(*inputs)
    assert ours.shape == (3, 7, heads, D)
    assert_same(ours, theirs)
    for mine, its in zip(gradients(ours, inputs), gradients(theirs, inputs), strict=True):
        assert_same(mine, its)


@pytest.mark.parametrize(("heads", "groups"), [(6, 2), (4, 4), (3, 1)])
def test_the_one_kernel_that_cards_take_equals_the_tiles(heads, groups):
    inputs = states(2, 150, heads=heads, groups=groups)  # more than a tile
    ours, theirs = (attend(*inputs, SCALING) for attend in (fused, causal))
    assert_same(ours, theirs)
    for mine, its in zip(gradients(ours, inputs), gradients(theirs, inputs), strict=True):
        assert_same(mine, its)


@quickly
@given(
    st.lists(st.lists(st.integers(1, 6), min_size=1, max_size=4), min_size=1, max_size=3),
    st.integers(0, 1000),
)
def test_packed_rows_equal_each_segment_alone(rows, seed):
    tokens = max(map(sum, rows))
    # What is left of a shorter row is its padding, a segment of its own.
    filled = [lengths + [tokens - sum(lengths)] * (sum(lengths) < tokens) for lengths in rows]
    segments = [(row, start, end) for row, lengths in enumerate(filled) for start, end in cut(lengths)]
    inputs = states(len(rows), tokens, seed)
    ours, theirs = within_segments(*inputs, SCALING, segments), reference_by_segment(*inputs, segments)
    assert_same(ours, theirs)
    for mine, its in zip(gradients(ours, inputs), gradients(theirs, inputs), strict=True):
        assert_same(mine, its)


def test_nothing_flows_between_segments_or_from_the_future():
    inputs = states(1, 7)
    out = within_segments(*inputs, SCALING, [(0, 0, 3), (0, 3, 7)])
    for x, gradient in zip(inputs, torch.autograd.grad(out[0, 4].sum(), inputs), strict=True):
        reached = gradient[0].abs().sum((0, 2)) > 0
        assert not reached[[0, 1, 2, 5, 6]].any(), x.shape
        assert reached[4]


def test_the_result_has_the_dtype_of_the_values():
    inputs = [x.detach().bfloat16() for x in states(1, 5)]
    out = within_segments(*inputs, SCALING, [(0, 0, 2), (0, 2, 5)])
    assert out.dtype == torch.bfloat16
    exact = reference_by_segment(*(x.double() for x in inputs), [(0, 0, 2), (0, 2, 5)])
    torch.testing.assert_close(out.double(), exact, rtol=0.05, atol=0.05)


def test_segments_begin_where_positions_begin():
    positions = torch.tensor([[0, 1, 2, 0, 1, 0], [0, 0, 1, 2, 3, 4]])
    assert segments_of(positions) == [(0, 0, 3), (0, 3, 5), (0, 5, 6), (1, 0, 1), (1, 1, 6)]


def test_a_row_that_does_not_begin_at_nought_is_a_segment_all_the_same():
    assert segments_of(torch.tensor([[3, 4, 0, 1]])) == [(0, 0, 2), (0, 2, 4)]


@quickly
@given(st.lists(st.lists(st.integers(1, 6), min_size=1, max_size=4), min_size=1, max_size=4))
def test_segments_of_a_collated_batch_are_its_examples_and_the_padding(rows):
    batch = Collator(0)([[Tokens((7,) * n, (True,) * n) for n in lengths] for lengths in rows])
    width = max(map(sum, rows))
    found = segments_of(batch["position_ids"])
    assert batch["segments"] == found
    for row, lengths in enumerate(rows):
        spans = [end - start for r, start, end in found if r == row]
        assert spans == lengths + [width - sum(lengths)] * (sum(lengths) < width)
