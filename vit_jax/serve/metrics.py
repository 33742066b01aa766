"""Counters in the text format of Prometheus (https://prometheus.io/docs/instrumenting/exposition_formats)."""

from bisect import bisect_left
from collections import Counter

SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10)
"""The upper bounds of the histogram of times."""


class Metrics:
    """What a server has done since it started; called in its event loop alone, but for `batch`, of one thread."""

    def __init__(self):
        self._requests: Counter[int] = Counter()
        self._batches: Counter[int] = Counter()
        self._images = 0
        self._times = [0] * (len(SECONDS) + 1)
        self._seconds = 0.0

    def request(self, status: int, seconds: float) -> None:
        """A request for predictions was answered with this status, after so many seconds."""
        self._requests[status] += 1
        self._times[bisect_left(SECONDS, seconds)] += 1
        self._seconds += seconds

    def batch(self, size: int, images: int) -> None:
        """A batch of `size` places was computed, of which `images` were filled."""
        self._batches[size] += 1
        self._images += images

    def text(self, *, waiting: int) -> str:
        """All of them; `waiting` images are in the queue."""
        lines = _head("vit_jax_requests_total", "counter", "Requests for predictions by status.")
        lines += [f'vit_jax_requests_total{{status="{status}"}} {n}' for status, n in sorted(self._requests.items())]
        lines += _head("vit_jax_request_seconds", "histogram", "Time from a request to its answer.")
        total = 0
        for bound, n in zip((*SECONDS, "+Inf"), self._times, strict=True):
            total += n
            lines.append(f'vit_jax_request_seconds_bucket{{le="{bound}"}} {total}')
        lines += [f"vit_jax_request_seconds_sum {self._seconds:.6f}", f"vit_jax_request_seconds_count {total}"]
        lines += _head("vit_jax_batches_total", "counter", "Batches computed, by their size.")
        lines += [f'vit_jax_batches_total{{size="{size}"}} {n}' for size, n in sorted(self._batches.items())]
        lines += [*_head("vit_jax_images_total", "counter", "Images computed."), f"vit_jax_images_total {self._images}"]
        lines += [*_head("vit_jax_waiting_images", "gauge", "Images in the queue."), f"vit_jax_waiting_images {waiting}"]
        return "\n".join(lines) + "\n"


def _head(name: str, kind: str, about: str) -> list[str]:
    return [f"# HELP {name} {about}", f"# TYPE {name} {kind}"]
