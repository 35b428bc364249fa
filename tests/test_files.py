"""Folders that are whole or not there, portable paths, and hashes."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmq import files
from llmq.files import (
    bundled,
    bytes_of,
    cache,
    make_whole,
    portable_path,
    sha256_files,
    sha256_text,
    write_json,
    write_text,
)

quickly = settings(max_examples=60, deadline=None, database=None)


class KilledError(Exception):
    pass


def names(folder):
    return sorted(f.name for f in folder.iterdir())


def test_a_folder_is_made_by_filling_it(tmp_path):
    folder = make_whole(tmp_path / "stage", lambda f: (f / "weights").write_text("w"))
    assert folder == tmp_path / "stage"
    assert (folder / "weights").read_text() == "w"
    assert names(tmp_path) == ["stage"]


def test_a_killed_filling_leaves_no_folder_but_a_partial_and_can_be_done_again(tmp_path):
    def half(folder):
        (folder / "first").write_text("1")
        raise KilledError

    with pytest.raises(KilledError):
        make_whole(tmp_path / "stage", half)
    assert names(tmp_path) == [".stage.partial"]

    def rest(folder):
        # What the killed run left is there to be used.
        assert (folder / "first").read_text() == "1"
        (folder / "second").write_text("2")

    make_whole(tmp_path / "stage", rest)
    assert names(tmp_path) == ["stage"]
    assert names(tmp_path / "stage") == ["first", "second"]


def test_the_folder_is_not_there_while_it_is_filled(tmp_path):
    seen = []
    make_whole(tmp_path / "stage", lambda f: seen.append((tmp_path / "stage").exists()))
    assert seen == [False]


def test_a_whole_folder_is_not_filled_again(tmp_path):
    (tmp_path / "stage").mkdir()
    make_whole(tmp_path / "stage", lambda f: pytest.fail("filled again"))


def test_parents_are_made(tmp_path):
    assert make_whole(tmp_path / "a" / "b" / "c", lambda f: None).is_dir()


def test_a_written_file_is_whole_and_alone(tmp_path):
    write_text(tmp_path / "a.txt", "old")
    write_text(tmp_path / "a.txt", "new")
    assert (tmp_path / "a.txt").read_text() == "new"
    assert names(tmp_path) == ["a.txt"]


def test_a_write_that_fails_leaves_the_old_file(tmp_path, monkeypatch):
    write_text(tmp_path / "a.json", "old")
    monkeypatch.setattr(files.Path, "replace", lambda *a: (_ for _ in ()).throw(KilledError()))
    with pytest.raises(KilledError):
        write_json(tmp_path / "a.json", {"new": 1})
    assert (tmp_path / "a.json").read_text() == "old"


def test_json_is_written_as_readable_unicode(tmp_path):
    write_json(tmp_path / "a.json", {"name": "Größe", "path": tmp_path})
    text = (tmp_path / "a.json").read_text()
    assert "Größe" in text
    assert text.endswith("}\n")
    assert json.loads(text) == {"name": "Größe", "path": str(tmp_path)}


def test_a_path_within_the_run_is_relative_to_the_stage(tmp_path):
    stage = tmp_path / "run" / "2-merge"
    assert portable_path(tmp_path / "run" / "1-lora" / "weights", stage) == "../1-lora/weights"
    assert portable_path(stage / "weights", stage) == "weights"
    assert portable_path(stage, stage) == "."


def test_a_path_outside_the_run_is_absolute(tmp_path):
    outside = tmp_path / "models" / "base"
    assert portable_path(outside, tmp_path / "run" / "1-lora") == str(outside)
    assert portable_path(tmp_path / "run-2" / "x", tmp_path / "run" / "1-lora") == str(tmp_path / "run-2" / "x")


def test_a_portable_path_leads_back_after_the_run_has_moved(tmp_path):
    stage, weights = tmp_path / "run" / "b", tmp_path / "run" / "a" / "weights"
    weights.mkdir(parents=True)
    stage.mkdir()
    path = portable_path(weights, stage)
    moved = (tmp_path / "run").rename(tmp_path / "moved")
    assert (moved / "b" / path).resolve() == moved / "a" / "weights"


def test_the_cache_is_where_the_environment_says(tmp_path, monkeypatch):
    monkeypatch.setenv("LLMQ_CACHE", str(tmp_path / "mine"))
    assert cache("data", "x.json") == tmp_path / "mine" / "data" / "x.json"
    monkeypatch.delenv("LLMQ_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "theirs"))
    assert cache("data") == tmp_path / "theirs" / "llmq" / "data"


@pytest.mark.parametrize("kind", ["recipes", "sweeps", "evals"])
def test_what_is_bundled_is_there(kind):
    assert bundled(kind).is_dir()


def test_bytes_of_files_add_up(tmp_path):
    (tmp_path / "a").write_text("é")
    (tmp_path / "b").write_text("abc")
    assert bytes_of(tmp_path.iterdir()) == 5
    assert bytes_of([]) == 0


@quickly
@given(st.lists(st.text(max_size=5), max_size=4), st.lists(st.text(max_size=5), max_size=4))
def test_texts_have_one_hash_only_if_they_are_the_same(a, b):
    assert (sha256_text(*a) == sha256_text(*b)) == (a == b)


def test_the_hash_of_texts_knows_their_borders():
    assert len({sha256_text(*t) for t in [("ab", "c"), ("a", "bc"), ("abc",), ("abc", "")]}) == 4


def made(folder, **contents):
    folder.mkdir()
    for name, content in contents.items():
        (folder / name).write_text(content)
    return [folder / name for name in contents]


def test_the_hash_of_files_depends_on_contents_and_names_and_not_on_order_or_place(tmp_path):
    original = made(tmp_path / "1", a="x", b="y")
    digest = sha256_files(original)
    assert sha256_files(reversed(original)) == digest
    assert sha256_files(made(tmp_path / "2", b="y", a="x")) == digest
    assert sha256_files(made(tmp_path / "3", a="x", b="z")) != digest
    assert sha256_files(made(tmp_path / "4", a="x", c="y")) != digest
    assert sha256_files(made(tmp_path / "5", a="y", b="x")) != digest
    assert sha256_files(made(tmp_path / "6", a="x")) != digest


def test_the_hash_of_files_of_one_name_does_not_depend_on_their_order(tmp_path):
    files = made(tmp_path / "weights", model="x") + made(tmp_path / "adapter", model="y")
    assert sha256_files(files) == sha256_files(reversed(files))
