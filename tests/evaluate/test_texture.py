from tasks.evaluate.texture import distinct_n, has_code_fence, words


def test_distinct_n_by_hand():
    answers = ["Use a file, a file.", "Use a"]
    # use a file , a file . | use a: 9 words, of which use a file , . are different
    assert distinct_n(answers, 1) == 5 / 9
    # use-a a-file file-, ,-a a-file file-. | use-a: 7 pairs; two of them stand twice
    assert distinct_n(answers, 2) == 5 / 7


def test_pairs_do_not_run_over_the_border_between_answers():
    assert distinct_n(["a b", "c a b"], 2) == 2 / 3  # a-b, c-a, a-b


def test_saying_it_again_halves_variety():
    assert distinct_n(["oil the chain"], 1) == 1
    assert distinct_n(["oil the chain", "oil the chain"], 1) == 0.5


def test_nothing_said_has_no_variety():
    assert distinct_n([], 1) == distinct_n([""], 1) == distinct_n(["word"], 2) == 0


def test_words_know_no_case_and_keep_punctuation():
    assert words("Don't!") == ["don", "'", "t", "!"]


def test_code_fences():
    assert has_code_fence("```py\nx\n```")
    assert not has_code_fence("`x` and ``y``")
