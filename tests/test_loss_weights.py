"""`hessian: loss`: each token of each layer weighs by the squared gradient of the loss at the layer's outputs."""

import pytest
import tiny_text_models
import torch
from helpers import apply, base_of, reshaped, some_ids
from test_blockwise import FEW, assert_same_files

from llmq.errors import LlmqError, UserError
from llmq.matrix.gram import Gram
from llmq.text import blockwise, loss_weights
from llmq.text.grids import Gptq
from llmq.text.skeleton import Skeleton

SETTINGS = {**FEW, "bits": 3, "group_size": 32, "hessian": "loss"}

pytestmark = pytest.mark.usefixtures("one_thread")


def layers_of(source):
    return [*(name for block in source.blocks for name in source.linears(block)), source.head]


def gradients(folder, batch):
    """The mean squared gradient of each linear layer's outputs, by plain autograd through the whole model."""
    from transformers import AutoModelForCausalLM

    module = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    outputs = {}

    def keep(name, output):
        output.retain_grad()
        outputs[name] = output

    for name, layer in module.named_modules():
        if isinstance(layer, torch.nn.Linear):
            layer.register_forward_hook(lambda _, args, output, name=name: keep(name, output))
    ids = torch.tensor(batch)
    logits = module(input_ids=ids).logits
    torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten(), reduction="sum").backward()
    return {name: output.grad.square().mean(-1).flatten() for name, output in outputs.items()}


@pytest.mark.parametrize("changes", [{}, {"tie_word_embeddings": True, "num_hidden_layers": 3}])
def test_weights_block_by_block_are_those_of_autograd_through_the_whole_model(changes, tiny_llama, tmp_path):
    folder = reshaped(tiny_llama, tmp_path / "model", **changes) if changes else tiny_llama
    batches = [some_ids(2, 30).tolist(), some_ids(3, 30).tolist()[2:]]
    source = Skeleton(folder, "float32")
    made = loss_weights.loss_weights(source, layers_of(source), batches)
    found = [gradients(folder, batch) for batch in batches]
    assert made.keys() == found[0].keys()
    for layer, weights in made.items():
        expected = torch.cat([each[layer] for each in found])
        weights = loss_weights.of_mean_one(weights)
        torch.testing.assert_close(weights, expected / expected.mean(), rtol=1e-3, atol=1e-5)
        assert weights.isfinite().all()
        assert weights.mean() == pytest.approx(1)
        assert (weights[29::30] == 0).all() or layer != source.head  # nothing follows the last token of a window


@pytest.mark.parametrize("name", ["gemma2", "gpt_neox", "bamba"])  # soft-capped logits, other names, states
def test_weights_are_those_of_autograd_in_other_families(name, tiny_llama, tmp_path):
    folder, batch = tiny_text_models.build(name, tmp_path / "model", tiny_llama), some_ids(2, 30).tolist()
    source = Skeleton(folder, "float32")
    made, found = loss_weights.loss_weights(source, layers_of(source), [batch]), gradients(folder, batch)
    for layer, weights in made.items():
        torch.testing.assert_close(weights, found[layer], rtol=1e-3, atol=1e-4 * float(found[layer].max()))


def test_no_block_stays_in_memory_and_the_model_is_left_as_it_was(tiny_llama):
    source = Skeleton(tiny_llama, "float32")
    loaded, load = [], source.load

    def watched(block):
        loaded.append([b for b in source.blocks if any(not p.is_meta for p in parameters(b))])
        load(block)

    def parameters(block):
        return source.module.get_submodule(block).parameters()

    source.load = watched
    forward = type(source.module.get_submodule(source.blocks[0])).forward
    loss_weights.loss_weights(source, layers_of(source), [some_ids(2, 20).tolist()])
    assert loaded == [[]] * 4  # two blocks, there and back
    assert all(p.is_meta for block in source.blocks for p in parameters(block))
    assert source.module.get_submodule(source.blocks[0]).forward.__func__ is forward


@pytest.mark.slow
def test_equal_weights_give_the_plain_result_to_the_bit(tiny_llama, tiny_jsonl, tmp_path, monkeypatch):
    plain = {**SETTINGS, "data": str(tiny_jsonl), "hessian": "inputs"}
    monkeypatch.setattr(
        loss_weights,
        "_squared_gradients",
        lambda _, layers, ids: dict.fromkeys(layers, torch.full((ids.numel(),), 0.3)),
    )
    for dtype in "float32", "bfloat16":
        apply("quantize.gptq", base_of(tiny_llama, dtype), tmp_path / dtype / "inputs", **plain)
        apply("quantize.gptq", base_of(tiny_llama, dtype), tmp_path / dtype / "loss", **{**plain, "hessian": "loss"})
        assert_same_files(tmp_path / dtype / "inputs", tmp_path / dtype / "loss")


