"""How commands explain themselves: the docstring of a command, with its examples, is the first part of its help."""

import argparse
import re
import sys
from pathlib import Path


def program() -> str:
    """What was typed to start this command: `vit-jax predict` or `python -m vit_jax.predict`."""
    path = Path(sys.argv[0])
    if path.suffix != ".py":
        return path.name
    return f"python -m vit_jax.{path.parent.name if path.stem == '__main__' else path.stem}"


def spelled(doc: str) -> str:
    """A docstring with its command lines indented, and as they are typed here: `vit-jax predict` where that was used."""
    doc = re.sub(r"^ *(?=python -m |vit-jax )", "    ", doc.strip(), flags=re.MULTILINE)
    if not program().startswith("vit-jax"):
        return doc
    return re.sub(r"python -m vit_jax\.(\w+)", lambda m: f"vit-jax {m[1].replace('main', 'train').replace('_', '-')}", doc)


def parser(doc: str) -> argparse.ArgumentParser:
    """A parser whose help begins with the docstring of the command, its examples included."""
    return argparse.ArgumentParser(
        prog=program(), description=spelled(doc), formatter_class=argparse.RawDescriptionHelpFormatter
    )
