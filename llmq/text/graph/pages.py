"""Keys and values in pages, as OpenVINO GenAI keeps them: rows of tokens of any length beside one another, no padding.

Attention over a prompt takes an eighth of the time that it takes in a stateful graph (1,024 tokens, float32), and the
logits of a token are the same to the bit however the text before it was cut into parts.
"""

from __future__ import annotations

import warnings
import weakref
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from llmq.errors import LlmqError
from llmq.matrix.half_product import MULTIPLE, is_quick, product
from llmq.openvino_runtime import openvino

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from openvino import CompiledModel, InferRequest, Node
    from openvino import Model as Graph

PLACE = ["llmq", "attention"]
"""The place in a graph where an export says `stateful`: in pages its logits were others."""
WANTED = "kept"
"""The input that `to_pages` adds: the tokens whose logits are computed, counted over all rows."""
FED = {
    "input_ids", "position_ids", "max_context_len", "past_lens", "subsequence_begins", "block_indices_begins",
    "block_indices", WANTED,
}  # fmt: skip
CACHES = ("key_cache.", "value_cache.")
SPARE = 4
"""Pages that a row of tokens has in reserve when it begins."""


def to_pages(graph: Graph, head: Any) -> bool:
    """Turn a stateful graph into one with pages; False, and the graph is of no more use, where OpenVINO cannot.

    `head` finds the product of the output head in a graph.
    """
    from openvino import opset13 as op
    from openvino._offline_transformations import paged_attention_transformation

    try:
        paged_attention_transformation(graph)
    except RuntimeError:
        return False
    product = head(graph)
    if product is None:
        return False
    kept = op.parameter([-1], np.int64, name=WANTED)
    kept.output(0).get_tensor().set_names({WANTED})
    hidden = product.input_value(0)  # (tokens, 1, d)
    some = op.gather(hidden, kept, op.constant(np.array(0, np.int64)))
    product.input(0).replace_source_output(some.output(0))
    graph.add_parameters([kept])
    graph.validate_nodes_and_infer_types()
    return all(name in FED or name.startswith(CACHES) for given in graph.inputs for name in given.get_names())


class Store:
    """An inference request and its pages `(pages, groups, tokens of a page, d)`, for one batch after the other."""

    def __init__(self, compiled: CompiledModel):
        self.request: InferRequest = compiled.create_infer_request()
        self.ports = [given for given in compiled.inputs if given.get_any_name().startswith(CACHES)]
        self.names = {given.get_any_name() for given in compiled.inputs}
        self.tensors: list[Any] = []
        self.page = self.ports[0].get_partial_shape()[2].get_length()  # tokens
        self.pages = 0

    def grow(self, rows: int, before: int, after: int) -> None:
        """Give each row `after` pages in place of `before`, and keep what those hold."""
        library, old = openvino(), self.tensors
        self.tensors, self.pages = [], rows * after
        for i, port in enumerate(self.ports):
            inner = [length.get_length() for length in list(port.get_partial_shape())[1:]]
            tensor = library.Tensor(port.get_element_type(), library.Shape([rows * after, *inner]))
            if before:
                held = old[i].data[: rows * before].reshape(rows, before, *inner)
                tensor.data.reshape(rows, after, *inner)[:, :before] = held
            self.request.set_tensor(port, tensor)
            self.tensors.append(tensor)


