"""What all tests share: strict JAX settings, the CPU and CUDA backends, where checkpoints are."""

import os
from pathlib import Path

import jax
import pytest

# Our code must not lean on implicit promotion: users turn these on, and off they hide mistakes.
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")
# For meshes; programs of one device run on the first as before.
jax.config.update("jax_num_cpu_devices", 8)

TESTS = Path(__file__).resolve().parent
CHECKPOINT_FOLDERS = (TESTS / "data", TESTS.parent / "jax_marlin" / "data")
CHECKPOINTS_VARIABLE = "JAX_MARLIN_CHECKPOINTS"


def cuda_missing_reason() -> str | None:
    """Why the CUDA kernels cannot run here, or None."""
    from jax_marlin.ops.ffi_targets import cuda_unavailable_reason

    try:
        jax.devices("cuda")
    except RuntimeError:
        return "no CUDA device is visible to JAX"
    return cuda_unavailable_reason()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    marked = [item for item in items if item.get_closest_marker("cuda")]
    reason = cuda_missing_reason() if marked else None
    if reason is not None:
        for item in marked:
            item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(scope="module", autouse=True)
def drop_programs():
    """Drops what a module compiled: XLA maps each program's code by itself, and Linux gives a
    process 65,530 maps, which all tests in one process would use up."""
    yield
    jax.clear_caches()


@pytest.fixture(params=["xla", pytest.param("cuda", marks=pytest.mark.cuda)])
def backend(request: pytest.FixtureRequest):
    """The `implementation` under test: "xla" on the CPU, "cuda" on a GPU (skipped without one)."""
    platform = {"xla": "cpu", "cuda": "cuda"}[request.param]
    with jax.default_device(jax.local_devices(backend=platform)[0]):
        yield request.param


def checkpoint_dir(name: str) -> Path:
    """The directory of one test checkpoint; skips the test where it is not there.

    Small ones lie in the repository; the larger set is found through JAX_MARLIN_CHECKPOINTS.
    """
    folders = list(CHECKPOINT_FOLDERS)
    if os.environ.get(CHECKPOINTS_VARIABLE):
        folders.append(Path(os.environ[CHECKPOINTS_VARIABLE]))
    for folder in folders:
        if (folder / name / "config.json").is_file():
            return folder / name
    if len(folders) > len(CHECKPOINT_FOLDERS):
        pytest.skip(f"{CHECKPOINTS_VARIABLE}={folders[-1]} has no checkpoint {name}")
    pytest.skip(f"set {CHECKPOINTS_VARIABLE} to the directory that holds {name}")


@pytest.fixture
def find_checkpoint():
    """`find_checkpoint(name)` is the directory of a test checkpoint, or skips with the reason."""
    return checkpoint_dir
