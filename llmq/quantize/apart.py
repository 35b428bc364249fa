"""OpenVINO and NNCF in a process of their own, so that a native library that dies takes nothing along.

`python -m llmq.quantize.apart` reads jobs, a line of JSON each: `["change" or "run", FOLDER]`. It answers each with a
line. A job is files in a folder, and its result is files beside them. The process waits for another job, because its
libraries take seconds to import, and ends after three minutes without one.
"""

import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from llmq import partials, processes
from llmq.errors import LlmqError, UserError
from llmq.models.runtime import GRAPH, core, openvino, options

CHANGED, INPUTS, SETTINGS, ERROR = "changed.xml", "inputs.npz", "settings.json", "error.json"
IDLE = 180
"""Seconds without a job after which the process ends."""
NO_INT8 = "keep layers in float (ignored of quantize.int8), or take quantize.dynamic or quantize.float16"
NO_GRAPH = "leave the steps that export it out"


def changed(step: Any, model: Any, graph: Any, inputs: Sequence[Any]) -> Any:
    """What `step.quantized(graph, inputs)` makes of a graph."""
    from llmq.models.vision import named

    library = openvino()
    with partials.scratch() as folder:
        library.save_model(graph, folder / GRAPH, compress_to_fp16=False)
        settings = {step.word: step.model_dump(mode="json", exclude={"data"})}
        _run("change", folder, settings, inputs, f"{step.word} of {named(model)}", NO_INT8)
        return core().read_model(folder / CHANGED)


def check_runs(graph: Any, model: Any, inputs: Sequence[Any]) -> None:
    """Raise `LlmqError` for a graph in memory that does not run on `inputs`, or ends the process which runs it."""
    from llmq.models.vision import named

    with partials.scratch() as folder:
        openvino().save_model(graph, folder / GRAPH, compress_to_fp16=False)
        _run("run", folder, str(folder / GRAPH), inputs, f"the exported graph of {named(model)}", NO_GRAPH)


def check_opens(graph: Path, model: Any) -> None:
    """The same of the graph in a folder and the usual example. Asked once of the same graph and library."""
    from llmq.environment import library_version
    from llmq.files import cache, make_whole, sha256_files, sha256_text, weight_files
    from llmq.models.vision import named

    told = sha256_text(sha256_files(weight_files(graph)), str(library_version("openvino")))

    def fill(folder: Path) -> None:
        what = f"opening the exported {named(model)}"
        _run("run", folder, str((graph / GRAPH).resolve()), [model.example(1)], what, NO_INT8)
        (folder / INPUTS).unlink()

    make_whole(cache("graphs", told[:24]), fill, shared=True)


class _Process:
    """A Python that does one job after the other."""

    def __init__(self) -> None:
        surroundings = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
        self.said = tempfile.TemporaryFile("w+", errors="replace")  # noqa: SIM115  # as long as the process
        self.process = subprocess.Popen(
            [sys.executable, "-m", "llmq.quantize.apart"],
            env=surroundings,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.said,
            bufsize=0,
        )

    def does(self, job: str, folder: Path) -> bool:
        """Whether it has done a job; if not, it has ended."""
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
        """Its exit code, and the last line that it said."""
        with self.process, self.said:
            code = self.process.wait()
            self.said.seek(0)
            return code, (self.said.read().strip() or "nothing was said").splitlines()[-1]


_waiting: list[_Process] = []
"""The process that waits for a job, if there is one."""
os.register_at_fork(after_in_child=_waiting.clear)  # it answers whoever started it


def _run(job: str, folder: Path, settings: Any, inputs: Sequence[Any], what: str, cure: str) -> None:
    """Have a job done. Raises its own `LlmqError`, or one that names the signal which ended the process."""
    import numpy as np

    np.savez(folder / INPUTS, *(x.numpy() for x in inputs))
    (folder / SETTINGS).write_text(json.dumps(settings), encoding="utf-8")
    while not (process := _waiting.pop() if _waiting else _Process()).does(job, folder):
        code, last = process.end()
        if code != -signal.SIGALRM:  # by which it ends when it has waited long enough
            raise LlmqError(f"{what} {_end(code, last)}; {cure}, or take another version of OpenVINO")
    _waiting.append(process)
    if (folder / ERROR).is_file():
        its = json.loads((folder / ERROR).read_text(encoding="utf-8"))
        if its["kind"] == "library":
            raise LlmqError(f"{what} failed: {its['says']}; {cure}, or take another version of OpenVINO")
        raise (UserError if its["kind"] == "user" else LlmqError)(its["says"])


def _end(code: int, last: str) -> str:
    from llmq.environment import library_version

    if code >= 0:
        return f"failed: {last}"
    killer = signal.Signals(-code).name
    # Nobody else sends this one unasked.
    why = "the memory ran out, or somebody ended it" if killer == "SIGKILL" else "a fault of its native code"
    return f"ended OpenVINO {library_version('openvino')} by {killer}, {why}"


def main() -> None:
    """Do jobs until no more come."""
    processes.end_with_parent()
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # what libraries print is no answer
    signal.alarm(IDLE)
    for line in sys.stdin:
        signal.alarm(0)
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
        if job == "change":
            _change(folder, settings, inputs)
        else:
            _try(settings, inputs)
    except LlmqError as error:
        kind = "user" if isinstance(error, UserError) else "llmq"
        (folder / ERROR).write_text(json.dumps({"kind": kind, "says": str(error)}), encoding="utf-8")
    except Exception as error:  # noqa: BLE001  # whatever a library raises is told in one line
        last = (str(error).strip() or type(error).__name__).splitlines()[-1]
        (folder / ERROR).write_text(json.dumps({"kind": "library", "says": last}), encoding="utf-8")


def _change(folder: Path, settings: Any, inputs: list[Any]) -> None:
    import torch

    from llmq import plugin

    step: Any = plugin.build(settings)
    graph = core().read_model(folder / GRAPH)
    made = step.quantized(graph, [torch.from_numpy(x) for x in inputs])
    openvino().save_model(made, folder / CHANGED, compress_to_fp16=False)


def _try(graph: str, inputs: list[Any]) -> None:
    """Compile a graph for the shape of each input, as llmq does, and run it."""
    for given in inputs:
        model = core().read_model(graph)
        if model.input(0).partial_shape.compatible(openvino().PartialShape(list(given.shape))):
            model.reshape(list(given.shape))
            core().compile_model(model, "CPU", options(core(), model))(given)
        # Whoever opens another one is told so.


if __name__ == "__main__":
    main()
