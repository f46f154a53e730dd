"""Continuous batching: whatever runs together, in whatever pieces, every answer is what it would be
alone."""

import random
from dataclasses import replace

import numpy as np
import paths
import pytest
from PIL import Image

from models.errors import ModelError
from runtime import Engine, SamplingParams
from runtime.common.errors import ToolkitError
from runtime.engine import request
from runtime.engine.kv_cache import KVCache
from runtime.engine.runner import Runner
from runtime.engine.sampler import sample

GOLDEN = paths.GOLDEN
SETTINGS = {"dtype": "float32", "vision": "torch", "max_model_len": 256}
GREEDY = SamplingParams(max_tokens=8, temperature=0, repetition_penalty=1.0, ignore_eos=True)
FAMILIES = ("visualglm", "glm_edge_v")  # context seen both ways; plainly causal
REQUESTS, KINDS = 500, 40  # of each family
ATOL = 1e-4


def small(name, **options):
    """An engine whose cache holds little more than one longest sequence."""
    return Engine(
        GOLDEN / name,
        **{
            **SETTINGS,
            "max_num_seqs": 6,
            "max_num_batched_tokens": 24,
            "cache_tokens": 320,
            **options,
        },
    )


def alone(name, cases):
    """Results one at a time, each computed from its first token on."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(KVCache, "remember", lambda *args: None)
        engine = Engine(GOLDEN / name, max_num_seqs=1, **SETTINGS)
        return [engine.generate([prompt], params)[0] for prompt, params in cases]


def kinds(engine, count, seed=0):
    """Random (prompt, parameters): lengths, pictures, sampling, stop strings."""
    dice = random.Random(seed)
    cases = []
    for _ in range(count):
        picture = Image.new("RGB", (40, 30), (dice.choice((0, 90, 250)), 30, 60))
        images = [{"type": "image", "image": picture}] * (dice.random() < 0.3)
        text = "".join(
            dice.choice("你好 hello world 描述图片 abc") for _ in range(dice.randint(1, 60))
        )
        prompt = engine.prompt(
            [{"role": "user", "content": [*images, {"type": "text", "text": text}]}]
        )
        room = engine.max_model_len - len(prompt.ids)
        cases.append(
            (
                prompt,
                replace(
                    GREEDY,
                    max_tokens=min(room, dice.choice((1, 3, 9, 40))),
                    temperature=dice.choice((0, 0, 0.8)),
                    seed=dice.randint(0, 99),
                ),
            )
        )
    return cases


def with_stop_strings(cases, results):
    """Some of the cases, to be stopped by a piece of the answer that they gave without."""
    return [
        (prompt, replace(params, stop=(result.text[2:4],)))
        for (prompt, params), result in list(zip(cases, results))[::3]
        if len(result.text) > 4
    ]


@pytest.mark.parametrize("name", FAMILIES)
def test_many_random_requests(name):
    """Arrivals and cancellations at random times; nothing is lost, nothing leaks, answers are those
    of one at a time."""
    engine = small(name)
    dice = random.Random(1)
    cases = kinds(engine, KINDS)
    expected = alone(name, cases)
    stopped = with_stop_strings(cases, expected)
    cases = cases + stopped
    expected = expected + alone(name, stopped)
    arrivals = [dice.randrange(len(cases)) for _ in range(REQUESTS)]
    requests = {}
    texts = {}
    cancelled = set()
    gave_way = []  # preempted, or admitted and left without budget
    preempted = []
    release = engine._scheduler._release_blocks
    schedule = engine._scheduler.schedule

    def recorded_schedule():
        plan = schedule()
        preempted.extend(plan.preempted)
        return plan

    def recorded_release(request):
        if not request.finished:
            gave_way.append(request)
        release(request)

    engine._scheduler.schedule = recorded_schedule
    engine._scheduler._release_blocks = recorded_release
    while arrivals or engine.busy:
        while arrivals and len(engine._scheduler.waiting) < 8:
            kind = arrivals.pop()
            request = engine.add(*cases[kind])
            requests[request] = kind
            texts[request] = ""
        for request, piece in engine.step():
            texts[request] += piece
        if dice.random() < 0.1:
            victim = dice.choice(
                [*engine._scheduler.waiting, *engine._scheduler.running, *list(requests)[:1]]
            )
            cancelled |= {victim} - {r for r in requests if r.finished}
            engine.cancel(victim)
    assert len(requests) == REQUESTS and all(request.finished for request in requests)
    assert sum(bool(request.prompt.pixels) for request in requests) > REQUESTS / 10
    assert (
        sum(
            bool(request.params.stop) and request.result.finish_reason == "stop"
            for request in requests
        )
        > 10
    )
    assert engine._cache.used_blocks == 0 and len(cancelled) > 10 and gave_way
    assert preempted or name == "visualglm"
    for request, kind in requests.items():
        result = request.result
        single = expected[kind]
        if request in cancelled:
            assert result.finish_reason == "cancelled"
            assert result.token_ids == single.token_ids[: len(result.token_ids)]
        else:
            assert (result.token_ids, result.text, result.finish_reason) == (
                single.token_ids,
                single.text,
                single.finish_reason,
            )
            assert texts[request] == result.text


def recorded(engine, prompts, params):
    """(answers, (sequence, its length behind the step, logits of its last token) of every step that
    was computed)."""
    seen = []
    run = Runner.run

    def recording(self, chunks, all_logits=False):
        logits = run(self, chunks, all_logits)
        seen.extend((c.sequence, c.end, row) for c, row in zip(chunks, logits))
        return logits

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Runner, "run", recording)
        return engine.generate(prompts, params), seen


@pytest.mark.parametrize("name", paths.FAMILIES)
def test_logits_of_chunks_in_mixed_batches(name):
    """What the sampler gets: the rows of one forward pass over everything, for every family and
    pieces of 7 tokens."""
    engine = small(name, max_num_batched_tokens=7, ops="reference")
    whole = Engine(GOLDEN / name, ops="reference", **SETTINGS)
    cases = (
        [prompt for prompt, _ in kinds(engine, 4)]
        if engine.family.vision
        else [engine.prompt_from_ids(np.arange(5, 5 + n)) for n in (1, 2, 30)]
    )
    _, seen = recorded(engine, cases, GREEDY)
    for prompt in cases:
        mine = [(sequence, end, row) for sequence, end, row in seen if sequence.prompt is prompt]
        expected = whole.score(prompt, mine[0][0].token_ids)
        for _, end, row in mine:
            if end >= len(prompt.ids):
                np.testing.assert_allclose(row, expected[end - len(prompt.ids)], atol=ATOL)
        assert {end for _, end, _ in mine} >= set(
            range(len(prompt.ids), len(prompt.ids) + len(expected))
        )


def golden_cases(engine, name):
    """(prompt, {number of tokens: logits behind them}, 16 greedy tokens), as the original
    implementations gave them."""
    found = []
    for file in sorted((GOLDEN / name).glob("golden*.npz")):
        g = np.load(file)
        if name == "visualglm":
            cases = [
                (
                    g[f"{case}_input_ids"],
                    None if case == "text" else g["pixel_values"],
                    g[f"{case}_logits"],
                    [g[f"{case}_logits"][-1], g[f"{case}_logits_step1"]],
                    g[f"{case}_greedy"],
                )
                for case in ("img", "hist", "text")
            ]
        else:
            greedy = g["greedy_ids"] if "greedy_ids" in g else g["greedy_tokens"][0]
            cases = [
                (
                    g["input_ids"].reshape(-1),
                    g.get("pixel_values"),
                    *(
                        g[key].reshape(-1, g[key].shape[-1])
                        for key in ("prefill_logits", "step_logits")
                    ),
                    greedy,
                )
            ]
        for ids, pixels, prefill, steps, greedy in cases:
            logits = dict(enumerate(prefill, 1)) | dict(enumerate(steps, len(prefill)))
            found.append((engine.prompt_from_ids(ids, pixels), logits, greedy.tolist()))
    if name == "glm4":
        found.append(
            (
                engine.prompt_from_ids(g["long_input_ids"][0]),
                {200: g["long_last_logits"][0]},
                g["long_greedy_tokens"][0].tolist(),
            )
        )
    if name == "glm4v":
        prefill = g["text_only_prefill_logits"][0]
        found.append(
            (
                engine.prompt_from_ids(g["text_only_input_ids"][0]),
                dict(enumerate(prefill, 1)),
                g["text_only_greedy_tokens"][0].tolist(),
            )
        )
    return found


@pytest.mark.parametrize("name", ["visualglm", "glm4", "glm4v", "glm_edge", "glm_edge_v", "llava"])
def test_golden_cases_in_one_batch_and_in_pieces(name):
    """Every golden case of a family together, in pieces of 7 tokens: the original's logits at each
    piece's end and at every token of the answer, and its greedy tokens."""
    engine = small(name, max_num_batched_tokens=7)
    cases = golden_cases(engine, name)
    answers, seen = recorded(
        engine, [prompt for prompt, _, _ in cases], replace(GREEDY, max_tokens=16)
    )
    for (prompt, logits, greedy), answer in zip(cases, answers):
        mine = [
            (end, row) for sequence, end, row in seen if sequence.prompt is prompt and end in logits
        ]
        assert answer.token_ids == greedy and mine
        for end, row in mine:
            np.testing.assert_allclose(row, logits[end], atol=ATOL)
    assert engine._cache.used_blocks == 0


