"""vit_jax/tools/roofline.py: arithmetic by hand, and the work that it is told, counted in programs."""

import jax
import jax.numpy as jnp
import pytest

from benchmarks import compiled_work
from tests import tiny
from vit_jax.errors import UserError
from vit_jax.settings import Settings
from vit_jax.tools import abstract, hlo, plan, roofline
from vit_jax.tools.hlo import Work

ROUND = roofline.Accelerator("round", "tpu", 2000.0, 1000.0, 1.0, 100.0, 50.0, 4, 5.0, "made up")


def predict(work: list[Work], **changes) -> roofline.Prediction:
    facts = {"accelerator": ROUND, "dtype": "float32", "model_flops": 900.0, "devices": 1, "sent": 0.0}
    return roofline.predict(work, **facts | changes)


def test_an_instruction_takes_the_longer_of_both():
    work = [Work(1000.0, 10.0, 2), Work(100.0, 50.0, 3), Work(0.0, 30.0, 1)]
    p = predict(work)
    assert (p.compute, p.memory) == pytest.approx((2.3, 2.0))
    assert p.instructions == p.fastest == pytest.approx(2 * 1.0 + 3 * 0.5 + 0.3)
    assert predict(work, dtype="bfloat16").instructions == pytest.approx(2 * 0.5 + 3 * 0.5 + 0.3)


def test_expectation_is_a_share_of_the_peak_that_no_step_beats():
    least, most = predict([Work(900.0, 0.0, 1)]).expected
    assert (least, most) == pytest.approx((0.9 / 0.56, 0.9 / 0.30))
    assert predict([Work(450.0, 0.0, 1)], devices=2).expected[0] == pytest.approx(0.45 / 0.56)
    assert predict([Work(0.0, 500.0, 1)]).expected == (5.0, 5.0)


def test_exchange_stays_close_as_long_as_it_can():
    assert roofline.exchange_seconds(100.0, 1, ROUND) == 0.0
    assert roofline.exchange_seconds(100.0, 4, ROUND) == pytest.approx(100 / 50)
    # of 8 devices a ring sends 7/8; 3/4 of the data among four, and a quarter of half of it beyond
    data = 100.0 / (7 / 8)
    assert roofline.exchange_seconds(100.0, 8, ROUND) == pytest.approx(data * 3 / 4 / 50 + data / 4 / 2 / 5)


def test_table_is_in_order():
    for name, x in roofline.ACCELERATORS.items():
        assert roofline.find(name.lower()) is x and x.source.startswith("https://")
        assert x.float32 <= x.bfloat16 and x.network < x.link < x.bandwidth < x.bfloat16
        assert 10e9 < x.memory < 200e9 and x.platform in ("cuda", "tpu")
    with pytest.raises(UserError, match="unknown accelerator 'H10': did you mean"):
        roofline.find("H10")


def test_words_say_that_it_is_a_prediction():
    p = predict([Work(900.0, 10.0, 1)], devices=8, sent=100.0)
    text = "\n".join(roofline.in_words(p, accelerator=ROUND, model_flops=900.0, devices=8, batch=16, dtype="float32"))
    assert "a prediction for 8 x round" in text and "not a measurement" in text
    assert f"no step is faster than {p.fastest:.2f} s" in text


def test_work_of_a_compiled_program_is_counted_by_hand():
    """Two products in a loop of three, over slices of what is stacked; a fusion behind."""

    def f(x: jax.Array, kernels: jax.Array) -> jax.Array:
        return jnp.sin(jax.lax.scan(lambda y, kernel: (y @ kernel, None), x, kernels)[0]) + 1.0

    shapes = jax.ShapeDtypeStruct((32, 64), jnp.float32), jax.ShapeDtypeStruct((3, 64, 64), jnp.float32)
    work = compiled_work.work(jax.jit(f).lower(*shapes).compile().as_text())
    assert sum(w.flops * w.times for w in work) == 3 * 2 * 32 * 64 * 64
    x, kernel = 4 * 32 * 64, 4 * 64 * 64
    least = 3 * (2 * x + kernel) + 2 * x
    assert least <= sum(w.bytes * w.times for w in work) < least + 3 * 2 * kernel + 8 * x + 500  # slices, copies, counters


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_products_of_a_lowered_program_are_counted_by_hand(dtype):
    def f(x: jax.Array, kernel: jax.Array) -> jax.Array:
        image = jnp.einsum("bnd,de->bne", jnp.sin(x), kernel).reshape(2, 4, 8, 16)
        axes = ("NHWC", "HWIO", "NHWC")
        return jax.lax.conv_general_dilated(image, jnp.ones((3, 3, 16, 5), dtype), (1, 1), "SAME", dimension_numbers=axes)

    text = jax.jit(f).lower(jax.ShapeDtypeStruct((2, 32, 64), dtype), jax.ShapeDtypeStruct((64, 16), dtype)).as_text()
    size = jnp.dtype(dtype).itemsize
    product = Work(2.0 * 2 * 32 * 64 * 16, size * (2 * 32 * 64 + 64 * 16 + 2 * 32 * 16), 1)
    convolution = Work(2.0 * 2 * 32 * 5 * 9 * 16, size * (2 * 32 * 16 + 9 * 16 * 5 + 2 * 32 * 5), 1)
    assert set(hlo.products(text)) == {product, convolution}


def test_work_of_a_step_is_that_of_its_products():
    """On every platform the FLOPs of all products, whichever kernels have a part of them."""
    c = tiny.config(dtype="bfloat16", accum_steps=2)
    c.model.transformer.update({"num_layers": 2, "dropout_rate": 0.0})
    settings = Settings.from_config(c)
    flops = {}
    for platform in plan.PLATFORMS:
        work = abstract.step_products(settings, 10, platform=platform, batch_shards=jax.device_count())
        assert {w.times % settings.accum_steps for w in work} == {0}
        flops[platform] = sum(w.flops * w.times for w in work)
    assert flops["cuda"] == flops["cpu"] == pytest.approx(flops["tpu"], rel=0.02)
    d, n, blocks, classes, patch = 16, 5, 2, 10, 4 * 4 * 3
    block = 2 * n * (4 * d * d + 2 * d * d) + 2 * 2 * n**2 * d
    again = 2 * n**2 * d + 2 * n * d  # scores in the backward pass, and the sums over a row of them
    image = 3 * (blocks * block + 2 * d * classes) + blocks * again + 2 * 2 * (n - 1) * patch * d  # pixels have no gradient
    assert flops["cpu"] * jax.device_count() == settings.batch * image
