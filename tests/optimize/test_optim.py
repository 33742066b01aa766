"""Schedules have the published figures; optimisers do what their formulas say, and spare what is no matrix."""

import functools
import importlib.util
import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict

from tests.models import small
from vit_jax import models
from vit_jax.errors import UserError
from vit_jax.optimize import optim

PUBLISHED = {"base_lr": 0.03, "total_steps": 10_000, "warmup_steps": 500}


@pytest.mark.parametrize(
    ("decay_type", "step", "rate"),
    [
        ("cosine", 0, 0),
        ("cosine", 1, 6e-5),
        ("cosine", 250, 0.015),
        ("cosine", 500, 0.03),
        ("cosine", 5_250, 0.015),
        ("cosine", 10_000, 0),
        ("linear", 250, 0.015),
        ("linear", 500, 0.03),
        ("linear", 5_250, 0.015005),
        ("linear", 10_000, 1e-5),
        ("linear", 12_000, 1e-5),
    ],
)
def test_schedule_has_the_published_figures(decay_type, step, rate):
    schedule = optim.make_schedule(**PUBLISHED, decay_type=decay_type)
    np.testing.assert_allclose(schedule(step), rate, rtol=1e-5, atol=1e-9)
    np.testing.assert_allclose(jax.jit(schedule)(jnp.int32(step)), rate, rtol=1e-5, atol=1e-9)


def test_weight_decay_may_follow_a_schedule():
    params = {"kernel": jnp.full((2, 2), 3.0), "bias": jnp.full(2, 3.0)}
    optimizer = optax.chain(*optim.OPTIMIZERS["adamw"](lambda step: 0.1 * step, jnp.float32))
    state, still = optimizer.init(params), jax.tree.map(jnp.zeros_like, params)
    for step in range(3):
        updates, state = optimizer.update(still, state, params)
        chex.assert_trees_all_close(updates, {"kernel": jnp.full((2, 2), 0.3 * step), "bias": jnp.zeros(2)}, rtol=1e-6)


def test_steps_divide_the_rate_by_ten():
    schedule = optim.make_schedule(1.0, 100, decay_type="step", decay_steps=(60, 90))
    np.testing.assert_allclose([schedule(s) for s in (0, 59, 60, 89, 90, 100)], [1, 1, 0.1, 0.1, 0.01, 0.01], rtol=1e-6)
    for wrong in ({"decay_type": "step"}, {"decay_steps": (60,)}):
        with pytest.raises(UserError, match="step needs them"):
            optim.make_schedule(1.0, 100, **wrong)


def test_without_warmup_the_first_step_has_the_full_rate():
    schedule = optim.make_schedule(0.03, 100)
    np.testing.assert_allclose([schedule(0), schedule(50), schedule(100)], [0.03, 0.015, 0], atol=1e-9)


def test_a_warmup_as_long_as_the_run_only_warms_up():
    schedule = optim.make_schedule(0.03, 100, warmup_steps=100)
    np.testing.assert_allclose([schedule(1), schedule(50), schedule(99)], [0.0003, 0.015, 0.0297], rtol=1e-6)


def rsqrt(step, warmup, timescale):
    return 1 / np.sqrt(1 + max(0, step - warmup) / timescale)


@pytest.mark.parametrize("step", [0, 1, 20, 21, 50, 79, 80, 81, 99, 100, 130])
@pytest.mark.parametrize("decay_type", ["rsqrt", "constant"])
def test_an_endless_schedule_warms_up_decays_and_cools_down(decay_type, step):
    schedule = optim.make_schedule(0.03, 100, warmup_steps=20, decay_type=decay_type, cooldown_steps=20, timescale=10)
    decay = rsqrt(step, 20, 10) if decay_type == "rsqrt" else 1
    expected = 0.03 * decay * min(1, step / 20) * min(1, max(0, 100 - step) / 20)
    np.testing.assert_allclose(schedule(step), expected, rtol=1e-6)
    np.testing.assert_allclose(jax.jit(schedule)(jnp.int32(step)), expected, rtol=1e-6)


