"""What holds for every test: eight host devices, no silent broadcasting, the same examples on every run."""

import os

# Before the first import of jax, which reads both. Tests of sharding need several devices; none needs a GPU.
os.environ['XLA_FLAGS'] = os.environ.get('XLA_FLAGS', '') + ' --xla_force_host_platform_device_count=8'
os.environ.setdefault('JAX_PLATFORMS', 'cpu')

import hypothesis
import jax
import pytest

jax.config.update('jax_numpy_rank_promotion', 'raise')

# The same examples each time, so that a failure is the change's doing; no deadline: a first call compiles.
hypothesis.settings.register_profile('default', derandomize=True, deadline=None, max_examples=50)
hypothesis.settings.load_profile('default')


@pytest.fixture(scope='module')
def data_dir(tmp_path_factory):
  """The set and the network of tests/tiny.py among the known ones, and the folder of its files."""
  import tiny  # not before JAX is set up

  from experiments import data, models
  with pytest.MonkeyPatch.context() as patch:
    patch.setitem(data.DATASETS, 'tiny', tiny.load)
    patch.setitem(models.MODELS, 'tiny', tiny.mlp)
    yield tiny.write(tmp_path_factory.mktemp('data'))


@pytest.fixture(scope='module')
def compiled_quickly():
  """Programs that run once or twice are not worth XLA's optimising."""
  jax.config.update('jax_disable_most_optimizations', True)
  yield
  jax.config.update('jax_disable_most_optimizations', False)


@pytest.fixture(scope='module')
def compiled_once(tmp_path_factory):
  """Runs of a module compile the same programs: once is enough. The folder is handed to other processes as well."""
  folder = tmp_path_factory.mktemp('cache')
  settings = {'jax_compilation_cache_dir': str(folder), 'jax_persistent_cache_min_compile_time_secs': 0.0,
              'jax_persistent_cache_min_entry_size_bytes': 0}
  before = {name: getattr(jax.config, name) for name in settings}
  for name, value in settings.items():
    jax.config.update(name, value)
  yield folder
  for name, value in before.items():
    jax.config.update(name, value)
