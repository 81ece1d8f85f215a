"""backend_info and scratch_bytes: what is compiled in, what a call reserves, why no CUDA."""

import dataclasses
import math
import numbers

import jax
import jax.numpy as jnp

from jax_marlin.ops import checks, ffi_targets
from jax_marlin.ops.moe_align_block_size import aligned_sizes, select_moe_block_size
from jax_marlin.weights import MarlinExpertStack, MarlinLinear


@dataclasses.dataclass(frozen=True)
class BackendInfo:
    """What this process can run. `str(info)` is a short report for bug reports.

    Attributes:
        extension: the compiled CUDA module can be imported and loaded by this jaxlib.
        why_not: why the CUDA kernels do not run here; None when they do.
        cuda_version: CUDA version the extension was built with, e.g. "12.9".
        architectures: GPU architectures in the extension, e.g. ("80", "90a").
        ffi_built: XLA FFI version (major, minor) the extension was built with.
        ffi_installed: XLA FFI version of the installed jaxlib.
        jax_version: version of jax.
        gpus: kinds of the CUDA devices that JAX sees.
    """

    extension: bool
    why_not: str | None
    cuda_version: str | None
    architectures: tuple[str, ...]
    ffi_built: tuple[int, int] | None
    ffi_installed: tuple[int, int]
    jax_version: str
    gpus: tuple[str, ...]

    def __str__(self) -> str:
        ffi_built = f"{_dotted(self.ffi_built)}, " if self.ffi_built else ""
        lines = [
            f"cuda kernels   {'available' if self.why_not is None else 'not available'}",
            f"extension      {'loaded' if self.extension else 'not loaded'}",
            f"xla ffi        {ffi_built}installed jaxlib {_dotted(self.ffi_installed)}",
            f"jax            {self.jax_version}",
            f"gpus           {', '.join(self.gpus) or 'none'}",
        ]
        if self.extension:
            names = ", ".join(self.architectures)
            lines.insert(2, f"built with     CUDA {self.cuda_version} for {names}")
        if self.why_not:
            lines.append(f"why not        {self.why_not}")
        return "\n".join(lines)


def backend_info() -> BackendInfo:
    """Says what is compiled in, which FFI version, and why CUDA is not available if it is not.

    Returns:
        A `BackendInfo`.

    Example:
        >>> import jax_marlin as jm
        >>> info = jm.backend_info()
        >>> info.extension or "_jax_marlin" in info.why_not
        True
    """
    reason = ffi_targets.cuda_unavailable_reason()
    gpus = _gpus()
    common = {
        "ffi_installed": ffi_targets.installed_ffi_api_version(),
        "jax_version": jax.__version__,
        "gpus": gpus,
    }
    if reason is not None:
        return BackendInfo(False, reason, None, (), None, **common)
    if not gpus:
        reason = (
            "JAX sees no CUDA device; install the extra cuda12 or cuda13 on a machine with a GPU"
        )
    module = ffi_targets.extension()
    version = module.cuda_version()
    return BackendInfo(
        True,
        reason,
        f"{version // 1000}.{version % 1000 // 10}",
        tuple(module.architectures()),
        tuple(module.ffi_api_version()),
        **common,
    )


def scratch_bytes(
    m: int,
    w: MarlinLinear | MarlinExpertStack,
    *,
    top_k: int = 1,
    moe_block_size: int | None = None,
) -> int:
    """Bytes of device scratch that one CUDA call reserves beside its result.

    XLA allocates it for each call from static shapes and may share it between calls: there is
    nothing to pre-grow. 0 without the CUDA extension; the default lowering needs one dequantized
    expert in float32 instead.

    Args:
        m: tokens, rows of x.
        w: a weight for `matmul`, or a stack for `moe_matmul`.
        top_k: experts of a token (stacks only).
        moe_block_size: slots of a block (stacks only); None as `ragged_dot` chooses.

    Returns:
        Bytes.

    Raises:
        TypeError: `w` is no packed weight.
        ValueError: m is negative, top_k or moe_block_size less than 1.

    Example:
        >>> import numpy as np, jax_marlin as jm
        >>> jm.scratch_bytes(8, jm.quantize(np.ones((64, 128), np.float32), group_size=32)) >= 0
        True
    """
    if not isinstance(m, numbers.Integral) or m < 0:
        raise ValueError(f"scratch_bytes: m is {m!r}, expected an integer of at least 0")
    if not isinstance(w, MarlinLinear | MarlinExpertStack):
        raise TypeError(
            f"scratch_bytes: w is {type(w).__name__}, expected a MarlinLinear or MarlinExpertStack"
        )
    m = int(m)
    top_k = checks.check_positive(top_k, "top_k", "scratch_bytes")
    if ffi_targets.cuda_unavailable_reason() is not None or w.dtype not in checks.KERNEL_DTYPES:
        return 0
    if isinstance(w, MarlinLinear) or w.is_single:
        k, n = w.shape
        bits = (w.stack if isinstance(w, MarlinLinear) else w).spec.bits
        return ffi_targets.scratch_bytes(m, 0, k, n, bits)
    spec = w.held_spec
    if moe_block_size is None:
        moe_block_size = select_moe_block_size(m, top_k, w.num_experts)
    moe_block_size = checks.check_positive(moe_block_size, "moe_block_size", "scratch_bytes")
    num_slots, _ = aligned_sizes((m, top_k), moe_block_size, w.num_experts)
    scratch = ffi_targets.scratch_bytes(num_slots, moe_block_size, spec.k, spec.n, spec.bits)
    if w.perm is None or spec.shared_perm:
        return scratch
    gathered = (m * top_k, math.ceil(spec.k / 8) * 8)  # each routed row in its expert's order
    return scratch + math.prod(gathered) * jnp.dtype(w.dtype).itemsize


def _gpus() -> tuple[str, ...]:
    try:
        return tuple(device.device_kind for device in jax.devices("cuda"))
    except RuntimeError:  # JAX's way to say that this platform is not there
        return ()


def _dotted(version: tuple[int, int]) -> str:
    return f"{version[0]}.{version[1]}"
