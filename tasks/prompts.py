"""The one template of every step, and its tokens.

    Question: {title and body}

    Answer: {answer}<eos>

The query ends at "Answer:" and the response begins with a space, as byte-level tokenizers want it. Query and response
are tokenized apart and their ids joined, so that the border is the same in training, sampling and scoring.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PREFIX = "Question: "
SUFFIX = "\n\nAnswer:"
SOFT_TOKEN = "<|prompt_{}|>"


def query_text(question: str) -> str:
    """The prompt as text."""
    return f"{PREFIX}{question.strip()}{SUFFIX}"


def encode_query(tokenizer: "PreTrainedTokenizerBase", question: str, max_tokens: int) -> list[int]:
    """Ids of the query, at most `max_tokens`; a longer question loses its end, never "Answer:".

    A soft prompt stands in front of every query where the tokenizer carries one.
    """
    bos = [*tokenizer("")["input_ids"], *soft_prompt(tokenizer)]  # [bos] for Llama, nothing for most
    suffix = tokenizer(SUFFIX, add_special_tokens=False)["input_ids"]
    head = tokenizer(PREFIX + question.strip(), add_special_tokens=False)["input_ids"]
    room = max_tokens - len(bos) - len(suffix)
    if room < 1:
        least = len(bos) + len(suffix)
        raise ValueError(f"max_query_tokens={max_tokens} leaves no room for a question; the template alone takes {least}")
    return [*bos, *head[:room], *suffix]


def soft_prompt(tokenizer: "PreTrainedTokenizerBase") -> list[int]:
    """Ids of the tokens that prompt tuning has trained, in order; [] where there are none."""
    added: Mapping[str, int] = tokenizer.get_added_vocab()
    ids: list[int] = []
    while (token := SOFT_TOKEN.format(len(ids))) in added:
        ids.append(added[token])
    return ids


def add_soft_prompt(tokenizer: "PreTrainedTokenizerBase", n: int, first: int) -> None:
    """Give the tokenizer the n tokens of a soft prompt, with ids from `first` on: the number of rows of the model's embedding."""
    if soft_prompt(tokenizer):
        raise ValueError("sft.tuning=prompt, but the base carries a soft prompt already: give another base, or tune it with lora")
    unused = [f"<|unused_{i}|>" for i in range(first - len(tokenizer))]  # some models have more rows than tokens
    tokenizer.add_tokens([*unused, *(SOFT_TOKEN.format(i) for i in range(n))], special_tokens=True)
    ids = soft_prompt(tokenizer)
    assert ids == list(range(first, first + n)), ids


def encode_response(tokenizer: "PreTrainedTokenizerBase", answer: str, max_tokens: int | None = None) -> list[int]:
    """Ids of " answer" and EOS; cut to `max_tokens`, an answer that is too long loses its end and its EOS."""
    ids = tokenizer(" " + answer.strip(), add_special_tokens=False)["input_ids"]
    return [*ids, tokenizer.eos_token_id][:max_tokens]


def decode_response(tokenizer: "PreTrainedTokenizerBase", ids: list[int]) -> str:
    """The answer as text: without special tokens and the space at its start."""
    text = tokenizer.decode(ids, skip_special_tokens=True)
    assert isinstance(text, str)
    return text.strip()
