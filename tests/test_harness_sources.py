"""Answers of lm-eval's tasks are kept no longer than the code and files they came from, wherever those lie."""

import json
import os
import subprocess
import sys

import pytest
from lm_eval_tasks import CHOICE, metrics, write

ASIDE = "import sys\nsys.path.insert(0, {aside!r})\n"
UTILS = {
    "imported": ASIDE + "from {name} import score\n",
    "imported late": ASIDE + "def score(doc):\n    import {name}\n    return {name}.score(doc)\n",
    "by its path": (
        "import importlib.util\nspec = importlib.util.spec_from_file_location('h', {file!r})\n"
        "h = importlib.util.module_from_spec(spec)\nspec.loader.exec_module(h)\nscore = h.score\n"
    ),
    "data read late": "from pathlib import Path\ndef score(doc):\n    return float(Path({data!r}).read_text())\n",
    "data read once": "VALUE = float(open({data!r}).read())\ndef score(doc):\n    return VALUE\n",
    "environment": "import os\ndef score(doc):\n    return float(os.environ['SCORE'])\n",
}
ASK = """
import json, os, sys
from pathlib import Path
import datasets, lm_eval.evaluator, lm_eval.tasks, scipy.stats, transformers.models.llama.modeling_llama
from llmq import environment, pipeline, plugin, trust
from llmq.harness import data, model, results, run
from llmq.types import Context

trust.given(remote_code=True)

def ask(job):
    sys.dont_write_bytecode = True  # what Python keeps of a module heeds its size and second, which are the same here
    os.environ["LLMQ_CACHE"], os.environ["SCORE"] = job["cache"], str(job["value"])
    Path(job["file"]).write_text(f"def score(doc):\\n    return {job['value']}\\n")
    Path(job["data"]).write_text(str(job["value"]))
    context = Context(environment.prepare("cpu", 0, 1), 0)
    model = plugin.build({"causal_lm": {"weights": sys.argv[1], "dtype": "float32"}}, "models")
    task = plugin.build({"lm_eval": {"tasks": ["t"], "include_path": job["folder"], "limit": 2}}, "tasks")
    report = pipeline.evaluate({"0-base": model.base(context)}, [task], Path(job["out"]), context, {})
    print("SAID", json.dumps([job["kind"], report.measurements[0]["value"], report.stages[0]["reused"]]), flush=True)

for job in json.load(sys.stdin):
    child = os.fork()  # a process of its own for each, without the seconds that the imports above take
    if not child:
        try:
            ask(job)
            os._exit(0)
        finally:
            os._exit(1)
    if os.waitpid(child, 0)[1]:
        sys.exit(f"{job['kind']} failed")
"""


@pytest.fixture(scope="module")
def said(tiny_llama, tmp_path_factory):
    """For each kind the answers in three processes, and whether they were kept; the last has another value."""
    root = tmp_path_factory.mktemp("sources")
    jobs = []
    for kind, utils in UTILS.items():
        name = f"helper_{kind.replace(' ', '_')}"
        aside, folder = root / kind / "aside", root / kind / "tasks"
        aside.mkdir(parents=True)
        file, data = aside / f"{name}.py", aside / "value.txt"
        says = {"process_results": "!function utils.process_results", "metric_list": metrics("own", aggregation="mean")}
        write(folder, "t", {**CHOICE, **says})
        score = utils.format(aside=str(aside), name=name, file=str(file), data=str(data))
        (folder / "utils.py").write_text(
            f"{score}def process_results(doc, results):\n    return {{'own': score(doc)}}\n"
        )
        places = {"file": file, "data": data, "folder": folder, "cache": root / kind / "cache"}
        for i, value in enumerate((0.25, 0.25, 0.75)):
            plain = {k: str(v) for k, v in {**places, "out": root / kind / f"out{i}"}.items()}
            jobs.append({"kind": kind, "value": value, **plain})
    (root / "ask.py").write_text(ASK)
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(root / "ask.py"), str(tiny_llama)]
    done = subprocess.run(
        command, input=json.dumps(jobs), capture_output=True, text=True, env=environment, check=False, timeout=300
    )
    assert done.returncode == 0, done.stderr[-2000:]
    told = [json.loads(line[5:]) for line in done.stdout.splitlines() if line.startswith("SAID ")]
    return {kind: [(value, bool(kept)) for which, value, kept in told if which == kind] for kind in UTILS}


@pytest.mark.slow
@pytest.mark.parametrize("kind", UTILS)
def test_what_a_task_reads_elsewhere_counts(said, kind):
    late = kind in ("imported late", "data read late")  # not known before it was asked: then nothing is kept
    assert [value for value, _ in said[kind]] == [0.25, 0.25, 0.75]
    assert [kept for _, kept in said[kind]] == [False, not late, False]
