"""What the manifests of evaluate's inputs say of how they were made."""

from pathlib import Path
from typing import Any

from tasks.manifest import MANIFEST, Manifest


def manifest_of(folder: Path) -> Manifest | None:
    """None where there is none, as in a folder that no store has seen."""
    path = folder / MANIFEST
    return Manifest.parse(path.read_text(encoding="utf-8")) if path.is_file() else None


def config_of(folder: Path) -> dict[str, Any]:
    """The settings that an artifact was made with; {} where it has no manifest."""
    manifest = manifest_of(folder)
    return manifest.identity.config if manifest else {}


def reward_max_length(reward: Path) -> int:
    """Longest sequence that the reward model was trained on, tokens; by its manifest, where it has one."""
    return int(config_of(reward).get("max_length", 1 << 30))


def shown(folder: Path) -> dict[str, Any] | None:
    """What the report shows of an artifact."""
    manifest = manifest_of(folder)
    if manifest is None:
        return None
    return {
        "key": manifest.key,
        "version": manifest.identity.version,
        "seconds": manifest.seconds,
        "config": manifest.identity.config,
        "inputs": manifest.identity.inputs,
        "metrics": manifest.metrics,
    }
