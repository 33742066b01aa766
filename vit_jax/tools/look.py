"""What can be seen inside a model, as pictures: its attention, its position embeddings, its patch filters, its features."""

from typing import Any

import jax
import numpy as np
from jaxtyping import Bool, Float, UInt8
from PIL import Image

from vit_jax import models, pictures, predictor
from vit_jax.data.host.resize import Box
from vit_jax.data.host.view import eval_view
from vit_jax.errors import UserError, printable
from vit_jax.models import resnet, vit
from vit_jax.pictures import Captioned

COLUMN = 224
"""How wide the pictures of the first row are, in pixels."""
_MOST_HEADS = 8


def seen_box(size: tuple[int, int], loaded: predictor.Predictor) -> Box:
    """The part of an upright photo of `size` (h, w) that the model sees, in pixels of the photo."""
    described = loaded.description
    view = eval_view(size, crop=described.image_size, **described.preprocessing)
    cut = view.cut or Box(0, 0, *view.resized)
    y, x = (length / n for length, n in zip(size, view.resized, strict=True))
    return Box(cut.top * y, cut.left * x, cut.height * y, cut.width * x)


def seen(picture: UInt8[np.ndarray, "h w 3"], loaded: predictor.Predictor, *, width: int = COLUMN) -> Image.Image:
    """The part of an upright photo that the model sees, at the photo's aspect and this width."""
    top, left, h, w = seen_box(picture.shape[:2], loaded)
    size = width, max(1, round(width * h / w))
    return Image.fromarray(picture).resize(size, Image.Resampling.LANCZOS, box=(left, top, left + w, top + h))


def share(loaded: predictor.Predictor, grid: tuple[int, int]) -> tuple[float, float]:
    """How much of the height and width of what the model sees its patches stand for, see `pictures.heat_over`."""
    fields = _fields(loaded)
    stride = resnet.stride(fields["resnet"]["num_layers"]) if fields.get("resnet") else 1
    sizes = zip(grid, fields["patches"]["size"], loaded.image_size, strict=True)
    return tuple(n * stride * patch / length for n, patch, length in sizes)


def _fields(loaded: predictor.Predictor) -> dict[str, Any]:
    """Those of the model that sees the images, perhaps one of two towers."""
    return models.architecture_of(loaded.description.model_type).vit_fields(loaded.description.model)


def attention_sheet(
    loaded: predictor.Predictor, picture: UInt8[np.ndarray, "h w 3"], found: dict[str, Any], name: str
) -> Image.Image:
    """A photo, the last layer, rollout and relevance side by side; below, every head of the last layer.

    Args:
      found: of this photo, from `Predictor.attention_maps`.
    """
    image, part = seen(picture, loaded), share(loaded, found["rollout"].shape)
    first = [("what the model sees", image)]
    captions = {
        "mean": "last layer, all heads",
        "rollout": "rollout",
        "relevance": f"relevance for {class_text(loaded, found)}",
    }
    first += [(text, pictures.heat_over(image, found[key], share=part)) for key, text in captions.items() if key in found]
    heads = found["heads"][-1]
    columns = min(len(heads), _MOST_HEADS)
    width = (len(first) * (COLUMN + pictures.GAP)) // max(columns, len(first)) - pictures.GAP
    small = pictures.resized(image, width)
    tiles = [(f"head {i + 1}", pictures.heat_over(small, head, share=part)) for i, head in enumerate(heads)]
    rows = [first, *(tiles[i : i + columns] for i in range(0, len(tiles), columns))]
    return pictures.sheet(rows, name)


