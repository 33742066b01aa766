"""One way to compute a ViT, as a worker of `benchmarks.side_by_side`: ours, the reference's, timm's or transformers'.

A job is {"peer", "model", "mode": "train", "infer" or "latency", "batch", "size", "dtype"} and "options": words among, for
torch, compile, max-autotune, autocast (else the whole model is in `dtype`), flash, cudnn; for all, hugepages: glibc then asks
Linux for pages of 2 MB; and for ours, devices: each core of the CPU is one. Training is softmax cross-entropy on integer
labels and SGD with momentum 0.9 in float32, without dropout or augmentation; a step's parameters feed the next. Images lie on
the device: uint8 with normalisation for ours, float32 for the others; but for latency, which is from uint8 on the host to
logits on the host. Every peer has its own form of GELU, "gelu" of its facts. "peak" is no peer but the rate of the machine's
matrix products.
"""

import math
import os
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from benchmarks import side_by_side

Job = dict[str, Any]
Repeat = Callable[[int], float]
NUM_CLASSES = 1000
LEARNING_RATE, MOMENTUM = 1e-3, 0.9
PEERS = ("ours", "reference", "timm", "transformers")


def job(text: str) -> Job:
    """What a command line says of a peer, such as timm:compile:autocast, as part of a job."""
    peer, *options = text.split(":")
    variables = {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"} if "hugepages" in options else {}
    if "devices" in options:
        variables |= {"XLA_FLAGS": f"--xla_force_host_platform_device_count={os.cpu_count()}"}
    return {"peer": peer, "options": options, "variables": variables}


def build(job: Job) -> tuple[Repeat, dict[str, Any]]:
    """The repetition of one step, and what is to be known about it."""
    if job["peer"] == "peak":
        return _peak(job)
    if job["peer"] in ("timm", "transformers"):
        return _torch(job)
    return (_ours if job["peer"] == "ours" else _reference)(job)


def _images(job: Job) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (job["batch"], job["size"], job["size"], 3), np.uint8)
    return images, rng.integers(0, NUM_CLASSES, job["batch"], np.int32)


def _normalised(images: np.ndarray) -> np.ndarray:
    return (images.astype(np.float32) - 127.5) / 127.5


def _timed(step: Callable[[], Any], wait: Callable[[Any], Any]) -> Repeat:
    """n → the seconds of one of n steps, of which only the last is waited for."""

    def repeat(n: int) -> float:
        started = time.perf_counter()
        for _ in range(n):
            result = step()
        wait(result)
        return (time.perf_counter() - started) / n

    return repeat


def _ours(job: Job) -> tuple[Repeat, dict[str, Any]]:
    import jax

    from configs import pretrain
    from vit_jax import models
    from vit_jax.data.device import augment
    from vit_jax.optimize import parallel
    from vit_jax.run import experiment, runtime, start
    from vit_jax.settings import Settings
    from vit_jax.tools import abstract

    runtime.set_up(None)  # as every command does, but for the folder of compiled programs
    images, labels = _images(job)
    if job["mode"] in ("infer", "latency"):
        model = models.get_model(job["model"], num_classes=NUM_CLASSES, dtype=job["dtype"])
        if job["mode"] == "latency":
            params = jax.jit(lambda: model.init(jax.random.key(0), augment.normalize(images))["params"])()
            classify = jax.jit(lambda p, x: model.apply({"params": p}, augment.normalize(x)))
            return _timed(lambda: np.asarray(classify(params, images)), lambda _: None), _facts_of_jax(params)
        parallelism = parallel.Pmap()
        params = parallelism.create(lambda: model.init(jax.random.key(0), augment.normalize(images[:1]))["params"])
        classify = parallelism.eval_examples(lambda p, x: model.apply({"params": p}, augment.normalize(x["image"])))
        batch = parallelism.send({"image": images})
        repeat = _timed(lambda: classify(params, batch), jax.block_until_ready)
        return repeat, _facts_of_jax(params)

    config = pretrain.get_config("b16,imagenet2012")
    config.model = models_config(job["model"])
    config.pp.crop, config.pp.flip = job["size"], False
    config.update({"batch": job["batch"], "accum_steps": 1, "dtype": job["dtype"], "grad_norm_clip": None})
    config.update({"optimizer": "sgd", "optim_dtype": "float32", "weight_decay": 0.0, "base_lr": LEARNING_RATE})
    e = abstract.build(Settings.from_config(config), num_classes=NUM_CLASSES)
    update = experiment.make_update(e)
    state = start.new_state(e)
    facts = _facts_of_jax(state.params)
    batch = e.parallelism.send({"image": images, "label": labels, "seed": np.arange(len(labels), dtype=np.uint32)})
    holder = [state]
    del state  # donated

    def step() -> Any:
        holder[0], metrics = update(holder[0], batch)
        return metrics

    return _timed(step, jax.block_until_ready), facts


