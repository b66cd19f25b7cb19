"""The verbs about stored runs: plan, why, compare, report, export, on one real pipeline run twice with another KL penalty."""

import http.client
import json
import shutil
import threading
from pathlib import Path

import pytest

from flows.cli import main
from flows.commands.report import make_server
from tasks.artifacts import Store
from tests.s3_server import S3Server, use

SMALL = [
    "--preset", "ci", "--threads", "1", "--workers", "1",
    "--set", "ingest.simulate.questions=240", "--set", "base.scratch.steps=8", "--set", "evaluate.max_questions=6",
    "--set", "reward.max_questions=16", "--set", "reward.max_eval_questions=12", "--set", "evaluate.bootstrap_samples=100",
]  # fmt: skip
OTHER = [*SMALL, "--set", "ppo.kl_coef=0.1"]


def call(capsys, *argv: str) -> tuple[int, str, str]:
    try:
        code = main(argv)
    except SystemExit as end:
        code = end.code
    said = capsys.readouterr()
    return code, said.out, said.err


@pytest.fixture(scope="module")
def runs(tmp_path_factory, prefect_server) -> tuple[Path, list[dict]]:
    """(the store, what `run --json` said of each run)"""
    store = tmp_path_factory.mktemp("commands") / "store"
    said = []
    for number, settings in enumerate((SMALL, OTHER)):
        from contextlib import redirect_stdout
        from io import StringIO

        with redirect_stdout(StringIO()) as out:
            code = main(["run", *settings, "--store", str(store), "--json", *(["--require-better"] if number else [])])
        assert code == (3 if number else 0)
        said.append(json.loads(out.getvalue()))
    return store, said


@pytest.fixture
def store(runs) -> str:
    return str(runs[0])


def key(runs, number: int, step: str = "evaluate") -> str:
    return runs[1][number]["steps"][step]["key"]


@pytest.fixture
def crowned(runs, tmp_path) -> str:
    """A copy of the store, whose champion is the first run's policy."""
    shutil.copytree(runs[0], tmp_path / "crowned")
    store = Store(tmp_path / "crowned")
    named = {
        step: {"step": step, "key": key(runs, 0, step), "digest": store.manifest(step, key(runs, 0, step)).digest}
        for step in ("ppo", "sft", "reward", "evaluate")
    }
    assert store.move_pointer("champion", {"key": key(runs, 0, "ppo"), "evaluate": key(runs, 0), "artifacts": named}, 0)
    return store.uri


# ---- run


def test_a_run_ends_with_the_verdict_and_the_decision_on_it(runs):
    for said in runs[1]:
        assert set(said) == {"steps", "store", "verdict", "decision", "report", "error"}
        assert set(said["verdict"]) == {"word", "gain", "interval", "by", "champion"}
        assert (said["decision"]["allowed"], said["decision"]["moved"], said["decision"]["against"]) == (False, False, "sft")
        assert "unset" in said["decision"]["reason"]


def test_a_run_on_pools_needs_a_server_to_ask(capsys, tmp_path, monkeypatch):
    from prefect.settings import PREFECT_API_URL, temporary_settings

    with temporary_settings(restore_defaults={PREFECT_API_URL}):
        code, out, err = call(capsys, "run", "--executor", "pool", "--store", str(tmp_path / "store"))
    assert (code, out) == (2, "")
    assert "PREFECT_API_URL" in err
    assert len(err.strip().splitlines()) == 1


# ---- plan


def test_a_change_makes_what_depends_on_it_run_again_with_a_time_that_follows_the_setting(capsys, store):
    plan = json.loads(call(capsys, "plan", *SMALL, "--set", "ppo.steps=6", "--store", store, "--json")[1])
    steps = plan["steps"]
    assert [step for step, one in steps.items() if one["state"] == "to-run"] == ["ppo", "evaluate", "promote"]
    took = Store(store).manifests("ppo")[-1].seconds
    assert steps["ppo"]["seconds"] == pytest.approx(2 * took, rel=0.6)  # twice one of two that are alike
    assert steps["evaluate"]["seconds"] is not None
    assert (plan["fits"], plan["estimate"]["unknown"]) == (True, [])
    other = json.loads(call(capsys, "plan", *SMALL, "--set", "base.scratch.hidden_size=96", "--store", store, "--json")[1])
    assert other["estimate"]["unknown"] == ["base", "sft", "reward", "ppo", "evaluate"]


