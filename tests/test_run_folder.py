"""One process at a time in a run folder; a death frees it; nothing is left where nothing was begun."""

import os
import re
import signal
import time
from pathlib import Path

import pytest
from test_pipeline import job  # noqa: F401

from llmq import pipeline, recipe
from llmq.errors import UserError
from llmq.runs import folder as run_folder
from llmq.runs.folder import held, holds


def test_the_second_is_refused_and_told_who_and_since_when(tmp_path):
    since = r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d"
    with held(tmp_path / "run"):
        said = f"'{tmp_path / 'run'}' is in use by process {os.getpid()} since {since}; wait until that run has ended"
        with pytest.raises(UserError, match=re.escape(said).replace(re.escape(since), since)), held(tmp_path / "run"):
            pass
    with held(tmp_path / "run"):
        pass


def test_a_folder_in_which_nothing_was_written_goes_again(tmp_path):
    with held(tmp_path / "runs/a"):
        pass
    assert list(tmp_path.iterdir()) == []
    with held(tmp_path / "runs/b"):
        (tmp_path / "runs/b/recipe.yaml").touch()
    assert [f.name for f in (tmp_path / "runs/b").iterdir()] == ["recipe.yaml"]


def in_a_child(work):
    """The id of a forked process that works, and then waits to be killed."""
    reader, writer = os.pipe()
    child = os.fork()
    if not child:
        work()
        os.write(writer, b".")
        time.sleep(60)
        os._exit(0)
    os.read(reader, 1)
    return child


def killed(child):
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)


def test_death_frees_the_lock_and_leaves_nothing_that_is_in_the_way(tmp_path):
    holding = []

    def hold():
        holding.append(held(tmp_path / "run"))
        holding[-1].__enter__()

    child = in_a_child(hold)
    with pytest.raises(UserError, match=f"process {child}"), held(tmp_path / "run"):
        pass
    killed(child)
    assert (tmp_path / "run" / run_folder.LOCK).exists()
    assert holds(tmp_path / "run") == []
    with held(tmp_path / "run"):
        pass


def test_a_worker_that_outlives_its_run_holds_nothing(tmp_path):
    with held(tmp_path / "run"):
        worker = in_a_child(lambda: None)
    with held(tmp_path / "run"):
        pass
    killed(worker)


def test_a_lock_file_that_tells_nothing_is_no_reason_to_fail(tmp_path):
    with held(tmp_path):
        (tmp_path / run_folder.LOCK).write_text("[")
        with pytest.raises(UserError, match="in use by another process;"), held(tmp_path):
            pass


def test_a_run_killed_before_its_recipe_was_there_begins_with_and_without_resume(job, tmp_path):  # noqa: F811
    loaded, out = recipe.load(str(job)), tmp_path / "run"
    with pytest.raises(UserError, match="nothing to resume"):
        pipeline.check_folder(loaded, out, resume=True)
    out.mkdir()
    (out / run_folder.LOCK).touch()
    (out / ".recipe.yaml.0123456789abcdef.partial").write_text("mod")
    for resume in (True, False):
        pipeline.check_folder(loaded, out, resume)
    (out / "notes.txt").touch()
    with pytest.raises(UserError, match="nothing to resume"):
        pipeline.check_folder(loaded, out, resume=True)
    with pytest.raises(UserError, match="is not empty"):
        pipeline.check_folder(loaded, out, resume=False)


def test_a_run_that_is_refused_by_its_data_leaves_no_folder(job, tmp_path, monkeypatch):  # noqa: F811
    from llmq import reading

    def lacking(*_):
        raise UserError("no data")

    monkeypatch.setattr(reading, "hashes", lacking)
    with pytest.raises(UserError, match="no data"):
        pipeline.run(recipe.load(str(job)), tmp_path / "runs/a")
    assert not (tmp_path / "runs").exists()


def test_a_folder_without_a_name_of_its_own_has_neighbours(tmp_path, monkeypatch):
    """A search writes its further attempts beside the first one."""
    monkeypatch.chdir(tmp_path)
    assert run_folder.fresh(".", "search") == tmp_path.resolve()
    assert run_folder.fresh("x/", "search") == Path("x")
