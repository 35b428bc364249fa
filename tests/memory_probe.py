"""Peak memory of quantize.gptq on the model in a folder, above that of the process with everything imported, in MiB.

python tests/memory_probe.py WARM_UP_MODEL MODEL SAMPLES LENGTH
"""

import json
import re
import sys
import tempfile
import threading
import time
from pathlib import Path

from helpers import apply, base_of

from llmq import environment
from llmq.environment import release_memory


def resident() -> float:
    """Resident memory in MiB."""
    found = re.search(r"VmRSS:\s+(\d+)", Path("/proc/self/status").read_text())
    assert found
    return int(found[1]) / 1024


def main() -> None:
    """Print the peak, and the parts that it is measured against, as JSON."""
    warm_up, folder, samples, length = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])
    environment.prepare("cpu", 0, 2)
    with tempfile.TemporaryDirectory() as out:
        # To cut a long text into tokens takes more than all that follows, and would hide it.
        text = Path(out) / "text.jsonl"
        text.write_text('{"text": "one two three four five six seven eight nine ten"}\n' * (samples * length // 10))
        apply("quantize.gptq", base_of(Path(warm_up)), Path(out) / "warm-up", samples=1, length=64, group_size=32)
        base = base_of(folder)
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
        apply("quantize.gptq", base, Path(out) / "quantized", samples=samples, length=length, data=str(text))
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