def test_before_its_cooldown_an_endless_schedule_does_not_depend_on_the_length_of_the_run():
    short, long = (optim.make_schedule(0.1, n, decay_type="rsqrt", warmup_steps=3, cooldown_steps=10) for n in (50, 500))
    assert [float(short(i)) for i in range(41)] == [float(long(i)) for i in range(41)]
    assert short(41) < long(41)


def test_a_schedule_may_do_without_warmup_and_cooldown():
    np.testing.assert_allclose(optim.make_schedule(0.1, 10, decay_type="constant")(7), 0.1, rtol=1e-6)
    np.testing.assert_allclose(optim.make_schedule(0.1, 10, decay_type="rsqrt", timescale=4)(12), 0.05, rtol=1e-6)


# Optimisers, against NumPy

PARAMS = {"kernel": np.float32([[1, -2], [3, 4]]), "bias": np.float32([0.5, -0.5])}
GRADS = [  # of norms 6 and 0.3
    {"kernel": np.float32([[1, 2], [4, 3]]), "bias": np.float32([-2, np.sqrt(2)])},
    {"kernel": np.float32([[0.1, 0], [0, 0.2]]), "bias": np.float32([0.2, 0])},
]


def jitted(function):
    """Compiled without optimisation, which would take longer than it saves."""
    return jax.jit(function, compiler_options={"xla_backend_optimization_level": 0})


def run(optimizer, params=PARAMS, grads=GRADS):
    """(parameters, optimiser state) after one update by each of `grads`."""

    @jitted
    def step(params, state, grads):
        updates, state = optimizer.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    state = jitted(optimizer.init)(params)
    for g in grads:
        params, state = step(params, state, g)
    return jax.device_get(params), state


def sgd_by_hand(rates, clip):
    params, momentum = dict(PARAMS), dict.fromkeys(PARAMS, 0)
    for rate, grads in zip(rates, GRADS, strict=True):
        norm = np.sqrt(sum((g**2).sum() for g in grads.values()))
        for name, g in grads.items():
            momentum[name] = 0.9 * momentum[name] + g * min(1, clip / norm)
            params[name] = params[name] - rate * momentum[name]
    return params


@pytest.mark.parametrize("clip", [1.0, 10.0])
def test_sgd_clips_by_the_global_norm_and_has_momentum(clip):
    params, _ = run(optim.make_optimizer("sgd", 0.1, grad_norm_clip=clip))
    chex.assert_trees_all_close(params, sgd_by_hand([0.1, 0.1], clip), rtol=1e-6)


def test_the_first_update_has_the_schedules_rate_of_step_0():
    params, _ = run(optim.make_optimizer("sgd", lambda step: 0.1 * (step + 1), grad_norm_clip=1.0))
    chex.assert_trees_all_close(params, sgd_by_hand([0.1, 0.2], clip=1.0), rtol=1e-6)


@pytest.mark.parametrize("clip", [0, None])
def test_grad_norm_clip_0_or_none_clips_nothing(clip):
    params, _ = run(optim.make_optimizer("sgd", 0.1, grad_norm_clip=clip))
    chex.assert_trees_all_close(params, sgd_by_hand([0.1, 0.1], clip=np.inf), rtol=1e-6)


def test_bfloat16_momentum_is_rounded_and_nothing_else():
    params, state = run(optim.make_optimizer("sgd", 0.1, dtype="bfloat16"))
    exact = sgd_by_hand([0.1, 0.1], clip=np.inf)
    first, _ = run(optim.make_optimizer("sgd", 0.1, dtype="bfloat16"), grads=GRADS[:1])
    chex.assert_trees_all_close(first, run(optim.make_optimizer("sgd", 0.1), grads=GRADS[:1])[0], rtol=1e-7)
    chex.assert_trees_all_close(params, exact, atol=0.1 * 4 * 2**-7)  # rate x largest momentum x two roundings
    assert np.abs(params["bias"] - exact["bias"]).max() > 1e-5


