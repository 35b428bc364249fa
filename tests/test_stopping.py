"""SIGINT and SIGTERM: one line, exit code 130 or 143, in time; whatever the process is doing."""

import os
import signal
import subprocess
import sys
import time

import pytest

BEGIN = """
import hashlib, os, signal, subprocess, sys, time
from pathlib import Path
from llmq import stopping
stopping.PATIENCE = 0.2
def begun():
    print("begun", flush=True)
with stopping.handled():
"""
DOING = {
    "python": "begun(); time.sleep(60)",
    "native code": "begun(); hashlib.pbkdf2_hmac('sha256', b'', b'', 10**9)",
    "a loop that swallows everything": """
    begun()
    while True:
        try:
            time.sleep(60)
        except BaseException:
            pass
""",
    "what fails on its way out": """
    from llmq import cli
    def work(*words, **settings):
        begun()
        try:
            time.sleep(60)
        finally:
            raise OSError("no space")
    cli.command_line = lambda: work
    cli.main()
""",
    "a guarded reader": """
    from llmq.guarded.files import library
    with library("a", "file"):
        begun()
        time.sleep(60)
""",
    "what may open no file": """
    import resource
    resource.setrlimit(resource.RLIMIT_NOFILE, (3, 3))
    with stopping.handled():
        begun()
        time.sleep(60)
""",
    "a destructor": """
    class Slow:
        def __del__(self):
            begun()
            time.sleep(60)
    Slow()
    time.sleep(60)
""",
}


def start(doing: str) -> subprocess.Popen:
    code = BEGIN + (doing if doing.startswith("\n") else f"    {doing}\n")
    child = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    assert child.stdout
    assert child.stdout.readline() == "begun\n"
    return child


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=lambda s: s.name)
@pytest.mark.parametrize("doing", DOING)
def test_a_signal_ends_a_command_in_one_line(doing, number):
    child = start(DOING[doing])
    began = time.perf_counter()
    child.send_signal(number)
    out, err = child.communicate(timeout=10)
    assert (child.returncode, out, err) == (128 + number, "", "llmq: stopped\n")
    assert time.perf_counter() - began < 2


def test_a_run_that_has_begun_is_told_how_to_go_on():
    child = start("stopping.resumable = Path('runs/a b'); begun(); time.sleep(60)")
    child.terminate()
    assert child.communicate(timeout=10)[1] == (
        "llmq: stopped; go on with: llmq run 'runs/a b/recipe.yaml' --out 'runs/a b' --resume\n"
    )


def test_a_forked_worker_dies_by_its_own_signal_and_its_parent_lives():
    doing = """
    reader, writer = os.pipe()
    worker = os.fork()
    if not worker:
        os.write(writer, b".")
        time.sleep(60)
    os.read(reader, 1)
    os.kill(worker, signal.SIGTERM)
    assert os.waitpid(worker, 0)[1] == signal.SIGTERM
    time.sleep(0.5)
    begun()
"""
    child = start(doing)
    assert child.communicate(timeout=10) == ("", "")
    assert child.returncode == 0


def test_a_signal_that_is_ignored_from_outside_stays_ignored():
    code = BEGIN + "    os.kill(os.getpid(), signal.SIGINT); time.sleep(0.3)"
    done = subprocess.run(
        [sys.executable, "-c", code],
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_IGN),
        capture_output=True,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, b"")


def test_the_signals_are_given_back():
    from llmq import stopping

    before = [signal.getsignal(s) for s in stopping.SIGNALS]
    with stopping.handled():
        assert [signal.getsignal(s) for s in stopping.SIGNALS] == [stopping._end] * 2
    assert [signal.getsignal(s) for s in stopping.SIGNALS] == before


@pytest.mark.skipif(sys.platform != "linux", reason="prctl(2) is Linux's")
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT], ids=lambda s: s.name)
def test_a_child_ends_with_its_parent_however_that_ends(number):
    child = "from llmq import processes; processes.end_with_parent(); print(flush=True); import time; time.sleep(60)"
    doing = f"""
    child = subprocess.Popen([sys.executable, '-c', {child!r}], stdout=subprocess.PIPE)
    child.stdout.readline()
    begun()
    print(child.pid, flush=True)
    time.sleep(60)
"""
    parent = start(doing)
    assert parent.stdout
    worker = int(parent.stdout.readline())
    parent.send_signal(number)
    parent.wait()
    for _ in range(100):
        if not _lives(worker):
            return
        time.sleep(0.05)
    pytest.fail("the child lives on")


def _lives(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    with open(f"/proc/{process}/stat") as stat:
        return stat.read().rsplit(")", 1)[1].split()[0] != "Z"
