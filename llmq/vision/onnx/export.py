"""An ONNX file made of an image model's stage, and the proof that ONNX Runtime says the same."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn

from llmq.artifact import Artifact
from llmq.environment import library_version
from llmq.errors import LlmqError
from llmq.openvino_runtime import DEVICE, PRECISION, quietly
from llmq.plugin import to_plain
from llmq.vision.exported import ExportedModule, is_for_one
from llmq.vision.exporting import export, outputs
from llmq.vision.onnx.layerwise import ROUNDING, most_steps
from llmq.vision.onnx.library import FILE, OPSET, SETTINGS, onnx
from llmq.vision.onnx.module import OnnxModule
from llmq.vision.onnx.operations import to_onnx

if TYPE_CHECKING:
    from openvino import Model as Graph
    from openvino import Node
    from torch import Tensor
    from torch.nn import Module

    from llmq.types import Step
    from llmq.vision.family import ImageModel

FLOAT = 1e-3
"""The largest error of a float model that passes, as a share of the range of an output."""
STEP = 1 / 255
"""One step of 8 bits over the range of an output: the most for int8 activations, unless rounding alone makes more."""
NOISE = 1
"""An error that passes, in units of what a change of the input by next to nothing changes."""
NUDGE, NUDGES = 1e-4, 4  # a fortieth of a step of 8 bits: less would vanish where the input itself is rounded
LARGEST = 2**31 - 1
"""The most bytes of one ONNX file."""


def onnx_stage(step: Step[ImageModel], artifact: Artifact[ImageModel], folder: Path) -> Artifact:
    """Write `model.onnx` to `folder` and compare its outputs. Raises `LlmqError` and leaves no file if they differ."""
    try:
        with artifact.open("cpu") as loaded:
            module, model = loaded.module, artifact.model
            alone = model.two_stages or (isinstance(module, ExportedModule) and is_for_one(module.graph))
            rounded = isinstance(module, ExportedModule) and any(map(_rounds, module.graph.get_ops()))
            if rounded:
                facts = _compared_rounded(model, module, folder)
            elif isinstance(module, ExportedModule):
                facts = {"largest_error": compared(model, exact(module.graph), written(module.graph, folder), FLOAT)}
            else:
                made = _traced(module, model, folder) if model.two_stages else written(export(module, model), folder)
                facts = {"largest_error": compared(model, module, made, FLOAT)}
            _tell_settings(model, folder / FILE)
    except BaseException:
        (folder / FILE).unlink(missing_ok=True)  # what does not say the same is no stage
        raise
    notes = {
        "format": f"ONNX, opset {OPSET}",
        "onnx": library_version("onnx"),
        "onnxruntime": library_version("onnxruntime"),
        "device": DEVICE,
        "compute_dtype": "float32",
        "batch_size": 1 if alone else "any",
        "activations": "int8 (QDQ)" if rounded else "float32",
        **{name: float(f"{error:.2g}") for name, error in facts.items()},
    }
    return artifact.then(step, weights=folder, runtime="onnx", notes=notes)


def _tell_settings(model: ImageModel, file: Path) -> None:
    """Write the settings of a model into its file, as a person who gets the file alone needs them.

    Paths of weights are left out. In protobuf, an entry of a list that follows a whole message is the list's last.
    """
    settings = {name: value for name, value in to_plain(model).items() if name != "weights"}
    entry = {"key": SETTINGS, "value": json.dumps({model.word: settings}, sort_keys=True)}
    with file.open("ab") as kept:
        kept.write(onnx().ModelProto(metadata_props=[entry]).SerializeToString(deterministic=True))
    OnnxModule(file.parent)  # it still opens


def _rounds(op: Node) -> bool:
    return bool(op.get_type_name() == ROUNDING)


def _traced(module: Module, model: ImageModel, folder: Path) -> OnnxModule:
    """The network as PyTorch's own exporter writes it, for one image, in `model.onnx`, opened again."""
    example = model.example(1)
    onnx()  # says what to install
    with quietly():
        torch.onnx.export(
            module,
            (example,),
            str(folder / FILE),
            dynamo=False,
            opset_version=OPSET,
            input_names=["input"],
            output_names=["boxes", "labels", "scores"],
        )
    return OnnxModule(folder)


def written(graph: Graph, folder: Path) -> OnnxModule:
    """The graph in `model.onnx`, opened again."""
    data = to_onnx(graph).SerializeToString(deterministic=True)
    if len(data) > LARGEST:
        raise LlmqError(f"the graph makes an ONNX file of {len(data):,} bytes, and one holds {LARGEST:,}")
    (folder / FILE).write_bytes(data)
    return OnnxModule(folder)


