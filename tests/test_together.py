"""Questions that several processes answer together: shares, order, and what fails in one of them."""

import pickle
import shutil

import pytest
import torch
from generators import GAN, lively, off
from helpers import CPU, apply, base_of

from llmq import plugin, processes, together
from llmq.errors import LlmqError, UserError
from llmq.tasks import frechet
from llmq.text import batches, blockwise, decoding, losses, scoring
from llmq.text.examples import Tokens
from llmq.types import Context, Measurement


def doubled(module, device, share, numbers):
    """Work that fails for a 13."""
    assert 13 not in numbers[share.process :: share.processes]
    return {i: module * numbers[i] for i in share.of(range(len(numbers)))}


def placed(module, device, share, count):
    """Work that answers with the device that it is given."""
    return dict.fromkeys(share.of(range(count)), device)


def unlike(module, device, share):
    """Work that one process does as if it were alone."""
    return dict.fromkeys(range(3), 0) if share.process else {0: 0}


@pytest.fixture
def two(monkeypatch):
    """Two processes in one: what the first sends is answered as the second would, before anything is gathered."""
    sent, models = [], []

    def gathered(told, device):
        assert device == together._crew[-1].device
        with monkeypatch.context() as second:
            second.setenv("RANK", "1")
            return [told, together._answered(sent[-1], models, device)]

    monkeypatch.setenv("WORLD_SIZE", "2")

    def send(question, device):
        assert device == together._crew[-1].device, "the processes meet by the device of the run alone"
        sent.append(pickle.loads(pickle.dumps(question)))  # noqa: S301 - as the processes send it

    monkeypatch.setattr(together, "_send", send)
    monkeypatch.setattr(together, "_gathered", gathered)
    return sent


class Three:
    """An artifact whose network is the number 3."""

    def __eq__(self, other):
        return isinstance(other, Three)

    __hash__ = None

    def open(self, device):
        from contextlib import nullcontext
        from types import SimpleNamespace

        return nullcontext(SimpleNamespace(module=3, artifact=self, device="cpu"))


@pytest.mark.parametrize("of", [1, 2, 5])
def test_the_shares_of_all_processes_are_all_items_once(of):
    shares = [list(together.Share(number, of).of(range(11))) for number in range(of)]
    assert sorted(i for share in shares for i in share) == list(range(11))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


def test_answers_come_in_order_and_the_others_are_told_the_end(two):
    with together.leading("cpu"), together.opened(Three(), "cpu") as loaded:
        assert together.count() == 1
        assert together.answers(doubled, [loaded.module], "cpu", [1, 2, 3, 4, 5]) == [3, 6, 9, 12, 15]
        assert together.count() == 2
    assert [(bool(q.work), len(q.models)) for q in two] == [(True, 1), (False, 1), (False, 0)]


def test_a_module_that_nobody_else_can_open_is_asked_here(two):
    with together.leading("cpu"):
        assert together.answers(doubled, [7], "cpu", [1, 2, 3]) == [7, 14, 21]
        assert together.count() == 1
    assert [bool(q.work) for q in two] == [False]


def test_what_fails_in_another_process_is_raised_in_the_first(two):
    with together.leading("cpu"), together.opened(Three(), "cpu") as loaded:
        with pytest.raises(LlmqError, match="process 1 of 2: AssertionError"):
            together.answers(doubled, [loaded.module], "cpu", [1, 13])
        with pytest.raises(AssertionError):
            together.answers(doubled, [loaded.module], "cpu", [13, 1])
        assert together.answers(doubled, [loaded.module], "cpu", [1, 1]) == [3, 3]


def test_a_model_that_lies_elsewhere_is_asked_where_it_lies(two):
    """A graph of OpenVINO runs on the processor, and a group of its own would wait for the others for ever."""
    with together.leading("cuda:0"), together.opened(Three(), "cuda:0") as loaded:
        assert together.answers(placed, [loaded.module], loaded.device, 4) == ["cpu"] * 4


def test_shares_that_do_not_fit_together_are_no_answers(two):
    with together.leading("cpu"), together.opened(Three(), "cpu") as loaded, pytest.raises(LlmqError, match="unlike"):
        together.answers(unlike, [loaded.module], "cpu")


def test_alone_nobody_is_asked():
    assert processes.count() == 1
    with together.leading("cpu"), together.opened(Three(), "cpu") as loaded:
        assert together.answers(doubled, [loaded.module], "cpu", [1, 2]) == [3, 6]
        assert together.count() == 1


