"""Recognises files and folders that are no supported model: adapters, ONNX, pickles, diffusion pipelines.

The error names the format and what to do, in one line. Only file names and a few small files are read. `config_json.py`
reads the architecture.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from nanoflow.models.fields import ModelError, is_there, read_object, shown

ADAPTER_CONFIG = "adapter_config.json"
_CONFIG = "config.json"
_WEIGHTS = ("model.safetensors", "model.safetensors.index.json")
_CONVERT = "AutoModelForCausalLM.from_pretrained(...).save_pretrained(...)"
_ORIGINAL = "take the model that it was made from, in safetensors"
_FOLDER = "give the folder that holds config.json and the weights"
# Further entries of a folder are ignored.
_MAX_ENTRIES = 10_000

_FILES: Mapping[str, str] = {
    ".gguf": "is no GGUF file, although its name says so: download it again",
    ".ggml": f"is a GGML file (llama.cpp), which is not read: {_ORIGINAL}",
    ".llamafile": f"is a llamafile (llama.cpp), which is not read: {_ORIGINAL}",
    ".onnx": f"is an ONNX graph, which is not read: {_ORIGINAL}",
    ".safetensors": "is a file of weights alone; give the folder that holds it beside config.json and a tokenizer",
    ".bin": "is a file; only folders with weights in safetensors are read, never pickles",
    ".pt": "is a file; only folders with weights in safetensors are read, never pickles",
    ".pth": "is a file; only folders with weights in safetensors are read, never pickles",
    ".ckpt": "is a file; only folders with weights in safetensors are read, never pickles",
    ".zip": "is an archive; unpack it and give the folder that holds config.json and the weights",
    ".tar": "is an archive; unpack it and give the folder that holds config.json and the weights",
    ".gz": "is an archive; unpack it and give the folder that holds config.json and the weights",
    ".tgz": "is an archive; unpack it and give the folder that holds config.json and the weights",
    ".nemo": f"is a NeMo archive, which is not read: {_ORIGINAL}",
    ".h5": f"is a Keras or TensorFlow file, which is not read: {_ORIGINAL}",
    ".keras": f"is a Keras file, which is not read: {_ORIGINAL}",
    ".tflite": f"is a TensorFlow Lite file, which is not read: {_ORIGINAL}",
}
_MAGICS: Mapping[bytes, str] = {b"lmgg": ".ggml", b"tjgg": ".ggml", b"PK\x03\x04": ".zip"}


@dataclass(frozen=True, slots=True, kw_only=True)
class _Folder:
    """Names of the entries of a folder."""

    path: Path
    names: tuple[str, ...]

    def having(self, *patterns: str) -> list[str]:
        """The names that match one of the patterns, in order."""
        return [name for name in self.names if any(Path(name.lower()).match(pattern) for pattern in patterns)]


# Returns the message if a folder is of this format, else None; the first message is used.
_Says = Callable[[_Folder], str | None]


def refuse_file(model: str, path: Path) -> ModelError:
    """The error for a file given instead of a folder, by its first bytes or its extension."""
    says = _FILES.get(_MAGICS.get(_beginning(path), path.suffix.lower()))
    if says is None and path.name in (_CONFIG, ADAPTER_CONFIG):
        says = f"is a file; give its folder, {str(path.parent)!r}"
    return ModelError(f"model {model!r} {says or f'is a file; {_FOLDER}'}")


def refuse_folder(model: str, path: Path) -> ModelError:
    """The error for a folder without a config.json."""
    hint = "" if path == Path(model).expanduser() else hub_hint(model)
    folder = _read(path)
    says = None if hint else next(filter(None, (rule(folder) for rule in _WITHOUT_CONFIG)), None)
    return ModelError(f"model {model!r}: {path} {says or f'has no {_CONFIG}{hint}'}")


def refuse_adapter(path: Path) -> None:
    """Raise ModelError if a folder with a config.json is an adapter, or a model that needs one."""
    if is_there(path / ADAPTER_CONFIG):
        raise ModelError(f"{path} {_adapter(_read(path))}")


def other_weights(path: Path) -> str | None:
    """The weights of a folder without a safetensors checkpoint, and what to do; None if it has none."""
    folder = _read(path)
    return next(filter(None, (rule(folder) for rule in _WEIGHTS_OF_OTHERS)), None)


def hub_hint(name: str) -> str:
    """A hint for an error message if the Hub name of a model contains its format; else empty."""
    parts = set(name.lower().replace("/", "-").replace("_", "-").replace(".", "-").split("-"))
    hints = {
        "gguf": "it seems to hold GGUF files: download the one to serve (hf download NAME FILE) and give its path",
        "onnx": f"it seems to hold ONNX graphs, which are not read: {_ORIGINAL}",
        "lora": "it seems to be a LoRA adapter, which is not served: merge it into its base model",
    }
    return next((f"; {hint}" for word, hint in hints.items() if word in parts), "")


def _read(path: Path) -> _Folder:
    names: list[str] = []
    try:
        for entry in path.iterdir():
            names.append(entry.name)
            if len(names) == _MAX_ENTRIES:
                break
    except OSError as error:
        raise ModelError(f"{path}: not readable: {error.strerror}") from None
    return _Folder(path=path, names=tuple(sorted(names)))


def _beginning(path: Path) -> bytes:
    """The first four bytes of a regular file; empty if it cannot be read."""
    try:
        with path.open("rb") as file:
            return file.read(4)
    except OSError:
        return b""


def _adapter(folder: _Folder) -> str | None:
    if ADAPTER_CONFIG not in folder.names:
        return None
    try:
        values = read_object(folder.path / ADAPTER_CONFIG)
    except ModelError:
        values = {}
    kind, base = values.get("peft_type"), values.get("base_model_name_or_path")
    name = f"a {shown(kind).strip(chr(39))} adapter" if isinstance(kind, str) else "an adapter"
    of = f" of {shown(base)}" if isinstance(base, str) and base else ""
    if any(weights in folder.names for weights in _WEIGHTS):
        return (
            f"holds a whole model and {name}{of} ({ADAPTER_CONFIG}), which would not be applied: "
            f"remove {ADAPTER_CONFIG} if it is merged, else merge it with PEFT's merge_and_unload()"
        )
    return (
        f"is {name}{of} ({ADAPTER_CONFIG}), no whole model: adapters are not served; merge it into its base model "
        "with PEFT's merge_and_unload() and save_pretrained(), and give that folder"
    )


def _gguf(folder: _Folder) -> str | None:
    found = folder.having("*.gguf")
    if found:
        return f"holds GGUF (it has {shown(found[0])}): give the file to serve, as {str(folder.path / found[0])!r}"
    return _named(folder, ("*.ggml", "ggml-*.bin"), f"is in GGML (llama.cpp), which is not read: {_ORIGINAL}")


def _diffusers(folder: _Folder) -> str | None:
    if "model_index.json" not in folder.names:
        return None
    return "is a diffusers pipeline (model_index.json), which makes no text: only language models are served"


def _sentences(folder: _Folder) -> str | None:
    return _named(
        folder,
        ("modules.json",),
        "is a sentence-transformers model, which makes no text: only language models are served",
    )


def _onnx(folder: _Folder) -> str | None:
    return _named(folder, ("*.onnx", "onnx"), f"is in ONNX, which is not read: {_ORIGINAL}")


def _llama_original(folder: _Folder) -> str | None:
    if "params.json" not in folder.names:
        return None
    return _named(
        folder,
        ("consolidated*",),
        "is a model as its makers write it, which is not read: take the one in transformers' form (config.json), or "
        "convert it with transformers",
    )


def _pickles(folder: _Folder) -> str | None:
    return _named(
        folder,
        ("*.bin", "*.pt", "*.pth", "*.ckpt"),
        f"but only safetensors is read: convert with transformers' {_CONVERT}",
        is_sentence=False,
    )


def _mlx(folder: _Folder) -> str | None:
    return _named(folder, ("weights*.npz", "*.npz"), f"is in MLX's form, which is not read: {_ORIGINAL}")


def _frameworks(folder: _Folder) -> str | None:
    """Formats of other frameworks."""
    by_name = {
        "TensorFlow": ("*.h5", "*.keras", "saved_model.pb", "*.tflite", "*.index"),
        "Flax": ("*.msgpack",),
        "OpenVINO": ("openvino_*.xml",),
        "TensorRT-LLM": ("*.engine", "*.plan"),
        "Core ML": ("*.mlmodel", "*.mlpackage"),
        "NeMo": ("*.nemo",),
        "a checkpoint of training in pieces (DCP or DeepSpeed)": ("*.distcp", "zero_to_fp32.py", "global_step*"),
    }
    says = (
        _named(folder, names, f"is for {title}, which is not read: {_ORIGINAL}") for title, names in by_name.items()
    )
    return next(filter(None, says), None)


def _nested(folder: _Folder) -> str | None:
    """The model is in a subfolder: checkpoints of a training run, or the Hub's cache."""
    found = list(_models_below(folder))
    if not found:
        return None
    return f"has no {_CONFIG}, but {shown(found[-1])} has one: give {str(folder.path / found[-1])!r}"


