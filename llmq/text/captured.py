"""The step of one token of a packed model, captured: the same operations, without Python between them.

Of the time of such a step the modules and functions of transformers take about a half. PyTorch's tracer records the
step at one token; whatever would make a record of another token another one (a branch on a number, a loop over experts
that were chosen) it warns of, and then nothing is captured.
"""

from __future__ import annotations

import operator
import warnings
from contextlib import contextmanager
from functools import partial, wraps
from itertools import chain
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.jit import TracerWarning, optimized_execution  # type: ignore[attr-defined]
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer
from transformers.modeling_outputs import CausalLMOutputWithPast

from llmq.matrix.packed_linear import PackedLinear
from llmq.text.attention import distance, exchanged, why_fixed

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from transformers import PreTrainedModel

WAIT = 8
"""Steps that a model takes before one is captured, which costs about as long as 20 of them."""
APART = 0.02
"""The largest difference of logits from the model's own, relative to the largest: bfloat16 sums in another order."""
TAKEN = {"input_ids", "attention_mask", "position_ids", "past_key_values", "use_cache", "logits_to_keep", "return_dict"}
"""The arguments of a forward pass that a captured step heeds."""


def capture_steps(module: PreTrainedModel) -> None:
    """Let a model with packed layers on a processor write each token by a captured step, where it gives the same."""
    packed = any(isinstance(layer, PackedLinear) and len(layer.planes) for layer in module.modules())
    if packed and not why_fixed(module, ()):
        steps = _Steps(module)

        @wraps(module.forward)  # its signature says what the model takes
        def forward(*args: object, **given: Any) -> object:
            return steps.forward(*args, **given)

        module.forward = forward


class _Steps:
    """The forward pass of a model, by its captured step where one token follows a cache of all tokens before it."""

    def __init__(self, module: PreTrainedModel):
        self.module = module
        self.stock = module.forward
        self.step: Any = None
        self.modules = list(module.modules())
        self.holders = [held for m in self.modules for held in (m._modules, m._parameters, m._buffers)]
        self.parts = self._parts()
        self.wait = WAIT

    def forward(self, *args: object, **given: Any) -> object:
        if args or self.wait < 0 or not self._fits(given):
            return self.stock(*args, **given)
        if self.wait:
            self.wait -= 1
            return self.stock(**given)
        cache = given["past_key_values"]
        if self.step is None:
            self.step = self._captured(given["input_ids"], cache)
            self.wait = 0 if self.step else -1
            if self.step is None:
                return self.stock(**given)
        with optimized_execution(False):  # or it would be looked at for a second at the next two tokens
            logits, *states = self.step(given["input_ids"], _position(cache), *_states(cache))
        for layer, keys, values in zip(cache.layers, states[::2], states[1::2], strict=True):
            layer.keys, layer.values = keys, values
        return CausalLMOutputWithPast(logits=logits, past_key_values=cache)

    def _fits(self, given: dict[str, Any]) -> bool:
        """True for one token after a cache of plain keys and values, all of them seen, at the place after them."""
        ids, cache, mask = (given.get(name) for name in ("input_ids", "past_key_values", "attention_mask"))
        if torch.is_grad_enabled() or ids is None or ids.shape != (1, 1) or not isinstance(cache, DynamicCache):
            return False
        if any(value is not None for name, value in given.items() if name not in TAKEN):
            return False
        if given.get("use_cache") is False or given.get("return_dict") is False or not _is_plain(cache):
            return False
        place = given.get("position_ids")
        if place is not None and int(place) != cache.get_seq_length():
            return False
        if mask is not None and (mask.shape != (1, cache.get_seq_length() + 1) or not bool(mask.all())):
            return False
        # A captured step knows nothing of layers and weights that were exchanged, for those of an adapter say.
        now = self._parts()
        if len(now) != len(self.parts) or not all(map(operator.is_, now, self.parts)):
            return False
        return not any(m._forward_hooks or m._forward_pre_hooks or m.training for m in self.modules)

    def _parts(self) -> list[object]:
        """All layers and weights; a captured step holds these very ones."""
        return list(chain.from_iterable(held.values() for held in self.holders))

    def _captured(self, ids: Tensor, cache: DynamicCache) -> Any:
        """The step as a graph of PyTorch's, or None where a graph would not give what the model gives."""
        position, states = _position(cache), _states(cache)
        asked = {name: p for name, p in self.module.named_parameters() if p.requires_grad}
        try:
            for parameter in asked.values():  # the tracer takes no others for constants
                parameter.requires_grad_(False)
            with (
                exchanged(self.module, _attention),
                _one_row(self.module),
                warnings.catch_warnings(record=True) as said,
            ):
                warnings.simplefilter("always")
                step = _recorded(self._stepped, (ids, position, *states))
                own, *_ = self._stepped(ids, position, *states)
        except (RuntimeError, TypeError, ValueError):
            return None
        finally:
            for parameter in asked.values():
                parameter.requires_grad_(True)
        if any(issubclass(warning.category, TracerWarning) for warning in said):
            return None
        with optimized_execution(False):
            made, *_ = step(ids, position, *states)
        return step if distance(made, own) <= APART else None

    def _stepped(self, ids: Tensor, position: Tensor, *states: Tensor) -> tuple[Tensor, ...]:
        """The logits `(1, 1, vocabulary)` after a token, and keys and values `(1, groups, tokens, d)` of all layers."""
        cache = DynamicCache(config=self.module.config)
        for layer, keys, values in zip(cache.layers, states[::2], states[1::2], strict=True):
            layer.dtype, layer.device, layer.is_initialized = keys.dtype, keys.device, True
            layer.keys, layer.values = keys, values
        logits = self.stock(input_ids=ids, position_ids=position, past_key_values=cache, use_cache=True).logits
        return logits, *_states(cache)


