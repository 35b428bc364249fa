"""What llmq asks by lm-eval: against lm-eval's own class, whatever the batch, the weights or the family."""

import json
import math
import time

import pytest
import torch
from helpers import CPU, apply, base_of, beginning_with_a_mark

from llmq import pipeline, plugin, trust
from llmq.errors import LlmqError, UserError
from llmq.harness.data import built, hashes
from llmq.harness.model import HarnessModel
from llmq.harness.names import Asked, defined
from llmq.text import decoding, prefix_attention, scoring
from llmq.text.scoring import Request
from llmq.text.tokenizer import beginning
from llmq.types import Attachment, Measurement

TEXTS = (
    "The statement",
    "def f(x):\n",
    "If a class",
    "A name in a block that is",
    "x",
    "The while statement is used for",
)
STAGES = {
    "bfloat16": lambda folder, tmp: base_of(folder),
    "float32": lambda folder, tmp: base_of(folder, "float32"),
    "nf4": lambda folder, tmp: apply("quantize.bnb", base_of(folder), tmp / "nf4", bits=4),
    "int8": lambda folder, tmp: apply("quantize.bnb", base_of(folder), tmp / "int8", bits=8),
    "packed": lambda folder, tmp: apply("quantize.rtn", base_of(folder), tmp / "rtn", bits=4, group_size=32),
}
KINDS = [pytest.param(k, marks=pytest.mark.slow) if k in ("nf4", "int8", "packed") else k for k in STAGES]


def requests(tokenizer, count=24):
    """Questions of several answers, some of one token, some that share more than their context, one very long."""
    made = []
    for i in range(count):
        context = tokenizer.encode(TEXTS[i % len(TEXTS)] * (1 + i % 4))
        for answer in (" is executed", " is not executed", " a", " b", f" number {i}"):
            ids = tokenizer.encode(answer)
            made.append(Request((*context, *ids), len(ids)))
    long = tokenizer.encode(TEXTS[-1] * 40)[:300]
    return [*made, Request(tuple(long), 7)]


def alone(module, request):
    """The log-probability of a request by one plain forward."""
    logits = module(input_ids=torch.tensor([request.tokens[:-1]])).logits[0, -request.scored :].float().log_softmax(-1)
    return float(logits.gather(1, torch.tensor(request.tokens[-request.scored :])[:, None]).sum())


@pytest.mark.parametrize("kind", KINDS)
def test_no_score_depends_on_the_batch_or_on_what_is_shared(tiny_llama, tmp_path, kind):
    with STAGES[kind](tiny_llama, tmp_path).open("cpu") as loaded, torch.inference_mode():
        asked = requests(loaded.processor)
        together = scoring.score(loaded.module, asked, "cpu")
        for size in (1, 3, 16):
            batched = scoring.score(loaded.module, asked, "cpu", size)
            assert max(abs(a - b) for (a, _), (b, _) in zip(together, batched, strict=True)) < 1e-4
            assert [greedy for _, greedy in together] == [greedy for _, greedy in batched]
        single = [scoring.score(loaded.module, [r], "cpu")[0][0] for r in asked[::7]]
        assert max(abs(a - b) for a, (b, _) in zip(single, together[::7], strict=True)) < 1e-4
        plain = [alone(loaded.module, r) for r in asked]
    tolerance = 1e-4 if kind == "float32" else 0.3  # bfloat16 attention rounds in another place
    assert max(abs(a - b) for a, (b, _) in zip(plain, together, strict=True)) < tolerance


def test_an_adapter_is_scored_with_its_weights(tiny_llama, tiny_jsonl, tmp_path):
    settings = {"r": 4, "max_length": 64, "max_steps": 3, "learning_rate": 0.05, "per_device_train_batch_size": 2}
    stage = apply("adapt.lora", base_of(tiny_llama, "float32"), tmp_path / "a", data=str(tiny_jsonl), **settings)
    with stage.open("cpu") as loaded, torch.inference_mode():
        assert not prefix_attention.why_not(loaded.module, "cpu")
        asked = requests(loaded.processor, 6)
        ours = scoring.score(loaded.module, asked, "cpu")
        plain = [alone(loaded.module, r) for r in asked]
        with loaded.module.disable_adapter():
            without = [alone(loaded.module, r) for r in asked]
    assert max(abs(a - b) for a, (b, _) in zip(plain, ours, strict=True)) < 1e-4
    assert max(abs(a - b) for a, b in zip(plain, without, strict=True)) > 0.01


