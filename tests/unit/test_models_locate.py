"""Where a model is found, what is fetched, and what is said when it is not there. No test reaches the network."""

from __future__ import annotations

import json
import os
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub.errors import LocalEntryNotFoundError, RepositoryNotFoundError

from nanoflow.models.config_json import ModelError, load
from nanoflow.models.locate import locate_model
from tests.error_chain import is_shown_alone


class Hub:
    """Stands in for the Hub: gives a folder or raises, and remembers what it was asked."""

    def __init__(self, answer: Path | Exception) -> None:
        self.answer = answer
        self.name = ""
        self.options: dict[str, Any] = {}

    def snapshot_download(self, name: str, **options: Any) -> str:
        self.name, self.options = name, options
        if isinstance(self.answer, Exception):
            raise self.answer from OSError("what the network said")
        return str(self.answer)

    def fetches(self, file: str) -> bool:
        wanted = any(fnmatch(file, pattern) for pattern in self.options["allow_patterns"])
        return wanted and not any(fnmatch(file, pattern) for pattern in self.options["ignore_patterns"])


@pytest.fixture
def model(tmp_path: Path) -> Path:
    (tmp_path / "config.json").write_text(json.dumps({"auto_map": {"AutoModel": "evil.Model"}}))
    (tmp_path / "evil.py").write_text("raise SystemExit('code of a model folder was run')")
    return tmp_path


def test_what_stands_in_place_of_a_config_is_for_its_reader_to_tell(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "config.json")
    assert locate_model(str(tmp_path)) == tmp_path
    with pytest.raises(ModelError, match=r"config\.json: is no regular file"):
        load(tmp_path)


def _put(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> Hub:
    monkeypatch.setattr(huggingface_hub, "snapshot_download", hub.snapshot_download)
    return hub


def test_a_folder(model: Path) -> None:
    assert locate_model(str(model)) == model


def test_a_hub_name(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub = _put(Hub(model), monkeypatch)
    assert locate_model("owner/Some-Model_1.5", "v2") == model
    assert (hub.name, hub.options["revision"]) == ("owner/Some-Model_1.5", "v2")


def test_what_is_fetched(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub = _put(Hub(model), monkeypatch)
    locate_model("owner/model")
    wanted = ("model-00001-of-00002.safetensors", "model.safetensors.index.json", "config.json", "tokenizer.json")
    assert all(hub.fetches(file) for file in (*wanted, "tokenizer.model", "chat_template.jinja", "merges.txt"))
    refused = ("pytorch_model.bin", "modeling_evil.py", "model.pt", "consolidated.safetensors", "original/params.json")
    assert not any(hub.fetches(file) for file in refused)


@pytest.mark.parametrize("name", ["/no/such/folder", "./model", "../model", "a/b/c", "owner/", "owner/na me", ""])
def test_neither_folder_nor_hub_name(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    hub = _put(Hub(AssertionError("the Hub was asked")), monkeypatch)
    with pytest.raises(ModelError, match="no such folder, and not a Hugging Face Hub name"):
        locate_model(name)
    assert hub.name == ""


def test_a_file_is_no_folder(model: Path) -> None:
    with pytest.raises(ModelError, match="is a file; give its folder"):
        locate_model(str(model / "config.json"))


def test_a_folder_without_config(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"is empty; give the folder that holds config\.json"):
        locate_model(str(tmp_path))


def _not_found() -> RepositoryNotFoundError:
    import httpx

    return RepositoryNotFoundError("404", response=httpx.Response(404, request=httpx.Request("GET", "http://hub")))


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (_not_found(), "no such model on the Hugging Face Hub"),
        (LocalEntryNotFoundError("Cannot reach the Hub.\nSecond line."), "could not give it: Cannot reach the Hub"),
        (OSError(), "could not give it: OSError"),
    ],
)
def test_the_hub_fails(error: Exception, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    _put(Hub(error), monkeypatch)
    with pytest.raises(ModelError, match=message) as caught:
        locate_model("owner/model")
    assert "\n" not in str(caught.value) and is_shown_alone(caught.value)
    assert "'owner/model'" in str(caught.value)


def test_the_packaged_model() -> None:
    folder = locate_model("default")
    assert folder.name == "default_model"
    assert (folder / "config.json").is_file()
