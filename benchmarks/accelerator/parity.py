"""Compares a network's output and input gradient at each precision with PyTorch's in float64 on the same device."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.accelerator.sizes import Size, Weights, as_dtype
from benchmarks.accelerator.worker import Worker

PRECISIONS: dict[str, tuple[str, str | None]] = {  # dtype, matrix products' precision
    "float32, highest precision": ("float32", "highest"),
    "float32": ("float32", None),
    "bfloat16": ("bfloat16", None),
}
# Programs are timed elsewhere; here they only have to compile quickly.
_QUICKLY: dict[str, list[dict[str, Any]]] = {
    "gpu": [{"xla_gpu_autotune_level": 0, "xla_gpu_enable_triton_gemm": False}, {"xla_gpu_autotune_level": 0}],
    "cpu": [{"xla_backend_optimization_level": 0}],
}


def run(worker: Worker, stage: str, network: str) -> None:
    """Compares for one image. Errors are norms relative to that of PyTorch's result."""
    size, weights = Size(worker.small), Weights()
    apply, shapes, x, theirs = _NETWORKS[network](size, weights)
    params = weights.like(shapes)
    cotangent = weights.normal(jax.eval_shape(partial(apply, "float32"), shapes, x).shape)

    def both(dtype: str, params: Any, x: Any) -> Any:
        output, pull = jax.vjp(lambda x: apply(dtype, params, x).astype(jnp.float32), x)
        return output, pull(jnp.asarray(cotangent))[0]

    def build(name: str) -> Any:
        dtype, precision = PRECISIONS[name]
        shaped = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, dtype), shapes)
        return compile_quickly(partial(both, dtype), precision, shaped, x)

    with ThreadPoolExecutor() as pool:
        built = dict(zip(PRECISIONS, pool.map(lambda n: worker.attempt(n, lambda: build(n)), PRECISIONS), strict=True))
    worker.wait("ready")
    found = {}
    for name, compiled in built.items():
        if compiled is not None:
            on_device = jax.device_put(as_dtype(params, PRECISIONS[name][0]))
            found[f"here, {name}"] = [np.asarray(a, np.float64) for a in compiled(on_device, x)]
            del on_device
    found |= worker.attempt("PyTorch", lambda: _in_torch(worker, theirs, params, x, cotangent)) or {}
    if not found:
        return
    truth = next((name for name in found if "float64" in name), next(iter(found)))
    for name, (output, gradient) in found.items():
        if name != truth:
            errors = {"output": relative(output, found[truth][0]), "gradient": relative(gradient, found[truth][1])}
            worker.row(name, note=f"against {truth}", **{f"relative_error_of_{k}": v for k, v in errors.items()})


def relative(a: np.ndarray, b: np.ndarray) -> float:
    """‖a − b‖ / ‖b‖."""
    return float(np.linalg.norm(a - b) / np.linalg.norm(b))


def compile_quickly(function: Callable[..., Any], precision: str | None, *shapes: Any) -> Any:
    """The compiled function, without a search for the fastest kernels if the compiler allows it."""
    with jax.default_matmul_precision(precision) if precision else jax.default_matmul_precision("default"):
        lowered = jax.jit(function).lower(*shapes)
    for options in _QUICKLY.get(jax.default_backend(), []):
        try:
            return lowered.compile(compiler_options=options)
        except Exception as error:  # this version does not know the option, or cannot compile with it
            print(f"not with {options}: {error!r}")
    return lowered.compile()


def _unet(size: Size, weights: Weights) -> Any:
    pieces = size.pieces(size.config(model_dtype="float32"))
    model, latent = pieces.base.unet, pieces.base.latent_shape
    t, context = np.full(1, 501, np.int32), weights.normal((1, 77, model.config.cross_attention_dim))

    def apply(dtype: str, params: Any, x: Any) -> Any:
        return model.clone(dtype=jnp.dtype(dtype)).apply({"params": params}, x, t, context)

    def theirs(params: Any, dtype: Any) -> Callable[[Any], Any]:
        import torch

        from benchmarks.accelerator.torch_networks import DEVICE, unet

        network = unet(size, params, dtype)
        time, text = torch.from_numpy(t).to(DEVICE), torch.from_numpy(context).to(DEVICE, dtype)
        return lambda x: network(x, time, text).sample

    return apply, pieces.base.params["unet"], weights.normal((1, *latent)), theirs


def _vae(size: Size, weights: Weights) -> Any:
    pieces = size.pieces(size.config(model_dtype="float32"))
    model = pieces.base.vae

    def apply(dtype: str, params: Any, x: Any) -> Any:
        return model.clone(dtype=jnp.dtype(dtype)).apply({"params": params}, x, method="decode")

    def theirs(params: Any, dtype: Any) -> Callable[[Any], Any]:
        from benchmarks.accelerator.torch_networks import vae

        network = vae(size, params, dtype)
        return lambda z: 0.5 * network.decode(z / model.config.scaling_factor).sample + 0.5

    return apply, pieces.base.params["vae"], weights.normal((1, *pieces.base.latent_shape)), theirs


def _hps(size: Size, weights: Weights) -> Any:
    pixels = size.clip.vision.image_size

    def apply(dtype: str, params: Any, x: Any) -> Any:
        return size.tower(jnp.dtype(dtype)).apply({"params": params}, x)

    def theirs(params: Any, dtype: Any) -> Callable[[Any], Any]:
        from benchmarks.accelerator.torch_networks import tower

        network = tower(size, params, dtype)
        return lambda x: network(pixel_values=x).image_embeds

    pieces = size.pieces(size.config())
    return apply, pieces.reward.params, weights.normal((1, pixels, pixels, 3)), theirs


_NETWORKS = {"unet": _unet, "vae": _vae, "hps": _hps}


def _in_torch(worker: Worker, theirs: Any, params: Any, x: np.ndarray, cotangent: np.ndarray) -> dict[str, Any]:
    """PyTorch's results, in our layout."""
    import torch

    from benchmarks.accelerator.torch_networks import DEVICE, use_tf32

    def to_torch(a: np.ndarray, dtype: Any) -> Any:
        a = np.moveaxis(a, -1, 1) if a.ndim == 4 else a
        return torch.from_numpy(np.ascontiguousarray(a)).to(DEVICE, dtype)

    def to_numpy(a: Any) -> np.ndarray:
        array = a.detach().double().cpu().numpy()
        return np.moveaxis(array, 1, -1) if array.ndim == 4 else array

    found = {}
    kinds = {
        "float64": (torch.float64, False),
        "float32, no tf32": (torch.float32, False),
        "float32, tf32": (torch.float32, True),
        "bfloat16": (torch.bfloat16, False),
    }
    for name, (dtype, tf32) in kinds.items():
        use_tf32(tf32)

        def both(dtype: Any = dtype) -> list[np.ndarray]:
            at = to_torch(x, dtype).requires_grad_()
            output = theirs(params, dtype)(at)
            gradient = torch.autograd.grad(output, at, to_torch(cotangent, dtype))[0]
            return [to_numpy(output), to_numpy(gradient)]

        result = worker.attempt(f"PyTorch, {name}", both)
        if result:
            found[f"PyTorch, {name}"] = result
        if DEVICE.type == "cuda":
            torch.cuda.empty_cache()
    return found
