"""Writes a GPTQ, AWQ or RTN stage of 4 or 8 bits in the pack-quantized format, which vLLM and transformers open.

Codes, scales and zero points stay as they are: the stage answers as before, to the bit. Settings by layer become
several config groups. transformers opens it with the package compressed-tensors; llmq needs no package.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from llmq.artifact import Artifact
from llmq.errors import LlmqError, UserError
from llmq.terminal import say
from llmq.text.family import LanguageModel
from llmq.text.formats import PACKED_BITS
from llmq.types import Context, Step

if TYPE_CHECKING:
    from llmq.sketch import Sketch, Work


class CompressedTensors(Step[LanguageModel]):
    suits: ClassVar[frozenset[str]] = frozenset({"causal-lm"})
    requires: ClassVar[Mapping[str, bool]] = {"packed": True, "adapter": False}

    def check_after(self, steps: "Sequence[Step]") -> None:
        """Raise `UserError` for codes of bitsandbytes, for other bits than 4 and 8, and for groups in act order."""
        made = next((step.model_dump() for step in reversed(steps) if step.left.get("packed")), {})
        if "quant_type" in made:
            raise UserError("has no place for the codes of bitsandbytes; quantize by quantize.gptq, rtn or awq")
        said = made.get("modules") or {}
        grids = [each for each in said.values() if isinstance(each, dict)] + ([] if said else [made])
        if odd := [each["bits"] for each in grids if each.get("bits", 4) not in PACKED_BITS]:
            raise UserError(f"has no place for {odd[0]} bits: vLLM reads 4 and 8; quantize with bits: 4")
        if made.get("desc_act") and not made.get("static_groups"):
            raise UserError("has no place for groups in act order; quantize with static_groups: true")

    def foresee(self, before: "Sketch") -> "tuple[Sketch, Work]":
        """The same codes in another order, and a shape of each layer instead of the groups of its inputs."""
        from llmq.sketch import Work
        from llmq.text.sizing import packing

        made = before.with_parts({p.name: packing.pack_quantized(p) for p in before.parts if p.packed})
        return made, Work(2 * before.in_memory, {"copy": 20.0 * before.in_memory}, 4.0)

    def apply(self, artifact: Artifact[LanguageModel], folder: Path, context: Context) -> Artifact:
        """Write the model to `folder`, open it again, and compare the answers. Raises `LlmqError` if they differ."""
        from llmq.guarded.weights import safetensors_of
        from llmq.text import fused
        from llmq.text.compressed import write_compressed

        schemes = write_compressed(artifact.weights, folder)
        counts = Counter(f"{s.bits} bits, groups of {s.group_size or 'a row'}" for s in schemes.values() if s)
        notes: dict[str, object] = {"format": "compressed-tensors, pack-quantized", "layers": dict(counts)}
        if told := fused.finding(schemes):
            say(f"  {told}")
            notes["finding"] = told
        made = artifact.then(self, weights=folder, packed=True, notes=notes)
        try:
            _check(artifact, made, context.device)
        except LlmqError:
            for file in safetensors_of(folder):
                file.unlink()
            raise
        return made


def _check(before: Artifact[LanguageModel], made: Artifact[LanguageModel], device: str) -> None:
    """Raise `LlmqError` unless both answer the same to the bit."""
    import torch

    answers: list[torch.Tensor] = []
    for artifact in (before, made):
        with artifact.open(device) as loaded:
            answers += artifact.model.probe(loaded.module)
    truth, found = (each.double() for each in answers)
    if not torch.equal(truth, found):
        off = float((found - truth).norm() / truth.norm())
        raise LlmqError(f"{made.history[-1]}: the new stage answers otherwise than before, by {off:.1e} of the norm")
