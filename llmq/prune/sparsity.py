"""What the pruning of single weights shares: its settings, its checks, the dense checkpoint it writes."""

import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from llmq.artifact import Artifact
from llmq.errors import UserError
from llmq.layers import Pattern, overridden, settings_of, skip_or
from llmq.models.matrices import Matrices
from llmq.models.skeleton import Skeleton
from llmq.types import Context, Step

GROUPS = (2, 4, 8, 16, 32)


class Sparsity(BaseModel):
    """How many weights go, and in what pattern."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    sparsity: float = Field(0.5, ge=0, le=0.95, description="share of the weights that become zero")
    pattern: str = Field("unstructured", description="or n:m, such as 2:4: n of every m neighbouring inputs stay")

    @field_validator("pattern", mode="before")
    @classmethod
    def _pattern_is_quoted(cls, value: Any) -> Any:
        if isinstance(value, int):  # YAML takes 2:4 for two minutes and four seconds
            raise ValueError(
                f"{value} is what YAML makes of {value // 60}:{value % 60}; write it in quotes, "
                f"'{value // 60}:{value % 60}'"
            )
        return value

    @model_validator(mode="after")
    def _pattern_is_known(self) -> "Sparsity":
        if self.of_each is None:
            if self.pattern != "unstructured":
                raise ValueError(f"pattern {self.pattern!r} is neither 'unstructured' nor n:m, such as '2:4'")
            return self
        stay, among = self.of_each
        if among not in GROUPS or not 0 < stay < among:
            raise ValueError(f"pattern {self.pattern!r}: m is one of {', '.join(map(str, GROUPS))}, and n less than m")
        if "sparsity" in self.model_fields_set and self.sparsity != 1 - stay / among:
            raise ValueError(f"sparsity {self.sparsity} is not that of pattern {self.pattern!r}, {1 - stay / among:g}")
        return self

    @property
    def of_each(self) -> tuple[int, int] | None:
        """How many stay of each how many, for an n:m pattern."""
        found = re.fullmatch(r"(\d+):(\d+)", self.pattern)
        return (int(found[1]), int(found[2])) if found else None


class PruneStep(Sparsity):
    """The settings of a step that prunes single weights."""

    modules: dict[Pattern, Annotated[Literal["skip"] | Sparsity, skip_or(Sparsity)]] = Field(
        {}, description="by regular expression: {down_proj: {sparsity: 0.3}, 'layers.0.': skip}"
    )

    @model_validator(mode="after")
    def _overrides_fit(self) -> "PruneStep":
        for change in self.modules.values():
            if change != "skip":
                overridden(self._own(), change)
        return self

    def _own(self) -> Sparsity:
        return Sparsity(**self.model_dump(include=set(Sparsity.model_fields), exclude_unset=True))

    def check_base(self, base: Artifact) -> None:
        """Raise `UserError` for settings that the shapes of its layers do not allow."""
        model: Any = base.model
        self.sparsities(model.skeleton(base, "cpu"))

    def sparsities(self, source: Skeleton | Matrices) -> dict[str, Sparsity]:
        """The sparsity of each layer to be pruned. Raises `UserError` for one that its pattern does not divide."""
        source.check_layers()
        sizes = source.inputs
        asked = settings_of((n for n in sizes if n != source.head), source.head, self._own(), self.modules)
        if not asked:
            raise UserError("modules: skips every layer; leave one to prune")
        found = {name: its for name, its in asked.items() if its.sparsity or its.of_each}
        if not found:
            raise UserError("sparsity 0.0: no weight would go; raise it, or leave the step out")
        for name, its in found.items():
            inputs = sizes[name]
            if its.of_each and inputs % its.of_each[1]:
                can = [str(m) for m in GROUPS if inputs % m == 0]
                raise UserError(
                    f"pattern {its.pattern!r} of {name}: {inputs} is not divisible by {its.of_each[1]}; "
                    f"{'these are: ' + ', '.join(can) if can else 'leave it out with modules: {…: skip}'}"
                )
        return found


class Pruning:
    """A `Method` that prunes; what differs is `pruned`."""

    gathers: Literal["hessian", "squares"] | None = None

    def __init__(self, sparsities: Mapping[str, Sparsity]):
        self.sparsities = sparsities
        self.gone: int | None = None
        """How many weights became zero that were none; None as long as no layer was pruned."""

    def wants(self, layer: str) -> bool:
        """Whether it has a sparsity."""
        return layer in self.sparsities

    def change(self, layers: Mapping[str, Any], gathered: Any) -> dict[str, dict[str, Any]]:
        """The weight of each layer, with its zeros."""
        shared = self.prepared(gathered)
        made = {}
        for name, weight in layers.items():
            pruned = self.pruned(weight.float(), shared, self.sparsities[name]).to(weight.dtype)
            self.gone = (self.gone or 0) + int(weight.count_nonzero()) - int(pruned.count_nonzero())
            made[name] = {"weight": pruned}
        return made

    def prepared(self, gathered: Any) -> Any:
        """What layers that share an input need of it."""
        return gathered

    def pruned(self, weight: Any, shared: Any, its: Sparsity) -> Any:
        """One matrix `[outputs, inputs]` with its zeros."""
        raise NotImplementedError

    def weight(self, layer: str, tensors: Mapping[str, Any]) -> Any:
        """What is kept is the weight itself."""
        return tensors["weight"]


def write_pruned(
    step: Step,
    artifact: Artifact,
    folder: Path,
    context: Context,
    method: Callable[[Mapping[str, Sparsity]], Pruning],
    windows: Sequence[Sequence[int]] = (),
    sequential: bool = True,
    **notes: Any,
) -> Artifact:
    """Prune an artifact's weights into `folder`, dense as before."""
    model: Any = artifact.model
    source = model.skeleton(artifact, context.device)
    sparsities = step.sparsities(source)  # type: ignore[attr-defined]
    pruning = method(sparsities)
    unseen = source.rewrite(folder, pruning, windows, sequential)
    if pruning.gone is not None and pruning.gone <= 0:
        highest = max(its.sparsity for its in sparsities.values())
        raise UserError(f"sparsity {highest}: no weight went that was not zero before; raise it, or leave the step out")
    told = {"pruned_layers": len(sparsities), "changed_share": round(source.share(sparsities), 4)}
    more = {"layers_without_calibration": len(unseen) or None} if windows else {}
    return artifact.then(step, weights=folder, notes={**told, **notes, **more})
