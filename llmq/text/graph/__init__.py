"""The way from a decoder of transformers to a stateful graph of OpenVINO, with keys and values inside.

OpenVINO's PyTorch frontend traces the network as a function of all keys and values before; then these become states of
the graph. Packed layers keep their codes (`graph_weights`).
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from transformers.cache_utils import DynamicCache, DynamicLayer

from llmq.errors import UserError
from llmq.openvino_runtime import openvino, quietly
from llmq.text.graph.weights import in_float16, packed_extensions, restore

if TYPE_CHECKING:
    from openvino import Model as Graph
    from transformers import PreTrainedModel

PROVEN = (
    "bloom", "cohere", "falcon", "gemma2", "gemma3_text", "gpt2", "gpt_neox", "gptj", "granite", "llama", "mistral",
    "mpt", "olmo", "opt", "phi", "phi3", "qwen2", "qwen3", "smollm3", "stablelm", "starcoder2",
)  # fmt: skip
"""The architectures of which a tiny random model gives the same logits as a graph (`tests/test_export_openvino.py`)."""
INPUTS = ("input_ids", "attention_mask", "position_ids", "beam_idx")
OF_LENGTH = ("dynamic", "longrope")
"""Rotary positions whose angles depend on the length of the text: a trace would fix those of one length."""
Shape = tuple[int, ...]


class Stateless(nn.Module):
    """A decoder as a function: ids, mask, positions, order of the rows, keys and values -> logits, keys and values.

    ids (rows, tokens), mask (rows, tokens before and now), positions as ids, order (rows,); keys and values of each
    layer in turn (rows, groups, tokens, d).
    """

    def __init__(self, module: PreTrainedModel):
        super().__init__()
        self.module = module
        self.placed = takes_positions(module)

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, position_ids: Tensor, beam_idx: Tensor, past: list[Tensor]
    ) -> tuple[Tensor, ...]:
        past = [each.index_select(0, beam_idx) for each in past]
        cache = DynamicCache()
        for keys, values in zip(past[::2], past[1::2], strict=True):
            layer = DynamicLayer()  # a cache made of pairs would join an empty tensor to each
            layer.lazy_initialization(keys, values)
            layer.keys, layer.values = keys, values
            cache.layers.append(layer)
        placed = {"position_ids": position_ids} if self.placed else {}
        made = self.module(
            input_ids=input_ids, attention_mask=attention_mask, past_key_values=cache, use_cache=True, **placed
        )
        kept = (each for layer in made.past_key_values.layers for each in (layer.keys, layer.values))
        return (made.logits.float(), *kept)


def graph_of(module: PreTrainedModel) -> Graph:
    """The stateful graph of a module in float32, whose matrices are then float16, or packed as they were.

    The weights of the module are rounded to float16 as well. Raises `UserError` for an architecture that fails.
    """
    kind = module.config.model_type
    _check_positions(module)
    in_float16(module)
    try:
        with quietly(), torch.no_grad():
            shapes = _kept_by(module)
            graph = _traced(module, shapes)
        _name(graph, shapes)
        return _stateful(graph, shapes)
    except (RuntimeError, ValueError, TypeError, openvino().frontend.OpConversionFailure) as error:
        raise UserError(f"{kind!r} cannot be exported to OpenVINO ({_reason(error)}); {works()}") from None


def takes_positions(module: PreTrainedModel) -> bool:
    """True if the places of tokens can be told to a model; other models count the tokens that the mask shows."""
    return "position_ids" in inspect.signature(module.forward).parameters


def works() -> str:
    """The architectures that are known to work, in words."""
    return f"what works is {', '.join(PROVEN)}"


def _reason(error: Exception) -> str:
    told = " ".join(str(error).split())
    return told[max(0, told.find("No conversion rule")) :][:120]


def _check_positions(module: PreTrainedModel) -> None:
    found: list[object] = [getattr(module.config.get_text_config(), "rope_parameters", None)]
    for settings in found:
        if isinstance(settings, Mapping):
            found += settings.values()
            if (kind := settings.get("rope_type")) in OF_LENGTH:
                raise UserError(
                    f"the rotary positions of {module.config.model_type!r} are {kind!r}: they change with the length "
                    "of the text, which a graph cannot follow; export.gguf may"
                )


def _kept_by(module: PreTrainedModel) -> list[Shape]:
    """The shapes of the keys and values of every layer. Raises `ValueError` for a model that keeps anything else."""
    made = module(input_ids=torch.ones(1, 2, dtype=torch.long), use_cache=True)
    layers = getattr(getattr(made, "past_key_values", None), "layers", [])
    if not layers or not all(isinstance(layer, DynamicLayer) for layer in layers):
        raise ValueError("it keeps other things than keys and values")
    return [tuple(each.shape) for layer in layers for each in (layer.keys, layer.values)]


def _traced(module: PreTrainedModel, shapes: Sequence[Shape]) -> Graph:
    # Two rows, two tokens and three before them: a trace of one would fix branches on a length of one.
    example = {
        "input_ids": torch.ones(2, 2, dtype=torch.long),
        "attention_mask": torch.ones(2, 5, dtype=torch.long),
        "position_ids": torch.arange(3, 5).repeat(2, 1),
        "beam_idx": torch.arange(2, dtype=torch.int32),
        "past": [torch.zeros(2, groups, 3, d) for _, groups, _, d in shapes],
    }
    extension = packed_extensions(module)
    try:
        graph: Graph = openvino().convert_model(Stateless(module), example_input=example, extension=extension)
    finally:
        restore(module)
    return graph


def _name(graph: Graph, shapes: Sequence[Shape]) -> None:
    """Name and shape all inputs and outputs. Raises `ValueError` for stray ones: the trace then fixed some value."""
    of_state = iter(range(len(shapes)))
    for given in graph.inputs:
        name = next(iter(given.get_names() & set(INPUTS)), "")
        number = -1 if name else next(of_state, len(shapes))
        if number == len(shapes):
            raise ValueError(f"stray input {sorted(given.get_names())}")
        given.get_tensor().set_names({name or f"past.{number}"})
        dims = [-1] if name == "beam_idx" else [-1, -1] if name else [-1, shapes[number][1], -1, shapes[number][3]]
        given.get_node().set_partial_shape(openvino().PartialShape(dims))
    lost = [name for name in INPUTS if not any(name in given.get_names() for given in graph.inputs)]
    if lost or next(of_state, None) is not None or len(graph.outputs) != 1 + len(shapes):
        raise ValueError(f"its trace lost {lost[0] if lost else 'keys or values'}")
    for number, made in enumerate(graph.outputs):
        made.get_tensor().set_names({f"present.{number - 1}" if number else "logits"})
    graph.validate_nodes_and_infer_types()


def _stateful(graph: Graph, shapes: Sequence[Shape]) -> Graph:
    """The graph with keys and values as states, which begin with no tokens."""
    import numpy as np
    from openvino import opset13 as op
    from openvino._offline_transformations import apply_make_stateful_transformation

    apply_make_stateful_transformation(graph, {f"past.{i}": f"present.{i}" for i in range(len(shapes))})
    rows = op.gather(op.shape_of(graph.input("input_ids"), output_type="i64"), op.constant([0]), op.constant(0))
    for node in graph.get_ops():
        if node.get_type_name() == "ReadValue":
            _, groups, _, d = node.get_output_partial_shape(0)
            inner = np.array([groups.get_length(), 0, d.get_length()], np.int64)
            node.set_arguments([op.broadcast(op.constant(np.float32(0)), op.concat([rows, op.constant(inner)], 0))])
    graph.validate_nodes_and_infer_types()
    return graph
