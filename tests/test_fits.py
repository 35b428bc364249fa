"""What a model, its tokenizer and what is asked of them do not agree on is one line before anything runs."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import CPU, apply, base_of, some_ids
from tiny_text_models import ARCHITECTURES, SHAPE
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizer

from llmq import pipeline, plugin, reading
from llmq.artifact import Artifact
from llmq.errors import UserError
from llmq.text.tokenizer import check_fits, load_tokenizer, positions
from llmq.text.tokens import encode_all
from llmq.text.windows import windows_of
from llmq.types import Needs

# Of each kind of positions: how many tokens are taken where the configuration says 32, and whether more of them end in
# an error of torch. Where they do not, and are refused still, the positions are rotary.
KINDS: dict[str, tuple[dict[str, Any], int | None, bool]] = {
    "llama": ({}, 32, False),
    "gpt_neox": ({}, 32, False),
    "falcon": ({}, 32, False),
    "gpt2": ({"n_positions": 32}, 32, True),
    "opt": ({}, 32, True),
    "gptj": ({"n_positions": 32}, 32, True),
    "mpt": ({"max_seq_len": 32}, 32, True),  # ALiBi, out of a table that transformers makes once
    "roberta": ({"is_decoder": True, "pad_token_id": 1}, 30, True),  # RoBERTa begins after its padding token
    "bloom": ({}, None, False),
    "falcon with ALiBi": ({"alibi": True}, None, False),
    "mamba": ({}, None, False),
}
STATES_NONE = ("bloom", "mamba", "mpt")


@pytest.mark.parametrize("kind", KINDS)
def test_positions_are_those_that_the_network_has(kind):
    changes, limit, ends = KINDS[kind]
    name = kind.partition(" ")[0]
    shape = {**SHAPE, **ARCHITECTURES.get(name, {}), "max_position_embeddings": 32, **changes}
    for key in ("max_position_embeddings",) if name in STATES_NONE else ():
        del shape[key]
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(name, vocab_size=300, **shape)).eval()
    assert positions(model) == limit
    ids = some_ids(1, 1 + (limit or 40))
    with torch.inference_mode():
        model(input_ids=ids[:, :-1], use_cache=False)
        if ends:
            with pytest.raises((IndexError, RuntimeError)):
                model(input_ids=ids, use_cache=False)
        else:
            model(input_ids=ids, use_cache=False)


TOO_LONG: list[tuple[str, dict[str, Any], str]] = [
    ("perplexity", {"window": 513}, "window 513"),
    ("divergence", {"window": 513}, "window 513"),
    ("generate", {"prompt_tokens": 500, "max_new_tokens": 13}, "prompt_tokens + max_new_tokens 513"),
    ("speed", {"prompt_tokens": 500, "new_tokens": 13}, "prompt_tokens + new_tokens 513"),
    ("quantize.gptq", {"length": 513, "group_size": 32}, "length 513"),
    ("prune.wanda", {"length": 513, "sparsity": 0.5}, "length 513"),
    ("prune.sparsegpt", {"length": 513, "sparsity": 0.5}, "length 513"),
    ("prune.layers", {"length": 513, "drop": 1}, "length 513"),
    ("adapt.lora", {"max_length": 513, "data": "pydoc"}, "max_length 513"),
    ("adapt.lora", {"training_arguments": {"max_length": 513}, "data": "pydoc"}, "max_length 513"),
    ("adapt.merge", {"window": 513}, "window 513"),
]


def check(base: Artifact, word: str, settings: dict[str, Any] | None = None) -> None:
    """What a run does before its first step."""
    part: Any = plugin.build({word if "." in word else f"tasks.{word}": settings or {}})
    reading.check_base("job", *(([part], []) if "." in word else ([], [part])), base)


@pytest.mark.parametrize(("word", "settings", "says"), TOO_LONG)
def test_more_tokens_than_positions_are_refused_by_the_name_of_the_setting(tiny_llama, word, settings, says):
    with pytest.raises(UserError, match=rf"^job: {word}: {re.escape(says)}: the model has 512 positions; 512 at most$"):
        check(base_of(tiny_llama), word, settings)


def test_as_many_tokens_as_positions_are_taken(tiny_llama):
    for word, settings in (("speed", {"prompt_tokens": 500, "new_tokens": 12}), ("prune.layers", {"drop": 1})):
        check(base_of(tiny_llama), word, settings)


def test_lm_eval_cuts_where_mpt_ends(tiny_llama, tmp_path):
    """lm-eval knows no name of MPT's, and takes 2,048 tokens or what the tokenizer says."""
    from tiny_text_models import build

    from llmq.harness.model import HarnessModel

    with base_of(build("mpt", tmp_path / "mpt", tiny_llama)).open("cpu") as loaded:
        assert HarnessModel(loaded.module, loaded.processor, "cpu").max_length == 256


