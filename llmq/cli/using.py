"""The commands that use what was made: predict and chat."""

from pathlib import Path
from typing import Annotated

import typer

import llmq
from llmq import trust
from llmq.cli import completing
from llmq.cli.options import DEFAULT_MODEL, Json, Opener, Trust
from llmq.errors import UserError, visible
from llmq.files import to_json
from llmq.types import JsonObject

Stage = Annotated[
    str,
    typer.Argument(
        metavar="STAGE",
        help="A stage, a run (its last stage), or any model.",
        autocompletion=completing.stages,
    ),
]
NewTokens = Annotated[int | None, typer.Option(min=1, help="Of a text: tokens of an answer at most; 256 if unset.")]
Temperature = Annotated[
    float | None, typer.Option(min=0, help="Of a text: 0, the default, takes the likeliest token; 1 draws.")
]
TopP = Annotated[
    float | None, typer.Option(help="Of a text: draw among the likeliest tokens of this share; 1 if unset.")
]
System = Annotated[str | None, typer.Option(help="Of a text: the system turn before each prompt.")]
Raw = Annotated[bool, typer.Option("--raw", help="Of a text: continue it as it is, without the chat template.")]


def predict(
    target: Stage,
    inputs: Annotated[
        list[Path] | None, typer.Argument(metavar="[INPUTS]...", help="Files, and folders, which are walked.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="New folder to write; a fresh one under runs/ if unset.")] = None,
    skip_bad: Annotated[bool, typer.Option("--skip-bad", help="Name and count bad files, and go on.")] = False,
    model: Opener = DEFAULT_MODEL,
    device: str = "auto",
    beside: Annotated[
        bool, typer.Option("--beside", help="Of super-resolution: also bicubic and difference pictures, of the middle.")
    ] = False,
    window: Annotated[
        tuple[float, float] | None,
        typer.Option(help="Numbers that become grey levels 0 and 255, for more than 8 bits; the run's if unset."),
    ] = None,
    threshold: Annotated[
        float | None, typer.Option(help="Of a detector: the least score that is written and drawn; 0.3 if unset.")
    ] = None,
    count: Annotated[int | None, typer.Option(min=1, help="Of a GAN: pictures to make; 16 if unset.")] = None,
    seed: Annotated[int | None, typer.Option(min=0, help="Of a GAN, and of drawn texts; 0 if unset.")] = None,
    prompt: Annotated[
        list[str] | None, typer.Option(metavar="TEXT", help="Of a text: a prompt; may be repeated.")
    ] = None,
    max_new_tokens: NewTokens = None,
    temperature: Temperature = None,
    top_p: TopP = None,
    system: System = None,
    raw: Raw = False,
    trust_remote_code: Trust = False,
    as_json: Json = False,
) -> None:
    """Use a model on files: enlarge, classify or detect pictures, make some, or answer prompts.

    Super-resolution takes pictures, TIFF stacks, .npz and .npy volumes, and writes the same kind and depth. A detector
    writes detections.json in COCO's shape and pictures with boxes; a classifier predictions.csv; a GAN pictures and
    grid.png. A language model reads prompts: a .txt file is one prompt; each row of a .jsonl has `prompt`, `messages`,
    or a `text` to continue; it writes answers.jsonl. The first bad file ends the command before anything is written.
    """
    asked: JsonObject = {"window": window, "threshold": threshold, "count": count, "system": system}
    asked |= {"max_new_tokens": max_new_tokens, "temperature": temperature, "top_p": top_p}
    asked |= {"prompts": tuple(prompt) if prompt else None, "beside": beside or None, "raw": raw or None}
    made = llmq.predict(
        target,
        inputs or (),
        out=out,
        skip_bad=skip_bad,
        family=model,
        device=device,
        seed=seed or 0,
        trust_remote_code=trust_remote_code,
        **{name: value for name, value in asked.items() if value is not None},
    )
    if as_json:
        told = {"folder": str(made.folder), "inputs": made.inputs, "rows": made.rows, "skipped": made.skipped}
        typer.echo(to_json({**told, "files": [str(file) for file in made.files]}))
        return
    bad = f", {len(made.skipped)} skipped" if made.skipped else ""
    of = f" of {made.inputs} files" if made.inputs else ""
    typer.echo(visible(f"{made.folder}: {made.rows} results{of}{bad}, in {len(made.files)} files"))


def chat(
    target: Stage,
    beside: Annotated[str | None, typer.Option(metavar="OTHER", help="A second stage or model, in a column.")] = None,
    system: System = None,
    max_new_tokens: NewTokens = None,
    temperature: Temperature = None,
    top_p: TopP = None,
    seed: Annotated[int, typer.Option(min=0, help="Of drawn answers.")] = 0,
    model: Opener = DEFAULT_MODEL,
    device: str = "auto",
    raw: Raw = False,
    trust_remote_code: Trust = False,
) -> None:
    """Talk to a language model, or to two side by side; each line is a turn.

    /reset forgets what was said, /exit or Ctrl-D ends, Ctrl-C stops an answer. In a pipe each line of the input is a
    turn, and the answers alone are written.
    """
    from contextlib import ExitStack

    from llmq import chatting, environment
    from llmq.targets import last_stage
    from llmq.types import Context

    trust.given(trust_remote_code)
    asked = {"max_new_tokens": max_new_tokens, "temperature": temperature, "top_p": top_p, "system": system}
    how = chatting.settings({name: v for name, v in asked.items() if v is not None} | {"seed": seed, "raw": raw})
    stages = {each: last_stage(each, model)[1] for each in (target, beside) if each}
    context = Context(environment.prepare(device, seed, None), seed)
    with ExitStack() as opened:
        artifacts = {each: bring(context) for each, bring in stages.items()}
        for each, artifact in artifacts.items():
            if artifact.model.kind != "causal-lm":
                raise UserError(f"{each!r} is a {artifact.model.kind} model, which does not talk; see llmq predict")
        loaded = {each: opened.enter_context(a.open(context.device)) for each, a in artifacts.items()}
        chatting.converse([(each, loaded[each]) for each in (target, beside) if each], how)


def push(
    stage: Annotated[Path, typer.Argument(help="A stage of a run, or an export.", autocompletion=completing.stages)],
    repository: Annotated[str, typer.Argument(metavar="OWNER/NAME")],
    private: Annotated[bool, typer.Option("--private", help="Make a new repository private.")] = False,
    as_json: Json = False,
) -> None:
    """Upload a stage with its model card to the hub, as whom `hf auth login` says; prints the address."""
    address = llmq.push(stage, repository, private=private)
    typer.echo(to_json({"address": address}) if as_json else visible(address))