def test_the_disk_that_a_first_run_takes_is_known_before(capsys, store, tmp_path):
    plan = json.loads(call(capsys, "plan", *SMALL, "--store", str(tmp_path / "none"), "--json")[1])
    for step in ("ingest", "base", "sft", "reward", "ppo", "evaluate"):
        real = Store(store).manifests(step)[-1].bytes
        disk = plan["steps"][step]["disk"]
        assert disk["source"] == "estimated"
        assert real * 0.7 < disk["bytes"] < 1.3 * real + 400_000, step
    text = call(capsys, "plan", *SMALL, "--store", str(tmp_path / "none"))[1]
    assert "how long ingest, base, sft, reward, ppo, evaluate, promote will take is not known" in " ".join(text.split())


def test_a_step_for_which_the_disk_is_too_small_is_refused_before_anything_starts(capsys, tmp_path, monkeypatch):
    monkeypatch.setattr("flows.disk.free_at", lambda place: 400_000)
    where = ("--store", str(tmp_path / "store"))
    code, out, _ = call(capsys, "plan", *SMALL, *where, "--until", "base", "--check")
    assert code == 2
    assert "base does not fit: needs" in " ".join(out.split())
    assert "does not fit" in next(line for line in out.splitlines() if line.startswith("base"))
    code, out, err = call(capsys, "run", *SMALL, *where)
    assert (code, out) == (2, "")
    assert "does not fit" in err
    assert "store gc" in err
    assert not (tmp_path / "store").exists()


def test_a_step_for_which_the_memory_is_too_small_is_marked(capsys, store):
    huge = [
        "--set",
        "base.scratch.hidden_size=16384",
        "--set",
        "base.scratch.intermediate_size=65536",
        "--set",
        "base.scratch.layers=24",
    ]
    code, out, _ = call(capsys, "plan", *SMALL, *huge, "--until", "base", "--store", store, "--check", "--json")
    base = json.loads(out)["steps"]["base"]
    assert (code, base["fits"]) == (2, False)
    assert any("GB of memory are free" in problem for problem in base["problems"])
    pool = json.loads(call(capsys, "plan", *SMALL, *huge, "--until", "base", "--store", store, "--executor", "pool", "--json")[1])
    assert not any("of memory" in problem for problem in pool["steps"]["base"]["problems"])  # the workers' memory is not known here


# ---- why


def test_why_names_the_setting_and_follows_an_input_to_the_step_that_really_differs(capsys, store):
    code, out, _ = call(capsys, "why", "promote", *SMALL, "--set", "sft.learning_rate=0.002", "--store", store, "--json")
    found = json.loads(out)
    assert (code, found["state"]) == (0, "to-run")
    assert [(one["step"], one["field"], one["was"], one["now"]) for one in found["fields"]] == [
        ("sft", "learning_rate", 0.001, 0.002)
    ]
    assert (found["fields"][0]["way"][0], found["fields"][0]["way"][-1]) == ("sft", "promote")
    text = call(capsys, "why", "promote", *SMALL, "--set", "sft.learning_rate=0.002", "--store", store)[1]
    assert "sft.learning_rate: 0.001 -> 0.002" in text


def test_why_two_artifacts_differ_and_why_a_stored_one_was_made(capsys, store, runs):
    keys = (key(runs, 0, "promote")[:16], key(runs, 1, "promote")[:16])
    found = json.loads(call(capsys, "why", "promote", *keys, "--store", store, "--json")[1])
    assert [(one["step"], one["field"], one["was"], one["now"]) for one in found["fields"]] == [("ppo", "kl_coef", 0.05, 0.1)]
    assert "ppo.kl_coef: 0.05 -> 0.1" in call(capsys, "why", "ppo", *OTHER, "--store", store)[1]
    assert "both are the same" in call(capsys, "why", "ppo", key(runs, 0, "ppo"), key(runs, 0, "ppo"), "--store", store)[1]
    assert "nothing older like it" in call(capsys, "why", "base", *SMALL, "--store", store)[1]
    assert "refresh was asked for" in call(capsys, "why", "base", *SMALL, "--refresh", "base", "--store", store)[1]


