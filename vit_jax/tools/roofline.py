"""How long a training step takes on an accelerator that is not here, by its published peaks: a roofline.

An instruction takes the longer of its FLOPs at the peak rate and its bytes at the rate of the memory (Williams et al. 2009,
https://doi.org/10.1145/1498765.1498785). What the devices send to each other comes on top, as if nothing hid it. No step is
faster than its instructions; what runs reach of the peak is published, and gives the range that is to be expected.
"""

from collections.abc import Iterable
from typing import NamedTuple

from vit_jax.errors import unknown
from vit_jax.tools.hlo import Work


class Accelerator(NamedTuple):
    """Peaks of one device, dense, in FLOPs, bytes, and seconds.

    Attributes:
      name: what it is called, with its variant.
      platform: the one of JAX that it belongs to.
      bfloat16: FLOPs a second of products in bfloat16 or float16.
      float32: of products in float32, by the algorithm that JAX chooses unless told otherwise: TF32 on NVIDIA's, one pass of
        bfloat16 on TPUs (https://docs.jax.dev/en/latest/201/precision.html).
      memory, bandwidth: bytes of its memory, and bytes a second to and from it.
      link: bytes a second that it sends to the others that stand close, `close` with itself: by NVLink, or in a TPU's pod.
      network: bytes a second that it sends beyond those.
      source: where the figures are from.
    """

    name: str
    platform: str
    bfloat16: float
    float32: float
    memory: float
    bandwidth: float
    link: float
    close: int
    network: float
    source: str

    def rate(self, dtype: str) -> float:
        """FLOPs a second of products in a dtype."""
        return self.float32 if dtype == "float32" else self.bfloat16


_TPU = "https://docs.cloud.google.com/tpu/docs/{}, data centre network: https://jax-ml.github.io/scaling-book/tpus"
_GPU = "https://www.nvidia.com/en-us/data-center/{}, links: https://jax-ml.github.io/scaling-book/gpus"

# Sheets of NVIDIA print twice these FLOPs, for sparse matrices; all but v4's twice these links, for both directions. They were
# not at hand: the figures are those that others quote from them, but A100's network, which is one port of 200 Gbit/s a GPU.
ACCELERATORS = {
    "A100": Accelerator("A100 80 GB SXM", "cuda", 312e12, 156e12, 80e9, 2.039e12, 300e9, 8, 25e9, _GPU.format("a100")),
    "H100": Accelerator("H100 SXM", "cuda", 989e12, 494e12, 80e9, 3.35e12, 450e9, 8, 50e9, _GPU.format("h100")),
    "H200": Accelerator("H200 SXM", "cuda", 989e12, 494e12, 141e9, 4.8e12, 450e9, 8, 50e9, _GPU.format("h200")),
    "B200": Accelerator("B200 HGX", "cuda", 2250e12, 1100e12, 180e9, 8e12, 900e9, 8, 50e9, _GPU.format("hgx")),
    "v4": Accelerator("TPU v4", "tpu", 275e12, 275e12, 34.4e9, 1.2e12, 270e9, 4096, 6.25e9, _TPU.format("v4")),
    "v5e": Accelerator("TPU v5e", "tpu", 197e12, 197e12, 16e9, 0.819e12, 200e9, 256, 3.125e9, _TPU.format("v5e")),
    "v5p": Accelerator("TPU v5p", "tpu", 459e12, 459e12, 102e9, 2.765e12, 600e9, 8960, 6.25e9, _TPU.format("v5p")),
    "v6e": Accelerator("TPU v6e", "tpu", 918e12, 918e12, 32e9, 1.638e12, 400e9, 256, 12.5e9, _TPU.format("v6e")),
}

REACHED = (0.30, 0.56)
"""The share of the peak that the model's FLOPs are expected to reach. 56 % is the most that is published for transformers of
up to 10¹² parameters on GPUs (https://arxiv.org/abs/2205.05198); 30 % is an assumption for smaller models that nobody tuned."""


