"""The one thread that owns the engine: requests come in from the event loop, their pieces go back to it.

Only this thread touches the scheduler, so that nothing in it needs a lock. Loading happens here too; the server listens
meanwhile and says 503.
"""

import asyncio
import contextlib
import queue
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from .errors import ApiError

PREPARING = 2  # prompts whose pictures are decoded at the same time; bounds the memory they take
STOP_SECONDS = 10  # for the step or the loading under way; the thread does not outlive the process


@dataclass(frozen=True)
class Piece:
    """New text of an answer, with the tokens and log probabilities (where asked for) since the last piece."""

    text: str
    token_ids: list[int]
    logprobs: list[dict]


class Answer:
    """An answer under way: `async for piece in answer`; afterwards `result` is whole. Raises what ended it."""

    def __init__(self, prompt, params):
        self.prompt = prompt
        self.params = params
        self.request = None
        self.begun = time.perf_counter()
        self.first = None
        self._told = 0
        self._loop = asyncio.get_running_loop()
        self._pieces = asyncio.Queue()
        self.accepted = self._loop.create_future()

    @property
    def result(self):
        return self.request.result

    async def __aiter__(self):
        while True:
            piece = await self._pieces.get()
            if isinstance(piece, BaseException):
                raise piece
            if piece is None:
                return
            yield piece

    # called by the worker

    def accept(self, request):
        self.request = request
        self._call(self._settle, None)

    def refuse(self, error: Exception):
        self._call(self._settle, error)

    def tell(self, text: str):
        """Pass on what a step gave."""
        result = self.request.result
        count = len(self.request.result.token_ids)
        self.first = self.first or time.perf_counter()
        self._put(
            Piece(text, result.token_ids[self._told : count], result.logprobs[self._told : count])
        )
        self._told = count

    def end(self, error: BaseException | None = None):
        self._put(error)

    def _put(self, piece):
        self._call(self._pieces.put_nowait, piece)

    def _settle(self, error):
        if not self.accepted.done():
            self.accepted.set_exception(error) if error else self.accepted.set_result(None)

    def _call(self, *work):
        with contextlib.suppress(RuntimeError):  # the loop has been closed: nobody listens any more
            self._loop.call_soon_threadsafe(*work)


class Worker:
    """open_engine() -> Engine, called in the thread; on_end(error) when the thread ends by an error; `finished(answer)`
    is told of every answer that ended, in the thread."""

    def __init__(self, open_engine, on_end, finished):
        self.engine, self.failure = None, None
        self._open = open_engine
        self._on_end = on_end
        self._finished = finished
        self._inbox = queue.SimpleQueue()
        self._answers = {}
        self._stopping = False
        self.pool = ThreadPoolExecutor(PREPARING, thread_name_prefix="prompt")
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    def start(self):
        self._thread.start()

    def stop(self):
        """Cancel what is under way, give the engine's memory back, and wait a little for that."""
        self._inbox.put(self._stop)
        self.pool.shutdown(wait=False, cancel_futures=True)
        self._thread.join(STOP_SECONDS)

    @contextlib.asynccontextmanager
    async def answer(self, prompt, params):
        """The answer to a prompt. Leaving the block, however it happens, gives its blocks back."""
        answer = Answer(prompt, params)
        try:
            self._inbox.put(lambda: self._add(answer))
            await answer.accepted
            yield answer
        finally:
            self._inbox.put(lambda: self._cancel(answer))

    # in the thread

    def _run(self):
        try:
            self.engine = self._open()
            while not self._stopping:
                self._hear()
                if self.engine.busy and not self._stopping:
                    self._step()
        except BaseException as error:
            self.failure = error
            self._on_end()
        finally:
            if self.engine:
                self.engine.close()

    def _hear(self):
        """Do what was asked for; wait for it while there is nothing to compute."""
        while not self._stopping and not (self._inbox.empty() and self.engine.busy):
            self._inbox.get()()

    def _step(self):
        try:
            events = self.engine.step()
        except Exception as error:  # e.g. out of memory: everybody is told, and the server goes on
            return self._fail_all(error)
        for request, text in events:
            answer = self._answers.get(request)
            if answer:
                answer.tell(text)
                if request.finished:
                    self._end(answer, request.error)

    def _add(self, answer: Answer):
        try:
            request = self.engine.add(answer.prompt, answer.params)
        except Exception as error:
            return answer.refuse(error)
        self._answers[request] = answer
        answer.accept(request)

    def _cancel(self, answer: Answer):
        if answer.request in self._answers:
            self.engine.cancel(answer.request)
            self._end(answer)

    def _fail_all(self, error):
        for answer in list(self._answers.values()):
            self.engine.cancel(answer.request)
            answer.request.result.finish_reason = "error"
            self._end(answer, error)

    def _stop(self):
        self._stopping = True
        for answer in list(self._answers.values()):
            self.engine.cancel(answer.request)
            self._end(answer, ApiError("the server is shutting down", 503))

    def _end(self, answer: Answer, error=None):
        del self._answers[answer.request]
        answer.end(error)
        self._finished(answer)
