"""`python -m vit_jax COMMAND …`, the same as `vit-jax COMMAND …`."""

from vit_jax.cli import cli

if __name__ == "__main__":
    cli()
