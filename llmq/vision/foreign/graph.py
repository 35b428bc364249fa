"""A file of ONNX or OpenVINO as a graph for OpenVINO: read, given the usual layout, and written into a folder."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import TYPE_CHECKING

from llmq.errors import UserError
from llmq.files import at_home
from llmq.guarded.files import read_json_object
from llmq.openvino_runtime import GRAPH, core, last_line, openvino, write_graph
from llmq.vision.onnx.library import SETTINGS

if TYPE_CHECKING:
    from collections.abc import Iterator

    from openvino import Model

    from llmq.types import JsonObject

SUFFIXES = (".onnx", ".xml")
FEWEST = 16
"""The whole numbers from black to white that are enough for an image."""


def check_file(weights: str) -> Path:
    """The path of a graph. Raises `UserError` for a file that is not there, or not of a known kind."""
    path = at_home(weights)
    if path.suffix not in SUFFIXES:
        raise UserError(f"{weights!r} is no .onnx file and no .xml of OpenVINO")
    if not path.is_file():
        raise UserError(f"there is no file {weights!r}")
    if path.suffix == ".xml":
        from llmq.guarded.graphs import check_graph

        check_graph(path)
    return path


def files_of(path: Path) -> list[Path]:
    """The files of a graph: with OpenVINO's `.bin`, or what an `.onnx` file names as the place of its weights.

    Raises `UserError` for weights that are not there. OpenVINO refuses those outside the folder.
    """
    if path.suffix == ".xml":
        return [path, path.with_suffix(".bin")]
    beside = [path.parent / name for name in sorted(set(_places(path.read_bytes())))]
    if lost := [file.name for file in beside if not file.is_file()]:
        raise UserError(f"{str(path)!r} keeps weights in {lost[0]!r}, and no such file lies beside it")
    return [path, *beside]


def _places(content: bytes) -> Iterator[str]:
    """The files that hold tensors of an ONNX graph: the values of `location` in its `TensorProto.external_data`.

    An entry is a protobuf message {1: "location", 2: name}; a name of 128 bytes and more has a length of two bytes.
    """
    for found in re.finditer(rb"\x0a\x08location\x12([\x80-\xff]?[\x00-\x7f])", content):
        length = sum((byte & 127) << 7 * i for i, byte in enumerate(found[1]))
        yield content[found.end() : found.end() + length].decode(errors="replace")


def read(path: Path) -> Model:
    """The graph in a file, which has one input. Raises `UserError` for others."""
    from llmq.vision import apart

    apart.check_reads(path)  # a crash of native code ends another process
    try:
        graph = core().read_model(path)
    except RuntimeError as error:
        raise UserError(f"{str(path)!r} is no graph that OpenVINO reads: {last_line(error)}") from None
    if len(graph.inputs) != 1:
        shapes = ", ".join(f"{i.any_name} {i.partial_shape}" for i in graph.inputs)
        raise UserError(f"{str(path)!r} has {len(graph.inputs)} inputs ({shapes}), and one is needed")
    return graph


def settings_of(graph: Model, path: Path) -> JsonObject:
    """The settings that `export.onnx` wrote into a file, or those of the stage that a file lies in.

    Empty for a file of another maker.
    """
    place, stage = ["framework", SETTINGS], path.with_name("artifact.json")
    try:
        if graph.has_rt_info(place):
            told = json.loads(graph.get_rt_info(place).astype(str))
        else:
            told = read_json_object(stage).get("model") if path.name == GRAPH and stage.is_file() else None
    except ValueError:
        return {}
    settings = next(iter(told.values()), None) if isinstance(told, dict) else None
    return settings if isinstance(settings, dict) else {}


def of_images(graph: Model, path: Path, channels_last: bool, value_range: tuple[float, float]) -> Model:
    """The graph for float32 images, channels before rows and columns. Raises `UserError` for others.

    Whole numbers as input need a `value_range` that rounding leaves something of.
    """
    kind = graph.input(0).element_type
    if kind.is_integral() and abs(value_range[1] - value_range[0]) < FEWEST:
        raise UserError(
            f"{str(path)!r} takes {kind.get_type_name()} numbers, and value_range {list(value_range)} leaves few of "
            "them; set value_range: [0, 255]"
        )
    prepared = openvino().preprocess.PrePostProcessor(graph)
    prepared.input().tensor().set_element_type(openvino().Type.f32)
    if channels_last:
        prepared.input().tensor().set_layout(openvino().Layout("NCHW"))
        prepared.input().model().set_layout(openvino().Layout("NHWC"))
    return prepared.build()


def of_latents(graph: Model, path: Path, channels_last: bool) -> Model:
    """The graph for float32 latents, images with channels before rows and columns. Raises `UserError` for others."""
    if (kind := graph.input(0).element_type).is_integral():
        raise UserError(f"{str(path)!r} takes {kind.get_type_name()} numbers, and latents are no whole numbers")
    if len(graph.outputs) != 1 or graph.output(0).partial_shape.rank != openvino().Dimension(4):
        shapes = ", ".join(str(output.partial_shape) for output in graph.outputs)
        raise UserError(f"{str(path)!r} answers with {shapes}, and a gan gives one output, images")
    prepared = openvino().preprocess.PrePostProcessor(graph)
    prepared.input().tensor().set_element_type(openvino().Type.f32)
    prepared.output().tensor().set_element_type(openvino().Type.f32)
    if channels_last:
        prepared.output().model().set_layout(openvino().Layout("NHWC"))
        prepared.output().tensor().set_layout(openvino().Layout("NCHW"))
    return prepared.build()


def with_latent(graph: Model, weights: str, latent: tuple[int, ...]) -> Model:
    """The graph for latents of one shape. Raises `UserError` that tells the real shape."""
    shape = graph.input(0).partial_shape
    if not shape.compatible(openvino().PartialShape([1, *latent])):
        raise UserError(f"{weights!r} takes {shape}, and one latent of {list(latent)} does not fit")
    graph.reshape([-1 if shape.rank.is_dynamic or shape[0].is_dynamic else 1, *latent])
    return graph


def with_size(graph: Model, weights: str, channels: int, size: tuple[int, int] | None) -> Model:
    """The graph for images of one size, or of any with no `size`. Raises `UserError` that tells the real shape."""
    shape = graph.input(0).partial_shape
    wanted = [channels, *(size or (-1, -1))]
    fits = shape.rank.get_length() == 4 and shape[0].compatible(openvino().Dimension(1))
    fits = fits and shape[1].compatible(openvino().Dimension(channels))
    fits = fits and (size is None or all(shape[2 + i].compatible(openvino().Dimension(n)) for i, n in enumerate(size)))
    if not fits:
        told = " x ".join(map(str, size)) if size else "any size"
        raise UserError(
            f"{weights!r} takes {shape} (images, channels, rows, columns), and these settings give {channels} channels "
            f"of {told}; set size, colours or layout"
        )
    batch = -1 if shape[0].is_dynamic else 1
    try:
        graph.reshape([batch, *wanted])
    except RuntimeError as error:
        raise UserError(f"{weights!r} takes no images of {told_size(size)}: {last_line(error)}") from None
    return graph


def boxes_first(graph: Model, weights: str) -> Model:
    """The graph with three outputs in the order boxes, scores, labels. Labels are whole numbers, or named so.

    Raises `UserError` where neither type nor name tells which output holds the labels.
    """
    outputs = list(graph.outputs)
    if len(outputs) != 3:
        return graph
    corners = [o for o in outputs if o.partial_shape.rank.get_length() > 1 and str(o.partial_shape[-1]) == "4"]
    others = [o for o in outputs if o not in corners]
    labels = [o for o in others if o.element_type.is_integral()]
    labels = labels or [o for o in others if {"label", "class"} & set(re.findall("label|class", str(o.names).lower()))]
    if len(corners) != 1 or len(labels) != 1:
        told = ", ".join(f"{o.any_name} {o.partial_shape} {o.element_type.get_type_name()}" for o in outputs)
        raise UserError(f"{weights!r} answers with {told}: which of them are boxes, scores and labels is not told")
    scores = next(o for o in others if o not in labels)
    nodes = [o.get_node() for o in (corners[0], scores, labels[0])]
    return openvino().Model(nodes, graph.get_parameters())


def told_size(size: tuple[int, int] | None) -> str:
    """A size in words."""
    return f"{size[0]} x {size[1]}" if size else "any size"


def written(graph: Model, folder: Path) -> None:
    """Write a graph to a folder, and compare what the file holds."""
    from llmq.vision.exporting import check_written

    write_graph(graph, folder / GRAPH)
    check_written(graph, folder / GRAPH)
