"""Whatever is wrong with a quantization or a pruning: one line that quotes it, exit code 2, and nothing written."""

from collections.abc import Callable
from pathlib import Path

import pytest
from helpers import apply, base_of, reshaped
from test_bad_input import Bad, Files, assert_one_line, listing, recipe, write

CALIBRATED = ("quantize.gptq", "prune.wanda", "prune.sparsegpt", "prune.alps", "prune.layers")
FLOAT = (*CALIBRATED, "quantize.rtn", "prune.magnitude")
NEEDED = {"prune.layers": "drop: 1"}
"""What a step cannot do without."""


def one(name: str, word: str, settings: str, *says: str, files: Files | None = None) -> list[Bad]:
    """A recipe whose only step is set wrong."""
    return recipe(f"{word}-{name}", f"steps:\n- {word}: {{{settings}}}\n", "r.yaml:4", *says, files=files)


def after(first: str, word: str, *says: str) -> list[Bad]:
    """A recipe whose second step cannot stand on its first."""
    steps = f"steps:\n- {first}\n- {word}: {{{NEEDED.get(word, '')}}}\n"
    return recipe(f"{word}-after-{first.partition(':')[0]}", steps, "r.yaml:5", f"'{word}'", *says)


# One step of each kind; the others take these settings from the same class.
GRID, SPARSE, DAMPED = "quantize.gptq", "prune.wanda", "prune.sparsegpt"
SETTINGS = [
    *one("bits-5", GRID, "bits: 5", "bits: 5", "2, 3, 4 or 8"),
    *one("group-48", GRID, "group_size: 48", "group_size: 48", "32, 64, 128 or -1"),
    *one("sparsity-99", SPARSE, "sparsity: 0.99", "sparsity: 0.99", "less than or equal to 0.95"),
    *one("sparsity-below-0", SPARSE, "sparsity: -0.1", "sparsity: -0.1", "greater than or equal to 0"),
    *one("pattern-2-3", SPARSE, "pattern: '2:3'", "'2:3'", "m is one of 2, 4, 8, 16, 32"),
    *one("pattern-5-4", SPARSE, "pattern: '5:4'", "'5:4'", "n less than m"),
    *one("pattern-0-4", SPARSE, "pattern: '0:4'", "'0:4'", "n less than m"),
    *one("pattern-foo", SPARSE, "pattern: foo", "'foo'", "'unstructured' nor n:m", "'2:4'"),
    *one("both", SPARSE, "sparsity: 0.3, pattern: '2:4'", "sparsity 0.3", "pattern '2:4', 0.5"),
    *one("both-in-a-layer", SPARSE, "pattern: '2:4', modules: {up: {sparsity: 0.3}}", "sparsity 0.3", "'2:4', 0.5"),
    *(bad for word in (GRID, DAMPED) for bad in one("damp-0", word, "damp_percent: 0", "damp_percent: 0", "than 0")),
    *(bad for word in (GRID, DAMPED) for bad in one("damp-1.5", word, "damp_percent: 1.5", "damp_percent: 1.5", "1")),
    *one("samples-0", GRID, "samples: 0", "samples: 0", "greater than 0"),
    *one("length-0", GRID, "length: 0", "length: 0", "greater than 0"),
    *one("data-missing", GRID, "data: no.jsonl", "there is no file 'no.jsonl'"),
    *one("data-empty", GRID, "data: d.jsonl", "d.jsonl", "no rows", files={"d.jsonl": ""}),
    *one("text-empty", GRID, "data: d.txt", "d.txt", "the file is empty", files={"d.txt": "\n"}),
    *one("drop-0", "prune.layers", "drop: 0", "drop: 0", "greater than 0"),
    *one("drop-what", "prune.layers", "", "'drop' of prune.layers is needed"),
    *one("no-expression", GRID, "modules: {'down_proj(': skip}", "'down_proj('", "no regular expression"),
    *one("no-expression", SPARSE, "modules: {'*proj': skip}", "'*proj'", "no regular expression"),
    *one("key-of-a-layer", GRID, "modules: {down_proj: {bitz: 8}}", "'bitz'", "down_proj", "did you mean 'bits'?"),
    *one("key-of-a-layer", SPARSE, "modules: {up: {sparsty: 0.3}}", "'sparsty'", "up", "did you mean 'sparsity'?"),
    *one("value-of-a-layer", GRID, "modules: {down_proj: {bits: 7}}", "down_proj", "7", "2, 3, 4 or 8"),
    *one("value-of-a-layer", SPARSE, "modules: {up: {sparsity: 1}}", "up", "1", "less than or equal to 0.95"),
    *one("word-of-a-layer", GRID, "modules: {down_proj: skp}", "down_proj", "'skp'", "'skip'"),
    *one("layers-in-a-list", GRID, "modules: [down_proj]", "['down_proj']", "valid dictionary"),
]
ORDER = [
    *(bad for word in FLOAT for bad in after("quantize.bnb", word, "needs float weights", "put it first")),
    *(bad for word in FLOAT for bad in after("adapt.lora: {data: pydoc}", word, "put adapt.merge before it")),
    *after("quantize.gptq", "quantize.rtn", "needs float weights"),
    *after("quantize.rtn", "prune.wanda", "needs float weights"),
]