def models_config(name: str):
    """The named architecture as `config.model` holds it, without dropout."""
    from configs import models

    config = models.MODEL_CONFIGS[name].copy_and_resolve_references()
    config.transformer.update({"dropout_rate": 0.0, "attention_dropout_rate": 0.0})
    return config


def _reference(job: Job) -> tuple[Repeat, dict[str, Any]]:
    import jax
    import optax
    from flax import jax_utils

    from benchmarks import reference_way

    devices = jax.local_device_count()
    pixels, labels = _images(job)
    images = _normalised(pixels).reshape(devices, -1, *pixels.shape[1:])
    onehot = np.eye(NUM_CLASSES, dtype=np.float32)[labels].reshape(devices, -1, NUM_CLASSES)
    vit = reference_way.model(job["model"], NUM_CLASSES)
    params = jax.jit(vit.init)(jax.random.key(0), images[0, :1])["params"]
    facts = _facts_of_jax(params, replicas=1)
    if job["mode"] == "latency":
        run = jax.jit(lambda p, x: vit.apply({"params": p}, x))
        return _timed(lambda: np.asarray(run(params, _normalised(pixels))), lambda _: None), facts
    images = jax.pmap(lambda x: x)(images)
    if job["mode"] == "infer":
        params = jax_utils.replicate(params)
        classify = jax.pmap(lambda p, x: vit.apply({"params": p}, x))
        return _timed(lambda: classify(params, images), jax.block_until_ready), facts
    optimizer = optax.sgd(LEARNING_RATE, MOMENTUM)
    update = reference_way.make_update(vit, optimizer)
    onehot = jax.pmap(lambda x: x)(onehot)
    holder = [jax_utils.replicate(params), jax_utils.replicate(optimizer.init(params))]

    def step() -> Any:
        *holder[:], loss = update(*holder, images, onehot)
        return loss

    return _timed(step, jax.block_until_ready), facts