@pytest.mark.parametrize(
    ("word", "settings"),
    [
        pytest.param("quantize.awq", {"group_size": 32}, marks=pytest.mark.slow),
        pytest.param("quantize.awq", {"group_size": 32, "solver": "gptq"}, marks=pytest.mark.slow),
        ("prune.wanda", {}),
        pytest.param("prune.sparsegpt", {}, marks=pytest.mark.slow),
        ("prune.alps", {}),
    ],
    ids=str,
)
def test_every_step_that_calibrates_takes_the_weights(word, settings, tiny_llama, tiny_jsonl, tmp_path):
    both = {**FEW, **settings, "data": str(tiny_jsonl)}
    stages = [apply(word, base_of(tiny_llama), tmp_path / h, hessian=h, **both).weights for h in ("inputs", "loss")]
    names = [file.name for file in stages[0].glob("*.safetensors")]
    assert any((stages[0] / name).read_bytes() != (stages[1] / name).read_bytes() for name in names)


def test_a_row_of_weight_four_counts_as_four_rows():
    rows = torch.randn(40, 24, generator=torch.Generator().manual_seed(0))
    weights = torch.tensor([1.0, 4.0, 0.0, 2.25]).repeat(10)
    exact = {
        "hessian": rows.t() @ (rows * weights[:, None]),
        "squares": (rows.square() * weights[:, None]).sum(0),
        "magnitudes": (rows.abs() * weights[:, None]).sum(0),
    }
    for kind, expected in exact.items():
        gram = Gram(kind, weights)
        gram.add(rows[:15])
        gram.add(rows[15:].view(5, 5, 24))
        torch.testing.assert_close(gram.total(), expected, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize(
    "killed_at",
    [pytest.param("model.layers.0.self_attn.o_proj", marks=pytest.mark.slow), "model.layers.1.mlp.up_proj"],
)
def test_a_killed_job_goes_on_to_the_same_bytes_without_a_second_backward_pass(
    killed_at, tiny_llama, tiny_jsonl, tmp_path, monkeypatch
):
    settings = {**SETTINGS, "data": str(tiny_jsonl)}
    apply("quantize.gptq", base_of(tiny_llama), tmp_path / "whole", **settings)
    change = Gptq.change

    def killed(self, layers, gathered):
        if killed_at in layers:
            raise KeyboardInterrupt
        return change(self, layers, gathered)

    with monkeypatch.context() as patch:
        patch.setattr(Gptq, "change", killed)
        with pytest.raises(KeyboardInterrupt):
            apply("quantize.gptq", base_of(tiny_llama), tmp_path / "out", **settings)
    assert (tmp_path / "out" / blockwise.WEIGHTS).exists()
    monkeypatch.setattr(blockwise, "loss_weights", None)
    apply("quantize.gptq", base_of(tiny_llama), tmp_path / "out", **settings)
    assert_same_files(tmp_path / "out", tmp_path / "whole")
    assert not (tmp_path / "out" / blockwise.WEIGHTS).exists()


def test_a_gradient_that_is_not_finite_is_named(tiny_llama, monkeypatch):
    source = Skeleton(tiny_llama, "float32")
    load = source.load

    def broken(block):
        load(block)
        source.linear(f"{block}.mlp.down_proj").weight.data[0, 0] = torch.inf

    source.load = broken
    with pytest.raises(LlmqError, match="not finite"):
        loss_weights.loss_weights(source, layers_of(source), [some_ids(1, 20).tolist()])


def test_experts_are_refused_by_name(tiny_llama, tmp_path):
    folder = tiny_text_models.build("mixtral", tmp_path / "model", tiny_llama)
    with pytest.raises(UserError, match=r"experts.*sees \d+ rows for \d+ tokens.*hessian: inputs"):
        apply("quantize.gptq", base_of(folder), tmp_path / "out", **{**SETTINGS, "data": "pydoc"})


def test_windows_of_one_token_are_refused(tiny_llama):
    source = Skeleton(tiny_llama, "float32", "cpu")
    with pytest.raises(UserError, match="windows of one token have no next token"):
        loss_weights.loss_weights(source, layers_of(source), [[[5]], [[6]]])
