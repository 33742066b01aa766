"""Captioners: images to sentences, token by token, by a decoder on any ViT.

`Captioner`: a Transformer that looks at all tokens of the ViT, as in CapPa (https://arxiv.org/abs/2306.07915).
`AttendingLSTM`: an LSTM that looks at the map of the patches before every word: "Show, Attend and Tell"
(https://arxiv.org/abs/1502.03044).

Both have `encode(images) → memory`, `decode(memory, tokens) → logits`, and `start` and `step` as `generate` wants them. The
tokens that they read stand one place behind those that they score. Weights on the memory are sown as `intermediates` under
"looks", (b k n m) with the patches as the last of m, see `looks`.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax.traverse_util import flatten_dict
from jaxtyping import Array, Bool, Float, Int

from vit_jax.models import on_vit, vit
from vit_jax.models.architecture import Architecture
from vit_jax.models.decoder import Stack
from vit_jax.models.layers import ACTIVATIONS
from vit_jax.models.linear import Linear

Memory = Float[Array, "b m c"]
ATTENTIONS = ("additive", "dot")


class _OnViT(nn.Module):
    """What both decoders do with their ViT, which is `backbone`."""

    def __call__(self, images: Float[Array, "b H W 3"], tokens: Int[Array, "b n"], **how: Any) -> Float[Array, "b n v"]:
        return self.decode(self.encode(images, train=how.get("train", False)), tokens, **how)

    def features(self, images: Float[Array, "b H W 3"], *, train: bool = False) -> dict[str, Any]:
        """Those of the ViT."""
        return self.backbone.features(images, train=train)


class Captioner(_OnViT):
    """ViT → pre-LN Transformer decoder with cross-attention → the scores of the next token.

    Attributes:
      body: {"vit": fields of `VisionTransformer`}.
      vocabulary: how many tokens there are.
      max_length: how many places have a position, which is learned.
      mask_token: one more embedding, which is read in place of every token where all are to be predicted at once.
      tied: the embedding also scores the outputs, without a bias; otherwise a map that begins at 0 does.
      use_bias: of the decoder's layers; not of its last norm.
      project_memory: a linear map brings the ViT's tokens to the decoder's width; otherwise they are taken as they are.
      the others: see `decoder.Stack`.
      model_name: for messages only.
    """

    body: Mapping[str, Any]
    vocabulary: int
    width: int = 768
    num_heads: int = 12
    mlp_dim: int = 3072
    num_layers: int = 6
    max_length: int = 64
    mask_token: bool = False
    tied: bool = False
    use_bias: bool = False
    project_memory: bool = False
    dropout_rate: float = 0.0
    activation: str = "gelu_tanh"
    norm_eps: float = 1e-6
    dtype: Any = jnp.float32
    model_name: str | None = None

    def setup(self):
        self.backbone = vit.VisionTransformer(**{**self.body["vit"], "num_classes": None}, dtype=self.dtype)
        same = ("num_layers", "width", "num_heads", "mlp_dim", "activation", "dropout_rate", "norm_eps", "use_bias", "dtype")
        self.text_decoder = Stack(**{name: getattr(self, name) for name in same}, cross=True, norm_first=True)
        self.text_norm = nn.LayerNorm(self.norm_eps, self.dtype)
        rows = self.vocabulary + self.mask_token
        self.embedding = self.param("embedding", nn.initializers.normal(0.02 if self.tied else 1.0), (rows, self.width))
        places = nn.initializers.normal(self.width**-0.5)
        self.position_embedding = self.param("position_embedding", places, (self.max_length, self.width))
        self.dropout = nn.Dropout(self.dropout_rate)
        if not self.tied:
            self.output = Linear((self.vocabulary,), kernel_init=nn.initializers.zeros, dtype=self.dtype)
        if self.project_memory:
            self.memory_projection = Linear((self.width,), dtype=self.dtype)

    def encode(self, images: Float[Array, "b H W 3"], *, train: bool = False) -> Memory:
        """All tokens after the last norm, class token and registers first."""
        memory = self.backbone.features(images, train=train, norm_layers=True)["layers"][-1]
        return self.memory_projection(memory) if self.project_memory else memory

    def decode(
        self,
        memory: Memory,
        tokens: Int[Array, "b n"],
        *,
        parallel: Bool[Array, " b"] | None = None,
        train: bool = False,
    ) -> Float[Array, "b n v"]:
        """logits[:, t] score the token behind tokens[:, :t + 1]; where `parallel`, all from the mask token at every place."""
        n = tokens.shape[1]
        mask = jnp.tril(jnp.ones((1, 1, n, n), bool))
        if parallel is not None:
            tokens = jnp.where(parallel[:, None], self.vocabulary, tokens)
            mask = mask | parallel[:, None, None, None]
        x = self.dropout(self._embed(tokens, jnp.arange(n)), deterministic=not train)
        return self._score(self.text_decoder(x, memory, mask=mask, train=train)[-1])

    def start(self, memory: Memory, length: int) -> Any:
        """The cache to write up to `length` tokens from."""
        return self.text_decoder.start(memory.shape[0], length, memory)

    def step(self, tokens: Int[Array, "b n"], index: Int[Array, " b"], cache: Any) -> tuple[Float[Array, "b n v"], Any]:
        """What `decode` gives for these tokens, of which the first is number `index` of its row: see `generate`."""
        x, cache = self.text_decoder.step(self._embed(tokens, index[:, None] + jnp.arange(tokens.shape[1])), cache, index)
        return self._score(x), cache

    def _embed(self, tokens: Int[Array, "b n"], places: Int[Array, "*b n"]) -> Float[Array, "b n d"]:
        return (self.embedding[tokens] + self.position_embedding[places]).astype(self.dtype)

    def _score(self, x: Float[Array, "b n d"]) -> Float[Array, "b n v"]:
        x = self.text_norm(x)
        if not self.tied:
            return self.output(x).astype(jnp.float32)
        embedding = self.embedding[: self.vocabulary].astype(x.dtype)
        return jnp.einsum("bnd,vd->bnv", x, embedding, preferred_element_type=jnp.float32)


class AttendingLSTM(_OnViT):
    """ViT → LSTM with soft attention over the patches → the scores of the next token.

    Before every word the state h asks where to look: weights α = softmax(e) with e = v·tanh(W a + U h), "additive", or
    (W a)·(U h)/√d, "dot", for every patch a. What is seen, z = β Σ α a with the gate β = σ(W h), enters the LSTM with the word
    before. A deep output scores the next word: L(E y + M h' + N z), of the word before, the new state, and what was seen.

    Attributes:
      body: {"vit": fields of `VisionTransformer`}.
      vocabulary: how many tokens there are.
      embedding_dim, width, attention_dim: of words, of the state, and of the space where state and patches are compared.
      attention: "additive" or "dot".
      dropout_rate: before the scores.
      model_name: for messages only.
    """

    body: Mapping[str, Any]
    vocabulary: int
    embedding_dim: int = 512
    width: int = 512
    attention_dim: int = 512
    attention: str = "additive"
    dropout_rate: float = 0.5
    dtype: Any = jnp.float32
    model_name: str | None = None

    def setup(self):
        self.backbone = vit.VisionTransformer(**{**self.body["vit"], "num_classes": None}, dtype=self.dtype)
        self.embedding = self.param("embedding", nn.initializers.normal(0.1), (self.vocabulary, self.embedding_dim))
        self.initial_hidden, self.initial_cell = (Linear((self.width,), dtype=self.dtype) for _ in range(2))
        self.keys = Linear((self.attention_dim,), dtype=self.dtype)
        self.cell = Cell(self.width, self.attention_dim, self.attention, self.dtype)
        self.output_hidden, self.output_seen = (Linear((self.embedding_dim,), dtype=self.dtype) for _ in range(2))
        self.output = Linear((self.vocabulary,), dtype=self.dtype)
        self.dropout = nn.Dropout(self.dropout_rate)

    def encode(self, images: Float[Array, "b H W 3"], *, train: bool = False) -> Memory:
        """The patches after the last norm."""
        return self.backbone.features(images, train=train)["patches"]

    def decode(self, memory: Memory, tokens: Int[Array, "b n"], *, train: bool = False) -> Float[Array, "b n v"]:
        """logits[:, t] score the token behind tokens[:, :t + 1]."""
        return self._read(tokens, self.start(memory), train)[0]

    def start(self, memory: Memory, length: int = 0) -> dict[str, Array]:
        """The state before the first token, from the mean of the patches. It takes the same room for any length."""
        mean = memory.mean(axis=1)
        hidden, cell = jnp.tanh(self.initial_hidden(mean)), jnp.tanh(self.initial_cell(mean))
        return {"hidden": hidden, "cell": cell, "memory": memory, "keys": self.keys(memory)}

    def step(
        self, tokens: Int[Array, "b n"], index: Int[Array, " b"], cache: dict[str, Array]
    ) -> tuple[Float[Array, "b n v"], dict[str, Array]]:
        """What `decode` gives for these tokens, which follow those that the cache has read: see `generate`.

        The number `index` of the first one does not matter, so that prompts must be of one length.
        """
        return self._read(tokens, cache, False)

    def _read(
        self, tokens: Int[Array, "b n"], cache: dict[str, Array], train: bool
    ) -> tuple[Float[Array, "b n v"], dict[str, Array]]:
        words = self.embedding[tokens].astype(self.dtype)
        scan = nn.scan(
            lambda cell, state, word: cell(state, word, cache["memory"], cache["keys"]),
            variable_broadcast="params",
            split_rngs={"params": False},
            in_axes=1,
            out_axes=1,
        )
        (hidden, cell), (states, seen, weights) = scan(self.cell, (cache["hidden"], cache["cell"]), words)
        self.sow("intermediates", "looks", weights[:, None])
        x = words + self.output_hidden(states) + self.output_seen(seen)
        logits = self.output(self.dropout(x, deterministic=not train)).astype(jnp.float32)
        return logits, {**cache, "hidden": hidden, "cell": cell}


State = tuple[Float[Array, "b d"], Float[Array, "b d"]]


class Cell(nn.Module):
    """One step: where to look, what is seen there through the gate, and the LSTM's new state."""

    width: int
    attention_dim: int
    attention: str
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(
        self, state: State, word: Float[Array, "b e"], memory: Memory, keys: Float[Array, "b m a"]
    ) -> tuple[State, tuple[Float[Array, "b d"], Float[Array, "b c"], Float[Array, "b m"]]]:
        """Returns (hidden, cell), and (hidden, what was seen, weights)."""
        hidden, cell = state
        query = Linear((self.attention_dim,), dtype=self.dtype, name="query")(hidden)
        if self.attention == "additive":
            scores = Linear((1,), dtype=self.dtype, name="score")(jnp.tanh(keys + query[:, None]))[..., 0]
        else:
            scores = jnp.einsum("bma,ba->bm", keys, query) * self.attention_dim**-0.5
        weights = jax.nn.softmax(scores.astype(jnp.float32), axis=-1)
        seen = jnp.einsum("bm,bmc->bc", weights.astype(memory.dtype), memory)
        seen *= jax.nn.sigmoid(Linear(seen.shape[-1:], dtype=self.dtype, name="gate")(hidden))

        # Gates in torch's order: input, forget, cell, output.
        gates = Linear((4 * self.width,), dtype=self.dtype, name="of_inputs")(jnp.concatenate([word, seen], axis=-1))
        gates += Linear((4 * self.width,), use_bias=False, dtype=self.dtype, name="of_hidden")(hidden)
        i, f, g, o = jnp.split(gates, 4, axis=-1)
        cell = jax.nn.sigmoid(f) * cell + jax.nn.sigmoid(i) * jnp.tanh(g)
        hidden = jax.nn.sigmoid(o) * jnp.tanh(cell)
        return (hidden, cell), (hidden, seen, weights)


def looks(intermediates: Mapping[str, Any], patches: int) -> Float[Array, "b n patches"]:
    """Where a captioner looked for each token, from what `apply(…, mutable="intermediates")` kept: shares of the patches.

    Of a Transformer it is the mean over the heads of the cross-attention in all layers, without other tokens than patches.
    """
    sown = flatten_dict(dict(intermediates), sep="/")
    weights = [x for name, (x,) in sown.items() if name == "looks" or name.endswith("cross_attention/weights")]
    mean = sum(x.astype(jnp.float32).mean(axis=1) for x in weights)[..., -patches:]
    return mean / mean.sum(axis=-1, keepdims=True)


def _architecture(cls: type[nn.Module], first: str, last: str) -> Architecture:
    """The blocks are those of the decoder."""
    how = {"block": r"text_decoder/layer_(\d+)/.*", "choices": {"activation": ACTIVATIONS, "attention": ATTENTIONS}}
    return on_vit.architecture(cls, "captioner", first=first, last=last, **how)


CAPTIONER = _architecture(Captioner, "embedding|position_embedding|memory_projection/.*", "(text_norm|output)/.*")
LSTM = _architecture(AttendingLSTM, "embedding", "(initial_hidden|initial_cell|keys|cell|output|output_hidden|output_seen)/.*")
