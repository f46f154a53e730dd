"""Continuous batching over the paged cache: which request computes how many tokens in the next step.

Requests flow in at any time; every step computes one token of each answer and as many prompt tokens as the step's budget
leaves (long prompts in chunks), and yields (request, new text). A request is admitted when the cache has room for all
its tokens so far; when answers outgrow the cache, the latest request gives its blocks back and is computed again later.
"""

import time
from collections import deque

from .request import Request
from .sequence import Chunk


class Scheduler:
    """look_at(prompt) -> (rows of each of its pictures, seconds it took). max_requests: computed together. budget: tokens
    per step, which only a prefix-LM context may exceed, because it is computed in one piece. The cache holds at least one
    longest sequence."""

    def __init__(self, runner, look_at, max_requests: int, budget: int):
        self._runner = runner
        self._cache = runner.cache
        self._look_at = look_at
        self._max_requests = max_requests
        self._budget = budget
        self.waiting = deque()
        self.active = []  # both in the order of arrival

    def add(self, request: Request):
        self.waiting.append(request)

    @property
    def busy(self) -> bool:
        return bool(self.waiting or self.active)

    def cancel(self, request: Request):
        """End a request that is not finished; it keeps the answer so far."""
        if not request.finished:
            request.finish("cancelled")
        if request in self.waiting:
            self.waiting.remove(request)
        self._retire()

    def step(self) -> list[tuple[Request, str]]:
        """One pass of the decoder -> (request, new text) of every request that got a token or failed."""
        before = len(self.active)
        work = self._running_work()
        failed = (
            self._admit(work) if len(self.active) == before else []
        )  # unless somebody just had to give way
        events = [(request, "") for request in failed] + (self._compute(work) if work else [])
        self._retire()
        return events

    def _running_work(self) -> list[tuple[Request, int]]:
        """(request, tokens) of those admitted: first all answers, then prompts while the budget lasts."""
        work = []
        budget = self._budget - sum(r.pending == 1 for r in self.active)
        for request in list(self.active):
            if request in self.active and self._grow(request):
                count = 1 if request.pending == 1 else self._share(request, budget, first=not work)
                budget -= count if request.pending > 1 else 0
                work.append((request, count))
        return work

    def _share(self, request: Request, budget: int, first: bool) -> int:
        """How many of a request's tokens the budget allows."""
        context = request.prompt.layout.bidirectional
        if request.sequence.length < context and (context <= budget or first):
            return min(request.pending, max(budget, context))
        if request.sequence.length < context:
            return 0
        return max(min(request.pending, budget), 0)

    def _grow(self, request: Request) -> bool:
        """Blocks for all its tokens, if need be those of later requests; False when it had to give up its own."""
        missing = request.sequence.known - len(request.sequence.blocks) * self._cache.block_size
        while self._cache.blocks_for(max(missing, 0)) > self._cache.free_blocks:
            latest = self.active.pop()
            self._give_back(latest)
            self.waiting.appendleft(latest)
            if latest is request:
                return False
        request.sequence.blocks += self._cache.allocate(max(missing, 0))
        return True

    def _admit(self, work) -> list[Request]:
        """Add waiting requests to `work` while there is room and budget; returns those whose pictures failed."""
        failed = []
        budget = self._budget - sum(count for _, count in work)
        while self.waiting and len(self.active) < self._max_requests and budget > 0:
            request = self.waiting[0]
            known = self._known_blocks(request)
            if not self._has_room(request, known):
                break
            if not self._look(request):
                failed.append(self.waiting.popleft())
                continue
            count = self._start(request, known, budget, first=not work)
            if not count:
                self._give_back(request)
                break
            self.active.append(self.waiting.popleft())
            work.append((request, count))
            budget -= count
        return failed

    def _known_blocks(self, request) -> list[int]:
        """Blocks of its beginning that the cache still holds; at least one token is computed again, for its logits.
        What was seen both ways is not the beginning of anything else."""
        if request.prompt.layout.bidirectional:
            return []
        full = (request.sequence.known - 1) // self._cache.block_size
        return self._cache.find(request.keys(full, self._cache.block_size))

    def _has_room(self, request, known) -> bool:
        fresh = self._cache.blocks_for(request.sequence.known) - len(known)
        return fresh + self._cache.free_among(known) <= self._cache.free_blocks

    def _look(self, request) -> bool:
        """Its pictures' features, unless they fail."""
        if request.prompt.pixels:
            try:
                request.features, seconds = self._look_at(request.prompt)
            except Exception as error:  # whatever it is, it is this request's alone
                request.fail(error)
                return False
            request.result.metrics["vision_seconds"] += seconds
        return True

    def _start(self, request, known, budget, first) -> int:
        """Take its blocks; returns how many tokens it computes in this step."""
        self._cache.share(known)
        sequence = request.sequence
        sequence.length = len(known) * self._cache.block_size
        sequence.blocks = known + self._cache.allocate(sequence.known - sequence.length)
        request.result.metrics["cached_tokens"] = min(sequence.length, len(request.prompt.ids))
        return self._share(request, budget, first)

    def _compute(self, work) -> list[tuple[Request, str]]:
        work = [(request, count) for request, count in work if count]
        start = time.perf_counter()
        chunks = [Chunk(r.sequence, r.sequence.length + n, r.features) for r, n in work]
        logits = self._runner.run(chunks)
        events = []
        seconds = time.perf_counter() - start
        for (request, count), row in zip(work, logits):
            request.spend(seconds)
            self._remember(request, count)
            if not request.pending:
                request.features = None
                events.append((request, request.take(row)))
        return events

    def _remember(self, request, count):
        """Blocks that its last `count` tokens filled can be found by later requests."""
        sequence = request.sequence
        size = self._cache.block_size
        first = (sequence.length - count) // size
        full = sequence.length // size
        if first < full and not request.prompt.layout.bidirectional:
            for block, key in zip(sequence.blocks[first:full], request.keys(full, size)[first:]):
                self._cache.remember(block, key)

    def _retire(self):
        for request in self.active:
            if request.finished:
                self._give_back(request)
        self.active = [request for request in self.active if not request.finished]

    def _give_back(self, request):
        self._cache.release(request.sequence.blocks)
        request.sequence.blocks = []
        request.sequence.length = 0
        request.features = None
