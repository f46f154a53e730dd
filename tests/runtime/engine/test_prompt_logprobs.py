"""Log probabilities of a prompt's tokens equal those of its logits, however it is computed."""

import numpy as np
import paths
import pytest
import torch

from runtime import Engine, SamplingParams
from runtime.common.errors import ToolkitError
from runtime.engine import scheduler

FAMILIES = ("glm_edge", "glm4", "llava", "glm_edge_v", "glm4v")
TEXT = "hello there, what do you see in the picture 你好"


def engine_of(name, **more):
    return Engine(paths.GOLDEN / name, vision="torch", dtype="float32", max_model_len=256, **more)


def expected(engine, prompt) -> np.ndarray:
    """float32 [T - 1]: of every token but the first, from the logits of the place before."""
    logits = torch.from_numpy(engine.prefill_logits(prompt))
    ids = torch.from_numpy(prompt.ids)
    return torch.log_softmax(logits, -1)[:-1].gather(1, ids[1:, None])[:, 0].numpy()


def found(prompt, result) -> np.ndarray:
    first, *rows = result.prompt_logprobs
    assert first is None and len(rows) == len(prompt.ids) - 1
    return np.array([row[token] for row, token in zip(rows, prompt.ids[1:].tolist())])


def ask(count=2, **more):
    return SamplingParams(max_tokens=3, temperature=0, prompt_logprobs=count, **more)


@pytest.mark.parametrize("name", FAMILIES)
def test_whole_in_chunks_and_beside_others(name, monkeypatch):
    monkeypatch.setattr(scheduler, "PROMPT_LOGITS", 5)
    engine = engine_of(name, max_num_seqs=3)
    prompt = engine.prompt_from_ids(engine.family.text_ids(TEXT))
    want = expected(engine, prompt)
    plain = SamplingParams(max_tokens=3, temperature=0, ignore_eos=True)
    alone = engine.generate([prompt], plain)[0].token_ids
    for _ in range(2):  # the second time all blocks are in the cache
        given = [plain, ask(ignore_eos=True), plain]
        results = engine.generate([prompt] * 3, given)
        np.testing.assert_allclose(found(prompt, results[1]), want, atol=1e-4)
        assert [result.token_ids for result in results] == [alone] * 3
        assert results[0].prompt_logprobs == []


def test_the_likeliest_stand_beside_the_prompts_own():
    engine = engine_of("glm_edge")
    prompt = engine.prompt_from_ids(engine.family.text_ids(TEXT))
    logits = torch.from_numpy(engine.prefill_logits(prompt))
    [result] = engine.generate([prompt], ask(3))
    for row, place, token in zip(result.prompt_logprobs[1:], logits, prompt.ids[1:].tolist()):
        likeliest = place.topk(3).indices.tolist()
        assert list(row)[:3] == likeliest and set(row) == {*likeliest, token}
    [bare] = engine.generate([prompt], ask(0))
    assert all(
        list(row) == [t] for row, t in zip(bare.prompt_logprobs[1:], prompt.ids[1:].tolist())
    )


def test_a_preempted_prompt_has_each_token_once():
    engine = engine_of("glm_edge", max_num_seqs=2, block_size=4, cache_tokens=256)
    prompt = engine.prompt_from_ids(engine.family.text_ids(TEXT * 4))
    want = expected(engine, prompt)
    longest = 256 - len(prompt.ids)
    params = SamplingParams(max_tokens=longest, temperature=0, ignore_eos=True, prompt_logprobs=1)
    preempted = []
    release = engine._scheduler._preempt_latest
    engine._scheduler._preempt_latest = lambda plan: (
        preempted.append(release(plan)) or preempted[-1]
    )
    results = engine.generate([prompt, prompt], params)
    assert preempted
    for result in results:
        np.testing.assert_allclose(found(prompt, result), want, atol=1e-4)


def test_nan_in_a_prompts_logits_ends_the_request():
    engine = engine_of("glm_edge")
    prompt = engine.prompt_from_ids(engine.family.text_ids("hello there"))
    run = engine._runner.run

    def broken(chunks):
        logits = run(chunks).clone()
        logits[0, 0] = float("nan")
        return logits

    engine._runner.run = broken
    with pytest.raises(ToolkitError, match="NaN or Inf"):
        engine.generate([prompt], ask())


def test_a_continued_text_keeps_its_blanks():
    """The answer's first blank is that between prompt and answer; a chat's answer is cleaned."""
    from runtime.engine.answer import AnswerText

    for name in ("glm_edge", "glm4", "llava", "visualglm"):
        engine = engine_of(name)
        tokenizer = engine.family.tokenizer
        before = tokenizer.encode("one two")
        ids = tokenizer.encode("one two one two")[len(before) :]
        continued = AnswerText(engine.family, (), before[-4:])
        text = "".join(continued.push(i) for i in ids) + continued.finish()
        assert text == " one two", name
        chat = AnswerText(engine.family)
        assert "".join(chat.push(i) for i in ids) + chat.finish() == "one two"
