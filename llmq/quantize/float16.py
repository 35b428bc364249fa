"""Half-precision weights of an image model."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, Literal

from pydantic import Field

from llmq.artifact import Artifact
from llmq.models.vision import KINDS
from llmq.types import Context, Step


class Float16(Step):
    """Weights in float16, half the file; computed in float32, or in bfloat16 where the processor has it.

    The stage is a graph that OpenVINO opens, here and elsewhere.
    """

    suits: ClassVar[frozenset[str]] = KINDS
    requires: ClassVar[Mapping[str, bool]] = {"packed": False, "adapter": False}
    leaves: ClassVar[Mapping[str, bool]] = {"packed": True}

    compute_dtype: Literal["float32", "bfloat16"] = Field(
        "float32", description="bfloat16 is up to twice as fast on processors that have it, and less exact"
    )

    def apply(self, artifact: Artifact, folder: Path, context: Context) -> Artifact:
        """Export, and write the weights in half as many bytes."""
        from llmq.quantize.exporting import quantized_stage

        return quantized_stage(self, artifact, folder, _as_it_is, compute_dtype=self.compute_dtype, float16=True)


def _as_it_is(graph: Any) -> Any:
    return graph  # the writer makes float16 of its constants
