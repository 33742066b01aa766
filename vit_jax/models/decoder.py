"""The encoder-decoder Transformer: "Attention Is All You Need" (https://arxiv.org/abs/1706.03762).

Shapes: b batch, n and m tokens, d width, k heads, h width of a head, v vocabulary. A mask is True where a query may look.
A cache holds the keys and values of the tokens so far, so that a token is computed once, see `generate`.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Bool, Float, Int

from vit_jax.errors import UserError, unknown
from vit_jax.models import positions
from vit_jax.models.layers import MlpBlock
from vit_jax.models.linear import Linear

Mask = Bool[Array, "b #k #n m"]
KeysValues = tuple[Float[Array, "b m k h"], Float[Array, "b m k h"]]
POSITIONS = (*positions.LAYOUTS, "learned")
PACKED_XAVIER = nn.initializers.variance_scaling(0.5, "fan_avg", "uniform")
"""Xavier's bounds for query, key and value as one matrix of (d, 3d), as torch's MultiheadAttention draws them."""


class LayerCache(NamedTuple):
    """What a layer keeps: keys and values of the tokens so far, and those of the memory (None without cross-attention)."""

    tokens: KeysValues
    memory: KeysValues | None


class Attention(nn.Module):
    """softmax(q·kᵀ / √h)·v for every head, between linear maps `query`, `key`, `value` and `out`.

    As `attention.MultiHeadDotProductAttention`, but keys and values may differ in what is added to them, and may be kept.
    The weights (b k n m) are sown as `intermediates`, for pictures.
    """

    width: int
    num_heads: int
    dropout_rate: float = 0.0
    use_bias: bool = True
    dtype: Any = jnp.float32

    def setup(self):
        if self.width % self.num_heads:
            raise UserError(f"a width of {self.width} cannot be shared out to {self.num_heads} heads: choose a multiple")
        heads = (self.num_heads, self.width // self.num_heads)
        how = {"use_bias": self.use_bias, "dtype": self.dtype}
        self.query, self.key, self.value = (Linear(heads, kernel_init=PACKED_XAVIER, **how) for _ in range(3))
        self.out = Linear((self.width,), 2, **how)
        self.dropout = nn.Dropout(self.dropout_rate)

    def keys_values(self, keys: Float[Array, "b m d"], values: Float[Array, "b m d"]) -> KeysValues:
        return self.key(keys), self.value(values)

    def __call__(
        self, queries: Float[Array, "b n d"], keys_values: KeysValues, mask: Mask | None = None, *, train: bool = False
    ) -> Float[Array, "b n d"]:
        k, v = keys_values
        weights = softmax_weights(self.query(queries), k, mask)
        self.sow("intermediates", "weights", weights)
        weights = self.dropout(weights, deterministic=not train).astype(v.dtype)
        return self.out(jnp.einsum("bknm,bmkh->bnkh", weights, v))


def softmax_weights(
    q: Float[Array, "b n k h"], k: Float[Array, "b m k h"], mask: Mask | None = None
) -> Float[Array, "b k n m"]:
    """softmax(q·kᵀ / √h) in float32; a query that may look nowhere looks everywhere alike."""
    logits = jnp.einsum("bnkh,bmkh->bknm", q * (q.shape[-1] ** -0.5), k, preferred_element_type=jnp.float32)
    if mask is not None:
        logits = jnp.where(mask, logits, jnp.finfo(jnp.float32).min)
    return jax.nn.softmax(logits, axis=-1)


class Layer(nn.Module):
    """Self-attention, cross-attention if `cross`, and MLP, each with a residual and a LayerNorm.

    x ← LN(x + f(x)) as in the paper, or with `norm_first` x ← x + f(LN(x)). Positions are added to queries and keys alone.
    Without `use_bias` none of them has a bias.
    """

    width: int
    num_heads: int
    mlp_dim: int
    cross: bool = False
    norm_first: bool = False
    activation: str = "relu"
    dropout_rate: float = 0.1
    norm_eps: float = 1e-5
    use_bias: bool = True
    dtype: Any = jnp.float32

    def setup(self):
        same = {"use_bias": self.use_bias, "dtype": self.dtype}
        attention = {"dropout_rate": self.dropout_rate, **same}
        norm = {"epsilon": self.norm_eps, **same}
        self.self_attention = Attention(self.width, self.num_heads, **attention)
        self.self_attention_norm = nn.LayerNorm(**norm)
        if self.cross:
            self.cross_attention = Attention(self.width, self.num_heads, **attention)
            self.cross_attention_norm = nn.LayerNorm(**norm)
        rates = {"dropout_rate": self.dropout_rate, "activation": self.activation}
        self.mlp = MlpBlock(mlp_dim=self.mlp_dim, **rates, **same)
        self.mlp_norm = nn.LayerNorm(**norm)
        self.dropout = nn.Dropout(self.dropout_rate)

    def memory_keys_values(
        self, memory: Float[Array, "b m d"], memory_positions: Float[Array, "#b m d"] | None = None
    ) -> KeysValues:
        return self.cross_attention.keys_values(_add(memory, memory_positions), memory)

    def __call__(
        self,
        x: Float[Array, "b n d"],
        memory: KeysValues | None = None,
        *,
        mask: Mask | None = None,
        memory_mask: Mask | None = None,
        places: Float[Array, "#b n d"] | None = None,
        cache: KeysValues | None = None,
        index: Int[Array, " b"] | None = None,
        train: bool = False,
    ) -> tuple[Float[Array, "b n d"], KeysValues]:
        """Returns x after the layer, and keys and values of the tokens: those of `cache` with the new ones at `index`."""
        kept: list[KeysValues] = []

        def look_at_tokens(x: Float[Array, "b n d"]) -> Float[Array, "b n d"]:
            located = _add(x, places)
            new = self.self_attention.keys_values(located, x)
            kept.append(new if cache is None else tuple(_write(c, y, index) for c, y in zip(cache, new, strict=True)))
            return self.dropout(self.self_attention(located, kept[0], mask, train=train), deterministic=not train)

        def look_at_memory(x: Float[Array, "b n d"]) -> Float[Array, "b n d"]:
            y = self.cross_attention(_add(x, places), memory, memory_mask, train=train)
            return self.dropout(y, deterministic=not train)

        x = self._residual(x, self.self_attention_norm, look_at_tokens)
        if self.cross:
            x = self._residual(x, self.cross_attention_norm, look_at_memory)
        return self._residual(x, self.mlp_norm, lambda x: self.mlp(x, train=train)), kept[0]

    def _residual(self, x: Float[Array, "b n d"], norm: nn.LayerNorm, f: Any) -> Float[Array, "b n d"]:
        return x + f(norm(x)) if self.norm_first else norm(x + f(x))


class Stack(nn.Module):
    """`num_layers` layers: an encoder, or with `cross` a decoder; `final_norm` adds a LayerNorm at the end.

    The other attributes are those of `Layer`.
    """

    num_layers: int
    width: int
    num_heads: int
    mlp_dim: int
    cross: bool = False
    norm_first: bool = False
    final_norm: bool = False
    activation: str = "relu"
    dropout_rate: float = 0.1
    norm_eps: float = 1e-5
    use_bias: bool = True
    dtype: Any = jnp.float32

    def setup(self):
        fields = {name: getattr(self, name) for name in Layer.__dataclass_fields__ if name not in ("parent", "name")}
        self.layer = [Layer(**fields) for _ in range(self.num_layers)]
        if self.final_norm:
            self.norm = nn.LayerNorm(epsilon=self.norm_eps, dtype=self.dtype)

    def __call__(
        self,
        x: Float[Array, "b n d"],
        memory: Float[Array, "b m d"] | None = None,
        *,
        mask: Mask | None = None,
        memory_mask: Mask | None = None,
        places: Float[Array, "#b n d"] | None = None,
        memory_places: Float[Array, "#b m d"] | None = None,
        train: bool = False,
    ) -> tuple[Float[Array, "b n d"], ...]:
        """What every layer makes of x, each normalised if there is a last norm; the last is the result."""
        outputs = []
        for layer in self.layer:
            keys_values = layer.memory_keys_values(memory, memory_places) if self.cross else None
            x, _ = layer(x, keys_values, mask=mask, memory_mask=memory_mask, places=places, train=train)
            outputs.append(x)
        return tuple(self.norm(x) for x in outputs) if self.final_norm else tuple(outputs)

    def start(
        self, b: int, length: int, memory: Float[Array, "b m d"] | None = None, dtype: Any = None
    ) -> tuple[LayerCache, ...]:
        """An empty cache for `length` tokens, with the keys and values of the memory."""
        shape = (b, length, self.num_heads, self.width // self.num_heads)
        empty = jnp.zeros(shape, dtype or self.dtype)
        return tuple(
            LayerCache((empty, empty), layer.memory_keys_values(memory) if self.cross else None) for layer in self.layer
        )

    def step(
        self,
        x: Float[Array, "b n d"],
        cache: tuple[LayerCache, ...],
        index: Int[Array, " b"],
        *,
        memory_mask: Mask | None = None,
    ) -> tuple[Float[Array, "b n d"], tuple[LayerCache, ...]]:
        """The outputs of n tokens, of which the first is number `index` of its row, and the cache with them in it."""
        place = index[:, None] + jnp.arange(x.shape[1])
        length = cache[0].tokens[0].shape[1] if cache else 0
        mask = (jnp.arange(length) <= place[..., None])[:, None]
        kept = []
        for layer, (tokens, memory) in zip(self.layer, cache, strict=True):
            x, tokens = layer(x, memory, mask=mask, memory_mask=memory_mask, cache=tokens, index=index)
            kept.append(LayerCache(tokens, memory))
        return self.norm(x) if self.final_norm else x, tuple(kept)


_OF_A_STACK = ("num_layers", "cross", "use_bias", "parent", "name")


class Transformer(nn.Module):
    """Tokens to the logits of the next ones, given the tokens of a source.

    Attributes:
      positions: "interleaved" or "halves" (`positions.sinusoid`), or "learned" for `max_length` places.
      scale_embedding: whether embeddings are multiplied by √d, as in the paper.
      tied: one matrix embeds source and target and scores the outputs; otherwise each has its own.
      final_norm: a LayerNorm after encoder and decoder, which pre-LN needs.
      the others: see `Layer`.
    """

    vocabulary: int
    width: int = 512
    num_heads: int = 8
    mlp_dim: int = 2048
    num_encoder_layers: int = 6
    num_decoder_layers: int = 6
    norm_first: bool = False
    final_norm: bool = False
    activation: str = "relu"
    positions: str = "interleaved"
    max_length: int = 512
    scale_embedding: bool = True
    tied: bool = True
    dropout_rate: float = 0.1
    norm_eps: float = 1e-5
    dtype: Any = jnp.float32

    def setup(self):
        if self.positions not in POSITIONS:
            raise unknown("positions", self.positions, POSITIONS)
        fields = {name: getattr(self, name) for name in Stack.__dataclass_fields__ if name not in _OF_A_STACK}
        self.encoder = Stack(self.num_encoder_layers, **fields)
        self.decoder = Stack(self.num_decoder_layers, **fields, cross=True)
        scale = nn.initializers.normal(self.width**-0.5)
        shape = self.vocabulary, self.width
        self.embedding = self.param("embedding", scale, shape)
        if not self.tied:
            self.source_embedding, self.output = (self.param(n, scale, shape) for n in ("source_embedding", "output"))
        if self.positions == "learned":
            small, shape = nn.initializers.normal(0.02), (self.max_length, self.width)
            self.position_embedding = self.param("position_embedding", small, shape)
        self.dropout = nn.Dropout(self.dropout_rate)

    def __call__(
        self,
        source: Int[Array, "b m"],
        target: Int[Array, "b n"],
        source_valid: Bool[Array, "b m"] | None = None,
        *,
        train: bool = False,
    ) -> Float[Array, "b n v"]:
        """logits[:, t] score the token that follows target[:, :t + 1]; `source_valid` is False on padding."""
        memory = self.encode(source, source_valid, train=train)
        n = target.shape[1]
        causal = jnp.tril(jnp.ones((1, 1, n, n), bool))
        x = self._embed(self.embedding, target, jnp.arange(n)[None], train)
        return self._score(self.decoder(x, memory, mask=causal, memory_mask=_keys(source_valid), train=train)[-1])

    def encode(
        self, source: Int[Array, "b m"], valid: Bool[Array, "b m"] | None = None, *, train: bool = False
    ) -> Float[Array, "b m d"]:
        embedding = self.embedding if self.tied else self.source_embedding
        x = self._embed(embedding, source, jnp.arange(source.shape[1])[None], train)
        return self.encoder(x, mask=_keys(valid), train=train)[-1]

    def start(self, source: Int[Array, "b m"], valid: Bool[Array, "b m"], length: int) -> dict[str, Any]:
        """The cache to decode up to `length` tokens from, for `step`."""
        memory = self.encode(source, valid)
        return {"layers": self.decoder.start(len(source), length, memory), "valid": valid}

    def step(
        self, tokens: Int[Array, "b n"], index: Int[Array, " b"], cache: dict[str, Any]
    ) -> tuple[Float[Array, "b n v"], dict[str, Any]]:
        """What `__call__` gives for these tokens, of which the first is number `index` of its row: see `generate`."""
        place = index[:, None] + jnp.arange(tokens.shape[1])
        x = self._embed(self.embedding, tokens, place, False)
        x, layers = self.decoder.step(x, cache["layers"], index, memory_mask=_keys(cache["valid"]))
        return self._score(x), cache | {"layers": layers}

    def _embed(
        self, embedding: Float[Array, "v d"], tokens: Int[Array, "b n"], place: Int[Array, "#b n"], train: bool
    ) -> Float[Array, "b n d"]:
        if self.positions == "learned":
            located = self.position_embedding[place]
        else:
            located = positions.sinusoid(place, self.width, layout=self.positions)
        x = embedding[tokens] * (self.width**0.5 if self.scale_embedding else 1.0) + located
        return self.dropout(x.astype(self.dtype), deterministic=not train)

    def _score(self, x: Float[Array, "b n d"]) -> Float[Array, "b n v"]:
        output = self.embedding if self.tied else self.output
        return jnp.einsum("bnd,vd->bnv", x, output.astype(x.dtype), preferred_element_type=jnp.float32)


def _keys(valid: Bool[Array, "b m"] | None) -> Mask | None:
    return None if valid is None else valid[:, None, None]


def _add(x: Float[Array, "b n d"], places: Float[Array, "#b n d"] | None) -> Float[Array, "b n d"]:
    return x if places is None else x + places.astype(x.dtype)


def _write(cache: Float[Array, "b L k h"], new: Float[Array, "b n k h"], index: Int[Array, " b"]) -> Float[Array, "b L k h"]:
    b, n = new.shape[:2]
    return cache.at[jnp.arange(b)[:, None], index[:, None] + jnp.arange(n)].set(new.astype(cache.dtype))
