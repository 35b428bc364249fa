"""`llmq push`, against a hub in this process."""

import json

import huggingface_hub
import pytest

import llmq


class Hub:
    """The calls of `HfApi` that a push needs; keeps the files that it was given."""

    files: dict[str, list[str]] = {}

    def create_repo(self, repo_id: str, private: bool, exist_ok: bool) -> str:
        assert exist_ok
        return f"https://hub/{repo_id}"

    def list_repo_files(self, repo_id: str) -> list[str]:
        return self.files.get(repo_id, [])

    def upload_folder(self, repo_id: str, folder_path, allow_patterns: list[str], commit_message: str) -> None:
        assert all((folder_path / name).is_file() for name in allow_patterns)
        self.files[repo_id] = sorted(allow_patterns)


@pytest.fixture
def stage(tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub, "HfApi", Hub)
    folder = tmp_path / "1-quantize.rtn"
    (folder / "samples").mkdir(parents=True)
    for name in ("model.safetensors", "config.json", "README.md", "artifact.json", "machine.json", "samples/a.jsonl"):
        (folder / name).write_text("{}")
    return folder


def test_the_model_and_its_card_are_uploaded_and_nothing_of_the_machine(stage):
    assert llmq.push(stage, "me/small") == "https://hub/me/small"
    assert Hub.files["me/small"] == ["README.md", "config.json", "model.safetensors"]


@pytest.mark.parametrize("left", ["adapter_config.json", "model-00001-of-00002.safetensors"])
def test_weights_of_another_upload_are_not_mixed_with_these(stage, left, monkeypatch):
    """transformers adds an adapter to the model beside it, and takes a single file before shards."""
    monkeypatch.setattr(Hub, "files", {"me/small": [left, "README.md", "other.gguf"]})
    with pytest.raises(llmq.UserError, match=rf"'me/small' holds '{left}' of another upload"):
        llmq.push(stage, "me/small")
    assert Hub.files["me/small"][0] == left
    (stage / "model.safetensors").rename(stage / "model.gguf")
    llmq.push(stage, "me/small")


def test_what_nobody_could_open_stays(stage, tmp_path):
    (stage / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": str(tmp_path / "base")}))
    with pytest.raises(llmq.UserError, match=r"names the base .* a folder of this machine"):
        llmq.push(stage, "me/small")
    with pytest.raises(llmq.UserError, match="is no stage of llmq"):
        llmq.push(tmp_path, "me/small")
    with pytest.raises(llmq.UserError, match="'small' is no repository of the hub, which is called OWNER/NAME"):
        llmq.push(stage, "small")
    for name in ("adapter_config.json", "model.safetensors"):
        (stage / name).unlink()
    with pytest.raises(llmq.UserError, match="holds no weights of its own"):
        llmq.push(stage, "me/small")


def test_a_hub_that_does_not_answer_is_one_line(stage, monkeypatch):
    def refuse(*a: object, **k: object) -> None:
        raise RuntimeError("no route")  # httpx has errors of its own

    monkeypatch.setattr(Hub, "create_repo", refuse)
    with pytest.raises(llmq.LlmqError, match="the hub does not take 'me/small': no route"):
        llmq.push(stage, "me/small")
