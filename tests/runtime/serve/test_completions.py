"""/v1/completions continues a text: echo, log probabilities with their places in the text, the tokens that the
release's tokenizer puts around a text; and what both endpoints say in a stream about the counts and the model."""

import json

import numpy as np
import paths
import pytest
import torch
from http_service import Server, asked

from models import family_of

PATH = "/v1/completions"


@pytest.fixture(scope="module", params=["glm_edge", "glm4", "llava"])
def served(request):
    running = Server("--model", str(paths.GOLDEN / request.param), "--served-model-name", "*")
    running.family = family_of(paths.GOLDEN / request.param)
    yield running
    running.stop()


def completion(served, **more) -> dict:
    body = {"prompt": "hello there", "max_tokens": 6, "temperature": 0, "ignore_eos": True, **more}
    got = served.post(PATH, body)
    assert got.status_code == 200, got.text
    return got.json()


def streamed(served, path=PATH, **more) -> list[dict]:
    got = served.post(path, {"temperature": 0, "ignore_eos": True, "stream": True, **more})
    events = [event.removeprefix("data: ") for event in got.text.strip().split("\n\n")]
    assert events.pop() == "[DONE]"
    return [json.loads(event) for event in events]


def prompt_logprobs(served, ids) -> list[float]:
    """Of every token but the first, from the engine's logits."""
    prompt = served.engine.prompt_from_ids(ids)
    logits = torch.log_softmax(torch.from_numpy(served.engine.prefill_logits(prompt)), -1)
    return logits[:-1].gather(1, torch.tensor(ids)[1:, None])[:, 0].tolist()


def test_echo_with_log_probabilities(served):
    ids = served.family.text_ids("hello there")
    body = completion(served, echo=True, logprobs=2)
    [choice] = body["choices"]
    plain = completion(served, logprobs=2)["choices"][0]
    assert choice["text"] == "hello there" + plain["text"]
    found = choice["logprobs"]
    assert len(found["tokens"]) == len(ids) + 6 == body["usage"]["total_tokens"]
    assert found["token_logprobs"][0] is None and found["top_logprobs"][0] is None
    np.testing.assert_allclose(
        found["token_logprobs"][1 : len(ids)], prompt_logprobs(served, ids), atol=1e-4
    )
    assert found["token_logprobs"][len(ids) :] == pytest.approx(
        plain["logprobs"]["token_logprobs"], abs=1e-4
    )


@pytest.mark.parametrize("prompt", ["hello there", [10, 20, 30], [[10, 20, 30]]])
def test_an_echo_without_an_answer(served, prompt):
    """How lm-eval scores: the prompt alone, with max_tokens 0."""
    body = completion(served, prompt=prompt, echo=True, logprobs=1, max_tokens=0)
    [choice] = body["choices"]
    ids = served.family.text_ids(prompt) if isinstance(prompt, str) else [10, 20, 30]
    shown = prompt if isinstance(prompt, str) else served.family.tokenizer.decode(ids)
    assert choice["text"] == shown and choice["finish_reason"] == "length"
    assert len(choice["logprobs"]["tokens"]) == len(ids) == body["usage"]["prompt_tokens"]
    assert body["usage"]["completion_tokens"] == 0
    assert choice["logprobs"]["token_logprobs"][1:] == pytest.approx(
        prompt_logprobs(served, ids), abs=1e-4
    )


def test_no_tokens_and_no_echo(served):
    [choice] = completion(served, max_tokens=0)["choices"]
    assert choice["text"] == "" and choice["finish_reason"] == "length"
    assert choice["logprobs"] is None


@pytest.mark.parametrize("echo", [False, True])
def test_text_offset_is_the_place_in_the_text(served, echo):
    [choice] = completion(served, echo=echo, logprobs=0, max_tokens=12)["choices"]
    found = choice["logprobs"]
    offsets = found["text_offset"]
    assert offsets[0] == 0 and offsets == sorted(offsets) and len(offsets) == len(found["tokens"])
    whole = [t for t in zip(offsets, found["tokens"]) if not t[1].startswith("bytes:")]
    assert len(whole) > 3
    for offset, token in whole:
        shown = choice["text"]  # a run of bytes that is no text is shown as marks
        assert shown.startswith((token, "\ufffd"), offset), (offset, token, shown)


