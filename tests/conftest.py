"""What all tests share: no network, a cache of their own, and a tiny model that is real but for its size."""

import gc
import os
import signal
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

# Before any import of a library that reads them.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ["TQDM_DISABLE"] = "1"
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:  # as nohup and a shell's & leave it, to children too
    signal.signal(signal.SIGINT, signal.default_int_handler)
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # or each worker would take every core

import pytest
import tiny_text_models
from helpers import exit_code
from pytest_socket import disable_socket, socket_allow_hosts
from torture.child import rates_at_hand

from llmq import environment, trust
from llmq.artifact import Artifact
from llmq.matrix import products
from llmq.types import Split

ROOT = Path(__file__).parent.parent


def pytest_runtest_setup(item: pytest.Item) -> None:
    """No test reaches a network, but one that says so; a `loopback` one talks to a server of its own."""
    if item.get_closest_marker("loopback"):
        socket_allow_hosts(["127.0.0.1"], allow_unix_socket=True)
    elif item.get_closest_marker("network") is None:
        disable_socket(allow_unix_socket=True)


@pytest.fixture(autouse=True)
def _what_is_loaded_is_not_collected() -> None:
    """Each model that is freed asks the garbage collector, which need not look through all libraries every time."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session", autouse=True)
def _libraries_are_set_aside() -> Iterator[None]:
    """No run of a test brings them back."""
    with environment.set_aside():
        yield


@pytest.fixture(autouse=True)
def _nothing_is_trusted() -> None:
    """No test trusts what another trusted."""
    trust.given()


@pytest.fixture(autouse=True)
def _no_machine_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    """A run foretells its time by rates that a test need not wait two seconds for."""
    monkeypatch.setattr("llmq.planning.rates.measure", rates_at_hand)


@pytest.fixture(scope="session", autouse=True)
def _texts_are_tokenized_once() -> Iterator[None]:
    """Calibration on Python's reference manual costs a quarter of a second, for the same tokens in every test."""
    from llmq.text.calibration import Windowed

    stock, kept = Windowed._ids, {}

    def once(self: Windowed, artifact: Artifact[Any], split: Split, rows: Sequence[Any]) -> list[int]:
        file = artifact.weights / "tokenizer.json"
        if split.shape != "text" or not file.is_file():  # rows have marks of the model's own; no file, no key
            return stock(self, artifact, split, rows)
        told = artifact.weights / "tokenizer_config.json"
        key = split.sha256, rows is split.train, file.read_bytes(), told.is_file() and told.read_bytes()
        if key not in kept:
            kept[key] = stock(self, artifact, split, rows)
        return list(kept[key])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Windowed, "_ids", once)
        yield


@pytest.fixture
def llmq(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> Callable[..., tuple[int, str, str]]:
    """Runs a command line in an empty folder: exit code, standard output and error."""
    monkeypatch.chdir(tmp_path)
    return lambda *words: (exit_code(*words), *capsys.readouterr())


@pytest.fixture
def trusting() -> None:
    """Code that a test's own folder brings may run."""
    trust.given(remote_code=True)


@pytest.fixture(scope="session", autouse=True)
def llmq_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The cache folder of this test session, for child processes too."""
    folder = tmp_path_factory.mktemp("llmq-cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LLMQ_CACHE", str(folder))
        yield folder


@pytest.fixture(scope="session", autouse=True)
def _products() -> None:
    """All tests multiply bfloat16 as a run does, whatever test came before."""
    products.widen()


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """torch on one thread, for tests whose work is too small to share."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a random bfloat16 Llama of 2 layers, and a byte-level tokenizer of 400 tokens trained for it."""
    return tiny_text_models.llama(tmp_path_factory.mktemp("tiny-llama"))


@pytest.fixture(scope="session")
def tiny_jsonl(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file of 20 prompt/completion rows."""
    return tiny_text_models.additions(tmp_path_factory.mktemp("data") / "tiny.jsonl")


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real data that only some machines have."""
    folder = ROOT.parent / "shared" / "data"
    if not folder.is_dir():
        pytest.skip(f"real data is not on this machine: there is no {folder}")
    return folder
