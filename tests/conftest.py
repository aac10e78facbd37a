"""What every test runs under: eight virtual CPU devices and full-precision products."""

import jax

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_default_matmul_precision", "highest")
