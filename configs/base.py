"""Every key of an experiment, once: its default, unit and meaning. Other configs change values and add none."""
import ml_collections
import numpy as np


def get_config() -> ml_collections.ConfigDict:
  """The keys of all experiments. Tuples may be given on the command line: --config.sweep.alpha='(1.0, 2.0)'."""
  config = ml_collections.ConfigDict()
  config.name = 'base'                  # of the run, where several are compared
  config.title = ''                     # of the report, without the data set; '': the name
  config.protocol = 'supervised'        # what a run does: a row of PROTOCOLS in experiments/main.py

  config.dataset = 'mnist'              # a row of DATASETS in experiments/data
  config.data_dir = ''                  # directory of the data set's official files; '': $POWERPROP_DATA, then other sources
  config.train_images = 55_000          # the first so many of the training set; the rest of it is for validation

  config.model = 'lenet_300_100'        # a row of MODELS in experiments/models.py
  config.bias_stddev = 0.0              # standard deviation of initial biases (normal, truncated at 2 sd); 0: zeros

  config.steps = 50_000                 # optimiser steps of each network
  config.batch_size = 60                # images; each epoch is a new permutation, its incomplete last batch left out

  # The sweep: one network for each element of the product. Networks of equal alpha, optimizer, update and biases are one
  # group, trained side by side; all groups see the same batches, which depend on the seed only.
  config.sweep = ml_collections.ConfigDict()
  config.sweep.alpha = (1.0, 2.0, 3.0, 4.0, 5.0)    # powers of the reparameterisation
  config.sweep.seed = (0, 1, 2, 3, 4)               # of initialisation and batches
  config.sweep.learning_rate = (0.1,)
  config.sweep.optimizer = ('sgd',)                 # rows of OPTIMIZERS in experiments/optimizers.py
  config.sweep.update = ('target_propagation',)     # rows of UPDATES: target_propagation, backpropagation
  config.sweep.biases = ('plain',)                  # rows of BIASES in experiments/models.py: plain, reparameterised
  config.momentum = 0.9                 # of the optimizer 'momentum'
  config.weight_decay = 1e-4            # of the optimizer 'adamw'; it acts on θ under target_propagation, on φ otherwise

  # Pruning by |θ| after training, without fine-tuning.
  config.prune = ml_collections.ConfigDict()
  config.prune.densities = tuple(float(p) for p in np.geomspace(0.01, 1, 20))   # shares kept of a hidden layer
  config.prune.output_factor = 2.0      # the output layer keeps min(1, output_factor * density)
  config.prune.scopes = ('layer',)      # 'layer': within each layer; 'global': the same total, over all layers together
  config.prune.figure_density = 0.1     # density of figures 1c and 1d and of the statistics
  config.prune.sampled_weights = 10_000 # weights shown in figures 1c and 1d

  config.report = ('figure1',)          # kinds of figures: figure1, compare, learning_rate
  config.checkpoint_epochs = 5          # a checkpoint every so many epochs of training, and one at the end
  config.checkpoints_kept = 2           # newest checkpoints left on disk
  return config
