"""Continuous batching over the paged cache: decides which request computes how many tokens in the
next step.

Takes requests at any time; every step computes one token of each answer and as many prompt tokens
as the step's budget leaves (long prompts in chunks), and returns (request, new text). A request is
admitted when the cache has room for all its tokens so far; when answers outgrow the cache, the
latest request is preempted: it gives its blocks back and is computed again later.
"""

import time
from collections import deque
from dataclasses import dataclass, field

from .request import Request
from .sequence import Chunk

# Tokens of a prompt whose logits are computed in one step: of each, one number per word of the
# vocabulary is in memory twice.
PROMPT_LOGITS = 256


@dataclass
class ScheduledRequest:
    """A request and how many of its tokens the step computes."""

    request: Request
    num_tokens: int

    def chunk(self) -> Chunk:
        sequence = self.request.sequence
        end = sequence.num_computed_tokens + self.num_tokens
        return Chunk(sequence, end, self.request.features, self.request.needs_prompt_logits)


@dataclass
class StepPlan:
    """What one step does. budget: tokens that it may compute besides those that are scheduled.

    preempted: requests that gave their blocks back and wait again. failed: requests whose images
    could not be encoded.
    """

    budget: int
    scheduled: list[ScheduledRequest] = field(default_factory=list)
    preempted: list[Request] = field(default_factory=list)
    failed: list[Request] = field(default_factory=list)

    def add(self, request: Request, num_tokens: int):
        if num_tokens:
            self.scheduled.append(ScheduledRequest(request, num_tokens))


