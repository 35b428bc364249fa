"""What a run does on a card, tried without one: by fake cards, and by what the processor shares with them."""

import contextlib
import os
from types import SimpleNamespace

import pytest
import torch

from llmq import environment, errors, measure, questions
from llmq.artifact import Stage

OUT_OF_MEMORY = (
    "CUDA out of memory. Tried to allocate 3.91 GiB. GPU 0 has a total capacity of 23.55 GiB of which 1.20 GiB is "
    "free. Including non-PyTorch memory, this process has 22.34 GiB memory in use."
)


@pytest.fixture
def card(monkeypatch):
    """Two cards that do nothing but note which of them was meant."""
    noted = []

    def note(name):
        return lambda device=None: noted.append((name, str(device)))

    monkeypatch.setattr(torch.accelerator, "synchronize", note("synchronize"))
    monkeypatch.setattr(torch.cuda, "set_device", note("set_device"))
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device=None: (6 * 2**30, 8 * 2**30))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device=None: 3 * 2**30)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device=None: 2**30)
    monkeypatch.setenv("ACCELERATE_TORCH_DEVICE", "")
    return noted


@pytest.fixture
def precision():
    before = torch.backends.fp32_precision
    yield
    torch.backends.fp32_precision = before


def test_the_second_card_is_waited_for_and_not_the_first(card):
    measure.synchronize("cuda:1")
    measure.synchronize("cpu")
    assert card == [("synchronize", "cuda:1")]


def test_libraries_take_the_card_of_the_run_and_multiply_in_whole_float32(card, precision, monkeypatch):
    monkeypatch.setattr(environment, "resolve_device", lambda device: "cuda:1")
    torch.backends.fp32_precision = "tf32"
    assert environment.prepare("auto", 0, None) == "cuda:1"
    assert card == [("set_device", "1")]
    assert os.environ["ACCELERATE_TORCH_DEVICE"] == "cuda:1"
    assert torch.backends.fp32_precision == torch.backends.cudnn.conv.fp32_precision == "ieee"


def test_a_training_in_tf32_leaves_the_figures_after_it_in_float32(precision):
    from llmq.text.training import _environment_kept

    torch.backends.fp32_precision = "ieee"
    with _environment_kept():
        torch.backends.fp32_precision = "tf32"
    assert torch.backends.cuda.matmul.fp32_precision == "ieee"


def test_free_memory_of_a_card_has_what_its_allocator_keeps_unused(card):
    assert environment.free_memory("cuda:1") == 8 * 2**30


def test_answers_of_another_driver_or_cuda_are_other_answers(card, monkeypatch):
    from llmq import answers

    assert answers.machine("cpu")["accelerator"] is None
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a card")
    told = []
    for driver in ("570.1", "580.2"):
        monkeypatch.setattr(environment, "_driver", lambda driver=driver: driver)
        told.append(answers.machine("cuda:0")["accelerator"])
    assert told[0] != told[1]
    assert {"driver", "cuda", "cudnn", "float32_products"} <= told[0].keys()
    assert "gptqmodel" in answers.machine("cpu")["libraries"]


def test_random_numbers_go_on_as_they_were(monkeypatch):
    forked = []
    stock = torch.random.fork_rng
    monkeypatch.setattr(torch.random, "fork_rng", lambda devices: forked.append(devices) or stock([]))
    torch.manual_seed(3)
    wanted = torch.rand(2)
    torch.manual_seed(3)
    for device in ("cpu", "cuda:1"):
        with environment.forked_random(device):
            torch.rand(9)
    assert torch.equal(torch.rand(2), wanted)
    assert forked == [[], ["cuda:1"]]


def test_a_card_without_memory_is_one_line_with_what_it_had():
    told = errors.one_line(torch.OutOfMemoryError(OUT_OF_MEMORY))
    assert told.startswith("not enough memory: 4.2 GB were asked for at once (the card has 1.20 GiB free)")
    assert errors.exit_code(torch.OutOfMemoryError(OUT_OF_MEMORY)) == 4
    assert "the card has no more free" in errors.one_line(RuntimeError("CUDA out of memory."))


