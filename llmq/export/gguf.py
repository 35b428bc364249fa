"""Writes one .gguf file that llama.cpp, Ollama, LM Studio and OpenVINO GenAI open, and reads it back.

`auto` keeps the grid of a stage that `quantize.gptq`, `rtn` or `awq` made, without another rounding: up to 4 bits
around a fixed zero become Q4_0, those with a zero of each group Q4_1 (the minimum is rounded to float16, and the notes
say how far), 8 bits Q8_0. A grid that `adapt.merge` left beside float weights becomes Q4_1. Groups must be a multiple
of 32 inputs and lie in the order of memory. Layers whose grid no type holds, and NF4, are dequantized to F16, and the
notes say so. Float weights become F16, or BF16 where float16 is too narrow. Every other type rounds each matrix; 4 and
5 bits leave the output head (or the embeddings, where they are the head) at Q8_0.

The stage is opened in torch with all weights dequantized; `bytes_on_disk` counts the file.
"""

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from llmq.artifact import Artifact
from llmq.terminal import say
from llmq.text.family import LanguageModel
from llmq.types import Context, Step

if TYPE_CHECKING:
    from llmq.sketch import Sketch, Work


class Gguf(Step[LanguageModel]):
    suits: ClassVar[frozenset[str]] = frozenset({"causal-lm"})
    requires: ClassVar[Mapping[str, bool]] = {"adapter": False}
    leaves: ClassVar[Mapping[str, bool | str]] = {"packed": True, "runtime": "gguf"}

    type: Literal["auto", "f16", "bf16", "q8_0", "q4_0", "q4_1", "q5_0", "q5_1"] = Field(
        "auto", description="auto keeps a grid that there is, and makes f16 of floats"
    )

    def check_base(self, base: Artifact[LanguageModel]) -> None:
        """Raise `UserError` for a network that is not written as GGUF."""
        from llmq.text.gguf.writing import check

        check(base.weights)

    def foresee(self, before: "Sketch") -> "tuple[Sketch, Work]":
        """Each tensor in its type, exactly; the tokenizer in the file is estimated by the size of its vocabulary."""
        from dataclasses import replace

        from llmq.sketch import Work
        from llmq.text.sizing import packing, work
        from llmq.text.sizing.network import as_text

        source = as_text(before)
        made = []
        for part in source.parts:
            is_head = part.name == source.head
            wanted = self.type.upper()
            if wanted == "AUTO":
                wanted = packing.type_that_keeps(part)
            elif wanted in packing.ROUNDED and is_head:
                wanted = "Q8_0"
            made.append(packing.gguf(part, wanted))
        tokenizer = work.TOKEN_IN_GGUF * source.vocabulary
        result = replace(
            source, parts=tuple(made), runtime="gguf", more_on_disk=tokenizer, not_in_order="the tokenizer is estimated"
        )
        # transformers reads the file back into float32, and opens what it read beside the file's own pages.
        floats = 4 * source.parameters
        return result, Work(floats + result.on_disk, {"copy": 12.0 * floats}, 4 * work.PROBES, passing=result.on_disk)

    def apply(self, artifact: Artifact[LanguageModel], folder: Path, context: Context) -> Artifact:
        """Write the file and read it back. Raises `LlmqError` for a file that holds another model."""
        from llmq.guarded.gguf_files import parsed_once
        from llmq.text.formats import quantization
        from llmq.text.gguf.opening import check_logits
        from llmq.text.gguf.writing import write

        model, floats = artifact.model, folder / ".floats"
        method = (quantization(artifact.weights) or {}).get("quant_method", "gptq")
        try:
            source = artifact.weights if method == "gptq" else _dequantized(artifact, floats, context.device)
            with parsed_once():
                notes = write(source, folder, self.type.upper(), Path(model.weights).stem)
                apart = check_logits(folder, model.dtype, context.device, model.probe)
        except BaseException:
            for file in (file for file in folder.iterdir() if file.is_file()):  # what was refused is no stage
                file.unlink()
            raise
        finally:
            shutil.rmtree(floats, ignore_errors=True)
        notes["logits_apart"] = float(f"{apart:.3g}")
        if source == floats:
            notes["not_kept"] = {f"weights of {method}, which lie on no such grid": "all layers"}
        for why, layers in notes.get("not_kept", {}).items():
            say(f"  {layers} do not keep their grid: {why}")
        if told := notes.get("zero_points"):
            say(f"  its zero points are {told}")
        if window := notes.get("window_left_out"):
            say(f"  the window of {window} tokens has no place in the file: engines attend to all tokens")
        if ends := notes.get("ends_left_out"):
            say(f"  the tokens {ends} end texts as well, and the file has keys for three: engines stop not there")
        return artifact.then(self, weights=folder, packed=True, runtime="gguf", notes=notes)


def _dequantized(artifact: Artifact[LanguageModel], folder: Path, device: str) -> Path:
    """A folder with the weights that bitsandbytes packed, in the dtype of the model."""
    import torch

    from llmq.text.bnb_layers import dequantized
    from llmq.text.linear_view import fuse
    from llmq.text.names import save
    from llmq.text.opening import as_opened_in, load_causal_lm
    from llmq.text.tokenizer import copy_tokenizer

    module = dequantized(load_causal_lm(artifact.weights, artifact.model.dtype, device))
    fuse(module)
    as_opened_in(getattr(torch, artifact.model.dtype), module)
    save(module, folder)
    copy_tokenizer(artifact.weights, folder)
    return folder
