"""Each figure checked once against an independent way to it."""

import json
import math
import os
import subprocess
import sys

import pytest
import torch
from helpers import apply, base_of

from llmq import plugin
from llmq.types import Measurement


def measured(word, artifact, **settings):
    """Metric -> measurement of one task on one artifact."""
    with artifact.open("cpu") as loaded:
        answers = plugin.build({word: settings}, "tasks").score(loaded)
        return {m.metric: m for m in answers if isinstance(m, Measurement)}


def test_perplexity_is_that_of_a_plain_loop(tiny_llama, tmp_path):
    """The loop of the transformers documentation: joined text, windows without overlap, the model's own loss."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    text = "The quick brown fox jumps over the lazy dog.\n\nNaïve café, 東京, and so on.\n\n" * 40
    file = tmp_path / "text.txt"
    file.write_text(text)
    ours = measured("perplexity", base_of(tiny_llama), data=str(file), part="all", window=64)

    model = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.bfloat16).eval()
    ids = AutoTokenizer.from_pretrained(tiny_llama)(text, return_tensors="pt")["input_ids"]
    total, tokens = 0.0, 0
    for start in range(0, ids.shape[1], 64):
        window = ids[:, start : start + 64]
        if window.shape[1] > 1:
            with torch.no_grad():
                total += float(model(window, labels=window).loss) * (window.shape[1] - 1)
            tokens += window.shape[1] - 1
    assert ours["token_perplexity"].value == pytest.approx(math.exp(total / tokens), rel=1e-3)
    assert sum(ours["token_perplexity"].samples.weights) == tokens
    assert ours["byte_perplexity"].value < ours["token_perplexity"].value < ours["word_perplexity"].value


def test_answers_to_one_question_are_one_sample_of_a_perplexity(tiny_llama, tmp_path):
    rows = [{"prompt": f"What is {i % 10}? ", "completion": f"It is {i}."} for i in range(40)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = measured("perplexity", base_of(tiny_llama), data=str(tmp_path / "rows.jsonl"), part="all")
    figure = found["token_perplexity"]
    assert (figure.n, len(set(figure.samples.clusters))) == (40, 10)
    assert "to 10 different prompts" in figure.convention


def test_batch_size_does_not_change_a_perplexity(tiny_llama, tiny_jsonl):
    one, many = (
        measured("perplexity", base_of(tiny_llama, "float32"), data=str(tiny_jsonl), part="all", batch_size=n)
        for n in (1, 7)
    )
    assert one["token_perplexity"].value == pytest.approx(many["token_perplexity"].value, rel=1e-5)
    assert one["token_perplexity"].samples.weights == many["token_perplexity"].samples.weights


def test_only_completions_are_scored(tiny_llama, tiny_jsonl):
    from transformers import AutoTokenizer

    rows = [json.loads(line) for line in tiny_jsonl.read_text().splitlines()]
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama)
    ours = measured("perplexity", base_of(tiny_llama), data=str(tiny_jsonl), part="all")["token_perplexity"]
    lengths = [len(tokenizer(row["completion"])["input_ids"]) + 1 for row in rows]  # and the end-of-text mark
    assert sorted(ours.samples.weights) == sorted(lengths)


@pytest.mark.parametrize("settings", [None, {"bits": 4}, {"bits": 8}], ids=str)
def test_size_counts_what_lies_on_disk_and_in_memory(tiny_llama, tmp_path, settings):
    stage = base_of(tiny_llama)
    if settings:
        stage = apply("quantize.bnb", stage, tmp_path / "q", **settings)
    ours = {k: m.value for k, m in measured("size", stage).items()}
    assert ours["bytes_on_disk"] == (stage.weights / "model.safetensors").stat().st_size
    dense = measured("size", base_of(tiny_llama))
    assert ours["parameters"] == dense["parameters"].value
    assert ours["nonzeros"] <= ours["parameters"]
    # What is saved is what is held, but for headers and, in memory, the position table of the rotary embedding.
    assert ours["bytes_in_memory"] == pytest.approx(ours["bytes_on_disk"], rel=0.15)


def test_speed_reads_time_and_rate_off_the_same_clock(tiny_llama):
    from llmq.measure import interleave

    task = plugin.build({"speed": {"prompt_tokens": 8, "new_tokens": 4, "rounds": 3}}, "tasks")
    with base_of(tiny_llama).open("cpu") as loaded:
        clocks = list(task.clocks(loaded))
        cache_length = clocks[1].run.args[2].get_seq_length()
        taken = {m.metric: m for m in interleave({"0-base": clocks}, "cpu")["0-base"]}
        assert clocks[1].run.args[2].get_seq_length() == cache_length, "decoding must cut its cache back"
    first, rate = taken["time_to_first_token"].value, taken["prefill_tokens_per_second"].value
    assert first * rate / 1000 == pytest.approx(8, rel=1e-6)
    assert taken["decode_tokens_per_second"].n == 3


def test_generate_shows_what_the_model_writes(tiny_llama, tiny_jsonl):
    task = plugin.build({"generate": {"data": str(tiny_jsonl), "examples": 2, "max_new_tokens": 4}}, "tasks")
    with base_of(tiny_llama).open("cpu") as loaded:
        *exhibits, share = task.score(loaded)
    assert len(exhibits) == 2
    assert all(e.input and e.reference for e in exhibits)
    assert share.n == 2


def test_generate_is_greedy_whatever_the_settings_of_the_model(tiny_llama, tiny_jsonl):
    """Its convention says so; Qwen's own settings penalize repetition, and older models ask for beams."""
    task = plugin.build({"generate": {"data": str(tiny_jsonl), "examples": 3, "max_new_tokens": 12}}, "tasks")
    with base_of(tiny_llama).open("cpu") as loaded:
        plain = [exhibit.output for exhibit in list(task.score(loaded))[:-1]]
        steering = {"repetition_penalty": 5.0, "num_beams": 4, "no_repeat_ngram_size": 1, "guidance_scale": 3.0}
        for name, value in {**steering, "exponential_decay_length_penalty": (1, 2.0)}.items():
            setattr(loaded.module.generation_config, name, value)
        steered = [exhibit.output for exhibit in list(task.score(loaded))[:-1]]
    assert steered == plain