@pytest.mark.parametrize(
    ("family", "settings", "shares"),
    [
        ("GPT2", {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 512}, True),
        (
            "GPTNeoX",
            {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64},
            True,
        ),
        (
            "Qwen3",
            {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2},
            True,
        ),
        ("Bloom", {"hidden_size": 32, "n_layer": 2, "n_head": 4}, False),
        (
            "Mistral",
            {
                "hidden_size": 32,
                "num_hidden_layers": 2,
                "num_attention_heads": 4,
                "num_key_value_heads": 2,
                "sliding_window": 8,
            },
            False,
        ),
    ],
)
def test_families_give_what_they_give_by_themselves(family, settings, shares):
    import transformers

    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(vocab_size=200, **settings)
    module = transformers.AutoModelForCausalLM.from_config(config).eval()
    assert bool(prefix_attention.why_not(module, "cpu")) != shares
    generator = torch.Generator().manual_seed(1)
    context = torch.randint(200, (20,), generator=generator).tolist()
    asked = [Request((*context, *torch.randint(200, (n,), generator=generator).tolist()), n) for n in (1, 1, 3, 9)]
    with torch.inference_mode():
        ours = scoring.score(module, asked, "cpu", 3)
        plain = [alone(module, r) for r in asked]
    assert [s for s, _ in ours] == pytest.approx(plain, abs=1e-4)


def test_questions_become_the_tokens_of_lm_evals_own_class(tiny_llama):
    from lm_eval.models.huggingface import HFLM

    texts = [
        ("", " x"),
        ("A name ", "is bound"),
        ("", "<|im_end|> z"),
        ("tail  ", " and more"),
        ("word", "s"),
        ("é", "è 東"),
    ]

    class Asking:
        def __init__(self, *args):
            self.args = args

    with base_of(tiny_llama, "float32").open("cpu") as loaded:
        theirs = HFLM(pretrained=loaded.module, tokenizer=loaded.processor, batch_size=2)
        ours = HarnessModel(loaded.module, loaded.processor, "cpu")
        pairs = [Asking(*pair) for pair in texts]
        for (a, greedy), (b, its) in zip(ours.loglikelihood(pairs), theirs.loglikelihood(pairs), strict=True):
            assert (a, greedy) == (pytest.approx(b, abs=1e-4), its)
        whole = [Asking("A whole text. " * n) for n in (1, 3, 200)]  # the last is longer than the model takes
        assert ours.loglikelihood_rolling(whole) == pytest.approx(theirs.loglikelihood_rolling(whole), rel=1e-5)
        until = {"until": ["\n", "e "], "max_gen_toks": 12, "do_sample": False}
        writing = [Asking(text, dict(until)) for text in TEXTS]
        alone_in_batch = [theirs.generate_until([w])[0] for w in writing]
        assert ours.generate_until(writing) == alone_in_batch


def test_no_context_ends_with_the_end_mark_of_the_tokenizer(tiny_llama):
    """With `add_eos_token` continuations were scored after an end mark, and lost their first token."""
    from tokenizers.processors import TemplateProcessing

    begins = beginning_with_a_mark(tiny_llama)
    ends = beginning_with_a_mark(tiny_llama)
    marks = [(name, ends.convert_tokens_to_ids(name)) for name in ("<|endoftext|>", "<|im_end|>")]
    ends.backend_tokenizer.post_processor = TemplateProcessing("<|endoftext|> $A <|im_end|>", None, marks)
    assert beginning(ends) == beginning(begins)
    plain, ended = (HarnessModel(None, tokenizer, "cpu") for tokenizer in (begins, ends))
    assert ended.tok_encode("one two") == plain.tok_encode("one two")
    assert ended._encode_pair("one", " two") == plain._encode_pair("one", " two")


@pytest.mark.parametrize("kind", ["bfloat16", "nf4", "packed"])
def test_no_text_depends_on_what_is_written_beside_it(tiny_llama, tmp_path, kind):
    with STAGES[kind](tiny_llama, tmp_path).open("cpu") as loaded:
        tokenizer = loaded.processor
        jobs = [decoding.Job(tuple(tokenizer.encode(t)), ("\n",), 4 + i) for i, t in enumerate(TEXTS)]
        written = [decoding.generate(loaded.module, tokenizer, jobs, "cpu", n) for n in (None, 1, 2, 5)]
    assert written[0] == written[1] == written[2] == written[3]


def test_a_sampled_text_is_the_same_again(tiny_llama):
    with base_of(tiny_llama).open("cpu") as loaded:
        job = decoding.Job((5, 6, 7), (), 8, {"do_sample": True, "temperature": 1.0})
        one, other = (decoding.generate(loaded.module, loaded.processor, [job, job], "cpu") for _ in range(2))
    assert one == other
    assert one[0] != one[1]  # what is asked several times is to be several samples


def test_stop_sequences_cut_a_text():
    assert decoding.cut("a b\n\nc Question: d", ("Question:", "\n\n", "")) == "a b"


def lm_eval(artifact, **settings):
    """The task's answers."""
    with artifact.open("cpu") as loaded:
        return list(plugin.build({"lm_eval": settings}, "tasks").score(loaded))


