"""The one thread that owns the engine.

Takes prompts from the event loop, returns the pieces of their answers to it. Only this thread
touches the scheduler, so that nothing in it needs a lock. Loading happens here too; the server
listens meanwhile and responds with 503.
"""

import asyncio
import contextlib
import queue
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from .errors import ApiError

PROMPT_THREADS = 2  # prompts whose images are decoded at the same time; bounds the memory they take
STOP_SECONDS = 10  # for the step or the loading under way; the thread does not outlive the process


@dataclass(frozen=True)
class AnswerPiece:
    """New text of an answer, with the tokens and log probabilities (where asked for) since the last
    piece; prompt_logprobs stand in the first."""

    text: str
    token_ids: list[int]
    logprobs: list[dict]
    prompt_logprobs: list[dict | None]


class AnswerStream:
    """An answer while it is computed: `async for piece in stream`; afterwards `result` is whole.

    Iterating raises the error that ended the answer, `await accepted` the one that refused it.
    """

    def __init__(self, prompt, params):
        self.prompt = prompt
        self.params = params
        self.request = None
        self.started = time.perf_counter()
        self.first_token = None  # time, like started
        self._num_delivered = 0
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

    # called in the engine's thread

    def accept(self, request):
        self.request = request
        self._call_in_loop(self._settle, None)

    def refuse(self, error: Exception):
        self._call_in_loop(self._settle, error)

    def deliver(self, text: str):
        """Pass on the new text of a step, and the tokens since the last call."""
        result = self.result
        prompt_logprobs = []
        if self.first_token is None:
            self.first_token = time.perf_counter()
            prompt_logprobs = result.prompt_logprobs
        start = self._num_delivered
        self._num_delivered = len(result.token_ids)
        token_ids = result.token_ids[start:]
        piece = AnswerPiece(text, token_ids, result.logprobs[start:], prompt_logprobs)
        self._call_in_loop(self._pieces.put_nowait, piece)

    def end(self, error: BaseException | None = None):
        self._call_in_loop(self._pieces.put_nowait, error)

    def _settle(self, error):
        if self.accepted.done():
            return
        if error:
            self.accepted.set_exception(error)
        else:
            self.accepted.set_result(None)

    def _call_in_loop(self, *work):
        with contextlib.suppress(RuntimeError):  # the loop has been closed: nobody listens any more
            self._loop.call_soon_threadsafe(*work)


class EngineThread:
    """Runs open_engine(), then the engine's steps.

    on_failure() is called when an error ends the thread, on_answer_end(stream) when an answer has
    ended; both in the thread.
    """

    def __init__(self, open_engine, on_failure, on_answer_end):
        self.engine = None
        self.failure = None
        self.open_engine = open_engine
        self._prompt_pool = ThreadPoolExecutor(PROMPT_THREADS, thread_name_prefix="prompt")
        self._on_failure = on_failure
        self._on_answer_end = on_answer_end
        self._inbox = queue.SimpleQueue()
        self._streams = {}
        self._stopping = False
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    def start(self):
        self._thread.start()

    def stop(self):
        """Cancel what is under way, free the engine's memory, and wait a little for that."""
        self._inbox.put(self._stop)
        self._prompt_pool.shutdown(wait=False, cancel_futures=True)
        self._thread.join(STOP_SECONDS)

    async def run_in_pool(self, function, *arguments):
        """Call `function` in one of the few threads that read prompts and images."""
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._prompt_pool, function, *arguments)

    @contextlib.asynccontextmanager
    async def submit(self, prompt, params):
        """The AnswerStream of a prompt that the engine has accepted.

        On exit from the `with` block, for whatever reason, the request is cancelled and its KV
        blocks are freed.
        """
        stream = AnswerStream(prompt, params)
        try:
            self._inbox.put(lambda: self._add(stream))
            await stream.accepted
            yield stream
        finally:
            self._inbox.put(lambda: self._cancel(stream))

    # in the thread

    def _run(self):
        try:
            self.engine = self.open_engine()
            while not self._stopping:
                self._run_inbox()
                if self.engine.busy and not self._stopping:
                    self._step()
        except BaseException as error:
            self.failure = error
            self._on_failure()
        finally:
            if self.engine:
                self.engine.close()

    def _run_inbox(self):
        """Run the calls that were put in; wait for one while there is nothing to compute."""
        while not self._stopping and not (self._inbox.empty() and self.engine.busy):
            call = self._inbox.get()
            call()

    def _step(self):
        try:
            events = self.engine.step()
        except (
            Exception
        ) as error:  # e.g. out of memory: it ends all answers, and the server goes on
            return self._fail_all(error)
        for request, text in events:
            stream = self._streams.get(request)
            if stream:
                stream.deliver(text)
                if request.finished:
                    self._end(stream, request.error)

    def _add(self, stream: AnswerStream):
        try:
            request = self.engine.add(stream.prompt, stream.params)
        except Exception as error:
            return stream.refuse(error)
        self._streams[request] = stream
        stream.accept(request)

    def _cancel(self, stream: AnswerStream):
        if stream.request in self._streams:
            self.engine.cancel(stream.request)
            self._end(stream)

    def _fail_all(self, error: Exception):
        for stream in list(self._streams.values()):
            self.engine.cancel(stream.request)
            stream.result.finish_reason = "error"
            self._end(stream, error)

    def _stop(self):
        self._stopping = True
        for stream in list(self._streams.values()):
            self.engine.cancel(stream.request)
            self._end(stream, ApiError("the server is shutting down", 503))

    def _end(self, stream: AnswerStream, error: Exception | None = None):
        del self._streams[stream.request]
        stream.end(error)
        self._on_answer_end(stream)
