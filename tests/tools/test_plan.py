"""vit_jax/plan.py: figures counted by hand, on 8 virtual devices in a process of its own, and what is made of them."""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from configs import pretrain
from tests import command_line, plans, tiny
from vit_jax import overrides
from vit_jax.data import loader
from vit_jax.errors import UserError
from vit_jax.models import attention
from vit_jax.run.experiment import make_update
from vit_jax.settings import Settings
from vit_jax.tools import abstract, hlo, plan
from vit_jax.tools.plan import Plan

# The model of tests/plans.py: 16 wide, 2 blocks, 8 pixels in 4 patches and a class token, 10 classes.
D, MLP, BLOCKS, TOKENS, CLASSES, PATCH, BATCH = 16, 16, 2, 5, 10, 4 * 4 * 3, 16
MATRICES = PATCH * D + D + TOKENS * D + BLOCKS * (4 * D * D + 2 * D * MLP) + D * CLASSES
BIASES = D + BLOCKS * (4 * D + MLP + D)
VECTORS = BIASES + (2 * BLOCKS + 1) * 2 * D + CLASSES
COUNTERS = 2 * 4  # Adam's and the schedule's


@pytest.fixture(scope="module")
def found() -> dict:
    command = [sys.executable, "-m", "tests.plans"]
    root = Path(__file__).parent.parent.parent
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def planned(found: dict) -> dict[str, Plan]:
    settings = {layout: Settings.from_config(plans.config(layout)) for layout in plans.LAYOUTS}
    return {layout: Plan(**fields | {"settings": settings[layout]}) for layout, fields in found["plans"].items()}


def test_parameters_and_state_are_counted_exactly(planned):
    p = planned["pmap"]
    assert p.parameters == p.trained == MATRICES + VECTORS
    size = 4 * p.parameters
    assert p.state == {"parameters": size, "optimizer": 2 * size + COUNTERS, "average": size, "frozen": 0}
    assert p.batch == BATCH // 8 * (8 * 8 * 3 + 4 + 4)
    assert p.prefetched == 2 * p.batch


