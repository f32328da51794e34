"""What holds for every test: eight host devices, no silent broadcasting, the same examples on every run."""

import os

# Before the first import of jax, which reads both. Tests of sharding need several devices; none needs a GPU.
os.environ['XLA_FLAGS'] = os.environ.get('XLA_FLAGS', '') + ' --xla_force_host_platform_device_count=8'
os.environ.setdefault('JAX_PLATFORMS', 'cpu')

import hypothesis
import jax

jax.config.update('jax_numpy_rank_promotion', 'raise')

# The same examples each time, so that a failure is the change's doing; no deadline: a first call compiles.
hypothesis.settings.register_profile('default', derandomize=True, deadline=None, max_examples=50)
hypothesis.settings.load_profile('default')