@pytest.mark.parametrize(
    ("name", "value"),
    [("num_beams", 4), ("guidance_scale", 3.0), ("encoder_repetition_penalty", 5.0), ("forced_eos_token_id", 2)],
)
def test_lm_eval_s_texts_are_written_as_the_settings_of_the_model_say(tiny_llama, name, value):
    """As lm-eval's own class writes them, by `generate`: many texts at once knew neither beams nor guidance."""
    from llmq.text import decoding

    with base_of(tiny_llama, "float32").open("cpu") as loaded:
        module, tokenizer = loaded.module, loaded.processor
        ids = torch.tensor([tokenizer("What is 3 plus 4? ").input_ids])
        plain = decoding.generate(module, tokenizer, [decoding.Job(tuple(ids[0].tolist()), (), 12)], "cpu")
        setattr(module.generation_config, name, value)
        made = decoding.generate(module, tokenizer, [decoding.Job(tuple(ids[0].tolist()), (), 12)], "cpu")
        stock = module.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, do_sample=False)
    assert made == [tokenizer.decode(stock[0, ids.shape[1] :], skip_special_tokens=True)]
    assert made != plain


@pytest.mark.slow
def test_lm_eval_is_that_of_the_harness_command_line(tiny_llama, tmp_path):
    from llmq.files import bundled

    ours = measured("lm_eval", base_of(tiny_llama), tasks=["pydoc_continuation"], limit=12, batch_size=4)
    command = [
        sys.executable,
        "-m",
        "lm_eval",
        "run",
        "--model",
        "hf",
        "--model_args",
        f"pretrained={tiny_llama},dtype=bfloat16",
        "--tasks",
        "pydoc_continuation",
        "--device",
        "cpu",
        "--include_path",
        str(bundled("evals") / "lm_eval"),
        "--limit",
        "12",
        "--batch_size",
        "4",
        "--output_path",
        str(tmp_path / "out"),
    ]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    (file,) = (tmp_path / "out").rglob("results_*.json")
    theirs = json.loads(file.read_text())["results"]["pydoc_continuation"]
    for metric in ("acc", "acc_norm"):
        assert ours[metric].value == theirs[f"{metric},none"]
        assert ours[metric].stderr == pytest.approx(theirs[f"{metric}_stderr,none"], abs=1e-12)
        assert ours[metric].n == 12


@pytest.mark.parametrize(
    "name", ["hellaswag", pytest.param("mmlu", marks=pytest.mark.slow), "gpqa", "pydoc_continuation"]
)
def test_tasks_of_the_harness_are_known_without_importing_it(name):
    plugin.build({"lm_eval": {"tasks": [name]}}, "tasks").check()


def test_an_unknown_lm_eval_task_is_named_before_anything_is_loaded():
    from llmq.errors import UserError

    with pytest.raises(UserError, match=r"'hellaswog'; did you mean 'hellaswag'"):
        plugin.build({"lm_eval": {"tasks": ["hellaswog"]}}, "tasks").check()
