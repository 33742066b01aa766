"""Puts the recipes into the wheel: `configs/` becomes the package `vit_jax.configs`. All else is in pyproject.toml."""

from setuptools import find_namespace_packages, setup

setup(
    packages=[*find_namespace_packages(include=["vit_jax*"]), "vit_jax.configs"],
    package_dir={"vit_jax.configs": "configs"},
)
