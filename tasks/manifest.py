"""What the store knows of an artifact: the parts of its key, its manifest, the reference that steps hand on, a pointer."""

import hashlib
import json
import logging
import math
import platform
from collections.abc import Mapping
from contextlib import suppress
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError

logger = logging.getLogger(__name__)

MANIFEST = "manifest.json"
REPORTS = frozenset({"REPORT.md", "report.html"})
"""Files for people, not read by any step: checked like the others, but not part of the artifact's digest."""
LIBRARIES = ("torch", "transformers", "tokenizers", "safetensors", "peft", "numpy", "pyarrow", "bitsandbytes", "markdownify")

Scalar = str | bool | int | float | None


def canonical(value: Any) -> str:
    """JSON in one form only: sorted keys, no blanks, 1.0 written as 1, no NaN."""
    return json.dumps(_plain(value), sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    return int(value) if isinstance(value, float) and value.is_integer() else value


def sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


class _Record(BaseModel):
    model_config = ConfigDict(strict=True, frozen=True, extra="forbid")


class Identity(_Record):
    """What a step's result depends on, and nothing else: no location, no execution setting."""

    step: str
    version: int
    config: dict[str, Any]
    inputs: dict[str, str] = {}
    """Name of the input to its key."""
    external: dict[str, str] = {}
    """Name to digest of what comes from outside: dump, base model, champion."""

    @property
    def key(self) -> str:
        return sha256(canonical(self.model_dump()))


class FileEntry(_Record):
    bytes: int
    sha256: str


class Manifest(_Record):
    """What is in an artifact, what it was made from, and by what."""

    format: Literal[1] = 1
    identity: Identity
    input_digests: dict[str, str]
    files: dict[str, FileEntry]
    metrics: dict[str, Scalar]
    seconds: float
    peak_memory_bytes: int
    code: str
    """Fingerprint of the step's sources."""
    libraries: dict[str, str]
    created: str
    host: str
    pid: int
    attempt: str | None = None
    """On S3: the folder in data/ that holds the files. Part of the file only where it is set."""

    @property
    def step(self) -> str:
        return self.identity.step

    @property
    def key(self) -> str:
        return self.identity.key

    @property
    def digest(self) -> str:
        """Of the content that steps read."""
        return sha256(canonical({path: entry.sha256 for path, entry in self.files.items() if path not in REPORTS}))

    @property
    def bytes(self) -> int:
        return sum(entry.bytes for entry in self.files.values())

    def text(self) -> str:
        """The file's exact content; `seal` is the digest of all the rest."""
        content = self.model_dump(exclude={"attempt"} if self.attempt is None else None)
        return json.dumps({**content, "seal": sha256(canonical(content))}, sort_keys=True, indent=1, ensure_ascii=False) + "\n"

    @classmethod
    def parse(cls, text: str) -> "Manifest":
        """ValueError unless `text` is, to the byte, what `text()` writes."""
        content = json.loads(text)
        content.pop("seal")
        manifest = cls.model_validate(content)
        if manifest.text() != text:
            raise ValueError("its seal does not fit its content")
        return manifest


def same_inputs(manifest: Manifest, digests: Mapping[str, str]) -> bool:
    """Was it made from inputs of these digests? Inputs that are not known yet do not count."""
    return all(manifest.input_digests.get(name) == digest for name, digest in digests.items())


class Artifact(BaseModel):
    """The small reference that steps hand to each other."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    step: str
    key: str
    uri: str
    digest: str


class Pointer(_Record):
    """Where a pointer stands: `number` grows by one with every move."""

    number: int
    to: dict[str, Any]
    moved: str

    @property
    def digest(self) -> str:
        return sha256(canonical(self.model_dump()))


_digests: dict[tuple[str, int, int, int], str] = {}


def file_digest(path: Path) -> str:
    """sha256 of a file's content; asked again in the same process it is read again only if size, time or inode changed."""
    about = path.stat()
    seen = (str(path.resolve()), about.st_size, about.st_mtime_ns, about.st_ino)
    if seen not in _digests:
        with path.open("rb") as file:
            _digests[seen] = hashlib.file_digest(file, "sha256").hexdigest()
    return _digests[seen]


def now() -> str:
    return datetime.now(UTC).isoformat(timespec="microseconds")


def code_fingerprint(step: str) -> str:
    """Digest of the sources of tasks/<step>/ and of the modules in tasks/ that all steps share."""
    root = Path(__file__).parent
    sources = sorted([*root.glob("*.py"), *(root / step).rglob("*.py")])
    return sha256(canonical({p.relative_to(root).as_posix(): hashlib.sha256(p.read_bytes()).hexdigest() for p in sources}))


def library_versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in LIBRARIES:
        with suppress(PackageNotFoundError):
            found[name] = version(name)
    return found


def clean_metrics(metrics: Mapping[str, Any]) -> dict[str, Scalar]:
    """JSON scalars: numpy's and torch's numbers become Python's; JSON has no NaN, so that one becomes the word."""
    clean: dict[str, Scalar] = {}
    for name, value in metrics.items():
        plain = value.item() if hasattr(value, "item") else value
        if isinstance(plain, float) and not math.isfinite(plain):
            logger.warning("metric %s is %s", name, plain)
            plain = str(plain)
        if not isinstance(plain, str | bool | int | float | None):
            raise TypeError(f"metric {name} is a {type(value).__name__}; metrics are a flat dict of numbers and strings")
        clean[name] = plain
    return clean


def one_line(error: Exception) -> str:
    if isinstance(error, ValidationError):
        first = error.errors()[0]
        return f"{'.'.join(str(part) for part in first['loc'])}: {first['msg']}"
    return (str(error) or type(error).__name__).splitlines()[0]
