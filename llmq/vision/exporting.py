"""The way from a torch module to a graph that OpenVINO runs: export, quantize, write, check, judge."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING

import torch

from llmq.artifact import Artifact
from llmq.environment import library_version
from llmq.errors import LlmqError, UserError
from llmq.files import LAYERS, bytes_of, write_json
from llmq.graph_weights import kind_of
from llmq.guarded.weights import weight_files
from llmq.openvino_runtime import DEVICE, GRAPH, PRECISION, core, openvino, quietly, write_graph
from llmq.types import Step
from llmq.vision import apart
from llmq.vision.exported import ExportedModule, constants
from llmq.vision.graph_layers import facts_of, restore_names
from llmq.vision.likeness import Likeness, in_order_of

if TYPE_CHECKING:
    from types import ModuleType

    from openvino import Model as Graph
    from torch import Tensor
    from torch.nn import Module

    from llmq.vision.family import ImageModel

Answers = tuple["Tensor", ...]
"""The outputs of a module, one or several."""

PARITY = 1e-3
"""The largest error of an exported graph that passes, as a share of its module's largest output."""


def nncf() -> ModuleType:
    """Import NNCF and turn off its log. Raises `UserError` if NNCF is not installed."""
    openvino()  # first: it keeps the libraries from reporting home
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)  # a warning that there is no CUDA
    try:
        import nncf
    except ModuleNotFoundError:
        raise UserError("this needs NNCF; install llmq-suite[openvino]") from None
    nncf.set_log_level(logging.ERROR)
    return nncf  # type: ignore[no-any-return]


def quantized_stage(
    step: Step[ImageModel],
    artifact: Artifact[ImageModel],
    folder: Path,
    change: Callable[[Graph], Graph],
    inputs: Sequence[Tensor] = (),
    compute_dtype: str = "float32",
    float16: bool = False,
    notes: Mapping[str, object] = MappingProxyType({}),
    meaning: Callable[[Tensor], Tensor] = torch.Tensor.float,
) -> Artifact:
    """Export `artifact`, `change` the graph, write the new graph to `folder`, and judge it on `inputs` or one example.

    `meaning` is the part of an output that is compared. Raises `LlmqError` and leaves no file if nothing shrank or
    changed, or the outputs are spoilt.
    """
    model = artifact.model
    with artifact.open("cpu") as loaded:
        is_graph = isinstance(loaded.module, ExportedModule)  # as somebody exported it
        graph = loaded.module.graph.clone() if is_graph else export(loaded.module, model)
    if is_graph and _counts_rows(graph, model.example(1)):
        raise UserError(
            f"{step.word}: {model.title} answers with as many rows as it finds, and rows of two graphs are not "
            "compared then; export it without its non-maximum suppression"
        )
    changed = change(graph.clone())
    if compute_dtype == "bfloat16":
        changed.set_rt_info("bf16", PRECISION)
    write_graph(changed, folder / GRAPH, float16)
    try:
        apart.check_opens(folder, model.title, model.example(1))
        check_written(changed, folder / GRAPH)
        account = notes.get("accuracy_drop")
        back = len(account["back_to_float"]) if isinstance(account, dict) else 0
        facts = judged(step.word, artifact, graph, folder, inputs or [model.example(4)], meaning, back)
    except LlmqError:
        for file in weight_files(folder):  # a refused graph is no stage
            file.unlink()
        raise
    write_json(folder / LAYERS, facts_of(graph, core().read_model(folder / GRAPH)))  # float16 is made on writing
    about = {"format": "OpenVINO IR", "openvino": library_version("openvino"), "device": DEVICE}
    notes = {**about, "compute_dtype": compute_dtype, **notes, **facts}
    return artifact.then(step, weights=folder, runtime="openvino", packed=True, notes=notes)


def _counts_rows(graph: Graph, x: Tensor) -> bool:
    """True if what a graph finds in an input decides the shape of an output."""
    fixed = graph.clone()
    fixed.reshape(list(x.shape))
    return any(output.partial_shape.is_dynamic for output in fixed.outputs)