@pytest.mark.parametrize(
    ("name", "fields"),
    [
        ("testing", {}),
        ("R+ViT-Ti_16", {"resnet": {"num_layers": (1,)}, "transformer": {"num_layers": 1}}),
        ("Mixer-B_32", {"num_blocks": 1}),
    ],
)
def test_weight_decay_shrinks_the_kernels_of_a_real_model_and_spares_all_else(name, fields):
    model = models.get_model(name, num_classes=3, **fields)
    shapes = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 64, 64, 3)))["params"]
    params = jax.tree.map(lambda x: np.ones(x.shape[-1:], np.float32), shapes)  # a row of each stands for the whole
    zeros = jax.tree.map(np.zeros_like, params)
    decayed, _ = run(optim.make_optimizer("adamw", 0.5, weight_decay=0.5), params, [zeros])
    for path, x in flatten_dict(decayed).items():
        np.testing.assert_array_equal(x, 0.75 if path[-1] == "kernel" else 1, err_msg="/".join(path))
    spared = {path[-1] for path in flatten_dict(params)} - {"kernel"}
    assert spared == {"scale", "bias"} | (set() if "Mixer" in name else {"cls", "pos_embedding"})


# Optimisers on the parameters of a block, against torch and timm

SHAPES = {
    "embedding/kernel": (2, 2, 3, 36),
    "embedding/bias": (36,),
    "cls": (1, 1, 36),
    "Transformer/encoderblock_0/LayerNorm_0/scale": (36,),
    "Transformer/encoderblock_0/MultiHeadDotProductAttention_1/query/kernel": (36, 2, 34),
    "Transformer/encoderblock_0/MultiHeadDotProductAttention_1/out/kernel": (2, 34, 36),
    "Transformer/encoderblock_0/MlpBlock_3/Dense_0/kernel": (36, 40),
    "Transformer/encoderblock_0/MlpBlock_3/Dense_0/bias": (40,),
    "head/kernel": (36, 5),
}
OF_BLOCKS = [name for name in SHAPES if "encoderblock" in name and name.endswith("kernel")]
RATE, DECAY = 0.01, 0.1
CLIPPED = (("clipping_threshold", 0.5), ("momentum", 0.0))


def draw(seed, scale=1.0):
    rng = np.random.default_rng(seed)
    return unflatten_dict({k: (scale * rng.normal(size=s)).astype(np.float32) for k, s in SHAPES.items()}, sep="/")


@functools.cache
def trained(name, *, steps=3, options=(), **more):
    """(parameters by name, optimiser state) after some steps on gradients of very different sizes."""
    optimizer = optim.make_optimizer(name, RATE, options=dict(options), **more)
    params, state = run(optimizer, draw(0), [draw(i + 1, 10.0 ** (1 - i)) for i in range(steps)])
    return flatten_dict(params, sep="/"), state


def everything(name):
    """All that an optimiser can be asked for, for one step."""
    return {"steps": 1, "dtype": "bfloat16", "grad_norm_clip": 1.0, "weight_decay": 0 if name == "sgd" else DECAY}


def trained_by_torch(make, steps=3):
    """The same by an optimiser of torch, with weight decay on the kernels."""
    torch = pytest.importorskip("torch")
    params = {name: torch.nn.Parameter(torch.tensor(x)) for name, x in flatten_dict(draw(0), sep="/").items()}
    kernels = [p for name, p in params.items() if name.endswith("kernel")]
    rest = [p for name, p in params.items() if not name.endswith("kernel")]
    optimizer = make([{"params": kernels, "weight_decay": DECAY}, {"params": rest, "weight_decay": 0.0}])
    for i in range(steps):
        for name, g in flatten_dict(draw(i + 1, 10.0 ** (1 - i)), sep="/").items():
            params[name].grad = torch.tensor(g)
        optimizer.step()
    return {name: p.detach().numpy() for name, p in params.items()}


def torch_optimizer(name):
    import torch

    return {
        "sgd": lambda groups: torch.optim.SGD([g | {"weight_decay": 0.0} for g in groups], RATE, momentum=0.9),
        "adamw": lambda groups: torch.optim.AdamW(groups, RATE),
    }[name]


def timm_optimizer(name):
    from tests.models.torch_peer import without_torchvision

    with without_torchvision():
        from timm import optim as theirs
    return {
        "lamb": lambda groups: theirs.Lamb(groups, RATE, max_grad_norm=None),
        "lion": lambda groups: theirs.Lion(groups, RATE),
        "adafactor": lambda groups: theirs.AdafactorBigVision(
            groups, RATE, min_dim_size_to_factor=32, momentum_dtype="float32"
        ),
    }[name]