def test_next_turn_of_a_chat_computes_only_what_is_new():
    engine = Engine(GOLDEN / "glm_edge", **SETTINGS)
    turns = [{"role": "user", "content": "hello world, " * 5}]
    first = engine.generate([engine.prompt(turns)], GREEDY)[0]
    turns += [{"role": "assistant", "content": first.text}, {"role": "user", "content": "again"}]
    prompt = engine.prompt(turns)
    second = engine.generate([prompt], GREEDY)[0]
    fresh = alone("glm_edge", [(prompt, GREEDY)])[0]
    shared = second.metrics["cached_tokens"]
    assert (
        shared >= first.metrics["prompt_tokens"] // 16 * 16 - 16 > 0
        and first.metrics["cached_tokens"] == 0
    )
    assert second.token_ids == fresh.token_ids


def test_another_picture_or_a_context_seen_both_ways_is_not_reused():
    for name, reused in (("glm_edge_v", True), ("visualglm", False)):
        engine = Engine(GOLDEN / name, **SETTINGS)
        answers = []
        for color in ((0, 0, 0), (250, 20, 20), (0, 0, 0)):
            picture = {"type": "image", "image": Image.new("RGB", (30, 30), color)}
            prompt = engine.prompt(
                [{"role": "user", "content": [picture, {"type": "text", "text": "hello " * 9}]}]
            )
            answers.append(engine.generate([prompt], GREEDY)[0])
        before = prompt.layout.image_starts[0] // 16 * 16  # tokens in blocks before the picture
        assert answers[1].metrics["cached_tokens"] <= before
        assert (answers[2].metrics["cached_tokens"] > before) == reused
        assert answers[0].token_ids == answers[2].token_ids


