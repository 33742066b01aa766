"""Captioners: the LSTM and its attention against torch's cell, and what both decoders must hold to while they write."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from tests.models.small import random_values
from vit_jax import models
from vit_jax.models import captioner
from vit_jax.models.generate import beam_search, generate

pytestmark = pytest.mark.usefixtures("full_precision")
TRANSFORMER = {"num_layers": 1, "mlp_dim": 24, "num_heads": 2, "dropout_rate": 0.0, "attention_dropout_rate": 0.0}
VIT = {"patches": {"size": (4, 4)}, "hidden_size": 16, "classifier": "token", "num_registers": 2, "transformer": TRANSFORMER}
VOCABULARY, LENGTH = 13, 6
KINDS = {
    "transformer": ("Captioner", {"width": 18, "num_heads": 3, "mlp_dim": 20, "num_layers": 2, "max_length": LENGTH}),
    "tied": ("Captioner", {"width": 12, "num_heads": 2, "mlp_dim": 20, "num_layers": 1, "tied": True, "use_bias": True}),
    "additive": ("AttendingLSTM", {"width": 10, "embedding_dim": 9, "attention_dim": 11, "attention": "additive"}),
    "dot": ("AttendingLSTM", {"width": 10, "embedding_dim": 9, "attention_dim": 11, "attention": "dot"}),
}


@functools.cache
def small(kind):
    """(model, random parameters, images, tokens)."""
    name, fields = KINDS[kind]
    more = {"mask_token": True} if name == "Captioner" else {}
    model = models.build(name, {"body": {"vit": VIT}, "vocabulary": VOCABULARY, **fields, **more})
    rng = np.random.default_rng(0)
    images = jnp.asarray(rng.normal(size=(3, 8, 12, 3)), jnp.float32)
    tokens = jnp.asarray(rng.integers(0, VOCABULARY, (3, LENGTH)))
    params = random_values(jax.eval_shape(model.init, jax.random.key(0), images, tokens)["params"])
    return model, {"params": jax.tree.map(jnp.asarray, params)}, images, tokens


@functools.cache
def decoded(kind):
    """(a jitted `decode` of its memory, and that memory)."""
    model, params, images, _ = small(kind)
    memory = jax.jit(functools.partial(model.apply, method="encode"))(params, images)
    return jax.jit(functools.partial(model.apply, method="decode")), memory


def stepping(kind):
    model, params, _, _ = small(kind)
    _, memory = decoded(kind)
    cache = jax.jit(lambda memory: model.apply(params, memory, LENGTH, method="start"))(memory)
    return lambda tokens, index, cache: model.apply(params, tokens, index, cache, method="step"), cache


@functools.cache
def looked(kind):
    """(b n patches) while it reads its tokens."""
    model, params, _, tokens = small(kind)
    apply = functools.partial(model.apply, method="decode", mutable=["intermediates"])
    return captioner.looks(jax.jit(apply)(params, decoded(kind)[1], tokens)[1]["intermediates"], 6)


def torch_linear(params, name):
    kernel = torch.from_numpy(np.array(params[name]["kernel"]))
    return lambda x: x @ kernel + torch.from_numpy(np.array(params[name].get("bias", np.float32(0))))


@pytest.mark.usefixtures("optimised")
@pytest.mark.parametrize("attention", captioner.ATTENTIONS)
def test_the_lstm_is_torchs_cell_with_attention_written_plainly(attention):
    _, variables, _, tokens = small(attention)
    decode, memory = decoded(attention)
    params = variables["params"]
    linear, of_cell = functools.partial(torch_linear, params), functools.partial(torch_linear, params["cell"])
    cell = torch.nn.LSTMCell(9 + 16, 10)
    inputs, hidden = params["cell"]["of_inputs"], params["cell"]["of_hidden"]
    for name, x in (("weight_ih", inputs["kernel"].T), ("weight_hh", hidden["kernel"].T), ("bias_ih", inputs["bias"])):
        getattr(cell, name).data = torch.from_numpy(np.array(x))
    cell.bias_hh.data.zero_()

    with torch.inference_mode():
        seen_from = torch.from_numpy(np.array(memory))
        h, c = torch.tanh(linear("initial_hidden")(seen_from.mean(1))), torch.tanh(linear("initial_cell")(seen_from.mean(1)))
        expected, looks = [], []
        for t in range(LENGTH):
            word = torch.from_numpy(np.array(params["embedding"]))[torch.from_numpy(np.array(tokens[:, t]))]
            query, keys = of_cell("query")(h), linear("keys")(seen_from)
            if attention == "additive":
                scores = of_cell("score")(torch.tanh(keys + query[:, None]))[..., 0]
            else:
                scores = torch.stack([(keys[:, i] * query).sum(-1) for i in range(keys.shape[1])], -1) / 11**0.5
            weights = scores.exp() / scores.exp().sum(-1, keepdim=True)
            seen = torch.sigmoid(of_cell("gate")(h)) * (weights[..., None] * seen_from).sum(1)
            h, c = cell(torch.cat([word, seen], -1), (h, c))
            looks.append(weights)
            expected.append(linear("output")(word + linear("output_hidden")(h) + linear("output_seen")(seen)))
    np.testing.assert_allclose(decode(variables, memory, tokens), torch.stack(expected, 1), atol=1e-5)
    np.testing.assert_allclose(looked(attention), torch.stack(looks, 1), atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_steps_give_what_the_whole_sentence_gives_and_no_later_word_matters(kind):
    _, variables, _, tokens = small(kind)
    decode, memory = decoded(kind)
    whole = decode(variables, memory, tokens)
    step, cache = stepping(kind)
    step = jax.jit(step)
    for first in (0, 2, 4):
        logits, cache = step(tokens[:, first : first + 2], jnp.full(3, first), cache)
        np.testing.assert_allclose(logits, whole[:, first : first + 2], atol=2e-5)
    changed = decode(variables, memory, tokens.at[:, 4].set((tokens[:, 4] + 1) % VOCABULARY))
    np.testing.assert_array_equal(changed[:, :4], whole[:, :4])
    assert not np.allclose(changed[:, 4], whole[:, 4], atol=1e-3)


@pytest.mark.parametrize("kind", KINDS)
def test_where_it_looks_is_a_share_of_the_patches_for_every_token(kind):
    _, memory = decoded(kind)
    assert memory.shape == (3, 6 + 3 * (KINDS[kind][0] == "Captioner"), 16)  # with class token and registers
    found = looked(kind)
    assert found.shape == (3, LENGTH, 6) and np.ptp(found) > 0.01
    np.testing.assert_allclose(found.sum(axis=-1), 1, atol=1e-5)


def test_parallel_prediction_reads_no_word_and_leaves_other_examples_alone():
    _, variables, _, tokens = small("transformer")
    decode, memory = decoded("transformer")
    parallel = jnp.array([False, True, False])
    mixed, causal = decode(variables, memory, tokens, parallel=parallel), decode(variables, memory, tokens)
    np.testing.assert_allclose(mixed[::2], causal[::2], atol=1e-6)
    others = decode(variables, memory, (tokens + 3) % VOCABULARY, parallel=parallel)
    np.testing.assert_array_equal(others[1], mixed[1])
    # Every place sees every other one: the last position's embedding changes the first logits.
    params = variables["params"]
    moved = params | {"position_embedding": params["position_embedding"].at[-1].multiply(-1)}
    there = decode({"params": moved}, memory, tokens, parallel=parallel)
    assert not np.allclose(there[1, 0], mixed[1, 0], atol=1e-3)
    np.testing.assert_allclose(there[::2, :-1], causal[::2, :-1], atol=1e-6)


@pytest.mark.parametrize("kind", ["dot"])
def test_one_beam_writes_what_greedy_does_and_more_find_at_least_as_likely_a_sentence(kind):
    step, cache = stepping(kind)
    prompt, ones = jnp.full((3, 1), 2), jnp.ones(3, int)
    how = {"new": 6, "stop": 1, "pad": 1}
    greedy = jax.jit(lambda: generate(step, cache, prompt, ones, **how))()
    one, four = (
        jax.jit(lambda n=n: beam_search(step, cache, prompt, ones, beams=n, length_penalty=0.0, **how))() for n in (1, 4)
    )
    np.testing.assert_array_equal(one.tokens[:, 0], greedy.tokens)
    np.testing.assert_array_equal(one.lengths[:, 0], greedy.lengths)
    assert (four.scores[:, 0] >= one.scores[:, 0] - 1e-5).all()


def test_what_is_no_captioner_is_named():
    with pytest.raises(Exception, match="body of a captioner must be a vit"):
        models.build("Captioner", {"body": {"resnet": {}}, "vocabulary": 3})
    with pytest.raises(Exception, match="additive"):
        models.build("AttendingLSTM", {"body": {"vit": VIT}, "vocabulary": 3, "attention": "aditive"})
