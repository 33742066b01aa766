"""A predictor as a file of one of the formats, and JSON beside: converted, compared with the model, and left if it agrees."""

import functools
import importlib.util
import os
from collections.abc import Sequence
from pathlib import Path
from typing import BinaryIO

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Shaped

from vit_jax import arguments
from vit_jax.checkpoint import token_files
from vit_jax.data.host.inputs import read_files
from vit_jax.data.listing import find_images, shown
from vit_jax.errors import UserError, say, unknown
from vit_jax.export import onnx_graph, stablehlo
from vit_jax.export.program import DTYPES, Program, difference, random_pixels, reference
from vit_jax.files import write_atomically, write_json
from vit_jax.finite import check_outputs
from vit_jax.predictor import Predictor

FORMATS = {"onnx": onnx_graph, "stablehlo": stablehlo}
TOLERANCES = {"float32": 1e-4, "float16": 2e-2, "int8": 0.3}
"""How far the largest difference may go, relative to the largest output where that is above 1."""
MOST_BYTES = 2**31 - 2**24
"""Of parameters in a file of protobuf or flatbuffers, with room for the program."""
MOST_CALIBRATED = 128
"""Images that scales are found on."""


def check(out: str | os.PathLike, *, to: str, dtype: str, int8: str | None, calibrate: str | os.PathLike | None) -> Path:
    """The file to be written, OUT. UserError for options that do not go together and missing libraries, before any work."""
    for kind, name, known in (("format", to, FORMATS), ("dtype", dtype, DTYPES), ("int8", int8, onnx_graph.QUANTISERS)):
        if name is not None and name not in known:
            raise unknown(kind, name, known)
    path = arguments.output_file(os.fspath(out), [f".{to}"], "OUT")
    if int8 and (to != "onnx" or dtype != "float32"):
        raise UserError(f"--int8={int8} is for --to=onnx and --dtype=float32, of which kernels of 8 bits are made")
    if (int8 == "static") != (calibrate is not None):
        raise UserError("--int8=static and --calibrate=FOLDER go together: scales of activations are found on its images")
    if missing := [name for name in FORMATS[to].NEEDED if importlib.util.find_spec(name) is None]:
        raise UserError(f"--to={to} needs {', '.join(missing)}: {FORMATS[to].INSTALL}")
    return path


def write(
    predictor: Predictor,
    out: str | os.PathLike,
    *,
    to: str = "onnx",
    dtype: str = "float32",
    int8: str | None = None,
    calibrate: str | os.PathLike | None = None,
    preprocess: bool = False,
) -> Path:
    """Writes OUT and OUT.json, and tells how far the outputs are from the model's.

    Args:
      to: "onnx" or "stablehlo", with which `out` ends.
      dtype: "float32" or "float16", of kernels and layers.
      int8: "weights", "dynamic" or "static", see `onnx_graph.quantise`; `calibrate` is a folder of images for "static".
      preprocess: take uint8 images, and normalise them inside.

    Raises:
      UserError: as `check`, for what is too large for the format, and for a file whose outputs are not the model's.
    """
    path = check(out, to=to, dtype=dtype, int8=int8, calibrate=calibrate)
    program = Program(predictor, dtype, preprocess)
    _check_size(program, int8)
    facts = program.facts() | ({"int8": int8} if int8 else {})
    tokenizer = {file: path.with_name(f"{path.name}.{file.name}") for file in predictor.task.files if predictor.task.write}
    if tokenizer:
        facts["text"]["files"] = [copy.name for copy in tokenizer.values()]
    images = _calibration(program, os.fspath(calibrate)) if calibrate else ()
    data = stablehlo.to_bytes(program) if to == "stablehlo" else onnx_graph.to_bytes(program, facts, int8, images)
    tolerance = TOLERANCES["int8" if int8 else dtype]

    def written(file: BinaryIO) -> None:
        file.write(data)
        found = _compare(program, functools.partial(FORMATS[to].run, data))
        say(f"largest difference from the model on random images {found:.1e}, allowed are {tolerance:.0e}")
        if not found <= tolerance:
            raise UserError(f"{shown(path)} is not written: it computes something else than {predictor.source}")

    write_atomically(path, written)
    beside = path.with_name(f"{path.name}.json")
    write_json(beside, facts)
    for file, copy in tokenizer.items():
        token_files.copy(file, copy)
    say(f"wrote {shown(path)}, {len(data) / 1e6:.1f} MB, and {shown(beside)}")
    return path


def _check_size(program: Program, int8: str | None) -> None:
    """Raises UserError for parameters that no file of protobuf or flatbuffers holds. The quantisers read one in float32."""
    bytes_each = 1 if int8 == "weights" else jnp.dtype(program.dtype).itemsize
    size = bytes_each * sum(x.size for x in jax.tree.leaves(program.predictor.params))
    if size > MOST_BYTES:
        raise UserError(
            f"the parameters of {program.predictor.source} take {size / 2**30:.1f} GiB, a file of either format holds 2: use "
            "--dtype=float16, or --to=onnx --int8=weights"
        )


def _calibration(program: Program, folder: str) -> Sequence[Shaped[np.ndarray, "1 h w 3"]]:
    """Images of a folder, evenly chosen, each as a batch that the program takes."""
    paths = list(find_images([folder]))
    chosen = paths[:: -(-len(paths) // MOST_CALIBRATED)]

    def failed(path: Path, why: str) -> None:
        raise UserError(f"{shown(path)}: {why}")

    images = [program.predictor.largest_example(x)["image"] for _, x in read_files(chosen, ahead=8, failed=failed)]
    return [program.inputs(np.clip(np.rint(x), 0, 255).astype(np.uint8)[None]) for x in images]


def _compare(program: Program, run: functools.partial) -> float:
    """The largest difference of the file's outputs from the model's, for one image and for three."""
    drawn = random_pixels(program.predictor.image_size, 3)
    expected = reference(program.predictor)(drawn)
    check_outputs(expected, program.predictor.source)
    of_one = {name: y[:1] for name, y in expected.items()}
    if program.predictor.task.write and program.dtype != "float32":
        of_one, expected = ({"score": y["score"]} for y in (of_one, expected))  # another sentence may be as good
    inputs = program.inputs(drawn)
    return float(max(difference(run(inputs[:1]), of_one), difference(run(inputs), expected)))
