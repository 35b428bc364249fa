"""What a backward pass makes again is what it would have kept, to the bit."""

from contextlib import nullcontext

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers.activations import ACT2FN

from llmq.text.made_again import LEAST, MAKERS, made_again

TOKENS, WIDTH, INNER = 128, 32, 1024


def gated(name: str, learned: bool) -> tuple[nn.ModuleDict, Tensor]:
    torch.manual_seed(0)
    layers = {"gate": nn.Linear(WIDTH, INNER), "up": nn.Linear(WIDTH, INNER), "down": nn.Linear(INNER, WIDTH)}
    module = nn.ModuleDict({**layers, "act": ACT2FN[name]})
    module["up"].requires_grad_(learned)
    return module, torch.randn(2, TOKENS // 2, WIDTH)


def gradients(module: nn.ModuleDict, x: Tensor) -> tuple[Tensor, list[Tensor]]:
    module.zero_grad()
    inner = module["act"](module["gate"](x)) * module["up"](x) * 0.5  # (2, tokens, inner)
    inner = inner.flatten(0, 1).mul_(2)  # a view, changed in place
    loss = functional.dropout(module["down"](inner), 0.5).square().sum()
    loss.backward()
    return loss.detach(), [p.grad.clone() for p in module.parameters() if p.grad is not None]


@pytest.mark.parametrize("name", ["silu", "gelu", "gelu_pytorch_tanh", "gelu_new", "relu", "quick_gelu", "tanh"])
@pytest.mark.parametrize("learned", [True, False], ids=["both-factors", "one-factor"])
def test_gradients_are_the_same_to_the_bit(name: str, learned: bool) -> None:
    module, x = gated(name, learned)
    found = []
    for context in (nullcontext(), made_again()):
        torch.manual_seed(1)
        with context:
            found.append(gradients(module, x))
    (loss, plain), (again_loss, again) = found
    assert torch.equal(loss, again_loss)
    assert all(map(torch.equal, plain, again))


def test_a_gated_block_makes_activation_and_product_again_once_each(monkeypatch: pytest.MonkeyPatch) -> None:
    assert TOKENS * INNER >= LEAST
    made = []
    for kind, maker in MAKERS.items():
        monkeypatch.setitem(MAKERS, kind, lambda node, kind=kind, maker=maker: made.append(kind) or maker(node))
    module, x = gated("silu", True)
    with made_again():
        loss = module["down"](functional.silu(module["gate"](x)) * module["up"](x)).sum()
    assert made == []
    loss.backward()
    # The product for the weight of `down`, and its factor anew for that and for the gradient of `up`.
    assert sorted(made) == ["MulBackward0", "SiluBackward0", "SiluBackward0"]
