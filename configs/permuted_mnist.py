"""Permuted MNIST: ten tasks, each with the pixels in another order, learned one after another by one small network.

Our protocol: a 784-100-100-10 network with outputs shared by all tasks, 5 epochs (4,580 steps at batch 60) for each task, SGD
with momentum 0.9 under a cosine with warm-up that begins anew with each. PackNet and EfficientPackNet train the last fifth of
them under the mask of the task, which they are told in testing; EfficientPackNet wants 98 % of the validation accuracy of all
weights. RATES and STRENGTHS are what METHOD_tuning chose on the validation images of all ten tasks, with a seed of its own: from
GRID for methods that train separate networks or masks, from LOWER_GRID and LOWER_STRENGTHS for those in which a task can undo
what another has learned. All seeds of the runs see the same permutations, those of continual.sequence_seed.

  python -m experiments.main --config=configs/permuted_mnist.py:ewc --workdir=runs/permuted_mnist/ewc
  python -m experiments.main --config=configs/permuted_mnist.py:ewc_tuning --workdir=runs/permuted_mnist/ewc_tuning
  python -m experiments.main --config=configs/permuted_mnist.py:efficient_packnet_zero --workdir=runs/permuted_mnist/zero

5 networks, or with masks 15 networks (5 seeds × α ∈ {1, 2, 3}); to choose rates 4 networks, where strengths or powers are
chosen as well 12 networks; so for each of ALGORITHMS. Of packnet and efficient_packnet also METHOD_left and METHOD_zero, where
free weights go on from where they are, or from 0, in place of new ones. `python -m experiments.suite` with
`--config=configs/permuted_mnist.py --workdir=runs/permuted_mnist` runs all methods and lays them side by side. Times are in
run.json beside the results. A hundred tasks: permuted_hundred.py.
"""
from configs import base

ALGORITHMS = ('fine_tune', 'separate', 'joint', 'ewc', 'ewc_online', 'synaptic_intelligence', 'replay', 'a_gem', 'packnet',
              'efficient_packnet')
PACKS = ALGORITHMS[-2:]
LASTING = ('separate', *PACKS)   # what a task has learned stays as it is
VARIANTS = (*ALGORITHMS, *(f'{a}_tuning' for a in ALGORITHMS),
            *(f'{a}_{how}' for a in PACKS for how in ('left', 'zero')))
ALPHAS = (1.0, 2.0, 3.0)
GRID = (0.01, 0.03, 0.1, 0.2)
RATES = {'fine_tune': (0.003,), 'separate': (0.1,), 'joint': (0.03,), 'ewc': (0.1,), 'ewc_online': (0.03,),
         'synaptic_intelligence': (0.03,), 'replay': (0.01,), 'a_gem': (0.003,), 'packnet': (0.03, 0.03, 0.01),
         'efficient_packnet': (0.03, 0.1, 0.03)}   # of α = 1, or of ALPHAS
STRENGTH_GRID = {'ewc': (3.0, 30.0, 300.0), 'ewc_online': (3.0, 30.0, 300.0), 'synaptic_intelligence': (0.01, 0.1, 1.0)}
LOWER_GRID = (0.003, 0.01, 0.03, 0.1)
LOWER_STRENGTHS = STRENGTH_GRID | {'synaptic_intelligence': (0.001, 0.01, 0.1)}
STRENGTHS = {'ewc': 30.0, 'ewc_online': 30.0, 'synaptic_intelligence': 0.01}


def get_config(variant: str = 'ewc'):
  """`variant`: a method, or a method and '_tuning', '_left' or '_zero'."""
  if variant not in VARIANTS:
    raise base.unknown('permuted_mnist', variant, VARIANTS)
  algorithm = next(a for a in sorted(ALGORITHMS, key=len, reverse=True) if variant == a or variant.startswith(f'{a}_'))
  config = method(settings(base.get_config()), algorithm, variant == f'{algorithm}_tuning')
  config.name = f'permuted_mnist_{variant}'
  config.title = 'Permuted images'
  if variant.endswith('_tuning') and algorithm not in LASTING:
    config.sweep.learning_rate, config.sweep.penalty = LOWER_GRID, LOWER_STRENGTHS.get(algorithm, (0.0,))
  if variant.endswith(('_left', '_zero')):
    config.continual.reinitialise = variant.rpartition('_')[2]
  return config


def settings(config):
  """What all sequences of tasks share."""
  config.protocol, config.report = 'continual', ('continual',)
  config.model, config.steps, config.schedule = 'mlp_100_100', 5 * 916, 'cosine'
  config.sweep.optimizer, config.sweep.seed = ('momentum',), (0, 1, 2, 3, 4)
  config.checkpoint_epochs = 10   # and one after each task
  return config


def method(config, algorithm, tuning, rates=None, strengths=None):
  """One method with the rates and strengths of a sequence, by default those here, or the choice of them."""
  config.sweep.algorithm = (algorithm,)
  config.sweep.alpha = ALPHAS if algorithm in PACKS else (1.0,)
  if tuning:
    config.sweep.seed, config.sweep.learning_rate = (5,), GRID
    config.sweep.penalty = STRENGTH_GRID.get(algorithm, (0.0,))
  else:
    config.alpha_rates = (rates or RATES)[algorithm]
    config.sweep.penalty = ((strengths or STRENGTHS).get(algorithm, 0.0),)
  return config