def test_asking_twice_finds_the_same_and_leaves_lm_evals_own_files(tiny_llama, tmp_path):
    settings = {"tasks": ["pydoc_continuation"], "limit": 6}
    first, second = (lm_eval(base_of(tiny_llama), batch_size=n, **settings) for n in (2, "auto"))
    figures = [[m for m in answers if isinstance(m, Measurement)] for answers in (first, second)]
    assert figures[0] == figures[1]
    assert figures[0][0].samples == figures[1][0].samples
    files = {a.file: a.text for a in first if isinstance(a, Attachment)}
    (results,) = (json.loads(text) for name, text in files.items() if name.startswith("lm_eval/results_"))
    (samples,) = (text for name, text in files.items() if name.startswith("lm_eval/samples_pydoc_continuation_"))
    assert results["results"]["pydoc_continuation"]["acc,none"] == figures[0][0].value
    assert len(samples.splitlines()) == 6
    assert {"configs", "versions", "n-shot", "task_hashes", "model_name"} <= results.keys()


@pytest.fixture
def copies(tmp_path):
    """Copies of two data sets: gsm8k as JSONL, ARC as parquet in a folder of its configuration."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    maths = tmp_path / "data/openai/gsm8k"
    maths.mkdir(parents=True)
    for split in ("train", "test"):
        rows = [{"question": f"What is {i} + 1?", "answer": f"It is.\n#### {i + 1}"} for i in range(8)]
        (maths / f"{split}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    science = tmp_path / "data/allenai/ai2_arc/ARC-Easy"
    science.mkdir(parents=True)
    choices = {"text": ["one", "two", "three"], "label": ["A", "B", "C"]}
    table = pa.Table.from_pylist([{"question": f"Which {i}?", "choices": choices, "answerKey": "B"} for i in range(5)])
    for split in ("train", "validation", "test"):
        pq.write_table(table, science / f"{split}-00000-of-00001.parquet")
    return tmp_path / "data"


@pytest.mark.slow
def test_tasks_read_local_copies_by_generation_and_by_choice(tiny_llama, copies):
    settings = {"tasks": ["gsm8k", "arc_easy"], "num_fewshot": 1, "limit": 2, "data_dir": str(copies)}
    found = {(m.task, m.metric): m for m in lm_eval(base_of(tiny_llama), **settings) if isinstance(m, Measurement)}
    assert {m for t, m in found if t == "gsm8k"} == {"exact_match (strict-match)", "exact_match (flexible-extract)"}
    assert found["arc_easy", "acc"].n == 2
    assert "task version 3.0" in found["gsm8k", "exact_match (strict-match)"].convention
    assert "1-shot" in found["arc_easy", "acc"].convention


def test_the_hash_of_a_task_is_that_of_its_rows_and_its_shots_are_kept_apart(copies):
    asked = Asked(("arc_easy",), None, copies)
    before = hashes(asked)
    assert list(before) == ["arc_easy"]
    built.cache_clear()
    hashes.cache_clear()
    assert hashes(asked) == before
    import pyarrow.parquet as pq

    file = copies / "allenai/ai2_arc/ARC-Easy/test-00000-of-00001.parquet"
    pq.write_table(pq.read_table(file).slice(1), file)
    built.cache_clear()
    hashes.cache_clear()
    assert hashes(asked) != before
    assert built(Asked(("arc_easy",), None, copies, 0)) is not built(Asked(("arc_easy",), None, copies, 5))


def test_data_that_is_nowhere_is_named_before_a_model_is_opened(tiny_llama, tmp_path, monkeypatch):
    artifact = base_of(tiny_llama)
    monkeypatch.setattr(type(artifact.model), "open", lambda *a: pytest.fail("opened"))
    task = plugin.build({"lm_eval": {"tasks": ["winogrande"], "data_dir": str(tmp_path)}}, "tasks")
    with pytest.raises(LlmqError, match=r"winogrande: the data set 'allenai/winogrande \(winogrande_xl\)'") as caught:
        pipeline.evaluate({"0-base": artifact}, [plugin.build("size", "tasks"), task], tmp_path / "out", CPU, {})
    assert "there is no folder" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


def broken(copies, change):
    change(copies / "openai/gsm8k")
    return {"tasks": ["gsm8k"], "data_dir": str(copies)}


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda f: [file.unlink() for file in f.iterdir()], "holds no .parquet, .json or .jsonl"),
        (lambda f: (f / "test.jsonl").unlink(), "lacks an entry of the task: 'test'"),
        (lambda f: (f / "test.jsonl").write_text("{"), "cannot be read"),
        (lambda f: (f / "test.parquet").write_text("x"), "holds both parquet and JSON"),
        (lambda f: (f / "test.jsonl").rename(f / "test-00000-of-00002.jsonl"), "lacks test-00001-of-00002.jsonl"),
        (lambda f: (f / "gsm8k_test.jsonl").write_bytes((f / "test.jsonl").read_bytes()), "both hold 'test'; keep one"),
        (lambda f: f.rename(f.with_name("x")).rename(f.mkdir() or f / "socratic"), "no folder .*gsm8k/main'"),
    ],
)
def test_a_broken_copy_is_refused_in_one_line(copies, change, says):
    task = plugin.build({"lm_eval": broken(copies, change)}, "tasks")
    with pytest.raises(UserError, match=says) as caught:
        task.depends()
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"tasks": ["arc_easy"], "versions": {"arc_easy": 2.0}}, "'arc_easy' is pinned at version 2.0, and .* has 1.0"),
        ({"tasks": ["arc_easy"], "versions": {"piqa": 1.0}}, "'piqa' is none of the tasks"),
        ({"tasks": ["humaneval"]}, "'humaneval' runs code that the model writes; allow it with allow_code"),
        ({"tasks": ["mbpp"]}, "'mbpp' runs code"),
        ({"tasks": ["arc_easy"], "data_dir": "/no/such/folder"}, "data_dir '/no/such/folder' is no folder"),
    ],
)
def test_what_can_be_seen_to_be_wrong_is_said_before_anything_runs(settings, says):
    with pytest.raises(UserError, match=says):
        plugin.build({"lm_eval": settings}, "tasks").check()


def test_code_that_a_model_writes_runs_only_where_recipe_and_command_say_so():
    task = plugin.build({"lm_eval": {"tasks": ["humaneval"], "allow_code": True}}, "tasks")
    with pytest.raises(UserError, match=r"lets humaneval run code .* say so on this command: --allow-code"):
        task.check()
    trust.given(written_code=True)
    task.check()


@pytest.mark.parametrize("suite", ["text-full", "reasoning", "open-llm"])
def test_suites_pin_versions_that_are_installed(suite):
    from llmq.recipe import suite_tasks
    from llmq.source import Source

    tasks = suite_tasks(suite, Source("test", {}), "causal-lm")
    asked = [t for t in tasks if t.word == "tasks.lm_eval"]
    assert asked
    assert all(set(t.versions) == set(t.tasks) for t in asked)


def test_names_tags_and_groups_are_found_without_the_harness():
    assert [d.name for d in defined("arc_challenge", None)] == ["arc_challenge"]
    assert {d.name for d in Asked(("ai2_arc",)).leaves()} == {"arc_easy", "arc_challenge"}
    subjects = list(Asked(("mmlu",)).leaves())
    assert len(subjects) == 57
    assert {d.says["dataset_path"] for d in subjects} == {"cais/mmlu"}
    assert defined("no_such_task", None) == ()


def test_groups_that_are_defined_within_a_group_are_resolved():
    """tmlu lists mappings such as `{group: tmlu_stem, task: [tmlu_stem_tasks], …}`, whose members carry a tag."""
    asked = Asked(("tmlu",))
    assert {"tmlu", "tmlu_stem"} <= {d.name for d in asked.definitions() if d.is_group}
    assert len({d.name for d in asked.leaves()}) > 25
    assert all(d.data for d in asked.leaves())


BOMB = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{b}: &{b} [{', '.join(['*' + a] * 9)}]\n" for a, b in zip("abcdefgh", "bcdefghi", strict=True)
)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("task: x\n" + BOMB, "x.yaml:2: more than 20000 values"),
        ("task: x\na: " + "[" * 5000, "x.yaml:2: not YAML: exceeded maximum nesting depth"),
        ("task: x\nmetric_list: &a [*a]", "x.yaml:2: nested deeper than 32; does an alias"),
        ("task: x\ninclude: x.yaml", "x.yaml' is included twice"),
        ("group: x\ntask: [x]", "the group 'x' holds itself"),
    ],
)
def test_a_task_file_without_end_is_refused_at_once(tmp_path, text, says):
    (tmp_path / "x.yaml").write_text(text)
    began = time.perf_counter()
    with pytest.raises(UserError, match=says):
        plugin.build({"lm_eval": {"tasks": ["x"], "include_path": str(tmp_path)}}, "tasks").check()
    assert time.perf_counter() - began < 60


def test_log_probabilities_are_float32_ones_of_the_models_own_logits():
    logits = torch.tensor([[1.0, 2.0, 3.0], [0.5, 0.5, 4.0]]).bfloat16()
    ((total, greedy),) = scoring._read(logits, [(2, 0)], [(0, 1)])
    expected = 3 - math.log(sum(map(math.exp, (1, 2, 3)))) + 0.5 - math.log(sum(map(math.exp, (0.5, 0.5, 4))))
    assert total == pytest.approx(expected, abs=1e-6)
    assert not greedy
