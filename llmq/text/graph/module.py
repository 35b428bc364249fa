"""A graph of OpenVINO that behaves like an opened language model of transformers.

Keys and values lie in pages where OpenVINO can turn the graph so, else in its own state.
"""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from transformers import GenerationMixin, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from llmq import resident
from llmq.environment import library_version
from llmq.errors import LlmqError, UserError
from llmq.graph_weights import stored_weights
from llmq.guarded.graphs import check_graph
from llmq.openvino_runtime import EXACT, PRECISIONS, core, last_line, openvino
from llmq.text.graph.pages import PLACE, Pages, to_pages, without_head

if TYPE_CHECKING:
    from openvino import InferRequest, Node
    from openvino import Model as Graph
    from transformers import PretrainedConfig

KEPT = "logits_to_keep"
"""The input that `only_last` adds: the number of last positions whose logits are computed."""
NAMES = {"f32": "float32", "bf16": "bfloat16", "f16": "float16", "int8": "float32 with int8 activations"}


class GraphModel(PreTrainedModel, GenerationMixin):  # type: ignore[misc]
    """The graph in a folder, with logits in float32. Its weights are modules, for those who count them."""

    main_input_name = "input_ids"
    _supports_sdpa = True  # or transformers would refuse the configuration, which asks for attention that is faster

    def __init__(
        self,
        file: Path,
        config: PretrainedConfig,
        precision: str = "",
        refused: Mapping[int, str] = {},
    ):
        super().__init__(config)
        graph = _read(file)
        settings = dict(PRECISIONS[precision]) if precision else told_options(graph)
        self.precision = _name(settings)
        self.refused = refused
        self.weights = torch.nn.ModuleList(stored_weights(graph))
        stateful = graph.has_rt_info(PLACE)
        self.in_pages = not stateful and to_pages(graph, _head)
        self.head = without_head(graph, _head(graph)) if self.in_pages else None
        if not self.in_pages:
            graph = graph if stateful else _read(file)  # the attempt may have changed it
            only_last(graph)
        self.names = {name for given in graph.inputs for name in given.get_names()}
        threads = {"INFERENCE_NUM_THREADS": torch.get_num_threads(), "PERFORMANCE_HINT": "LATENCY"}
        try:
            self.compiled = core().compile_model(graph, "CPU", {**settings, **threads})
        except RuntimeError as error:
            raise LlmqError(
                f"OpenVINO {library_version('openvino')} cannot compile {str(file)!r}: {last_line(error)}"
            ) from None
        self.free: list[Any] = []
        """Requests that no text holds any more."""
        if self.in_pages:
            Pages(self.free, self.compiled, self.head).pack()
        resident.forget_file(file.with_suffix(".bin"))  # the numbers lie in another layout now
        resident.trim()
        self.eval()

    @property
    def device(self) -> torch.device:
        return torch.device("cpu")

    @property
    def dtype(self) -> torch.dtype:
        return torch.float32

    def _supports_default_dynamic_cache(self) -> bool:
        return False  # `forward` makes the cache

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: States | Pages | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int = 0,
        **_: object,
    ) -> CausalLMOutputWithPast:
        """The logits `[rows, tokens, vocabulary]` in new memory, and the states after these tokens.

        With `logits_to_keep` those of the last positions alone. Without a mask all tokens are seen. Raises `LlmqError`
        for another number of rows or tokens than the states hold.
        """
        rows, tokens = input_ids.shape
        states = past_key_values or (Pages(self.free, self.compiled, self.head) if self.in_pages else States(self))
        before, mask = states.get_seq_length(), attention_mask
        if before and rows != states.rows:
            raise LlmqError(f"{rows} rows cannot go on from the {states.rows} of the text before; begin the text anew")
        if mask is None:
            mask = torch.ones(rows, before + tokens, dtype=torch.long)
        if mask.shape != (rows, before + tokens):
            raise LlmqError(f"a mask of {tuple(mask.shape)} for {rows} rows of {before} tokens before and {tokens} now")
        if position_ids is None:
            position_ids = (mask.long().cumsum(-1) - 1).clamp_min(0)[:, -tokens:]
        self._check(input_ids)
        positions = position_ids.long().expand(rows, tokens)
        logits = states.logits(input_ids.long(), mask.long(), positions, min(logits_to_keep or tokens, tokens))
        return CausalLMOutputWithPast(logits=logits, past_key_values=None if use_cache is False else states)

    def _check(self, ids: Tensor) -> None:
        highest = int(ids.max()) if self.refused else -1
        if highest in self.refused:
            name = self.refused[highest]
            raise UserError(f"the text holds the token {name!r}, and the model has no embedding for it; take it out")


