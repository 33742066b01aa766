"""Lists the models: parameters, megabytes in float32, the size of images, where they run, and where to get them.

    python -m vit_jax.models
    python -m vit_jax.models B_16

The second lists those with B_16 in their names. "laptop" is a model that two CPU cores fine-tune on some hundred photos in
minutes, "GPU" one for a single accelerator, "pod" one for several. `--config.pretrained=` and `--model=` take the address.
"""

import functools
import math
from collections.abc import Sequence

from vit_jax.arguments import parser
from vit_jax.errors import UserError, command, did_you_mean, near

CLASSES = 1000


def main(argv: Sequence[str] | None = None) -> int:
    """Prints a line a model."""
    options = parser(__doc__)
    options.add_argument("name", nargs="?", default="", help="only models with this in their names")
    part = options.parse_args(argv).name
    from vit_jax.models import zoo

    table = [name for name in (*zoo.VIT, *zoo.MIXER) if not name.startswith("testing")]
    names = [name for name in table if part.lower() in name.lower()]
    if not names:
        raise UserError(f"unknown model {part!r}: {did_you_mean(near(part, table)) or 'vit-jax models lists them all'}")
    print(f"{'model':18} {'parameters':>13} {'MB':>7}   px  runs on  where to get it")
    for name in names:
        count, size = parameters(name), image_size(name)
        where = "{} ({:,} MiB)".format(*zoo.PUBLISHED[name]) if name in zoo.PUBLISHED else "not published: train it"
        print(f"{name:18} {count:13,} {4 * count / 1e6:7,.1f}  {size:3}  {runs_on(name):7}  {where}")
    return 0


def image_size(name: str) -> int:
    """The side of the images that a model is made for, in pixels."""
    return 16 if name == "ViT-Micro_4" else 224


@functools.cache
def parameters(name: str) -> int:
    """How many numbers a model has with a head for 1,000 classes.

    All blocks are alike: a model of one tells how much each takes, which is faster than to build a deep one.
    """
    import jax
    from flax.traverse_util import flatten_dict

    from vit_jax import models
    from vit_jax.models import zoo

    is_mixer = name in zoo.MIXER
    model = models.get_model(name, num_classes=CLASSES, **{"num_blocks": 1} if is_mixer else {"transformer": {"num_layers": 1}})
    image = jax.ShapeDtypeStruct((1, image_size(name), image_size(name), 3), "float32")
    shapes = flatten_dict(jax.eval_shape(lambda x: model.init(jax.random.key(0), x), image)["params"], sep="/")
    sizes = {path: math.prod(x.shape) for path, x in shapes.items()}
    first = "MixerBlock_0/" if is_mixer else "Transformer/encoderblock_0/"
    depth = zoo.MIXER[name]["num_blocks"] if is_mixer else zoo.VIT[name]["transformer"]["num_layers"]
    return sum(sizes.values()) + (depth - 1) * sum(size for path, size in sizes.items() if path.startswith(first))


def runs_on(name: str) -> str:
    """laptop, GPU or pod, by the operations that an image takes: twice the parameters for each of its tokens."""
    from vit_jax.models import zoo

    patch = (zoo.VIT | zoo.MIXER)[name]["patches"]["size"][0]
    if (resnet := zoo.VIT.get(name, {}).get("resnet")) is not None:
        patch *= 32 if len(resnet["num_layers"]) == 4 else 16 if resnet["num_layers"] else 2
    operations = 2 * parameters(name) * (image_size(name) / patch) ** 2
    return "laptop" if operations < 1e10 else "GPU" if operations < 2e11 else "pod"


def cli() -> None:
    """The console command."""
    command(main)
