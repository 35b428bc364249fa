"""Windows over a text: what is scored, what is only seen, and how much text that is."""

import math
import shutil
from types import SimpleNamespace

import pytest
import torch
from helpers import base_of, beginning_with_a_mark
from hypothesis import given, settings
from hypothesis import strategies as st
from test_gguf import sentencepiece_like
from transformers import AutoTokenizer, LlamaConfig

from llmq import plugin
from llmq.tasks.perplexity import Perplexity
from llmq.text.examples import IGNORED, Tokens
from llmq.text.losses import batches, losses, padded
from llmq.text.windows import completions, windows_of
from llmq.types import Loaded, Split

quickly = settings(max_examples=80, deadline=None, database=None)
BOS = 1
texts = st.text("abé漢😀 ", min_size=1, max_size=60)


pytestmark = pytest.mark.usefixtures("one_thread")


class Letters:
    """A tokenizer of one token a character."""

    bos_token_id = BOS

    def __call__(self, text, add_special_tokens=True, return_offsets_mapping=False):
        return {
            "input_ids": [ord(c) for c in text],
            "offset_mapping": [(i, i + 1) for i in range(len(text))],
        }


class Bytes(Letters):
    """A tokenizer of one token a byte, which like any byte-level one gives each the span of its whole character."""

    def __call__(self, text, add_special_tokens=True, return_offsets_mapping=False):
        pairs = [(byte, (i, i + 1)) for i, c in enumerate(text) for byte in c.encode()]
        return {"input_ids": [byte for byte, _ in pairs], "offset_mapping": [span for _, span in pairs]}


def scored(window):
    """The tokens of a window that are to be scored."""
    return [label for label in window.tokens.labels() if label != IGNORED]


def spelled(window):
    return "".join(map(chr, scored(window)))


@quickly
@given(texts, st.integers(2, 12))
def test_every_token_but_the_first_of_each_separate_window_is_scored_once(text, length):
    windows = windows_of(text, Letters(), length)
    pieces = [text[i : i + length] for i in range(0, len(text), length)]
    assert [spelled(w) for w in windows] == [p[1:] for p in pieces if len(p) > 1]


@quickly
@given(texts, st.integers(2, 12), st.data())
def test_with_overlap_every_token_but_the_very_first_is_scored_exactly_once(text, length, data):
    stride = data.draw(st.integers(1, length - 1))
    windows = windows_of(text, Letters(), length, stride=stride)
    assert "".join(map(spelled, windows)) == text[1:]
    assert all(len(w.tokens) <= length for w in windows)


@quickly
@given(texts, st.integers(2, 12), st.data())
def test_with_overlap_every_scored_token_but_those_of_the_first_window_has_enough_before_it(text, length, data):
    stride = data.draw(st.integers(1, length - 1))
    for window in windows_of(text, Letters(), length, stride=stride)[1:]:
        assert window.scored <= stride
        assert not any(window.tokens.said[: length - stride])


@quickly
@given(texts, st.integers(2, 12), st.booleans(), st.data())
def test_bytes_are_those_of_the_scored_text(text, length, bos, data):
    stride = data.draw(st.none() | st.integers(1, length))
    for window in windows_of(text, Letters(), length, stride=stride, bos=bos):
        assert window.scored == len(scored(window)) > 0
        assert window.bytes == len(spelled(window).encode())


@quickly
@given(texts, st.integers(2, 12), st.data())
def test_with_the_beginning_mark_every_token_is_scored_exactly_once(text, length, data):
    stride = data.draw(st.none() | st.integers(1, length))
    windows = windows_of(text, Letters(), length, stride=stride, bos=True)
    assert "".join(map(spelled, windows)) == text
    assert all(w.tokens.ids[0] == BOS and not w.tokens.said[0] for w in windows)
    assert all(len(w.tokens) <= length for w in windows)


@quickly
@given(texts, st.integers(2, 12), st.integers(1, 4), st.booleans())
def test_a_limit_keeps_the_first_windows(text, length, limit, bos):
    everything = windows_of(text, Letters(), length, bos=bos)
    assert windows_of(text, Letters(), length, limit=limit, bos=bos) == everything[:limit]


@pytest.mark.parametrize("text", ["", "a"])
def test_a_text_with_nothing_to_predict_has_no_windows(text):
    assert windows_of(text, Letters(), 4) == []


def test_windows_of_a_short_text_by_hand():
    windows = windows_of("one two", Letters(), 4, stride=2)
    assert [w.tokens.said for w in windows] == [
        (True, True, True, True),
        (False, False, True, True),
        (False, False, True),
    ]
    assert [(w.scored, w.bytes) for w in windows] == [(3, 3), (2, 2), (1, 1)]


def test_words_and_bytes_of_one_window_are_those_of_its_scored_text():
    (window,) = windows_of("où est-il ?", Letters(), 20)
    # The first letter is not scored, and with it goes the beginning of the first word.
    assert (window.scored, window.words, window.bytes) == (10, 2, 11)


