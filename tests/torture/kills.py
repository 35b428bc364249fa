"""Seeded kills of whole runs: whatever was killed goes on to the same bytes, and says what it owes in one line.

`kill_once(seed, folder)` kills one run, resumes it, perhaps kills that too, and compares what is left in the end with a
run that was left alone. Runs are forked from this process, which has imported the libraries once. As a script:
`python tests/torture/kills.py FOLDER --seed 0 --count 20`.
"""

import argparse
import importlib
import json
import os
import random
import signal
import sys
import time
import traceback
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

TESTS = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(TESTS.parent), str(TESTS)]
os.environ.update(OMP_NUM_THREADS="1", TQDM_DISABLE="1", TOKENIZERS_PARALLELISM="false", HF_HUB_OFFLINE="1")

SIGNALS = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT)
IN_TIME = 2.0
FOREVER = 180.0

SEEN = {"os.rename", "os.remove", "os.mkdir", "os.rmdir", "open", "shutil.rmtree", "os.listdir", "os.scandir"}
"""The audit events at which a run can be killed: each touch of its folder."""
TIMES = {"seconds", "tokens_per_second", "examples_per_second", "peak_memory", "asked", "reused"}
UNEQUAL = {"log.txt", "report.json", "report.md", "report.html", "hashes.json", "clocks.json"}
"""Files that hold times, or the hashes of such."""


def recipes(models: Path) -> dict[str, dict[str, Any]]:
    """One small recipe of every kind, over the models in a folder."""
    rows, text, little = str(models / "rows.jsonl"), str(models / "llama"), {"samples": 4, "length": 32}
    calibrated = {"data": rows, **little}
    lora = {
        "data": rows, "r": 2, "max_length": 64, "max_steps": 5, "save_steps": 2, "per_device_train_batch_size": 2,
        "lora_dropout": 0.1, "packing": False,
    }  # fmt: skip
    workers = {"dataloader_num_workers": 1}
    train = {"max_steps": 5, "save_steps": 2, "batch_size": 4, "held_out_examples": 4}
    digits: dict[str, Any] = {"data": "digits", **train}
    rock = {"rock": {"size": 48, "train_slices": 4, "held_out_slices": 2}}
    scenes = {"scenes": {"train": 16, "held_out": 4, "size": 64, "digits": [1, 3], "scale": [20, 40]}}
    llm = {"causal_lm": {"weights": text}}
    classifier = {
        "timm_classifier": {
            "architecture": "resnet10t", "model_args": {"channels": [16, 32, 64, 64]}, "classes": 10, "channels": 1,
            "input_size": 32, "crop_pct": 1.0,
        }
    }  # fmt: skip
    detector = {"torchvision_detector": {"architecture": "fcos", "backbone": "small", "classes": 10}}
    gan = {"dcgan": {"features": 4, "latent_size": 8, "channels": 1, "weights": str(models / "gan/model.safetensors")}}
    edsr = {"edsr": {"n_resblocks": 1, "n_feats": 48}}
    texts = [
        "size",
        {"perplexity": {"data": rows, "limit": 4}},
        {"generate": {"data": rows, "examples": 1, "max_new_tokens": 2}},
    ]
    images = ["size", {"accuracy": {"data": "digits", "limit": 32}}]
    few = ["size", {"super_resolution": {"data": rock, "limit": 1}}]
    jobs = {
        "qlora-merge": (llm, [{"quantize.bnb": {"bits": 4}}, {"adapt.lora": lora}, "adapt.merge"], texts),
        "train-prune-train": (
            classifier,
            [{"adapt.train": digits}, {"prune.channels": {"ratio": 0.5}}, {"adapt.train": digits}],
            images,
        ),
        "gptq-lora": (
            llm,
            [
                {"quantize.gptq": {**calibrated, "bits": 4, "group_size": 32}},
                {"adapt.lora": {**lora, "lr_scheduler_type": "constant", "optim": "adamw_8bit"}},
            ],
            texts,
        ),
        "gan-train": (
            gan,
            [{"adapt.train": {**digits, "learning_rate": 0.001}}, {"prune.channels": {"ratio": 0.5, "round_to": 2}}],
            ["size", "fidelity"],
        ),
        "layers-lora-rtn": (
            llm,
            [
                {"prune.layers": {**calibrated, "drop": 1}},
                {"adapt.lora": {**lora, "packing": True, "gradient_accumulation_steps": 2}},
                "adapt.merge",
                {"quantize.rtn": {"bits": 4, "group_size": 32}},
            ],
            texts,
        ),
        "wanda-lora": (
            llm,
            [
                {"prune.wanda": {**calibrated, "pattern": "2:4"}},
                {"adapt.lora": {**lora, "use_dora": True, "training_arguments": workers}},
            ],
            texts,
        ),
        "detector": (detector, [{"adapt.train": {"data": scenes, **train}}], ["size"]),
        "sparsegpt-gptq": (
            llm,
            [
                {"prune.sparsegpt": {**calibrated, "sparsity": 0.5}},
                {"quantize.gptq": {**calibrated, "bits": 8, "group_size": 32}},
            ],
            texts,
        ),
        "gan-distill": (
            gan,
            [
                {"prune.channels": {"ratio": 0.5, "round_to": 2}},
                {"adapt.distill": {"max_steps": 5, "save_steps": 2, "batch_size": 4}},
            ],
            ["size", "fidelity"],
        ),
        "magnitude-int8-lora": (
            llm,
            [
                {"prune.magnitude": {"sparsity": 0.3}},
                {"quantize.bnb": {"bits": 8}},
                {"adapt.lora": {**lora, "lr_scheduler_type": "linear"}},
            ],
            texts,
        ),
        "srcnn-sparse-train": (
            {"srcnn": {}},
            [
                {"prune.magnitude": {"sparsity": 0.3}},
                {"adapt.train": {"data": rock, **train, "lr_scheduler_type": "constant", "optim": "sgd"}},
            ],
            few,
        ),
        "edsr-float16": (
            edsr,
            [
                {"adapt.train": {"data": rock, **train}},
                {"prune.channels": {"ratio": 0.5, "scope": "inner", "round_to": 2}},
                "quantize.float16",
            ],
            few,
        ),
        "dynamic": (edsr, ["quantize.dynamic"], few),
        "int8": (edsr, [{"quantize.int8": {"data": rock, "samples": 4}}], few),
    }
    return {
        name: {"model": model, "steps": steps, "evaluate": evaluate, "seed": 0, "threads": 1, "device": "cpu"}
        for name, (model, steps, evaluate) in jobs.items()
    }


