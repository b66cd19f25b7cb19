"""How fast we train beside the usual trainers: the same questions, the same lengths, one after the other in one run.

    python benchmarks/training.py sft                # supervised fine-tuning, tokens
    python benchmarks/training.py reward --rounds 5  # pairs
    python benchmarks/training.py ppo --threads 2    # samples: 16 queries a step, 64 new tokens, 4 epochs
    python benchmarks/training.py sft --quick        # ours alone on a toy model: does the script work?

Contestants: *ours* calls this repository's own training code. *trl* are the trainers of TRL 1.16 (sft, reward) and 1.12, the last
release with a PPO trainer; `trl_default` is what they do when nobody says otherwise (bf16 autocast, gradient checkpointing, a batch
of 8, sft packed with `bfd`), `trl_fp32` and `trl_bf16` the best we found (no checkpointing, sft one row at a time, fp32 through
oneDNN where that helps), `trl_one_row` the defaults but one row at a time, `trl_wrapped` their packing without borders, in bf16.
*way_2023* is how StackLLaMA trained, in fp32 and in bf16. All have the same frozen base in fp32 (ours_bf16: bf16), the
same LoRA (r 16 on every linear layer), the same token ids and as many of them in an optimizer step. TRL gets an environment of its
own in ${XDG_CACHE_HOME:-~/.cache}/stackrlhf/benchmarks, made when it is missing.

Every contestant of every round is a new process. Under the clock is the training loop alone, after a step to warm up; CPU seconds
are user and system of that process. Peak memory is its VmHWM, interpreter and libraries (`floor_bytes`) included. The median round
counts. One JSON line on stdout:

    {"work", "unit", "variants": {name: {"per_cpu_s", "per_s", "peak_bytes", "floor_bytes"}}, "ratio_cpu", "ratio_wall",
     "ratios_cpu": {"ours": {peer: ratio}, "ours_bf16": {...}}, "loss_difference", "gflop_needed", "gflop_per_s_peak"}

The ratios are ours in fp32 against the peer's defaults. `loss_difference` is relative: our loss against the plain computation, and
against TRL's own loss on the same sequences; for ppo the largest absolute difference between log-probabilities. `gflop_needed` is
what one unit needs at least, `gflop_per_s_peak` what one thread does on a large matrix.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(Path(__file__).resolve().parent)]

from peers import environments  # noqa: E402

DUMP = ROOT.parent / "shared" / "data" / "dumps" / "2020-06" / "beer.stackexchange.com.7z"
UNIT = {"sft": "tokens", "reward": "pairs", "ppo": "samples"}
VARIANTS = {
    "sft": ["ours", "trl_default", "ours_bf16", "trl_one_row", "trl_fp32", "trl_bf16", "trl_wrapped", "way_2023", "way_2023_bf16"],
    "reward": ["ours", "trl_default", "ours_bf16", "trl_fp32", "trl_bf16", "way_2023", "way_2023_bf16"],
    "ppo": ["ours", "trl_default", "ours_bf16", "trl_fp32", "trl_bf16", "ours_adapter"],
}


def contestant(verb: str, name: str, folder: Path, threads: int) -> dict[str, Any]:
    """Run one of them in this process; imports stand in the functions, so that each pays for its own."""
    work = json.loads((folder / "workload.json").read_text())
    if name.startswith("ours"):
        from peers import ours

        import flows  # noqa: F401  # its settings for oneDNN, as in every run

        dtype = "bf16" if name == "ours_bf16" else "fp32"
        if verb == "ppo":
            return ours.ppo(folder, work, dtype, threads, "adapter" if name == "ours_adapter" else "policy_trunk")
        return (ours.sft if verb == "sft" else ours.reward)(folder, work, dtype, threads)
    if name.startswith("way_2023"):
        from peers import way_2023

        return (way_2023.sft if verb == "sft" else way_2023.reward)(folder, work, threads, bf16=name.endswith("bf16"))
    from peers import trl_trainers

    setting: trl_trainers.Setting = "fp32" if name == "trl_fp32" else "bf16" if name in ("trl_bf16", "trl_wrapped") else "default"
    if verb == "ppo":
        from peers import trl_ppo

        return trl_ppo.ppo(folder, work, threads, setting)
    if verb == "reward":
        return trl_trainers.reward(folder, work, threads, setting, per_device=8)
    # Its dense mask over all that one pass holds makes TRL's bfd the slower the wider the pass: 8 rows by default, one at its best.
    rows = min(8, work["size"]["rows_per_step"]) if name in ("trl_default", "trl_wrapped") else 1
    return trl_trainers.sft(folder, work, threads, setting, "wrapped" if name == "trl_wrapped" else "bfd", per_device=rows)


def run(verb: str, name: str, folder: Path, threads: int) -> dict[str, Any]:
    """One contestant in a process of its own."""
    peer = "trl_ppo" if verb == "ppo" else "trl"
    python = environments.python_of(peer) if name.startswith("trl") else sys.executable
    command = [str(python), __file__, verb, "--contestant", name, "--folder", str(folder), "--threads", str(threads)]
    settings = {"OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads), "HF_HOME": str(folder / "hf")}
    environment = os.environ | environments.SILENCE | settings
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    if done.returncode:
        sys.exit(f"{verb} {name} failed:\n{done.stderr[-3000:]}")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    print(f"{name}: {json.dumps(found)}", file=sys.stderr)
    return found


def summary(verb: str, work: dict[str, Any], rounds: dict[str, list[dict[str, Any]]], peak: float) -> dict[str, Any]:
    """The median of each figure over the rounds, and the ratios."""
    from peers import arithmetic

    variants: dict[str, dict[str, Any]] = {}
    for name, runs in rounds.items():
        figures = {key: statistics.median(one[key] for one in runs) for key in ("per_cpu_s", "per_s", "peak_bytes", "floor_bytes")}
        variants[name] = {key: round(value, 3) if key.startswith("per") else int(value) for key, value in figures.items()}
        if "phases_cpu_s" in runs[0]:
            middle = min(runs, key=lambda one: abs(one["per_cpu_s"] - figures["per_cpu_s"]))
            variants[name]["phases_cpu_s"] = middle["phases_cpu_s"]

    def ratio(ours: str, peer: str, figure: str) -> float | None:
        return round(variants[ours][figure] / variants[peer][figure], 2) if {ours, peer} <= set(variants) else None

    if verb == "ppo":
        difference = {"plain": work["ppo"]["logprob_difference"]}
    else:
        losses = {name: runs[0]["loss"] for name, runs in rounds.items() if name in ("ours", "trl_default", "trl_fp32")}
        mine, others = losses.pop("ours"), {"plain": work[verb]["plain_loss"], **losses}
        difference = {name: abs(mine - loss) / abs(loss) for name, loss in others.items()}
    return {
        "work": f"{verb} on {work['name']}, Llama {work['size']['hidden']} x {work['size']['layers']}, vocabulary {work['vocab']}",
        "unit": UNIT[verb],
        "variants": variants,
        "ratio_cpu": ratio("ours", "trl_default", "per_cpu_s"),
        "ratio_wall": ratio("ours", "trl_default", "per_s"),
        "ratios_cpu": {
            own: {peer: ratio(own, peer, "per_cpu_s") for peer in variants if not peer.startswith("ours")}
            for own in variants if own.startswith("ours")
        },
        "loss_difference": difference,
        "gflop_needed": round(arithmetic.gflop_needed(verb, work), 5),
        "gflop_per_s_peak": round(peak, 1),
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("verb", choices=list(UNIT), help="what to train")
    parser.add_argument("--dump", type=Path, default=DUMP, help=f"where the questions come from (default {DUMP})")
    parser.add_argument("--rounds", type=int, default=3, help="how often each contestant runs (default 3)")
    parser.add_argument("--threads", type=int, choices=[1, 2], default=1, help="of each contestant (default 1)")
    parser.add_argument("--vocab", type=int, help="tokens in the vocabulary (default 8192)")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="these contestants alone")
    parser.add_argument("--quick", action="store_true", help="ours alone, on a toy model: a check of the script, no figures")
    parser.add_argument("--folder", type=Path, help="keep what is made here, and take it from here (default: a temporary folder)")
    parser.add_argument("--contestant", help=argparse.SUPPRESS)
    parser.add_argument("--prepare", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.contestant:
        sys.path.append(str(ROOT))
        print(json.dumps(contestant(arguments.verb, arguments.contestant, arguments.folder, arguments.threads)))
        return
    if arguments.prepare:
        sys.path.append(str(ROOT))
        make(arguments)
        return
    known = VARIANTS[arguments.verb]
    names = [name for name in known if name.startswith("ours")] if arguments.quick else arguments.only or known
    names = list(dict.fromkeys(["ours", *names]))
    if set(names) - set(known):
        parser.error(f"--only {' '.join(sorted(set(names) - set(known)))}: {arguments.verb} has {', '.join(known)}")
    if not arguments.dump.is_file():
        parser.error(f"{arguments.dump}: no such file; give a dump with --dump")
    with tempfile.TemporaryDirectory() as temporary:
        arguments.folder = arguments.folder or Path(temporary)
        if not (arguments.folder / "workload.json").is_file():
            command = [sys.executable, __file__, arguments.verb, "--prepare"]
            command += ["--folder", str(arguments.folder), "--dump", str(arguments.dump)]
            command += ["--quick"] if arguments.quick else []
            command += ["--vocab", str(arguments.vocab)] if arguments.vocab else []
            subprocess.run(command, check=True, stdout=sys.stderr, env=os.environ | environments.SILENCE)
        work = json.loads((arguments.folder / "workload.json").read_text())
        rounds: dict[str, list[dict[str, Any]]] = {name: [] for name in names}
        for _ in range(arguments.rounds):
            for name in names:
                rounds[name].append(run(arguments.verb, name, arguments.folder, arguments.threads))
    from peers import arithmetic

    print(json.dumps(summary(arguments.verb, work, rounds, arithmetic.matrix_peak(1))))


def make(arguments: argparse.Namespace) -> None:
    """The workload, in a process of its own."""
    from dataclasses import replace

    from peers import workload

    size = workload.QUICK if arguments.quick else workload.Size()
    if arguments.vocab:
        size = replace(size, vocab=arguments.vocab)
    data = arguments.folder / "data"
    workload.ingest_dump(arguments.dump, data)
    work = workload.prepare(data, arguments.folder, size)
    work["name"] = arguments.dump.name
    (arguments.folder / "workload.json").write_text(json.dumps(work))


if __name__ == "__main__":
    main()