class Scheduler:
    """The requests of an engine: `waiting` for blocks, or `running`; both in the order of arrival.

    encode_images(prompt) -> (features of each of its images, seconds it took). max_num_seqs:
    requests computed together. max_num_batched_tokens: tokens per step, which only a prefix-LM
    context may exceed, because it is computed in one piece. The cache holds at least one longest
    sequence.
    """

    def __init__(self, runner, encode_images, max_num_seqs: int, max_num_batched_tokens: int):
        self._runner = runner
        self._cache = runner.cache
        self._encode_images = encode_images
        self._max_num_seqs = max_num_seqs
        self._max_num_batched_tokens = max_num_batched_tokens
        self.waiting = deque()
        self.running = []

    def add(self, request: Request):
        self.waiting.append(request)

    @property
    def busy(self) -> bool:
        return bool(self.waiting or self.running)

    def cancel(self, request: Request):
        """End a request that is not finished; it keeps the answer so far."""
        if not request.finished:
            request.finish("cancelled")
        if request in self.waiting:
            self.waiting.remove(request)
        self._retire_finished()

    def step(self) -> list[tuple[Request, str]]:
        """One pass of the decoder -> (request, new text) of every request that got a token or
        failed."""
        plan = self.schedule()
        logits, seconds = self.run(plan)
        return self.postprocess(plan, logits, seconds)

    def schedule(self) -> StepPlan:
        """Takes blocks for what the next step computes: all answers, then prompts while budget and
        cache last."""
        plan = StepPlan(self._max_num_batched_tokens)
        self._schedule_running(plan)
        if not plan.preempted:
            self._schedule_waiting(plan)
        return plan

    def run(self, plan: StepPlan):
        """(float32 logits [rows, vocab] of each scheduled request: of its last token, or of all
        that it computed; seconds it took)."""
        if not plan.scheduled:
            return [], 0.0
        start = time.perf_counter()
        chunks = [scheduled.chunk() for scheduled in plan.scheduled]
        logits = self._runner.run(chunks)
        seconds = time.perf_counter() - start
        rows = [
            scheduled.num_tokens if chunk.all_logits else 1
            for scheduled, chunk in zip(plan.scheduled, chunks)
        ]
        return logits.split(rows), seconds

    def postprocess(self, plan: StepPlan, logits, seconds: float) -> list[tuple[Request, str]]:
        """Samples a token for every request whose tokens are all computed, and lets go of those
        that ended."""
        events = [(request, "") for request in plan.failed]
        for scheduled, rows in zip(plan.scheduled, logits):
            request = scheduled.request
            request.add_seconds(seconds)
            self._remember_blocks(scheduled)
            if request.needs_prompt_logits:
                start = request.sequence.num_computed_tokens - scheduled.num_tokens
                request.take_prompt_logits(start, rows)
            if request.finished:
                events.append((request, ""))
            elif request.sequence.num_remaining == 0:
                request.features = None
                events.append((request, request.sample_next(rows[-1])))
        self._retire_finished()
        return events

    # schedule

    def _schedule_running(self, plan: StepPlan):
        # each answer gets its one token, whatever the prompts before it would take
        plan.budget -= sum(request.sequence.num_remaining == 1 for request in self.running)
        index = 0
        while index < len(self.running):  # preemption shortens the list from its end
            request = self.running[index]
            if not self._ensure_blocks(request, plan):
                break
            if request.sequence.num_remaining == 1:
                plan.add(request, 1)
            else:
                num_tokens = self._tokens_allowed(request, plan.budget, oldest=index == 0)
                plan.budget -= num_tokens
                plan.add(request, num_tokens)
            index += 1

    def _schedule_waiting(self, plan: StepPlan):
        while self.waiting and len(self.running) < self._max_num_seqs and plan.budget > 0:
            request = self.waiting[0]
            cached = self._find_cached_blocks(request)
            if not self._has_room(request, cached):
                break
            if not self._add_features(request):
                plan.failed.append(self.waiting.popleft())
                continue
            self._allocate_blocks(request, cached)
            num_tokens = self._tokens_allowed(request, plan.budget, oldest=not self.running)
            if not num_tokens:
                self._release_blocks(request)
                break
            plan.budget -= num_tokens
            plan.add(request, num_tokens)
            self.running.append(self.waiting.popleft())

    def _tokens_allowed(self, request: Request, budget: int, oldest: bool) -> int:
        """How many of a request's tokens fit into the budget. A prefix-LM context is computed whole
        or not at all; that of the oldest request even beyond the budget."""
        sequence = request.sequence
        if request.needs_prompt_logits:
            budget = min(budget, PROMPT_LOGITS)
        context = request.prompt.layout.bidirectional
        if sequence.num_computed_tokens >= context:
            return max(min(sequence.num_remaining, budget), 0)
        if context <= budget or oldest:
            return min(sequence.num_remaining, max(budget, context))
        return 0

    def _add_features(self, request: Request) -> bool:
        """Encode its images; False when that failed, which ends the request."""
        if request.prompt.pixels:
            try:
                request.features, seconds = self._encode_images(request.prompt)
            except Exception as error:  # whatever it is, it is this request's alone
                request.fail(error)
                return False
            request.result.metrics["vision_seconds"] += seconds
        return True

    # blocks

    def _ensure_blocks(self, request: Request, plan: StepPlan) -> bool:
        """Blocks for all tokens of a running request, if need be those of later requests; False
        when none was later, so that it was preempted itself."""
        sequence = request.sequence
        held = len(sequence.block_table) * self._cache.block_size
        missing = max(sequence.num_tokens - held, 0)
        while self._cache.blocks_for(missing) > self._cache.free_blocks:
            latest = self._preempt_latest(plan)
            if latest is request:
                return False
        sequence.block_table += self._cache.allocate(missing)
        return True

    def _preempt_latest(self, plan: StepPlan) -> Request:
        request = self.running.pop()
        self._release_blocks(request)
        self.waiting.appendleft(request)
        plan.preempted.append(request)
        return request

    def _find_cached_blocks(self, request: Request) -> list[int]:
        """Blocks of its beginning that the cache still holds; at least one token is computed again,
        for its logits.

        Blocks of a prefix-LM prompt cannot be reused: their values depend on the whole prompt; and
        a prompt whose log probabilities are asked for is computed whole, for its logits.
        """
        if request.prompt.layout.bidirectional or request.needs_prompt_logits:
            return []
        full = (request.sequence.num_tokens - 1) // self._cache.block_size
        return self._cache.find(request.block_keys(full, self._cache.block_size))

    def _has_room(self, request: Request, cached: list[int]) -> bool:
        new = self._cache.blocks_for(request.sequence.num_tokens) - len(cached)
        return new + self._cache.free_among(cached) <= self._cache.free_blocks

    def _allocate_blocks(self, request: Request, cached: list[int]):
        """Share the cached blocks and take new ones for all its other tokens."""
        self._cache.share(cached)
        sequence = request.sequence
        sequence.num_computed_tokens = len(cached) * self._cache.block_size
        sequence.block_table = cached + self._cache.allocate(sequence.num_remaining)
        request.result.metrics["cached_tokens"] = min(
            sequence.num_computed_tokens, len(request.prompt.ids)
        )

    def _remember_blocks(self, scheduled: ScheduledRequest):
        """Let later requests find the blocks that this step filled."""
        request = scheduled.request
        sequence = request.sequence
        size = self._cache.block_size
        first = (sequence.num_computed_tokens - scheduled.num_tokens) // size
        full = sequence.num_computed_tokens // size
        if first == full or request.prompt.layout.bidirectional:
            return
        keys = request.block_keys(full, size)
        for block, key in zip(sequence.block_table[first:full], keys[first:]):
            self._cache.remember(block, key)

    def _release_blocks(self, request: Request):
        self._cache.release(request.sequence.block_table)
        request.sequence.block_table = []
        request.sequence.num_computed_tokens = 0
        request.features = None

    def _retire_finished(self):
        for request in self.running:
            if request.error:  # what it computed, or found, may be NaN
                self._cache.forget(request.sequence.block_table)
            if request.finished:
                self._release_blocks(request)
        self.running = [request for request in self.running if not request.finished]
