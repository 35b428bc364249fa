"""Small things that several test files need."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from llmq import plugin
from llmq.artifact import Artifact
from llmq.types import Context

CPU = Context("cpu", 0)


def base_of(folder: Path, dtype: str = "bfloat16") -> Artifact:
    """The untouched model in a folder, as an artifact."""
    model: Any = plugin.build({"causal_lm": {"weights": str(folder), "dtype": dtype}}, "models")
    return model.base(CPU)


def apply(word: str, artifact: Artifact, folder: Path, **settings: Any) -> Artifact:
    """What a step makes of an artifact."""
    folder.mkdir(parents=True, exist_ok=True)
    step: Any = plugin.build({word: settings})
    return step.apply(artifact, folder, CPU)


def some_ids(rows: int = 2, tokens: int = 24) -> torch.Tensor:
    """Token ids that every tiny vocabulary has."""
    return torch.randint(10, 200, (rows, tokens), generator=torch.Generator().manual_seed(1))


def logits_of(module: Any, ids: torch.Tensor) -> torch.Tensor:
    """Logits in evaluation mode."""
    with torch.inference_mode():
        return module(input_ids=ids).logits


def adapter_bytes(artifact: Artifact) -> bytes:
    """The adapter's weights as they lie on disk."""
    assert artifact.adapter is not None
    return (artifact.adapter / "adapter_model.safetensors").read_bytes()


def exit_code(*words: object) -> int:
    """What a command line ends with, run in this process."""
    from llmq import cli

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", ["llmq", *map(str, words)])
        with pytest.raises(SystemExit) as stop:
            cli.main()
    return int(stop.value.code or 0)


@contextmanager
def dying_at(step: int, monkeypatch: Any) -> Iterator[None]:
    """Each training of a language model is interrupted after a step."""
    from llmq.text import training

    def die(self: Any, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == step:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(training.Watch, "on_step_end", die)
        with pytest.raises(KeyboardInterrupt):
            yield


def reshaped(folder: Path, target: Path, **changes: int) -> Path:
    """A random model like the one in `folder` but for its shape, with the same tokenizer."""
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    config = AutoConfig.from_pretrained(folder, **changes)
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).to(torch.bfloat16).save_pretrained(target)
    AutoTokenizer.from_pretrained(folder).save_pretrained(target)
    return target


def beginning_with_a_mark(folder: Path) -> Any:
    """The tokenizer of a folder as that of Llama or Gemma, which puts a mark before every text."""
    from tokenizers.processors import TemplateProcessing
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.bos_token = "<|endoftext|>"
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", tokenizer.bos_token_id)]
    )
    return tokenizer


def adapted_by_chance(stage: Artifact, target: Path, **settings: Any) -> Artifact:
    """A stage with an adapter whose weights are random, on every linear layer unless `settings` say otherwise."""
    from peft import LoraConfig, get_peft_model

    with stage.open("cpu") as loaded:
        config = LoraConfig(**{"task_type": "CAUSAL_LM", "r": 4, "target_modules": "all-linear", **settings})
        model = get_peft_model(loaded.module, config)
        torch.manual_seed(5)
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data.add_(torch.randn_like(parameter), alpha=0.02)
        model.save_pretrained(target)
    return replace(stage, adapter=target)
