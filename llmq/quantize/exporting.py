"""From a torch module to a graph that runs elsewhere: export, its two files, and whether a quantization was one."""

import contextlib
import io
import logging
import re
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch

from llmq.artifact import Artifact
from llmq.environment import library_version
from llmq.errors import LlmqError, UserError
from llmq.files import bytes_of, weight_files
from llmq.models.exported import ExportedModule, constants
from llmq.models.runtime import DEVICE, GRAPH, PRECISION, core, openvino
from llmq.models.vision import named
from llmq.quantize import apart
from llmq.quantize.layer_names import restore_names
from llmq.quantize.likeness import Likeness, in_order_of
from llmq.types import Step

PARITY = 1e-3
"""How far an exported graph may be from its module, as a share of the largest output."""


def nncf() -> Any:
    """The library, imported after OpenVINO was kept from reporting home, and told to be quiet."""
    openvino()
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)  # that there is no CUDA
    try:
        import nncf
    except ModuleNotFoundError:
        raise UserError("this needs NNCF; install llmq-suite[openvino]") from None
    nncf.set_log_level(logging.ERROR)
    return nncf


@contextlib.contextmanager
def quietly() -> Iterator[None]:
    """Keep the bars and warnings of the exporting libraries off the screen."""
    with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def quantized_stage(
    step: Step,
    artifact: Artifact,
    folder: Path,
    change: Callable[[Any], Any],
    inputs: Sequence[Any] = (),
    compute_dtype: str = "float32",
    float16: bool = False,
    notes: Mapping[str, Any] = MappingProxyType({}),
) -> Artifact:
    """Export `artifact`, `change` the graph, write it to `folder`, and judge it on `inputs` (or the usual example).

    Raises `LlmqError` and leaves no file where nothing shrank, nothing changed, or little of the output is left.
    """
    model: Any = artifact.model
    with artifact.open("cpu") as loaded:
        graph = export(loaded.module, model)
    changed = change(graph.clone())
    if compute_dtype == "bfloat16":
        changed.set_rt_info("bf16", PRECISION)
    write_graph(changed, folder, float16)
    try:
        apart.check_opens(folder, model)
        check_written(changed, folder / GRAPH)
        facts = judged(step.word, artifact, graph, folder, inputs or [model.example(4)])
    except LlmqError:
        for file in weight_files(folder):
            file.unlink()
        raise
    about = {"format": "OpenVINO IR", "openvino": library_version("openvino"), "device": DEVICE}
    notes = {**about, "compute_dtype": compute_dtype, **notes, **facts}
    return artifact.then(step, weights=folder, runtime="openvino", packed=True, notes=notes)


