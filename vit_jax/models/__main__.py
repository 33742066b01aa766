"""Lists the models: python -m vit_jax.models (see vit_jax/tools/model_table.py)."""

from vit_jax.tools.model_table import cli

if __name__ == "__main__":
    cli()