# Tokens without embeddings -------------------------------------------------------------------------------------------

IMAGE = "<image_soft_token>"


def with_token(folder: Path, target: Path, **how: Any) -> Path:
    """A copy of a folder whose tokenizer has a token more than the model has embeddings."""
    shutil.copytree(folder, target)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_special_tokens(how) if how else tokenizer.add_tokens(["<new-word>"])
    tokenizer.save_pretrained(target)
    return target


BEYOND: dict[str, dict[str, Any]] = {
    "a word": {},
    "padding": {"pad_token": "[PAD]"},  # added without a word to the model, as many recipes for Llama 2 did
    "an end": {"eos_token": "</s>"},
}


@pytest.mark.parametrize("kind", BEYOND)
def test_a_token_without_embedding_is_refused_by_name(tiny_llama, tmp_path, kind):
    name = next(iter(BEYOND[kind].values()), "<new-word>")
    base = base_of(with_token(tiny_llama, tmp_path / "m", **BEYOND[kind]))
    for word, settings in (("quantize.rtn", {"group_size": 32}), ("quantize.bnb", {}), ("perplexity", {})):
        with pytest.raises(UserError, match=re.escape(f"none for {name!r}; resize the embeddings")):
            check(base, word, settings)
    with pytest.raises(UserError, match=re.escape(repr(name))), base.open("cpu"):
        pass


def test_a_token_that_the_chat_template_writes_needs_an_embedding(tiny_llama, tmp_path):
    folder = with_token(tiny_llama, tmp_path / "m", additional_special_tokens=["<|turn|>"])
    check(base_of(folder), "speed")
    (folder / "chat_template.jinja").write_text("{% for m in messages %}<|turn|>{{ m.content }}{% endfor %}")
    with pytest.raises(UserError, match=re.escape("none for '<|turn|>'")):
        check(base_of(folder), "speed")


def test_a_placeholder_that_no_text_makes_is_let_pass_until_a_text_names_it(tiny_llama, tmp_path):
    """Gemma 3's tokenizer has `<image_soft_token>`, number 262,144, and its language models as many embeddings."""
    base = base_of(with_token(tiny_llama, tmp_path / "m", additional_special_tokens=[IMAGE]))
    (tmp_path / "good.txt").write_text("One text.\n\n" * 40)
    (tmp_path / "bad.txt").write_text(f"One text {IMAGE}.\n\n" * 40)
    task: Any = {
        name: plugin.build({"tasks.perplexity": {"data": str(tmp_path / f"{name}.txt"), "window": 32, "part": "all"}})
        for name in ("good", "bad")
    }
    check(base, "quantize.rtn", {"group_size": 32})
    with base.open("cpu") as loaded:
        assert check_fits(loaded.module, loaded.processor) == {loaded.module.config.vocab_size: IMAGE}
        assert list(task["good"].score(loaded))
        with pytest.raises(UserError, match=f"the text holds the token '{IMAGE}', and the model has no embedding"):
            list(task["bad"].score(loaded))
    calibrated = {"samples": 2, "length": 32, "sparsity": 0.5}
    apply("prune.wanda", base, tmp_path / "w", data=str(tmp_path / "good.txt"), **calibrated)
    with pytest.raises(UserError, match=r"the text holds the token 40\d, and the model has no embedding"):
        apply("prune.wanda", base, tmp_path / "x", data=str(tmp_path / "bad.txt"), **calibrated)