def test_why_the_champion_makes_a_decision_anew(capsys, crowned, runs):
    text = call(capsys, "why", "promote", *OTHER, "--store", crowned)[1]
    assert f"champion: none -> ppo {key(runs, 0, 'ppo')[:12]}" in text


# ---- compare


def test_compare_shows_settings_verdicts_metrics_and_answers_of_both(capsys, crowned, runs):
    a, b = key(runs, 0), key(runs, 1)
    found = json.loads(call(capsys, "compare", a[:10], b, "--store", crowned, "--json", "--samples", "2")[1])
    assert found["settings"] == [{"name": "ppo.kl_coef", "a": 0.05, "b": 0.1}]
    assert (found["a"]["evaluate"], found["b"]["evaluate"]) == (a, b)
    assert found["a"]["verdict"]["word"] == runs[1][0]["verdict"]["word"]
    assert found["b"]["steps"]["ppo"]["seconds"] > 0
    assert found["b"]["decision"]["allowed"] is False
    assert len(found["samples"]) == 2
    assert {"sft", "ppo", "human"} <= set(found["samples"][0]["a"])
    text = call(capsys, "compare", "champion", "latest", "--store", crowned)[1]
    for part in ("| ppo.kl_coef | 0.05 | 0.1 |", "the same", "no-evidence", "**B, ppo**", "| ppo.kl "):
        assert part in text, part


# ---- report


def test_report_tells_copies_and_finds_the_champions(capsys, crowned, runs, tmp_path):
    code, out, _ = call(capsys, "report", "--store", crowned)
    assert (code, Path(out.strip()).name, Path(out.strip()).parent.name) == (0, "report.html", key(runs, 1))
    assert key(runs, 0) in call(capsys, "report", "champion", "--store", crowned, "--json")[1]
    copy = tmp_path / "mine.html"
    assert call(capsys, "report", key(runs, 0)[:12], "--out", str(copy), "--store", crowned)[0] == 0
    assert "<html" in copy.read_text()


def get(port: int, path: str, host: str | None = None) -> tuple[int, str, bytes]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
    connection.request("GET", path, headers={"Host": host or f"127.0.0.1:{port}"})
    answer = connection.getresponse()
    return answer.status, answer.headers["Content-Type"], answer.read()


@pytest.mark.parametrize("kind", ["folder", "s3"])
def test_serve_gives_out_reports_and_nothing_else(kind, runs, tmp_path, monkeypatch):
    store, mine = Store(runs[0]), key(runs, 1)
    if kind == "s3":
        server = S3Server()
        server.send("PUT", "reports")
        use(monkeypatch, server.url, tmp_path / "cache")
        there = Store("s3://reports/store")
        manifest = store.manifest("evaluate", mine)
        with there.attempt(mine) as out:
            for name in manifest.files:
                (out / name).parent.mkdir(exist_ok=True)
                shutil.copyfile(store.folder("evaluate", mine) / name, out / name)
            there.publish(out, manifest.identity, metrics=manifest.metrics, seconds=1, peak_memory_bytes=1)
        shutil.rmtree(tmp_path / "cache")
        store = there
    with make_server(store, 0) as serving:
        thread = threading.Thread(target=serving.serve_forever)
        thread.start()
        try:
            port = serving.server_port
            assert serving.server_address[0] == "127.0.0.1"
            code, kind_of, page = get(port, f"/{mine}/report.html")
            assert (code, kind_of) == (200, "text/html; charset=utf-8")
            assert b"<html" in page
            assert mine[:12].encode() in get(port, "/")[2]
            assert get(port, f"/{mine}/REPORT.md")[0] == 200
            assert get(port, f"/{mine}/plots/gains.png")[1] == "image/png"
            for path in ("verdict.json", "manifest.json", "../../ppo", "plots/../verdict.json", "plots", "%2e%2e/x"):
                assert get(port, f"/{mine}/{path}")[0] == 404, path
            assert get(port, f"/{'0' * 64}/report.html")[0] == 404
            assert get(port, "/tmp/")[0] == 404
            assert get(port, f"/{mine}/report.html", host="evil.example:80")[0] == 403
        finally:
            serving.shutdown()
            thread.join()
    if kind == "s3":
        server.stop()


