"""Pruning of whole channels."""

from collections import Counter
from collections.abc import Mapping
from math import lcm
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field, PositiveInt

from llmq.artifact import Artifact
from llmq.errors import UserError
from llmq.layers import Pattern, settings_of, skip_or
from llmq.models.vision import KINDS, named
from llmq.types import Context, Step

if TYPE_CHECKING:
    from llmq.prune.channel_cuts import Cut


class Ratio(BaseModel):
    """How many channels go."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    ratio: float = Field(0.5, gt=0, lt=1, description="share of the channels of each group of layers")


class Channels(Ratio, Step):
    """Takes the least important channels out of a network, which becomes smaller and faster by itself.

    Layers whose channels hang together (through additions, depthwise convolutions, concatenations) lose the same ones.
    Channels stay where taking them out is not proved to leave the rest as it is: those of the output, those that a
    PixelShuffle makes pixels of, those that a LayerNorm mixes. The notes of the stage name every layer.
    """

    suits: ClassVar[frozenset[str]] = KINDS
    requires: ClassVar[Mapping[str, bool]] = {"packed": False, "adapter": False}

    importance: Literal["magnitude", "bn_scale"] = Field(
        "magnitude",
        description="squares of all weights of a channel, mean over the layers that have it; or its scale in the batch "
        "norms (network slimming, Liu et al. 2017), channels without one staying",
    )
    scope: Literal["all", "inner"] = Field(
        "all", description="inner: only channels that nothing is added to, so that shortcuts keep their width"
    )
    round_to: PositiveInt = Field(8, description="what stays is a multiple of it; int8 kernels like 8, 16 or 32")
    modules: dict[Pattern, Annotated[Literal["skip"] | Ratio, skip_or(Ratio)]] = Field(
        {}, description="by regular expression: {layer4: {ratio: 0.3}, conv1: skip}; of a group the least counts"
    )

    def check_base(self, base: Artifact) -> None:
        """Raise `UserError` if the network has no channel that could go."""
        from llmq.models.weight_norm import without_weight_norm

        with base.open("cpu") as loaded:
            without_weight_norm(loaded.module)
            self.cuts(loaded.module, base.model)

    def apply(self, artifact: Artifact, folder: Path, context: Context) -> Artifact:
        """Write the narrower network to `folder`, with the shapes of its layers beside the weights."""
        from llmq.models.reopened import meant, reopened
        from llmq.models.shapes import changes
        from llmq.models.state import save_network
        from llmq.models.weight_norm import with_weight_norm, without_weight_norm
        from llmq.prune.channel_cuts import figures, take_out, widths
        from llmq.prune.channel_proof import proven

        model: Any = artifact.model
        example = model.example(1)
        with artifact.open("cpu") as loaded:
            network = loaded.module
            before, was = figures(network, example), widths(network)
            normed = without_weight_norm(network)
            cuts, left = self.cuts(network, model)
            sound = proven(network, example, cuts)
            for cut in cuts:
                if all(cut is not one for one in sound):
                    left |= dict.fromkeys(cut.group.makers, "taking them out would change what others compute")
            if not sound:
                raise nothing(model, left)
            take_out(network, sound)
            with_weight_norm(network, normed)
            network.reshaped = changes(network, model.network())
            after, now = figures(network, example), widths(network)
            save_network(network, folder)
            what = meant(model, network)
        notes = {
            "input": list(example.shape),
            **{name: [value, after[name]] for name, value in before.items()},
            "channels": {name: [width, now[name]] for name, width in was.items() if now[name] != width},
            "left": left,
            "changed_share": round(1 - after["parameters"] / before["parameters"], 4),
        }
        return reopened(what, artifact.then(self, weights=folder, notes=notes), "cpu")

    def cuts(self, network: Any, model: Any) -> "tuple[list[Cut], dict[str, str]]":
        """What to take out as far as shapes tell, and why the other layers stay. Raises `UserError` if all do."""
        import torch_pruning

        from llmq.prune.channel_cuts import Cut, least_important, widths
        from llmq.prune.channel_groups import find_groups

        scores = {
            "magnitude": torch_pruning.importance.GroupMagnitudeImportance(p=2),
            "bn_scale": torch_pruning.importance.BNScaleImportance(),
        }
        groups, left = find_groups(network, model.example(1), scores[self.importance])
        ratios = settings_of(widths(network), None, Ratio(ratio=self.ratio), self.modules)
        cuts = []
        for group in groups:
            ratio = min(ratios[maker].ratio if maker in ratios else 0 for maker in group.makers)
            gone = least_important(group.scores, ratio, self.round_to, group.parts) if ratio else None
            step = lcm(self.round_to, group.parts)
            few = f"{len(group.scores)} channels less {ratio:.0%} are, in multiples of {step}, as many"
            if group.joined and self.scope == "inner":
                left |= dict.fromkeys(group.makers, "scope: inner, and something is added to them")
            elif gone:
                cuts.append(Cut(group, gone))
            else:
                left |= dict.fromkeys(group.makers, few if ratio else "modules: skip")
        if not cuts:
            raise nothing(model, left)
        return cuts, left


def nothing(model: Any, left: Mapping[str, str]) -> UserError:
    """The error of a network that has no channel to lose, with the reasons and how many layers have each."""
    counts = Counter(left.values())
    reasons = "; ".join(
        f"{reason} ({count} layers, such as {_first(left, reason)})" for reason, count in counts.most_common()
    )
    reasons = reasons or "the network has no convolution or linear layer"
    return UserError(
        f"no channel of {named(model)} can be pruned: {reasons}; leave prune.channels out, or take single weights out "
        "with prune.magnitude"
    )


def _first(left: Mapping[str, str], reason: str) -> str:
    return next(layer for layer, its in left.items() if its == reason)
