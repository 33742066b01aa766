"""What a server takes, and what it refuses."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Limits:
    """What a server takes: `batch` images at a time, gathered for `wait` seconds; the others are what it refuses beyond.

    Attributes:
      queue: requests at a time, and images that wait.
      max_bytes: of a request; all that are answered at a time may have `max_held` times as many.
      max_pixels: of an image.
      timeout: seconds for a request to arrive, and again for its answer.
    """

    batch: int = 8
    wait: float = 0.004
    queue: int = 64
    max_bytes: int = 32 << 20
    max_held: int = 8
    max_pixels: int = 50_000_000
    timeout: float = 30.0
