"""ONNX by jax2onnx, and the quantisers of onnxruntime. None of them is imported before it is needed."""

import contextlib
import dataclasses
import logging
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Shaped

from vit_jax.errors import UserError
from vit_jax.export.plain import named, plain
from vit_jax.export.program import Program
from vit_jax.files import json_text

NEEDED = ("onnx", "onnx_ir", "onnxruntime", "jax2onnx")
INSTALL = "pip install onnx onnx-ir onnxruntime && pip install --no-deps jax2onnx"
"""The dependencies that jax2onnx names want an older orbax-checkpoint than training does, and nothing of them is used."""
OPSET = 21
"""That of onnxruntime 1.18 and later; jax2onnx writes a newer one by default."""
BLOCK = 64
"""Inputs that share a scale in weights of 8 bits: all widths of the named ViTs are multiples."""
IN_8_BITS = 4
"""The `accuracy_level` of `MatMulNBits` that lets CPUs make activations 8-bit numbers, too, block by block."""
Model = Any  # onnx.ModelProto


def convert(program: Program) -> Model:
    """A graph of any number of images."""
    import jax2onnx

    if program.predictor.task.write is not None:
        source = program.predictor.source
        raise UserError(f"{source} writes sentences word by word, in a loop: it is exported by --to=stablehlo alone")
    (batch,) = jax.export.symbolic_shape("batch")
    example = program.example(batch)
    function = dataclasses.replace(program, dtype="float32").function(program.predictor.params, named)
    outputs = plain(function, example)
    names = sorted(jax.eval_shape(function, example))
    with _quiet(), _refusing(), _restoring():
        model = jax2onnx.to_onnx(
            lambda images: [y for _, y in sorted(outputs(images).items())],
            [example],
            model_name=program.predictor.description.model_name or "vit_jax",
            opset=OPSET,
            input_names=["image"],
            output_names=names,
            normalization_mode="prefer_native",
        )
    _gemm_to_matmul(model)
    return model if program.dtype == "float32" else _half(model)


@contextlib.contextmanager
def _refusing() -> Iterator[None]:
    """Says in words what jax2onnx cannot convert."""
    try:
        yield
    except NotImplementedError as e:
        raise UserError(f"jax2onnx cannot convert this model ({str(e).splitlines()[0]}): try --to=stablehlo") from e


@contextlib.contextmanager
def _restoring() -> Iterator[None]:
    """Undoes what jax2onnx leaves changed in JAX: a cumsum that takes fewer kinds of arguments."""
    cumsum = jnp.cumsum
    try:
        yield
    finally:
        jnp.cumsum = cumsum


def _half(model: Model) -> Model:
    """The same in float16, but for inputs and outputs, and the softmax of attention."""
    from onnxruntime.transformers import float16

    kept = [*float16.DEFAULT_OP_BLOCK_LIST, "Softmax"]
    with _quiet():
        return float16.convert_float_to_float16(model, keep_io_types=True, disable_shape_infer=True, op_block_list=kept)


def _gemm_to_matmul(model: Model) -> None:
    """Products of matrices that are written as Gemm become MatMul, which is what the quantisers for CPUs look for."""
    import onnx

    product, dropped = {"alpha": 1.0, "beta": 0.0, "transA": 0, "transB": 0}, set()
    for node in model.graph.node:
        options = {x.name: onnx.helper.get_attribute_value(x) for x in node.attribute}
        if node.op_type == "Gemm" and product | {"beta": 1.0} | options == product:
            node.op_type = "MatMul"
            dropped |= set(node.input[2:])
            del node.input[2:], node.attribute[:]
    dropped -= {name for node in model.graph.node for name in node.input}
    kept = [x for x in model.graph.initializer if x.name not in dropped]
    del model.graph.initializer[:]
    model.graph.initializer.extend(kept)


def _add_facts(model: Model, facts: Mapping[str, Any]) -> None:
    """Writes them into the metadata, as JSON what is no text."""
    import onnx

    onnx.helper.set_model_props(
        model, {k: x if isinstance(x, str) else json_text(x) for k, x in facts.items() if x is not None}
    )
    model.producer_name = "vit_jax"