# ---- export


def test_an_exported_model_gives_transformers_the_logits_of_our_policy(capsys, runs, tmp_path):
    import torch
    import yaml
    from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

    from tasks.models import load_lora, load_model, load_tokenizer, use
    from tasks.prompts import PREFIX, SUFFIX, encode_query

    store, folder = Store(runs[0]), tmp_path / "policy"
    folder.mkdir()  # an empty one is fine
    code, out, _ = call(capsys, "export", str(folder), "--ppo", key(runs, 1, "ppo")[:12], "--store", store.uri, "--json")
    assert code == 0
    assert json.loads(out)["ppo"] == key(runs, 1, "ppo")

    sft, ppo = store.folder("sft", key(runs, 1, "sft")), store.folder("ppo", key(runs, 1, "ppo"))
    ids = torch.tensor([encode_query(load_tokenizer(sft / "model"), "How do I sharpen a plane?", 64)])
    ours = load_lora(load_model(sft / "model", "fp32", "cpu"), ppo / "policy", "policy", trainable=False)
    theirs = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        expected, actual = ours(ids).logits, theirs(ids).logits
        with use(ours, None):
            sft_alone = ours(ids).logits
    assert (actual - expected).abs().max() < 1e-5 * (expected.max() - expected.min())
    assert (actual - sft_alone).abs().max() > 1e-4  # PPO's part is in it
    text = f"{PREFIX}How do I sharpen a plane?{SUFFIX}"
    assert PreTrainedTokenizerFast.from_pretrained(folder)(text)["input_ids"] == ids[0].tolist()

    names = {path.name for path in folder.iterdir()}
    assert not [name for name in names if name.endswith((".bin", ".pt", ".pkl"))]
    assert {"model.safetensors", "generation_config.json", "tokenizer.json", "README.md", "lineage.json", "NOTICE.md"} <= names
    card = (folder / "README.md").read_text()
    front = yaml.safe_load(card.split("---")[1])
    assert front["license"] == "apache-2.0"
    assert front["datasets"] == ["workshop.simulated"]
    assert {"rlhf", "ppo"} <= set(front["tags"])
    low, high = runs[1][1]["verdict"]["interval"]
    for part in (f"interval {low:+.3f} to {high:+.3f}", key(runs, 1, "sft")[:16], "| kl_coef | 0.1 |", "simulated site", "Limits"):
        assert part in card, part
    steps = json.loads((folder / "lineage.json").read_text())["steps"]
    assert steps["ppo"]["digest"] == store.manifest("ppo", key(runs, 1, "ppo")).digest
    assert set(steps) == {"ingest", "base", "sft", "reward", "ppo", "evaluate"}

    code, _, err = call(capsys, "export", str(folder), "--store", store.uri)
    assert code == 2
    assert "not an empty folder" in err


def test_the_adapter_alone_is_the_champions(capsys, crowned, runs, tmp_path):
    folder = tmp_path / "adapter"
    assert call(capsys, "export", str(folder), "--champion", "--adapter", "--store", crowned)[0] == 0
    stored = Store(crowned).folder("ppo", key(runs, 0, "ppo")) / "policy" / "adapter_model.safetensors"
    assert (folder / "adapter_model.safetensors").read_bytes() == stored.read_bytes()
    assert not (folder / "model.safetensors").exists()
    assert "peft" in (folder / "README.md").read_text()


