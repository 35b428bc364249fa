"""Quantizing takes memory for one block, not for the depth of the model."""

import json
import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import reshaped


def probe(warm_up: Path, folder: Path, samples: int, length: int) -> dict[str, float]:
    """What `memory_probe.py` says, in a process of its own."""
    file = Path(__file__).with_name("memory_probe.py")
    command = [sys.executable, file, warm_up, folder, str(samples), str(length)]
    root = file.parent.parent
    done = subprocess.run(
        command, capture_output=True, text=True, cwd=root, env={**os.environ, "PYTHONPATH": str(root)}, check=True
    )
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="glibc's allocator is not the one of this machine")
def test_layers_packed_by_way_of_copies_take_no_more_than_what_is_kept():
    command = [sys.executable, Path(__file__).with_name("heap_probe.py")]
    environ = {**os.environ, "PYTHONPATH": str(Path(__file__).parent.parent)}
    done = subprocess.run(command, capture_output=True, text=True, env=environ, check=True)
    told = json.loads(done.stdout)
    assert told["apart"] < 1.25 * told["kept"] < told["as it is"], told


@pytest.mark.slow
def test_peak_memory_is_flat_in_depth(tiny_llama, tmp_path):
    shape = {"hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 4, "num_key_value_heads": 2}
    peaks: dict[int, float] = {}
    for blocks in (4, 20):
        folder = reshaped(tiny_llama, tmp_path / str(blocks), num_hidden_layers=blocks, **shape)
        peaks[blocks] = probe(tiny_llama, folder, 8, 128)["peak"]
    print(peaks)
    # Sixteen blocks more are 13.5 MiB of weights; peaks of 27 and 31 were seen of 4 and of 16 blocks.
    assert peaks[20] - peaks[4] < 0.75 * 13.5, peaks
