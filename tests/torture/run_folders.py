"""Run folders and result files of lm-eval that were damaged: compared, gated, verified, and named as a target."""

import functools
import json
import random
import shutil
import tempfile
from pathlib import Path
from typing import Any

from torture import mutate
from torture.child import command, judge, warm_words

RESULTS = {
    "results": {"arc_easy": {"alias": "arc_easy", "acc,none": 0.5, "acc_stderr,none": 0.2, "acc_norm,none": 0.25}},
    "group_subtasks": {"arc_easy": []},
    "configs": {"arc_easy": {"task": "arc_easy", "output_type": "multiple_choice", "num_fewshot": 0, "metadata": {}}},
    "versions": {"arc_easy": 1.0},
    "n-shot": {"arc_easy": 0},
    "higher_is_better": {"arc_easy": {"acc": True, "acc_norm": True}},
    "n-samples": {"arc_easy": {"original": 8, "effective": 8}},
    "config": {"model": "hf", "model_args": "x", "limit": None},
    "lm_eval_version": "0.4.13",
    "model_name": "tiny",
}
SAMPLES = [
    {"doc_id": i, "doc": {"q": "x"}, "target": "0", "arguments": {}, "resps": [["-1.0", "False"]], "filter": "none",
     "filtered_resps": [["-1.0", "False"]], "metrics": ["acc", "acc_norm"], "doc_hash": f"{i:064x}",
     "prompt_hash": f"{i:064x}", "target_hash": f"{i:064x}", "acc": float(i % 2), "acc_norm": float(i % 4 == 0)}
    for i in range(8)
]  # fmt: skip
RULES = ["perplexity <= 1.03x base", "acc >= base - 1.0pt", "bytes_on_disk <= 0.6x base"]


def warm() -> None:
    """Nothing here opens a model."""
    from llmq import answers  # noqa: F401
    from llmq.report import html, markdown, screen  # noqa: F401

    warm_words()


@functools.cache
def _whole() -> Path:
    """A run of two stages with its recipe and hashes, and a result file with its samples."""
    import run_folders as runs

    from llmq import hashes

    home = Path(tempfile.mkdtemp(prefix="llmq-torture-"))
    answers = [1, 0, 1, 1, 0, 1, 0, 1] * 4
    stages = {
        "0-base": [runs.size(10), runs.perplexity([2.0, 2.1, 2.2] * 5), runs.accuracy(answers), runs.speed([5, 6, 7])],
        "1-quantize.bnb": [
            runs.size(4), runs.perplexity([2.1, 2.1, 2.3] * 5), runs.accuracy(answers[::-1]), runs.speed([6, 7, 8])
        ],
    }  # fmt: skip
    run = runs.write_run(home / "run", stages)
    (run / "recipe.yaml").write_text(
        "model: {causal_lm: {weights: smollm2-135m}}\nsteps:\n- quantize.bnb: {bits: 4}\nevaluate: [size]\nseed: 0\n"
    )
    for name in stages:
        told = {
            "model": {"models.causal_lm": {"weights": "m"}}, "weights": ".", "adapter": None, "runtime": "torch",
            "packed": False, "history": [], "notes": {}, "measurements": [],
        }  # fmt: skip
        (run / name / "artifact.json").write_text(json.dumps(told))
    hashes.record(run)
    (home / "h").mkdir()
    (home / "h" / "results_2026-01-02T03-04-05.json").write_text(json.dumps(RESULTS))
    rows = "".join(json.dumps(row) + "\n" for row in SAMPLES)
    (home / "h" / "samples_arc_easy_2026-01-02T03-04-05.jsonl").write_text(rows)
    return home


def once(seed: int, folder: Path) -> str:
    """One run folder or result file with something wrong, judged as the commands do."""
    dice = random.Random(f"runs {seed}")
    shutil.copytree(_whole(), folder, dirs_exist_ok=True)
    of_harness = dice.random() < 0.3
    files = sorted(f for f in (folder / ("h" if of_harness else "run")).rglob("*") if f.is_file())
    for _ in range(dice.choice([1, 1, 2])):
        _damage(dice.choice(files), dice)
    rule = ["--rule", dice.choice(RULES)]
    if of_harness:
        commands: list[list[Any]] = [["compare", "h", "run"]]
    else:
        commands = [
            ["compare", "run"], ["compare", "run/1-quantize.bnb", "run/0-base"], ["gate", "run", *rule],
            ["gate", "run/1-quantize.bnb", *rule], ["verify", "run"], ["eval", "run", "--suite", "nothing"],
            ["run", "run/recipe.yaml", "--resume", "--out", "run", "model.weights=./no"],
        ]  # fmt: skip
    argv = [*dice.choice(commands), *dice.choice([[], ["--json"]])]
    allowed = {"gate": (0, 1, 2, 3), "verify": (0, 1, 2)}.get(argv[0], (0, 2))
    return judge(command(argv, folder), seed, allowed)


def _damage(file: Path, dice: random.Random) -> None:
    if not file.is_file() or file.is_symlink():
        return
    content = file.read_bytes()
    if dice.random() < 0.06:
        mutate.of_file(file, dice)
        return
    try:
        if file.suffix == ".jsonl":
            lines = content.splitlines()
            place = dice.randrange(len(lines))
            lines[place] = mutate.of_json(lines[place], dice)
            file.write_bytes(b"\n".join([*lines, b""]))
        else:
            change = mutate.of_json if file.suffix == ".json" else mutate.of_bytes
            file.write_bytes(change(content, dice))
    except ValueError:  # it was changed before
        file.write_bytes(mutate.of_bytes(content, dice))