def test_a_character_whose_tokens_two_windows_share_counts_once():
    text = "ab😀cd"
    windows = windows_of(text, Bytes(), 5, bos=True)  # a b f0 9f | 98 80 c d
    assert [w.scored for w in windows] == [4, 4]
    assert sum(w.bytes for w in windows) == pytest.approx(len(text.encode()))


def test_a_word_whose_tokens_two_windows_share_counts_once():
    text = "one two six ten a"
    windows = windows_of(text, Letters(), 9, stride=5, bos=True)
    assert [spelled(w) for w in windows] == ["one two ", "six t", "en a"]
    assert sum(w.words for w in windows) == pytest.approx(5)


@quickly
@given(st.lists(st.integers(1, 9), min_size=1, max_size=20), st.integers(1, 6))
def test_batches_visit_every_window_once_and_the_longest_first(sizes, size):
    windows = [Tokens((0,) * n, (True,) * n) for n in sizes]
    found = list(batches(windows, size))
    order = [i for batch in found for i in batch]
    assert sorted(order) == list(range(len(sizes)))
    assert [sizes[i] for i in order] == sorted(sizes, reverse=True)
    assert all(len(batch) == size for batch in found[:-1])


def test_padding_is_on_the_right_and_is_not_scored():
    ids, labels = padded([Tokens((5, 6, 7), (True,) * 3), Tokens((8, 9), (True, True))], "cpu")
    assert ids.tolist() == [[5, 6, 7], [8, 9, 0]]
    assert labels.tolist() == [[6, 7, IGNORED], [9, IGNORED, IGNORED]]


class Successor:
    """A model that puts odds of e to one on the next token being this one plus one, over ten tokens."""

    right = math.log(math.e + 9) - 1
    wrong = math.log(math.e + 9)
    config = LlamaConfig()

    def __call__(self, input_ids, use_cache):
        assert not use_cache
        return SimpleNamespace(logits=torch.nn.functional.one_hot((input_ids + 1) % 10, 10).bfloat16())


@pytest.mark.parametrize("batch_size", [1, 2, 5])
def test_losses_are_summed_by_window_and_come_in_its_order(batch_size):
    rising = Tokens((1, 2, 3, 4), (True, True, True, True))
    falling = Tokens((9, 8), (True, True))
    partly = Tokens((1, 2, 3, 3, 5), (False, False, True, True, False))
    right, wrong = Successor.right, Successor.wrong
    found = losses(Successor(), [falling, rising, partly], "cpu", batch_size)
    assert found == pytest.approx([wrong, 3 * right, right + wrong], rel=1e-5)


class Uniform:
    """A model to which every one of 128 characters is as likely as another."""

    config = SimpleNamespace(get_text_config=lambda: SimpleNamespace(vocab_size=128))

    def __call__(self, input_ids, use_cache):
        return SimpleNamespace(logits=torch.zeros(*input_ids.shape, 128))


def perplexities(text, **settings):
    """The figures of `Uniform` on a text, by metric."""
    split = Split([], [{"text": text}], "text", {}, "0" * 64)
    task = Perplexity.model_construct(data=SimpleNamespace(read=lambda: split, word="data.fake"), **settings)
    return {m.metric: m.value for m in task.score(Loaded(Uniform(), Letters(), "cpu", None))}


def test_the_perplexity_of_guessing_is_the_number_of_choices():
    found = perplexities("one two three four", window=8, bos=True)
    assert found["token_perplexity"] == pytest.approx(128)
    assert found["byte_perplexity"] == pytest.approx(128)


def test_a_window_of_nothing_but_space_does_not_spoil_the_figure_of_a_word():
    # Texts end in blank lines, so that the last window can hold no word at all.
    found = perplexities("ab cd\n\n\n", window=4)
    assert math.isfinite(found["word_perplexity"])


def test_calibration_windows_of_a_text_begin_with_the_mark_that_the_model_knows(tiny_llama, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(tiny_llama, folder)
    tokenizer = beginning_with_a_mark(folder)
    tokenizer.save_pretrained(folder)
    step = plugin.build({"quantize.gptq": {"samples": 3, "length": 16}})
    windows, _ = step.windows(base_of(folder), 0)
    assert [(len(w), w[0]) for w in windows] == [(16, tokenizer.bos_token_id)] * 3
    assert {w[0] for w in step.held_out_windows(base_of(folder), 2)} == {tokenizer.bos_token_id}
    without, _ = step.windows(base_of(tiny_llama), 0)
    assert tokenizer.bos_token_id not in {token for window in without for token in window}


def test_a_completion_has_the_bytes_of_its_text_under_sentencepiece_too(tmp_path, tiny_llama):
    sentencepiece_like(tmp_path)
    rows = [{"prompt": "Is it so?", "completion": " yes"}]
    for folder in (tmp_path, tiny_llama):
        ((window,), _) = completions(rows, AutoTokenizer.from_pretrained(folder), 64)
        assert (window.words, window.bytes) == (1, len(" yes"))