def test_fsdp_divides_what_is_no_vector(planned):
    size = 4 * (MATRICES // 8 + VECTORS)
    p = planned["fsdp"]
    assert p.state == {"parameters": size, "optimizer": 2 * size + COUNTERS, "average": size, "frozen": 0}
    step = 4
    assert sum(p.state.values()) + step == p.shared_state == planned["pmap"].shared_state


def test_state_and_batch_lie_on_the_devices_as_planned(found):
    assert found["placed_as_planned"] == {"pmap": True, "fsdp": True}


def test_batch_is_the_loaders():
    c = tiny.config()
    e = abstract.build(Settings.from_config(c), num_classes=1000)
    real = next(loader.train_batches(e.train_source, e.task.train_example, batch_size=c.batch, seed=0, start_step=0))
    assert abstract.abstract_batch(e) == {name: jax.ShapeDtypeStruct(x.shape, x.dtype) for name, x in real.items()}


def test_flops_are_those_of_the_matrix_products():
    """Of a wide model, so that little else counts: 2 blocks of S/16, which loops over blocks or devices must not hide."""
    d, mlp, blocks, n, classes, patch, batch = 384, 1536, 2, 197, 1000, 16 * 16 * 3, 8
    c = pretrain.get_config("s16,imagenet2012")
    c.update({"batch": batch, "accum_steps": 4, "scan": True})
    c.model.transformer.num_layers = blocks
    s = Settings.from_config(c)
    block = 2 * n * (4 * d * d + 2 * d * mlp) + 2 * 2 * n**2 * d
    embedding = 2 * (n - 1) * patch * d
    products = batch * (3 * (blocks * block + 2 * d * classes) + 2 * embedding)  # pixels have no gradient
    model = abstract.step_flops(s, 1000, remat="none")
    assert 1 < model / products < 1.03
    again = batch * blocks * (block - 2 * n * d * mlp)  # without a block's last matrix product
    assert 1 < (abstract.step_flops(s, 1000, remat="full") - model) / again < 1.05


@pytest.mark.parametrize("case", ["accumulated", "frozen", "LoRA"])
def test_flops_follow_from_models_of_few_blocks(case, monkeypatch):
    """Exactly what XLA counts for 4 blocks; accumulated with remat and stochastic depth."""
    c = tiny.config(accum_steps=4, scan=True) if case == "accumulated" else tiny.config()
    c.model.transformer.update({"num_layers": 4, "stochastic_depth": 0.3 if case == "accumulated" else 0.0})
    s = Settings.from_config(c)
    changes = {
        "frozen": {"train_only": ("head/.*", ".*LayerNorm.*")},
        "LoRA": {"lora": dataclasses.replace(s.lora, rank=2)},
    }
    s = dataclasses.replace(s, **changes.get(case, {}))
    assert abstract._equal_blocks(abstract.build(s, 10)) == 4
    remat = "full" if case == "accumulated" else "none"
    inferred = abstract.step_flops(s, 10, remat=remat)
    monkeypatch.setattr(abstract, "_equal_blocks", lambda experiment: 0)
    assert inferred == abstract.step_flops(s, 10, remat=remat)


def test_nothing_is_inferred_where_blocks_differ():
    c = tiny.config()
    c.model.transformer.update({"num_layers": 5, "stochastic_depth": 0.3, "stochastic_depth_mode": "subset"})
    assert abstract._equal_blocks(abstract.build(Settings.from_config(c), 10)) == 0
    c.model.transformer.stochastic_depth = 0.0
    s = Settings.from_config(c)
    assert abstract._equal_blocks(abstract.build(s, 10)) == 5
    frozen = dataclasses.replace(s, freeze=(".*encoderblock_[01]/.*",))
    assert abstract._equal_blocks(abstract.build(frozen, 10)) == 0


@pytest.mark.parametrize("layout", plans.LAYOUTS)
def test_a_step_is_lowered_for_another_platform(layout):
    c = plans.config(layout)
    c.dtype = "bfloat16"
    e = abstract.build(Settings.from_config(c), num_classes=10)
    state, batch = abstract.abstract_arguments(e)
    update = make_update(e)
    kernels = {p: hlo.custom_calls(plan.lower(update, state, batch, p)) for p in plan.PLATFORMS}
    assert kernels["cpu"] == kernels["tpu"] == ()
    by_name = set(attention.CUDNN_CALLS)
    assert kernels["cuda"] and set(kernels["cuda"]) in (by_name, {hlo.DIVIDED})


def test_report_says_what_is_not_known_of_another_platform(planned):
    p = planned["pmap"]
    assert p.platform == "cpu" and "not known" not in plan.report(p, memory=80)
    text = plan.report(dataclasses.replace(p, platform="cuda", kernels=attention.CUDNN_CALLS), memory=80)
    assert "for cuda: __cudnn$fmhaSoftmax, __cudnn$fmhaSoftmaxBackward" in text
    assert "not known here: temporaries, results and traffic" in text
    assert "XLA's own alone" in plan.report(dataclasses.replace(p, platform="tpu"), memory=80)


def test_traffic_is_a_sum_of_gradients_and_two_collections_of_parameters(planned):
    """A loop over blocks must not make the devices exchange activations, many times as much."""
    ring = 7 / 8 * 4
    data = planned["pmap"].sent
    assert data.keys() == {"all-reduce"}
    assert data["all-reduce"] == pytest.approx(2 * ring * (MATRICES + VECTORS), rel=0.01)
    shared = planned["fsdp"].sent
    assert shared.keys() == {"all-reduce", "all-gather"}
    assert shared["all-reduce"] == pytest.approx(2 * ring * (MATRICES + VECTORS), rel=0.02)
    assert ring * MATRICES < shared["all-gather"] < 2 * ring * MATRICES


def test_compiled_programs_are_read(found):
    gathered, summed = found["exchanges"]
    assert gathered == ["all-gather", 8, 3, 7 / 8 * 4 * 128 * 128]
    assert summed == ["all-reduce", 4, 1, 2 * 3 / 4 * 4 * 256]


def large(p: Plan, **fields) -> Plan:
    return dataclasses.replace(p, settings=dataclasses.replace(p.settings, batch=1024, **fields))


def test_report_says_whether_it_fits(planned):
    p = dataclasses.replace(planned["pmap"], temporaries=int(50e9))
    text = plan.report(p, memory=80)
    assert f"{p.parameters:,} parameters" in text and "fits     50.0 of 80 GB" in text
    assert "MEM_FRACTION" not in text
    assert "XLA_PYTHON_CLIENT_MEM_FRACTION" in plan.report(p, memory=60)
    assert "does not fit: 50.0 GB a device are needed, 40 are there" in plan.report(p, memory=40)
    assert "canvases" not in text
    text = plan.report(dataclasses.replace(p, canvases=((640, 864), (864, 640), (1333, 1333))), memory=80)
    assert "canvases the step and its memory are those of the largest, 1333x1333; of 640x864, 864x640 they are less" in text


def test_advice_is_for_what_takes_most(planned):
    activations = dataclasses.replace(large(planned["pmap"]), temporaries=int(100e9))
    state = {"parameters": int(30e9), "optimizer": int(60e9), "average": 0, "frozen": 0}
    heavy = dataclasses.replace(large(planned["pmap"]), state=state, shared_state=int(90e9) // 8)
    first, of_state = (plan.report(p, memory=80).partition("does not fit")[2].splitlines() for p in (activations, heavy))
    assert "remat=full" in first[1] and "accum_steps=2" in first[2] and "bfloat16" in first[3]
    assert "mesh.fsdp=-1" in of_state[1] and "11.2 GB a device instead of 90.0" in of_state[1]


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("--config.bathc=3", "did you mean batch"),
        ("--config.batch=3", "cannot be shared out equally"),
        ("--config.model.transformer.num_heads=3", "heads"),
        ("--memory=-1", "memory"),
        ("--platform=gpu", "unknown platform 'gpu': use cpu, tpu, or cuda"),
        ("--accelerator=H10", "unknown accelerator 'H10': did you mean"),
        ("configs/vit.py", "unexpected arguments"),
    ],
)
def test_what_training_refuses_is_refused(argument, message, monkeypatch):
    monkeypatch.setattr(plan, "use_devices", lambda n: None)  # this process has its devices already
    with command_line.arguments("--config=configs/pretrain.py:micro4,digits", "--config.accum_steps=2", argument):
        with pytest.raises(UserError, match=message):
            overrides.parse(sys.argv)
            plan.main()


def test_classes_of_a_dataset_that_is_not_here():
    c = tiny.config(dataset="imagenet2012", pp_train="train[:99%]")
    e = abstract.build(Settings.from_config(c), num_classes=321)
    assert np.shape(jax.eval_shape(e.init_params)["head"]["bias"]) == (321,)
