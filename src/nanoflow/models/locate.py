"""Finds a model's files: the embedded model, a folder, a GGUF file, or the Hugging Face Hub's cache.

Only weights, JSON, templates and tokenizer files are downloaded, never pickles or code. An `auto_map` in config.json is
ignored, as no Python code of a model folder is ever run. `formats.py` explains why a folder is not a model.
"""

from __future__ import annotations

import importlib.resources
import re
from pathlib import Path

from nanoflow.config import DEFAULT_MODEL
from nanoflow.errors import one_line
from nanoflow.models.fields import ModelError, is_there
from nanoflow.models.formats import refuse_file, refuse_folder
from nanoflow.models.gguf_file import is_gguf

_ALLOWED = ("*.safetensors", "*.json", "*.jinja", "tokenizer.model", "*.txt", "*.tiktoken")
_NOT_NEEDED = ("original/*", "consolidated*", "onnx/*")
_HUB_NAME = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?")


def locate_model(model: str, revision: str | None = None) -> Path:
    """The folder of a model, or its GGUF file; downloads it from the Hub (with a progress bar) if it is not here.

    Args:
        model: "default" for the embedded model, a folder, a GGUF file, or a Hub name such as "meta-llama/Llama-3.1-8B".
        revision: Branch, tag or commit on the Hub.

    Raises:
        ModelError: There is no such folder or Hub name, the Hub does not answer, or the folder has no config.json.
    """
    folder = Path(model).expanduser()
    if model == DEFAULT_MODEL:
        folder = Path(str(importlib.resources.files("nanoflow"))) / "default_model"
    elif is_gguf(folder):
        return folder
    elif folder.is_file():
        raise refuse_file(model, folder)
    elif folder.exists() and not folder.is_dir():
        raise ModelError(f"model {model!r} is neither a file nor a folder")
    elif not model or not folder.is_dir():
        folder = _fetch(model, revision)
    if not is_there(folder / "config.json"):
        raise refuse_folder(model, folder)
    return folder


def _fetch(name: str, revision: str | None) -> Path:
    if not _HUB_NAME.fullmatch(name):
        raise ModelError(f"model {name!r}: no such folder, and not a Hugging Face Hub name (owner/name)")
    import huggingface_hub
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError

    try:
        folder = huggingface_hub.snapshot_download(
            name, revision=revision, allow_patterns=list(_ALLOWED), ignore_patterns=list(_NOT_NEEDED)
        )
    except GatedRepoError:
        raise ModelError(
            f"model {name!r}: its owner asks for consent; accept on its Hub page, then set HF_TOKEN"
        ) from None
    except RepositoryNotFoundError:
        raise ModelError(f"model {name!r}: no such folder here, and no such model on the Hugging Face Hub") from None
    except RevisionNotFoundError:
        raise ModelError(f"model {name!r} has no revision {revision!r} on the Hugging Face Hub") from None
    # For any other failure (no network, offline mode, full disk) the message is that the model is not on this machine.
    except Exception as error:
        raise ModelError(
            f"model {name!r}: no such folder here, and the Hub could not give it: {one_line(error)}"
        ) from None
    return Path(folder)
