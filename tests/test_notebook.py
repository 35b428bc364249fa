"""The example in `docs/notebook.py` runs from top to bottom, in a folder of its own."""

import os
import subprocess
import sys

import pytest
from conftest import ROOT


@pytest.mark.slow
def test_the_notebook_runs(tiny_llama, tmp_path):
    settings = {**os.environ, "MODEL": str(tiny_llama), "PYTHONPATH": str(ROOT)}
    told = subprocess.run(
        [sys.executable, str(ROOT / "docs/notebook.py")], cwd=tmp_path, env=settings, capture_output=True, text=True
    )
    assert told.returncode == 0, told.stderr[-2000:]
    assert "token_perplexity" in told.stdout
    assert list(tmp_path.glob("runs/*/model.gguf"))
