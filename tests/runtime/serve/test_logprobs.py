"""Log probabilities of the two APIs: blanks, parts of characters, equal texts, counts."""

import paths
import pytest

from models import family_of
from runtime.serve.logprobs import TokenLogprobs

FAMILIES = ("visualglm", "glm4", "glm_edge", "llava")


def rows_for(ids, others):
    """A row per token: itself and `others`, with log probabilities that tell them apart."""
    rows = []
    for chosen in ids:
        row = {other: -1.0 - 0.1 * place for place, other in enumerate(others)}
        rows.append({**row, chosen: -0.5})
    return rows


@pytest.mark.parametrize("name", FAMILIES)
def test_chat_tokens_join_to_the_answer(name):
    tokenizer = family_of(paths.GOLDEN / name).tokenizer
    ids = [i for i in tokenizer.encode("one two 你好😀 three") if tokenizer.decode([i])]
    content = TokenLogprobs(tokenizer, 0).chat(ids, rows_for(ids, ()))["content"]
    text = tokenizer.decode(ids)
    assert b"".join(bytes(entry["bytes"]) for entry in content) == text.encode()
    assert "".join(entry["token"] for entry in content).count(" ") == text.count(" ")
    assert "\ufffd" not in "".join(entry["token"] for entry in content)
    assert all(entry["top_logprobs"] == [] for entry in content)


@pytest.mark.parametrize("name", FAMILIES)
def test_candidates_of_equal_text_are_all_there(name):
    tokenizer = family_of(paths.GOLDEN / name).tokenizer
    parts = [i for i in tokenizer.encode("a😀") if "\ufffd" in tokenizer.decode([i])]
    hidden = [i for i in range(len(tokenizer.encode("a")) + 500) if not tokenizer.decode([i])][:3]
    others = [*parts[:2], *hidden]
    [chosen] = tokenizer.encode("a")[-1:]
    found = TokenLogprobs(tokenizer, 5).completion([chosen], rows_for([chosen], others))
    [top] = found["top_logprobs"]
    assert len(top) == 1 + len(others)
    assert top[found["tokens"][0]] == found["token_logprobs"][0] == -0.5
    assert sorted(top.values()) == sorted(rows_for([chosen], others)[0].values())


def test_chat_has_as_many_candidates_as_asked_for_though_another_token_was_chosen():
    tokenizer = family_of(paths.GOLDEN / "glm_edge").tokenizer
    row = {64: -0.1, 65: -0.2, 70: -9.0}
    [entry] = TokenLogprobs(tokenizer, 2).chat([70], [row])["content"]
    assert entry["logprob"] == -9.0
    assert [each["logprob"] for each in entry["top_logprobs"]] == [-0.1, -0.2]
    found = TokenLogprobs(tokenizer, 2).completion([70], [row])
    assert list(found["top_logprobs"][0].values()) == [-0.1, -0.2, -9.0]


def test_pieces_of_a_stream_are_one_text():
    tokenizer = family_of(paths.GOLDEN / "llava").tokenizer
    ids = tokenizer.encode("a b c")[1:]
    logprobs = TokenLogprobs(tokenizer, 0)
    tokens = []
    for token in ids:
        tokens += logprobs.completion([token], rows_for([token], ()))["tokens"]
    assert "".join(tokens) == tokenizer.decode(ids) == "a b c"
