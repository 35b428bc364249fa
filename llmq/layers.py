"""Settings that differ from layer to layer: `modules: {down_proj: {bits: 8}, "layers.0.": skip}`."""

import re
from collections.abc import Callable, Iterable, Mapping
from typing import Annotated, Any, Literal, TypeVar

from pydantic import AfterValidator, BaseModel, BeforeValidator, ValidationError

from llmq.errors import UserError, did_you_mean

S = TypeVar("S", bound=BaseModel)


def _regular_expression(pattern: str) -> str:
    try:
        re.compile(pattern)
    except re.error as error:
        raise ValueError(f"{pattern!r} is no regular expression: {error}") from None
    return pattern


Pattern = Annotated[str, AfterValidator(_regular_expression)]
"""A regular expression that is searched for in the full name of a layer."""


def skip_or(cls: type[BaseModel]) -> BeforeValidator:
    """What reads the settings of one pattern: the word `skip`, or some of the settings of `cls`."""
    return BeforeValidator(_reader(cls))


def _reader(cls: type[BaseModel]) -> Callable[[Any], Any]:
    def read(value: Any) -> Any:
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

    return read


def settings_of(
    layers: Iterable[str], head: str | None, settings: S, modules: Mapping[str, Literal["skip"] | S]
) -> dict[str, S]:
    """The settings of each layer that is to be changed; the first pattern found in its name counts.

    The output head, where there is one apart, is changed only if a pattern asks for it. Raises `UserError` for a
    pattern that no layer matches.
    """
    names = [*layers, *([head] if head else [])]
    for pattern in modules:
        if not any(re.search(pattern, name) for name in names):
            words = {part for name in names for part in name.split(".") if not part.isdigit()}
            raise UserError(f"modules: no layer's name matches {pattern!r}{did_you_mean(pattern, words)}")
    found: dict[str, S] = {}
    for name in names:
        change = next((c for pattern, c in modules.items() if re.search(pattern, name)), None)
        if change == "skip" or (change is None and name == head):
            continue
        found[name] = settings if change is None else overridden(settings, change)
    return found


def overridden(settings: S, change: Any) -> S:
    """`settings` with what was set of `change`. Raises `ValueError` if the two do not go together."""
    both = {**settings.model_dump(exclude_unset=True), **change.model_dump(exclude_unset=True)}
    return type(settings).model_validate(both)
