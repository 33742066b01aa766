"""Each tower starts from a source of its own, and learns at a rate of its own or not at all."""

import itertools

import jax
import numpy as np
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict

from tests import tiny
from tests.checkpoint.peers import randomise, torch_peer
from tests.tasks.test_contract import contrast
from vit_jax import checkpoint, predictor, train
from vit_jax.errors import UserError
from vit_jax.models.bert import BertModel
from vit_jax.run import experiment as experiments
from vit_jax.run import start
from vit_jax.run.signals import GracefulExit
from vit_jax.settings import Settings
from vit_jax.tools import plan
from vit_jax.train import train_and_evaluate


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """`both`, the workdir of a model of two towers, and `classifier`, that of the same ViT alone, on other images."""
    folder = tmp_path_factory.mktemp("towers")
    train_and_evaluate(config(folder, seed=3), folder / "both")
    c = tiny.config(total_steps=1, eval_every=1, pp_crop=12, seed=4)
    c.model = config(folder).model.image.to_dict()
    train_and_evaluate(c, folder / "classifier")
    return folder


def config(folder, **overrides):
    c = contrast(folder)
    c.update({"total_steps": 1, "eval_every": 1, "warmup_steps": 0, "base_lr": 0.1, "optim_dtype": "float32", "accum_steps": 1})
    c.update(overrides)
    return c


def begun(c):
    """(experiment, parameters at step 0), flat."""
    settings = Settings.from_config(c)
    experiment = experiments.build(settings, origin=start.find_origin(settings))
    paths = start.pretrained_paths(settings)
    params = start._pretrained_params(experiment, paths, keep_head=False)
    return experiment, flatten_dict(jax.device_get(params), sep="/")


def equal(params, expected, prefix=""):
    """The names under which two flat trees agree in every bit."""
    return {name for name, x in params.items() if np.array_equal(x, expected.get(prefix + name))}


def test_a_tower_of_two_or_a_vit_starts_one_tower_and_the_other_is_new(folder):
    both = dict(np.load(folder / "both" / "model.npz"))
    _, txt = begun(config(folder, pretrained={"txt": str(folder / "both"), "img": ""}))
    names = {name for name in both if name.startswith("txt/")}
    assert equal(txt, both) >= names
    assert "img/embedding/kernel" not in equal(txt, both)
    _, img = begun(config(folder, pretrained={"img": str(folder / "both")}))
    assert equal(img, both) >= {name for name in both if name.startswith("img/")}
    assert "txt/Embed_0/embedding" not in equal(img, both)

    classifier = checkpoint.open_checkpoint(folder / "classifier" / "model.npz").flat
    _, mixed = begun(config(folder, pretrained={"img": str(folder / "classifier"), "txt": str(folder / "both")}))
    inside = {f"img/{name}" for name in classifier if not name.startswith(("head/", "Transformer/posembed"))}
    assert {name for name in mixed if np.array_equal(mixed[name], classifier.get(name.removeprefix("img/")))} >= inside
    assert equal(mixed, both) >= names and mixed["img/head/kernel"].any()
    assert mixed["img/Transformer/posembed_input/pos_embedding"].shape == (1, 5, 16)  # 3x3 patches became 2x2


def test_a_classifier_starts_from_the_image_tower_of_two(folder):
    both = dict(np.load(folder / "both" / "model.npz"))
    c = tiny.config(total_steps=1, eval_every=1, pp_crop=8, pretrained=str(folder / "both"))
    c.model = config(folder).model.image.to_dict()
    experiment, params = begun(c)
    assert experiment.origin.model_type == "ViT" and experiment.task.model.type == "ViT"
    inside = {name for name in params if not name.startswith("head/")}
    assert {name.removeprefix("img/") for name in both if name.startswith("img/") and "/head/" not in name} == inside
    assert equal(params, both, "img/") >= inside
    assert not params["head/kernel"].any() and "head/bias" in params


def test_a_string_is_the_whole_model_or_the_image_tower(folder):
    both = dict(np.load(folder / "both" / "model.npz"))
    _, whole = begun(config(folder, pretrained=str(folder / "both")))
    assert equal(whole, both) == set(both)
    c = config(folder, pretrained=str(folder / "classifier"))
    _, alone = begun(c)
    _, tower = begun(config(folder, pretrained={"img": c.pretrained}))
    assert equal(alone, tower) == set(alone)


def test_a_head_of_another_width_starts_anew(folder):
    c = config(folder, pretrained={"img": str(folder / "both"), "txt": str(folder / "both")})
    c.model.out_dim = 6
    both, (_, params) = dict(np.load(folder / "both" / "model.npz")), begun(c)
    assert params["img/head/kernel"].shape == (16, 6)
    assert set(both) - equal(params, both) == {f"{t}/head/{n}" for t in ("img", "txt") for n in ("kernel", "bias")} | {"t"}
    c.pretrained = str(folder / "both")
    with pytest.raises(UserError, match=r"does not fit the model(.|\n)*head/kernel \(16, 6\)"):
        begun(c)


