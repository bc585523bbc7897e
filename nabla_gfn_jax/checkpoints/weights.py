"""Where the files of a pretrained model are, and what is in them."""

import os
from pathlib import Path

import numpy as np
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

from nabla_gfn_jax.checkpoints import torch_pickle
from nabla_gfn_jax.checkpoints.files import read_safetensors
from nabla_gfn_jax.errors import UserError

FOLDER = "NABLA_GFN_JAX_WEIGHTS"  # environment variable: a folder that holds NAME/FILE


def find(name: str, file: str, *, repo: str, revision: str) -> Path:
    """`file` of the model called `name`: in the user's folder, else in the hub's cache, else downloaded to it.

    Raises `UserError` that says how to get it.
    """
    if os.environ.get(FOLDER):
        own = Path(os.environ[FOLDER]) / name / file
        if own.is_file():
            return own
    try:
        return Path(hf_hub_download(repo, file, revision=revision))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise UserError(
            f"{file} of {repo} is not here and cannot be downloaded ({type(error).__name__}); run `hf download {repo} "
            f"{file} --revision {revision}` where there is a network, or put it at ${FOLDER}/{name}/{file}"
        ) from error


def read_state_dict(path: Path) -> dict[str, np.ndarray]:
    """Tensors by name, as stored, of safetensors or of a pickled state dict, alone or under "state_dict"."""
    if path.suffix == ".safetensors":
        return read_safetensors(path)[0]
    tree = torch_pickle.read(path)
    state = tree.get("state_dict", tree) if isinstance(tree, dict) else {}
    tensors = {name: array for name, array in state.items() if isinstance(array, np.ndarray)}
    if not tensors:
        raise UserError(f"{path} holds no state dict; download it again")
    return tensors
