"""Partial names that no other writer has; dead ones are swept, live ones never."""

import json
import os
from concurrent.futures import ProcessPoolExecutor
from contextlib import suppress
from multiprocessing import get_context
from pathlib import Path

import pytest

from llmq import partials
from llmq.files import make_whole, write_json, write_text

DEAD = ".a.json.0123456789abcdef.partial"


@pytest.fixture(autouse=True)
def _sweep_again():
    partials._sweep_once.cache_clear()


def test_a_file_takes_its_place_when_whole_and_nothing_else_stays(tmp_path):
    with partials.partial_of(tmp_path / "a") as partial:
        partial.write_text("new")
        assert not (tmp_path / "a").exists()
        assert partials.NAME.fullmatch(partial.name)
    assert [f.name for f in tmp_path.iterdir()] == ["a"]
    with suppress(ZeroDivisionError), partials.partial_of(tmp_path / "a") as partial:
        partial.write_text("half")
        _ = 1 / 0
    assert [(f.name, f.read_text()) for f in tmp_path.iterdir()] == [("a", "new")]


def test_a_long_name_has_a_partial_too(tmp_path):
    write_text(tmp_path / ("n" * 255), "text")
    assert (tmp_path / ("n" * 255)).read_text() == "text"


def test_of_two_that_fill_one_folder_the_first_wins(tmp_path):
    def fill(folder: Path) -> None:
        (folder / "by").write_text("second")
        make_whole(tmp_path / "f", lambda other: (other / "by").write_text("first"), shared=True)

    make_whole(tmp_path / "f", fill, shared=True)
    assert (tmp_path / "f/by").read_text() == "first"
    assert [f.name for f in tmp_path.iterdir()] == ["f"]


def test_what_dead_writers_left_is_swept_and_nothing_else(tmp_path):
    (tmp_path / DEAD).write_text("{")
    (tmp_path / ".f.0123456789abcdef.partial").mkdir()
    (tmp_path / ".f.0123456789abcdef.partial/weights").write_text("w")
    stage = tmp_path / ".1-adapt.lora.partial"
    stage.mkdir()
    with partials.partial_of(tmp_path / "living") as living:
        partials.sweep(tmp_path)
        assert living.exists()
        assert set(tmp_path.iterdir()) == {living, stage}


def test_writing_sweeps_its_folder(tmp_path):
    (tmp_path / DEAD).write_text("{")
    write_json(tmp_path / "b.json", {})
    assert [f.name for f in tmp_path.iterdir()] == ["b.json"]


def test_a_stage_that_goes_on_keeps_what_is_whole_and_no_dead_partial(tmp_path):
    inside = tmp_path / ".1-step.partial/inside"
    inside.mkdir(parents=True)
    (inside / DEAD).write_text("{")
    (inside / "whole").write_text("w")
    make_whole(tmp_path / "1-step", lambda folder: None)
    assert [f.name for f in (tmp_path / "1-step/inside").iterdir()] == ["whole"]


def _write_often(file: str) -> list[str]:
    """What is read of one file that several write, hundreds of times; an error by its name."""
    bad = []
    for i in range(150):
        try:
            write_json(Path(file), {"by": os.getpid(), "filler": [i] * (i * 7 % 300)})
            json.loads(Path(file).read_text())
        except (OSError, ValueError) as error:
            bad.append(repr(error))
    return bad


def test_four_writers_of_one_file_never_fail_and_never_tear_it(tmp_path):
    with ProcessPoolExecutor(4, get_context("fork")) as pool:
        bad = [b for found in pool.map(_write_often, [str(tmp_path / "a.json")] * 4) for b in found]
    assert bad == []
    assert [f.name for f in tmp_path.iterdir()] == ["a.json"]


def test_a_scratch_folder_goes_and_so_does_a_dead_one(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    dead = tmp_path / ".llmq.0123456789abcdef.partial"
    dead.mkdir()
    with partials.scratch() as folder:
        assert list(tmp_path.iterdir()) == [folder]
        assert folder.stat().st_mode & 0o777 == 0o700
    assert not list(tmp_path.iterdir())