class States:
    """The keys and values after some tokens, held by the state of an inference request."""

    is_croppable = True

    def __init__(self, model: GraphModel):
        self.names = model.names
        self.request: InferRequest = model.free.pop() if model.free else model.compiled.create_infer_request()
        self.request.reset_state()
        self.rows = self.tokens = 0
        self.order: Tensor | None = None
        """The row that each row of the next call goes on from; as they are if None."""
        weakref.finalize(self, model.free.append, self.request)

    def get_seq_length(self, layer: int = 0) -> int:
        return self.tokens

    def reorder_cache(self, rows: Tensor) -> None:
        self.rows, self.order = len(rows), rows.to(torch.int32)

    def activate_past_recording(self) -> None:
        """Nothing: all keys and values are kept."""

    def crop(self, tokens: int) -> None:
        """Forget the last `-tokens` tokens, or all after the first `tokens`."""
        self.tokens = tokens if tokens >= 0 else self.tokens + tokens
        for state in self.request.query_state():
            kept = state.state.data[:, :, : self.tokens]  # (rows, groups, tokens, d)
            state.state = openvino().Tensor(np.ascontiguousarray(kept))

    def logits(self, ids: Tensor, mask: Tensor, positions: Tensor, kept: int) -> Tensor:
        """Read tokens `(rows, tokens)`; the logits `(rows, kept, vocabulary)` of the last `kept`."""
        given = {
            "input_ids": ids,
            "attention_mask": mask,
            "position_ids": positions,
            "beam_idx": self.order if self.order is not None else torch.arange(len(ids), dtype=torch.int32),
            KEPT: torch.tensor([kept]),
        }
        feeds = {name: np.ascontiguousarray(each.numpy()) for name, each in given.items() if name in self.names}
        made = self.request.infer(feeds, share_inputs=True, share_outputs=True)[0]
        self.rows, self.tokens, self.order = len(ids), self.tokens + ids.shape[1], None
        return torch.from_numpy(made[:, -kept:].copy())


def told_options(graph: Graph) -> dict[str, str]:
    """The options that a graph asks for itself; exact ones where it does not say."""
    places = {name: ["runtime_options", name] for name in EXACT}
    said = {name: graph.get_rt_info(place).astype(str) for name, place in places.items() if graph.has_rt_info(place)}
    return {**EXACT, **said}


def _name(settings: dict[str, str]) -> str:
    """The precision in words. A processor without bfloat16 computes in float32, as OpenVINO would silently."""
    hint = settings["INFERENCE_PRECISION_HINT"]
    able = core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")
    if hint != "f32" and {"bf16": "BF16", "f16": "FP16"}[hint] not in able:
        settings["INFERENCE_PRECISION_HINT"] = hint = "f32"
    known = next((NAMES[name] for name, options in PRECISIONS.items() if options == settings), "")
    return known or f"{NAMES[hint]}, keys and values {settings['KV_CACHE_PRECISION']}"


def _read(file: Path) -> Graph:
    check_graph(file)
    try:
        return core().read_model(file)
    except RuntimeError as error:
        raise UserError(
            f"{str(file)!r} is no whole graph of OpenVINO: {last_line(error)}; make the stage again"
        ) from None


def only_last(graph: Graph) -> None:
    """Let the head of a graph read the last positions alone, as many as a new input says, if a head is found."""
    from openvino import opset13 as op

    head = _head(graph)
    if head is None:
        return
    kept = op.parameter([1], np.int64, name=KEPT)
    kept.output(0).get_tensor().set_names({KEPT})
    start = op.negative(kept)
    end, step, axis = (op.constant(np.array([n], np.int64)) for n in (np.iinfo(np.int64).max, 1, 1))
    hidden = head.input_value(0)  # (rows, tokens, d)
    head.input(0).replace_source_output(op.slice(hidden, start, end, step, axis).output(0))
    graph.add_parameters([kept])
    graph.validate_nodes_and_infer_types()


def _head(graph: Graph) -> Node | None:
    """The product that makes the logits, from three axes; None where none is found."""
    named = any("logits" in made.get_names() for made in graph.outputs)
    node = graph.output("logits").get_node() if named else graph.outputs[0].get_node()
    for _ in range(8):  # a bias, a scale, a soft cap
        if node.get_type_name() == "MatMul":
            return node if len(node.input_value(0).get_partial_shape()) == 3 else None
        node = node.input_value(0).get_node()
    return None
