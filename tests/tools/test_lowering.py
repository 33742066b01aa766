"""Steps lowered for GPUs and TPUs, read on this machine: what the programs that run there are made of."""

import re
from collections import Counter

import jax
import pytest

from tests import plans
from vit_jax.run.experiment import Experiment, make_update
from vit_jax.settings import Settings
from vit_jax.tools import abstract

BLOCKS = 2
TRANSPOSES = {"cuda": 6, "tpu": 16}
"""In a block and its gradient: around attention, which has a kernel of its own on a GPU; on a TPU all are by head."""


def experiment(layout: str, blocks: int) -> Experiment:
    config = plans.config(layout)
    config.dtype, config.remat, config.scan, config.accum_steps = "bfloat16", "none", False, 1
    config.model.transformer.num_layers = blocks
    return abstract.build(Settings.from_config(config), num_classes=10)


def lowered(platform: str, layout: str, blocks: int) -> str:
    e = experiment(layout, blocks)
    update = make_update(e)
    update = update if hasattr(update, "trace") else jax.jit(update)  # a pmapped one cannot be lowered for another platform
    traced = update.trace(*abstract.abstract_arguments(e))
    return traced.lower(lowering_platforms=(platform,)).as_text()


@pytest.fixture(scope="module")
def texts() -> dict[tuple[str, int], str]:
    return {(platform, blocks): lowered(platform, "pmap", blocks) for platform in TRANSPOSES for blocks in (BLOCKS, BLOCKS + 1)}


@pytest.mark.parametrize("platform", TRANSPOSES)
def test_products_are_in_bfloat16(texts, platform):
    lines = [x.rpartition(" : ")[2] for x in texts[platform, BLOCKS].splitlines() if "stablehlo.dot_general" in x]
    operands = Counter(dtype for x in lines for dtype in re.findall(r"x([a-z]+\d+)>", x.partition(" -> ")[0]))
    assert len(lines) > 10 * BLOCKS and operands.keys() == {"bf16"}


@pytest.mark.parametrize("platform", TRANSPOSES)
def test_a_block_transposes_little(texts, platform):
    few, more = (texts[platform, blocks].count("stablehlo.transpose") for blocks in (BLOCKS, BLOCKS + 1))
    assert more - few <= TRANSPOSES[platform]


@pytest.mark.parametrize("platform", TRANSPOSES)
def test_the_state_is_written_in_place(platform):
    """What fsdp gathers and sums is in tests/tools/test_plan.py, of the compiled program."""
    text = lowered(platform, "fsdp", BLOCKS)
    found = re.split(r", (?=%arg)", re.search(r"func\.func public @main\((.*?)\) -> ", text)[1])
    donated = ["tf.aliasing_output" in x or "jax.buffer_donor" in x for x in found]
    state = len(jax.tree.leaves(abstract.host_state(experiment("fsdp", BLOCKS))))
    assert donated == [True] * state + [False] * (len(found) - state)
    assert all('{"data", "fsdp"}' in x for x in found[state:])  # the batch is shared out
