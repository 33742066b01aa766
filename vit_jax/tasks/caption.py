"""Captioning: images to sentences, by a decoder on any ViT (`models.captioner`).

In training the decoder reads the true words before each one (teacher forcing), or, for a share of the examples, none of
them (CapPa's parallel prediction, https://arxiv.org/abs/2306.07915). Sentences are written by beam search.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jaxtyping import Array, Bool, Float, Int
from PIL import Image

from vit_jax import pictures
from vit_jax.checkpoint import Description, check_fit
from vit_jax.checkpoint.opened import Opened
from vit_jax.checkpoint.texts import check_vocabulary
from vit_jax.data.device import augment
from vit_jax.data.host import text
from vit_jax.data.host.text import Tokenizer
from vit_jax.errors import UserError, printable
from vit_jax.models import captioner
from vit_jax.models.generate import beam_search
from vit_jax.settings import Settings
from vit_jax.tasks import images, shapes
from vit_jax.tasks.contrast import make_eval_example, make_train_example
from vit_jax.tasks.setup import Setup
from vit_jax.tasks.task import Batch, Context, Loss, Model, Params, Shown, Task, Written

NEEDS = ("image", "text")
WRITES = True
"""A model of this task cannot be used without its vocabulary."""
CAPTIONERS = ("Captioner", "AttendingLSTM")
"""Keys of `models.ARCHITECTURES`."""
PARALLEL = 7
"""Tells the numbers that decide on parallel prediction from others of the same seed."""
_PANEL = 150


def make_task(
    setup: Setup,
    *,
    tokenizer: str = "",
    vocab: str = "",
    max_len: int = 0,
    tokenizer_options: Mapping[str, Any] = {},
    parallel: float = 0.0,
    doubly_stochastic: float = 0.0,
    beams: int = 3,
    length_penalty: float = 1.0,
) -> Task:
    """Images to sentences, by a model of `models.captioner`.

    Args:
      tokenizer, vocab, max_len, tokenizer_options: see `data.host.text.make`; "" and 0 for those of the model that training
        starts from. `vocab` may be an address that `hub.fetch` knows; if it is empty, it is the one that comes with the data.
        `max_len` is also how many tokens are written at most.
      parallel: share of the examples of which all words are predicted at once; `config.model.mask_token` must be True.
      doubly_stochastic: weight of the mean of (1 − Σ_t α)² over the patches, which asks the decoder to look everywhere.
      beams, length_penalty: see `generate.beam_search`.
    """
    settings = setup.settings
    known = dict(setup.origin.text) if setup.origin and not tokenizer else {}
    given = {name: value for name, value in (("tokenizer", tokenizer), ("max_len", max_len)) if value}
    told = {**known, **given, **tokenizer_options}
    if not told.get("tokenizer") or not told.get("max_len"):
        raise UserError("config.task.tokenizer and max_len are not set: name one of " + ", ".join(text.TOKENIZERS))
    vocab = setup.vocabulary(vocab)
    if not vocab:
        raise UserError(
            f"config.task.vocab is empty: give the {told['tokenizer']} tokenizer's file, or make one: vit-jax tokenizer --help"
        )
    options = {name: x for name, x in told.items() if name not in ("tokenizer", "vocab", "max_len")}
    words = text.make(told["tokenizer"], vocab, told["max_len"], **options)
    model = setup.build_model()
    _check(settings, model, words, parallel, beams)
    mean, std = setup.normalisation
    grid = images.patch_grid(model, settings.image_size)
    prepared = _prepare(images.make_augment(settings), mean, std)
    weights = {"parallel": parallel, "smoothing": settings.label_smoothing, "doubly_stochastic": doubly_stochastic}
    written = {"type": "caption", "beams": beams, "length_penalty": length_penalty}
    return Task(
        model=model,
        needs=NEEDS,
        train_example=make_train_example(shapes.train_fields(settings, model), words),
        eval_example=make_eval_example(shapes.eval_fields(settings, model), None),
        init=make_init(model.module, settings.image_size, _room(words)),
        loss=make_loss(model.module, prepared, words, grid, **weights),
        totals=lambda batch: {"tokens": shifted(batch["tokens"], words)[2].sum(dtype=jnp.float32)},
        predict=make_predict(model.module, words, grid, mean, std, beams=beams, length_penalty=length_penalty),
        evaluators=("caption",),
        describe=lambda: {"class_names": (), "text": {**told, "vocab": vocab.name}, "task": written},
        write=make_write(words),
        files=words.files,
        show=make_show(words),
        preview=make_preview(words),
        load=make_load(model, settings.image_size),
    )


def check_usable(description: Description, source: Any) -> None:
    """Raises UserError for a checkpoint that is no captioner."""
    if description.model_type not in CAPTIONERS:
        raise UserError(f"{source} is a {description.model_type}, no captioner: train one on it (configs/caption.py)")


def _check(settings: Settings, model: Model, words: Tokenizer, parallel: float, beams: int) -> None:
    if model.type not in CAPTIONERS:
        raise UserError(f"config.model_type={model.type} writes no sentences: {', '.join(CAPTIONERS)} do")
    if settings.augment.mixup or settings.augment.cutmix:
        raise UserError("config.augment.mixup and cutmix make one picture of two, which no sentence describes: leave them out")
    if not 0 <= parallel <= 1 or beams < 1:
        raise UserError(f"config.task.parallel={parallel} must be from 0 to 1, and beams={beams} at least 1")
    if parallel and not model.fields.get("mask_token"):
        raise UserError(f"config.task.parallel={parallel} needs a Captioner with config.model.mask_token=True")
    check_vocabulary(words, model.fields["vocabulary"], reader="the model", or_set="config.model.vocabulary")
    if model.type == "Captioner" and _room(words) > (most := model.module.max_length):
        raise UserError(f"config.task.max_len={words.max_len} is more than the {most} places of config.model.max_length")


def _room(words: Tokenizer) -> int:
    """How many tokens are written at most."""
    return words.max_len - (words.start_token is not None)


# Examples


def shifted(tokens: Int[Array, "b l"], words: Tokenizer) -> tuple[Int[Array, "b n"], Int[Array, "b n"], Bool[Array, "b n"]]:
    """(what the decoder reads, what it is to write behind each, whether that counts: up to the first stop token)."""
    tokens = tokens.astype(jnp.int32)
    if words.start_token is None:
        tokens = jnp.pad(tokens, ((0, 0), (1, 0)))
    read, targets = tokens[:, :-1], tokens[:, 1:]
    stops = targets == words.stop_token
    return read, targets, jnp.cumsum(stops, axis=1) - stops == 0


def _prepare(augmented: Callable, mean: Sequence[float], std: Sequence[float]) -> Callable[[Batch], Array]:
    return lambda batch: augment.normalize(augmented(batch["image"], batch["seed"]), mean, std)


# Training and prediction


def make_init(model: nn.Module, image_size: tuple[int, int], length: int) -> Callable[[jax.Array], Params]:
    """key → fresh parameters."""
    inputs = jnp.zeros((1, *image_size, 3)), jnp.zeros((1, length), jnp.int32)
    return lambda key: model.init(key, *inputs)["params"]


def make_loss(
    model: nn.Module,
    prepared: Callable[[Batch], Array],
    words: Tokenizer,
    grid: tuple[int, int],
    *,
    parallel: float,
    smoothing: float,
    doubly_stochastic: float,
) -> Callable[[Params, Context, Batch, jax.Array], Loss]:
    """Cross-entropy of every token up to the stop token, its mean over the whole batch; the share that is guessed right."""

    def loss(params: Params, context: Context, batch: Batch, key: jax.Array) -> Loss:
        read, targets, counts = shifted(batch["tokens"], words)
        how = {"parallel": _uniform(batch["seed"]) < parallel} if parallel else {}
        kept = ["intermediates"] if doubly_stochastic else []
        logits, state = model.apply(
            {"params": params}, prepared(batch), read, **how, train=True, rngs={"dropout": key}, mutable=kept
        )
        log_p = jax.nn.log_softmax(logits, axis=-1)
        of_target = jnp.take_along_axis(log_p, targets[..., None], axis=-1)[..., 0]
        losses = -(1 - smoothing) * of_target - smoothing * log_p.mean(axis=-1)
        total = jnp.maximum(context.totals["tokens"], 1)
        value = (losses * counts).sum() / total
        correct = (jnp.argmax(logits, axis=-1) == targets) & counts
        metrics = {"token_accuracy": correct.sum(dtype=jnp.float32) / total}
        if doubly_stochastic:
            looked = captioner.looks(state["intermediates"], grid[0] * grid[1]) * counts[..., None]
            metrics["unseen"] = ((1 - looked.sum(axis=1)) ** 2).mean()
            value += doubly_stochastic * metrics["unseen"]
        return Loss(value, metrics)

    return loss


def _uniform(seeds: Int[Array, " b"]) -> Float[Array, " b"]:
    """A number from 0 to 1 for each example, which its seed decides."""
    return jax.vmap(lambda seed: jax.random.uniform(jax.random.fold_in(jax.random.key(seed), PARALLEL)))(seeds)


def make_predict(
    model: nn.Module,
    words: Tokenizer,
    grid: tuple[int, int],
    mean: Sequence[float],
    std: Sequence[float],
    *,
    beams: int,
    length_penalty: float,
) -> Callable[[Params, Batch], dict[str, Array]]:
    """(parameters, evaluation batch) → `tokens` (b n), the stop token last and behind; `lengths` (b), with that token;
    `score` (b), see `beam_search`; `attention` (b n h w), where the decoder looked for each, as shares.
    """
    start, stop, room = words.start_token or 0, words.stop_token, _room(words)

    def predict(params: Params, batch: Batch) -> dict[str, Array]:
        apply = lambda *args, **how: model.apply({"params": params}, *args, **how)  # noqa: E731
        memory = apply(augment.normalize(batch["image"], mean, std), method="encode")
        cache, b = apply(memory, room, method="start"), memory.shape[0]
        found = beam_search(
            lambda *args: apply(*args, method="step"),
            cache,
            jnp.full((b, 1), start, jnp.int32),
            jnp.ones(b, jnp.int32),
            beams=beams,
            new=room,
            stop=stop,
            pad=stop,
            length_penalty=length_penalty,
        )
        tokens = found.tokens[:, 0]
        read = jnp.pad(tokens, ((0, 0), (1, 0)), constant_values=start)[:, :-1]
        _, state = apply(memory, read, method="decode", mutable=["intermediates"])
        looked = captioner.looks(state["intermediates"], grid[0] * grid[1])
        return {
            "tokens": tokens,
            "lengths": found.lengths[:, 0],
            "score": found.scores[:, 0],
            "attention": looked.reshape(*tokens.shape, *grid),
        }

    return predict


# What is loaded, and what is shown


def make_load(model: Model, image_size: tuple[int, int]) -> Callable[..., Params]:
    """See `Task.load`: a captioner of the same architecture, or a ViT that becomes the encoder of one."""
    body = model.fields["body"]["vit"]

    def load(sources: Mapping[str, Opened], init_params: Params, *, classes: Sequence[str] | None = None) -> Params:
        opened = sources[""]
        backbone = images.load_backbone(opened, body, init_params, image_size)
        rest = {name: x for name, x in init_params.items() if name != "backbone"}
        if opened.description.model_type in CAPTIONERS:
            given = {name: x for name, x in opened.params.items() if name != "backbone"}
            check_fit(given, rest, opened.path)
            rest = given
        return {**rest, "backbone": backbone}

    return load


def make_write(words: Tokenizer) -> Callable[[Mapping[str, np.ndarray]], list[Written]]:
    """See `Task.write`."""

    def write(outputs: Mapping[str, np.ndarray]) -> list[Written]:
        found = [content(tokens[:length], words) for tokens, length in zip(outputs["tokens"], outputs["lengths"], strict=True)]
        return [Written(words.decode(tokens), functools.partial(by_word, tokens, words)) for tokens in found]

    return write


def content(tokens: Sequence[int], words: Tokenizer) -> list[int]:
    """The tokens before the first stop token, and behind the start token where there is one."""
    tokens = [int(i) for i in tokens]
    first = words.start_token is not None and tokens[:1] == [words.start_token]
    end = next((i for i, token in enumerate(tokens) if i >= first and token == words.stop_token), len(tokens))
    return tokens[first:end]


def by_word(tokens: Sequence[int], words: Tokenizer) -> list[tuple[str, list[int]]]:
    """Each word of a sentence, and the places of its tokens."""
    found: list[tuple[str, list[int]]] = []
    before = ""
    for place in range(len(tokens)):
        now = words.decode(tokens[: place + 1])
        piece = now[len(before) :] if now.startswith(before) else now
        if found and piece and not piece[0].isspace():
            found[-1] = found[-1][0] + piece, [*found[-1][1], place]
        elif piece.strip() or not found:
            found.append((piece.strip(), [place]))
        else:
            found[-1][1].append(place)
        before = now
    return found


def make_show(words: Tokenizer) -> Callable[..., Shown]:
    """(outputs, size of the upright image) → the sentence; drawn, where the decoder looked for each of its words."""
    write = make_write(words)

    def show(outputs: Mapping[str, np.ndarray], size: tuple[int, int]) -> Shown:
        written = write({name: outputs[name][None] for name in ("tokens", "lengths")})[0]

        def draw(image: Image.Image) -> Image.Image:
            small = pictures.resized(image.convert("RGB"), _PANEL)
            panels = [("", small)]
            for word, places in written.words():
                panels.append((word, pictures.heat_over(small, outputs["attention"][places].mean(axis=0))))
            rows = [panels[i : i + 5] for i in range(0, len(panels), 5)]
            return pictures.sheet(rows, printable(written.text))

        return Shown([printable(written.text)], {"caption": written.text, "score": float(outputs["score"])}, draw)

    return show


def make_preview(words: Tokenizer) -> Callable[[dict[str, np.ndarray], jax.Array | None], tuple[np.ndarray, list[str]]]:
    """See `Task.preview`: the images, and their sentences as the tokens say them."""

    def preview(batch: dict[str, np.ndarray], key: jax.Array | None) -> tuple[np.ndarray, list[str]]:
        sentences = [""] * len(batch["image"])
        if "tokens" in batch:
            sentences = [words.decode(content(tokens, words)) for tokens in batch["tokens"]]
        return images.pixels(batch["image"]), sentences

    return preview