# Ends of texts -------------------------------------------------------------------------------------------------------


def without_marks(folder: Path, target: Path, **kept: str) -> Path:
    """A copy of a folder whose tokenizer and model name no token that ends a text."""
    shutil.copytree(folder, target)
    for name in ("tokenizer_config.json", "config.json", "generation_config.json"):
        said = json.loads((target / name).read_text())
        said = {k: v for k, v in said.items() if k not in ("eos_token", "pad_token", "eos_token_id")}
        (target / name).write_text(json.dumps({**said, **(kept if name.startswith("tok") else {"eos_token_id": None})}))
    return target


PYDOC = {"tasks": ["pydoc_continuation"]}


def test_what_writes_or_trains_needs_a_token_that_ends_a_text(tiny_llama, tiny_jsonl, tmp_path):
    base = base_of(without_marks(tiny_llama, tmp_path / "m"))
    for word, settings in (("generate", {}), ("lm_eval", PYDOC), ("adapt.lora", {"data": str(tiny_jsonl)})):
        with pytest.raises(UserError, match=f"^job: {word}: the tokenizer of .* has no token that ends a text .*eos"):
            check(base, word, settings)
    for word in ("perplexity", "speed"):
        check(base, word)


def test_a_token_that_pads_is_enough(tiny_llama, tiny_jsonl, tmp_path):
    base = base_of(without_marks(tiny_llama, tmp_path / "m", pad_token="<|endoftext|>"))
    settings: dict[str, Any] = {"data": str(tiny_jsonl), "examples": 1, "max_new_tokens": 4}
    check(base, "generate", settings)
    task: Any = plugin.build({"tasks.generate": settings})
    with base.open("cpu") as loaded:
        assert list(task.score(loaded))[-1].value == 0  # nothing ends an answer


# Tokenizers and templates --------------------------------------------------------------------------------------------


class Slow(PreTrainedTokenizer):
    """A tokenizer in Python, a character a token."""

    @property
    def vocab_size(self) -> int:
        """Bytes."""
        return 256

    def get_vocab(self) -> dict[str, int]:
        """Each character."""
        return {chr(i): i for i in range(256)}

    def _tokenize(self, text: str, **_: Any) -> list[str]:
        return list(text)

    def _convert_token_to_id(self, token: str) -> int:
        return ord(token) % 256

    def _convert_id_to_token(self, index: int) -> str:
        return chr(index)


def test_a_slow_tokenizer_is_refused_where_places_are_needed(tiny_llama, tiny_jsonl, tmp_path, monkeypatch):
    says = r"\(Slow\) is a slow one, which does not say where its tokens stand in the text"
    with pytest.raises(UserError, match=says):
        windows_of("Some text.", Slow(), 8)
    with pytest.raises(UserError, match=says):
        encode_all([{"text": "Some text."}], Slow(), 8)
    monkeypatch.setattr("llmq.text.tokenizer.load_tokenizer", lambda *_: Slow(eos_token="a"))
    base = base_of(tiny_llama)
    for word, data in (("perplexity", "data"), ("generate", "data"), ("divergence", "text")):
        with pytest.raises(UserError, match=f"job: {word}: .*{says}"):
            check(base, word, {data: str(tiny_jsonl)})
    check(base, "lm_eval", PYDOC)
    (tmp_path / "text.txt").write_text("Some text.\n\n" * 40)
    data = str(tmp_path / "text.txt")
    apply("prune.wanda", base, tmp_path / "w", data=data, samples=2, length=32, sparsity=0.5)


TEMPLATES = {
    "{{ raise_exception('no, thank you') }}": "refuses the conversation that begins 'Hello!': no, thank you",
    "{{ messages[0].content.missing.deeper }}": "refuses the conversation that begins 'Hello!'",
    "{% for m in messages %}": "refuses the conversation that begins 'Hello!'",
    "": "apply_chat_template: the tokenizer of .* has none",
}


