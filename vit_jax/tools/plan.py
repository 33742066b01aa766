"""Tells what a recipe takes before it is run, and whether that fits.

    python -m vit_jax.plan --config=pretrain:b16,imagenet2012 --devices=8 --memory=80
    python -m vit_jax.plan --config=vit:b16,photos --devices=1 --memory=24 --config.batch=64
    python -m vit_jax.plan --config=pretrain:b16,imagenet2012 --config.dtype=bfloat16 --platform=cuda
    python -m vit_jax.plan --config=pretrain:b16,imagenet2012 --config.dtype=bfloat16 --devices=8 --accelerator=H100

Parameters, memory of a device, FLOPs and traffic of one training step on so many devices, from the very step that
`vit_jax.main` runs, compiled by XLA for virtual CPU devices. Nothing is allocated. GB are 10⁹ bytes.

For a GPU or TPU the step is also lowered, on whatever machine this is, and the plan tells the kernels that only run there.
What XLA there makes of it is not known: temporaries, results and traffic are those of the program for CPUs.
With --accelerator the time of a step is predicted from that one's published peaks (vit_jax/tools/roofline.py).
"""

import dataclasses
import math
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from absl import flags

from vit_jax import models, overrides
from vit_jax.errors import UserError
from vit_jax.optimize import parallel
from vit_jax.optimize.step import State
from vit_jax.run.experiment import Experiment, make_update
from vit_jax.settings import Settings
from vit_jax.tools import hlo, roofline
from vit_jax.tools.abstract import abstract_arguments, build, host_state, step_flops, step_products

_DEVICES = flags.DEFINE_integer("devices", 8, "How many devices share the work.", lower_bound=1)
_MEMORY = flags.DEFINE_float("memory", None, "GB that each has. The accelerator's if not given, else 80.", lower_bound=0)
_NUM_CLASSES = flags.DEFINE_integer("num_classes", 1000, "Of a tfds dataset, which is not looked for.", lower_bound=1)
_PLATFORM = flags.DEFINE_string("platform", None, "cpu, cuda or tpu: where the step is to run. This machine's if not given.")
_ACCELERATOR = flags.DEFINE_string("accelerator", None, f"Predict a step's time on this: {', '.join(roofline.ACCELERATORS)}.")

Tree = Any
PLATFORMS = ("cpu", "cuda", "tpu")
GB = 1e9
_JAX_SHARE = 0.75  # of a GPU's memory that JAX takes, unless told otherwise

# XLA's passes for CPUs would merge what remat computes again with the first time, and keep bfloat16 as float32.
NEARER_TO_A_GPU = {
    "xla_disable_hlo_passes": "cse_barrier_expander,while-loop-invariant-code-motion",
    "xla_allow_excess_precision": False,
    "xla_cpu_scheduler_type": "CPU_SCHEDULER_TYPE_MEMORY_OPTIMIZED",
}
# The program is not run. Buffers are assigned before LLVM sees it, whose work would take most of the time for large models.
_NOT_TO_BE_RUN = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}


@dataclasses.dataclass(frozen=True)
class Plan:
    """What a training step takes. Memory is in bytes a device.

    Attributes:
      parameters: how many numbers the model has, and `trained` how many of them, or beside them, are trained.
      state: bytes by part: parameters, optimizer, average, frozen.
      shared_state: bytes of the state if an fsdp mesh of all devices shared it out.
      canvases: (h, w) that images are padded to, by area, where there are several; all figures are of a step on the last.
      batch, prefetched: bytes of a batch, and of those that wait on the device.
      temporaries: bytes of activations, gradients and scratch, by XLA's own buffer assignment; `gradients` is how much
        the gradients would take for themselves.
      results: bytes of what a step returns beyond the state, which it writes in place.
      model_flops, flops: of a step and whole batch: as the model is written, and with what is computed again.
      sent: bytes that a device sends to others in a step, by kind of collective, see `hlo.Collective`.
      kernels: the kernels of `platform` that the step calls by name, such as cuDNN's. `temporaries`, `results` and `sent` are
        those of the program for CPUs, whatever the platform.
      seconds: how long planning took.
    """

    settings: Settings
    model_name: str
    num_classes: int
    platform: str
    kernels: tuple[str, ...]
    devices: int
    layout: str
    batch_shards: int
    parameters: int
    trained: int
    state: dict[str, int]
    shared_state: int
    canvases: tuple[tuple[int, int], ...]
    batch: int
    prefetched: int
    temporaries: int
    gradients: int
    results: int
    model_flops: float
    flops: float
    sent: dict[str, float]
    seconds: float

    @property
    def needed(self) -> int:
        """The most that a step takes."""
        return sum(self.state.values()) + self.batch + self.prefetched + self.temporaries + self.results