@pytest.mark.parametrize("bad", [*SETTINGS, *ORDER], ids=lambda bad: bad.name)
def test_wrong_settings_are_seen_in_the_recipe(bad, llmq, tmp_path):
    write(bad.files, tmp_path)
    before = listing(tmp_path)
    assert_one_line(bad, *llmq(*bad.argv))
    assert listing(tmp_path) == before


Models = Callable[[str], Path]
BROKEN = "model.layers.1.mlp.up_proj"


def opt(like: Path, folder: Path) -> None:
    """A model that knows 64 positions and no more."""
    from transformers import AutoTokenizer, OPTConfig, OPTForCausalLM

    shape = {"hidden_size": 64, "word_embed_proj_dim": 64, "ffn_dim": 128, "num_hidden_layers": 2}
    config = OPTConfig(vocab_size=403, max_position_embeddings=64, num_attention_heads=4, **shape)
    OPTForCausalLM(config).save_pretrained(folder)
    AutoTokenizer.from_pretrained(like).save_pretrained(folder)


def broken(like: Path, folder: Path) -> None:
    """The tiny Llama with one weight that is not a number."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(reshaped(like, folder))
    model.get_submodule(BROKEN).weight.data[3, 5] = float("nan")
    model.save_pretrained(folder)


MAKERS: dict[str, Callable[[Path, Path], object]] = {
    "of 576": lambda like, to: reshaped(like, to, hidden_size=576, num_attention_heads=9, num_key_value_heads=3),
    "of 50": lambda like, to: reshaped(like, to, intermediate_size=50),
    "of 27": lambda like, to: reshaped(like, to, intermediate_size=27),
    "packed": lambda like, to: apply("quantize.rtn", base_of(like), to, group_size=32),
    "opt": opt,
    "broken": broken,
}


@pytest.fixture(scope="module")
def models(tiny_llama, tmp_path_factory) -> Models:
    """Tiny models, each of them odd in one way, made when they are first asked for."""
    root = tmp_path_factory.mktemp("odd-models")

    def model(name: str) -> Path:
        if not (root / name).exists():
            MAKERS[name](tiny_llama, root / name)
        return root / name

    return model


MISSPELT = ("'down_prj'", "did you mean 'down_proj'?")
SHOWN_BY_THE_BASE = {
    "576 by 128": ("of 576", GRID, "group_size: 128", "q_proj", "576 is not divisible by 128; 64 and 32 are"),
    "50 by 32": ("of 50", GRID, "group_size: 32, modules: {gate_proj: skip, up_proj: skip}",
                 "model.layers.0.mlp.down_proj", "50 is not divisible by 32; -1 takes the whole row"),
    "50 outputs": ("of 50", GRID, "group_size: 32", "bits 4 of model.layers.0.mlp.gate_proj", "50 × 4", ": skip}"),
    "2:4 of 50": ("of 50", SPARSE, "pattern: '2:4'", "model.layers.0.mlp.down_proj", "50 is not divisible by 4", " 2"),
    "1:2 of 27": ("of 27", SPARSE, "pattern: '1:2'", "27 is not divisible by 2", "modules: {", ": skip}"),
    "grid of no such layer": ("of 50", GRID, "modules: {down_prj: {bits: 8}}", *MISSPELT),
    "sparsity of no such layer": ("of 50", SPARSE, "modules: {down_prj: skip}", *MISSPELT),
    "no layer to quantize": ("of 50", GRID, "modules: {layers: skip}", "skips every layer", "leave one"),
    "no layer to prune": ("of 50", SPARSE, "length: 32, modules: {layers: skip}", "skips every layer", "leave one"),
    "drop all": ("of 50", "prune.layers", "drop: 2", "drop 2", "2 blocks", "drop 1 at most"),
    "drop more": ("of 50", "prune.layers", "drop: 7", "drop 7", "2 blocks", "drop 1 at most"),
    "too long": ("opt", GRID, "group_size: 32, length: 65", "length", "65", "64 positions"),
    "too long to drop": ("opt", "prune.layers", "drop: 1, length: 65", "length", "65", "64 positions"),
    **{f"{w} packed": ("packed", w, NEEDED.get(w, ""), "needs float weights", "name a float model") for w in FLOAT},
}  # fmt: skip


@pytest.fixture
def refusal(llmq, models, tmp_path) -> Callable[[str, str, str], str]:
    """Runs a recipe of one step on an odd model; the last line of what it says."""

    def run(model: str, word: str, settings: str) -> str:
        text = f"model: {{causal_lm: {{weights: {models(model)}}}}}\nsteps:\n- {word}: {{{settings}}}\n"
        write({"r.yaml": text}, tmp_path)
        code, out, err = llmq("run", "r.yaml")
        *before, line = err.splitlines()
        assert code == 2, err
        assert out == ""
        assert line.startswith("llmq: ")
        assert "Traceback" not in err
        assert not any(said.startswith("llmq: ") for said in before)
        return line

    return run


@pytest.mark.parametrize("name", SHOWN_BY_THE_BASE)
def test_what_the_base_shows_to_be_wrong_is_seen_before_anything_is_written(name, refusal, tmp_path):
    model, word, settings, *says = SHOWN_BY_THE_BASE[name]
    line = refusal(model, word, settings)
    for fragment in (word, *says):
        assert fragment in line
    assert list(listing(tmp_path)) == ["r.yaml"]


SHORT = "length: 32, data: d.txt"
UNHEALTHY = {
    "quantize.gptq": f"group_size: 32, {SHORT}",
    "quantize.rtn": "group_size: 32",
    "prune.wanda": SHORT,
    "prune.sparsegpt": SHORT,
    "prune.alps": SHORT,
    "prune.layers": f"drop: 1, {SHORT}",
}


@pytest.mark.parametrize("word", UNHEALTHY)
def test_weights_that_are_no_numbers_are_named(word, refusal, tmp_path):
    write({"d.txt": "The quick brown fox jumps over the lazy dog. " * 20}, tmp_path)
    line = refusal("broken", word, UNHEALTHY[word])
    assert ("model.layers.1" if word == "prune.layers" else BROKEN) in line
    assert "not finite" in line
    assert not list(tmp_path.glob(f"runs/*/1-{word}"))


def test_data_without_a_calibration_token_is_refused(refusal, tmp_path):
    write({"d.txt": "a"}, tmp_path)
    data = "data: {file: {path: d.txt, held_out: 0.9}}"
    assert "whose training part is empty" in refusal("of 50", "prune.wanda", data)
