"""Shows a trained model as a page on this machine, where photos are dropped or picked, and answers over HTTP.

python -m vit_jax.serve --model=runs/photos
python -m vit_jax.serve --model=hf://google/vit-base-patch16-224 --port=8080 --batch=32
"""

import argparse
import errno
import importlib.util
import logging
import socket
from collections.abc import Sequence

from vit_jax import arguments, predictor
from vit_jax.checkpoint import pixels
from vit_jax.errors import UserError, command, say
from vit_jax.run import runtime
from vit_jax.serve.limits import Limits

NEEDED = ("starlette", "uvicorn", "python_multipart")


def main(argv: Sequence[str] | None = None) -> int:
    """Serves until Ctrl-C or SIGTERM; what has been asked until then is still answered."""
    args = _parser().parse_args(argv)
    limits = _limits(args)
    if missing := [name.replace("_", "-") for name in NEEDED if importlib.util.find_spec(name) is None]:
        raise UserError(f"serving needs {' and '.join(missing)}: pip install {' '.join(missing)}")
    with _bound(args.host, args.port) as listener:
        runtime.set_up()
        size = args.size and predictor.parse_size(args.size)
        how = {"model_name": args.model_name, "vocab": args.vocab, "tome": args.tome, "batch_size": 1}
        how |= pixels.pixel_options(args)
        _serve(predictor.load(args.model, size=size, **how), limits, listener)
    return 0


def _parser() -> argparse.ArgumentParser:
    default = Limits()
    parser = arguments.parser(__doc__)
    arguments.add_shared(parser, "--model")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default 127.0.0.1: this machine alone)")
    parser.add_argument("--port", type=int, default=8000, help="port to listen on, 0 for any that is free (default 8000)")
    parser.add_argument("--batch", type=int, default=default.batch, help="most images computed at a time (default 8)")
    parser.add_argument("--wait", type=float, default=1e3 * default.wait, help="milliseconds that a batch gathers (default 4)")
    parser.add_argument("--queue", type=int, default=default.queue, help="most requests at a time, and images (default 64)")
    parser.add_argument("--max_megabytes", type=float, default=default.max_bytes / 2**20, help="of a request (default 32)")
    parser.add_argument("--max_megapixels", type=float, default=default.max_pixels / 1e6, help="of an image (default 50)")
    parser.add_argument("--timeout", type=float, default=default.timeout, help="seconds for an answer (default 30)")
    arguments.add_shared(parser, "--model_name", "--size", "--tome", "--vocab")
    pixels.add_pixel_arguments(parser)
    return parser


def _limits(args: argparse.Namespace) -> Limits:
    for name in ("batch", "queue", "max_megabytes", "max_megapixels", "timeout"):
        if not 0 < getattr(args, name) < float("inf"):
            raise UserError(f"--{name}={getattr(args, name)} must be more than 0")
    for name, most in (("wait", 10_000), ("port", 65_535)):
        if not 0 <= getattr(args, name) <= most:
            raise UserError(f"--{name}={getattr(args, name):g} must be from 0 to {most}")
    return Limits(
        batch=args.batch,
        wait=args.wait / 1e3,
        queue=max(args.queue, args.batch),
        max_bytes=round(args.max_megabytes * 2**20),
        max_pixels=round(args.max_megapixels * 1e6),
        timeout=args.timeout,
    )


def _bound(host: str, port: int) -> socket.socket:
    """A socket with this address, which nobody else can take; until it listens, whoever connects is refused."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, kind, protocol)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
    except OSError as e:
        hint = "; --port=0 takes any that is free" if e.errno == errno.EADDRINUSE else ""
        raise UserError(f"cannot listen on --host={host} --port={port}: {e.strerror}{hint}") from e
    return listener


def _serve(loaded: predictor.Predictor, limits: Limits, listener: socket.socket) -> None:
    import uvicorn

    from vit_jax.serve.app import make_app
    from vit_jax.serve.service import Service

    service = Service(loaded, limits)
    service.model.compile()
    host, port = listener.getsockname()[:2]
    address = f"http://{f'[{host}]' if ':' in host else host}:{port}"

    class Server(uvicorn.Server):
        async def startup(self, sockets: list[socket.socket] | None = None) -> None:
            await super().startup(sockets)
            say(f"{address} shows {loaded.source}; Ctrl-C stops it")

    logging.getLogger("python_multipart").setLevel(logging.ERROR)  # what others send is no matter for this log
    how = {
        "log_level": "error",
        "access_log": False,
        "timeout_graceful_shutdown": round(2 * limits.timeout + 1),
        "limit_concurrency": 16 * limits.queue,
    }
    Server(uvicorn.Config(make_app(service), **how)).run(sockets=[listener])


def cli() -> None:
    """The console command."""
    command(main)


if __name__ == "__main__":
    cli()
