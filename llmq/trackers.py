"""Training curves, figures and the report, handed to trackers of experiments when a run has ended.

Off unless a recipe asks (`track: [tensorboard]`); nothing is imported, and no socket opened, before.
"""

import importlib
import importlib.util
import re
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from llmq.errors import UserError

if TYPE_CHECKING:
    from llmq.report import Report

Tracker = Literal["tensorboard", "trackio", "wandb", "mlflow"]
Point = tuple[str, int, float]
"""A name such as `1-adapt.lora/loss`, a step, and a value."""
CURVES = ("loss", "held_out_loss", "held_out")
PROJECT = "llmq"
NOT_IN_MLFLOW = re.compile(r"[^\w.: /-]")
"""Characters that MLflow takes in no name, such as the brackets of `exact_match (strict-match)`."""


def check(trackers: Iterable[str]) -> None:
    """Raise `UserError` for a tracker that is not installed, with the command that installs it."""
    for name in trackers:
        if importlib.util.find_spec(name) is None:
            raise UserError(f"track: {name} is not installed; pip install {name}")


def hand_over(trackers: Sequence[str], report: "Report", out: Path) -> None:
    """Give each tracker the points of a report and `report.html`; a tracker that fails costs the run nothing."""
    from llmq.terminal import say

    points = list(points_of(report))
    ways = {"tensorboard": _tensorboard, "trackio": _trackio, "wandb": _wandb, "mlflow": _mlflow}
    for name in trackers:
        try:
            with redirect_stdout(sys.stderr):  # standard output is that of --json
                ways[name](points, report, out)
            say(f"{name} has {len(points)} points and the report")
        except Exception as error:  # noqa: BLE001  # a server that is down must not lose a run
            say(f"{name} did not take the report: {type(error).__name__}: {error}")


def points_of(report: "Report") -> Iterator[Point]:
    """The curves of each training, then each figure at the number of the stage."""
    for stage in report.stages:
        training = stage["notes"].get("training", {})
        for curve in CURVES:
            points = training.get(curve)
            for step, value in points if isinstance(points, list) else ():
                yield f"{stage['name']}/{curve}", int(step), float(value)
    numbers = {stage["name"]: i for i, stage in enumerate(report.stages)}
    for m in report.measurements:
        yield f"{m['task']}/{m['metric']}", numbers.get(m["stage"], 0), float(m["value"])


def _tensorboard(points: Sequence[Point], report: "Report", out: Path) -> None:
    from torch.utils.tensorboard import SummaryWriter

    with SummaryWriter(str(out / "tensorboard")) as writer:
        for name, step, value in points:
            writer.add_scalar(name, value, step)
        writer.add_text("report", (out / "report.md").read_text(encoding="utf-8"))


def _trackio(points: Sequence[Point], report: "Report", out: Path) -> None:
    trackio: Any = importlib.import_module("trackio")
    trackio.init(project=PROJECT, name=out.resolve().name, config=dict(report.recipe))
    for name, step, value in points:
        trackio.log({name: value}, step=step)
    trackio.log({"report": trackio.Markdown((out / "report.md").read_text(encoding="utf-8"))})
    trackio.finish()


def _wandb(points: Sequence[Point], report: "Report", out: Path) -> None:
    wandb: Any = importlib.import_module("wandb")
    with wandb.init(project=PROJECT, name=out.resolve().name, config=dict(report.recipe)) as run:
        for name in dict.fromkeys(name for name, _, _ in points):  # a step of its own for each curve
            run.define_metric(name, step_metric=f"{name}/step")
        for name, step, value in points:
            run.log({name: value, f"{name}/step": step})
        page = wandb.Artifact(f"{out.resolve().name}-report", type="report")
        page.add_file(str(out / "report.html"))
        run.log_artifact(page)


def _mlflow(points: Sequence[Point], report: "Report", out: Path) -> None:
    mlflow: Any = importlib.import_module("mlflow")
    mlflow.set_experiment(PROJECT)
    with mlflow.start_run(run_name=out.resolve().name):
        for name, step, value in points:
            mlflow.log_metric(NOT_IN_MLFLOW.sub("_", name), value, step=step)
        mlflow.log_dict(dict(report.recipe), "recipe.json")
        mlflow.log_artifact(str(out / "report.html"))