def test_parameters_of_each_request_and_log_probabilities():
    engine = Engine(GOLDEN / "glm4", **SETTINGS)
    prompt = engine.prompt_from_ids([5, 6, 7])
    plain, two = engine.generate(
        [prompt, prompt], [GREEDY, replace(GREEDY, max_tokens=2, logprobs=3)]
    )
    assert len(plain.token_ids) == 8 and not plain.logprobs and two.token_ids == plain.token_ids[:2]
    scores = engine.score(prompt, two.token_ids).astype(np.float64)
    known = scores - np.log(np.exp(scores).sum(-1, keepdims=True))
    for row, token, told in zip(known, two.token_ids, two.logprobs):
        assert set(told) == set(np.argsort(row)[-3:].tolist()) and token in told
        np.testing.assert_allclose(list(told.values()), row[list(told)], atol=ATOL)
    sampled = replace(GREEDY, temperature=2.0, logprobs=0, seed=3)
    result = engine.generate([prompt], sampled)[0]
    assert [list(told) for told in result.logprobs] == [[token] for token in result.token_ids]


def test_a_request_that_fails_leaves_the_others_alone(monkeypatch):
    engine = small("glm_edge_v")
    (picture, _), (text, _) = (
        next(k for k in kinds(engine, 20) if k[0].pixels),
        next(k for k in kinds(engine, 20) if not k[0].pixels),
    )
    expected = engine.generate([text], GREEDY)[0]
    monkeypatch.setattr(engine._image_features, "session", lambda: 1 / 0)
    bad = engine.add(picture, GREEDY)
    good = engine.add(text, GREEDY)
    while engine.busy:
        engine.step()
    assert bad.result.finish_reason == "error" and isinstance(bad.error, ZeroDivisionError)
    assert good.result.token_ids == expected.token_ids and engine._cache.used_blocks == 0
    with pytest.raises(ZeroDivisionError):
        engine.generate([text, picture], GREEDY)
    monkeypatch.setattr(
        request, "sample", lambda *args: sample(*args) if args[3].max_tokens == 8 else 1 / 0
    )
    bad = engine.add(text, replace(GREEDY, max_tokens=7))
    good = engine.add(text, GREEDY)
    while engine.busy:
        engine.step()
    assert isinstance(bad.error, ZeroDivisionError) and good.result.token_ids == expected.token_ids
    assert not engine.busy and engine._cache.used_blocks == 0