@pytest.mark.parametrize("template", TEMPLATES)
def test_a_template_that_raises_is_one_line_before_the_harness_asks(tiny_llama, tmp_path, template):
    from llmq.harness.model import HarnessModel

    shutil.copytree(tiny_llama, tmp_path / "m")
    file = tmp_path / "m" / "chat_template.jinja"
    file.write_text(template) if template else file.unlink()
    settings = {**PYDOC, "apply_chat_template": True}
    with pytest.raises(UserError, match=f"^job: lm_eval: .*{TEMPLATES[template]}") as said:
        check(base_of(tmp_path / "m"), "lm_eval", settings)
    assert "\n" not in str(said.value)
    tokenizer = load_tokenizer(tmp_path / "m")
    with pytest.raises(UserError, match="the chat template of this tokenizer refuses the conversation"):
        HarnessModel(None, tokenizer, "cpu").apply_chat_template([{"role": "user", "content": "Hello!"}])


# Names in errors -----------------------------------------------------------------------------------------------------


def test_an_error_names_its_word_once(tiny_llama, tiny_jsonl, tmp_path):
    base = base_of(tiny_llama)
    with pytest.raises(UserError, match=r"^job: adapt.lora: training_arguments: ") as said:
        check(base, "adapt.lora", {"data": str(tiny_jsonl), "training_arguments": {"max_steps": 0}})
    assert str(said.value).count("adapt.lora") == 1
    step: Any = plugin.build({"adapt.lora": {"data": str(tiny_jsonl), "target_modules": ["nothing"]}})
    with pytest.raises(UserError, match=r"^adapt.lora: target_modules \['nothing'\]: ") as said:
        pipeline.applied(step, base, tmp_path, CPU)
    assert str(said.value).count("adapt.lora") == 1


def test_no_word_names_itself_in_its_errors():
    """Who asks it does (`reading.asking`, and the report of a task that failed)."""
    own = re.compile(r'Error\(\s*f?"(\{self\.(name|word)\}|(adapt|prune|quantize|tasks)\.\w+): ')
    files = [
        file for folder in ("tasks", "adapt", "prune", "quantize") for file in Path(f"llmq/{folder}").rglob("*.py")
    ]
    assert len(files) > 30
    assert not [file.name for file in files if own.search(file.read_text())]


def test_needs_are_none_where_nobody_says_any():
    assert plugin.build("quantize.rtn").needs() == Needs()  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("word", "settings", "says"),
    [
        ("quantize.bnb", {"bits": 8, "double_quant": True}, "double_quant has no effect with bits: 8"),
        ("quantize.awq", {"damp_percent": 0.1}, "damp_percent has no effect without solver: gptq"),
        (
            "adapt.lora",
            {"data": "pydoc", "held_out_rows": 0, "eval_steps": 3},
            "eval_steps has no effect with held_out_",
        ),
        (
            "models.causal_lm",
            {"weights": "smollm2-135m", "revision": "v1"},
            "revision has no effect on weights that are",
        ),
        ("data.file", {"path": "a.txt", "limit": 5}, "limit has no effect on a .txt file, which is one text"),
    ],
)
def test_a_setting_that_nothing_reads_is_refused(word, settings, says, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.txt").write_text("one two three")
    with pytest.raises(UserError, match=says):
        plugin.build({word: settings}).check()


@pytest.mark.parametrize(
    ("task", "settings", "says"),
    [
        ("perplexity", {"stride": 8}, "stride has no effect on data with prompts"),
        ("perplexity", {"bos": True}, "bos has no effect on data with prompts"),
        ("speed", {"batch_size": 8}, "batch_size has no effect on a language model"),
    ],
)
def test_a_setting_of_a_task_that_nothing_reads_is_refused(task, settings, says, tiny_llama, tiny_jsonl):
    data = {"data": str(tiny_jsonl)} if task == "perplexity" else {}
    with pytest.raises(UserError, match=says):
        plugin.build({task: {**data, **settings}}, "tasks").check_base(base_of(tiny_llama))