def test_a_soft_prompt_is_told_and_our_loader_reads_it(capsys, tmp_path, tiny_model, monkeypatch):
    import torch

    from tasks import soft_prompt
    from tasks.artifacts import Identity
    from tasks.models import add_lora, load_lora, load_model, load_tokenizer, save_lora
    from tasks.prompts import add_soft_prompt, encode_query
    from tasks.sft.config import LoRAConfig
    from tasks.sft.train import save_model

    store, made = Store(tmp_path / "store"), {}

    def publish(step: str, config: dict, inputs: tuple[str, ...], write) -> Path:
        identity = Identity(step=step, version=1, config=config, inputs={name: made[name] for name in inputs})
        with store.attempt(identity.key) as out:
            write(out)
            store.publish(out, identity, metrics={}, seconds=1, peak_memory_bytes=1)
        made[step] = identity.key
        return store.folder(step, identity.key)

    def prompted(out: Path) -> None:
        model, tokenizer = load_model(tiny_model / "model", "fp32", "cpu"), load_tokenizer(tiny_model / "model")
        rows = model.get_input_embeddings().num_embeddings
        add_soft_prompt(tokenizer, 4, rows)
        soft_prompt.attach(model, torch.randn(4, 32))
        save_model(model, tokenizer, out / "model")

    def adapted(out: Path) -> None:
        model = add_lora(load_model(sft / "model", "fp32", "cpu"), LoRAConfig(r=2, alpha=4, dropout=0.0), "policy", 1)
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data.normal_(0, 0.2)
        save_lora(model, out / "policy", "policy")

    card = json.dumps({"simulated": False, "sites": {"beer.stackexchange.com": {}}})
    publish(
        "ingest", {}, (), lambda out: [(out / name).write_text(text) for name, text in (("card.json", card), ("NOTICE.md", "Ann"))]
    )
    publish("base", {"source": "path"}, ("ingest",), lambda out: (out / "x.json").write_text("{}"))
    sft = publish("sft", {"tuning": "prompt", "prompt_tokens": 4}, ("base", "ingest"), prompted)
    ppo = publish("ppo", {"temperature": 1.0, "max_new_tokens": 8}, ("sft", "ingest"), adapted)

    folder = tmp_path / "out"
    code, _, err = call(capsys, "export", str(folder), "--store", store.uri)
    assert code == 0
    assert "a soft prompt of 4 tokens" in err
    readme = (folder / "README.md").read_text()
    for part in ("stackrlhf's own loader", 'license: "other"', "beer.stackexchange.com", "CC BY-SA", "has not been evaluated"):
        assert part in readme, part
    ids = torch.tensor([encode_query(load_tokenizer(folder), "How do I sharpen a plane?", 64)])
    ours = load_lora(load_model(sft / "model", "fp32", "cpu"), ppo / "policy", "policy", trainable=False)
    with torch.no_grad():
        expected = ours(ids).logits
        # merged and unmerged products round differently: some 1e-5 of logits that spread over several units
        assert (load_model(folder, "fp32", "cpu")(ids).logits - expected).abs().max() < 1e-5 * (expected.max() - expected.min())
    assert int(ids.max()) >= ours.get_input_embeddings().num_embeddings  # the prompt's ids lie behind the vocabulary


# ---- what is wrong


@pytest.mark.parametrize(
    ("argv", "part"),
    [
        (["why", "train"], "invalid choice"),
        (["why", "ppo", "abc"], "two keys"),
        (["why", "ppo", "abc", "def"], "no ppo artifact abc"),
        (["why", "ppo", *SMALL, "--until", "sft"], "--until sft ends before ppo"),
        (["compare", "latest", "zzz"], "no evaluate artifact zzz"),
        (["compare", "champion", "latest"], "no champion yet"),
        (["compare", "latest", "latest", "--samples", "-1"], "give 0 or more"),
        (["report", "zzz"], "no evaluate artifact zzz"),
        (["report", "--serve", "99999"], "65535"),
        (["report", "--serve", "1", "--open"], "leave KEY"),
        (["report", "--out", "/tmp"], "is a folder"),
        (["export", "/tmp", "--champion"], "not an empty folder"),
        (["export", "/tmp/stackrlhf-none", "--champion"], "no champion yet"),
        (["export", "/tmp/stackrlhf-none", "--ppo", "zzz"], "no ppo artifact zzz"),
        (["run", "--report-to", "excel"], "mlflow"),
        (["run", "--executor", "cloud"], "pool"),
    ],
)
def test_what_is_wrong_is_one_line_with_the_remedy(capsys, store, argv, part):
    code, out, err = call(capsys, *argv, "--store", store)
    assert (code, out) == (2, ""), err
    assert len(err.strip().splitlines()) == 1
    assert part in err