def make_plan(config: Mapping[str, Any], *, num_classes: int = 1000, platform: str = "cpu") -> Plan:
    """Plans a recipe for as many devices as this process has. Raises UserError for whatever training would refuse.

    `num_classes` stands for those of a tfds dataset, which is not looked for; others are counted.
    """
    started = time.perf_counter()
    if platform not in PLATFORMS:
        raise UserError(f"unknown platform {platform!r}: use cpu, tpu, or cuda for NVIDIA's GPUs")
    settings = Settings.from_config(config)
    experiment = build(settings, num_classes)
    state, batch = abstract_arguments(experiment)
    update = make_update(experiment)
    kernels = () if platform == "cpu" else hlo.custom_calls(lower(update, state, batch, platform))
    compiled = update.lower(state, batch).compile(NEARER_TO_A_GPU | _NOT_TO_BE_RUN)
    memory = compiled.memory_analysis()
    parts = {"parameters": state.params, "optimizer": state.opt_state, "average": state.ema, "frozen": state.frozen}
    host = host_state(experiment)
    everything = parallel.Mesh(1, -1, 1)
    exchanged = hlo.collectives(compiled.as_text())
    model_flops = step_flops(settings, num_classes, remat="none")
    return Plan(
        settings=settings,
        model_name=_named(experiment),
        num_classes=experiment.train_source.num_classes,
        platform=platform,
        kernels=kernels,
        devices=jax.device_count(),
        layout=_layout(experiment),
        batch_shards=experiment.parallelism.batch_shards,
        parameters=_count(jax.eval_shape(experiment.init_params)),
        trained=_count(host.params),
        state={name: bytes_a_device(tree) for name, tree in parts.items()},
        shared_state=bytes_a_device(everything.state_shapes(host)),
        canvases=experiment.task.canvases.sizes if experiment.task.canvases else (),
        batch=bytes_a_device(batch),
        prefetched=settings.prefetch * bytes_a_device(batch),
        temporaries=memory.temp_size_in_bytes,
        gradients=bytes_a_device(experiment.parallelism.state_shapes(host.params, "grads")),
        results=memory.output_size_in_bytes - memory.alias_size_in_bytes,
        model_flops=model_flops,
        flops=model_flops if settings.remat == "none" else step_flops(settings, num_classes, remat=settings.remat),
        sent={kind: sent for kind in hlo.KINDS if (sent := hlo.sent_bytes(exchanged, kind))},
        seconds=time.perf_counter() - started,
    )


def _named(experiment: Experiment) -> str:
    """The model's name, and how its ViT attends where that is not by a softmax over all tokens."""
    kind, fields = experiment.task.model.type, experiment.task.model.fields
    transformer = models.architecture_of(kind).vit_fields(fields).get("transformer") or {}
    attention = transformer.get("attention", "softmax")
    size = f" of {transformer['window_size']}" if attention == "window" else ""
    return (fields.get("model_name") or kind) + f", attention={attention}{size}" * (attention != "softmax")


def predict(p: Plan, accelerator: roofline.Accelerator) -> roofline.Prediction:
    """How long the step takes on as many of these as the plan has devices."""
    settings = p.settings
    work = step_products(settings, p.num_classes, platform=accelerator.platform, batch_shards=p.batch_shards)
    state = sum(p.state.values()) - p.state["frozen"]
    optimizer = hlo.Work(0.0, 2 * state + (2 * settings.accum_steps - 1) * p.gradients, 1)  # reads all, and writes the state
    return roofline.predict(
        [*work, optimizer],
        accelerator=accelerator,
        dtype=settings.dtype,
        model_flops=p.model_flops,
        devices=p.devices,
        sent=sum(p.sent.values()),
    )


