"""Quantization by rounding to nearest."""

from collections.abc import Mapping
from pathlib import Path
from typing import ClassVar

from llmq.artifact import Artifact
from llmq.models.skeleton import Skeleton
from llmq.quantize.grid_settings import GridStep
from llmq.types import Context, Step


class Rtn(GridStep, Step):
    """Rounds every weight to the nearest point of its grid, without calibration: the baseline of `quantize.gptq`.

    Written in the GPTQ format, block by block. Embeddings and output head stay as they are unless `modules` names them.
    """

    suits: ClassVar[frozenset[str]] = frozenset({"causal-lm"})
    requires: ClassVar[Mapping[str, bool]] = {"packed": False, "adapter": False}
    leaves: ClassVar[Mapping[str, bool]] = {"packed": True}

    def apply(self, artifact: Artifact, folder: Path, context: Context) -> Artifact:
        """Write the rounded model to `folder`."""
        from llmq.blockwise import rewrite
        from llmq.quantize.grid_settings import RoundToNearest, told, write_config

        source = Skeleton.of(artifact, context.device)
        grids = self.grids(source)
        rewrite(source, folder, RoundToNearest(grids))
        write_config(source, folder, grids, self, desc_act=False)
        return artifact.then(self, weights=folder, packed=True, notes=told(source, grids))
