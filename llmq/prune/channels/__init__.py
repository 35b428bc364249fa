"""Takes the least important channels out of a network, which becomes smaller and faster by itself.

Layers whose channels hang together (through additions, depthwise convolutions, concatenations) lose the same channels.
Channels stay where no proof shows that the rest computes the same without them: channels of the output, channels that a
PixelShuffle turns into pixels, channels that a LayerNorm mixes. The notes of the stage name every layer.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import suppress
from math import lcm
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from pydantic import Field, PositiveInt

from llmq.artifact import Artifact
from llmq.errors import UserError
from llmq.files import LAYERS, write_json
from llmq.layers import Pattern, settings_of, skip_or
from llmq.types import Context, Settings, Step
from llmq.vision.family import IMAGE_MODELS, ImageModel

if TYPE_CHECKING:
    from torch import Tensor
    from torch.nn import Module

    from llmq.prune.channels.cuts import Cut
    from llmq.prune.channels.trials import Trials
    from llmq.sketch import Sketch, Work


class Ratio(Settings):
    """The share of channels to prune."""

    ratio: float = Field(0.5, gt=0, lt=1, description="share of the channels of each group of layers")


class Channels(Ratio, Step[ImageModel]):
    suits = IMAGE_MODELS
    requires: ClassVar[Mapping[str, bool]] = {"packed": False, "adapter": False}

    importance: Literal["magnitude", "bn_scale"] = Field(
        "magnitude",
        description="squares of all weights of a channel, mean over the layers that have it; or its scale in the batch "
        "norms (network slimming, Liu et al. 2017), channels without one staying",
    )
    scope: Literal["all", "inner"] = Field(
        "all", description="inner: only channels that nothing is added to, so that shortcuts keep their width"
    )
    round_to: PositiveInt = Field(8, description="channels stay in multiples of it; int8 kernels like 8, 16 or 32")
    modules: dict[Pattern, Annotated[Literal["skip"] | Ratio, skip_or(Ratio)]] = Field(
        {},
        description="by pattern, a regular expression whose dots are those of names and whose numbers are whole: "
        "{layer4: {ratio: 0.3}, conv1: skip}; of a group the least counts",
    )

    def check_base(self, base: Artifact[ImageModel]) -> None:
        from llmq.vision.shapes import without_weight_norm

        with base.open("cpu") as loaded:
            without_weight_norm(loaded.module)  # a cut needs plain weights
            self.cuts(loaded.module, base.model)

    def foresee(self, before: "Sketch") -> "tuple[Sketch, Work]":
        """The network cut as it will be, but for the choice of the channels, which the weights make."""
        from llmq.prune.channels.cuts import proven, take_out
        from llmq.sketch import Work
        from llmq.vision.shapes import with_weight_norm, without_weight_norm
        from llmq.vision.sizing import as_images, opening

        source = as_images(before)
        assert source.model
        model = source.model

        def cut(network: "Module") -> None:
            normed = without_weight_norm(network)
            cuts, _ = self.cuts(network, model)
            take_out(network, proven(network, model.example(1), cuts))
            with_weight_norm(network, normed)

        work = Work(4 * source.in_memory + 2 * source.counted.saved, {}, 1.0)
        return source.changed(cut), work.plus(opening(source))

    def apply(self, artifact: Artifact[ImageModel], folder: Path, context: Context) -> Artifact:
        from llmq.prune.channels.cuts import figures, proven, take_out, widths
        from llmq.reopened import meant, reopened
        from llmq.vision.shapes import changes, with_weight_norm, without_weight_norm
        from llmq.vision.state import save_network

        model = artifact.model
        example = model.example(1)
        with artifact.open("cpu") as loaded:
            network = loaded.module
            before, was = figures(network, example), widths(network)
            normed = without_weight_norm(network)
            cuts, left = self.cuts(network, model)
            sound = proven(network, example, cuts)  # tried with random weights
            for cut in (cut for cut in cuts if cut not in sound):
                left |= dict.fromkeys(cut.group.makers, "taking them out would change the outputs of other layers")
            if not sound:
                raise nothing(model, left)
            take_out(network, sound)
            with_weight_norm(network, normed)
            network.reshaped = changes(network, model.network())  # for shapes.json
            after, now = figures(network, example), widths(network)
            save_network(network, folder)
            what = meant(model, network)
        shares = {name: float(f"{1 - now[name] / width:.3g}") for name, width in was.items()}
        write_json(folder / LAYERS, {name: {"bits": None, "removed": share} for name, share in shares.items()})
        notes = {
            "input": list(example.shape),
            **{name: [value, after[name]] for name, value in before.items()},
            "channels": {name: [width, now[name]] for name, width in was.items() if now[name] != width},
            "left": left,
            "changed_share": round(1 - after["parameters"] / before["parameters"], 4),
        }
        return reopened(what, artifact.then(self, weights=folder, notes=notes), "cpu")

    def trials(self, artifact: Artifact[ImageModel], inputs: "Sequence[Tensor]") -> "Trials":
        """Every group cut alone at several ratios, for a search; `inputs` show how far each cut moves the outputs."""
        from llmq.prune.channels.trials import RATIOS, tried
        from llmq.vision.shapes import without_weight_norm

        with artifact.open("cpu") as loaded:
            without_weight_norm(loaded.module)
            network, largest = loaded.module, RATIOS[-1]
            cuts = {largest: self.model_copy(update={"ratio": largest}).cuts(network, artifact.model)[0]}
            for ratio in RATIOS[:-1]:
                with suppress(UserError):  # of few channels less a quarter as many stay
                    cuts[ratio] = self.model_copy(update={"ratio": ratio}).cuts(network, artifact.model)[0]
            return tried(network, artifact.model, cuts, inputs)

    def cuts(self, network: "Module", model: ImageModel) -> "tuple[list[Cut], dict[str, str]]":
        """The cuts that shapes allow, and the reason why each other layer stays. Raises `UserError` if all stay."""
        import torch_pruning

        from llmq.prune.channels.cuts import Cut, least_important, widths
        from llmq.prune.channels.graph import find_groups

        measures = torch_pruning.importance
        magnitude = self.importance == "magnitude"
        importance = measures.GroupMagnitudeImportance(p=2) if magnitude else measures.BNScaleImportance()
        groups, left = find_groups(network, model.example(1), importance)
        ratios = settings_of(widths(network), None, Ratio(ratio=self.ratio), self.modules)
        cuts = []
        for group in groups:
            ratio = min(ratios[maker].ratio if maker in ratios else 0 for maker in group.makers)  # the least counts
            gone = least_important(group.scores, ratio, self.round_to, group.parts) if ratio else None
            step = lcm(self.round_to, group.parts)  # every part keeps as many
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


def nothing(model: ImageModel, left: Mapping[str, str]) -> UserError:
    """The error for a network without a channel to prune: each reason, and the number of layers with the reason."""
    first = {reason: layer for layer, reason in [*left.items()][::-1]}
    reasons = "; ".join(
        f"{reason} ({count} layers, such as {first[reason]})" for reason, count in Counter(left.values()).most_common()
    )
    reasons = reasons or "the network has no convolution or linear layer"
    return UserError(
        f"no channel of {model.title} can be pruned: {reasons}; leave prune.channels out, or take single weights out "
        "with prune.magnitude"
    )