def lower(update: Callable[[State, dict], tuple[State, dict]], state: State, batch: dict, platform: str) -> str:
    """The text of the step that runs on such a platform, whatever this machine has, before XLA optimises it."""
    return jax.jit(update).trace(state, batch).lower(lowering_platforms=(platform,)).as_text()


def bytes_a_device(tree: Tree) -> int:
    """What the arrays of a tree, or their shapes and shardings, take on each device."""

    def size(x: Any) -> int:
        shape = x.sharding.shard_shape(x.shape)
        return jnp.dtype(x.dtype).itemsize * math.prod(shape)

    return sum(map(size, jax.tree.leaves(tree)))


def report(p: Plan, memory: float) -> str:
    """A plan in words; `memory` is what a device has, in GB."""
    settings = p.settings
    micro_batch = settings.batch // p.batch_shards // settings.accum_steps
    per_step = f"batch {settings.batch:,} in {settings.accum_steps} micro-batch(es) of {micro_batch} a device"
    again = f", {p.flops:.3g} with what remat={settings.remat} computes again" if settings.remat != "none" else ""
    trained = "" if p.trained == p.parameters else f", {p.trained:,} of them or beside them trained"
    rows = [(name, size) for name, size in p.state.items() if size]
    rows += [("batch", p.batch), (f"{settings.prefetch} batches ahead", p.prefetched)]
    rows += [("temporaries", p.temporaries), ("results", p.results), ("in all", p.needed)]
    width = max(len(name) for name, _ in rows)
    lines = [
        f"model    {p.model_name}, {p.parameters:,} parameters{trained}, {p.num_classes:,} classes",
        f"devices  {p.devices}, {p.layout}, {settings.dtype}, remat={settings.remat}, scan={settings.scan}",
        f"step     {per_step}, {p.model_flops:.3g} FLOPs{again}",
        *([f"canvases {_canvases(p)}"] if p.canvases else []),
        *([] if p.platform == "cpu" else [f"kernels  {_kernels(p)}"]),
        "memory   GB a device",
        *(f"  {name:{width}} {size / GB:9.3f}" for name, size in rows),
        f"  Temporaries are activations, scratch, and gradients ({p.gradients / GB:.3f}), as XLA lays them out for a CPU.",
        f"  While a checkpoint is written, a copy of the state comes on top: {sum(p.state.values()) / GB:.3f}.",
        "traffic  " + (_traffic(p) if p.sent else "none"),
        *_verdict(p, memory),
        *_not_known(p),
        f"planned in {p.seconds:.0f} s",
    ]
    return "\n".join(lines)


def _canvases(p: Plan) -> str:
    *others, largest = (f"{height}x{width}" for height, width in p.canvases)
    return f"the step and its memory are those of the largest, {largest}; of {', '.join(others)} they are less"


def _kernels(p: Plan) -> str:
    if not p.kernels:
        return f"of the step for {p.platform}: XLA's own alone"
    divided = "; what XLA divides among the devices is cuDNN's attention" if hlo.DIVIDED in p.kernels else ""
    return f"of the step for {p.platform}: {', '.join(p.kernels)}, and XLA's own{divided}"


def _not_known(p: Plan) -> list[str]:
    """What this machine cannot tell of another platform."""
    if p.platform == "cpu":
        return []
    return [
        f"known for {p.platform}: parameters, optimizer, average, frozen, batch, gradients, and FLOPs as the model is written",
        "  not known here: temporaries, results and traffic, which are those of the step for CPUs; XLA lays out others there",
    ]


def _traffic(p: Plan) -> str:
    kinds = ", ".join(f"{kind} {sent / GB:.3f}" for kind, sent in p.sent.items())
    return f"{sum(p.sent.values()) / GB:.3f} GB sent by a device in a step: {kinds}"


