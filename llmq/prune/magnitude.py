"""Sets the smallest weights of every layer to zero, without calibration: the baseline of the others.

The model stays dense: neither file nor time shrinks by itself. Of a language model linear layers are pruned, but
not the output head; of an image model all convolutions and linear layers, the first and the last too unless
`modules` skips them, and an n:m pattern runs over neighbouring input channels.
"""

from pathlib import Path
from typing import TYPE_CHECKING

from llmq.artifact import Artifact
from llmq.matrix.masks import by_magnitude
from llmq.plugin import KindsOf
from llmq.sparsity import PruneStep, Pruning, Sparsity
from llmq.types import Context, Model

if TYPE_CHECKING:
    from torch import Tensor


class Magnitude(PruneStep[Model]):
    suits = KindsOf(Model)

    def apply(self, artifact: Artifact, folder: Path, context: Context) -> Artifact:
        return self.write(artifact, folder, context, _Magnitude)


class _Magnitude(Pruning):
    def pruned(self, weight: "Tensor", shared: "Tensor | None", level: Sparsity) -> "Tensor":
        return weight.masked_fill(by_magnitude(weight, level.sparsity, level.of_each), 0)  # (outputs, inputs)
