"""adapt.scales: true gradients, frozen codes, the same bytes from the same seed, whatever happens in between."""

import pytest
import torch
from helpers import apply, base_of, dying_at, logits_of, some_ids
from safetensors import safe_open
from safetensors.torch import load_file
from test_blockwise import assert_same_files

from llmq.adapt.scales import ANSWER_BYTES
from llmq.errors import LlmqError, UserError
from llmq.files import BESIDE
from llmq.matrix.grid import Quantized, round_to_nearest
from llmq.text import scales
from llmq.text.scales import ANSWER, TOP, Lessons, Student, TunedLinear, answers, divergence, quantized

QUICK = {"samples": 8, "length": 32, "max_steps": 6, "save_steps": 2, "learning_rate": 1e-2, "held_out_rows": 2}

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def packed(tiny_llama, tmp_path_factory):
    """The tiny model with half of its layers in 2 bits, the others in 4 and one in 8."""
    modules = {"down_proj": {"bits": 8}, "layers.0": {"bits": 4, "sym": False}}
    settings = {"bits": 2, "group_size": 32, "samples": 4, "length": 64, "modules": modules}
    return apply("quantize.gptq", base_of(tiny_llama, "float32"), tmp_path_factory.mktemp("packed") / "1", **settings)


def stored(stage):
    return {name: t for file in stage.weights.glob("*.safetensors") for name, t in load_file(file).items()}


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("order", [False, True], ids=["in-order", "desc_act"])
def test_the_gradient_of_the_scales_is_that_of_autograd(bits, order):
    generator = torch.Generator().manual_seed(0)
    weight, rows = torch.randn(24, 64, generator=generator), torch.randn(3, 5, 64, generator=generator)
    made = round_to_nearest(weight, bits, 32, False)
    if order:
        made = Quantized(made.codes, made.scales, made.zeros, made.g_idx[torch.randperm(64, generator=generator)], bits)
    layer = TunedLinear(made, None, torch.float32)
    rows.requires_grad_()
    layer(rows).square().sum().backward()
    mine = layer.change.grad, rows.grad
    change = torch.zeros_like(made.scales, requires_grad=True)
    groups = made.g_idx.long()
    dense = (made.codes.float() - made.zeros[groups]) * (made.scales * (1 + change))[groups]
    assert torch.equal(dense.t(), made.weight())
    again = rows.detach().clone().requires_grad_()
    (again @ dense).square().sum().backward()
    for one, other in zip(mine, (change.grad, again.grad), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-3)


def test_the_divergence_over_all_tokens_is_that_of_pytorch_and_over_some_is_less():
    logits = torch.randn(2, 7, 50, generator=torch.Generator().manual_seed(0))
    teacher = torch.randn(2, 7, 50, generator=torch.Generator().manual_seed(1)).log_softmax(-1)
    exact = (
        torch.nn.functional.kl_div(logits.log_softmax(-1), teacher, log_target=True, reduction="none").sum(-1).mean()
    )
    for kept in 49, 10:
        best = teacher.topk(kept)
        found = divergence(logits, best.indices, best.values)
        assert found <= exact + 1e-5
        assert found == pytest.approx(float(exact), rel=1e-4) or kept < 49
    own = logits.log_softmax(-1).topk(10)
    assert divergence(logits, own.indices, own.values) == pytest.approx(0, abs=1e-6)


def test_an_untrained_student_is_the_packed_model(packed):
    expected = logits_of(packed.model.open(packed, "cpu").module, some_ids())
    module = packed.model.open(packed, "cpu").module
    student = Student(module, quantized(packed.weights, module))
    torch.testing.assert_close(student(some_ids()), expected, rtol=1e-5, atol=1e-6)
    assert {p.shape[0] for p in student.parameters()} >= {2, 4}  # groups
    assert len(list(student.parameters())) == 14


