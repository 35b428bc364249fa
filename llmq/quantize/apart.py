"""NNCF and OpenVINO in a process of their own, so that a native library that dies takes nothing along.

`python -m llmq.quantize.apart JOB FOLDER`; a job is files in a folder, and its result is files beside them.
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

from llmq import processes
from llmq.errors import LlmqError, UserError

GRAPH, CHANGED, INPUTS, SETTINGS, ERROR = "model.xml", "changed.xml", "inputs.npz", "settings.json", "error.json"


def changed(step: Any, model: Any, graph: Any, inputs: Sequence[Any]) -> Any:
    """What `step.quantized(graph, inputs)` makes of a graph, tried on the first input; both in another process."""
    from llmq.models.exported import openvino
    from llmq.models.vision import named

    library = openvino()
    with tempfile.TemporaryDirectory(prefix="llmq-") as name:
        folder = Path(name)
        library.save_model(graph, folder / GRAPH, compress_to_fp16=False)
        _write_inputs(folder, inputs)
        settings = {step.word: step.model_dump(mode="json", exclude={"data"})}
        (folder / SETTINGS).write_text(json.dumps(settings))
        _run("change", folder, f"{step.word} of {named(model)}")
        return library.Core().read_model(folder / CHANGED)


def check_opens(graph: Path, model: Any) -> None:
    """Raise `LlmqError` for a graph that ends the process which opens it. Asked once of the same graph and library."""
    from llmq.environment import library_version
    from llmq.files import cache, make_whole, sha256_files, sha256_text, weight_files
    from llmq.models.vision import named

    told = sha256_text(sha256_files(weight_files(graph)), str(library_version("openvino")))

    def fill(folder: Path) -> None:
        _write_inputs(folder, [model.example(1)])
        (folder / SETTINGS).write_text(json.dumps(str((graph / GRAPH).resolve())))
        _run("open", folder, f"opening the exported {named(model)}")

    make_whole(cache("graphs", told[:24]), fill, shared=True)


def _write_inputs(folder: Path, inputs: Sequence[Any]) -> None:
    import numpy as np

    np.savez(folder / INPUTS, *(x.numpy() for x in inputs))


def _run(job: str, folder: Path, what: str) -> None:
    """Run a job. Raises its own `LlmqError`, or one that names the signal which ended it."""
    from llmq.environment import library_version

    surroundings = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    command = [sys.executable, "-m", "llmq.quantize.apart", job, str(folder)]
    ended = subprocess.run(
        command, env=surroundings, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, errors="replace"
    )
    if ended.returncode < 0:
        killer = signal.Signals(-ended.returncode).name
        # Nobody else sends this one unasked.
        why = "the memory ran out, or somebody ended it" if killer == "SIGKILL" else "a fault of its native code"
        raise LlmqError(
            f"{what} ended OpenVINO {library_version('openvino')} by {killer}, {why}; keep layers in float "
            "(ignored of quantize.int8), or take quantize.dynamic or quantize.float16, or another version of OpenVINO"
        )
    if (folder / ERROR).is_file():
        its = json.loads((folder / ERROR).read_text())
        raise (UserError if its["of_user"] else LlmqError)(its["says"])
    if ended.returncode:
        last = (ended.stderr.strip() or "nothing was said").splitlines()[-1]
        raise LlmqError(f"{what} failed: {last}; quantize.float16 changes no activations and may do")


def main(job: str, folder: Path) -> None:
    """Do a job in this process."""
    processes.end_with_parent()
    import numpy as np

    with np.load(folder / INPUTS) as kept:
        inputs = [kept[name] for name in kept.files]
    try:
        if job == "change":
            _change(folder, inputs)
        else:
            _try(Path(json.loads((folder / SETTINGS).read_text())), inputs[0])
    except LlmqError as error:
        (folder / ERROR).write_text(json.dumps({"of_user": isinstance(error, UserError), "says": str(error)}))


def _change(folder: Path, inputs: list[Any]) -> None:
    import torch

    from llmq import plugin
    from llmq.models.exported import openvino

    step: Any = plugin.build(json.loads((folder / SETTINGS).read_text()))
    graph = openvino().Core().read_model(folder / GRAPH)
    made = step.quantized(graph, [torch.from_numpy(x) for x in inputs])
    openvino().save_model(made, folder / CHANGED, compress_to_fp16=False)
    _try(folder / CHANGED, inputs[0])


def _try(graph: Path, given: Any) -> None:
    """Compile a graph for the shape of an input, and run it."""
    sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]
    import openvino

    core = openvino.Core()
    model = core.read_model(graph)
    if not model.input(0).partial_shape.compatible(openvino.PartialShape(list(given.shape))):
        return  # whoever opens it is told so
    model.reshape(list(given.shape))
    core.compile_model(model, "CPU", {"PERFORMANCE_HINT": "LATENCY"})(given)


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
