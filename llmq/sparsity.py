"""The steps that prune single weights: their settings, their checks, and the dense checkpoint that they write."""

import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, ClassVar, Generic, Literal, Protocol, cast

from pydantic import Field, model_validator

from llmq import plugin
from llmq.artifact import Artifact
from llmq.errors import UserError
from llmq.layers import LayerChange, Layers, Pattern, overridden, settings_of, skip_or
from llmq.types import Context, M, Settings, Step

if TYPE_CHECKING:
    from torch import Tensor

    from llmq.sketch import Sketch, Work

GROUPS = (2, 4, 8, 16, 32)  # the m of n:m patterns
Windows = Sequence[Sequence[int]]


def was_pruned(history: Sequence[str]) -> bool:
    """True if one of the steps that made a model, by word, pruned single weights."""
    return any(issubclass(plugin.load(word), PruneStep) for word in history)


class Sparsity(Settings):
    """The share of the weights to prune, and the pattern."""

    sparsity: float = Field(0.5, ge=0, le=0.95, description="share of the weights that become zero")
    pattern: str = Field("unstructured", description="or n:m, such as 2:4: n of every m neighbouring inputs stay")

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
        """(n, m) of an n:m pattern, in which n of every m weights stay; None without a pattern."""
        numbers = re.fullmatch(r"(\d+):(\d+)", self.pattern)
        return (int(numbers[1]), int(numbers[2])) if numbers else None


class PrunedModel(Protocol):
    """The part of a family of models that a pruning step uses."""

    def skeleton(self, artifact: Artifact, device: str) -> Layers:
        """The layers of an artifact, to be read and changed one by one."""

    def rewrite(
        self, source: Layers, folder: Path, change: LayerChange[Sparsity], windows: Windows, sequential: bool
    ) -> list[str]:
        """Write the changed model to `folder`; return the layers that no token of the calibration came to."""


class PruneStep(Sparsity, Step[M], Generic[M]):
    requires: ClassVar[Mapping[str, bool]] = {"packed": False, "adapter": False}

    modules: dict[Pattern, Annotated[Literal["skip"] | Sparsity, skip_or(Sparsity)]] = Field(
        {},
        description="by pattern, a regular expression whose dots are those of names and whose numbers are whole: "
        "{down_proj: {sparsity: 0.3}, layers.1: skip}",
    )

    @model_validator(mode="after")
    def _overrides_fit(self) -> "PruneStep[M]":
        for change in self.modules.values():
            if change != "skip":
                overridden(self._own(), change)  # raises where the two do not fit
        return self

    def _own(self) -> Sparsity:
        return Sparsity(**self.model_dump(include=set(Sparsity.model_fields), exclude_unset=True))

    def check_base(self, base: Artifact[M]) -> None:
        """Raise `UserError` for settings that the shapes of the layers do not allow."""
        self.sparsities(cast(PrunedModel, base.model).skeleton(base, "cpu"))

    def foresee(self, before: "Sketch") -> "tuple[Sketch, Work]":
        """The same dense tensors, with zeros among them."""
        changed = [part.name for part in before.parts if len(part.shape) > 1]
        return before, before.rewritten(before, changed, *self.calibration_windows, self.gathers_products)

    gathers_products: ClassVar[bool] = False
    """True for a change that needs the products of each layer's inputs."""

    def sparsities(self, source: Layers) -> dict[str, Sparsity]:
        """The sparsity of each layer to be pruned. Raises `UserError` for inputs that the pattern does not divide."""
        source.check_layers()
        sizes = source.inputs
        asked = settings_of((n for n in sizes if n != source.head), source.head, self._own(), self.modules)
        if not asked:
            raise UserError("modules: skips every layer; leave one to prune")
        # A sparsity of 0 leaves a layer as it is.
        pruned = {name: level for name, level in asked.items() if level.sparsity or level.of_each}
        if not pruned:
            raise UserError("sparsity 0.0: no weight would go; raise it, or leave the step out")
        for name, level in pruned.items():
            inputs = sizes[name]
            if level.of_each and inputs % level.of_each[1]:
                can = [str(m) for m in GROUPS if inputs % m == 0]
                raise UserError(
                    f"pattern {level.pattern!r} of {name}: {inputs} is not divisible by {level.of_each[1]}; "
                    f"{'these are: ' + ', '.join(can) if can else 'leave it out with modules: {…: skip}'}"
                )
        return pruned

    def write(
        self,
        artifact: Artifact[M],
        folder: Path,
        context: Context,
        change_to: "Callable[[Mapping[str, Sparsity]], Pruning]",
        windows: Windows = (),
        sequential: bool = True,
        **notes: object,
    ) -> Artifact:
        """Write the pruned model to `folder`, dense as before. Raises `UserError` if no weight became zero."""
        model = cast(PrunedModel, artifact.model)
        source = model.skeleton(artifact, context.device)
        sparsities = self.sparsities(source)
        change = change_to(sparsities)
        unseen = model.rewrite(source, folder, change, windows, sequential)
        # A run that goes on after a kill may find every block written, and prune none.
        if change.gone is not None and change.gone <= 0:
            highest = max(level.sparsity for level in sparsities.values())
            raise UserError(
                f"sparsity {highest}: no weight went that was not zero before; raise it, or leave the step out"
            )
        told = {"pruned_layers": len(sparsities), "changed_share": round(source.share(sparsities), 4)}
        more = {"layers_without_calibration": len(unseen) or None} if windows else {}
        return artifact.then(self, weights=folder, notes={**told, **notes, **more})


class Pruning(LayerChange[Sparsity]):
    """Some weights of each layer become zero; `pruned` chooses them."""

    gone: int | None = None
    """The number of weights that became zero and were not zero before; None until a layer is pruned."""

    def change(self, layers: "Mapping[str, Tensor]", total: "Tensor | None") -> "dict[str, dict[str, Tensor]]":
        """The pruned weight of each layer, in the dtype of the weight."""
        shared = self.prepared(total)  # once for all layers with this input
        changed = {}
        for name, weight in layers.items():
            pruned = self.pruned(weight.float(), shared, self.settings[name]).to(weight.dtype)  # (outputs, inputs)
            self.gone = (self.gone or 0) + int(weight.count_nonzero()) - int(pruned.count_nonzero())
            changed[name] = {"weight": pruned}
        return changed

    def prepared(self, total: "Tensor | None") -> "Tensor | None":
        """The tensor that all layers of a group need, made once from the sum over their inputs."""
        return total

    def pruned(self, weight: "Tensor", shared: "Tensor | None", level: Sparsity) -> "Tensor":
        """The pruned matrix `[outputs, inputs]`, float32 as `weight` is."""
        raise NotImplementedError