def _facts_of_jax(params: Any, replicas: int | None = None) -> dict[str, Any]:
    import jax

    leaves = jax.tree.leaves(params)
    count = sum(math.prod(x.shape) for x in leaves)
    if replicas is None:
        replicas = sum(x.size for x in leaves) // sum(x.addressable_data(0).size for x in leaves)
    return {"parameters": count // replicas, "gelu": "tanh", "device": jax.devices()[0].device_kind}


def _torch(job: Job) -> tuple[Repeat, dict[str, Any]]:
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    options, dtype = job.get("options", ()), getattr(torch, job["dtype"])
    autocast = "autocast" in options
    model, gelu, logits_of = (_timm if job["peer"] == "timm" else _transformers)(job)
    model = model.to(device, torch.float32 if autocast else dtype)
    parameters = sum(p.numel() for p in model.parameters())
    images, labels = _images(job)
    x = torch.from_numpy(_normalised(images).transpose(0, 3, 1, 2).copy()).to(device, torch.float32 if autocast else dtype)
    y = torch.from_numpy(labels.astype(np.int64)).to(device)
    training = job["mode"] == "train"
    model.train(training)
    optimizer = torch.optim.SGD(model.parameters(), LEARNING_RATE, MOMENTUM, fused=device == "cuda") if training else None
    run = model
    if "compile" in options or "max-autotune" in options:
        run = torch.compile(model, mode="max-autotune" if "max-autotune" in options else None)
    cast = torch.autocast(device, dtype, enabled=autocast)
    backend = {"flash": "FLASH_ATTENTION", "cudnn": "CUDNN_ATTENTION"}
    chosen = [getattr(torch.nn.attention.SDPBackend, backend[word]) for word in options if word in backend]

    def forward() -> torch.Tensor:
        with cast:
            return logits_of(run(x))

    def from_host_to_host() -> np.ndarray:
        pixels = torch.from_numpy(images).to(device).permute(0, 3, 1, 2).to(x.dtype)
        with torch.inference_mode(), cast:
            return logits_of(run((pixels - 127.5) / 127.5)).float().cpu().numpy()

    def train() -> torch.Tensor:
        with cast:
            loss = torch.nn.functional.cross_entropy(logits_of(run(x)).float(), y)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    def step() -> torch.Tensor:
        if training:
            return train()
        with torch.inference_mode():
            return forward()

    once = from_host_to_host if job["mode"] == "latency" else step

    def with_backend() -> torch.Tensor | np.ndarray:
        if not chosen:
            return once()
        with torch.nn.attention.sdpa_kernel(chosen):
            return once()

    def wait(_: torch.Tensor) -> None:
        if device == "cuda":
            torch.cuda.synchronize()

    name = torch.cuda.get_device_name() if device == "cuda" else "cpu"
    facts = {"parameters": parameters, "gelu": gelu, "device": name, "threads": torch.get_num_threads()}
    return _timed(with_backend, wait), facts


def _timm(job: Job) -> tuple[Any, str, Callable]:
    from tests.models.torch_peer import without_torchvision

    with without_torchvision():
        import timm

    size, patch = job["model"].removeprefix("ViT-").split("_")
    name = {"Ti": "tiny", "S": "small", "B": "base", "L": "large", "H": "huge"}[size]
    model = timm.create_model(f"vit_{name}_patch{patch}_224", img_size=job["size"], num_classes=NUM_CLASSES)
    return model, "erf", lambda logits: logits


def _transformers(job: Job) -> tuple[Any, str, Callable]:
    from transformers import ViTConfig, ViTForImageClassification

    fields = models_config(job["model"])
    config = ViTConfig(
        hidden_size=fields.hidden_size,
        num_hidden_layers=fields.transformer.num_layers,
        num_attention_heads=fields.transformer.num_heads,
        intermediate_size=fields.transformer.mlp_dim,
        image_size=job["size"],
        patch_size=fields.patches.size[0],
        num_labels=NUM_CLASSES,
        attn_implementation="sdpa",
    )
    return ViTForImageClassification(config), "erf", lambda output: output.logits


def _peak(job: Job) -> tuple[Repeat, dict[str, Any]]:
    """Products of two square matrices, by the faster of XLA and torch."""
    n = job["batch"]
    flops = 2 * n**3
    found = {}
    try:
        import torch

        x = torch.randn(n, n, dtype=getattr(torch, job["dtype"]))
        found["torch"] = _timed(lambda: x @ x, lambda _: None)
    except ImportError:
        pass
    import jax
    import jax.numpy as jnp

    y = jax.random.normal(jax.random.key(0), (n, n), jnp.dtype(job["dtype"]))
    product = jax.jit(jnp.matmul)
    found["xla"] = _timed(lambda: product(y, y), jax.block_until_ready)
    rates = {name: flops / min(repeat(1) for _ in range(5)) for name, repeat in found.items()}
    return found[max(rates, key=rates.get)], {"rates": rates, "flops": flops}


if __name__ == "__main__":
    side_by_side.serve(build)