class Pages:
    """The keys and values after some tokens of each row of a batch; a row owns as many pages as every other."""

    is_croppable = True

    def __init__(self, free: list[Store], compiled: CompiledModel, head: Head | None = None):
        self.head = head
        self.store = free.pop() if free else Store(compiled)
        self.seen = torch.zeros(0, 0, dtype=torch.bool)  # (rows, tokens), False for padding
        self.owned = 0  # pages of a row
        last = compiled.outputs[0].get_partial_shape()
        self.vocabulary = len(head.weight) if head else last[len(last) - 1].get_length()
        weakref.finalize(self, free.append, self.store)

    def get_seq_length(self, layer: int = 0) -> int:
        return self.seen.shape[1]

    @property
    def rows(self) -> int:
        return len(self.seen)

    def reorder_cache(self, rows: Tensor) -> None:
        """Let each row go on from the one that `rows` names."""
        before, after = self.rows * self.owned, len(rows) * self.owned  # pages
        if after > self.store.pages:
            self.store.grow(1, before, after)
        for tensor in self.store.tensors if before else ():
            held = tensor.data  # (pages, groups, tokens of a page, d)
            chosen = held[:before].reshape(self.rows, self.owned, -1)[rows.numpy()]
            held[:after] = chosen.reshape(after, *held.shape[1:])
        self.seen = self.seen[rows]

    def activate_past_recording(self) -> None:
        """Nothing: all keys and values are kept."""

    def crop(self, tokens: int) -> None:
        """Forget the last `-tokens` tokens, or all after the first `tokens`."""
        self.seen = self.seen[:, : tokens if tokens >= 0 else self.seen.shape[1] + tokens]

    def logits(self, ids: Tensor, mask: Tensor, positions: Tensor, kept: int) -> Tensor:
        """Read tokens `(rows, tokens)`; the logits `(rows, kept, vocabulary)` of the last `kept`, 0 for padding.

        Raises `LlmqError` for a mask that shows other tokens of before than it did: their pages cannot be left out.
        """
        rows, tokens = ids.shape
        new = mask[:, -tokens:].bool()
        if self.seen.numel() and not torch.equal(mask[:, :-tokens].bool(), self.seen):
            raise LlmqError(f"the mask of {self.seen.shape[1]} earlier tokens is another now; begin the text anew")
        past = self.seen.sum(1) if self.seen.numel() else torch.zeros(rows, dtype=torch.long)  # (rows,)
        self._make_room(rows, int((past + new.sum(1)).max()))
        read = new.any(1).nonzero()[:, 0]  # rows of padding alone are left out
        self.seen = torch.cat([self.seen if self.seen.numel() else new[:, :0], new], 1)
        if not len(read):
            return torch.zeros(rows, kept, self.vocabulary)
        lengths, before = new.sum(1)[read], past[read]
        used = [range(int(r) * self.owned, int(r) * self.owned - (-int(n) // self.store.page))
                for r, n in zip(read, before + lengths, strict=True)]  # fmt: skip
        places = torch.full((rows, tokens), -1)
        places[new] = torch.arange(int(lengths.sum()))
        wanted = places[:, tokens - kept :]  # (rows, kept)
        feeds = {
            "input_ids": ids[new].numpy(),
            "position_ids": positions[new].numpy(),
            "max_context_len": np.array(int((before + lengths).max()), np.int32),
            "past_lens": before.int().numpy(),
            "subsequence_begins": _begins(lengths),
            "block_indices_begins": _begins(torch.tensor([len(pages) for pages in used])),
            "block_indices": np.concatenate([np.arange(pages.start, pages.stop, dtype=np.int32) for pages in used]),
            WANTED: wanted[wanted >= 0].numpy(),
        }
        given = {name: np.asarray(each, order="C") for name, each in feeds.items() if name in self.store.names}
        made = self.store.request.infer(given, share_inputs=True, share_outputs=True)[0]  # (wanted, 1, vocabulary or d)
        if self.head is not None:
            made = self.head(made)
        if bool((wanted >= 0).all()):
            whole = made.reshape(rows, kept, made.shape[-1])
            # OpenVINO writes its next logits over these; those of a head are new.
            return torch.from_numpy(whole.copy() if self.head is None else whole)
        logits = torch.zeros(rows, kept, made.shape[-1])
        logits[wanted >= 0] = torch.from_numpy(made[:, 0])
        return logits

    def pack(self) -> None:
        """Let OpenVINO pack the weights, as its first pass does, while no activations lie beside both copies."""
        one = torch.ones(1, 1, dtype=torch.long)
        self.logits(0 * one, one, 0 * one, 0)

    def _make_room(self, rows: int, tokens: int) -> None:
        """Own pages for so many tokens a row."""
        needed = -(-tokens // self.store.page)
        if not self.owned and rows * needed <= self.store.pages:
            self.owned = self.store.pages // rows
        if needed > self.owned:
            more = max(needed, 2 * self.owned) if self.owned else needed + SPARE
            self.store.grow(rows, self.owned, more)
            self.owned = more


class Head:
    """The head of a graph, taken out of it: OpenVINO keeps it twice in float32, which is four times its float16."""

    def __init__(self, weight: Node):
        self.node = weight  # the numbers lie in its memory
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # the memory is read-only, and nobody writes
            self.weight = torch.from_numpy(weight.data)  # (vocabulary, d)

    def __call__(self, hidden: NDArray[np.float32]) -> NDArray[np.float32]:
        """The logits `(wanted, 1, vocabulary)` of hidden states `(wanted, 1, d)`."""
        made: NDArray[np.float32] = product(torch.from_numpy(hidden[:, 0]), self.weight).unsqueeze(1).numpy()
        return made


def without_head(graph: Graph, last: Node | None) -> Head | None:
    """Let a graph end in the hidden states, and return its head; None where the head does more than one product.

    The head must be the product with a weight in float16 that makes the logits, and its product quick enough here.
    """
    if last is None or not is_quick():
        return None
    results = [r for r in graph.get_results() if r.input_value(0).get_node().get_name() == last.get_name()]
    widened = last.input_value(1).get_node()
    weight = widened.input_value(0).get_node() if widened.get_type_name() == "Convert" else widened
    turned = last.get_attributes()
    fits = turned["transpose_b"] and not turned["transpose_a"] and weight.get_type_name() == "Constant"
    if len(results) != 1 or not fits or weight.get_element_type().get_type_name() != "f16":
        return None
    if weight.get_output_shape(0)[1] % MULTIPLE:
        return None
    results[0].input(0).replace_source_output(last.input_value(0))
    graph.validate_nodes_and_infer_types()
    return Head(weight)


def _begins(lengths: Tensor) -> NDArray[np.int32]:
    """Where each of some consecutive parts begins, and where the last one ends."""
    begins: NDArray[np.int32] = np.concatenate([[0], lengths.cumsum(0).numpy()]).astype(np.int32)
    return begins