@pytest.mark.parametrize(
    ("library", "name"), [("torch", "sgd"), ("torch", "adamw"), ("timm", "lamb"), ("timm", "lion"), ("timm", "adafactor")]
)
def test_an_optimizer_equals_that_of(library, name):
    if importlib.util.find_spec(library) is None:
        pytest.skip(f"{library} is not installed")
    expected = trained_by_torch({"torch": torch_optimizer, "timm": timm_optimizer}[library](name))
    ours, _ = trained(name, weight_decay=0 if name == "sgd" else DECAY)
    for key, x in ours.items():
        np.testing.assert_allclose(x, expected[key], atol=2e-6, rtol=0, err_msg=key)


def newton_schulz(g):
    """The author's quintic iteration, in float64."""
    x = g / np.linalg.norm(g)
    for _ in range(5):
        x = 3.4445 * x + (-4.7750 * (x @ x.T) + 2.0315 * (x @ x.T) @ (x @ x.T)) @ x
    return x


def test_muon_orthogonalises_the_matrices_of_blocks_and_leaves_the_rest_to_adamw():
    ours, _ = trained("muon", steps=2, weight_decay=DECAY)
    adamw, _ = trained("adamw", steps=2, weight_decay=DECAY)
    params, grads = (flatten_dict(draw(0), sep="/"), [flatten_dict(draw(i + 1, 10.0 ** (1 - i)), sep="/") for i in range(2)])
    for key, shape in SHAPES.items():
        if key not in OF_BLOCKS:
            # two programs, which may fuse and so round differently
            np.testing.assert_allclose(ours[key], adamw[key], rtol=2e-7, atol=1e-7, err_msg=key)
            continue
        inputs, outputs = (68, 36) if "out" in key else (36, 68) if "query" in key else (36, 40)
        w, m = params[key].astype(np.float64).reshape(inputs, outputs), 0
        for t, g in enumerate((g[key].astype(np.float64).reshape(inputs, outputs) for g in grads), start=1):
            m = 0.95 * m + 0.05 * g
            nesterov = 0.95 * m / (1 - 0.95 ** (t + 1)) + 0.05 * g / (1 - 0.95**t)
            w = w - RATE * (0.2 * np.sqrt(max(inputs, outputs)) * newton_schulz(nesterov) + DECAY * w)
        np.testing.assert_allclose(ours[key], w.reshape(shape), atol=1e-6, rtol=0, err_msg=key)


@pytest.mark.parametrize(
    "model", [small.hybrid(transformer={"num_layers": 1}), small.mixer(num_blocks=1)], ids=["ViT", "Mixer"]
)
def test_muon_finds_the_blocks_of_a_real_model(model):
    """The root mean square of an orthogonal update is about 0.2, that of Adam's first is 1."""
    shapes = small.shapes(model, jnp.zeros((1, 64, 64, 3)))
    rng = np.random.default_rng(0)
    grads = jax.tree.map(lambda x: rng.normal(size=x.shape).astype(np.float32), shapes)
    optimizer = optim.make_optimizer("muon", 1.0)
    updates = jax.device_get(jitted(lambda g: optimizer.update(g, optimizer.init(g), g)[0])(grads))
    for name, u in small.flat(updates).items():
        of_block = "block_" in name.lower() and name.endswith("kernel")
        rms = np.sqrt(np.mean(u**2))
        assert 0.15 < rms < 0.25 if of_block else abs(rms - 1) < 1e-3, (name, rms)


def test_muon_finds_the_blocks_of_towers_under_prefixes_and_names_what_no_rule_knows(caplog):
    images = jnp.zeros((1, 16, 16, 3))
    params = {"img": small.shapes(small.vit(), images), "neck": {"kernel": jax.ShapeDtypeStruct((3, 4), jnp.float32)}}
    params["model"] = {"txt": small.shapes(small.mixer(num_blocks=1), images)}
    state = jax.eval_shape(optim.make_optimizer("muon", 1.0).init, params)
    assert "no architecture's rules know neck: Adam trains them, not Muon" in caplog.text
    moments = {name.partition("muon/")[2] for name in small.flat(state) if "muon/" in name}
    found = {name for name in small.flat(params) if any(moment.endswith(f"mu/{name}") for moment in moments)}
    of_blocks = re.compile(r"(img/Transformer/encoderblock|model/txt/MixerBlock)_\d/.*/kernel")
    assert found == {name for name in small.flat(params) if of_blocks.fullmatch(name)} and len(found) == 2 * 6 + 4