def export(module: Any, model: Any) -> Any:
    """The graph of a module of the family `model`, any batch size. Raises `LlmqError` if it computes something else.

    The graph is made here, where the module lies in memory; it runs here once it has run in another process.
    """
    library = openvino()
    example = model.example(1)
    deployed = model.deployed(module)
    try:
        with quietly():
            graph = library.convert_model(deployed, example_input=example)
            graph.reshape([-1, example.shape[1], *((-1, -1) if model.any_size else example.shape[2:])])
    except (RuntimeError, library.frontend.OpConversionFailure) as error:
        if isinstance(error.__cause__, LlmqError):
            raise error.__cause__ from None
        raise LlmqError(f"{named(model)} cannot be exported: {' '.join(str(error).split())}") from None
    restore_names(graph, deployed)
    rows, columns = example.shape[-2:]
    inputs = [example, model.example(2)]
    inputs += [example[..., : rows - rows // 4, : columns - columns // 8]] if model.any_size else []
    apart.check_runs(graph, model, inputs)
    exported = ExportedModule(graph)
    for x in inputs:
        with torch.inference_mode():
            truth, found = outputs(model, module, exported, x)
        for i, (t, f) in enumerate(zip(truth, found, strict=True)):
            off = float((f - t).abs().max() / t.abs().max().clamp_min(1e-12)) if f.shape == t.shape else float("inf")
            if not off <= PARITY:
                raise LlmqError(
                    f"{named(model)} was exported wrongly: for an input {list(x.shape)} the graph's output {i} is "
                    f"off by {off:.1e} of its largest value, more than {PARITY:g}"
                )
    return graph


def as_tuple(outputs: Any) -> tuple[Any, ...]:
    """The outputs of a module that has one or several."""
    return outputs if isinstance(outputs, tuple) else (outputs,)


def outputs(model: Any, one: Any, other: Any, x: Any) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
    """What two modules of one family make of an input, in one order."""
    truth, found = as_tuple(one(x)), as_tuple(other(x))
    same = [t.shape for t in truth] == [f.shape for f in found]
    return truth, in_order_of(truth, found) if model.unordered and same else found


def write_graph(graph: Any, folder: Path, float16: bool = False) -> None:
    """Write `model.xml` and `model.bin`, the same bytes for the same graph."""
    # A name that nobody gave counts the graphs, or the operations, of the whole process.
    graph.set_friendly_name("graph")
    for i, operation in enumerate(graph.get_ordered_ops()):
        if re.fullmatch(r"[A-Za-z]+_\d+", operation.get_friendly_name()):
            operation.set_friendly_name(f"{operation.get_type_name()}_{i}")
    path = folder / GRAPH
    openvino().save_model(graph, path, compress_to_fp16=float16)
    text = re.sub(r">\s+<", "><", path.read_text(encoding="utf-8"))  # a sixth of it is indentation
    path.write_text(text, encoding="utf-8")


def check_written(graph: Any, path: Path) -> None:
    """Raise `LlmqError` unless a file holds each constant of a graph to the bit, or rounded to float16."""
    import numpy as np

    kept = {
        constant.get_friendly_name().removesuffix("_compressed"): constant.data  # as OpenVINO calls those in float16
        for constant, _ in constants(core().read_model(path))
    }
    for constant, _ in constants(graph):
        name, meant = constant.get_friendly_name(), constant.data
        found = kept.get(name)
        if found is not None and found.shape == meant.shape:
            if found.dtype == np.float16:
                with np.errstate(over="ignore"):
                    rounded = meant.astype(np.float16)
                # OpenVINO writes the largest float16 for what float16 does not hold; whoever judges the stage sees it.
                meant = np.where(np.isfinite(rounded), rounded, found)
            if found.tobytes() == meant.tobytes():
                continue
        raise LlmqError(f"{str(path)!r}: {name} is not what was to be written; is the disk sound?")


def judged(word: str, artifact: Artifact, graph: Any, folder: Path, inputs: Sequence[Any]) -> dict[str, Any]:
    """What a quantization did to file and output. Raises `LlmqError` with these facts if it was none."""
    name = named(artifact.model)
    before, after = bytes_of(artifact.weight_files()), bytes_of(weight_files(folder))
    if after >= before:
        raise LlmqError(
            f"{word} shrank nothing: {after:,} bytes, and {before:,} before; {name} is too small for it, leave it out"
        )
    exact, changed = ExportedModule(graph), ExportedModule(folder)
    likenesses: list[Likeness] = []
    for x in inputs:
        pairs = list(zip(*outputs(artifact.model, exact, changed, x), strict=True))
        likenesses = likenesses or [Likeness() for _ in pairs]
        for likeness, (truth, found) in zip(likenesses, pairs, strict=True):
            likeness.add(truth, found)
    worst = max(likenesses, key=lambda its: its.relative_error)
    facts = f"{before / after:.2f}x smaller, relative error {worst.relative_error:.3g} on {len(inputs)} inputs"
    if all(likeness.error == 0 for likeness in likenesses):
        raise LlmqError(f"{word} changed no output: {facts}; leave it out for {name}")
    for i, likeness in enumerate(likenesses):
        if likeness.is_garbage:
            raise LlmqError(
                f"{word} spoilt the model: output {i} keeps {likeness.kept:.0%} of the variance of its float32 values "
                f"(relative error {likeness.relative_error:.3g} on {len(inputs)} inputs); "
                f"keep some layers of {name} in float (ignored of quantize.int8), or take quantize.float16"
            )
    return {
        "size_ratio": round(before / after, 4),
        "relative_error": [round(its.relative_error, 6) for its in likenesses],
        "variance_kept": [round(its.kept, 6) for its in likenesses],
        "changed_share": round(_changed_share(changed.graph), 4),
        "judged_on": len(inputs),
    }


def _changed_share(graph: Any) -> float:
    """How much of the weights of a graph is stored in fewer bits than float32 has."""
    sizes = [(c.get_element_type().get_type_name(), c.data.size) for c, is_weight in constants(graph) if is_weight]
    return float(sum(size for kind, size in sizes if kind != "f32") / sum(size for _, size in sizes))
