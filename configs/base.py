"""Every key of an experiment, once: its default, unit and meaning. Other configs change values and add none."""
import difflib
from collections.abc import Sequence

import ml_collections
import numpy as np


def get_config() -> ml_collections.ConfigDict:
  """The keys of all experiments. Tuples may be given on the command line: --config.sweep.alpha='(1.0, 2.0)'."""
  config = ml_collections.ConfigDict()
  config.name = 'base'                  # of the run, where several are compared
  config.title = ''                     # of the report, without the data set; '': the name
  config.protocol = 'supervised'        # what a run does: a row of PROTOCOLS in experiments/main.py

  config.dataset = 'mnist'              # a row of DATASETS in experiments/data; of photographs their folder in $POWERPROP_DATA
  config.data_dir = ''                  # directory of the data set's official files; '': $POWERPROP_DATA, then other sources
  config.train_images = 55_000          # the first so many of the training set; the rest of it is for validation

  config.model = 'lenet_300_100'        # a row of MODELS in experiments/models.py
  config.compute = 'float32'            # of convolutions and activations: 'float32' or 'bfloat16'; what is stored stays float32
  config.bias_stddev = 0.0              # standard deviation of initial biases (normal, truncated at 2 sd); 0: zeros

  config.steps = 50_000                 # optimiser steps of each network
  config.batch_size = 60                # images; each epoch is a new permutation, its incomplete last batch left out
  config.augment = 'none'               # a row of AUGMENTATIONS in experiments/augment.py
  config.schedule = 'constant'          # of the learning rate: a row of SCHEDULES in experiments/optimizers.py

  # The sweep: one network for each element of the product. Networks that differ in seed and learning rate alone are one group,
  # trained side by side; all groups see the same batches, which depend on the seed only.
  config.sweep = ml_collections.ConfigDict()
  config.sweep.alpha = (1.0, 2.0, 3.0, 4.0, 5.0)    # powers of the reparameterisation
  config.sweep.seed = (0, 1, 2, 3, 4)               # of initialisation and batches
  config.sweep.learning_rate = (0.1,)
  config.alpha_rates = ()               # learning rates of the powers in sweep.alpha, in place of the one in sweep.learning_rate
  config.sweep.optimizer = ('sgd',)                 # rows of OPTIMIZERS in experiments/optimizers.py
  config.sweep.update = ('target_propagation',)     # rows of UPDATES: target_propagation, backpropagation
  config.sweep.biases = ('plain',)                  # rows of BIASES in experiments/models.py: plain, reparameterised
  config.sweep.algorithm = ('dense',)               # rows of ALGORITHMS in experiments/algorithms.py; dense: prune afterwards
  config.sweep.sparsity = (0.0,)                    # shares of weights removed by the other algorithms; no part in 'dense'
  config.sweep.penalty = (0.0,)                     # weights of the regularisers of soft_threshold, hard_concrete and the like
  config.momentum = 0.9                 # of the optimizers 'momentum' and 'momentum_decay'
  config.weight_decay = 1e-4            # of 'adamw' and 'momentum_decay'; acts on θ under target_propagation, on φ otherwise
  config.phi_decay = 0.0                # decay of φ itself, times the learning rate, whatever the optimizer
  config.clip_norm = 0.0                # of the gradient of all that may change, at θ under target_propagation: longer ones
  #                                       are shortened to it, before the optimizer sees them; 0: none
  config.label_smoothing = 0.0          # share of each label that is spread over all classes, in training

  # Sparse training: what the algorithms of the sweep share.
  config.sparse = ml_collections.ConfigDict()
  config.sparse.distribution = 'erk'    # 'uniform', 'erk' or 'global': how a sparsity is shared out among the layers
  config.sparse.dense = ()              # patterns of leaf names that stay dense and are not counted, as ('conv2_d/w',)
  config.sparse.every_steps = 100       # updates of the masks
  config.sparse.start_share = 0.25      # of the training, at which gradual pruning starts
  config.sparse.end_share = 0.75        # of the training, at which it ends, one_shot prunes, and masks of the others settle
  config.sparse.drop_fraction = 0.3     # share of live weights exchanged at first by set, rigl and their kin
  config.sparse.initial_sparsity = 0.5  # granet: at the start
  config.sparse.phase_share = 0.1       # ac_dc: warm-up, and each compressed and dense phase after it
  config.sparse.rescale = False         # do live weights start with the norm of the whole layer (about 1/sqrt(density) larger)?
  config.sparse.entry = 0.3             # where weights that come back start for α > 1: times the mean live |θ| of the layer
  config.sparse.backward_factor = 2.0   # top_kast: the density of the backward set, in those of the forward set
  config.sparse.decay = 1e-4            # top_kast: strength of the exploration decay

  # The protocol 'lottery': rounds of training, pruning and rewinding.
  config.lottery = ml_collections.ConfigDict()
  config.lottery.rounds = 17            # after the dense one; 0.8^17 is 2.3 %
  config.lottery.prune_share = 0.2      # of the weights left, in each round; half of it in the output layer
  config.lottery.rewind_steps = 0       # what is left goes back to its values after so many steps; 0: initialisation

  # The protocol 'continual': task after task. `steps` are those of each task, `schedule` begins anew with each; `train_images` is
  # said of the whole data set, `sweep.algorithm` has rows of METHODS in experiments/continual/methods.py, and `sweep.penalty` the
  # strengths of ewc, ewc_online and synaptic_intelligence.
  config.continual = ml_collections.ConfigDict()
  config.continual.sequence = 'permuted'    # a row of SEQUENCES in experiments/data/tasks.py: permuted, rotated, split, mixed
  config.continual.tasks = 10               # of the sequence; mixed: one for each of continual.datasets
  config.continual.datasets = ('mnist', 'fashion_mnist', 'cifar10')   # of 'mixed': images become like the first's, and
  #                                           of each set at most 11/12 are for training
  config.continual.sequence_seed = 0        # of the orders of pixels of the sequence 'permuted', the same for all networks
  config.continual.degrees = 180.0          # over which the angles of the sequence 'rotated' are spread evenly
  config.continual.scenario = 'domain'      # outputs: 'domain' shared by all tasks; 'task' each its own; 'class' all compete
  config.continual.restart = True           # does the optimiser begin anew with each task?
  config.continual.matrix_every = 1         # tasks after which all earlier ones are tested; after the others the last one only
  config.continual.inferred_images = 1000   # test images of each task that packnet and efficient_packnet are not told the task of
  config.continual.retrain_share = 0.2      # of the steps of a task: packnet and efficient_packnet train so long under its mask
  config.continual.prune_rounds = 1         # packnet: in which its mask gets sparser, within that share
  config.continual.share = 0.0              # packnet: of the weights of each layer, for each task; 0: one for each of the tasks
  config.continual.gamma = 0.98             # efficient_packnet: least validation accuracy, in that of all weights
  config.continual.densities = (0.01, 0.02, 0.03, 0.05, 0.08, 0.12, 0.2, 0.3, 0.5)   # efficient_packnet: tried, from the last on
  config.continual.search = 'list'          # efficient_packnet: 'list' of densities, or 'binary' between its first and last
  config.continual.search_steps = 6         # efficient_packnet: of the binary search
  config.continual.estimate = 'accuracy'    # efficient_packnet: a mask is worth its validation 'accuracy', or its likelihood by a
  #                                           'taylor' expansion from fisher_images, without evaluating it, which is too hopeful
  #                                           of sparse masks (RESULTS.md); `met` in capacity.csv is of its accuracy in any case
  config.continual.layerwise = False        # efficient_packnet: the same density in each layer, or one threshold for all?
  config.continual.reinitialise = 'fresh'   # free weights before the next task: 'fresh', 'left' as they are, or 'zero', from
  #                                           where α > 1 never moves them: later tasks have but what earlier ones use
  config.continual.rest = 'frozen'          # biases and BatchNorm of both: 'frozen' after the first task, or each task's 'own',
  #                                           for deep networks: weights that begin anew do not fit statistics of others
  config.continual.fisher_images = 500      # ewc, ewc_online: training images that the Fisher information is of; also of 'taylor'
  config.continual.ewc_decay = 1.0          # ewc_online: of the Fisher information, at each task
  config.continual.damping = 1e-3           # synaptic_intelligence: ξ, added to the squared change of a weight
  config.continual.memory_images = 1000     # replay, a_gem: images kept, of all tasks together

  # Pruning by |θ| after training, without fine-tuning: of networks that were trained dense.
  config.prune = ml_collections.ConfigDict()
  config.prune.densities = tuple(float(p) for p in np.geomspace(0.01, 1, 20))   # shares kept of a hidden layer
  config.prune.output_factor = 2.0      # the output layer keeps min(1, output_factor * density)
  config.prune.scopes = ('layer',)      # 'layer': within each layer; 'global': the same total, over all layers together;
  #                                       'layer recalibrated', 'global recalibrated': with BatchNorm's averages made anew
  config.prune.recalibration_batches = 50   # batches of these averages, changed as in training; 0.9^n of the old ones is left
  config.prune.figure_density = 0.1     # density of figures 1c and 1d and of the statistics
  config.prune.sampled_weights = 10_000 # weights shown in figures 1c and 1d

  # The protocol 'streamed': one network on all devices, on photographs that are read while it trains. It takes one value of each
  # axis of the sweep.
  config.stream = ml_collections.ConfigDict()
  config.stream.classes = 1000          # of the data set; others are an error
  config.stream.image_size = 224        # side of the squares that images are cropped to, pixels
  config.stream.held_out = 0            # every so-manyth training image is kept from training, to choose settings by; 0: none
  config.stream.workers = 0             # processes that read images on each host; 0: threads of the one that trains
  config.stream.on_damage = 'fail'      # at images that cannot be read: 'fail', or 'skip': the next one, in evaluation none
  config.stream.shards = 1              # devices that share one copy of parameters and optimiser state
  config.stream.batch_norm_parts = 1    # parts of a batch, each with statistics of its own: 1 is all of it, over all devices
  config.stream.log_steps = 100         # a line of metrics every so many steps
  config.stream.checkpoint_steps = 1000     # a checkpoint every so many steps, and one at the end
  config.stream.evaluate_steps = 0      # accuracy every so many steps, and the best network kept; 0: at the end only
  config.stream.profile_steps = 0       # steps whose trace is written to WORKDIR/profile, from the tenth of a run on; 0: none
  config.stream.peak_flops = 0.0        # operations a second of one device at best, for its utilisation; 0: as known, or left out

  config.report = ('figure1',)          # kinds of figures: figure1, compare, learning_rate, continual
  config.checkpoint_epochs = 5          # a checkpoint every so many epochs of training, and one at the end
  config.checkpoints_kept = 2           # newest checkpoints left on disk
  return config


def algorithm_of(config: str, variant: str, algorithms: tuple[str, ...]) -> tuple[str, bool]:
  """Of a variant 'rigl' or 'rigl_tuning': the algorithm, and whether it is to choose a rate. Raises ValueError for others."""
  algorithm = variant.removesuffix('_tuning')
  if algorithm not in algorithms:
    raise unknown(config, variant, [name for a in algorithms for name in (a, f'{a}_tuning')])
  return algorithm, variant != algorithm


def unknown(config: str, variant: str, variants: Sequence[str]) -> ValueError:
  """The error that names all variants, those first that may have been meant."""
  close = difflib.get_close_matches(variant, variants, n=4)
  known = ', '.join(map(repr, dict.fromkeys([*close, *variants])))
  return ValueError(f'{config} has the variants {known}, not {variant!r}.')
