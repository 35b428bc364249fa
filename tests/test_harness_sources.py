"""Answers of lm-eval's tasks are kept no longer than the code and files they came from, wherever those lie."""

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
import json, sys
from pathlib import Path
from llmq import pipeline, plugin, trust
from llmq.types import Context
trust.given(remote_code=True)
model = plugin.build({"causal_lm": {"weights": sys.argv[1], "dtype": "float32"}}, "models")
task = plugin.build({"lm_eval": {"tasks": ["t"], "include_path": sys.argv[2], "limit": 2}}, "tasks")
for name in sys.argv[3:]:
    report = pipeline.evaluate({"0-base": model.base(Context("cpu", 0))}, [task], Path(name), Context("cpu", 0), {})
    print("SAID", json.dumps([report.measurements[0]["value"], report.stages[0]["reused"]]))
"""


@pytest.mark.slow
@pytest.mark.parametrize("kind", UTILS)
def test_what_a_task_reads_elsewhere_counts(tiny_llama, tmp_path, kind):
    import json
    import os

    aside, folder = tmp_path / "aside", tmp_path / "tasks"
    aside.mkdir()
    name = f"helper_{kind.replace(' ', '_')}"
    file, data = aside / f"{name}.py", aside / "value.txt"
    says = {"process_results": "!function utils.process_results", "metric_list": metrics("own", aggregation="mean")}
    write(folder, "t", {**CHOICE, **says})
    utils = UTILS[kind].format(aside=str(aside), name=name, file=str(file), data=str(data))
    (folder / "utils.py").write_text(utils + "def process_results(doc, results):\n    return {'own': score(doc)}\n")
    (tmp_path / "ask.py").write_text(ASK)
    said = []
    for value in (0.25, 0.25, 0.75):
        file.write_text(f"def score(doc):\n    return {value}\n")
        data.write_text(str(value))
        out = str(tmp_path / f"out{len(said)}")
        environment = {**os.environ, "SCORE": str(value), "LLMQ_CACHE": str(tmp_path / "cache")}
        command = [sys.executable, str(tmp_path / "ask.py"), str(tiny_llama), str(folder), out]
        done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
        assert done.returncode == 0, done.stderr[-2000:]
        said.append(json.loads(done.stdout.split("SAID", 1)[1].splitlines()[0]))
    assert [s[0] for s in said] == [0.25, 0.25, 0.75]
    assert not said[2][1]
