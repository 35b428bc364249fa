"""Several processes for one run: who goes first, and who waits."""

import subprocess
import sys

import pytest

from llmq import processes


@pytest.mark.parametrize(("rank", "order"), [("0", ["work", "wait"]), ("1", ["wait", "work"])])
def test_the_first_process_works_while_the_others_wait(rank, order, monkeypatch):
    done = []
    monkeypatch.setenv("RANK", rank)
    monkeypatch.setattr(processes, "wait", lambda device: done.append("wait"))
    with processes.first_does("cpu"):
        done.append("work")
    assert done == order


def test_an_error_of_the_first_process_is_raised_and_not_waited_with(monkeypatch):
    monkeypatch.setattr(processes, "wait", lambda device: pytest.fail("it waits for processes that wait for it"))
    with pytest.raises(ZeroDivisionError), processes.first_does("cpu"):
        raise ZeroDivisionError


MEETING = """
import sys, time
from pathlib import Path
from llmq import processes
made = Path(sys.argv[1])
with processes.first_does("cpu"):
    if processes.is_first():
        time.sleep(1)
        made.touch()
    print("FOUND", made.exists(), flush=True)
"""


@pytest.mark.slow
def test_what_the_first_process_made_is_there_for_the_second(tmp_path):
    script = tmp_path / "meeting.py"
    script.write_text(MEETING)
    launched = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", "29632", str(script),
         str(tmp_path / "made")],
        capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert launched.stdout.count("FOUND True") == 2, launched.stderr
