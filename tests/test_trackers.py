"""Trackers: asked for by a recipe, imported only then, and never at the cost of a run."""

import subprocess
import sys
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
from run_folders import size, write_run

from llmq import api, trackers
from llmq.errors import UserError
from llmq.report import Report, faces

RECIPE = {"model": {"causal_lm": {"weights": "org/name"}}, "evaluate": ["size"]}


@pytest.fixture
def run(tmp_path):
    folder = write_run(tmp_path / "run", {"0-base": [size(10.0)], "1-adapt.lora": [size(11.0)]})
    report = Report.read(folder)
    report.stages[1]["notes"]["training"] = {"loss": [[1, 2.5], [2, 2.25]], "held_out_loss": [[2, 2.5]], "tokens": 7}
    report.environment.update(threads=2)
    report.save(folder)
    faces.write(folder)
    return report, folder


POINTS = [
    ("1-adapt.lora/loss", 1, 2.5),
    ("1-adapt.lora/loss", 2, 2.25),
    ("1-adapt.lora/held_out_loss", 2, 2.5),
    ("size/bytes_on_disk", 0, 10e6),
    ("size/bytes_on_disk", 1, 11e6),
]


def test_curves_and_figures_become_points(run):
    assert list(trackers.points_of(run[0])) == POINTS


def fake(seen: list[object]) -> SimpleNamespace:
    """A module with the calls of trackio, wandb and mlflow; keeps what it is given."""

    def keep(*values: object, **named: object) -> None:
        seen.append((values, named))

    @contextmanager
    def within(**named: object):
        yield SimpleNamespace(define_metric=keep, log=keep, log_artifact=keep)

    artifact = SimpleNamespace(add_file=keep)
    names = ("log", "finish", "log_metric", "log_dict", "log_artifact", "set_experiment")
    starts = {"init": within, "start_run": within, "Artifact": lambda *a, **k: artifact, "Markdown": str}
    return SimpleNamespace(**dict.fromkeys(names, keep), **starts)


@pytest.mark.parametrize("name", ["trackio", "wandb", "mlflow"])
def test_every_point_and_the_report_reach_a_tracker(run, name, monkeypatch):
    seen: list[object] = []
    monkeypatch.setitem(sys.modules, name, fake(seen))
    if name == "trackio":
        sys.modules[name].init = lambda **named: None
    trackers.hand_over([name], *run)
    told = str(seen)
    assert all(str(value) in told for _, _, value in POINTS)
    assert "report" in told


def test_names_are_those_that_mlflow_takes(run, monkeypatch):
    seen: list[object] = []
    monkeypatch.setitem(sys.modules, "mlflow", fake(seen))
    run[0].measurements[0]["metric"] = "exact_match (strict-match)"
    trackers.hand_over(["mlflow"], *run)
    assert "size/exact_match _strict-match_" in str(seen)


def test_what_a_tracker_prints_stays_off_the_answer(run, monkeypatch, capsys):
    talking = fake([])
    talking.init = lambda **named: print("project made")
    monkeypatch.setitem(sys.modules, "trackio", talking)
    trackers.hand_over(["trackio"], *run)
    told = capsys.readouterr()
    assert (told.out, "project made" in told.err) == ("", True)


def test_a_tracker_that_fails_costs_nothing(run, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "mlflow", SimpleNamespace())
    trackers.hand_over(["mlflow"], *run)
    assert "mlflow did not take the report: AttributeError" in capsys.readouterr().err


def test_one_that_is_missing_or_unknown_is_said_before_anything_runs(monkeypatch):
    monkeypatch.setattr(trackers.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="track: wandb is not installed; pip install wandb"):
        api.load({**RECIPE, "track": ["wandb"]})
    with pytest.raises(UserError, match=r"'weights-and-biases'.*'tensorboard', 'trackio', 'wandb' or 'mlflow'"):
        api.load({**RECIPE, "track": ["weights-and-biases"]})


def test_no_tracker_is_imported_unless_asked():
    script = (
        "from llmq import pipeline; import sys; print([m for m in ('wandb', 'mlflow', 'trackio') if m in sys.modules])"
    )
    told = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert told.stdout.strip() == "[]"
