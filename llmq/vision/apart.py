"""OpenVINO and NNCF in a separate process, so that a crash of native code does not end the run.

`python -m llmq.vision.apart` reads one job a line, as JSON: `["change" or "run", FOLDER]`, and writes one line when
the job is done. The folder holds the input of the job as files, and receives the result as files. The process waits
for the next job, because the libraries take seconds to import, and ends after three minutes without one.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmq import partials, processes
from llmq.errors import LlmqError, UserError
from llmq.openvino_runtime import GRAPH, core, last_line, openvino, options

if TYPE_CHECKING:
    from numpy import ndarray
    from openvino import Model
    from torch import Tensor

    from llmq.types import JsonObject, Step

CHANGED, INPUTS, SETTINGS, ERROR = "changed.xml", "inputs.npz", "settings.json", "error.json"
IDLE = 180
"""The seconds without a job after which the process ends."""
NO_INT8 = "keep layers in float (ignored of quantize.int8), or take quantize.dynamic or quantize.float16"
NO_GRAPH = "leave the steps that export it out"


def changed(
    step: Step[Any], title: str, graph: Model, inputs: Sequence[Tensor], judging: JsonObject | None = None
) -> Model:
    """The graph that `step.quantized(graph, inputs)` makes; `title` names the network in messages.

    With `judging`, the graph that `step.restored(graph, inputs, judging)` makes.

    Raises the `UserError` or `LlmqError` of the step, and `LlmqError` for a crash.
    """
    with partials.scratch() as folder:
        openvino().save_model(graph, folder / GRAPH, compress_to_fp16=False)
        plain = step.model_dump(mode="json", exclude={"data", "accuracy_data"})
        settings = {"step": {step.word: plain}, "judging": judging}
        _run("change", folder, settings, inputs, f"{step.word} of {title}", NO_INT8)
        return core().read_model(folder / CHANGED)


def check_runs(graph: Model, title: str, inputs: Sequence[Tensor]) -> None:
    """Raise `LlmqError` if a graph in memory does not run on `inputs`, or crashes the process that runs the graph."""
    with partials.scratch() as folder:
        openvino().save_model(graph, folder / GRAPH, compress_to_fp16=False)
        _run("run", folder, str(folder / GRAPH), inputs, f"the exported graph of {title}", NO_GRAPH)


def check_reads(file: Path) -> None:
    """Raise `LlmqError` if a file is no graph that OpenVINO reads, or crashes the process that reads it."""
    with partials.scratch() as folder:
        _run("run", folder, str(file.resolve()), [], f"reading {str(file)!r}", "export it again")


def check_opens(graph: Path, title: str, example: Tensor) -> None:
    """Raise `LlmqError` if the graph in a folder does not run on `example`, or crashes the process that runs the graph.

    The cache remembers graphs that ran: under one version of OpenVINO each is tried once.
    """
    from llmq.environment import library_version
    from llmq.files import cache, make_whole, sha256_files, sha256_text
    from llmq.guarded.weights import weight_files

    digest = sha256_text(sha256_files(weight_files(graph)), str(library_version("openvino")))

    def fill(folder: Path) -> None:
        _run("run", folder, str((graph / GRAPH).resolve()), [example], f"opening the exported {title}", NO_INT8)
        (folder / INPUTS).unlink()

    make_whole(cache("graphs", digest[:24]), fill, shared=True)


class _Process:
    """A Python process that does one job after another."""

    def __init__(self) -> None:
        surroundings = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
        self.said = tempfile.TemporaryFile("w+", errors="replace")  # noqa: SIM115  # as long as the process
        self.process = subprocess.Popen(
            [sys.executable, "-m", "llmq.vision.apart"],
            env=surroundings,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.said,
            bufsize=0,  # a job must reach the process at once
        )

    def does(self, job: str, folder: Path) -> bool:
        """Do a job. Returns False if the process has ended instead of answering."""
        assert self.process.stdin
        assert self.process.stdout
        try:
            self.process.stdin.write(json.dumps([job, str(folder.resolve())]).encode() + b"\n")
            return bool(self.process.stdout.readline())
        except BrokenPipeError:
            return False
        except BaseException:  # such as an interruption: nobody would read the answer
            self.process.kill()
            raise

    def end(self) -> tuple[int, str]:
        """Wait for the end of the process. Returns the exit code and the last line on standard error."""
        with self.process, self.said:
            code = self.process.wait()
            self.said.seek(0)
            return code, (self.said.read().strip() or "nothing was said").splitlines()[-1]


_waiting: list[_Process] = []
"""The process that waits for the next job, if there is one."""
os.register_at_fork(after_in_child=_waiting.clear)  # a forked child starts a process of its own


def _run(job: str, folder: Path, settings: object, inputs: Sequence[Tensor], what: str, cure: str) -> None:
    """Do a job in the waiting process. Raises the error of the job, or `LlmqError` that names the signal of a crash."""
    import numpy as np

    np.savez(folder / INPUTS, *(x.numpy() for x in inputs))  # named arr_0, arr_1, … in this order
    (folder / SETTINGS).write_text(json.dumps(settings), encoding="utf-8")
    cure = f"; {cure}, or take another version of OpenVINO"
    while not (process := _waiting.pop() if _waiting else _Process()).does(job, folder):
        code, last = process.end()
        if code != -signal.SIGALRM:  # the signal that ends a process without jobs
            raise LlmqError(f"{what} {_end(code, last)}{cure}")
    _waiting.append(process)
    if (folder / ERROR).is_file():
        kind, says = json.loads((folder / ERROR).read_text(encoding="utf-8"))
        if kind == "library":
            raise LlmqError(f"{what} failed: {says}{cure}")
        raise (UserError if kind == "user" else LlmqError)(says)


def _end(code: int, last: str) -> str:
    from llmq.environment import library_version

    if code >= 0:
        return f"failed: {last}"
    killer = signal.Signals(-code).name
    # Unasked, only the kernel sends SIGKILL: when the memory runs out.
    why = "the memory ran out, or somebody ended it" if killer == "SIGKILL" else "a fault of its native code"
    return f"ended OpenVINO {library_version('openvino')} by {killer}, {why}"


def main() -> None:
    """Do the jobs on standard input until it ends."""
    processes.end_with_parent()
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # libraries print there; only answers may
    signal.alarm(IDLE)
    for line in sys.stdin:
        signal.alarm(0)  # a job may take as long as it needs
        job, folder = json.loads(line)
        _do(job, Path(folder))
        answers.write("done\n")
        answers.flush()
        signal.alarm(IDLE)


def _do(job: str, folder: Path) -> None:
    import numpy as np

    try:
        with np.load(folder / INPUTS) as kept:
            inputs = [kept[name] for name in kept.files]
        settings = json.loads((folder / SETTINGS).read_text(encoding="utf-8"))
        _change(folder, settings, inputs) if job == "change" else _try(settings, inputs)
    except Exception as error:  # noqa: BLE001  # any error of a library is told in one line
        kind = "user" if isinstance(error, UserError) else "llmq" if isinstance(error, LlmqError) else "library"
        says = last_line(error) if kind == "library" else str(error)
        (folder / ERROR).write_text(json.dumps([kind, says]), encoding="utf-8")


def _change(folder: Path, settings: JsonObject, inputs: list[ndarray]) -> None:
    import torch

    from llmq import plugin

    step: Any = plugin.build(settings["step"])
    graph, tensors = core().read_model(folder / GRAPH), [torch.from_numpy(x) for x in inputs]
    judging = settings["judging"]
    made = step.quantized(graph, tensors) if judging is None else step.restored(graph, tensors, judging)
    openvino().save_model(made, folder / CHANGED, compress_to_fp16=False)  # True would round all weights


def _try(file: str, inputs: list[ndarray]) -> None:
    """Compile and run a graph for the shape of each input, as `ExportedModule` does."""
    core().read_model(file)
    for x in inputs:
        graph = core().read_model(file)
        if graph.input(0).partial_shape.compatible(openvino().PartialShape(list(x.shape))):  # if not, opening says so
            graph.reshape(list(x.shape))
            core().compile_model(graph, "CPU", options(core(), graph))(x)


if __name__ == "__main__":
    main()