def test_shares_of_batches_give_the_losses_and_scores_of_one_process_to_the_bit(tiny_llama):
    drawn = torch.randint(5, 60, (7, 24), generator=torch.Generator().manual_seed(0)).tolist()
    rows = [row[: 24 - 2 * i] for i, row in enumerate(drawn)]
    windows = [Tokens(tuple(row), (False, *[True] * (len(row) - 1))) for row in rows]
    requests = [scoring.Request(tuple(row), 3) for row in rows]
    base = plugin.build({"causal_lm": {"weights": str(tiny_llama)}}, "models").base(Context("cpu", 0))
    shares = [together.Share(i, 2) for i in range(2)]
    with base.open("cpu") as loaded:
        for work, asked in ((losses._losses, (windows, 2)), (scoring._scores, (requests, 2))):
            whole = work(loaded.module, "cpu", together.Share(), *asked)
            parts = [work(loaded.module, "cpu", share, *asked) for share in shares]
            assert all(parts)
            assert {**parts[0], **parts[1]} == whole
            assert sorted(whole) == list(range(7))


SLICES = {"rock": {"scale": 2, "train_slices": 1, "held_out_slices": 3, "size": 48}}
IMAGES = {
    "accuracy": ({"data": "digits", "limit": 9}, {"timm_classifier": {
        "architecture": "test_resnet", "classes": 10, "channels": 1, "input_size": 32}}),
    "detection": ({"data": {"scenes": {"train": 1, "held_out": 5}}, "batch_size": 2}, {"torchvision_detector": {
        "architecture": "fcos", "classes": 10, "size": 64, "score_threshold": 0.001}}),
    "super_resolution": ({"data": SLICES}, {"srcnn": {"scale": 2}}),
    "no_reference": ({"data": SLICES}, {"srcnn": {"scale": 2}}),
    "rock": ({"data": SLICES}, {"srcnn": {"scale": 2}}),
    "fidelity": ({"n": 9, "shown": 2}, GAN),
    "frechet": ({"n": 21}, GAN),
    "frechet of real images": ({"n": 21, "data": "digits"}, {"dcgan": {**GAN["dcgan"], "channels": 1}}),
}  # fmt: skip


@pytest.mark.parametrize("word", IMAGES)
def test_two_processes_measure_images_as_one_does(word, two, tmp_path, monkeypatch):
    """Every figure with its samples, and every picture."""
    monkeypatch.setattr("llmq.models.dcgan.BATCH", 4)
    monkeypatch.setattr(frechet, "TOGETHER", 8)
    few = frechet.Extractor("few pixels", "0", lambda images: images[:, :, ::16, ::16].flatten(1))
    monkeypatch.setattr(frechet.Frechet, "_extractor", lambda task, device: few)
    asked, model = IMAGES[word]
    task = plugin.build({word.partition(" ")[0]: asked}, "tasks")
    assert task.in_every_process
    if model is GAN:
        base = lively(model, tmp_path / "base")
        stages = [off(base, tmp_path / "stage", 0.1), base]
    else:
        stages = [plugin.build(model, "models").base(CPU)]
    method = task.against if model is GAN else task.score
    with stages[0].open("cpu") as loaded, stages[-1].open("cpu") as base:
        alone = list(method(*[loaded, base][: len(stages)]))
    monkeypatch.setenv("LLMQ_CACHE", str(tmp_path / "cache"))
    with (
        together.leading("cpu"),
        together.opened(stages[0], "cpu") as loaded,
        together.opened(stages[-1], "cpu") as other,
    ):
        shared = list(method(*[loaded, other][: len(stages)]))
        assert together.count() == 2
    assert sum(bool(question.work) for question in two) == {"frechet": 3, "frechet of real images": 2}.get(word, 1)
    assert shared == alone
    assert any(isinstance(answer, Measurement) for answer in shared)


def test_two_processes_write_the_texts_of_one(two, tiny_llama, monkeypatch):
    """Those side by side in groups, and the sampled ones with the seeds of their order."""
    monkeypatch.setattr(decoding, "GROUP", 3)
    drawn = torch.randint(5, 60, (11, 12), generator=torch.Generator().manual_seed(0)).tolist()
    jobs = [decoding.Job(tuple(row[: 12 - i]), (), 6) for i, row in enumerate(drawn)]
    jobs += [decoding.Job((5, 6, 7), (), 6, {"do_sample": True, "temperature": 1.0})] * 3
    base = plugin.build({"causal_lm": {"weights": str(tiny_llama)}}, "models").base(CPU)
    with base.open("cpu") as loaded:
        alone = decoding.generate(loaded.module, loaded.processor, jobs, "cpu")
    with together.leading("cpu"), together.opened(base, "cpu") as loaded:
        assert decoding.generate(loaded.module, loaded.processor, jobs, "cpu") == alone
        assert together.count() == 2
    assert len(set(alone[-3:])) > 1