def _compared_rounded(model: ImageModel, module: ExportedModule, folder: Path) -> dict[str, float]:
    """Write a graph with int8 activations, after its float part alone was found the same.

    From the same int8 activations before it, each int8 activation must come out within one step. Over all layers a
    sum at the edge of two integers comes out as either, and a deep network amplifies that: inputs nudged by next to
    nothing, and OpenVINO's other way to run the graph, tell by how much.
    """
    floats = _clipping(module.graph)
    unrounded = compared(model, exact(floats), written(floats, folder), FLOAT)
    truth = exact(module.graph)
    others = [module, *(_Nudged(truth, seed) for seed in range(NUDGES))]
    noise = max(off for other in others for *_, off in errors(model, truth, other))
    made = written(module.graph, folder)
    error = compared(model, truth, made, max(STEP, NOISE * noise))
    # Queries with equal scores, of which rounding makes many, come in any order: their layers cannot be compared.
    layers = {} if model.unordered else _layer_by_layer(model, module.graph, truth.graph, made)
    whole = {"largest_error": error, "largest_error_in_steps": error / STEP, "rounding_noise": noise}
    return {**whole, **layers, "largest_error_unrounded": unrounded}


def _layer_by_layer(model: ImageModel, graph: Graph, floats: Graph, made: OnnxModule) -> dict[str, float]:
    """The most steps by which a layer is off, and the error after the last. Raises `LlmqError` beyond one step."""
    parts = 1 if is_for_one(graph) else 2
    shown = [part for x in probes(model) for part in torch.split(x, parts)]
    worst = [most_steps(graph, floats, made, x) for x in shown]
    steps, tail = max(s for s, _ in worst), max(error for _, error in worst)
    if steps > 1 or not tail <= FLOAT:
        raise LlmqError(
            f"{model.title}: from the same int8 activations a layer of the ONNX file is off by {steps} steps, and an "
            f"output by {tail:.1e} of the range of its values; one step and {FLOAT:g} are the most"
        )
    return {"largest_error_of_a_layer_in_steps": steps, "largest_error_after_the_last_rounding": tail}


def _clipping(graph: Graph) -> Graph:
    """The graph with activations held in their ranges and not rounded."""
    from openvino import opset13

    floats = graph.clone()
    for op in floats.get_ordered_ops():
        if op.get_type_name() == ROUNDING:
            x, low, high = op.input_values()[:3]
            op.output(0).replace(opset13.minimum(opset13.maximum(x, low), high).output(0))
    return floats


class _Nudged(nn.Module):
    """A module whose input is first changed by a ten-thousandth."""

    def __init__(self, module: Module, seed: int):
        super().__init__()
        self.module, self.seed = module, seed

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, ...]:
        noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(self.seed))
        made: Tensor | tuple[Tensor, ...] = self.module(x * (1 + NUDGE * noise))
        return made


def exact(graph: Graph) -> ExportedModule:
    """The graph run as it is written: in float32, weights as floats, activations rounded to the points of their ranges.

    OpenVINO by itself takes bfloat16 where asked to, rounds activations that meet int8 weights, and moves the ranges of
    int8 graphs: a random MobileNetV3 then is off by an eighth of the range of its outputs.
    """
    from openvino.passes import ConstantFolding, Manager

    floats, manager = graph.clone(), Manager()
    manager.register_pass(ConstantFolding())
    manager.run_passes(floats)
    floats.set_rt_info("f32", PRECISION)
    return ExportedModule(floats)


def probes(model: ImageModel) -> list[Tensor]:
    """Inputs of one image and of two; where any size is taken, one of other proportions too."""
    example = model.example(1)
    rows, columns = example.shape[-2:]
    more = [example[..., : rows - rows // 4, : columns - columns // 8]] if model.any_size else []
    return [example, model.example(2), *more]


def compared(model: ImageModel, truth: Module, made: Module, tolerance: float) -> float:
    """The largest of all errors. Raises `LlmqError` for one beyond the tolerance."""
    worst = 0.0
    for x, i, off in errors(model, truth, made):
        if off != off:
            raise LlmqError(
                f"{model.title}: output {i} of the ONNX file is no number, as where rounding has made a divisor zero; "
                "keep such layers in float (ignored of quantize.int8)"
            )
        if off > tolerance:
            raise LlmqError(
                f"{model.title}: for an input {list(x.shape)} output {i} of the ONNX file is off by {off:.1e} of "
                f"the range of its values, more than {tolerance:.2g}"
            )
        worst = max(worst, off)
    return worst


def errors(model: ImageModel, truth: Module, made: Module) -> Iterator[tuple[Tensor, int, float]]:
    """Each probe, the number of an output, and the largest error of `made` there, as a share of the output's range."""
    for x in probes(model):
        with torch.inference_mode():
            pairs = enumerate(zip(*outputs(model, truth, made, x), strict=True))
        for i, (meant, found) in pairs:
            width = (meant.max() - meant.min()).clamp_min(1e-12)
            yield x, i, float((found - meant).abs().max() / width) if found.shape == meant.shape else float("inf")
