"""Several processes for one run: who goes first, and who waits."""

import os
import re
import subprocess
import sys
from collections import defaultdict
from contextlib import nullcontext
from pathlib import Path

import pytest

import llmq
from llmq import processes
from llmq.errors import UserError


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


@pytest.mark.parametrize(("started", "asked"), [({"WORLD_SIZE": "2"}, 2), ({}, 2), ({}, 1)])
def test_processes_that_were_asked_for_and_not_started_are_an_error(started, asked, monkeypatch):
    """The variables that `accelerate launch --cpu` sets for its one process."""
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
    for name, value in {**({"MASTER_ADDR": "127.0.0.1"} if asked > 1 else {}), **started}.items():
        monkeypatch.setenv(name, value)
    lost = asked > 1 and not started
    with pytest.raises(UserError, match="torchrun --nproc_per_node") if lost else nullcontext():
        processes.check(shares=True)


@pytest.mark.parametrize("image", [False, True])
def test_processes_that_would_only_wait_are_an_error(image, tiny_llama, tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    plain = {"model": {"causal_lm": {"weights": str(tiny_llama)}}, "steps": [{"quantize.rtn": {"group_size": 32}}]}
    if image:
        plain = {"model": "dcgan", "steps": [{"adapt.train": {"data": "digits"}}], "evaluate": ["size"]}
    with pytest.raises(UserError, match="2 processes were started, and no step and no task here shares"):
        llmq.run(plain, out=tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_run_after_run_is_made_by_one_process(tiny_llama, tmp_path, monkeypatch):
    """The others end with the first run, and the second would wait for them."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="2 processes were started, and a search is made by one"):
        llmq.search(tiny_llama, kl=0.1, out=tmp_path / "search")
    with pytest.raises(UserError, match="2 processes were started, and a sweep is made by one"):
        llmq.sweep(tmp_path / "sweep.yaml", out=tmp_path / "sweep")
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_accelerate_really_starts_one_process_for_two_on_processors(tmp_path):
    launched = subprocess.run(
        [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", "2", "-m", "llmq", "run",
         "text/quickstart", "--out", str(tmp_path / "run")],
        capture_output=True, text=True, timeout=200, check=False,
        env={**os.environ, "PYTHONPATH": os.getcwd(), "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert "started one" in launched.stderr, launched.stderr
    assert launched.returncode != 0
    assert not (tmp_path / "run").exists()


def documented():
    """The configuration files of accelerate in docs/scaling.md, by name."""
    text = (Path(__file__).parents[1] / "docs" / "scaling.md").read_text(encoding="utf-8")
    return dict(re.findall(r"```yaml\n# (\S+) +accelerate launch[^\n]*\n(.*?)```", text, re.DOTALL))


@pytest.mark.parametrize("name", ["ddp.yaml", "fsdp2.yaml", "zero2.yaml"])
def test_accelerate_reads_the_documented_configurations(name, tmp_path):
    """accelerate refuses a setting that it does not know; those of an engine it hands on."""
    from accelerate.commands.config.config_args import load_config_from_file
    from accelerate.commands.launch import launch_command_parser

    file = tmp_path / name
    file.write_text(documented()[name])
    read = load_config_from_file(str(file))
    known = vars(launch_command_parser().parse_args(["script.py"]))
    engine = {**read.fsdp_config, **read.deepspeed_config} if name != "ddp.yaml" else {}
    assert bool(engine) == (name != "ddp.yaml")
    # The launcher reads the settings of an engine as its own options, and drops others.
    assert all(key in known or f"deepspeed_{key}" in known for key in engine), engine.keys() - known.keys()
    assert read.num_processes == 2


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


def test_every_process_names_the_folder_before_the_first_makes_it(tiny_llama, tmp_path, monkeypatch):
    """Without --out each takes the first free name: the next one would take another if the first had made its own."""
    from llmq import pipeline, recipe

    job = recipe.parse(recipe.Source("recipe", {"model": {"causal_lm": {"weights": str(tiny_llama)}}}), "job")
    waited = []

    def wait(device):
        waited.append((tmp_path / "run").exists())
        raise InterruptedError

    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(processes, "wait", wait)
    with pytest.raises(InterruptedError):
        pipeline.run(job, tmp_path / "run")
    assert waited == [False]


@pytest.mark.parametrize(("here", "fits"), [(1, True), (3, False)])
def test_processes_that_train_together_need_the_memory_of_a_model_each(here, fits, tiny_llama, monkeypatch):
    from llmq import environment, planning, recipe

    plain = {"model": {"causal_lm": {"weights": str(tiny_llama)}}, "steps": [{"adapt.lora": {"data": "pydoc"}}]}
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(here))
    monkeypatch.setattr(environment, "free_memory", lambda device: int(2.5 * planning.LIBRARIES))

    made = planning.plan(recipe.parse(recipe.Source("recipe", plain), "job"), rates=defaultdict(lambda: 1e9))
    assert (not made.misfits) == fits