def test_layer_decay_knows_every_tower_by_its_prefix():
    params = {"img": small.shapes(small.vit(), jnp.zeros((1, 16, 16, 3))), "t": jax.ShapeDtypeStruct((1,), jnp.float32)}
    params["mix"] = {"er": small.shapes(small.mixer(num_blocks=1), jnp.zeros((1, 16, 16, 3)))}
    factors = small.flat(optim.group_factors(params, layer_decay=0.5, num_layers={"img": 2, "mix/er": 1}))
    assert (
        factors["img/cls"]
        == factors["img/embedding/kernel"]
        == factors["img/Transformer/posembed_input/pos_embedding"]
        == 1 / 8
    )
    assert {x for name, x in factors.items() if "img/Transformer/encoderblock_1/" in name} == {1 / 2}
    assert factors["mix/er/stem/kernel"] == 1 / 4 and factors["mix/er/MixerBlock_0/LayerNorm_0/bias"] == 1 / 2
    assert factors["img/head/kernel"] == factors["mix/er/head/kernel"] == factors["t"] == 1
    assert optim.group_factors(params, layer_decay=0.5, num_layers={"img": 2})["mix"]["er"]["stem"]["bias"] == 1
    one = small.flat(optim.group_factors({"model": params["img"]}, layer_decay=0.5, num_layers=2))
    assert one["model/cls"] == 1 / 8, "one tower needs no name"
    table = optim.factor_table(params, layer_decay=0.5, num_layers={"img": 2, "mix/er": 1}).splitlines()
    assert [line.split("  ")[-1] for line in table[1:3]] == [
        "img/Transformer/posembed_input, img/cls, img/embedding",
        "img/Transformer/encoderblock_0, mix/er/stem",
    ]


def test_lamb_lets_a_head_of_zeros_leave_zero():
    params, grads = ({"head": {"kernel": f((3, 4), np.float32)}} for f in (np.zeros, np.ones))
    (after, _) = run(optim.make_optimizer("lamb", 0.1), params, [grads])
    np.testing.assert_allclose(np.linalg.norm(after["head"]["kernel"]), 0.1, rtol=1e-5)


def test_adafactor_factors_what_is_large_enough_and_clips_the_root_mean_square():
    _, state = trained("adafactor", **everything("adafactor"))
    factored = optax.tree.get(state, "v_row")["Transformer"]["encoderblock_0"]
    assert factored["MultiHeadDotProductAttention_1"]["out"]["kernel"].shape == (2, 34)
    assert factored["MlpBlock_3"]["Dense_0"]["kernel"].shape == (36,)
    chex.assert_shape(optax.tree.get(state, "v")["head"]["kernel"], (36, 5))
    before, (after, _) = flatten_dict(draw(0), sep="/"), trained("adafactor", steps=1, options=CLIPPED)
    rms = [np.sqrt(np.mean((after[k] - before[k]) ** 2)) for k in SHAPES]
    np.testing.assert_allclose(rms, 0.5 * RATE, rtol=1e-3)


@pytest.mark.parametrize("name", optim.OPTIMIZERS)
def test_the_first_moment_is_held_in_the_type_asked_for(name):
    params, state = trained(name, **everything(name))
    held = [x.shape for x in jax.tree.leaves(state) if x.dtype == jnp.bfloat16]
    assert sorted(held) == sorted(SHAPES.values())
    chex.assert_type(list(params.values()), jnp.float32)


