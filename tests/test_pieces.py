"""Rows and examples that are many need little memory: they lie in a file, and one is made when it is asked for."""

import json
import subprocess
import sys
import tracemalloc
from pathlib import Path

import pytest
from helpers import apply, base_of
from hypothesis import given, settings
from hypothesis import strategies as st

from llmq.data.file import File
from llmq.errors import LlmqError
from llmq.files import sha256_text
from llmq.text import pieces, rows, tuning
from llmq.text.examples import Tokens, alone, pack
from llmq.text.pieces import Kept, Pieces
from llmq.text.tokens import kept


@pytest.fixture(autouse=True)
def _little_memory(monkeypatch):
    """So that a few rows go to the disk."""
    monkeypatch.setattr(pieces, "IN_MEMORY", 1000)


def pairs(n: int) -> list[dict[str, str]]:
    return [{"prompt": f"Question {i}, about {i % 7}?", "completion": f"Answer {i}."} for i in range(n)]


def write(path: Path, n: int) -> Path:
    with path.open("w") as stream:
        stream.writelines(json.dumps(row) + "\n" for row in pairs(n))
    return path


@settings(max_examples=60, deadline=None, database=None)
@given(st.lists(st.binary(max_size=700), max_size=30), st.data())
def test_pieces_come_back_alone_and_joined(many, data):
    all_of_them = Pieces()
    for piece in many:
        all_of_them.add(piece)
    assert [all_of_them[i] for i in range(len(many))] == many
    chosen = sorted(data.draw(st.sets(st.sampled_from(range(len(many)))))) if many else []
    for numbers in (chosen, chosen[::-1]):
        assert b"".join(all_of_them.joined(numbers)) == b"".join(many[i] for i in numbers)


def test_what_is_kept_is_a_sequence():
    values = [*pairs(50), {"b": [1, None, True, 2.5, "ü\ud800"], "a": {"z": 2**70, "y": {}}}]
    made = Kept(values)
    assert made == values
    assert (made[-1], made[3:40:5], list(made)) == (values[-1], values[3:40:5], values)
    assert list(made[-1]) == ["b", "a"]  # a chat template may write keys in the order that they have
    with pytest.raises(IndexError):
        made[len(values)]


def test_rows_that_lie_on_the_disk_have_the_hash_of_their_texts():
    made = rows.split(rows.Gathered(pairs(80)), "prompt/completion", 0.3, None)
    texts = [json.dumps(row, sort_keys=True) for row in (*made.train, *made.held_out)]
    assert made.sha256 == sha256_text(*texts)


def test_examples_and_their_rows_are_made_when_they_are_asked_for():
    many = [Tokens(tuple(range(n)), tuple(i % 3 == 0 for i in range(n))) for n in range(2, 60)]
    assert kept(many) == many
    for made in (pack(kept(many), 64), alone(kept(many))):
        assert sorted(len(e) for row in made for e in row) == list(range(2, 60))
        assert (made[-1], made[2:4]) == (list(made)[-1], list(made)[2:4])


def test_of_a_file_few_rows_are_in_memory(tmp_path):
    file = File(path=write(tmp_path / "many.jsonl", 20_000))
    File(path=write(tmp_path / "few.jsonl", 20)).read()  # what is made once, for any file
    tracemalloc.start()
    made = file.read()
    total, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert isinstance(made.train, Kept)
    # 8 bytes for the place of a row, 4 for its number; to sort 8 bytes of its hash takes 40 more, for a while.
    assert total < 20_000 * 20
    assert peak < 20_000 * 100


def test_a_file_is_read_once_until_it_is_changed(tmp_path):
    path = write(tmp_path / "d.jsonl", 20)
    made = File(path=path).read()
    assert File(path=path).read() is made
    assert File(path=path, held_out=0.5).read().sha256 != made.sha256
    write(path, 21)
    assert File(path=path).read().counts["read"] == 21


def test_where_rows_cannot_be_kept_the_folder_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(pieces.tempfile, "tempdir", str(tmp_path / "gone"))
    with pytest.raises(LlmqError, match=r"gone', where rows are kept while they are used, cannot be written: No such"):
        Kept(pairs(100))


FEW = {"max_steps": 1, "r": 2, "max_length": 32, "per_device_train_batch_size": 2}


def test_of_many_rows_a_few_steps_read_those_that_they_can_see(tiny_llama, tmp_path, monkeypatch):
    monkeypatch.setattr(tuning, "ENOUGH", 50)
    data = {"file": {"path": str(write(tmp_path / "d.jsonl", 100)), "held_out": 0.4}}
    weights = []
    for name in ("one", "other"):
        stage = apply("adapt.lora", base_of(tiny_llama), tmp_path / name, data=data, held_out_rows=1, **FEW)
        weights.append((tmp_path / name / "adapter_model.safetensors").read_bytes())
    assert weights[0] == weights[1]
    # Two packed rows of 32 tokens hold at most 32 examples, and 50 is more; of held-out ones one holds 16.
    tokens = stage.notes["tokens"]
    assert (tokens["train"]["rows"], tokens["train"]["not_drawn"]) == (50, 10)
    assert (tokens["held_out"]["rows"], tokens["held_out"]["not_drawn"]) == (16, 24)


@pytest.mark.slow
def test_a_training_by_epochs_and_one_of_many_steps_read_all(tiny_llama, tmp_path, monkeypatch):
    monkeypatch.setattr(tuning, "ENOUGH", 5)
    data = {"file": {"path": str(write(tmp_path / "d.jsonl", 40)), "held_out": 0}}
    for name, length in (("epochs", {"num_train_epochs": 0.1, "max_steps": None}), ("steps", {"max_steps": 2})):
        stage = apply("adapt.lora", base_of(tiny_llama), tmp_path / name, data=data, **{**FEW, **length})
        assert stage.notes["tokens"]["train"]["rows"] == 40
        assert "not_drawn" not in stage.notes["tokens"]["train"]


PROBE = """
import re, sys, time
from pathlib import Path
from llmq.data.file import File
made = File(path=Path(sys.argv[1])).read()
assert len(made.train) + len(made.held_out) == int(sys.argv[2])
# Not what getrusage says, which a process has from the one that started it.
peak = re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())
print(int(peak[1]) / 1024, time.process_time())
"""


def probed(path: Path, n: int) -> tuple[float, float]:
    """Peak memory in MiB and processor seconds of a process that reads a file."""
    told = subprocess.run(
        [sys.executable, "-c", PROBE, str(write(path, n)), str(n)], capture_output=True, text=True, check=True
    )
    memory, seconds = map(float, told.stdout.split())
    return memory, seconds


@pytest.mark.slow
def test_a_million_rows_are_read_in_little_memory_within_a_minute(tmp_path):
    few, _ = probed(tmp_path / "few.jsonl", 10_000)
    many, seconds = probed(tmp_path / "many.jsonl", 1_000_000)
    assert many < 400
    assert many - few < 150
    assert seconds < 40