@pytest.mark.parametrize(("free", "slots"), [(2**40, 32), (2**23, 4), (0, 1)])
def test_a_decoder_fills_the_free_memory_of_a_card(free, slots, tiny_llama, monkeypatch):
    from transformers import AutoModelForCausalLM

    from llmq.text import decoding

    monkeypatch.setattr(decoding, "free_memory", lambda device: free)
    module = AutoModelForCausalLM.from_pretrained(tiny_llama)
    config = module.config
    per_token = 4 * config.num_key_value_heads * config.head_dim * config.num_hidden_layers
    most = 2**23 // 2 // 4 // per_token - 1  # four texts in half of 8 MiB
    jobs = {i: decoding.Job((1,), (), most) for i in range(40)}
    tokenizer = SimpleNamespace(eos_token_id=1)
    assert len(decoding._Writer(module, tokenizer, jobs, "cuda:0", None).slots) == slots
    assert len(decoding._Writer(module, tokenizer, jobs, "cpu", None).slots) == 32


def stages(*peaks):
    def figure(peak):
        return SimpleNamespace(metric="peak_memory", value=float(peak))

    artifact = SimpleNamespace(bytes_on_disk=10, open=lambda device: contextlib.nullcontext(device))
    return {f"{i}-x": Stage(f"{i}-x", artifact, (figure(peak),) if peak else ()) for i, peak in enumerate(peaks)}


def test_stages_are_open_at_once_only_where_all_of_them_fit(monkeypatch):
    monkeypatch.setattr(environment, "free_memory", lambda device: 100)
    assert questions.fit_at_once(list(stages(60, 40).values()), "cuda:0")
    assert not questions.fit_at_once(list(stages(60, 41).values()), "cuda:0")
    assert questions.fit_at_once(list(stages(90, None).values()), "cuda:0")  # bytes on disk where nothing was measured
    assert not questions.fit_at_once(list(stages(91, None).values()), "cuda:0")


@pytest.mark.parametrize("free", [0, 2**60])
def test_times_are_taken_and_the_failure_reported_where_stages_do_not_fit(free, tmp_path, monkeypatch):
    """One stage never opens: all at once or one at a time, the others have their times."""
    from llmq import plugin
    from llmq.types import Clock, Reading

    class Timed(plugin.load("tasks.speed")):
        def clocks(self, loaded):
            yield Clock("speed", lambda: None, (Reading("latency", "s", "lower", lambda s: s),), "c", 1, 3)

    def refuse(device):
        raise torch.OutOfMemoryError(OUT_OF_MEMORY)

    monkeypatch.setattr(environment, "free_memory", lambda device: free)
    asked = stages(60, 41, 5)
    asked["1-x"] = Stage("1-x", SimpleNamespace(bytes_on_disk=10, open=refuse), asked["1-x"].measurements)
    for name in asked:
        (tmp_path / name).mkdir()
    timed = questions.take_times(asked, [Timed()], tmp_path, "cpu")
    assert {name: [m.metric for m in s.measurements[1:]] for name, s in timed.items()} == {
        "0-x": ["latency"], "1-x": [], "2-x": ["latency"],
    }  # fmt: skip
    assert [f.error for f in timed["1-x"].failures] == [errors.one_line(torch.OutOfMemoryError(OUT_OF_MEMORY))]
    assert not timed["0-x"].failures
    assert "visits" in timed["0-x"].measurements[-1].convention


@pytest.mark.parametrize("word", ["adapt.lora", "adapt.full"])
def test_a_trained_model_is_gone_before_it_is_opened_again(word, tiny_llama, tiny_jsonl, tmp_path, monkeypatch):
    """A card has room for one; a trainer and its model hold one another."""
    import gc
    import weakref

    from helpers import apply, base_of

    from llmq import artifact, reopened

    opened = []
    stock = artifact.Artifact.open

    @contextlib.contextmanager
    def opening(self, device):
        with stock(self, device) as loaded:
            opened.append(weakref.ref(loaded.module))
            yield loaded

    def seen(saved, made, device, tolerance=0.0):
        gc.disable()  # what a collection by chance would take is no proof
        alive.extend(module() is not None for module in opened)
        return made

    alive = []
    monkeypatch.setattr(artifact.Artifact, "open", opening)
    monkeypatch.setattr(reopened, "reopened", seen)
    try:
        apply(word, base_of(tiny_llama), tmp_path / "a", data=str(tiny_jsonl), max_length=64, max_steps=1)
    finally:
        gc.enable()
    assert alive
    assert not any(alive)
