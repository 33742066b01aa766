"""Images and texts in one space: those that belong together come to lie close (CLIP, LiT, SigLIP).

Either tower may be locked: `config.freeze=("img/.*",)` trains a text tower for an image tower that stays as it is (LiT).
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax.traverse_util import flatten_dict, unflatten_dict
from jaxtyping import Array

from vit_jax.checkpoint import Description, check_fit, load_pretrained
from vit_jax.checkpoint.opened import Opened
from vit_jax.checkpoint.texts import check_vocabulary
from vit_jax.data.host import text
from vit_jax.errors import UserError, unknown
from vit_jax.models import two_towers
from vit_jax.tasks import images, pairs, shapes
from vit_jax.tasks.setup import Setup
from vit_jax.tasks.task import Batch, Model, Params, Task, of_whole_batch

Tokenize = Callable[[Sequence[str]], np.ndarray]
NEEDS = ("image", "text")
LENGTH = 16
"""Tokens a text, where nothing else is said: LiT's."""
TOWERS = ("img", "txt")
"""For images, and for texts."""


def make_task(
    setup: Setup,
    *,
    loss: str = "softmax",
    tokenizer: str = "sentencepiece",
    vocab: str = "",
    max_len: int = 0,
    tokenizer_options: Mapping[str, Any] = {},
) -> Task:
    """Images to captions, by a model of `models.two_towers`.

    Args:
      loss: one of `pairs.LOSSES`, "softmax" (CLIP, LiT) or "sigmoid" (SigLIP), which needs `config.model.bias_init`.
      tokenizer, vocab, max_len, tokenizer_options: see `data.host.text.make`; `vocab` may be an address that `hub.fetch`
        knows, and the file is copied beside the trained model. If it is empty, it is the one that comes with the data;
        without either images alone are embedded, and nothing can be trained. A max_len of 0 is LiT's 16, or what the text
        tower reads where that is less.
    """
    settings, model = setup.settings, setup.build_model()
    if loss not in pairs.LOSSES:
        raise unknown("config.task.loss", loss, pairs.LOSSES)
    if model.type != "TwoTowers":
        raise UserError(f"config.model_type={model.type}: images and texts are compared by TwoTowers")
    if loss == "sigmoid" and model.fields.get("bias_init") is None:
        raise UserError("config.task.loss=sigmoid needs a bias: set config.model.bias_init, SigLIP's is -10")
    max_len = max_len or min(LENGTH, model.fields["text"].get("max_len") or LENGTH)
    vocab = setup.vocabulary(vocab)
    if not vocab and settings.trainer == "train":
        raise UserError(f"config.task.vocab is empty: give the {tokenizer} tokenizer's file")
    tokenize = text.make(tokenizer, vocab, max_len, **tokenizer_options) if vocab else None
    if tokenize:
        check_vocabulary(tokenize, model.fields["text"].get("vocab_size"), or_set="config.model.text.vocab_size")
    mean, std = setup.normalisation
    embed, loss_of = pairs.make_embed(model.module, mean, std), pairs.make_loss_of(model.module, loss=loss)
    described = {"tokenizer": tokenizer, "vocab": vocab.name, "max_len": max_len, **tokenizer_options} if vocab else {}
    return Task(
        model=model,
        needs=NEEDS,
        train_example=make_train_example(shapes.train_fields(settings, model), tokenize),
        eval_example=make_eval_example(shapes.eval_fields(settings, model), tokenize),
        init=make_init(model.module, settings.image_size, max_len),
        loss=of_whole_batch(embed, loss_of),
        whole_batch=True,
        embed=embed,
        loss_of=loss_of,
        predict=make_predict(model.module, mean, std),
        evaluators=(),
        describe=lambda: {
            "class_names": (),
            "head": loss,
            "text": described,
            "task": {"type": "contrast", "loss": loss, "max_len": max_len},
        },
        tokenize=tokenize,
        files=tokenize.files if tokenize else (),
        show=images.make_show_vector("zimg", "embedding"),
        preview=make_preview(functools.partial(shapes.pictures, settings=settings, model=model)),
        load=make_load(model, settings.image_size),
        towers=TOWERS,
    )


def check_usable(description: Description, source: Any) -> None:
    """Raises UserError for a checkpoint without two towers."""
    if description.model_type != "TwoTowers":
        raise UserError(f"{source} is a {description.model_type}, without a text tower")
    if not description.model["image"]:
        raise UserError(f"{source} is a text tower alone: training starts from it by config.pretrained.txt")


def make_init(model: nn.Module, image_size: tuple[int, int], max_len: int) -> Callable[[jax.Array], Params]:
    """key → fresh parameters of both towers. A ViT's head begins at 0, which has no direction: here it is drawn."""
    inputs = {"images": jnp.zeros((1, *image_size, 3)), "tokens": jnp.zeros((1, max_len), jnp.int32)}

    def init(key: jax.Array) -> Params:
        params = model.init(key, **inputs)["params"]
        if head := params["img"].get("head"):
            kernel = nn.initializers.lecun_normal()(jax.random.fold_in(key, 1), head["kernel"].shape)
            params = {**params, "img": {**params["img"], "head": {**head, "kernel": kernel}}}
        return params

    return init


