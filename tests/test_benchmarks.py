"""The benchmarks: their scripts run, and what they print is what their help promises. No timing is asserted."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"


@pytest.fixture(autouse=True)
def importable(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))


@pytest.fixture(scope="module")
def toy_work(toy_site, tmp_path_factory):
    """A workload from the toy site, smaller than --quick's."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(BENCHMARKS))
        from peers.workload import Size, prepare

        size = Size(
            hidden=32, layers=1, heads=2, intermediate=48, vocab=400, row_tokens=128, rows=4, rows_per_step=2,
            pair_tokens=96, questions=4, questions_per_step=2, query_tokens=64, queries=4, new_tokens=4, epochs=2,
        )  # fmt: skip
        folder = tmp_path_factory.mktemp("work")
        return folder, prepare(toy_site, folder, size) | {"name": "toy"}


def test_both_scripts_explain_themselves():
    for name in ("training", "gpu"):
        done = subprocess.run([sys.executable, BENCHMARKS / f"{name}.py", "--help"], capture_output=True, text=True, check=True)
        assert "One JSON line" in done.stdout


def test_a_large_shape_without_a_gpu_is_refused_in_one_line(monkeypatch, capsys):
    import gpu
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--shape", "7b"])
    with pytest.raises(SystemExit) as left:
        gpu.main()
    assert left.value.code == 2
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_every_step_of_the_gpu_benchmark_runs_on_the_toy_shape(monkeypatch, capsys):
    import gpu

    monkeypatch.setattr(sys, "argv", ["gpu.py", "--shape", "smoke"])
    gpu.main()
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [(line["step"], line["quantization"]) for line in lines] == [
        ("sft", "none"), ("sft", "none"), ("sft", "8bit"), ("sft", "4bit"), ("reward", "none"), ("reward", "8bit"),
        ("rollout", "none"), ("rollout", "8bit"), ("ppo", "none"), ("ppo", "8bit"),
    ]  # fmt: skip
    assert not [line for line in lines if "error" in line or line["peak_bytes"] <= 0]


@pytest.mark.parametrize("verb", ["sft", "reward", "ppo"])
def test_the_line_has_what_the_help_promises_and_our_loss_is_the_plain_one(toy_work, verb):
    import training
    from peers import ours

    folder, work = toy_work
    runner = {"sft": ours.sft, "reward": ours.reward, "ppo": ours.ppo}[verb]
    found = runner(folder, work, "fp32", 1, *(["policy_trunk"] if verb == "ppo" else []))
    peer = {**found, "per_cpu_s": found["per_cpu_s"] / 4, "per_s": found["per_s"] / 2}
    line = training.summary(verb, work, {"ours": [found] * 3, "trl_default": [peer] * 3}, peak=100.0)
    assert line.keys() == {
        "work", "unit", "variants", "ratio_cpu", "ratio_wall", "ratios_cpu", "loss_difference", "gflop_needed", "gflop_per_s_peak",
    }  # fmt: skip
    assert (line["ratio_cpu"], line["ratio_wall"]) == (4, 2)
    assert line["ratios_cpu"] == {"ours": {"trl_default": 4}}
    assert line["loss_difference"]["plain"] < 1e-5
    assert line["variants"]["ours"]["peak_bytes"] >= line["variants"]["ours"]["floor_bytes"] > 0
    assert line["gflop_needed"] > 0


def test_the_arithmetic_of_a_llama_of_seven_billion_is_that_of_the_speed_page():
    from peers.arithmetic import gflop_needed

    trunk = 32 * (4 * 4096**2 + 3 * 4096 * 11_008)
    size = {"hidden": 4096, "layers": 32, "heads": 32, "intermediate": 11_008}
    work = {"size": size, "vocab": 32_000, "trunk_weights": trunk, "sft": {"documents": [([0] * 512, 1)] * 2}}
    # trunk, head, adapters, and attention over 256 tokens on average
    assert gflop_needed("sft", work) == pytest.approx(4 * 6.476 + 4 * 0.131 + 6 * 0.040 + 3 * 4 * 4096 * 32 * 256.5e-9, rel=0.01)


def test_what_is_inside_another_phase_is_counted_once(monkeypatch):
    from peers import meter

    clock = iter([0, 10, 12, 15, 20, 30])  # start, outer in, inner in, inner out, outer out, stop
    monkeypatch.setattr(meter.time, "process_time", lambda: next(clock))

    class Work:
        def outer(self):
            self.inner()

        def inner(self):
            pass

    measured = meter.Meter()
    measured.wrap(Work, "outer", "outer")
    measured.wrap(Work, "inner", "inner")
    measured.start()
    Work().outer()
    measured.stop()
    assert measured.phases == {"outer": 7, "inner": 3}
    assert measured.result(60)["phases_cpu_s"] == {"outer": 7, "inner": 3, "rest": 20}
