"""How far a stage lies from the base: against closed forms, and nothing where nothing changed."""

import json
import math

import pytest
import torch
from helpers import CPU, apply, base_of, beginning_with_a_mark

from llmq import pipeline, plugin, recipe
from llmq.errors import UserError
from llmq.source import Source
from llmq.text.losses import divergence
from llmq.text.windows import held_out_windows, windows_of
from llmq.types import Measurement

FEW = {"window": 32, "windows": 3, "limit": 12}


def told(stage, base, **settings):
    """Metric -> measurement of the task."""
    task = plugin.build({"divergence": {**FEW, **settings}}, "tasks")
    with stage.open("cpu") as a, base.open("cpu") as b:
        return {m.metric: m for m in task.against(a, b) if isinstance(m, Measurement)}


class Always(torch.nn.Module):
    """A model that says the same of every token."""

    device = torch.device("cpu")

    def __init__(self, *shares):
        super().__init__()
        self.logits = torch.tensor(shares).log()

    def forward(self, input_ids, use_cache=False):
        return type("Made", (), {"logits": self.logits.expand(*input_ids.shape, -1)})


def apart(reference, other, windows):
    return divergence(reference, other, [w.tokens for w in windows], "cpu", "t", "kl_to_base", "")


def test_divergence_is_the_closed_form(tiny_llama):
    from transformers import AutoTokenizer

    windows = windows_of("some words to count, and some more " * 9, AutoTokenizer.from_pretrained(tiny_llama), 16)
    p, q = (0.5, 0.3, 0.2), (0.2, 0.3, 0.5)
    kl, agreement = apart(Always(*p), Always(*q), windows)
    expected = sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))
    assert kl.value == pytest.approx(expected, abs=1e-6)
    assert agreement.value == 0
    assert sum(kl.samples.weights) == sum(len(w.tokens) - 1 for w in windows)
    assert len(kl.samples.values) == len(windows)


def test_nothing_has_changed_where_nothing_was_done(tiny_llama):
    base = base_of(tiny_llama)
    found = told(base, base)
    assert {k: m.value for k, m in found.items()} == {
        "kl_to_base": 0.0,
        "top1_agreement": 1.0,
        "flips": 0.0,
        "flips_to_wrong": 0.0,
        "flips_to_right": 0.0,
    }


@pytest.mark.slow
def test_a_coarser_grid_diverges_more_and_flips_add_up(tiny_llama, tmp_path):
    base = base_of(tiny_llama)
    eight, two = (apply("quantize.rtn", base, tmp_path / str(n), bits=n, group_size=32) for n in (8, 2))
    near, far = told(eight, base), told(two, base)
    assert 0 < near["kl_to_base"].value < far["kl_to_base"].value
    assert near["top1_agreement"].value > far["top1_agreement"].value
    for found in (near, far):
        assert found["flips"].value == pytest.approx(found["flips_to_wrong"].value + found["flips_to_right"].value)
        assert found["flips"].n == 12
        assert set(found["flips"].samples.values) <= {0.0, 1.0}
    assert far["kl_to_base"].better == "lower"


@pytest.mark.slow
def test_flips_are_those_of_the_accuracies(tiny_llama, tmp_path):
    """Accuracy of the stage less that of the base is what was gained less what was lost."""
    base = base_of(tiny_llama)
    stage = apply("quantize.rtn", base, tmp_path / "q", bits=2, group_size=32)
    flips = told(stage, base, tasks=["pydoc_continuation"])
    asked = plugin.build({"lm_eval": {"tasks": ["pydoc_continuation"], "limit": 12}}, "tasks")
    accuracy = []
    for artifact in (stage, base):
        with artifact.open("cpu") as loaded:
            accuracy += [m.value for m in asked.score(loaded) if isinstance(m, Measurement) and m.metric == "acc"]
    gained = flips["flips_to_right"].value - flips["flips_to_wrong"].value
    assert accuracy[0] - accuracy[1] == pytest.approx(gained)


