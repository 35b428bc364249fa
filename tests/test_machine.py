"""Whatever is not ours is one line and exit code 4, its traceback in the log; disk is looked for before a stage."""

import ast
import errno
import json
import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from helpers import CPU, exit_code

from llmq import errors, files, pipeline, plugin, recipe
from llmq.errors import LlmqError, UserError
from llmq.terminal import logged_to

ROOT = Path(__file__).parent.parent


def chained(outer, inner):
    try:
        raise outer from inner
    except type(outer) as error:
        return error


@pytest.mark.parametrize(
    ("error", "says"),
    [
        (OSError(errno.ENOSPC, "x", "/tmp/w"), "'/tmp/w': no space is left on the disk ("),
        (OSError(errno.EFBIG, "x"), "the file would be larger than the limit on files (ulimit -f)"),
        (OSError(errno.EROFS, "x", "/a"), "'/a': the file system is read-only"),
        (PermissionError(errno.EACCES, "x", "/a"), "'/a': permission denied"),
        (FileNotFoundError(errno.ENOENT, "x", "/a"), "'/a': it is not there, or its folder vanished"),
        (RuntimeError("Error while serializing: I/O error: x (os error 28)"), "no space is left on the disk"),
        (RuntimeError("PytorchStreamWriter failed writing file data/0"), "a file could not be written whole"),
        (MemoryError(), "not enough memory ("),
        (MemoryError("Unable to allocate 7.28 TiB for an array"), "not enough memory: 8.0 TB were asked for at once"),
        (RuntimeError("std::bad_alloc"), "not enough memory ("),
        (ImportError("libtorch_cpu.so: failed to map segment from shared object"), "not enough memory ("),
        (chained(ValueError("x"), OSError(errno.EDQUOT, "x", "/a")), "'/a': the disk quota is used up"),
        (chained(ValueError("x"), UserError("'y' is wrong")), "'y' is wrong"),
        (KeyError("x"), "unforeseen: KeyError: 'x'"),
    ],
)
def test_the_line_says_what_was_needed_where_that_can_be_known(error, says):
    assert says in errors.line_of(error)
    assert "\n" not in errors.line_of(error)


def test_the_allocator_of_torch_is_understood():
    with pytest.raises(RuntimeError) as raised:
        torch.empty(2**50, dtype=torch.uint8)
    assert "not enough memory: 1125.9 TB were asked for at once" in errors.line_of(raised.value)
    assert errors.is_of_machine(raised.value)


def test_what_is_wrong_in_the_input_is_no_fault_of_the_machine():
    for error in (UserError("out of memory"), ValueError("x"), FileNotFoundError(2, "x"), KeyError(28)):
        assert not errors.is_of_machine(error)


def ended(capsys, *words):
    """The exit code of a command line, and its standard error."""
    return exit_code(*words), capsys.readouterr().err


@pytest.fixture
def job(tiny_llama, tmp_path):
    text = yaml.safe_dump(
        {"model": {"causal_lm": {"weights": str(tiny_llama)}}, "steps": ["quantize.rtn"], "evaluate": ["size"]}
    )
    (tmp_path / "r.yaml").write_text(text)
    return tmp_path / "r.yaml"


FAILS = [
    OSError(errno.ENOSPC, "No space left on device"),
    MemoryError(),
    RuntimeError("[enforce fail at alloc_cpu.cpp:117] data. DefaultCPUAllocator: can't allocate memory: you tried to "
                 "allocate 4096 bytes. Error code 12 (Cannot allocate memory)"),
    ZeroDivisionError("integer division"),
]  # fmt: skip


@pytest.mark.parametrize(
    "error",
    [FAILS[0], *(pytest.param(error, marks=pytest.mark.slow) for error in FAILS[1:])],
    ids=lambda error: type(error).__name__,
)
def test_a_step_that_fails_is_one_line_and_its_traceback_stands_in_the_log(job, tmp_path, monkeypatch, capsys, error):
    cls = plugin.load("quantize.rtn")

    def broken(*_):
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(cls, "apply", broken)
        code, err = ended(capsys, "run", str(job), "--out", str(tmp_path / "o"))
    assert code == 4
    assert "Traceback" not in err
    lines = [line for line in err.splitlines() if line.startswith("llmq: ")]
    assert len(lines) == 1
    assert lines[0].endswith(f"(traceback: {tmp_path / 'o' / 'log.txt'})")
    assert "Traceback" in (tmp_path / "o" / "log.txt").read_text()
    assert (tmp_path / "o" / "0-base" / "artifact.json").is_file()
    if isinstance(error, OSError):
        assert str(tmp_path / "o") in lines[0]  # a write names no file: the run's folder is named
    code, err = ended(capsys, "run", str(job), "--out", str(tmp_path / "o"), "--resume")
    assert not code, err


