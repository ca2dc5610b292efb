"""What `/metrics` tells, in Prometheus' text format."""

from __future__ import annotations

from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, disable_created_metrics, generate_latest

SECONDS = (0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100)


class Metrics:
    """Counters of one server, told of every request when it ends."""

    def __init__(self) -> None:
        disable_created_metrics()  # a second series for each that says when it began
        own = self._registry = CollectorRegistry()
        self.requests = Counter("ftp_requests", "requests by HTTP status", ["status"], registry=own)
        self.prompts = Counter("ftp_prompt_tokens", "tokens of prompts", registry=own)
        self.answers = Counter("ftp_completion_tokens", "tokens of answers", registry=own)
        skipped = "tokens of prompts that skipped blocks, averaged over the blocks"
        self.skipped = Counter("ftp_skipped_tokens", skipped, registry=own)
        self.first = Histogram(
            "ftp_time_to_first_token_seconds", "from a request's coming", ["kind"], buckets=SECONDS, registry=own
        )
        self.prefill = Counter("ftp_prefill_seconds", "from a batch's start to its first token", ["kind"], registry=own)
        estimate = "what these prompts would have taken densely, by their FLOPs"
        self.dense = Counter("ftp_prefill_dense_estimate_seconds", estimate, ["kind"], registry=own)
        self.gone = Counter("ftp_clients_gone", "requests whose client left before the answer", registry=own)
        self.waiting = Gauge("ftp_requests_in_flight", "requests waiting or being computed", registry=own)

    def ended(self, end: dict[str, Any]) -> None:
        """Count an answer that was given whole."""
        usage, ftp = end["usage"], end["ftp"]
        kind = "pruned" if ftp["pruned"] else "dense"
        self.prompts.inc(usage["prompt_tokens"])
        self.answers.inc(usage["completion_tokens"])
        self.skipped.inc(usage["prompt_tokens_details"]["skipped"])
        self.first.labels(kind).observe(ftp["time_to_first_token_ms"] / 1e3)
        self.prefill.labels(kind).inc(ftp["prefill_ms"] / 1e3)
        self.dense.labels(kind).inc(ftp["prefill_ms_dense_estimate"] / 1e3)

    def text(self, in_flight: int) -> bytes:
        self.waiting.set(in_flight)
        return generate_latest(self._registry)