def _verdict(p: Plan, memory: float) -> list[str]:
    needed = p.needed / GB
    if needed <= memory:
        lines = [f"fits     {needed:.1f} of {memory:g} GB a device"]
        if needed > _JAX_SHARE * memory:
            lines += [f"  JAX takes only {_JAX_SHARE:.0%} of a GPU by itself: set XLA_PYTHON_CLIENT_MEM_FRACTION=0.95."]
        return lines
    return [f"does not fit: {needed:.1f} GB a device are needed, {memory:g} are there", *(f"  {x}" for x in _advice(p, memory))]


def _advice(p: Plan, memory: float) -> list[str]:
    """What would make it smaller, the larger part first."""
    settings, state = p.settings, sum(p.state.values())
    of_state, of_temporaries = [], []
    if p.shared_state < 0.9 * state:
        shares = "--config.parallel=mesh --config.mesh.data=1 --config.mesh.fsdp=-1 --config.mesh.tensor=1"
        of_state += [f"{shares} shares the state out: {p.shared_state / GB:.1f} GB a device instead of {state / GB:.1f}"]
    elif state > memory * GB:
        of_state += [f"the state alone takes {state / GB:.1f} GB a device: plan for more --devices"]
    if settings.optim_dtype == "float32" and p.state["optimizer"] > 0.1 * p.needed:
        of_state += ["--config.optim_dtype=bfloat16 halves the momentum"]
    if settings.remat != "full":
        of_temporaries += ["--config.remat=full keeps of every block only its input, for about a quarter more FLOPs"]
    if (share := settings.batch // p.batch_shards) > settings.accum_steps:
        steps = next(n for n in range(2 * settings.accum_steps, share + 1) if share % n == 0)
        of_temporaries += [f"--config.accum_steps={steps} computes the batch in smaller parts"]
    else:
        of_temporaries += ["a micro-batch is one example already: a tensor axis shares out the work on it"]
    if settings.dtype == "float32":
        of_temporaries += ["--config.dtype=bfloat16 halves the activations"]
    mostly_state = state + p.gradients > p.temporaries - p.gradients  # what shares the state out does so with gradients
    return of_state + of_temporaries if mostly_state else of_temporaries + of_state


def _layout(experiment: Experiment) -> str:
    if not isinstance(experiment.parallelism, parallel.Mesh):
        return "pmap"
    sizes = " x ".join(f"{axis} {n}" for axis, n in experiment.parallelism.mesh.shape.items())
    return f"mesh {sizes}, rules {experiment.settings.mesh.rules}"


def _count(tree: Tree) -> int:
    return sum(math.prod(x.shape) for x in jax.tree.leaves(tree))


def use_devices(n: int) -> None:
    """Has this process work with so many virtual devices; to be called before anything asks for them."""
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", n)


def this_platform() -> str:
    """Of this machine. Its accelerators, on which a run may be, are not touched."""
    devices = Path("/dev")
    if any(devices.glob("nvidia[0-9]*")):
        return "cuda"
    return "tpu" if any(devices.glob("accel[0-9]*")) else "cpu"


def main() -> int:
    """Prints the plan; exit code 0 if it fits, 1 if not."""
    config = overrides.CONFIG.value
    if config is None:
        raise UserError("--config is missing: --config=RECIPE[:ARGUMENT]")
    accelerator = roofline.find(_ACCELERATOR.value) if _ACCELERATOR.value else None
    platform = _PLATFORM.value or (accelerator.platform if accelerator else this_platform())
    if accelerator and platform != accelerator.platform:
        raise UserError(f"--accelerator={_ACCELERATOR.value} has --platform={accelerator.platform}, not {platform}")
    memory = _MEMORY.value if _MEMORY.value is not None else accelerator.memory / GB if accelerator else 80.0
    use_devices(_DEVICES.value)
    plan = make_plan(config, num_classes=_NUM_CLASSES.value, platform=platform)
    print(report(plan, memory))
    if accelerator:
        s = plan.settings
        facts = {"model_flops": plan.model_flops, "devices": plan.devices, "batch": s.batch, "dtype": s.dtype}
        print("\n".join(roofline.in_words(predict(plan, accelerator), accelerator=accelerator, **facts)))
    return 0 if plan.needed <= memory * GB else 1


def cli() -> None:
    """The console command."""
    overrides.run(main, __doc__, ("devices", "memory", "num_classes", "platform", "accelerator"))
