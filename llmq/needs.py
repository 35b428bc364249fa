"""What a step or a task needs of a language model, said before anything runs."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Needs:
    """Positions for the `tokens` that the model is given at once, and a token that ends a text or pads one.

    The user sets the number by `setting`, which an error names; it is 0 where a model is given no more than it takes.
    """

    setting: str = ""
    tokens: int = 0
    end_mark: bool = False