def test_states_can_be_sharded_and_saved(tmp_path):
    """Their leaves are arrays: counters, or of the parameters' shapes, but for factors and Muon's three coefficients."""
    states = {name: trained(name, **everything(name))[1] for name in optim.OPTIMIZERS}
    for name, state in states.items():
        leaves = jax.tree.leaves(state)
        assert all(isinstance(x, jax.Array) for x in leaves)
        odd = {x.shape for x in leaves} - set(SHAPES.values()) - {()}
        assert odd <= ({(3,)} if name == "muon" else set()) or name == "adafactor"
        abstract = jax.eval_shape(optim.make_optimizer(name, RATE, dtype="bfloat16", grad_norm_clip=1.0).init, draw(0))
        chex.assert_trees_all_equal_shapes_and_dtypes(abstract, state)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "states", states)
        checkpointer.wait_until_finished()
        restored = checkpointer.restore(tmp_path / "states", jax.tree.map(ocp.utils.to_shape_dtype_struct, states))
    chex.assert_trees_all_equal(restored, states)


# Factors by group


@pytest.mark.parametrize("name", optim.OPTIMIZERS)
def test_a_factor_scales_the_whole_update_and_the_first_pattern_counts(name):
    factors = ((".*query/kernel", 0.5), (".*/kernel", 0.25), ("cls|.*query.*", 2.0))
    before = flatten_dict(draw(0), sep="/")
    plain, _ = trained(name, **everything(name))
    scaled, _ = trained(name, lr_factors=factors, **everything(name))
    for key in SHAPES:
        factor = 0.5 if "query" in key else 0.25 if key.endswith("kernel") else 2.0 if key == "cls" else 1.0
        update, expected = scaled[key] - before[key], factor * (plain[key] - before[key])
        np.testing.assert_allclose(update, expected, atol=1e-6, rtol=0, err_msg=key)  # of parameters around 1
        assert np.abs(expected).max() > 3e-5
        assert factor != 1 or (scaled[key] == plain[key]).all()


def test_layer_decay_has_the_factors_of_timm():
    if importlib.util.find_spec("timm") is None:
        pytest.skip("timm is not installed")
    from tests.models.torch_peer import without_torchvision

    with without_torchvision():
        from timm.models.vision_transformer import VisionTransformer
        from timm.optim import param_groups_layer_decay
    theirs = VisionTransformer(img_size=32, patch_size=8, embed_dim=32, depth=3, num_heads=4, reg_tokens=1, num_classes=7)
    names = {id(p): name for name, p in theirs.named_parameters()}
    groups = param_groups_layer_decay(theirs, layer_decay=0.75)
    by_name = {names[id(p)]: group["lr_scale"] for group in groups for p in group["params"]}

    model = small.vit(transformer={"num_layers": 3}, num_registers=1)
    ours = small.flat(optim.group_factors(small.shapes(model, jnp.zeros((1, 32, 32, 3))), layer_decay=0.75, num_layers=3))
    same = {"cls": "cls_token", "register_tokens": "reg_token", "Transformer/posembed_input": "pos_embed"}
    same |= {"embedding": "patch_embed.", "head": "head.", "Transformer/encoder_norm": "norm."}
    same |= {f"Transformer/encoderblock_{i}": f"blocks.{i}." for i in range(3)}
    for part, prefix in same.items():
        a = {x for name, x in ours.items() if name.startswith(part)}
        b = {x for name, x in by_name.items() if name.startswith(prefix)}
        assert (a, b) == ({1.0}, {0.75}) if "norm" in part else a == b, part  # timm counts the last norm to the last block
    assert sum(name.startswith(tuple(same)) for name in ours) == len(ours)


def test_layer_decay_knows_hybrids_mixers_and_parts_of_a_model():
    hybrid = small.shapes(small.hybrid(), jnp.zeros((1, 64, 64, 3)))
    factors = small.flat(optim.group_factors(hybrid, layer_decay=0.5, num_layers=2))
    assert factors["block1/unit1/conv1/kernel"] == factors["conv_root/kernel"] == factors["embedding/bias"] == 1 / 8
    mixer = small.shapes(small.mixer(), jnp.zeros((1, 32, 32, 3)))
    factors = small.flat(optim.group_factors(mixer, [("head/.*", 10.0)], layer_decay=0.5, num_layers=2))
    assert factors["stem/kernel"] == 1 / 8 and factors["MixerBlock_1/token_mixing/Dense_0/bias"] == 1 / 2
    assert factors["pre_head_layer_norm/scale"] == 1 and factors["head/kernel"] == 10

    lora = {"encoderblock_0": {"MlpBlock_3": {"Dense_0": {"a": np.ones(4, np.float32), "b": np.ones(2, np.float32)}}}}
    lora = {"lora": {"Transformer": lora}}
    optimizer = optim.make_optimizer("adamw", 0.1, weight_decay=0.1, layer_decay=0.5, num_layers=2)
    after, _ = run(optimizer, lora, [lora])
    chex.assert_trees_all_close(after, jax.tree.map(lambda x: x - np.float32(0.1 / 4), lora), rtol=1e-6)


