"""Which artifacts belong together: a run found in the store by a key, its inputs followed back, two identities compared."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from flows.presets import STEPS
from tasks.artifacts import Identity, Manifest, Store
from tasks.step import flat

WHICH = {"latest": "the newest", "champion": "the one that the champion pointer names"}


def find(store: Store, step: str, asked: str | None, pointer: str = "champion") -> Manifest:
    """The artifact of `step` by its key, its beginning, `latest` (also None) or `champion`. ValueError where none, or two, fit."""
    key = asked or "latest"
    if key == "champion":
        key = champion_key(store, step, pointer)
    if key == "latest":
        if found := store.manifests(step):
            return found[-1]
        raise ValueError(f"{store.uri} holds no {step} artifact: run the pipeline first (stackrlhf run), or name another --store")
    key = key.removeprefix(f"{step}/")
    keys = [known for known in store.keys(step) if known.startswith(key)]
    if len(keys) > 1:
        raise ValueError(f"{key} is the beginning of {len(keys)} keys: give more of it")
    whole = store.manifest(step, keys[0]) if keys else None
    if whole is None:
        raise ValueError(
            f"{store.uri} holds no {step} artifact {asked}: stackrlhf store ls shows what there is, and --store names another place"
        )
    return whole


def champion_key(store: Store, step: str, pointer: str = "champion") -> str:
    found = store.pointer(pointer)
    if found is None:
        raise ValueError(f"{store.uri} has no {pointer} yet: it takes a run with the verdict better")
    artifacts = found.to.get("artifacts") or {}
    key = found.to.get("key") if step == "ppo" else found.to.get("evaluate") if step == "evaluate" else None
    return str(key or artifacts[step]["key"])


def lineage(store: Store, manifest: Manifest) -> dict[str, Manifest]:
    """The artifact and all that it was made from, by step, as far as it is still stored; not the champion that it met."""
    found = {manifest.step: manifest}
    waiting = [manifest.identity]
    while waiting:
        for step, key in waiting.pop().inputs.items():
            if step not in found and (one := store.manifest(step, key)) is not None:
                found[step] = one
                waiting.append(one.identity)
    return {step: found[step] for step in (*STEPS, *sorted(found)) if step in found}


def decision_of(store: Store, evaluate: str) -> Manifest | None:
    """The newest promotion decided on this evaluation."""
    return next((m for m in reversed(store.manifests("promote")) if m.identity.inputs.get("evaluate") == evaluate), None)


# ---- two identities


@dataclass(frozen=True)
class Change:
    """One field in which two identities differ. `kind`: setting, version, content (from outside) or input (a key)."""

    step: str
    kind: str
    field: str
    was: Any
    now: Any

    @property
    def text(self) -> str:
        name = {
            "setting": f"{self.step}.{self.field}",
            "version": f"version of {self.step}",
            "content": f"content of {self.field}",
            "input": f"input {self.field}",
        }
        return f"{name.get(self.kind, self.field)}: {self._shown(self.was)} -> {self._shown(self.now)}"

    def _shown(self, value: Any) -> str:
        return "-" if value is None else str(value)[:12] if self.kind in {"content", "input"} else str(value)


def changes(old: Identity, new: Identity) -> Sequence[Change]:
    """Every field in which they differ; a setting or input that one has not is None there."""
    step = new.step
    parts = [
        ("version", {"version": old.version}, {"version": new.version}),
        ("setting", flat(old.config), flat(new.config)),
        ("content", old.external, new.external),
        ("input", old.inputs, new.inputs),
    ]
    return [
        Change(step, kind, name, was.get(name), now.get(name))
        for kind, was, now in parts
        for name in {**now, **was}
        if was.get(name) != now.get(name)
    ]