@dataclass(frozen=True)
class Moment:
    """When a run is killed: after seconds, or as it touches its folder for the n-th time."""

    number: signal.Signals
    seconds: float = 0.0
    touch: int = 0

    def __str__(self) -> str:
        when = f"at touch {self.touch}" if self.touch else f"after {self.seconds:.2f} s"
        return f"{self.number.name} {when}"


@dataclass(frozen=True)
class Ended:
    """How a run ended."""

    code: int
    seconds: float
    since_kill: float
    said: str
    touches: int


def kill_once(seed: int, folder: Path) -> str:
    """Kill a run, once or several times, resume it, and compare; says what was done. Raises `AssertionError`."""
    import yaml

    from torture.child import freeze

    rng = random.Random(seed)
    models = warmed(folder)
    jobs = recipes(models)
    name = list(jobs)[seed % len(jobs)]
    place = folder / f"kill-{seed}"
    recipe = folder / f"{name}.yaml"
    recipe.write_text(yaml.safe_dump(jobs[name], sort_keys=False))
    reference = left_alone(recipe, folder / "left-alone" / name)
    freeze()
    out, told = place / "run", [name]
    kept = ["--no-cache"] if rng.random() < 0.5 else []
    words = ["run", str(recipe), "--out", str(out), *kept]
    for _ in range(rng.choice((1, 1, 2, 3))):
        number, share = rng.choice(SIGNALS), rng.random()
        if rng.random() < 0.5:
            moment = Moment(number, touch=1 + int(share * reference["touches"]))
        else:
            moment = Moment(number, seconds=0.7 * share * reference["seconds"])  # the first run imported more
        resumed = ["--resume"] if out.is_dir() else []
        ended = run([*words, *resumed], place, moment)
        told.append(f"{'resumed, ' if resumed else ''}{moment}: {ended.code}")
        check_end(ended, moment, out, told)
        if ended.code == 0:
            break
    if ended.code:
        ended = run([*words, *(["--resume"] if out.is_dir() else [])], place)
        assert ended.code == 0, f"{told}: going on ended with {ended.code}\n{ended.said}"
    differences = list(compare(folder / "left-alone" / name / "run", out))
    assert not differences, f"{told}: {differences}"
    remove(place)
    return f"seed {seed}: {'; '.join(told)}"


