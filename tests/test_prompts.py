"""The template and its token border."""

import pytest

from tasks import models, prompts


@pytest.fixture(scope="module")
def tokenizer(tiny_model):
    return models.load_tokenizer(tiny_model / "model")


def test_the_text_is_the_template_of_the_recipe(tokenizer):
    ids = prompts.encode_query(tokenizer, " How?\n", 100) + prompts.encode_response(tokenizer, "So. ")
    assert tokenizer.decode(ids) == "Question: How?\n\nAnswer: So.<|eos|>"


def test_the_border_is_the_same_in_training_and_sampling(tokenizer):
    query, response = prompts.encode_query(tokenizer, "How?", 100), prompts.encode_response(tokenizer, "oil it")
    whole = tokenizer("Question: How?\n\nAnswer: oil it")["input_ids"]
    assert [*query, *response] == [*whole, tokenizer.eos_token_id]
    assert tokenizer.decode(query).endswith("\n\nAnswer:")
    assert tokenizer.decode(response[:1]).startswith(" ")


def test_a_long_question_loses_its_end_but_never_the_word_answer(tokenizer):
    suffix = tokenizer(prompts.SUFFIX)["input_ids"]
    for limit in range(len(suffix) + 1, 60):
        ids = prompts.encode_query(tokenizer, "How do I fit the wheel? " * 20, limit)
        assert len(ids) == limit
        assert ids[-len(suffix) :] == suffix
    with pytest.raises(ValueError, match="leaves no room"):
        prompts.encode_query(tokenizer, "How?", len(suffix))


def test_a_long_answer_loses_its_end_and_its_eos(tokenizer):
    whole = prompts.encode_response(tokenizer, "wheel " * 20)
    assert whole[-1] == tokenizer.eos_token_id
    assert prompts.encode_response(tokenizer, "wheel " * 20, 5) == whole[:5]
    assert prompts.encode_response(tokenizer, "wheel " * 20, len(whole)) == whole


@pytest.mark.parametrize("text", ["plain", "* a list\n* `code`", "    indented\nthen \u00e9\u4e2d\U0001f600", "1984 and 3.14"])
def test_an_answer_comes_back_as_it_was(tokenizer, text):
    assert prompts.decode_response(tokenizer, prompts.encode_response(tokenizer, text)) == text.strip()


def test_a_soft_prompt_s_ids_begin_where_the_model_s_rows_end(tiny_model):
    tokenizer = models.load_tokenizer(tiny_model / "model")
    plain, size = prompts.encode_query(tokenizer, "How?", 48), len(tokenizer)
    assert prompts.soft_prompt(tokenizer) == []
    prompts.add_soft_prompt(tokenizer, 3, first=size + 2)  # as of a model whose rows were padded
    assert prompts.soft_prompt(tokenizer) == [size + 2, size + 3, size + 4]
    assert prompts.encode_query(tokenizer, "How?", 48) == [size + 2, size + 3, size + 4, *plain]
    assert len(prompts.encode_query(tokenizer, "How? " * 50, 48)) == 48
    assert prompts.decode_response(tokenizer, [size, size + 2, *plain]) == prompts.decode_response(tokenizer, plain)