def test_a_failure_outside_of_a_run_has_its_traceback_in_the_cache(monkeypatch, capsys, llmq_cache):
    from llmq import listing

    monkeypatch.setattr(listing, "everything", lambda: 1 // 0)
    code, err = ended(capsys, "list")
    assert code == 4
    assert err.startswith("llmq: unforeseen: ZeroDivisionError")
    assert "ZeroDivisionError" in (llmq_cache / "log.txt").read_text()


def test_an_error_goes_up_where_its_log_cannot_be_written(tmp_path):
    with pytest.raises(KeyError) as raised, logged_to(tmp_path / "gone" / "log.txt"):
        raise KeyError("x")
    assert errors.line_of(raised.value).startswith("unforeseen: KeyError: 'x'")


@pytest.mark.slow
def test_disk_is_looked_for_before_a_stage_is_written(job, tmp_path, monkeypatch):
    needed = files.bytes_of(recipe.load(str(job)).model.base(CPU).weight_files())
    monkeypatch.setattr(files, "free_bytes", lambda path: needed - 1)
    with pytest.raises(LlmqError, match=r"stage 1-quantize.rtn needs about [\d.]+ kB in .*, and [\d.]+ kB are free"):
        pipeline.run(recipe.load(str(job)), tmp_path / "o")
    assert not list((tmp_path / "o").glob("*1-quantize*/*"))
    monkeypatch.setattr(files, "free_bytes", lambda path: needed)
    assert pipeline.run(recipe.load(str(job)), tmp_path / "o", resume=True)


def test_what_a_step_needs_hangs_on_its_kind(tiny_llama, tiny_jsonl):
    from llmq.artifact import Artifact

    model = plugin.build({"causal_lm": {"weights": str(tiny_llama)}}, "models")
    base = Artifact(model, tiny_llama)
    size = files.bytes_of(base.weight_files())
    lora = plugin.build({"adapt.lora": {"data": str(tiny_jsonl), "r": 8}})
    twice = plugin.build({"adapt.lora": {"data": str(tiny_jsonl), "r": 16}})
    assert plugin.build("quantize.bnb").space(base) == size
    assert plugin.build("adapt.merge").space(base) == size
    assert plugin.build("adapt.merge").space(Artifact(model, tiny_llama, packed=True)) == 4 * size
    assert twice.space(base) == pytest.approx(2 * lora.space(base), rel=1e-6)


def unnamed_encodings(file):
    """Lines that open a text without naming its encoding."""
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Call):
            name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            words = {k.arg for k in node.keywords}
            text = [a.value for a in node.args if isinstance(a, ast.Constant) and isinstance(a.value, str)]
            opens = name == "open" and any(set(t) <= set("rwax+t") and len(t) < 4 for t in text)
            if ((name in ("read_text", "write_text") and isinstance(node.func, ast.Attribute)) or opens) and (
                "encoding" not in words
            ):
                yield node.lineno


def test_every_text_that_is_read_or_written_names_its_encoding():
    ours = ("guarded_files.read_text", "guarded.files", "archive.open")
    found = []
    for file in sorted((ROOT / "llmq").rglob("*.py")):
        lines = file.read_text(encoding="utf-8").splitlines()
        found += [
            f"{file.relative_to(ROOT)}:{n}" for n in unnamed_encodings(file) if not any(o in lines[n - 1] for o in ours)
        ]
    assert not found


def test_a_home_folder_is_looked_up_in_one_place():
    found = [f.name for f in (ROOT / "llmq").rglob("*.py") if ".expanduser(" in f.read_text(encoding="utf-8")]
    assert found == ["files.py"]


def test_streams_that_are_full_or_closed_end_in_one_line():
    run = [sys.executable, "-m", "llmq", "list", "--json"]
    with open("/dev/full", "wb") as full:
        done = subprocess.run(run, stdout=full, stderr=subprocess.PIPE, text=True, check=False)
    assert (done.returncode, done.stderr.count("\n")) == (4, 1)
    assert "no space is left" in done.stderr
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run(run, stdout=writer, stderr=subprocess.PIPE, text=True, check=False)
    os.close(writer)
    assert (done.returncode, done.stderr) == (4, f"llmq: {errors.REASONS[errno.EPIPE]}\n")


def test_a_locale_that_knows_ascii_alone_is_enough(tmp_path):
    (tmp_path / "ü.yaml").write_text("model: {causal_lm: {weights: 'é中'}}\n", encoding="utf-8")
    env = {**os.environ, "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    run = [sys.executable, "-m", "llmq", "check", "ü.yaml"]
    done = subprocess.run(run, capture_output=True, env=env, cwd=tmp_path, check=False)
    assert done.returncode == 2
    assert done.stderr.startswith(b"llmq: ")
    assert b"\\xe9\\u4e2d" in done.stderr


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (["eval", "x" * 300, "--suite", "text-quick"], "too long"),
        (["check", "x" * 300 + ".yaml"], "too long"),
        (["run", "text/quickstart", "--out", "x" * 300], "too long"),
        (["eval", "~nobodyx/m", "--suite", "text-quick"], "knows no home folder"),
        (["check", "text/quickstart", "model.weights=~nobodyx"], "knows no home folder"),
    ],
)
def test_names_that_can_be_no_files_are_one_line(monkeypatch, capsys, argv, says):
    code, err = ended(capsys, *argv)
    assert code == 2
    assert says in err
    assert err.count("\n") == 1


def test_a_limit_on_memory_is_named(tmp_path):
    """No library that takes 4 GB of addresses can be loaded under 1 GB."""
    (tmp_path / "r.yaml").write_text("model: {edsr: {}}\nsteps: []\nevaluate: [size]\n")
    limit = lambda: resource.setrlimit(resource.RLIMIT_AS, (2**30, 2**30))  # noqa: E731
    run = [sys.executable, "-m", "llmq", "run", "r.yaml"]
    done = subprocess.run(run, capture_output=True, text=True, cwd=tmp_path, check=False, preexec_fn=limit)
    assert done.returncode == 4
    assert "not enough memory (ulimit -v allows 1.1 GB)" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.slow
def test_damaged_answers_of_a_run_are_named_when_it_is_resumed(job, tmp_path, monkeypatch, capsys):
    ended(capsys, "run", str(job), "--out", str(tmp_path / "o"))
    for content in ("{", "[]", '{"measurements": 5}', json.dumps({"measurements": [{"task": "size"}], "exhibits": []})):
        (tmp_path / "o" / "0-base" / "measurements.json").write_text(content)
        code, err = ended(capsys, "run", str(job), "--out", str(tmp_path / "o"), "--resume")
        assert code == 2, err
        assert "measurements.json" in err
