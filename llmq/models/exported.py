"""A graph that somebody exported, in ONNX or for OpenVINO: a classifier, detector, super-resolution network or GAN.

The settings say what the file does not: the kind, the input, the layout of a detector's outputs, the range of what a
generator makes. OpenVINO runs the graph; it is measured, quantized, compared and used like any other stage. It has no
torch weights: it is not trained or pruned.
"""

from typing import Any, Self, cast

from pydantic import ModelWrapValidatorHandler, model_validator

from llmq.vision.foreign.family import Foreign


class Exported(Foreign):
    @model_validator(mode="wrap")
    @classmethod
    def _of_its_kind(cls, value: Any, handler: ModelWrapValidatorHandler[Self]) -> Self:
        """The settings as an object of the class of their kind, which has the methods of the kind."""
        from llmq.vision.foreign.kinds import family_of

        made = handler(value)
        of_kind: Any = family_of(made).model_construct(made.model_fields_set, **dict(made))
        return cast(Self, of_kind)