def make_train_example(train_fields: shapes.Fields, tokenize: Tokenize | None) -> Callable[..., dict[str, np.ndarray]]:
    """(example, rng=, exif_rotated=) → image, and the tokens (max_len,) of one of its sentences, drawn at random."""

    def train_example(example: Mapping[str, Any], *, rng: np.random.Generator, exif_rotated: bool) -> dict[str, np.ndarray]:
        sentence = example["text"][rng.integers(len(example["text"]))]
        image = train_fields(example["image"], rng=rng, exif_rotated=exif_rotated)
        return image | {"tokens": tokenize([sentence])[0]}

    return train_example


def make_eval_example(eval_fields: shapes.Fields, tokenize: Tokenize | None) -> Callable[..., dict[str, np.ndarray]]:
    """(example, exif_rotated=) → image, and the tokens (max_len,) of its first sentence, where there is one."""

    def eval_example(example: Mapping[str, Any], *, exif_rotated: bool) -> dict[str, np.ndarray]:
        image = eval_fields(example["image"], exif_rotated=exif_rotated)
        return image | ({"tokens": tokenize(example["text"][:1])[0]} if tokenize and "text" in example else {})

    return eval_example


def make_predict(model: nn.Module, mean: Sequence[float], std: Sequence[float]) -> Callable[[Params, Batch], dict[str, Array]]:
    """(parameters, evaluation batch) → `zimg` of its images and `ztxt` of its tokens, (b, d) of length 1, of what there is."""

    def predict(params: Params, batch: Batch) -> dict[str, Array]:
        inputs = {"images": images.inputs(batch, mean, std)} if "image" in batch else {}
        zimg, ztxt, _ = model.apply({"params": params}, **inputs, tokens=batch.get("tokens"), train=False)
        return {name: z for name, z in (("zimg", zimg), ("ztxt", ztxt)) if z is not None}

    return predict


def make_preview(
    pictures: Callable[[dict[str, np.ndarray]], np.ndarray],
) -> Callable[[dict[str, np.ndarray], jax.Array | None], tuple[np.ndarray, list[str]]]:
    """See `Task.preview`: the images, and the tokens of their sentences without what fills them up."""

    def preview(batch: dict[str, np.ndarray], key: jax.Array | None) -> tuple[np.ndarray, list[str]]:
        ends = [tokens[: len(tokens) - np.argmax(tokens[::-1] != tokens[-1])] for tokens in batch["tokens"]]
        return pictures(batch), [" ".join(map(str, tokens)) for tokens in ends]

    return preview


def make_load(model: Model, image_size: tuple[int, int]) -> Callable[..., Params]:
    """See `Task.load`: all of a model like this one, or each tower from a source of its own. What no source has starts anew.

    A ViT becomes the image tower, with a new head. A single tower of a model of two keeps its head where that fits.
    """
    grid = images.patch_grid(model, image_size)

    def load(sources: Mapping[str, Opened], init_params: Params, *, classes: Sequence[str] | None = None) -> Params:
        if (whole := sources.get("")) and whole.description.model_type == "TwoTowers":
            rest = {name: x for name, x in init_params.items() if name not in TOWERS}
            of_file = {name: np.asarray(whole.flat[name]) for name in ("t", "b") if name in whole.flat}
            check_fit(of_file, rest, whole.path)
            img, txt = _image_tower(whole, init_params["img"], True), _text_tower(whole, init_params["txt"], True)
            return of_file | {"img": img, "txt": txt}
        params = dict(init_params)
        if img := whole or sources.get("img"):
            params["img"] = _image_tower(img, params["img"], _has_head_of(params["img"], img.under("img/")))
        if txt := sources.get("txt"):
            params["txt"] = _text_tower(txt, params["txt"], _has_head_of(params["txt"], txt.under("txt/")))
        return params

    def _image_tower(opened: Opened, init_params: Params, keep_head: bool) -> Params:
        return load_pretrained(
            pretrained_path=opened.image_tower(),
            init_params=init_params,
            model_config=model.fields["image"],
            grid=grid,
            keep_head=keep_head,
        )

    def _text_tower(opened: Opened, init_params: Params, keep_head: bool) -> Params:
        if opened.description.model_type != "TwoTowers":
            check_usable(opened.description, opened.path)
        two_towers.check_same_text(opened.description.model, model.fields, opened.path)
        wanted, loaded = flatten_dict(init_params, sep="/"), opened.under("txt/")
        if not keep_head:
            loaded = {name: x for name, x in loaded.items() if not name.startswith("head/")}
            loaded |= {name: x for name, x in wanted.items() if name.startswith("head/")}
        check_fit(unflatten_dict(loaded, sep="/"), init_params, opened.path)
        return unflatten_dict({name: np.asarray(loaded[name], x.dtype) for name, x in wanted.items()}, sep="/")

    return load


def _has_head_of(tower: Params, source: Mapping[str, np.ndarray]) -> bool:
    """Whether a tower has a head that fits one of the flat parameters of a source."""
    kernel = source.get("head/kernel")
    return kernel is not None and "head" in tower and tower["head"]["kernel"].shape == kernel.shape