class Prediction(NamedTuple):
    """Seconds of one step.

    Attributes:
      compute, memory: of all FLOPs, and of all bytes, at the peak rate.
      instructions: the longer of both for each instruction, summed.
      exchange: of what a device sends to others.
      expected: (least, most) for a step with `REACHED`, never less than `fastest`.
    """

    compute: float
    memory: float
    instructions: float
    exchange: float
    expected: tuple[float, float]

    @property
    def fastest(self) -> float:
        return self.instructions + self.exchange


def find(name: str) -> Accelerator:
    """Raises UserError for a name that is not in `ACCELERATORS`, upper or lower case."""
    for known, accelerator in ACCELERATORS.items():
        if name.lower() == known.lower():
            return accelerator
    raise unknown("accelerator", name, ACCELERATORS)


def predict(
    work: Iterable[Work], *, accelerator: Accelerator, dtype: str, model_flops: float, devices: int, sent: float
) -> Prediction:
    """How long a step takes.

    Args:
      work: of a device in a step.
      dtype: what the model computes in.
      model_flops: of a step of all devices, without what is computed again.
      sent: bytes that a device sends to others in a step.
    """
    rate = accelerator.rate(dtype)
    times = [(w.flops / rate * w.times, w.bytes / accelerator.bandwidth * w.times) for w in work]
    compute, memory, instructions = (sum(x) for x in zip(*((c, m, max(c, m)) for c, m in times), strict=True))
    exchange = exchange_seconds(sent, devices, accelerator)
    least, most = (max(model_flops / devices / rate / share, instructions + exchange) for share in REACHED[::-1])
    return Prediction(compute, memory, instructions, exchange, (least, most))


def exchange_seconds(sent: float, devices: int, accelerator: Accelerator) -> float:
    """Of `sent` bytes, exchanged first among those that stand close, then between their groups, each with a part.

    Of n devices with c close to each other, a ring of all sends (n−1)/n of the data. Of that, (c−1)/c goes to the close ones,
    and (n−c)/(cn) beyond.
    """
    n, c = devices, min(devices, accelerator.close)
    if n == 1:
        return 0.0
    beyond = sent * (n - c) / (c * (n - 1))
    return (sent - beyond) / accelerator.link + beyond / accelerator.network


def in_words(p: Prediction, *, accelerator: Accelerator, model_flops: float, devices: int, batch: int, dtype: str) -> list[str]:
    """Lines of a plan."""
    rate = accelerator.rate(dtype)
    reached = model_flops / devices / rate / p.fastest
    least, most = p.expected
    where = "a pod" if accelerator.platform == "tpu" else "a machine"
    longer = "arithmetic" if p.compute > p.memory else "memory"
    return [
        f"time     a prediction for {devices} x {accelerator.name}, by its published peaks, not a measurement",
        f"  expect  {_seconds(least)} to {_seconds(most)} a step, {batch / most:,.0f} to {batch / least:,.0f} images a second: "
        f"at {REACHED[0]:.0%} (assumed) to {REACHED[1]:.0%} (the most published) of the peak",
        f"  no step is faster than {_seconds(p.fastest)}, {batch / p.fastest:,.0f} images a second, {reached:.0%} of the peak:",
        f"    arithmetic alone {_seconds(p.compute)}, memory alone {_seconds(p.memory)}, the longer of both by instruction "
        f"{_seconds(p.instructions)} (mostly {longer}),",
        f"    and {_seconds(p.exchange)} for the traffic, as if nothing hid it",
        f"  peaks   {rate / 1e12:,.0f} TFLOP/s in {dtype}, {accelerator.bandwidth / 1e12:.2f} TB/s of memory, "
        f"{accelerator.link / 1e9:,.0f} GB/s within {where} of {accelerator.close}, {accelerator.network / 1e9:g} GB/s beyond",
    ]


def _seconds(x: float) -> str:
    return f"{x:.2f} s" if x >= 1 else f"{1e3 * x:.1f} ms" if x >= 1e-3 else f"{1e6 * x:.0f} µs"
