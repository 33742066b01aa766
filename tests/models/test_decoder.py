"""The encoder-decoder Transformer against torch's and transformers', and what writing tokens must hold to."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch

from tests.models import small, transformer_peer
from vit_jax.models.decoder import Stack, Transformer
from vit_jax.models.generate import beam_search, generate, restrict

HEADS, VOCABULARY, PAD, STOP = 3, 23, 22, 0
MARIAN = Transformer(
    vocabulary=VOCABULARY, width=24, num_heads=HEADS, mlp_dim=40, num_encoder_layers=2, num_decoder_layers=2, positions="halves"
)


SIZES = {"layers": 2, "attention_heads": HEADS, "ffn_dim": 40}


@functools.cache
def marian():
    from transformers import MarianConfig, MarianMTModel

    sizes = {f"{side}_{name}": n for side in ("encoder", "decoder") for name, n in SIZES.items()}
    config = MarianConfig(
        vocab_size=VOCABULARY,
        d_model=24,
        **sizes,
        activation_function="relu",
        scale_embedding=True,
        max_position_embeddings=64,
        pad_token_id=PAD,
        eos_token_id=STOP,
        decoder_start_token_id=PAD,
        forced_eos_token_id=None,
    )
    model = MarianMTModel(config)
    transformer_peer.randomise(model).model.shared.weight.data *= 0.4  # so that other tokens than the last may follow
    return model


def sources():
    rng = np.random.default_rng(1)
    valid = np.arange(11) < np.array([[11], [7], [2]])
    return np.where(valid, rng.integers(1, 22, (3, 11)), PAD), valid


pytestmark = pytest.mark.usefixtures("full_precision")


@functools.partial(jax.jit, static_argnums=0)
def score(model, params, source, target, valid=None):
    return model.apply(params, source, target, valid)


@pytest.mark.usefixtures("optimised")
@pytest.mark.parametrize("norm_first, activation", [(False, "relu"), (True, "gelu")])
def test_it_is_torchs_transformer(norm_first, activation):
    peer = torch.nn.Transformer(
        24, HEADS, 2, 3, 40, 0.0, activation, batch_first=True, norm_first=norm_first, layer_norm_eps=1e-5
    )
    params = transformer_peer.torch_transformer(transformer_peer.randomise(peer), HEADS)
    rng = np.random.default_rng(0)
    source, target = (rng.normal(size=(3, n, 24)).astype(np.float32) for n in (11, 7))
    valid = np.arange(11) < np.array([[11], [6], [3]])
    causal = np.tril(np.ones((7, 7), bool))
    with torch.inference_mode():
        padding = torch.from_numpy(~valid)
        masks = {"src_key_padding_mask": padding, "memory_key_padding_mask": padding, "tgt_mask": torch.from_numpy(~causal)}
        theirs = peer(torch.from_numpy(source), torch.from_numpy(target), **masks).numpy()
    fields = {"width": 24, "num_heads": HEADS, "mlp_dim": 40, "norm_first": norm_first, "activation": activation}
    encoder, decoder = Stack(2, **fields, final_norm=True), Stack(3, **fields, final_norm=True, cross=True)
    mask = valid[:, None, None]

    @jax.jit
    def outputs(params, source, target):
        memory = encoder.apply({"params": params["encoder"]}, source, mask=mask)[-1]
        return decoder.apply({"params": params["decoder"]}, target, memory, mask=causal[None, None], memory_mask=mask)[-1]

    np.testing.assert_allclose(outputs(params, source, target), theirs, atol=1e-5)


@pytest.mark.usefixtures("optimised")
def test_it_is_marian():
    source, valid = sources()
    target = np.random.default_rng(2).integers(1, 22, (3, 9))
    with torch.inference_mode():
        theirs = marian()(
            input_ids=torch.from_numpy(source),
            attention_mask=torch.from_numpy(valid),
            decoder_input_ids=torch.from_numpy(target),
        ).logits.numpy()
    ours = score(MARIAN, {"params": transformer_peer.marian(marian())}, source, target, valid)
    np.testing.assert_allclose(ours, theirs, atol=1e-5)


def test_tokens_do_not_see_what_follows_and_padding_changes_nothing():
    params = {"params": transformer_peer.marian(marian())}
    source, valid = sources()
    target = np.random.default_rng(2).integers(1, 22, (3, 9))
    logits = score(MARIAN, params, source, target, valid)
    changed = np.array(target)
    changed[:, 5] = (changed[:, 5] + 3) % 22
    others = score(MARIAN, params, source, changed, valid)
    np.testing.assert_array_equal(logits[:, :5], others[:, :5])
    assert (np.abs(logits[:, 5:] - others[:, 5:]).max(axis=(0, 2)) > 1e-4).all()
    alone = score(MARIAN, params, source[1:2, : valid[1].sum()], target[1:2])
    np.testing.assert_allclose(logits[1], alone[0], atol=1e-5)


@pytest.mark.parametrize("positions", ["interleaved", "learned"])
def test_the_cache_gives_what_the_whole_sequence_gives(positions):
    model = Transformer(VOCABULARY, 24, HEADS, 40, 2, 2, norm_first=True, final_norm=True, positions=positions, tied=False)
    source, valid = sources()
    target = np.random.default_rng(2).integers(1, 22, (3, 9))
    params = {"params": small.random_values(jax.eval_shape(model.init, jax.random.key(0), source, target)["params"])}
    whole = score(model, params, source, target, valid)
    cache = jax.jit(functools.partial(model.apply, length=9, method="start"))(params, source, valid)
    step = jax.jit(functools.partial(model.apply, method="step"))
    # Rows of which 4, 1 and 3 tokens are read at once, then the rest one at a time.
    lengths = np.array([4, 1, 3])
    logits, cache = step(params, target[:, :4], np.zeros(3, int), cache)
    for i, n in enumerate(lengths):
        np.testing.assert_allclose(logits[i, :n], whole[i, :n], atol=1e-5)
    for t in range(5):
        tokens = np.take_along_axis(target, lengths[:, None] + t, axis=1)
        logits, cache = step(params, tokens, lengths + t, cache)
        np.testing.assert_allclose(logits[:, 0], np.take_along_axis(whole, lengths[:, None, None] + t, axis=1)[:, 0], atol=1e-5)


@functools.partial(jax.jit, static_argnames=("write", "options"))
def written(params, source, valid, prompt, lengths, key=None, *, write, options=()):
    options = dict(options)
    cache = MARIAN.apply(params, source, valid, prompt.shape[1] + options["new"], method="start")
    step = functools.partial(MARIAN.apply, params, method="step")
    return write(step, cache, prompt, lengths, stop=STOP, pad=PAD, **({} if key is None else {"key": key}), **options)


def test_greedy_is_transformers_generate():
    source, valid = sources()
    prompt = np.full((3, 1), PAD)
    tokens = torch.from_numpy(source), torch.from_numpy(valid).long()
    theirs = (
        marian().generate(tokens[0], attention_mask=tokens[1], max_new_tokens=12, num_beams=1, do_sample=False).numpy()[:, 1:]
    )
    params = {"params": transformer_peer.marian(marian())}
    ours = written(params, source, valid, prompt, np.ones(3, int), write=generate, options=(("new", 12),))
    np.testing.assert_array_equal(ours.tokens[:, : theirs.shape[1]], theirs)


@pytest.mark.parametrize(
    "options",
    [
        {"length_penalty": 1.0, "early_stopping": False},
        {"length_penalty": 0.3, "early_stopping": True},
        {"length_penalty": 2.0, "early_stopping": "never"},
    ],
)
def test_beam_search_is_transformers_generate(options):
    rng = np.random.default_rng(3)
    valid = np.arange(9) < rng.integers(1, 10, (12, 1))
    source = np.where(valid, rng.integers(1, 22, (12, 9)), PAD)
    prompt = np.concatenate([np.full((12, 1), PAD), rng.integers(1, 22, (12, 1))], axis=1)
    theirs = marian().generate(
        torch.from_numpy(source),
        attention_mask=torch.from_numpy(valid).long(),
        decoder_input_ids=torch.from_numpy(prompt),
        max_new_tokens=10,
        num_beams=3,
        num_return_sequences=3,
        do_sample=False,
        output_scores=True,
        return_dict_in_generate=True,
        **options,
    )
    params = {"params": transformer_peer.marian(marian())}
    settings = (("new", 10), ("beams", 3), *options.items())
    ours = written(params, source, valid, prompt, np.full(12, 2), write=beam_search, options=settings)
    rows = theirs.sequences.numpy()[:, 2:].reshape(12, 3, -1)
    np.testing.assert_array_equal(ours.tokens[..., : rows.shape[2]], rows)
    np.testing.assert_allclose(ours.scores, theirs.sequences_scores.numpy().reshape(12, 3), rtol=1e-5)
    assert (ours.tokens == STOP).any()


@pytest.mark.parametrize("write, options", [(generate, ()), (beam_search, (("beams", 3),))])
def test_prompts_of_different_lengths_are_written_as_alone(write, options):
    source, valid = sources()
    prompt, lengths = np.random.default_rng(5).integers(1, 22, (3, 4)), np.array([4, 1, 2])
    params = {"params": transformer_peer.marian(marian())}
    options = (("new", 8), *options)
    together = written(params, source, valid, prompt, lengths, write=write, options=options)
    alone = written(params, source[2:], valid[2:], prompt[2:, :2], lengths[2:], write=write, options=options)
    np.testing.assert_array_equal(together.tokens[2:], alone.tokens)


def test_sampling_draws_what_top_k_and_top_p_leave():
    from transformers.generation import TopKLogitsWarper, TopPLogitsWarper

    logits = np.random.default_rng(0).normal(size=(5, 40)).astype(np.float32) * 2
    theirs = TopPLogitsWarper(0.7)(None, TopKLogitsWarper(9)(None, torch.from_numpy(logits))).numpy()
    np.testing.assert_array_equal(restrict(jnp.asarray(logits), 9, 0.7), theirs)

    source, valid = sources()
    prompt = np.full((300, 1), PAD)
    params = {"params": transformer_peer.marian(marian())}
    source, valid = (np.repeat(x[:1], 300, axis=0) for x in (source, valid))
    options = (("new", 1), ("temperature", 2.0), ("top_k", 3))
    key = jax.random.key(0)
    drawn = written(params, source, valid, prompt, np.ones(300, int), key, write=generate, options=options).tokens[:, 0]
    scores = score(MARIAN, params, source[:1], prompt[:1], valid[:1])[0, 0]
    best = np.argsort(-scores)[:3]
    expected = jax.nn.softmax(scores[best] / 2)
    np.testing.assert_allclose([(drawn == token).mean() for token in best], expected, atol=0.1)


def test_it_learns_to_reverse():
    model = Transformer(12, 32, 4, 64, 1, 1, norm_first=True, final_norm=True, dropout_rate=0.0)
    rng = np.random.default_rng(0)
    start, stop, n = 10, 11, 4

    def draw(b):
        source = rng.integers(0, 10, (b, n))
        return source, np.concatenate([np.full((b, 1), start), source[:, ::-1], np.full((b, 1), stop)], axis=1)

    def loss(params, source, target):
        logits = model.apply(params, source, target[:, :-1])
        return optax.softmax_cross_entropy_with_integer_labels(logits, target[:, 1:]).mean()

    optimiser = optax.adam(optax.warmup_cosine_decay_schedule(0.0, 8e-3, 50, 300))

    @jax.jit
    def update(params, state, source, target):
        updates, state = optimiser.update(jax.grad(loss)(params, source, target), state)
        return optax.apply_updates(params, updates), state

    params = jax.jit(model.init)(jax.random.key(0), *draw(1))
    state = optimiser.init(params)
    for _ in range(300):
        params, state = update(params, state, *draw(32))

    @jax.jit
    def reverse(source):
        cache = model.apply(params, source, jnp.ones_like(source, bool), n + 2, method="start")
        step = functools.partial(model.apply, params, method="step")
        prompt = jnp.full((len(source), 1), start)
        return generate(step, cache, prompt, jnp.ones(len(source), int), new=n + 1, stop=stop).tokens

    source, target = draw(200)
    assert (reverse(source) == target[:, 1:]).all(axis=1).mean() > 0.95
