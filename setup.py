"""Package metadata; tool settings live in pyproject.toml."""

from setuptools import find_packages, setup

setup(
    name="nabla_gfn_jax",
    version="0.1.0",
    packages=find_packages(include=["nabla_gfn_jax", "nabla_gfn_jax.*"]),
    python_requires=">=3.11",
)
