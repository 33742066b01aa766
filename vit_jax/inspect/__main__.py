"""Lists what is inside a checkpoint: python -m vit_jax.inspect SOURCE.

This folder has no __init__.py, so it never hides the standard library's `inspect`.
"""

from vit_jax.tools.inspection import cli

if __name__ == "__main__":
    cli()
