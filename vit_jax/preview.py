"""Draws what a recipe makes of its training images: python -m vit_jax.preview (see vit_jax/tools/preview.py)."""

from vit_jax.tools.preview import cli

if __name__ == "__main__":
    cli()
