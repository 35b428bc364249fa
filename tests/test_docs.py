"""The site: no page is stale, it builds, it asks for nothing outside; and the code of the tutorials runs."""

import re
import runpy
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from typer.testing import CliRunner

from llmq import cli

ROOT = Path(__file__).parent.parent
TUTORIALS = ROOT / "docs/tutorials"
FENCE = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
QUICK = (
    "perplexity.limit=8 perplexity.window=64 lm_eval.limit=8 speed.rounds=8 speed.prompt_tokens=16 speed.new_tokens=4"
)
GPTQ = f"quantize.gptq.group_size=32 quantize.gptq.samples=2 quantize.gptq.length=64 {QUICK}"
FOUR = "super_resolution.limit=4 rock.limit=4"
EDSR = f"adapt.train.max_steps=12 adapt.train.batch_size=2 model.n_resblocks=4 speed.rounds=8 {FOUR}"
SHORT = {
    "quantize": GPTQ,
    "run text/rtn4": f"quantize.rtn.group_size=32 {QUICK}",
    "run text/gptq4": GPTQ,
    "run rock.yaml": EDSR,
    "eval runs/gptq4": "--limit 16",
    "eval runs/rock": FOUR,
}
"""Settings that are added to the commands of the tutorials, so that each takes seconds."""
FEWER = {"range(28)": "range(6)", "[:24]": "[:4]", "[24:]": "[4:]"}
"""Changes to the Python of the tutorials, to the same end."""


def blocks(tutorial: Path) -> Iterator[tuple[str, str]]:
    """The language and the code of each fenced block, in order."""
    yield from ((language, code) for language, code in FENCE.findall(tutorial.read_text()))


def test_pages_from_code_are_not_stale():
    stale = [str(f.relative_to(ROOT)) for f, text in runpy.run_path(str(ROOT / "scripts/docs"))["pages"]()
             if not f.is_file() or f.read_text(encoding="utf-8") != text]  # fmt: skip
    assert not stale, f"run scripts/docs: {', '.join(stale)}"


def test_the_site_builds_and_asks_for_nothing_outside(tmp_path):
    pytest.importorskip("material", reason="the extra docs is not installed")
    made = ("--strict", "--quiet", "-f", str(ROOT / "mkdocs.yml"), "-d", str(tmp_path))
    command = [sys.executable, "-m", "mkdocs", "build", *made]
    built = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert built.returncode == 0, built.stderr
    pages = list(tmp_path.rglob("index.html"))
    assert len(pages) > 12
    for page in pages:
        asked = re.findall(r"<(?:script|link|img|iframe)[^>]*(?:src|href)=\"?(?:https?:)?//[^\" >]+", page.read_text())
        assert not asked, page


def commands(code: str) -> Iterator[tuple[list[str], str]]:
    """The words of each command of llmq, and the text that is piped into it."""
    for line in filter(None, map(str.strip, code.replace("\\\n", " ").splitlines())):
        said, _, rest = line.rpartition(" | ") if line.startswith("echo ") else ("", "", line)
        words = shlex.split(rest, comments=True)
        assert words[0] == "llmq", f"a tutorial says {line!r}, which no test runs"
        yield words[1:], " ".join(shlex.split(said)[1:]) + "\n" if said else ""


def run(words: list[str], said: str, model: Path) -> None:
    """Run one command on the model in a folder, shortened; a gate may have any verdict on a random model."""
    line = " ".join(words)
    words = [str(model) if word == "smollm2-135m" else word for word in words]
    words += next((more.split() for begin, more in SHORT.items() if line.startswith(begin)), [])
    if line.startswith("run text/"):
        words.append(f"model.weights={model}")
    result = CliRunner().invoke(cli.app, words, input=said or None)
    fine = {0, 1, 3} if words[0] == "gate" else {0}
    assert result.exit_code in fine, f"llmq {line}\n{result.output}\n{result.exception!r}"


@pytest.mark.slow
@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("tutorial", sorted(TUTORIALS.glob("*.md")), ids=lambda file: file.stem)
def test_all_code_of_a_tutorial_runs(tutorial, tiny_llama, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    ran = 0
    for language, code in blocks(tutorial):
        if language == "python":
            for whole, fewer in FEWER.items():
                code = code.replace(whole, fewer)
            exec(compile(code, tutorial.name, "exec"), names)
        elif language == "bash":
            for words, said in commands(code):
                run(words, said, tiny_llama)
        elif language == "yaml":
            Path(code.split()[1]).write_text(code)  # the first line names the file
        else:
            assert language == "text", f"a block of {language} that no test runs"
        ran += language != "text"
    assert ran >= 4


def test_scaling_quotes_the_peak_that_the_plan_tells():
    table = (ROOT / "docs" / "sizing.md").read_text().partition("## 405B")[2]
    peak = re.search(r"\| GPTQ, 4 bits.*?\|.*?\|.*?\| ([\d.]+) GB", table)
    assert peak
    assert f"it: {round(float(peak[1]))} GB for 405B" in (ROOT / "docs" / "scaling.md").read_text()