def check_end(ended: Ended, moment: Moment, out: Path, told: list[str]) -> None:
    """What a killed run owes: its exit code, its one line, in time, and a promise only where it can be kept."""
    if ended.code == 0:  # it was done before
        return
    codes = {signal.SIGKILL: -signal.SIGKILL, signal.SIGTERM: 143, signal.SIGINT: 130}
    assert ended.code == codes[moment.number], f"{told}: ended with {ended.code}\n{ended.said}"
    if moment.number == signal.SIGKILL:
        return
    load = max(1.0, os.getloadavg()[0] / (os.cpu_count() or 1))  # others may work on this machine
    assert ended.since_kill < IN_TIME * load, f"{told}: took {ended.since_kill:.1f} s"
    lines = [line for line in ended.said.splitlines() if line.startswith("llmq:")]
    assert len(lines) == 1, f"{told}: no single line\n{ended.said}"
    assert "Traceback" not in ended.said, f"{told}\n{ended.said}"
    if "--resume" in lines[0]:
        assert (out / "recipe.yaml").exists(), f"{told}: {lines[0]}, and there is nothing to go on with"
    else:
        assert (out / "hashes.json").exists() or not (out / "0-base").exists(), (
            f"{told}: {lines[0]}, and stages lie there"
        )


def left_alone(recipe: Path, place: Path) -> dict[str, Any]:
    """Run a recipe without any kill, once; its seconds and how often it touched its folder."""
    about, written = place / "about.json", recipe.read_text()
    if not about.exists() or json.loads(about.read_text())["recipe"] != written:
        remove(place)
        ended = run(["run", str(recipe), "--out", str(place / "run")], place)
        assert ended.code == 0, f"{recipe.stem}, left alone, ended with {ended.code}\n{ended.said}"
        about.write_text(json.dumps({"recipe": written, "seconds": ended.seconds, "touches": ended.touches}))
        imported = (place / "imported.txt").read_text().split()
        for name in imported:  # the runs after this one are forked with all that it needed
            with suppress(ImportError):
                importlib.import_module(name)
    told: dict[str, Any] = json.loads(about.read_text())
    return told


def compare(left_alone: Path, killed: Path) -> Iterator[str]:
    """What differs between two runs that should hold the same."""
    files = [
        {f.relative_to(run).as_posix() for f in run.rglob("*") if f.is_file() and f.name not in UNEQUAL}
        for run in (left_alone, killed)
    ]
    yield from (f"{name} is only in one" for name in sorted(files[0] ^ files[1]))
    yield from (f"{name} is not there" for name in UNEQUAL - {"clocks.json"} if not (killed / name).is_file())
    for name in sorted(files[0] & files[1]):
        one, other = ((run / name).read_bytes() for run in (left_alone, killed))
        if one != other and timeless(one, left_alone) != timeless(other, killed):
            yield f"{name} differs"


def timeless(data: bytes, run: Path) -> Any:
    """Text without what no two runs share: in JSON its times, where the run lies, and the way from it to its base."""

    def without(value: Any) -> Any:
        if isinstance(value, Mapping):
            # Weights outside of a run are a pair of paths: the absolute one, and the way from the stage.
            told = {k: v[:1] if k == "weights" and isinstance(v, list) else v for k, v in value.items()}
            return {k: without(v) for k, v in told.items() if k not in TIMES}
        return [without(v) for v in value] if isinstance(value, list) else value

    text = data.decode("utf-8", "surrogateescape").replace(str(run), "RUN")
    return without(json.loads(text)) if text.startswith(("{", "[")) else text


def run(words: list[str], place: Path, moment: Moment | None = None) -> Ended:
    """Run the command line in a forked process with a log of its own, and perhaps kill it."""
    place.mkdir(parents=True, exist_ok=True)
    log, counted = place / "said.txt", place / "touches.txt"
    began = time.perf_counter()
    child = os.fork()
    if not child:
        work(words, log, counted, place / "run", moment)
    killed_at, code = 0.0, None
    while code is None:
        now = time.perf_counter() - began
        if moment and moment.seconds and not killed_at and now > moment.seconds:
            os.kill(child, moment.number)
            killed_at = now
        if now > FOREVER:
            os.kill(child, signal.SIGKILL)
            raise AssertionError(f"{words}: hangs\n{log.read_text()}")
        ended, status = os.waitpid(child, os.WNOHANG)
        code = os.waitstatus_to_exitcode(status) if ended else None
        time.sleep(0.005)
    seconds = time.perf_counter() - began
    if moment and moment.touch and counted.exists():
        killed_at = float(counted.read_text().split()[1]) - began
    wait_for_group(child, words)
    touches = int(counted.read_text().split()[0]) if counted.exists() else 0
    return Ended(code, seconds, seconds - killed_at, log.read_text(errors="replace"), touches)


