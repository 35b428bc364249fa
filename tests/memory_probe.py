"""Peak memory of a step on the model in a folder, above that of the process with everything imported, in MiB.

python tests/memory_probe.py STEP WARM_UP_MODEL MODEL SAMPLES LENGTH
"""

import json
import re
import sys
import tempfile
import threading
import time
from pathlib import Path

from helpers import adapted_by_chance, apply, base_of

from llmq import environment
from llmq.environment import release_memory


def resident() -> float:
    """Resident memory in MiB, without pages of files, which the system takes back when it needs them."""
    found = re.search(r"RssAnon:\s+(\d+)", Path("/proc/self/status").read_text())
    assert found
    return int(found[1]) / 1024


def main() -> None:
    """Print the peak, and the parts that it is measured against, as JSON."""
    step, warm_up, folder, samples, length = sys.argv[1], *map(Path, sys.argv[2:4]), *map(int, sys.argv[4:])
    calibrated, merged = step == "quantize.gptq", step == "adapt.merge"
    environment.prepare("cpu", 0, 1)
    with tempfile.TemporaryDirectory() as out:
        # To cut a long text into tokens takes more than all that follows, and would hide it.
        text = Path(out) / "text.jsonl"
        text.write_text('{"text": "one two three four five six seven eight nine ten"}\n' * (samples * length // 10))
        small: dict[str, object] = {"samples": 1, "length": 64} if calibrated else {}
        small = {"tokens": 64, "window": 32} if merged else {**small, "group_size": 32}
        base, first = base_of(folder), base_of(warm_up)
        if merged:
            base, first = (adapted_by_chance(b, Path(out) / b.weights.name, r=1) for b in (base, first))
        apply(step, first, Path(out) / "warm-up", **small)
        release_memory("cpu")
        before = peak = resident()
        done = False

        def watch() -> None:
            nonlocal peak
            while not done:
                peak = max(peak, resident())
                time.sleep(0.002)

        watcher = threading.Thread(target=watch)
        watcher.start()
        whole: dict[str, object] = {"samples": samples, "length": length, "data": str(text)} if calibrated else {}
        whole = {"tokens": samples * length, "window": length} if merged else whole
        apply(step, base, Path(out) / "quantized", **whole)
        done = True
        watcher.join()
        source = base.model.skeleton(base, "cpu")
        block = sum(p.numel() for p in source.module.get_submodule(source.blocks[0]).parameters()) * 2
        activations = samples * length * source.config.hidden_size * 2
        files = sum(f.stat().st_size for f in base.weight_files())
    parts = {"block": block / 2**20, "activations": activations / 2**20, "files": files / 2**20}
    print(json.dumps({"peak": peak - before, **parts}))


if __name__ == "__main__":
    main()
