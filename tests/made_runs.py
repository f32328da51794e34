"""Workdirs whose numbers are made by formulas or typed by hand, and are results of nothing."""

import csv
import json

import numpy as np

AXES = ('alpha', 'seed', 'learning_rate', 'optimizer', 'update', 'biases')
GRID = [float(p) for p in np.geomspace(0.01, 1, 20)]
NAN = float('nan')


def row(test, *, alpha=1.0, seed=0, rate=0.1, optimizer='sgd', scope='layer', density=1.0, validation=None):
  return {'alpha': alpha, 'seed': seed, 'learning_rate': rate, 'optimizer': optimizer,
          'update': 'target_propagation', 'biases': 'plain', 'scope': scope, 'density': density,
          'kept': round(1000 * density), 'weights': 1000,
          'validation_accuracy': test if validation is None else validation, 'test_accuracy': test}


def write_csv(path, rows):
  with path.open('w', newline='', encoding='utf-8') as file:
    writer = csv.DictWriter(file, list(rows[0]), lineterminator='\n')
    writer.writeheader()
    writer.writerows(rows)


def make_workdir(path, rows, kinds=('figure1',), **config):
  """The files that a run leaves, for the networks of `rows`."""
  path.mkdir(parents=True)
  write_csv(path / 'results.csv', rows)
  write_csv(path / 'overlap.csv', [{**{key: r[key] for key in (*AXES, 'scope', 'density')},
                                    'overlap': 1 - r['density'] * (1 - r['density']) / r['alpha']} for r in rows])
  nets = {tuple(r[axis] for axis in AXES): r for r in rows}.values()
  write_csv(path / 'statistics.csv', [{**{axis: r[axis] for axis in AXES}, 'sign_flips': 0.1 / r['alpha'],
                                       'kurtosis': 100 * r['alpha'] + r['seed']} for r in nets])
  alphas = sorted({r['alpha'] for r in rows})
  initial = (0.05 * np.sin(np.arange(10_000))).astype(np.float32)
  arrays = {}
  for g, alpha in enumerate(alphas):
    final = initial * (1 + 100 * alpha * initial ** 2)
    arrays |= {f'initial_{g}': initial, f'final_{g}': final, f'kept_{g}': np.abs(final) > 0.049}
  np.savez_compressed(path / 'weights.npz', alpha=np.array(alphas), density=0.1, **arrays)
  default = {'name': 'mnist_lenet', 'dataset': 'mnist', 'steps': 50_000, 'batch_size': 60, 'report': list(kinds),
             'sweep': {'alpha': alphas, 'seed': [0]}, 'prune': {'output_factor': 2.0, 'figure_density': 0.1}}
  (path / 'config.json').write_text(json.dumps(default | config))
  (path / 'run.json').write_text(json.dumps({
    'command': f'python -m experiments.main --workdir={path}', 'commit': 'abc123', 'dirty': True,
    'versions': {'python': '3.11.7', 'jax': '0.10.2'}, 'devices': '1 x cpu (2 cores)',
    'data': f'MNIST: 60,000 train and 10,000 test images from {path.parent}/mnist, checksums good',
    'seconds': {'training': 119.7, 'evaluation': 4.25}, 'finished': '2025-01-01T00:00:00+00:00'}))
  return path


def sweep(alphas=(1.0, 2.0, 3.0, 4.0, 5.0), seeds=3, **fixed):
  return [row(0.98 - 0.5 / (1 + 40 * p * alpha) + 0.002 * seed, alpha=alpha, seed=seed, density=p, **fixed)
          for alpha in alphas for seed in range(seeds) for p in GRID]