def wait_for_group(leader: int, words: list[str]) -> None:
    """See that no process outlives a run; a worker of a data loader looks for its parent every five seconds."""
    until = time.perf_counter() + 8
    with suppress(ProcessLookupError):
        while time.perf_counter() < until:
            os.killpg(leader, 0)
            time.sleep(0.02)
        os.killpg(leader, signal.SIGKILL)
        raise AssertionError(f"{words}: a process of its own outlived it")


def work(words: list[str], log: Path, counted: Path, out: Path, moment: Moment | None) -> None:
    """The forked process. Never returns."""
    code = 99
    try:
        os.setsid()
        said = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(said, 1)
        os.dup2(said, 2)
        counted.unlink(missing_ok=True)
        touches = count_touches(out, counted, moment)
        sys.argv = ["llmq", *words]
        from llmq import __main__ as entry

        try:
            entry.main()
        except SystemExit as stop:
            code = int(stop.code or 0)
        counted.write_text(f"{touches[0]} {time.perf_counter()}")
        counted.with_name("imported.txt").write_text("\n".join(n for n in sys.modules if n != "__main__"))
    except BaseException:  # noqa: BLE001 - the parent reads it
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def count_touches(out: Path, counted: Path, moment: Moment | None) -> list[int]:
    """Count how often this process touches a folder, and kill it at the right time."""
    touches, within = [0], str(out)

    def heard(event: str, given: tuple[Any, ...]) -> None:
        if event in SEEN and given and within in str(given[0]):
            touches[0] += 1
            if moment and touches[0] == moment.touch:
                counted.write_text(f"{touches[0]} {time.perf_counter()}")
                os.kill(os.getpid(), moment.number)

    sys.addaudithook(heard)
    return touches


def warmed(folder: Path) -> Path:
    """Import the libraries and make the models, once; no step runs here, as threads do not outlive a fork."""
    models = folder / "models"
    os.environ["LLMQ_CACHE"] = str(folder / "cache")
    if not (models / "done").exists():
        child = os.fork()
        if not child:
            make_models(models)
        assert os.waitpid(child, 0)[1] == 0, "the models could not be made"
    import bitsandbytes
    import openvino
    import peft
    import sklearn.datasets
    import timm
    import torchvision
    import transformers

    from llmq.text import training
    from llmq.vision import loop
    from torture.child import no_machine_is_measured

    no_machine_is_measured()
    assert all((bitsandbytes, openvino, peft, sklearn.datasets, timm, torchvision, transformers, loop, training))
    return models


def make_models(models: Path) -> None:
    """Write the models and the data that recipes read. In a process of its own; never returns."""
    code = 1
    try:
        remove(models)
        import generators
        import tiny_text_models

        models.mkdir(parents=True)
        tiny_text_models.llama(models / "llama")
        tiny_text_models.additions(models / "rows.jsonl")
        generators.lively({"dcgan": {"features": 4, "latent_size": 8, "channels": 1}}, models / "gan")
        (models / "done").touch()
        code = 0
    except BaseException:  # noqa: BLE001 - the parent reads it
        traceback.print_exc()
    finally:
        os._exit(code)


def remove(folder: Path) -> None:
    """Remove a folder, if it is there."""
    import shutil

    if folder.exists():
        shutil.rmtree(folder)


def main() -> None:
    """Kill some runs."""
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--count", type=int, default=20)
    parser.add_argument("--step", type=int, default=1, help="from one seed to the next")
    given = parser.parse_args()
    failed = 0
    for seed in range(given.seed, given.seed + given.count * given.step, given.step):
        began = time.perf_counter()
        try:
            print(f"{kill_once(seed, given.folder)} ({time.perf_counter() - began:.1f} s)", flush=True)
        except AssertionError as fault:
            failed += 1
            print(f"seed {seed}: FAULT {fault}", flush=True)
    print(f"{given.count} seeds, {failed} faults")
    sys.exit(bool(failed))


if __name__ == "__main__":
    main()
