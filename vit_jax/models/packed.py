"""Images of different sizes in one batch, as rows of patches: NaViT (https://arxiv.org/abs/2307.06304), SigLIP 2's NaFlex.

A row holds the patches of one image, or of several behind each other, and is filled up. A token sees those of its own image
alone, so that every image comes out as if it were computed by itself.
"""

from collections.abc import Sequence
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from vit_jax.errors import UserError


class Pack(NamedTuple):
    """b rows of n patches, of up to s images each.

    Attributes:
      patches: (b, n, p), normalised pixels of each patch: row, column, channel. Those of an image follow each other in rows.
      grids: (b, s, 2), the (h, w) of every image in patches, in their order; 0 x 0 where a row has fewer than s.
    """

    patches: Float[Array, "b n p"]
    grids: Int[Array, "b s 2"]

    def segments(self) -> Int[Array, "b n"]:
        """The number of the image in its row that a patch belongs to; s for filling."""
        ends = jnp.cumsum(self.grids.prod(axis=-1), axis=1)
        return (jnp.arange(self.patches.shape[1])[None, :, None] >= ends[:, None]).sum(axis=-1)

    def positions(self, table: Float[Array, "1 m d"], num_prefix: int) -> Float[Array, "b n d"]:
        """Position embeddings of the patches, resampled from those of a square grid to each image's, bilinear and antialiased.

        The first `num_prefix` of the table are those of other tokens, and left out.
        """
        side = round((table.shape[1] - num_prefix) ** 0.5)
        if side * side != table.shape[1] - num_prefix:
            raise UserError(
                f"{table.shape[1] - num_prefix} position embeddings are no square: images of one size alone fit them"
            )
        square = table[0, num_prefix:].reshape(side, side, -1)
        segments, counts = self.segments(), self.grids.prod(axis=-1)
        starts = jnp.cumsum(counts, axis=1) - counts
        own = jnp.minimum(segments, self.grids.shape[1] - 1)
        place = jnp.arange(self.patches.shape[1]) - jnp.take_along_axis(starts, own, axis=1)
        h, w = (jnp.maximum(jnp.take_along_axis(self.grids[..., i], own, axis=1), 1) for i in (0, 1))
        rows, columns = _shares(place // w, h, side), _shares(place % w, w, side)
        return jnp.einsum("bni,bnj,ijd->bnd", rows, columns, square, precision="highest")


def _shares(place: Int[Array, "b n"], length: Int[Array, "b n"], side: int) -> Float[Array, "b n side"]:
    """How much of each of `side` places along an axis goes into a place of `length`: a triangle as wide as the coarser."""
    step, place = side / length[..., None], jnp.minimum(place, length - 1)[..., None]  # filling has a place, too
    distance = jnp.abs(jnp.arange(side) + 0.5 - (place + 0.5) * step)
    weights = jnp.maximum(0, 1 - distance / jnp.maximum(step, 1))
    return weights / weights.sum(axis=-1, keepdims=True)


class Segments(NamedTuple):
    """Whose every token is: (b, n) numbers of images in a row, of which there are `count`; `count` for filling."""

    of_tokens: Int[Array, "b n"]
    count: int

    def mask(self) -> Bool[Array, "b 1 n n"]:
        """Which token sees which."""
        own = self.of_tokens
        return ((own[:, :, None] == own[:, None]) & (own < self.count)[:, None])[:, None]

    def of_images(self) -> Bool[Array, "b s n"]:
        """Which tokens are an image's."""
        return self.of_tokens[:, None] == jnp.arange(self.count)[:, None]

    def mean(self, tokens: Float[Array, "b n d"], num_prefix: int) -> Float[Array, "b s d"]:
        """The mean over the patches of every image, which stand behind the first `num_prefix` tokens; 0 where there is none."""
        shares = self.of_images()[..., num_prefix:].astype(tokens.dtype)
        shares = shares / jnp.maximum(shares.sum(axis=-1, keepdims=True), 1)
        return jnp.einsum("bsn,bnd->bsd", shares, tokens[:, num_prefix:])


def patchify(images: Float[Array, "b H W c"], patch: tuple[int, int]) -> Float[Array, "b n p"]:
    """The pixels of each patch in a row: row, column, channel."""
    b, height, width, c = images.shape
    p, q = patch
    h, w = height // p, width // q
    return images[:, : h * p, : w * q].reshape(b, h, p, w, q, c).swapaxes(2, 3).reshape(b, h * w, p * q * c)


def rows_of(counts: Sequence[int], n: int, most: int | None = None) -> list[list[int]]:
    """Which images, of so many patches each, share a row of n: each, the largest first, goes where it just fits.

    A row takes up to `most` images, where that is given.
    """
    rows: list[list[int]] = []
    room: list[int] = []
    for i in sorted(range(len(counts)), key=lambda i: -counts[i]):
        fits = [j for j, left in enumerate(room) if left >= counts[i] and len(rows[j]) != most]
        j = min(fits, key=lambda j: room[j]) if fits else len(rows)
        if not fits:
            rows.append([])
            room.append(n)
        rows[j].append(i)
        room[j] -= counts[i]
    return rows


def pack(images: Sequence[Float[np.ndarray, "_ _ c"]], patch: tuple[int, int], n: int) -> tuple[Pack, Int[np.ndarray, " i"]]:
    """Images of any sizes in as few rows of n patches as come out when each, the largest first, goes where it just fits.

    Returns:
      the pack, and where the results of every image stand among those of b · s.

    Raises:
      UserError: for an image that has no patch, or more than n.
    """
    grids = [(x.shape[0] // patch[0], x.shape[1] // patch[1]) for x in images]
    counts = [h * w for h, w in grids]
    for i, count in enumerate(counts):
        if not 0 < count <= n:
            raise UserError(f"image {i} of {images[i].shape[:2]} has {count} patches of {patch}: a row takes from 1 to {n}")
    rows = rows_of(counts, n)
    patches = np.zeros((len(rows), n, patch[0] * patch[1] * images[0].shape[2]), np.float32)
    of_rows = np.zeros((len(rows), max(map(len, rows)), 2), np.int32)
    places = np.zeros(len(images), np.int32)
    for j, row in enumerate(rows):
        filled = np.concatenate([patchify(images[i][None], patch)[0] for i in row])
        patches[j, : len(filled)] = filled
        of_rows[j, : len(row)] = [grids[i] for i in row]
        places[row] = j * of_rows.shape[1] + np.arange(len(row))
    return Pack(patches, of_rows), places
