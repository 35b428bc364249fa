"""Whole runs of every kind, killed at seeded moments: whatever was killed goes on to the same bytes."""

import subprocess
import sys
from pathlib import Path

import pytest

KILLS = Path(__file__).parent / "torture" / "kills.py"


@pytest.mark.slow
def test_twenty_seeded_kills_lose_nothing(tmp_path):
    """Two processes, one for the even seeds and one for the odd: no recipe is run by both."""
    halves = [
        subprocess.Popen(
            [sys.executable, str(KILLS), str(tmp_path / first), "--seed", first, "--step", "2", "--count", "10"],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for first in ("0", "1")
    ]
    said = "".join(half.communicate()[0] for half in halves)
    print(said)
    assert [half.returncode for half in halves] == [0, 0], said
    assert said.count("10 seeds, 0 faults") == 2
