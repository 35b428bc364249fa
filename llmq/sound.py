"""Checks of every new stage: weights are finite, and a step that changes weights changed some."""

from pathlib import Path

from llmq.artifact import Artifact
from llmq.errors import LlmqError, UserError
from llmq.guarded.weights import FLOATS, opened, safetensors_of

LEAST = 0.01
"""The share of the weights below which a quantization or a pruning has changed next to nothing."""
CHANGING = ("quantize.", "prune.")


def check(word: str, made: Artifact, folder: Path) -> None:
    """Raise `LlmqError` for a tensor that is not finite, `UserError` if next to no weight was changed."""
    check_finite(folder)
    if word.startswith(CHANGING):
        share = made.notes["changed_share"]
        if share < LEAST:
            raise UserError(
                f"only {share:.2%} of the weights were changed; leave the step out, or take fewer layers out of it"
            )


def check_finite(folder: Path) -> None:
    """Raise `LlmqError` for the first tensor in a folder's files (scales and adapters too) that is not finite."""
    from llmq.finite import first_not_finite

    for file in safetensors_of(folder) or sorted(folder.glob("adapter_model.safetensors")):
        with opened(file) as tensors:
            for name in tensors.keys():  # noqa: SIM118
                is_float = tensors.get_slice(name).get_dtype() in FLOATS
                if is_float and first_not_finite({name: tensors.get_tensor(name)}):
                    cure = "look at the model before, or compute in a wider dtype"
                    raise LlmqError(f"{name} was made with values that are not finite; {cure}")