def export(module: Module, model: ImageModel) -> Graph:
    """Export a module of the family `model` to a graph for any batch size. Raises `LlmqError` if their outputs differ.

    The graph is made in this process, where the module lies in memory, and runs here only after it ran in another one.
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
        raise LlmqError(f"{model.title} cannot be exported: {' '.join(str(error).split())}") from None
    restore_names(graph, deployed)
    rows, columns = example.shape[-2:]
    inputs = [example, model.example(2)]
    # A smaller image, of other proportions, finds sizes that were fixed by the trace.
    inputs += [example[..., : rows - rows // 4, : columns - columns // 8]] if model.any_size else []
    apart.check_runs(graph, model.title, inputs)  # a crash there does no harm
    exported = ExportedModule(graph)
    for x in inputs:
        with torch.inference_mode():
            pairs = enumerate(zip(*outputs(model, module, exported, x), strict=True))
        for i, (truth, made) in pairs:
            largest = truth.abs().max().clamp_min(1e-12)
            off = float((made - truth).abs().max() / largest) if made.shape == truth.shape else float("inf")
            if not off <= PARITY:  # so that NaN fails, too
                raise LlmqError(
                    f"{model.title} was exported wrongly: for an input {list(x.shape)} the graph's output {i} is "
                    f"off by {off:.1e} of its largest value, more than {PARITY:g}"
                )
    return graph


def as_tuple(outputs: Tensor | Answers) -> Answers:
    """The outputs of a module as a tuple, be it one or several."""
    return outputs if isinstance(outputs, tuple) else (outputs,)


def outputs(model: ImageModel, one: Module, other: Module, x: Tensor) -> tuple[Answers, Answers]:
    """The outputs of two modules of one family for an input, with rows in the same order."""
    truth, changed = as_tuple(one(x)), as_tuple(other(x))
    same = [t.shape for t in truth] == [c.shape for c in changed]
    return truth, in_order_of(truth, changed) if model.unordered and same else changed


def check_written(graph: Graph, path: Path) -> None:
    """Raise `LlmqError` unless a file holds each constant of a graph bit by bit, or rounded to float16."""
    import numpy as np

    kept = {
        constant.get_friendly_name().removesuffix("_compressed"): constant.data  # as OpenVINO calls those in float16
        for constant, _ in constants(core().read_model(path))
    }
    for constant, _ in constants(graph):
        name, meant = constant.get_friendly_name().removesuffix("_compressed"), constant.data
        written = kept.get(name)
        if written is not None and written.shape == meant.shape:
            if written.dtype == np.float16:
                with np.errstate(over="ignore"):
                    rounded = meant.astype(np.float16)
                # OpenVINO writes the largest float16 for larger numbers; `judged` sees the error.
                meant = np.where(np.isfinite(rounded), rounded, written)
            if written.tobytes() == meant.tobytes():
                continue
        raise LlmqError(f"{str(path)!r}: {name} differs from the tensor to be written; is the disk sound?")


def judged(
    word: str,
    artifact: Artifact[ImageModel],
    graph: Graph,
    folder: Path,
    inputs: Sequence[Tensor],
    meaning: Callable[[Tensor], Tensor] = torch.Tensor.float,
    back: int = 0,
) -> dict[str, object]:
    """The effect of a quantization on file and outputs, with `back` layers back in float for `accuracy_drop`.

    Raises `LlmqError` if there is none, or outputs are spoilt.
    """
    model, name = artifact.model, artifact.model.title
    # A classifier is used by its chances; logits of a net that is sure of all it sees may lie anywhere far out.
    meanings = dict.fromkeys((meaning, chances) if model.kind == "classifier" else (meaning,))
    before, after = bytes_of(artifact.weight_files()), bytes_of(weight_files(folder))
    if after >= before:
        cure = (
            f"{back} layers went back to float for accuracy_drop: allow more, or train with adapt.qat"
            if back
            else f"{name} is too small for it, leave it out"
        )
        raise LlmqError(f"{word} shrank nothing: {after:,} bytes, and {before:,} before; {cure}")
    exact, changed = ExportedModule(graph), ExportedModule(folder)
    kinds: list[list[Likeness]] = []  # of each output, by each meaning
    for x in inputs:
        pairs = list(zip(*outputs(model, exact, changed, x), strict=True))  # one pair for each output
        kinds = kinds or [[Likeness() for _ in meanings] for _ in pairs]
        for of_output, pair in zip(kinds, pairs, strict=True):
            for likeness, means in zip(of_output, meanings, strict=True):
                likeness.add(*map(means, pair))
    likenesses = [of_output[0] for of_output in kinds]
    worst = max(likenesses, key=lambda likeness: likeness.relative_error)
    facts = f"{before / after:.2f}x smaller, relative error {worst.relative_error:.3g} on {len(inputs)} inputs"
    if all(likeness.error == 0 for likeness in likenesses):
        raise LlmqError(f"{word} changed no output: {facts}; leave it out for {name}")
    for i, (likeness, *others) in enumerate(kinds):
        if likeness.is_garbage and not any(other.kept >= 0.5 for other in others):
            raise LlmqError(
                f"{word} spoilt the model: output {i} keeps {likeness.kept:.0%} of the variance of its float32 values "
                f"(relative error {likeness.relative_error:.3g} on {len(inputs)} inputs); "
                f"keep some layers of {name} in float (ignored of quantize.int8), or take quantize.float16"
            )
    return {
        "size_ratio": round(before / after, 4),
        "relative_error": [round(likeness.relative_error, 6) for likeness in likenesses],
        "variance_kept": [round(likeness.kept, 6) for likeness in likenesses],
        "changed_share": round(_changed_share(changed.graph), 4),
        "judged_on": len(inputs),
    }


def chances(logits: Tensor) -> Tensor:
    """The probability of each class, the last axis."""
    return logits.float().softmax(-1)


def _changed_share(graph: Graph) -> float:
    """The share of a graph's weights that is stored in fewer bits than float32 has."""
    sizes = [(kind_of(c), math.prod(c.get_output_shape(0))) for c, is_weight in constants(graph) if is_weight]
    return float(sum(size for kind, size in sizes if kind != "f32") / sum(size for _, size in sizes))
