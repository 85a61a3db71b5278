"""Before JAX starts: eight virtual CPU devices, no network, little optimization (most of the tests' time is compilation); then: no
silent promotion of ranks or dtypes.
"""

import os
from importlib.metadata import version

os.environ["XLA_FLAGS"] = " ".join(
    (
        os.environ.get("XLA_FLAGS", ""),
        "--xla_force_host_platform_device_count=8",
        "--xla_backend_optimization_level=0",
        "--xla_cpu_parallel_codegen_split_count=1",
        # jaxlib 0.10's older emitters compile in half the time; later versions have no choice, and gain a quarter by fewer passes
        "--xla_cpu_use_fusion_emitters=false"
        if version("jaxlib").startswith("0.10.")
        else "--xla_llvm_disable_expensive_passes=true",
    )
)
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ["HF_HUB_OFFLINE"] = os.environ["TRANSFORMERS_OFFLINE"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # torch's threads wait for each other where workers share the cores
os.environ["TFDS_DISABLE_PROGRESS_BAR"] = "1"

import jax
import pytest
from kernel_reference import BACKENDS
from tiny import SPLIT, batches, model_and_params

from splitq_jax import calib

jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_default_matmul_precision", "highest")  # where an accelerator runs them: references are float32's


@pytest.fixture(params=BACKENDS)
def backend(request):
    """Return each backend of the kernels in turn."""
    return request.param


@pytest.fixture(scope="session")
def tiny():
    """Return the tiny model and its parameters."""
    return model_and_params()


@pytest.fixture(scope="session")
def stats(tiny):
    """Return what calibration sees of them; modules on a planted site have their own."""
    return calib.collect(*tiny, batches(4), SPLIT, gram=True)