@pytest.mark.parametrize(
    "pretrained, message",
    [
        ({"img": "nowhere"}, "config.pretrained.img: .*nowhere"),
        ({"txt": "nowhere"}, "config.pretrained.txt: .*nowhere"),
        ({"txt": "classifier"}, "is a ViT, without a text tower"),
        ({"vit": "classifier"}, "config.pretrained.vit: the task contrast has img and txt"),
        ({"img": 7}, "config.pretrained.img=7 must be the name of a file or folder, such as ./7"),
        (7, "config.pretrained=7 must be the name"),
    ],
)
def test_errors_name_the_tower(folder, monkeypatch, pretrained, message):
    monkeypatch.chdir(folder)
    with pytest.raises(UserError, match=message):
        begun(config(folder, pretrained=pretrained))


def test_a_text_tower_that_computes_otherwise_and_a_task_without_towers_are_refused(folder):
    c = config(folder, pretrained={"txt": str(folder / "both")})
    c.model.text.pool = "end"
    with pytest.raises(UserError, match="trained with pool='last' in its text tower, not 'end': --config.model.text.pool=last"):
        begun(c)
    with pytest.raises(UserError, match="config.pretrained.img: the task classify is one model"):
        begun(tiny.config(pretrained={"img": str(folder / "classifier")}))
    with pytest.raises(UserError, match="config.lora changes a whole model"):
        begun(config(folder, pretrained={"img": str(folder / "both")}, lora={"rank": 2}))


def one_step(c):
    """(parameters before, after) of a step."""
    experiment, before = begun(c)
    state = start.new_state(
        experiment, start._pretrained_params(experiment, start.pretrained_paths(experiment.settings), False)
    )
    batch = next(itertools.islice(train._train_batches(experiment, 0, GracefulExit()), 1))
    state, _ = experiments.make_update(experiment)(state, batch)
    params = experiment.parallelism.read(experiments.model_params(experiment, state)[""])
    return before, flatten_dict(params, sep="/")


def test_a_rate_for_a_tower_scales_its_steps_alone(folder):
    given = {"pretrained": {"img": str(folder / "both"), "txt": str(folder / "both")}, "optimizer": "sgd"}
    before, plain = one_step(config(folder, **given))
    _, slow = one_step(config(folder, **given, lr_factors=(("img/.*", 0.1),)))
    for name, x in before.items():
        factor = 0.1 if name.startswith("img/") else 1
        np.testing.assert_allclose(slow[name] - x, factor * (plain[name] - x), atol=2e-7, err_msg=name)
    assert not np.array_equal(slow["img/embedding/kernel"], before["img/embedding/kernel"])


def test_a_locked_tower_stays_and_costs_neither_state_nor_gradient(folder):
    c = config(folder, pretrained={"img": str(folder / "classifier")}, optimizer="adamw", freeze=("img/.*",))
    before, after = one_step(c)
    locked = {name for name in before if name.startswith("img/")}
    assert locked and equal(after, before) & locked == locked and not np.array_equal(after["t"], before["t"])
    experiment, _ = begun(c)
    state = start.abstract_state(experiment)
    assert not any("img" in jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(state.opt_state))

    def flops(**overrides):
        experiment = plan.build(Settings.from_config(config(folder, parallel="mesh", **overrides)), num_classes=0)
        state, batch = plan.abstract_arguments(experiment)
        return experiments.make_update(experiment).lower(state, batch).cost_analysis()["flops"]

    images = jax.ShapeDtypeStruct((16, 8, 8, 3), np.float32)
    forward = jax.jit(experiment.task.model.module.apply).lower({"params": experiment.init_params()}, images=images)
    assert flops() - flops(freeze=("img/.*",)) > 1.5 * forward.cost_analysis()["flops"]  # the gradient costs two forwards


def test_a_text_tower_starts_from_a_bert_of_transformers(folder, tmp_path):
    """Its class token is the tower's; what was trained on top of it is left out."""
    torch_peer("transformers")
    import torch
    import transformers

    sizes = {"hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 3, "vocab_size": 30}
    peer = randomise(transformers.BertForMaskedLM(transformers.BertConfig(**sizes, max_position_embeddings=9)))
    peer.save_pretrained(tmp_path)
    c = config(folder, pretrained={"txt": str(tmp_path), "img": ""})
    bert = {"hidden_size": 24, "mlp_dim": 40, "num_layers": 2, "num_heads": 3}
    c.model.text_model = "bert"
    c.model.text = {"config": bert, "vocab_size": 30, "max_len": 9, "activation": "gelu"}
    experiment, params = begun(c)
    tower = {name.removeprefix("txt/"): x for name, x in params.items() if name.startswith("txt/BertEncoder_0")}
    tokens = np.array([[2, 7, 9, 4, 0, 0, 0], [2, 5, 0, 0, 0, 0, 0]])
    model = BertModel(num_classes=None, **c.model.text.to_dict())
    with jax.default_matmul_precision("highest"):
        z = jax.jit(model.apply)({"params": unflatten_dict(tower, sep="/")}, tokens)
    with torch.inference_mode():
        x = torch.from_numpy(tokens)
        expected = peer.bert(x, attention_mask=(x != 0).long()).last_hidden_state[:, 0].numpy()
    np.testing.assert_allclose(z, expected, atol=1e-5, rtol=0)
    for field, value, message in (("activation", "gelu_tanh", "trained with activation='gelu'"), ("num_heads", 2, "3 heads")):
        target = c.model.text.config if field == "num_heads" else c.model.text
        before, target[field] = target[field], value
        with pytest.raises(UserError, match=message):
            begun(c)
        target[field] = before
    with pytest.raises(UserError, match="is a text tower alone: training starts from it by config.pretrained.txt"):
        predictor.load(tmp_path)
