"""/metrics: vLLM's names under our prefix, and the time the vision encoder takes.

Takes every answer that ended, returns Prometheus' exposition format.
"""

import time

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

PREFIX = "ascend_vlm:"
SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 25, 60, 120, 300)
STEP_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 1, 2.5)


class Telemetry:
    """All figures have the label model_name."""

    def __init__(self, model: str):
        self._registry = CollectorRegistry()
        self._model = model
        self._running = self._metric(Gauge, "num_requests_running", "requests being computed")
        self._waiting = self._metric(Gauge, "num_requests_waiting", "requests that wait for room")
        self._cache = self._metric(
            Gauge, "kv_cache_usage_perc", "share of the KV cache in use, 0 to 1"
        )
        self._prompt = self._metric(Counter, "prompt_tokens", "prompt tokens of ended requests")
        self._cached = self._metric(Counter, "prefix_cache_hits", "of those, found in the cache")
        self._generated = self._metric(Counter, "generation_tokens", "tokens generated")
        self._to_first_token = self._metric(
            Histogram, "time_to_first_token_seconds", "from arrival", buckets=SECONDS
        )
        self._per_token = self._metric(
            Histogram, "time_per_output_token_seconds", "after the first", buckets=STEP_SECONDS
        )
        self._whole = self._metric(
            Histogram, "e2e_request_latency_seconds", "from arrival to the end", buckets=SECONDS
        )
        self._vision = self._metric(
            Histogram, "vision_encode_seconds", "pictures of a request", buckets=SECONDS
        )
        self._ended = Counter(
            PREFIX + "request_success",
            "requests ended, by reason",
            ["model_name", "finished_reason"],
            registry=self._registry,
        )

    def record(self, stream):
        """Count an AnswerStream that ended. Called in the engine's thread."""
        result = stream.result
        now = time.perf_counter()
        self._ended.labels(self._model, result.finish_reason).inc()
        self._prompt.inc(result.metrics["prompt_tokens"])
        self._cached.inc(result.metrics["cached_tokens"])
        self._generated.inc(result.metrics["output_tokens"])
        self._whole.observe(now - stream.started)
        if stream.prompt.pixels:
            self._vision.observe(result.metrics["vision_seconds"])
        if stream.first_token is not None:
            self._to_first_token.observe(stream.first_token - stream.started)
            steps = len(result.token_ids) - 1
            if steps > 0:
                self._per_token.observe((now - stream.first_token) / steps)

    def text(self, engine) -> bytes:
        """Prometheus' exposition format; engine: None while it loads."""
        running, waiting, used = engine.load() if engine else (0, 0, 0.0)
        self._running.set(running)
        self._waiting.set(waiting)
        self._cache.set(used)
        return generate_latest(self._registry)

    def _metric(self, kind, name: str, help: str, **more):
        metric = kind(PREFIX + name, help, ["model_name"], registry=self._registry, **more)
        return metric.labels(self._model)
