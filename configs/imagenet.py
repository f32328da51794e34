"""ResNet-50 on ImageNet: the cells of the paper's comparison and of its baselines, each by its name.

  ROW_SPARSITY, with _powerprop for α = 2 and _1.5x, _2x or _5x for longer training: rigl_erk_90, gradual_uniform_95_powerprop,
  rigl_uniform_80_5x. ROWS are the rows; sparsities are 80, 90, 95 and 98 %; dense and dense_powerprop have none.

  python -m experiments.main --config=configs/imagenet.py:rigl_erk_90 --dry_run
  python -m experiments.main --config=configs/imagenet.py:rigl_erk_90 --workdir=runs/rigl_erk_90 --config.data_dir=IMAGENET

Recipe: SGD with momentum 0.9, decay 1e-4 of the weights that the network sees, label smoothing 0.1, batch 4,096, 32,000 steps
(100 epochs), warm-up over 5 % to the rate 1.6, a tenth of it from 30, 70 and 90 % on; random-resized crops of 224 and flips.
Masks change every 100 steps until step 25,000, those of gradual pruning every 1,000 from step 10,000 on; drop fraction 0.3.
Uniform keeps the first convolution dense, and biases and BatchNorm are never sparse. Longer training stretches all of it. That
is the recipe of RigL's authors, and for gradual pruning of JaxPruner's. For α = 2 the rate is 16: the paper's is not known, 10
times the rate was best for a ResNet-18 (RESULTS.md).

STR learns its densities: its four cells are one and the same run until a --config.sweep.penalty, found by trial, is given for
each sparsity.

1 networks for each cell; seeds by --config.sweep.seed. Made for 8 GPUs or TPU cores of 80 GB in bfloat16, and not run here, for
want of the data. One NVIDIA H100 with 15 cores that read took 4,560 and 5,650 images a second, dense, in two runs (RESULTS.md):
at that the 131 million images of a cell are 6.4 to 8 hours, 10 to 12 for 1.5x, 13 to 16 for 2x and 32 to 40 for 5x; several cards
were not tried. The published numbers are in configs/sweeps.py.
"""
import difflib

from configs import base

ROWS = {   # name → (algorithm, distribution)
    'static_uniform': ('static', 'uniform'), 'static_erk': ('static', 'erk'), 'snip': ('snip', 'global'),
    'set_uniform': ('set', 'uniform'), 'set_erk': ('set', 'erk'), 'dsr': ('dsr', 'uniform'),
    'snfs_uniform': ('snfs', 'uniform'), 'snfs_erk': ('snfs', 'erk'),
    'rigl_uniform': ('rigl', 'uniform'), 'rigl_erk': ('rigl', 'erk'),
    'gradual_uniform': ('gradual', 'uniform'), 'gradual_erk': ('gradual', 'erk'),
    'top_kast_uniform': ('top_kast', 'uniform'), 'top_kast_erk': ('top_kast', 'erk'),
    'ac_dc': ('ac_dc', 'global'), 'str': ('soft_threshold', 'global')}
SPARSITIES = (80, 90, 95, 98)
LENGTHS = {'': 1.0, '_1.5x': 1.5, '_2x': 2.0, '_5x': 5.0}
POWERS = {'': 1.0, '_powerprop': 2.0}
RATES = {1.0: 1.6, 2.0: 16.0}   # of the powers
STEPS, FIRST_LAYER = 32_000, 'resnet/~/initial_conv/w'
# Weight of the penalty on STR's weights and thresholds, which is its knob: to be found for each sparsity.
PENALTY = 1e-5

# name → (row, sparsity in %, α, how many times as long)
CELLS = {f'dense{p}{length}': ('dense', 0, POWERS[p], LENGTHS[length]) for p in POWERS for length in LENGTHS}
CELLS |= {f'{row}_{sparsity}{p}{length}': (row, sparsity, POWERS[p], LENGTHS[length])
          for row in ROWS for sparsity in SPARSITIES for p in POWERS for length in LENGTHS}


def get_config(variant: str = 'dense'):
  """`variant`: a name in CELLS."""
  if variant not in CELLS:
    close = difflib.get_close_matches(variant, CELLS, n=4)
    raise ValueError(f'imagenet has no cell {variant!r}{"; perhaps " if close else ""}{" or ".join(close)}; there are '
                     f'ROW_SPARSITY[_powerprop][_1.5x, _2x or _5x] with ROW one of {", ".join(ROWS)} and '
                     f'SPARSITY one of {", ".join(map(str, SPARSITIES))}, and dense with the same endings.')
  row, sparsity, alpha, times = CELLS[variant]
  algorithm, distribution = ROWS.get(row, ('dense', 'uniform'))
  config = settings(base.get_config())
  config.name = f'imagenet_{variant}'
  config.steps = round(times * STEPS)
  config.sweep.alpha, config.sweep.learning_rate = (alpha,), (RATES[alpha],)
  config.sweep.algorithm, config.sweep.sparsity = (algorithm,), (sparsity / 100,)
  config.sparse.distribution = distribution
  config.sparse.dense = (FIRST_LAYER,) if distribution == 'uniform' and row != 'dense' else ()
  if row.startswith('gradual'):
    config.sparse.every_steps = round(times * 1_000)
  if row == 'str':
    config.sweep.sparsity, config.sweep.penalty = (0.0,), (PENALTY,)
  return config


def settings(config):
  """The recipe."""
  config.title, config.protocol, config.dataset, config.model = 'Sparse training', 'streamed', 'imagenet', 'resnet_50'
  config.batch_size, config.schedule, config.label_smoothing = 4_096, 'steps', 0.1
  config.sweep.seed, config.sweep.optimizer, config.weight_decay = (0,), ('momentum_decay',), 1e-4
  config.sparse.every_steps, config.sparse.start_share, config.sparse.end_share = 100, 10_000 / STEPS, 25_000 / STEPS
  config.compute, config.stream.workers = 'bfloat16', 16
  config.prune.densities, config.prune.output_factor = (1.0, 0.5, 0.2, 0.1, 0.05, 0.02), 1.0
  config.prune.scopes = ('layer', 'layer recalibrated', 'global', 'global recalibrated')
  config.report = ('compare',)
  return config