def test_in_a_run_every_stage_but_the_base_is_told_about(tiny_llama, tmp_path):
    plain = {
        "model": {"causal_lm": {"weights": str(tiny_llama)}},
        "steps": [{"quantize.rtn": {"bits": 4}}],
        "evaluate": [{"divergence": {**FEW, "tasks": []}}],
    }
    report = pipeline.run(recipe.parse(Source("test", plain), "test"), tmp_path / "run", cache=False)
    assert {(m["stage"], m["metric"]) for m in report.measurements} == {
        ("1-quantize.rtn", "kl_to_base"),
        ("1-quantize.rtn", "top1_agreement"),
    }
    assert (tmp_path / "run/1-quantize.rtn/samples/divergence.kl_to_base.jsonl").is_file()
    assert CPU.device == "cpu"


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"tasks": ["gsm8k"]}, "flips are counted on multiple choice, and 'gsm8k' is generate_until"),
        ({"tasks": ["hellaswog"]}, "did you mean 'hellaswag'"),
        ({"text": {"file": {"path": "/no/such.txt"}}}, "no"),
    ],
)
def test_what_cannot_work_is_said_before_anything_runs(settings, says):
    with pytest.raises(UserError, match=says):
        plugin.build({"divergence": settings}, "tasks").check()


class AtPrompts(Always):
    """Says one thing where a prompt goes on, and another where the completion does."""

    def __init__(self, of_prompts, of_completions, said):
        super().__init__(*of_completions)
        self.of_prompts, self.said = torch.tensor(of_prompts).log(), torch.tensor([*said[1:], True])

    def forward(self, input_ids, use_cache=False):
        made = super().forward(input_ids)
        made.logits = torch.where(self.said[:, None], made.logits, self.of_prompts)
        return made


def test_of_rows_with_prompts_the_completions_alone_are_compared(tiny_llama, tiny_jsonl):
    from transformers import AutoTokenizer

    split = plugin.build({"file": {"path": str(tiny_jsonl)}}, "data").read()
    windows, told_of = held_out_windows(split, AutoTokenizer.from_pretrained(tiny_llama), 64, 1)
    p, q = (0.5, 0.3, 0.2), (0.2, 0.3, 0.5)
    assert told_of == "1 completions after their prompts, at most 64 tokens"
    assert 0 < windows[0].scored < len(windows[0].tokens) - 1
    same, _ = apart(Always(*p), AtPrompts(q, p, windows[0].tokens.said), windows)
    other, _ = apart(Always(*p), AtPrompts(p, q, windows[0].tokens.said), windows)
    expected = sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))
    assert (same.samples.values, same.samples.weights) == ((0.0,), (float(windows[0].scored),))
    assert other.samples.values[0] == pytest.approx(expected * windows[0].scored, abs=1e-5)


def test_windows_begin_with_the_mark_that_the_model_knows(tiny_llama):
    tokenizer = beginning_with_a_mark(tiny_llama)
    split = plugin.build("pydoc", "data").read()
    windows, told_of = held_out_windows(split, tokenizer, 64, 3)
    assert [w.tokens.ids[0] for w in windows] == [tokenizer.bos_token_id] * 3
    assert [w.scored for w in windows] == [63] * 3
    assert told_of.endswith("BOS first")


def test_no_second_end_mark_follows_that_of_the_model(tiny_llama, tmp_path):
    """The model stops at <|im_end|>, and its tokenizer names another token, as those of many base models do."""
    from transformers import AutoTokenizer

    file = tmp_path / "talks.jsonl"
    turns = [{"role": "user", "content": "one?"}, {"role": "assistant", "content": "two"}]
    file.write_text(f"{json.dumps({'messages': turns})}\n" * 2 + json.dumps({"messages": [*turns, *turns]}))
    split = plugin.build({"file": {"path": str(file)}}, "data").read()
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama, eos_token="<|endoftext|>")
    windows, _ = held_out_windows(split, tokenizer, 64, 1, {2})
    assert tokenizer.decode(windows[0].tokens.ids).endswith("two<|im_end|>")


def test_divergence_reads_data_of_any_shape(tiny_llama, tiny_jsonl):
    base = base_of(tiny_llama)
    found = told(base, base, text=str(tiny_jsonl), tasks=[])
    assert found["kl_to_base"].value == 0
    assert "completions after their prompts" in found["kl_to_base"].convention
