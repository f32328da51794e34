"""ResNet-50 on ten classes of photographs: all of configs/imagenet.py in small, for a CPU and any folder tree like Imagenette's.

Our protocol: crops of 64 pixels, batch 64, 3 epochs of 4,900 photographs (234 steps), a cosine with warm-up; masks change every
10 steps and settle after three quarters. Every 50th training image is held out.

  python -m experiments.main --config=configs/imagenette.py:dense --workdir=runs/imagenette/dense --config.data_dir=IMAGENETTE
  python -m experiments.main --config=configs/imagenette.py:dense_powerprop --workdir=runs/imagenette/dense_powerprop
  python -m experiments.main --config=configs/imagenette.py:gradual --workdir=runs/imagenette/gradual
  python -m experiments.main --config=configs/imagenette.py:gradual_powerprop --workdir=runs/imagenette/gradual_powerprop
  python -m experiments.main --config=configs/imagenette.py:rigl --workdir=runs/imagenette/rigl
  python -m experiments.main --config=configs/imagenette.py:rigl_powerprop --workdir=runs/imagenette/rigl_powerprop
  python -m experiments.main --config=configs/imagenette.py:top_kast --workdir=runs/imagenette/top_kast
  python -m experiments.main --config=configs/imagenette.py:top_kast_powerprop --workdir=runs/imagenette/top_kast_powerprop

1 networks each. Without --config.data_dir the folder imagenette in $POWERPROP_DATA is read.
"""
from configs import base, imagenet

ALPHAS = {'': 1.0, '_powerprop': 2.0}
RATES = {1.0: 0.0125, 2.0: 1.0}   # of the powers, by the images held out: see RESULTS.md
VARIANTS = {f'{algorithm}{suffix}': (algorithm, alpha) for algorithm in ('dense', 'gradual', 'rigl', 'top_kast')
            for suffix, alpha in ALPHAS.items()}


def get_config(variant: str = 'dense'):
  """`variant`: an algorithm, with '_powerprop' for α = 2."""
  if variant not in VARIANTS:
    raise base.unknown('imagenette', variant, tuple(VARIANTS))
  algorithm, alpha = VARIANTS[variant]
  config = imagenet.settings(base.get_config())
  config.name, config.dataset = f'imagenette_{variant}', 'imagenette'
  config.steps, config.batch_size, config.schedule = 3 * 78, 64, 'cosine'
  config.sweep.alpha, config.sweep.learning_rate = (alpha,), (RATES[alpha],)
  config.sweep.algorithm, config.sweep.sparsity = (algorithm,), (0.0 if algorithm == 'dense' else 0.9,)
  config.sparse.every_steps, config.sparse.start_share, config.sparse.end_share = 10, 0.25, 0.75
  config.stream.classes, config.stream.image_size, config.stream.held_out = 10, 64, 50
  config.compute, config.stream.workers = 'float32', 0
  config.stream.log_steps, config.stream.checkpoint_steps = 13, 78
  return config