def test_the_teachers_answers_lie_in_a_file(tiny_llama, tmp_path):
    base = base_of(tiny_llama, "float32")
    module, windows = base.model.open(base, "cpu").module, some_ids(3, 20).tolist()
    answers(module, windows, 2.0, tmp_path / "told.npy")
    batch = Lessons(windows, tmp_path / "told.npy")([2, 0])
    expected = (logits_of(module, torch.tensor([windows[2], windows[0]])) / 2).log_softmax(-1).topk(TOP)
    torch.testing.assert_close(batch["log_p"], expected.values)
    assert torch.equal(batch["input_ids"], torch.tensor([windows[2], windows[0]]))
    assert TOP * ANSWER.itemsize == ANSWER_BYTES  # which the space on disk is reckoned from
    assert not list(tmp_path.glob(".*"))


def test_only_scales_change_and_the_divergence_falls(packed, tiny_llama, tmp_path):
    more = {**QUICK, "max_steps": 40, "save_steps": 40}
    stage = apply("adapt.scales", packed, tmp_path / "2", **more, data="pydoc")
    before, after = stored(packed), stored(stage)
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert tensor.dtype == after[name].dtype
        assert torch.equal(tensor, after[name]) != name.endswith("scales"), name
    assert sorted(f.name for f in stage.weights.iterdir()) == sorted(
        f.name for f in packed.weights.iterdir() if f.name not in BESIDE
    )
    losses = [loss for _, loss in stage.notes["training"]["held_out_loss"]]
    assert losses == sorted(losses, reverse=True) or losses[-1] < losses[0]
    ids = some_ids(4, 32)
    base = base_of(tiny_llama, "float32")
    p, q, tuned = (logits_of(s.model.open(s, "cpu").module, ids).log_softmax(-1) for s in (base, packed, stage))
    assert (p.exp() * (p - tuned)).sum() < (p.exp() * (p - q)).sum()
    assert stage.packed
    assert stage.notes["scales_moved_by"] > 0


@pytest.mark.slow
def test_a_killed_training_goes_on_to_the_same_bytes(packed, tmp_path, monkeypatch):
    whole = apply("adapt.scales", packed, tmp_path / "whole", **QUICK)

    with dying_at(5, monkeypatch):
        apply("adapt.scales", packed, tmp_path / "killed", **QUICK)
    assert not list((tmp_path / "killed").glob("*.safetensors"))
    monkeypatch.setattr(scales, "answers", None)  # the teacher has answered
    resumed = apply("adapt.scales", packed, tmp_path / "killed", **QUICK)
    assert_same_files(whole.weights, resumed.weights)
    assert resumed.notes["training"]["tokens"] == whole.notes["training"]["tokens"]


@pytest.mark.slow
def test_in_bfloat16_what_is_saved_answers_as_it_was_trained(tiny_llama, tmp_path):
    packed = apply("quantize.gptq", base_of(tiny_llama), tmp_path / "1", group_size=32, samples=4, length=64)
    stage = apply("adapt.scales", packed, tmp_path / "2", **QUICK)
    for file in stage.weights.glob("*.safetensors"):
        with safe_open(file, "pt") as opened:
            assert all(opened.get_tensor(n).dtype == torch.float16 for n in opened.keys() if n.endswith("scales"))  # noqa: SIM118


def test_a_save_that_differs_is_an_error(packed, tmp_path, monkeypatch):
    kept = scales.write_with
    wrong = lambda new, *rest: kept({name: tensor * 2 for name, tensor in new.items()}, *rest)  # noqa: E731
    monkeypatch.setattr(scales, "write_with", wrong)
    with pytest.raises(LlmqError, match="answers apart by"):
        apply("adapt.scales", packed, tmp_path / "out", **QUICK)


def test_other_formats_and_packed_bases_are_refused(packed, tiny_llama, tmp_path):
    from llmq import plugin

    nf4 = apply("quantize.bnb", base_of(tiny_llama), tmp_path / "1", bits=4)
    with pytest.raises(UserError, match=r"packed by bitsandbytes"):
        apply("adapt.scales", nf4, tmp_path / "2", **QUICK)
    with pytest.raises(UserError, match="packed already"):
        plugin.build({"adapt.scales": {}}).check_base(base_of(packed.weights))
