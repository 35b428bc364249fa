"""What all tests share: no network, a cache of their own, and a tiny model that is real but for its size."""

import gc
import json
import os
from collections.abc import Iterator
from pathlib import Path

# Before any import of a library that reads them.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ["TQDM_DISABLE"] = "1"

import pytest
from pytest_socket import disable_socket

from llmq import trust

ROOT = Path(__file__).parent.parent
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def pytest_runtest_setup(item: pytest.Item) -> None:
    """No test reaches a network, but one that says so."""
    if item.get_closest_marker("network") is None:
        disable_socket(allow_unix_socket=True)


@pytest.fixture(autouse=True)
def _what_is_loaded_is_not_collected() -> None:
    """Each model that is freed asks the garbage collector, which need not look through all libraries every time."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def _nothing_is_trusted() -> None:
    """No test trusts what another trusted."""
    trust.given()


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


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a random bfloat16 Llama of 2 layers, and a byte-level tokenizer of 400 tokens trained for it."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    tokenizer = PreTrainedTokenizerFast(tokenizer_object=_trained_bpe(), eos_token=SPECIAL[2])
    tokenizer.add_special_tokens({"additional_special_tokens": list(SPECIAL[:2])})
    tokenizer.chat_template = CHATML
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
    )
    folder = tmp_path_factory.mktemp("tiny-llama")
    torch.manual_seed(0)
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def _trained_bpe() -> object:
    from pydoc_data.topics import topics

    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=list(SPECIAL), initial_alphabet=alphabet, show_progress=False
    )
    bpe.train_from_iterator([topics["compound"], topics["specialnames"]], trainer)
    return bpe


@pytest.fixture(scope="session")
def tiny_jsonl(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file of 20 prompt/completion rows."""
    path = tmp_path_factory.mktemp("data") / "tiny.jsonl"
    rows = [{"prompt": f"What is {i} plus {i + 1}? ", "completion": f"It is {2 * i + 1}."} for i in range(20)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real data that only some machines have."""
    folder = ROOT.parent / "shared" / "data"
    if not folder.is_dir():
        pytest.skip(f"real data is not on this machine: there is no {folder}")
    return folder
