"""Rounds every weight to the nearest point of its grid, without calibration: the baseline of `quantize.gptq`.

Written in the GPTQ format, block by block. Embeddings and output head stay as they are unless `modules` names them.
"""

from pathlib import Path

from llmq.artifact import Artifact
from llmq.text.family import LanguageModel
from llmq.text.grids import RoundToNearest
from llmq.text.rounding import GridStep
from llmq.types import Context


class Rtn(GridStep):
    def apply(self, artifact: Artifact[LanguageModel], folder: Path, context: Context) -> Artifact:
        return self.write(artifact, folder, context, RoundToNearest, settings={"desc_act": False})