def _recorded(run: Callable[..., Any], inputs: tuple[Tensor, ...]) -> Any:
    """The operations of one call as a function of their own.

    `torch.jit.trace` adds each function, whose constants are the weights, to a list that lives as long as the process.
    """
    graph, _ = torch._C._create_graph_by_tracing(run, inputs, lambda _: "", strict=True, force_outplace=False)
    return torch._C._create_function_from_graph("step", graph)


def _attention(
    layer: object, query: Tensor, key: Tensor, value: Tensor, mask: object, scaling: float, **more: object
) -> tuple[Tensor, None]:
    """Attention of one query to all keys: query (1, heads, 1, d); key, value (1, groups, tokens, d)."""
    _, heads, _, d = query.shape
    groups = key.shape[1]
    # The heads of a group share their keys.
    mixed = torch.nn.functional.scaled_dot_product_attention(
        query.reshape(1, groups, heads // groups, d), key, value, scale=scaling
    )
    return mixed.reshape(1, 1, heads, value.shape[-1]), None


@contextmanager
def _one_row(module: PreTrainedModel) -> Iterator[None]:
    """Let packed layers multiply one row without counting rows, which the tracer would warn of.

    It would warn of the check of a padding token as well, which matters to gradients alone.
    """
    embeddings: Any = module.get_input_embeddings()
    padding, embeddings.padding_idx = getattr(embeddings, "padding_idx", None), None
    layers = [layer for layer in module.modules() if isinstance(layer, PackedLinear) and len(layer.planes)]
    for layer in layers:
        layer.forward = partial(_product, layer)  # type: ignore[method-assign]
    try:
        yield
    finally:
        embeddings.padding_idx = padding
        for layer in layers:
            del layer.forward  # of the instance: the method of the class comes back


def _product(layer: PackedLinear, row: Tensor) -> Tensor:
    return layer.product(row.reshape(1, layer.in_features)).view(1, 1, layer.out_features)


def _is_plain(cache: DynamicCache) -> bool:
    return bool(cache.layers) and all(type(layer) is DynamicLayer and layer.is_initialized for layer in cache.layers)


def _states(cache: DynamicCache) -> Sequence[Tensor]:
    return [states for layer in cache.layers for states in (layer.keys, layer.values)]


def _position(cache: DynamicCache) -> Tensor:
    return torch.tensor([[cache.get_seq_length()]])