def to_bytes(
    program: Program, facts: Mapping[str, Any], int8: str | None, images: Sequence[Shaped[np.ndarray, "1 h w 3"]]
) -> bytes:
    """The file, with `facts` as metadata; `int8` and `images` are those of `quantise`."""
    model = convert(program)
    if int8:
        model = quantise(model, int8, images)
    _add_facts(model, facts)
    return model.SerializeToString()


def run(data: bytes, images: Shaped[np.ndarray, "b h w 3"]) -> dict[str, np.ndarray]:
    """What onnxruntime makes of images, on the CPU."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(data, options, providers=["CPUExecutionProvider"])
    names = [y.name for y in session.get_outputs()]
    return dict(zip(names, session.run(names, {"image": images}), strict=True))


# Numbers of 8 bits


def quantise(model: Model, kind: str, images: Sequence[Shaped[np.ndarray, "1 h w 3"]] = ()) -> Model:
    """The kernels as 8-bit numbers.

    "weights": `MatMulNBits`, which computes as the runtime can; a scale for every `BLOCK` inputs of an output.
    "dynamic": products of 8-bit numbers; the scale of an activation is found when it is there, that of a kernel by output.
    "static": the same with scales of activations that are found now, on `images`.
    """
    quantiser, operator = QUANTISERS[kind]
    with _quiet():
        quantised = quantiser(model, images)
    if not any(node.op_type == operator for node in quantised.graph.node):
        raise UserError("this model has no product of matrices of which kernels of 8 bits could be made")
    return quantised


def _weights(model: Model, images: Sequence[Any]) -> Model:
    from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer

    quantizer = MatMulNBitsQuantizer(model, bits=8, block_size=BLOCK, is_symmetric=True, accuracy_level=IN_8_BITS)
    quantizer.process()
    return quantizer.model.model


def _dynamic(model: Model, images: Sequence[Any]) -> Model:
    from onnxruntime.quantization import QuantType, quantize_dynamic

    with _prepared(model) as (source, target):
        quantize_dynamic(source, target, op_types_to_quantize=["MatMul"], per_channel=True, weight_type=QuantType.QInt8)
        return _read(target)


def _static(model: Model, images: Sequence[Any]) -> Model:
    """Products with kernels, as simplified with their biases, of which onnxruntime makes whole operators of 8 bits.

    A bias beside a product would be joined to it in float32 when the file is opened. Attention stays in float32.
    """
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static

    class Reader(CalibrationDataReader):
        def __init__(self):
            self.batches = iter(images)

        def get_next(self) -> dict[str, Any] | None:
            return next(({"image": x} for x in self.batches), None)

    products = ["MatMul", "Gemm"]
    with _prepared(model) as (source, target):
        graph = _read(source).graph
        kernels = {x.name for x in graph.initializer}
        others = [node.name for node in graph.node if node.op_type in products and node.input[1] not in kernels]
        quantize_static(
            source,
            target,
            Reader(),
            quant_format=QuantFormat.QDQ,
            op_types_to_quantize=products,
            nodes_to_exclude=others,
            per_channel=True,
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
            # To adjust scales of kernels to biases fails where there is a scale for every output (onnxruntime 1.32).
            extra_options={"OpTypesToExcludeOutputQuantization": products, "QDQDisableWeightAdjustForInt32Bias": True},
        )
        return _read(target)


QUANTISERS = {
    "weights": (_weights, "MatMulNBits"),
    "dynamic": (_dynamic, "MatMulInteger"),
    "static": (_static, "QuantizeLinear"),
}
"""What makes kernels of 8 bits, and an operator that it leaves."""
FASTEST = "dynamic"
"""On CPUs, as `benchmarks.export` measures them."""


@contextlib.contextmanager
def _prepared(model: Model) -> Iterator[tuple[str, str]]:
    """A file with the model, simplified so that equal activations are quantised once, and the name of one to be written."""
    import onnx
    from onnxruntime.quantization.shape_inference import quant_pre_process

    with tempfile.TemporaryDirectory() as folder:
        source, target = str(Path(folder, "float.onnx")), str(Path(folder, "int8.onnx"))
        onnx.save(model, source)
        quant_pre_process(source, source, skip_symbolic_shape=True)
        yield source, target


def _read(path: str) -> Model:
    import onnx

    return onnx.load(path)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """The libraries tell of every operation; errors are raised anyway."""
    import onnxruntime

    onnxruntime.set_default_logger_severity(3)
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(before)
        onnxruntime.set_default_logger_severity(2)