def test_the_table_of_factors_counts_tensors_and_parameters():
    params = {name: np.zeros(shape) for name, shape in SHAPES.items() if name != "embedding/bias"}
    params["lora/Transformer/encoderblock_0/MlpBlock_3/Dense_1/a"] = np.zeros((40, 2))
    frozen = {"embedding": {"bias": np.zeros(36)}, "lora": {"scale": np.float32(2)}}
    table = optim.factor_table(unflatten_dict(params, sep="/"), [("head/.*", 10)], 0.5, 1, frozen=frozen)
    assert table.splitlines() == [
        "  factor  tensors    parameters  of",
        "       0        1            36  embedding",
        "    0.25        2           468  cls, embedding",
        "     0.5        6         6,492  Transformer/encoderblock_0, lora/Transformer/encoderblock_0",
        "      10        1           180  head",
    ]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: optim.make_optimizer("adam", 0.1), "unknown optimizer 'adam': did you mean adamw"),
        (lambda: optim.make_schedule(0.1, 10, decay_type="cosin"), "unknown decay_type 'cosin': did you mean cosine"),
        (lambda: optim.make_optimizer("sgd", 0.1, weight_decay=0.1), "weight_decay=0.1 needs --config.optimizer=adamw"),
        (
            lambda: optim.make_optimizer("lion", 0.1, options={"b3": 0.1}),
            "unknown option of the optimizer lion 'b3': did you mean b. or b.",
        ),
        (lambda: optim.make_optimizer("adamw", 0.1, options={"dtype": 1}), "unknown option of the optimizer adamw"),
        (lambda: optim.make_schedule(0.1, 10, cooldown_steps=1), "cooldown_steps=1 needs decay_type rsqrt or constant; cosine"),
        (lambda: optim.make_schedule(0.1, 10, decay_type="rsqrt", timescale=0), "timescale=0 positive"),
        (
            lambda: optim.make_schedule(0.1, 10, decay_type="rsqrt", warmup_steps=6, cooldown_steps=5),
            "warmup_steps=6 and cooldown_steps=5 do not fit into total_steps=10",
        ),
        (
            lambda: optim.make_optimizer("sgd", 0.1, lr_factors=[("heed/.*", 2)]).init(draw(0)),
            "'heed/.*' .* near .* head/kernel",
        ),
        (lambda: optim.group_factors(draw(0), [(".*", 2), ("head/.*", 3)]), "'head/.*' matches no trained parameter that no"),
        (lambda: optim.group_factors(draw(0), [("(", 2)]), "is no regular expression"),
        (lambda: optim.group_factors(draw(0), [("head/.*", 0)]), "0 for 'head/.*' must be positive; config.freeze"),
        (lambda: optim.group_factors(draw(0), ["head/.*"]), "'head/..' must be a pair"),
        (lambda: optim.group_factors(draw(0), layer_decay=1.5, num_layers=1), "layer_decay=1.5 must be above 0"),
        (lambda: optim.group_factors({"head": PARAMS}, layer_decay=0.5, num_layers=1), "finds no block"),
        (
            lambda: optim.group_factors({"a": draw(0), "b": draw(0)}, layer_decay=0.5, num_layers=1),
            "needs the number of blocks by tower, not 1, for a/, b/",
        ),
        (lambda: optim.group_factors(draw(0), layer_decay=0.5, num_layers=0), "lies in block 0 of a model of 0 blocks"),
    ],
)
def test_what_does_not_exist_is_refused(make, message):
    with pytest.raises(UserError, match=message):
        make()
