"""Questions that several processes answer together: shares, order, and what fails in one of them."""

import pytest
import torch

from llmq import plugin, processes, together
from llmq.errors import LlmqError
from llmq.text import losses, scoring
from llmq.text.examples import Tokens
from llmq.types import Context


def doubled(module, device, share, numbers):
    """Work that fails for a 13."""
    assert 13 not in numbers[share.process :: share.processes]
    return {i: module * numbers[i] for i in share.of(range(len(numbers)))}


def placed(module, device, share, count):
    """Work that answers with the device that it is given."""
    return dict.fromkeys(share.of(range(count)), device)


def unlike(module, device, share):
    """Work that one process does as if it were alone."""
    return dict.fromkeys(range(3), 0) if share.process else {0: 0}


@pytest.fixture
def two(monkeypatch):
    """Two processes in one: what the first sends is answered as the second would, before anything is gathered."""
    sent, models = [], []

    def gathered(told, device):
        assert device == together._crew[-1].device
        with monkeypatch.context() as second:
            second.setenv("RANK", "1")
            return [told, together._answered(sent[-1], models, device)]

    monkeypatch.setenv("WORLD_SIZE", "2")

    def send(question, device):
        assert device == together._crew[-1].device, "the processes meet by the device of the run alone"
        sent.append(question)

    monkeypatch.setattr(together, "_send", send)
    monkeypatch.setattr(together, "_gathered", gathered)
    return sent


class Three:
    """An artifact whose network is the number 3."""

    def open(self, device):
        from contextlib import nullcontext
        from types import SimpleNamespace

        return nullcontext(SimpleNamespace(module=3, artifact=self, device="cpu"))


@pytest.mark.parametrize("of", [1, 2, 5])
def test_the_shares_of_all_processes_are_all_items_once(of):
    shares = [list(together.Share(number, of).of(range(11))) for number in range(of)]
    assert sorted(i for share in shares for i in share) == list(range(11))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


def test_answers_come_in_order_and_the_others_are_told_the_end(two):
    with together.leading("cpu"), together.opened(Three(), "cpu") as loaded:
        assert together.count() == 1
        assert together.answers(doubled, [loaded.module], "cpu", [1, 2, 3, 4, 5]) == [3, 6, 9, 12, 15]
        assert together.count() == 2
    assert [(bool(q.work), len(q.models)) for q in two] == [(True, 1), (False, 1), (False, 0)]


def test_a_module_that_nobody_else_can_open_is_asked_here(two):
    with together.leading("cpu"):
        assert together.answers(doubled, [7], "cpu", [1, 2, 3]) == [7, 14, 21]
        assert together.count() == 1
    assert [bool(q.work) for q in two] == [False]


def test_what_fails_in_another_process_is_raised_in_the_first(two):
    with together.leading("cpu"), together.opened(Three(), "cpu") as loaded:
        with pytest.raises(LlmqError, match="process 1 of 2: AssertionError"):
            together.answers(doubled, [loaded.module], "cpu", [1, 13])
        with pytest.raises(AssertionError):
            together.answers(doubled, [loaded.module], "cpu", [13, 1])
        assert together.answers(doubled, [loaded.module], "cpu", [1, 1]) == [3, 3]


def test_a_model_that_lies_elsewhere_is_asked_where_it_lies(two):
    """A graph of OpenVINO runs on the processor, and a group of its own would wait for the others for ever."""
    with together.leading("cuda:0"), together.opened(Three(), "cuda:0") as loaded:
        assert together.answers(placed, [loaded.module], loaded.device, 4) == ["cpu"] * 4


def test_shares_that_do_not_fit_together_are_no_answers(two):
    with together.leading("cpu"), together.opened(Three(), "cpu") as loaded, pytest.raises(LlmqError, match="unlike"):
        together.answers(unlike, [loaded.module], "cpu")


def test_alone_nobody_is_asked():
    assert processes.count() == 1
    with together.leading("cpu"), together.opened(Three(), "cpu") as loaded:
        assert together.answers(doubled, [loaded.module], "cpu", [1, 2]) == [3, 6]
        assert together.count() == 1


def test_shares_of_batches_give_the_losses_and_scores_of_one_process_to_the_bit(tiny_llama):
    drawn = torch.randint(5, 60, (7, 24), generator=torch.Generator().manual_seed(0)).tolist()
    rows = [row[: 24 - 2 * i] for i, row in enumerate(drawn)]
    windows = [Tokens(tuple(row), (False, *[True] * (len(row) - 1))) for row in rows]
    requests = [scoring.Request(tuple(row), 3) for row in rows]
    base = plugin.build({"causal_lm": {"weights": str(tiny_llama)}}, "models").base(Context("cpu", 0))
    shares = [together.Share(i, 2) for i in range(2)]
    with base.open("cpu") as loaded:
        for work, asked in ((losses._losses, (windows, 2)), (scoring._scores, (requests, 2))):
            whole = work(loaded.module, "cpu", together.Share(), *asked)
            parts = [work(loaded.module, "cpu", share, *asked) for share in shares]
            assert all(parts)
            assert {**parts[0], **parts[1]} == whole
            assert sorted(whole) == list(range(7))