def test_a_tokenizer_that_fails_ends_one_request(monkeypatch):
    engine = small("glm_edge_v")
    text = next(k for k in kinds(engine, 20) if not k[0].pixels)[0]
    expected = engine.generate([text], GREEDY)[0]
    bad = engine.add(text, GREEDY)
    good = engine.add(text, GREEDY)

    def fails(final):
        raise ModelError("the library cannot make a text of these tokens")

    monkeypatch.setattr(bad.answer._decoder, "_next", fails)
    while engine.busy:
        engine.step()
    assert isinstance(bad.error, ModelError) and bad.result.finish_reason == "error"
    assert good.result.token_ids == expected.token_ids and engine._cache.used_blocks == 0


def test_streams_side_by_side_and_one_that_is_left():
    engine = Engine(GOLDEN / "glm4", **SETTINGS)
    prompts = [engine.prompt_from_ids([5, 6, 7]), engine.prompt_from_ids([9, 10])]
    expected = [result.text for result in engine.generate(prompts, GREEDY)]
    one, other = (engine.stream(prompt, GREEDY) for prompt in prompts)
    texts = [next(one), next(other)]
    for i, stream in ((1, other), (0, one)):
        texts[i] += "".join(stream)
    assert texts == expected
    left = engine.stream(prompts[0], GREEDY)
    next(left)
    left.close()
    assert not engine.busy and engine._cache.used_blocks == 0


def test_interrupted_step_can_be_repeated(monkeypatch):
    engine = Engine(GOLDEN / "glm4", **SETTINGS)
    prompt = engine.prompt_from_ids([5, 6, 7])
    expected = engine.generate([prompt], GREEDY)[0]
    request = engine.add(prompt, GREEDY)
    engine.step()
    with monkeypatch.context() as patch:
        patch.setattr(
            engine._runner.decoder,
            "logits",
            lambda hidden: (_ for _ in ()).throw(KeyboardInterrupt),
        )
        with pytest.raises(KeyboardInterrupt):
            engine.step()
    while engine.busy:
        engine.step()
    assert request.result.token_ids == expected.token_ids


def test_scores_beside_requests_that_fill_the_cache():
    engine = small("glm4", cache_tokens=256)
    prompt = engine.prompt_from_ids(np.arange(5, 200))
    request = engine.add(prompt, GREEDY)
    while not request.sequence.token_ids:
        engine.step()
    with pytest.raises(
        ToolkitError, match="197 tokens do not fit beside the requests that are under way"
    ):
        engine.score(prompt, [1, 2])
    engine.cancel(request)
    assert engine.score(prompt, [1, 2]).shape[0] == 2 and engine._cache.used_blocks == 0


def test_split_over_two_devices_with_a_small_cache(tmp_path, monkeypatch):
    """Packed weights and a cache that rank 0 decided on, in every process."""
    monkeypatch.setenv("ASCEND_VLM_CACHE", str(tmp_path))
    engine = small("glm4", tensor_parallel_size=2, cpu_weights="int8")
    try:
        cases = [
            (engine.prompt_from_ids(np.arange(5, 5 + n)), replace(GREEDY, max_tokens=60))
            for n in (1, 90, 40, 120)
        ]
        together = engine.generate(*map(list, zip(*cases)))
        assert [engine.generate([p], s)[0].token_ids for p, s in cases] == [
            result.token_ids for result in together
        ]
        assert engine._cache.used_blocks == 0
    finally:
        engine.close()