@pytest.mark.parametrize("more", [{}, {"max_tokens": 0}])
def test_a_streamed_echo_is_the_whole_one(served, more):
    given = {"prompt": "hello there", "echo": True, "logprobs": 1, "max_tokens": 6, **more}
    whole = completion(served, **given)["choices"][0]
    chunks = [chunk["choices"][0] for chunk in streamed(served, **given)]
    assert "".join(chunk["text"] for chunk in chunks) == whole["text"]
    for name, values in whole["logprobs"].items():
        parts = [chunk["logprobs"][name] for chunk in chunks if chunk["logprobs"]]
        found = [value for part in parts for value in part]
        if name == "token_logprobs":
            assert found[1:] == pytest.approx(values[1:], abs=1e-4)
        elif name != "top_logprobs":
            assert found == values
    assert chunks[-1]["finish_reason"] == whole["finish_reason"]


def test_what_a_text_is_made_of(served):
    """A text has the special tokens that the release's tokenizer puts around it, unless the client
    says otherwise; /tokenize shows them."""
    special = {"glm-4": [b"[gMASK]", b"<sop>"], "llava-1.5": [b"<s>"]}.get(served.family.name, [])
    plain = served.family.text_ids("hello there", special=False)
    ids = served.post("/tokenize", {"prompt": "hello there"}).json()["tokens"]
    assert ids[len(special) :] == plain
    assert ids[: len(special)] == [served.family.tokenizer.token_id(s.decode()) for s in special]
    bare = {"prompt": "hello there", "add_special_tokens": False}
    assert served.post("/tokenize", bare).json()["tokens"] == plain
    assert completion(served)["usage"]["prompt_tokens"] == len(ids)
    assert completion(served, add_special_tokens=False)["usage"]["prompt_tokens"] == len(plain)
    by_ids = completion(served, prompt=ids)["choices"][0]["text"]
    assert by_ids == completion(served)["choices"][0]["text"]


@pytest.mark.parametrize("name", [None, "", "gpt-4o", "zai-org/GLM-4"])
def test_the_answer_has_the_name_that_was_asked_for(served, name):
    fallback = served.family.directory.name
    for path, own in ((PATH, {"prompt": "hi"}), ("/v1/chat/completions", asked("hi"))):
        body = {**own, "model": name, "max_tokens": 2}
        assert served.post(path, body).json()["model"] == (name or fallback)
        assert {chunk["model"] for chunk in streamed(served, path, **body)} == {name or fallback}


@pytest.mark.parametrize("path", [PATH, "/v1/chat/completions"])
def test_counts_in_a_stream(served, path):
    own = {"prompt": "hi"} if path == PATH else asked("hi")
    own = {**own, "max_tokens": 4}
    assert not any("usage" in chunk for chunk in streamed(served, path, **own))
    *chunks, last = streamed(served, path, **own, stream_options={"include_usage": True})
    assert last["choices"] == [] and last["usage"]["completion_tokens"] == 4
    assert chunks and all(chunk["usage"] is None for chunk in chunks)
    options = {"include_usage": True, "continuous_usage_stats": True}
    *chunks, last = streamed(served, path, **own, stream_options=options)
    counts = [chunk["usage"]["completion_tokens"] for chunk in chunks]
    assert counts == sorted(counts) and counts[-1] == 4 == last["usage"]["completion_tokens"]


def test_ids_beyond_the_vocabulary(served):
    beyond = served.family.decoder.vocab_size
    for path, body, field in (
        (PATH, {"prompt": [3, beyond]}, "prompt"),
        ("/detokenize", {"tokens": [3, beyond]}, "tokens"),
    ):
        error = served.post(path, body).json()["error"]
        assert error["param"] == field and f"token id {beyond} is outside" in error["message"]


@pytest.mark.parametrize("path", ["/chat/completions", "/v1/embeddings", "/v1/responses"])
def test_a_path_that_is_not_there_is_named(served, path):
    got = served.post(path, asked())
    assert got.status_code == 404
    message = got.json()["error"]["message"]
    assert f"POST {path}" in message and "/v1/chat/completions" in message
