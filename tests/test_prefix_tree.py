"""Sequences that share their beginnings, laid out once."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import scaled_dot_product_attention

from llmq.text import prefix_attention, prefix_tree

quickly = settings(max_examples=40, deadline=None, database=None)
sequences = st.lists(st.lists(st.integers(0, 3), min_size=1, max_size=12).map(tuple), min_size=1, max_size=12)


@quickly
@given(sequences, st.integers(1, 30), st.one_of(st.none(), st.integers(1, 4)))
def test_every_sequence_can_be_read_back_from_its_row(given, tokens, most):
    rows = list(prefix_tree.rows(given, tokens, most))
    assert sorted(m for row in rows for m in row.members) == list(range(len(given)))
    for row in rows:
        assert len(row.ids) <= tokens or len(row.members) == 1
        assert most is None or len(row.members) <= most
        assert len(row.ids) == len(row.positions)
        for member, places in zip(row.members, row.places, strict=True):
            assert tuple(row.ids[p] for p in places) == given[member]
            assert [row.positions[p] for p in places] == list(range(len(places)))


@quickly
@given(sequences)
def test_nothing_shared_by_neighbours_stands_twice(given):
    (row,) = prefix_tree.rows(given, 10_000)
    prefixes = {s[: i + 1] for s in given for i in range(len(s))}
    assert len(row.ids) == len(prefixes), "one token for each different beginning"


@quickly
@given(sequences)
def test_pieces_cover_every_token_once(given):
    (row,) = prefix_tree.rows(given, 10_000)
    covered = [t for p in row.pieces for t in range(p.start, p.start + p.length)]
    assert sorted(covered) == list(range(len(row.ids)))
    for piece in row.pieces:
        assert len(piece.keys) == piece.first + piece.length
        assert piece.keys[piece.first :] == tuple(range(piece.start, piece.start + piece.length))


def test_a_long_sequence_is_cut_into_tiles():
    (row,) = prefix_tree.rows([tuple(range(300))], 10_000)
    assert [p.length for p in row.pieces] == [128, 128, 44]
    assert [len(p.keys) for p in row.pieces] == [128, 256, 300]


@pytest.mark.parametrize(("heads", "groups"), [(6, 2), (4, 4), (3, 1)])
@quickly
@given(given=sequences, seed=st.integers(0, 99))
def test_attention_is_that_of_each_sequence_alone(heads, groups, given, seed):
    (row,) = prefix_tree.rows(given, 10_000)
    tokens, d = len(row.ids), 4
    generator = torch.Generator().manual_seed(seed)
    query, key, value = (torch.randn(n, tokens, d, generator=generator) for n in (heads, groups, groups))
    plan = prefix_attention.batches(row.pieces, tokens, heads, torch.float32, "cpu")
    made = prefix_attention.attend(query, key, value, 0.37, plan)
    for places in row.places:
        q, k, v = (x[None, :, list(places)] for x in (query, key, value))
        k, v = (x.repeat_interleave(heads // groups, 1) for x in (k, v))
        alone = scaled_dot_product_attention(q, k, v, is_causal=True, scale=0.37)[0].transpose(0, 1)
        torch.testing.assert_close(made[list(places)], alone, rtol=1e-4, atol=1e-5)


def test_few_scores_at_a_time_make_no_difference(monkeypatch):
    given = [(1, 2, 3, i, *range(i)) for i in range(9)]
    (row,) = prefix_tree.rows(given, 10_000)
    tokens = len(row.ids)
    query, key, value = (torch.randn(n, tokens, 8).bfloat16() for n in (4, 2, 2))
    whole = prefix_attention.batches(row.pieces, tokens, 4, torch.bfloat16, "cpu")
    monkeypatch.setattr(prefix_attention, "SCORES", 200)
    parts = prefix_attention.batches(row.pieces, tokens, 4, torch.bfloat16, "cpu")
    assert len(parts) > len(whole)
    one, other = (prefix_attention.attend(query, key, value, 0.3, plan) for plan in (whole, parts))
    torch.testing.assert_close(one, other, rtol=0, atol=0)
