"""Publishing a folder: all its files arrive as they are, and nothing of a folder that is not whole."""

from __future__ import annotations

from pathlib import Path

import pytest
from typer.testing import CliRunner

from armorfact_hf import push_to_hub
from armorfact_hf.checkpoint.description import NotPruned
from armorfact_hf.cli import commands
from tests.hf.hub import Hub, standing_in
from tests.hf.runs.folders import prune, silent


@pytest.fixture(autouse=True)
def _no_token(monkeypatch, tmp_path):
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.delenv("HUGGING_FACE_HUB_TOKEN", raising=False)
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(tmp_path / "token"))


@pytest.fixture
def folder(own_cache, model_folder, text_file, out) -> Path:
    prune(model_folder, out, text_file)
    return out


@pytest.fixture
def hub(folder, monkeypatch) -> Hub:
    with standing_in() as hub:
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", hub.endpoint)
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
        yield hub


def test_every_file_arrives_as_it_is(folder, hub):
    (folder / ".README.md.1.part").write_text("half a file")
    held = {path.name: path.read_bytes() for path in folder.iterdir() if not path.name.startswith(".")}
    address = push_to_hub(folder, "me/tiny", private=True, token="hf_x", message="First", log=silent)
    assert address == f"{hub.endpoint}/me/tiny"
    [made] = hub.repositories
    assert (made["organization"], made["name"], made["visibility"]) == ("me", "tiny", "private")
    assert hub.commits == {"First": held} and {"README.md", "model.safetensors", "report.json"} <= set(held)
    assert hub.tokens == {"Bearer hf_x"}


def test_a_folder_of_before_there_were_cards_gets_one(folder, hub):
    (folder / "README.md").unlink()
    push_to_hub(folder, "me/tiny", token="hf_x", log=silent)
    [files] = hub.commits.values()
    assert files["README.md"].startswith(b"---\n")


def test_nothing_is_sent_of_a_damaged_folder(folder, hub):
    path = folder / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"model.safetensors: tensor .* is damaged"):
        push_to_hub(folder, "me/tiny", token="hf_x", log=silent)
    assert hub.repositories == [] and hub.commits == {}


@pytest.mark.parametrize("repo", ["tiny", "a/b/c", "me/", "me/ti ny", ""])
def test_a_name_that_the_hub_does_not_take_is_told(tmp_path, repo):
    with pytest.raises(ValueError, match="expected a name on the hub like 'owner/name', got"):
        push_to_hub(tmp_path, repo, token="hf_x", log=silent)


def test_a_hub_that_cannot_be_reached_is_an_error_with_a_sentence(folder, hub, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:1")
    with pytest.raises(OSError, match=r"cannot reach http://127.0.0.1:1 \(.*\): try again"):
        push_to_hub(folder, "me/tiny", token="hf_x", log=silent)


def test_a_dense_folder_is_not_pushed(model_folder, hub):
    with pytest.raises(NotPruned, match="holds no model pruned by armorfact"):
        push_to_hub(model_folder, "me/tiny", token="hf_x", log=silent)
    assert hub.repositories == []


def test_the_command_pushes_or_says_that_it_lacks_a_token(folder, hub, monkeypatch):
    refused = CliRunner().invoke(commands.app, ["push", str(folder), "me/tiny", "--private"])
    assert refused.exit_code == 1 and hub.repositories == []
    assert "pushing needs a token of the hub that may write: run `hf auth login`, set HF_TOKEN" in refused.output
    monkeypatch.setenv("HF_TOKEN", "hf_y")
    done = CliRunner().invoke(commands.app, ["push", str(folder), "me/tiny", "--private", "--message", "Second"])
    assert done.exit_code == 0 and f"It is at {hub.endpoint}/me/tiny" in "".join(done.output.split("\n")), done.output
    assert (
        set(hub.commits) == {"Second"}
        and hub.repositories[0]["visibility"] == "private"
        and hub.tokens == {"Bearer hf_y"}
    )
