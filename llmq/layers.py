"""Changes of a model, layer by layer.

Settings may differ by layer: `modules: {down_proj: {bits: 8}, layers.0: skip}`. A `LayerChange` applies them.
"""

import re
from collections.abc import Collection, Iterable, Mapping
from typing import TYPE_CHECKING, Annotated, Generic, Literal, Protocol, TypeVar

from pydantic import AfterValidator, BaseModel, BeforeValidator, ValidationError

from llmq.errors import UserError, did_you_mean

if TYPE_CHECKING:
    from torch import Tensor

    from llmq.matrix.gram import Kind

S = TypeVar("S", bound=BaseModel)
By = TypeVar("By", bound=BaseModel, covariant=True)
"""The settings by which a layer is changed."""


WITHIN_NO_NUMBER = r"(?:(?<!\d)|(?!\d))"
"""A place that does not lie between two digits."""


def matches(pattern: str, name: str) -> bool:
    """True if a pattern is found in the full name of a layer.

    A pattern is a regular expression whose dots are those of the name and whose numbers are whole: `layers.1` is block
    1, never 10. What may be anything is `.*`, as everywhere; also after a number it begins beyond the number.
    """
    return re.search(_expression(pattern), name) is not None


def check_matched(setting: str, patterns: Iterable[str], names: Collection[str]) -> None:
    """Raise `UserError` for the first pattern of a setting that none of the names matches."""
    for pattern in patterns:
        if not any(matches(pattern, name) for name in names):
            # The parts of names to suggest, without the numbers of blocks.
            words = {part for name in names for part in name.split(".") if not part.isdigit()}
            raise UserError(f"{setting}: no layer's name matches {pattern!r}{did_you_mean(pattern, words)}")


def _expression(pattern: str) -> str:
    """The regular expression that a pattern stands for."""
    dots = {".": r"\.", "any": r"(?!\d)."}
    escaped_any_or_dot = r"(\\.)|(?P<any>(?<=\d)\.(?=[*+?{]))|\.(?![*+?{])"
    literal = re.sub(escaped_any_or_dot, lambda m: m[1] or dots["any" if m["any"] else "."], pattern)
    return f"{WITHIN_NO_NUMBER}(?:{literal}){WITHIN_NO_NUMBER}"


def _regular_expression(pattern: str) -> str:
    try:
        re.compile(pattern)
        re.compile(_expression(pattern))
    except re.error as error:
        raise ValueError(f"{pattern!r} is no regular expression: {error}") from None
    return pattern


Pattern = Annotated[str, AfterValidator(_regular_expression)]
"""A pattern of the names of layers, see `matches`."""


def skip_or(cls: type[BaseModel]) -> BeforeValidator:
    """A validator that reads the settings of one pattern: the word `skip`, or some of the settings of `cls`."""

    def read(value: object) -> object:
        if value == "skip" or isinstance(value, cls):
            return value
        if not isinstance(value, dict):
            raise ValueError(f"{value!r} is neither 'skip' nor settings: {', '.join(cls.model_fields)}")
        try:
            return cls.model_validate(value)
        except ValidationError as error:
            first = error.errors()[0]
            key = ".".join(map(str, first["loc"]))
            if first["type"] == "extra_forbidden":
                raise ValueError(f"unknown key {key!r}{did_you_mean(key, cls.model_fields)}") from None
            message = first["msg"].removeprefix("Value error, ")
            raise ValueError(f"{key}: {first['input']!r} is wrong: {message}" if key else message) from None

    return BeforeValidator(read)


def settings_of(
    layers: Iterable[str], head: str | None, settings: S, modules: Mapping[str, Literal["skip"] | S]
) -> dict[str, S]:
    """The settings of each layer to be changed, by the first pattern that matches the name of the layer.

    An output head of its own is changed only if a pattern names the head. Raises `UserError` for a pattern that no
    layer matches.
    """
    names = [*layers, *([head] if head else [])]
    check_matched("modules", modules, names)
    by_layer: dict[str, S] = {}
    for name in names:
        change = next((c for pattern, c in modules.items() if matches(pattern, name)), None)
        # The word `skip` is neither of the two: the layer keeps its weights.
        if isinstance(change, BaseModel):
            by_layer[name] = overridden(settings, change)
        elif change is None and name != head:
            by_layer[name] = settings
    return by_layer


def overridden(settings: S, change: BaseModel) -> S:
    """`settings` with the set fields of `change`. Raises `ValueError` if the two do not go together."""
    # Set fields only: defaults override nothing.
    both = {**settings.model_dump(exclude_unset=True), **change.model_dump(exclude_unset=True)}
    return type(settings).model_validate(both)


class Layers(Protocol):
    """The layers of a model of any family, for a step that changes weights and no shape."""

    @property
    def head(self) -> str | None:
        """The name of the output head; None for a model without a head of its own."""

    @property
    def inputs(self) -> Mapping[str, int]:
        """The number of inputs of each layer."""

    def check_layers(self) -> None:
        """Raise `UserError` if most weights lie in no layer that can be changed."""

    def share(self, layers: Iterable[str]) -> float:
        """The share of these layers in the weights of all that can be changed."""


class LayerChange(Generic[By]):
    """A change of the layers that have `settings`. Layers that are given the same input are changed together."""

    gathers: "Kind | None" = None
    """The sum over the inputs of a group that `change` needs; None needs no calibration."""
    rescales: bool = False
    """True where a rehearsal of the block scales the inputs of each group, before `change` settles the group."""
    without_feeder = 0
    """The number of groups whose inputs could not be scaled: no layer was found to take the inverse."""

    by_loss: bool = False
    """True where the sum weighs each token by the squared gradient of the loss at the outputs of its layer."""

    def __init__(self, settings: Mapping[str, By], by_loss: bool = False):
        self.settings, self.by_loss = settings, by_loss

    def wants(self, layer: str) -> bool:
        return layer in self.settings

    def scales(self, layers: "Mapping[str, Tensor]", gram: "Tensor", magnitudes: "Tensor") -> "Tensor":
        """The factors `[inputs]` of the weights of a group; the layer that feeds the group is divided by the factors.

        `gram` `[inputs, inputs]` is the sum of `x x^T` over the inputs of the calibration, `magnitudes` that of `|x|`.
        """
        raise NotImplementedError

    def change(self, layers: "Mapping[str, Tensor]", total: "Tensor | None") -> "Mapping[str, Mapping[str, Tensor]]":
        """The tensors to write for each layer of a group, from weights `[outputs, inputs]` and the sum over inputs."""
        raise NotImplementedError

    def weight(self, layer: str, tensors: "Mapping[str, Tensor]") -> "Tensor":
        """The weight `[outputs, inputs]` that the written tensors of a layer stand for."""
        return tensors["weight"]

    def bits(self, layer: str) -> int | None:
        """The bits of a weight of the layer; None for a change that leaves the format of the weights."""
        return None

    def facts(self, layer: str, before: "Tensor", made: "Tensor", total: "Tensor | None") -> dict[str, object]:
        """The facts about a changed layer for `layers.json` (`matrix.layer_error`).

        `total` is the sum over the inputs of the layer; a layer that no token reached is judged by its weights.
        """
        from llmq.matrix.layer_error import layer_facts

        reached = total if total is not None and self.gathers != "magnitudes" and bool(total.any()) else None
        return layer_facts(before, made, self.bits(layer), reached)