def layers_sheet(
    loaded: predictor.Predictor, picture: UInt8[np.ndarray, "h w 3"], found: dict[str, Any], name: str
) -> Image.Image:
    """Every head of every layer over the photo: a row a layer."""
    heads = found["heads"]
    small = pictures.resized(seen(picture, loaded), max(112, COLUMN * 4 // heads.shape[1]))
    part = share(loaded, heads.shape[2:])
    has_probe = len(heads) > models.architecture_of("ViT").num_layers(_fields(loaded))
    rows: list[list[Captioned]] = []
    for i, layer in enumerate(heads):
        row = "probe" if has_probe and i + 1 == len(heads) else f"layer {i + 1}"
        rows.append([(f"{row}, head {k + 1}", pictures.heat_over(small, head, share=part)) for k, head in enumerate(layer)])
    return pictures.sheet(rows, f"{name}: layers and heads")


def class_text(loaded: predictor.Predictor, found: dict[str, Any]) -> str:
    """'cat (93%)': the class that relevance is for, and how probable the model finds it."""
    if "target" not in found:
        return ""
    logits, index = found["logits"], int(found["target"])
    softmax = np.exp(logits - logits.max())
    p = softmax / softmax.sum() if loaded.description.head == "softmax" else 1 / (1 + np.exp(-logits))
    return f"{printable(loaded.description.class_names[index], 40)} ({p[index]:.0%})"


# Position embeddings and patch filters, as in figure 7 of "An Image is Worth 16x16 Words" (https://arxiv.org/abs/2010.11929)


def position_similarity(loaded: predictor.Predictor) -> Float[np.ndarray, "h w h w"]:
    """The cosine between the position embeddings of any two patches. UserError for a model without."""
    described, params = loaded.description, loaded.params.get("img", loaded.params)
    fields = _fields(loaded)
    if described.model_type not in ("ViT", "TwoTowers") or fields.get("position_embedding", "learned") == "none":
        raise UserError(f"{loaded.source} ({described.model_type}) has no position embeddings that a ViT adds to its patches")
    h, w = models.architecture_of("ViT").grid(fields, loaded.image_size)
    if fields.get("position_embedding", "learned") == "learned":
        table = np.asarray(params["Transformer"]["posembed_input"]["pos_embedding"], np.float64)[0]
    else:
        table = np.asarray(jax.device_get(vit.sincos2d(h, w, fields["hidden_size"])), np.float64)[0]
    table = table[-h * w :]
    table = table / np.maximum(np.linalg.norm(table, axis=1, keepdims=True), 1e-12)
    return (table @ table.T).reshape(h, w, h, w)


def position_picture(similarity: Float[np.ndarray, "h w h w"]) -> Image.Image:
    """A heat map for every patch, at its place: how similar its position is to all others, from -1, blue, to 1, red."""
    h, w = similarity.shape[:2]
    cell = max(1, 900 // (w * (w + 1)))
    tile_height, tile_width, gap = h * cell, w * cell, max(3, cell // 2)
    canvas = Image.new("RGB", (w * (tile_width + gap) - gap, h * (tile_height + gap) - gap), "dimgray")
    for i in range(h):
        for j in range(w):
            tile = pictures.coloured(similarity[i, j], diverging=True).resize(
                (tile_width, tile_height), Image.Resampling.NEAREST
            )
            canvas.paste(tile, (j * (tile_width + gap), i * (tile_height + gap)))
    scale = pictures.coloured(np.linspace(-1, 1, min(256, canvas.width))[None], diverging=True).resize(
        (min(256, canvas.width), 12)
    )
    title = f"similarity of position embeddings, {h} x {w} patches"
    return pictures.sheet([[("", canvas)], [("cosine: -1, 0, 1 from left to right", scale)]], title)


def filters(loaded: predictor.Predictor, count: int = 28) -> Float[np.ndarray, "n p q 3"]:
    """The first principal components of the patch embedding's filters, each from 0 to 1.

    UserError for a model that does not cut patches from an image of three channels.
    """
    params = loaded.params.get("img", loaded.params)
    kernel = next((params[name]["kernel"] for name in ("embedding", "stem") if name in params), None)
    if kernel is None or np.ndim(kernel) != 4 or kernel.shape[2] != 3:
        raise UserError(f"{loaded.source} cuts no patches from RGB images: there are no filters to show as pictures")
    p, q, c, d = kernel.shape
    rows = np.asarray(kernel, np.float64).reshape(-1, d).T
    components = np.linalg.svd(rows - rows.mean(0), full_matrices=False)[2][: min(count, d - 1)]
    return np.stack([pictures.scaled(x) for x in components.reshape(-1, p, q, c)])


def filters_picture(components: Float[np.ndarray, "n p q 3"], columns: int = 7) -> Image.Image:
    """The components in rows, enlarged without smoothing."""
    side = components.shape[2] * -(-64 // components.shape[2])  # whole pixels each
    tiles = [
        ("", pictures.resized(Image.fromarray((255 * x).round().astype(np.uint8)), side, smooth=False)) for x in components
    ]
    rows = [tiles[i : i + columns] for i in range(0, len(tiles), columns)]
    return pictures.sheet(rows, f"patch filters, first {len(tiles)} components")


# Principal components of patch features, as in "DINOv2" (https://arxiv.org/abs/2304.07193)


def feature_colours(patches: Float[np.ndarray, "n h w d"]) -> tuple[Bool[np.ndarray, "n h w"], Float[np.ndarray, "n h w 3"]]:
    """Which patches are foreground, and what is alike in them as a colour, by principal components of all images together.

    The first component of all patches tells foreground, above 0, from background. Its sign is open: it is taken so that
    the patches at the edges of the images are below 0 in the mean. The first three components of the foreground alone, each
    from 0 to 1, are red, green and blue; of each the patch that lies farthest out counts as positive. Background is 0.
    """
    n, h, w, d = patches.shape
    rows = np.asarray(patches, np.float64).reshape(-1, d)
    first = _components(rows, 1)[:, 0].reshape(n, h, w)
    inside = np.zeros((h, w), bool)
    inside[1:-1, 1:-1] = True
    foreground = first * (-1 if first[:, ~inside].mean() > 0 else 1) > 0
    chosen = rows[foreground.ravel()]
    colours = np.zeros((n, h, w, 3))
    if len(chosen):
        colours[foreground] = np.stack([pictures.scaled(x) for x in _components(chosen, 3).T], axis=1)
    return foreground, colours


def _components(rows: Float[np.ndarray, "n d"], count: int) -> Float[np.ndarray, "n c"]:
    """The coordinates of centred rows along their first principal components; 0 for those beyond the rows' rank."""
    centred = rows - rows.mean(axis=0)
    _, vectors = np.linalg.eigh(centred.T @ centred)
    coordinates = centred @ vectors[:, : -count - 1 : -1]
    farthest = np.take_along_axis(coordinates, np.abs(coordinates).argmax(axis=0)[None], axis=0)
    return np.pad(coordinates * np.where(farthest < 0, -1, 1), [(0, 0), (0, count - coordinates.shape[1])])


def feature_picture(
    picture: UInt8[np.ndarray, "h w 3"], colours: Float[np.ndarray, "h w 3"], loaded: predictor.Predictor
) -> Image.Image:
    """A photo beside the colours of its patches, see `feature_colours`."""
    image, part = seen(picture, loaded, width=2 * COLUMN), share(loaded, colours.shape[:2])
    size = tuple(max(1, round(length * s)) for length, s in zip(image.size, reversed(part), strict=True))
    painted = Image.fromarray((255 * colours).round().astype(np.uint8)).resize(size, Image.Resampling.NEAREST)
    return pictures.sheet([[("what the model sees", image), ("features", painted.crop((0, 0, *image.size)))]])
