"""The options that several commands share."""

from pathlib import Path
from typing import Annotated

import typer

from llmq.cli import completing

Overrides = Annotated[list[str] | None, typer.Argument(metavar="[WORD.KEY=VALUE]...", help="adapt.lora.r=32, seed=1")]
Out = Annotated[Path | None, typer.Option(help="Folder to write; a fresh one under runs/ if unset.")]
Cache = Annotated[bool, typer.Option("--cache/--no-cache", help="Use earlier answers about the same model.")]
Json = Annotated[bool, typer.Option("--json", help="Answer with data on standard output.")]
Trust = Annotated[
    bool,
    typer.Option(
        "--trust-remote-code", help="Run Python that the folder of a model or of tasks brings; nothing else does."
    ),
]
AllowCode = Annotated[bool, typer.Option(help="Let tasks run the code that the model writes.")]
Opener = Annotated[
    str,
    typer.Option(
        "--model",
        help="How to open a target that is no stage: a word of models.",
        autocompletion=completing.words_of("models"),
    ),
]
DEFAULT_MODEL = "causal_lm"
