"""Tells what a recipe takes before it is run: python -m vit_jax.plan (see vit_jax/tools/plan.py)."""

from vit_jax.tools.plan import cli

if __name__ == "__main__":
    cli()