def _models_below(folder: _Folder) -> Iterator[str]:
    below = [f"snapshots/{name.name}" for name in sorted((folder.path / "snapshots").glob("*"))]
    ordered = sorted(folder.names, key=lambda name: (len(name), name))
    for name in (*below, *ordered):
        if (folder.path / name / _CONFIG).is_file():
            yield name


def _weights_alone(folder: _Folder) -> str | None:
    return _named(folder, ("*.safetensors",), f"but no {_CONFIG}: add the one of its model", is_sentence=False)


def _misnamed(folder: _Folder) -> str | None:
    says = f"but only {_WEIGHTS[0]} is read, or what {_WEIGHTS[1]} names: rename it, if it holds the whole model"
    return _named(folder, ("*.safetensors",), says, is_sentence=False)


def _tokenizer_alone(folder: _Folder) -> str | None:
    names = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json", "*.tiktoken")
    return _named(folder, names, f"is a tokenizer alone: it has neither {_CONFIG} nor weights; {_FOLDER}")


def _empty(folder: _Folder) -> str | None:
    return None if folder.names else f"is empty; {_FOLDER}"


def _named(folder: _Folder, patterns: tuple[str, ...], says: str, *, is_sentence: bool = True) -> str | None:
    """The message `says` with the first matching name; None if no name matches."""
    found = folder.having(*patterns)
    if not found:
        return None
    return f"{says} (it has {shown(found[0])})" if is_sentence else f"has {shown(found[0])}, {says}"


_WEIGHTS_OF_OTHERS: tuple[_Says, ...] = (_gguf, _llama_original, _misnamed, _mlx, _pickles, _onnx, _frameworks)
_WITHOUT_CONFIG: tuple[_Says, ...] = (
    *(_adapter, _diffusers, _gguf, _llama_original, _sentences, _nested, _mlx, _weights_alone, _pickles, _onnx),
    *(_frameworks, _tokenizer_alone, _empty),
)