def test_two_processes_answer_the_prompts_of_one(two, tiny_llama, tiny_jsonl):
    task = plugin.build({"generate": {"data": str(tiny_jsonl), "examples": 3, "max_new_tokens": 4}}, "tasks")
    base = plugin.build({"causal_lm": {"weights": str(tiny_llama)}}, "models").base(CPU)
    with base.open("cpu") as loaded:
        alone = list(task.score(loaded))
    with together.leading("cpu"), together.opened(base, "cpu") as loaded:
        assert list(task.score(loaded)) == alone
        assert together.count() == 2


def test_a_process_that_reads_other_data_is_an_error(two, monkeypatch):
    asked, model = IMAGES["super_resolution"]
    task = plugin.build({"super_resolution": asked}, "tasks")
    base = plugin.build(model, "models").base(CPU)
    read = type(task.data).read

    def changed(self):
        from dataclasses import replace

        split = read(self)
        return replace(split, sha256="changed") if processes.number() else split

    monkeypatch.setattr(type(task.data), "read", changed)
    refused = pytest.raises(LlmqError, match=r"process 1 of 2: .*reads other data than the first, sha256 changed")
    with together.leading("cpu"), together.opened(base, "cpu") as loaded, refused:
        list(task.score(loaded))


CALIBRATED = {
    "gptq": ("quantize.gptq", {"bits": 3, "sweeps": 0, "group_size": 32, "modules": {"lm_head": {"bits": 4}}}),
    "gptq, a block at once, by the loss": (
        "quantize.gptq", {"group_size": 32, "true_sequential": False, "hessian": "loss"}),
    "awq, killed": ("quantize.awq", {"group_size": 32}),
    "wanda": ("prune.wanda", {"pattern": "2:4"}),
    "layers": ("prune.layers", {"drop": 1}),
}  # fmt: skip


@pytest.mark.parametrize("name", CALIBRATED)
def test_two_processes_calibrate_as_one_does(name, two, one_thread, tiny_llama, tiny_jsonl, tmp_path, monkeypatch):
    """The same files to the bit; also where a killed step goes on, whose first block is written already."""
    word, settings = CALIBRATED[name]
    monkeypatch.setattr(blockwise, "BATCH_TOKENS", 24)
    monkeypatch.setattr(batches, "AT_ONCE", 2)
    settings = {**settings, "samples": 5, "length": 24, "data": str(tiny_jsonl)}
    base = base_of(tiny_llama)
    apply(word, base, tmp_path / "alone", **settings)
    if "killed" in name:
        (tmp_path / "shared").mkdir()
        shutil.copy(tmp_path / "alone" / "model-00001-of-00003.safetensors", tmp_path / "shared")
    with together.leading("cpu"):
        apply(word, base, tmp_path / "shared", **settings)
        assert together.count() == 2
    assert not batches._under_way
    for file in (tmp_path / "alone").glob("*.safetensors"):
        assert file.read_bytes() == (tmp_path / "shared" / file.name).read_bytes(), file.name


def test_what_fails_amid_a_calibration_ends_it(two, tiny_llama, tiny_jsonl, tmp_path, monkeypatch):
    """In the second process with its words; in the first with its own, and the second is told the end."""
    heard = batches.Batches.heard
    settings = {"samples": 3, "length": 40, "data": str(tiny_jsonl), "group_size": 32}
    monkeypatch.setattr(blockwise, "BATCH_TOKENS", 40)
    for failing in (1, 0):

        def fails(self, order, share, failing=failing):
            if share.process == failing and order.block.endswith("1"):
                raise UserError("no room")
            return heard(self, order, share)

        monkeypatch.setattr(batches.Batches, "heard", fails)
        told = "process 1 of 2: no room" if failing else "^no room"
        with pytest.raises(LlmqError, match=told), together.leading("cpu"):
            apply("quantize.gptq", base_of(tiny_llama), tmp_path / str(failing), **settings)
        assert not batches._under_way
        assert not two[-1].work
        assert not two[-1].models
