"""Writes tokens one after another: the likeliest, a sample, or the best of several beams.

All functions are pure and compile to one program, `jax.jit` around them, which computes every token once. They take
`step(tokens (b n), index (b), cache) → (logits (b n v), cache)`, where `index` is the number of each row's first token in
`tokens`, and a cache whose arrays have the batch in front and room for prompt and new tokens (`decoder.Transformer.step`).
Prompts may differ in length: they stand at the left of `prompt`, and what follows their `lengths` does not matter.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from vit_jax.errors import UserError

Cache = Any
Step = Callable[[Int[Array, "b n"], Int[Array, " b"], Cache], tuple[Float[Array, "b n v"], Cache]]
EARLY_STOPPING = (False, True, "never")
_NEVER = -1e9


class Generated(NamedTuple):
    """New tokens, without the prompt, and how many they are, the stop token counted; padding follows."""

    tokens: Int[Array, "b new"]
    lengths: Int[Array, " b"]


def generate(
    step: Step,
    cache: Cache,
    prompt: Int[Array, "b n"],
    lengths: Int[Array, " b"],
    *,
    new: int,
    stop: int | None = None,
    pad: int = 0,
    key: jax.Array | None = None,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
) -> Generated:
    """At most `new` tokens for every prompt: the likeliest, or samples if a key is given.

    Args:
      stop: the token that ends a row; None for none.
      temperature, top_k, top_p: see `restrict`; they matter with a key alone.
    """

    def choose(logits: Float[Array, "b v"], t: Int[Array, ""]) -> Int[Array, " b"]:
        if key is None:
            return jnp.argmax(logits, axis=-1)
        restricted = restrict(logits / temperature, top_k, top_p)
        return jax.random.categorical(jax.random.fold_in(key, t), restricted, axis=-1)

    def unfinished(state: tuple) -> Bool[Array, ""]:
        t, _, _, _, done, _ = state
        return (t < new) & ~done.all()

    def write(state: tuple) -> tuple:
        t, logits, tokens, counts, done, cache = state
        token = jnp.where(done, pad, choose(logits, t)).astype(tokens.dtype)
        tokens = tokens.at[:, t].set(token)
        counts += ~done
        done |= token == (-1 if stop is None else stop)
        logits, cache = step(token[:, None], lengths + t, cache)
        return t + 1, logits[:, 0], tokens, counts, done, cache

    b = prompt.shape[0]  # which may be a symbol
    logits, cache = _read(step, cache, prompt, lengths)
    state = 0, logits, jnp.full((b, new), pad, prompt.dtype), jnp.zeros(b, int), jnp.zeros(b, bool), cache
    _, _, tokens, counts, _, _ = jax.lax.while_loop(unfinished, write, state)
    return Generated(tokens, counts)


def restrict(logits: Float[Array, "b v"], top_k: int | None = None, top_p: float | None = None) -> Float[Array, "b v"]:
    """Sets to −∞ all but the `top_k` largest logits, then all but the fewest of a probability of `top_p` together."""
    if top_k is not None:
        if top_k < 1:
            raise UserError(f"top_k={top_k} must be at least 1")
        least = jax.lax.top_k(logits, min(top_k, logits.shape[-1]))[0][:, -1:]
        logits = jnp.where(logits < least, -jnp.inf, logits)
    if top_p is not None:
        if not 0 < top_p <= 1:
            raise UserError(f"top_p={top_p} must be above 0 and at most 1")
        order = jnp.argsort(-logits, axis=-1)
        probabilities = jnp.take_along_axis(jax.nn.softmax(logits, axis=-1), order, axis=-1)
        kept = jnp.cumsum(probabilities, axis=-1) - probabilities < top_p  # what is likelier lacks something
        kept = jnp.take_along_axis(kept, jnp.argsort(order, axis=-1), axis=-1)
        logits = jnp.where(kept, logits, -jnp.inf)
    return logits


class Beams(NamedTuple):
    """The best `beams` rows of tokens for every prompt, best first, their lengths and their scores."""

    tokens: Int[Array, "b beams new"]
    lengths: Int[Array, "b beams"]
    scores: Float[Array, "b beams"]


class _Running(NamedTuple):
    """The state of a beam search; `log_probs` are sums over the tokens, `ended` holds the best finished rows so far."""

    t: Int[Array, ""]
    logits: Float[Array, "b beams v"]
    tokens: Int[Array, "b beams new"]
    log_probs: Float[Array, "b beams"]
    ended: Beams
    is_ended: Bool[Array, "b beams"]
    open: Bool[Array, " b"]  # whether a running beam may still beat an ended one
    cache: Cache


def beam_search(
    step: Step,
    cache: Cache,
    prompt: Int[Array, "b n"],
    lengths: Int[Array, " b"],
    *,
    beams: int,
    new: int,
    stop: int | None = None,
    pad: int = 0,
    length_penalty: float = 1.0,
    early_stopping: bool | str = False,
) -> Beams:
    """The rows of the highest Σ log p / length^length_penalty among `beams` at a time, counted as transformers does.

    The length is that of the new tokens, stop token included. A row of candidates is the 2·beams likeliest: those among
    the first `beams` that end are kept if they beat an ended one, and the likeliest that do not end run on.

    Args:
      cache: as for the prompts alone; it is repeated for the beams.
      early_stopping: True ends with `beams` ended rows; False when the best running row would not beat the worst ended
        one at its present length; "never" when it cannot at any length.
    """
    if early_stopping not in EARLY_STOPPING:
        raise UserError(f"early_stopping={early_stopping!r} must be True, False or 'never'")
    b = prompt.shape[0]
    start = _first_beams(*_read(step, cache, prompt, lengths), beams, new, pad, prompt.dtype)
    vocabulary, starts = start.logits.shape[-1], jnp.repeat(lengths, beams, axis=0).reshape(b, beams)

    def advance(state: _Running) -> _Running:
        # The likeliest continuations of all beams.
        log_probs = jax.nn.log_softmax(state.logits, axis=-1) + state.log_probs[..., None]
        log_probs, chosen = jax.lax.top_k(log_probs.reshape(b, -1), 2 * beams)
        beam, token = chosen // vocabulary, (chosen % vocabulary).astype(prompt.dtype)
        tokens = _pick(state.tokens, beam).at[:, :, state.t].set(token)
        ends = (token == (-1 if stop is None else stop)) | (state.t + 1 == new)

        ended, is_ended = _with_ended(state, tokens, log_probs, ends, length_penalty, full=early_stopping is True)

        # The rest runs on.
        running, on = jax.lax.top_k(log_probs + _NEVER * ends, beams)
        beam, token, tokens = (_pick(x, on) for x in (beam, token, tokens))
        flat = (beam + beams * jnp.arange(b)[:, None]).reshape(-1)
        moved = jax.tree.map(lambda x: x[flat], state.cache)
        logits, cache = step(token.reshape(-1, 1), (starts + state.t).reshape(-1), moved)
        reachable = new if early_stopping == "never" and length_penalty > 0 else state.t + 1
        possible = running[:, 0] / jnp.asarray(reachable, jnp.float32) ** length_penalty
        worst = jnp.where(is_ended, ended.scores.min(axis=1, keepdims=True), _NEVER)
        is_open = state.open & (possible[:, None] > worst).any(axis=1)
        return _Running(state.t + 1, logits.reshape(b, beams, -1), tokens, running, ended, is_ended, is_open, cache)

    def unfinished(state: _Running) -> Bool[Array, ""]:
        full = state.is_ended.all() if early_stopping is True else False
        return (state.t < new) & state.open.any() & ~jnp.asarray(full)

    return jax.lax.while_loop(unfinished, advance, start).ended


def _first_beams(logits: Float[Array, "b v"], cache: Cache, beams: int, new: int, pad: int, dtype: Any) -> _Running:
    """The state behind the prompts: nothing is written, and the first beam alone counts, as all are the same."""
    b = logits.shape[0]
    repeat = lambda x: jnp.repeat(x, beams, axis=0)  # noqa: E731
    empty, never = jnp.full((b, beams, new), pad, dtype), jnp.full((b, beams), _NEVER)
    return _Running(
        t=jnp.int32(0),
        logits=repeat(logits).reshape(b, beams, -1),
        tokens=empty,
        log_probs=never.at[:, 0].set(0.0),
        ended=Beams(empty, jnp.zeros((b, beams), jnp.int32), never),
        is_ended=jnp.zeros((b, beams), bool),
        open=jnp.ones(b, bool),
        cache=jax.tree.map(repeat, cache),
    )


def _with_ended(
    state: _Running,
    tokens: Int[Array, "b m new"],
    log_probs: Float[Array, "b m"],
    ends: Bool[Array, "b m"],
    length_penalty: float,
    *,
    full: bool,
) -> tuple[Beams, Bool[Array, "b beams"]]:
    """The best ended rows after a token more: those of `state`, and of the candidates that end the first `beams`.

    With `full` nothing is added where there are `beams` of them.
    """
    first = jnp.arange(ends.shape[1]) < state.is_ended.shape[1]
    counts = (ends & first) & state.open[:, None]
    if full:
        counts &= ~state.is_ended.all(axis=1, keepdims=True)
    length = state.t + 1
    scores = jnp.where(counts, log_probs / length.astype(jnp.float32) ** length_penalty, _NEVER)
    found = Beams(tokens, jnp.full(ends.shape, length), scores), ends & first
    return _best_of((state.ended, state.is_ended), found)


def _best_of(ended: tuple[Beams, Array], found: tuple[Beams, Array]) -> tuple[Beams, Array]:
    """As many rows as have `ended`, the best of these and of those found, and which of them are ended ones."""
    merged = jax.tree.map(lambda x, y: jnp.concatenate([x, y], axis=1), ended, found)
    best = jax.lax.top_k(merged[0].scores, ended[0].scores.shape[1])[1]
    return jax.tree.map(lambda x: _pick(x, best), merged)


def _read(step: Step, cache: Cache, prompt: Int[Array, "b n"], lengths: Int[Array, " b"]) -> tuple[Float[Array, "b v"], Cache]:
    """The logits after the last token of every prompt, and the cache with the prompts in it."""
    logits, cache = step(prompt, jnp.zeros_like(lengths), cache)
    return jnp.take_along_axis(logits, lengths[:, None, None] - 1, axis=1)[:, 0], cache


def _pick(x: Array, which: Int[Array, "b m"]) -> Array:
    """Rows of the second axis, others for every example."""
    return jnp.take_along_axis(x, which.reshape(*which.shape, *[1] * (x.ndim - 2)), axis=1)
