"""From questions to documents in tokens: one text a question, its best answer."""

from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from transformers import PreTrainedTokenizerBase

from tasks import prompts
from tasks.base.fit import held_out
from tasks.ingest.dataset import best_answer, iter_questions
from tasks.packing import Document
from tasks.sft.config import SFTConfig


@dataclass
class Documents:
    """What supervised fine-tuning reads; `train` and `validation` share no question."""

    train: list[Document] = field(default_factory=list)
    validation: list[Document] = field(default_factory=list)
    counts: Counter[str] = field(default_factory=Counter)


def load_documents(folder: Path, tokenizer: PreTrainedTokenizerBase, config: SFTConfig) -> Documents:
    """The sft split; questions whose best answer is empty or was voted below zero are left out and counted."""
    documents: dict[str, Document] = {}
    counts: Counter[str] = Counter()
    for question in iter_questions(folder, "sft", columns=["site", "qid", "question", "answers"]):
        if not question["answers"]:
            counts["without_answer"] += 1
            continue
        answer = best_answer(question)
        if answer["pm_score"] < 0:
            counts["voted_below_zero"] += 1
        elif not answer["text"].strip():
            counts["empty_answer"] += 1
        else:
            document = encode(tokenizer, question["question"], answer["text"], config)
            counts["cut_answers"] += int(document.ids[-1] != tokenizer.eos_token_id)
            documents[f"{question['site']}/{question['qid']}"] = document
    validation = held_out(list(documents))
    result = Documents(counts=counts)
    for key, document in documents.items():
        (result.validation if key in validation else result.train).append(document)
    counts["documents"], counts["validation_documents"] = len(result.train), len(result.validation)
    return result


def encode(tokenizer: PreTrainedTokenizerBase, question: str, answer: str, config: SFTConfig) -> Document:
    """Query and response, tokenized apart and joined: at most seq_length tokens; a long answer loses its end and its EOS."""
    query = prompts.encode_query(tokenizer, question, config.max_query_tokens)
    response = prompts.encode_response(tokenizer, answer, config.seq_length - len(query))
    # A soft prompt is read and never predicted: the head has no rows for it.
    soft = prompts.soft_prompt(tokenizer)
    first_label = len(query) if config.loss_on == "answer" else query.index(soft[-1]) + 1 if soft else 1
    return Document(np.array(query + response, np.int32), first_label)
