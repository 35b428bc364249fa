"""The slow run of made-up faults: as many cases of each kind as the house promises to bear, and none at fault."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).parent
SEED = 20_000
CASES = {"recipes": 2000, "checkpoints": 500, "data_files": 2000, "run_folders": 500, "faults": 20, "starved": 6}
CODE = """
import sys
from torture.endless import some
seen = some(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
print(seen.told(sys.argv[1]))
sys.exit(bool(seen.faults) or not seen.cases)
"""


def ended(kind: str, seed: int, cases: int) -> subprocess.CompletedProcess[str]:
    """Cases of a kind in a fresh process, which warms what that kind needs and no more."""
    env = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(TESTS.parent), str(TESTS)]),
        "OMP_NUM_THREADS": "1",
        "RUST_BACKTRACE": "0",
    }
    run = [sys.executable, "-c", CODE, kind, str(seed), str(cases)]
    return subprocess.run(run, capture_output=True, text=True, env=env, check=False)


@pytest.mark.slow
@pytest.mark.parametrize("kind", CASES)
def test_made_up_faults_end_in_one_line(kind):
    done = ended(kind, SEED, CASES[kind])
    print(done.stdout[-2000:])
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]


def test_a_few_recipes_end_in_one_line():
    done = ended("recipes", 1, 10)
    assert done.returncode == 0, done.stdout + done.stderr
