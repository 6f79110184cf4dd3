"""Settings of every test: shapes checked at run time, eight simulated devices, deterministic property tests."""

import os

# Before jax is imported anywhere: the devices that sharding tests run on, and quiet native logs.
os.environ.setdefault("XLA_FLAGS", "--xla_force_host_platform_device_count=8")
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
os.environ["MINISTRAL_CACHE"] = ""

from hypothesis import HealthCheck, settings
from jaxtyping import install_import_hook

install_import_hook(["pallas_kernels", "ministral_jax", "infer", "train"], "beartype.beartype")

settings.register_profile(
    "suite",
    max_examples=20,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)
settings.load_profile("suite")
