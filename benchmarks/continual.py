"""What learning task after task pays: a protected step, a step whose layers are full, the search for a mask, and a late task."""
import functools
import statistics
from collections.abc import Callable
from typing import Any

import haiku as hk
import jax
import jax.numpy as jnp
import optax

from benchmarks.paired import Row, ratio, row, take_turns
from powerprop import masks, packnet, powerpropagation, protect, target_propagation, task_masks, with_free
from powerprop.frozen import skip_frozen
from powerprop.reparam import Tree

BATCH, WIDTH = 128, 2000   # of the larger network on permuted MNIST
STEPS = 500                # of a task, where whole tasks are compared
DENSITIES = [0.02, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6]
REPARAM = powerpropagation(2.0)
NET = hk.without_apply_rng(hk.transform(lambda x: hk.nets.MLP([WIDTH, WIDTH, 10])(x)))


def examples(number: int) -> tuple[jax.Array, jax.Array]:
  images = jax.random.uniform(jax.random.key(0), (number, 784))
  return images, jax.random.randint(jax.random.key(1), (number,), 0, 10)


def loss_fn(theta: Tree, images: jax.Array, labels: jax.Array) -> jax.Array:
  return optax.softmax_cross_entropy_with_integer_labels(NET.apply(theta, images), labels).mean()


def stepper(tx: optax.GradientTransformation, phi: Tree, state: Any, trainable: Tree = None) -> Callable[[], None]:
  """One more step each time it is called. With `trainable` it skips weight gradients of frozen layers."""
  images, labels = examples(BATCH)

  @functools.partial(jax.jit, donate_argnums=(0, 1))
  def step(phi: Tree, state: Any, trainable: Tree) -> Any:
    theta = REPARAM.weights(phi)
    if trainable is None:
      grads = jax.grad(loss_fn)(theta, images, labels)
    else:
      grads = jax.grad(skip_frozen(loss_fn))(theta, trainable, images, labels)
    updates, state = tx.update(grads, state, phi)
    return optax.apply_updates(phi, updates), state
  now = jax.tree.map(jnp.copy, (phi, state))   # its own, since a step gives its arguments away

  def turn() -> None:
    nonlocal now
    now = jax.block_until_ready(step(*now, trainable))
  return turn


def steps(quick: bool) -> list[Row]:
  """A step of 784-2000-2000-10, a third of whose weights are protected, against one that protects nothing."""
  phi = REPARAM.inverse(jax.jit(NET.init)(jax.random.key(2), examples(1)[0]))
  memory = task_masks.begin(phi, 1)
  weights = task_masks.shared(memory, phi)
  mask = packnet.efficient_masks(weights, sum(x.size for x in jax.tree.leaves(weights)) // 3)
  free = task_masks.free(task_masks.remember(memory, 0, mask, phi), phi)
  rows = []
  for name, inner in (('momentum', optax.sgd(0.1, 0.9)), ('Adam', optax.adam(1e-3))):
    plain = target_propagation(inner, REPARAM)
    tx = protect(plain)
    functions = {'plain': stepper(plain, phi, plain.init(phi)), 'protected': stepper(tx, phi, with_free(tx.init(phi), free))}
    if name == 'Adam':
      none = jax.tree.map(jnp.zeros_like, free)
      functions['full'] = stepper(tx, phi, with_free(tx.init(phi), none), jax.tree.map(jnp.any, none))
    times = take_turns(functions, 3 if quick else 15, 0.2 if quick else 1.0)
    rows.append(ratio(f'{name}: a protected step / a plain one, MLP 2 × {WIDTH}', times['protected'], times['plain'], 1.05))
    if name == 'Adam':
      rows.append(ratio(f'{name}: a step whose layers are all full / a protected one', times['full'], times['protected']))
  return rows


def search(quick: bool) -> list[Row]:
  """The search over eight densities with 5,000 images held out, its masks side by side, and one after another."""
  images, labels = examples(5000)
  phi = REPARAM.inverse(jax.jit(NET.init)(jax.random.key(2), images[:1]))
  weights = task_masks.shared(task_masks.begin(phi, 1), phi)
  counts = packnet.make_counts(weights, DENSITIES)

  def accuracy(phi: Tree) -> jax.Array:
    return jnp.mean(jnp.argmax(NET.apply(REPARAM.weights(phi), images), axis=1) == labels)

  @functools.partial(jax.jit, static_argnames='side_by_side')
  def find(phi: Tree, side_by_side: bool) -> packnet.Found:
    return packnet.search(lambda mask: accuracy(masks.apply(mask, phi)),
                          lambda count: packnet.efficient_masks(task_masks.shared(task_masks.begin(phi, 1), phi), count),
                          counts, accuracy(phi), 0.98, side_by_side)
  ways = {True: 'side by side', False: 'one after another'}
  functions = {name: lambda way=way: jax.block_until_ready(find(phi, way)) for way, name in ways.items()}
  times = take_turns(functions, 2 if quick else 5)
  title = f'search of {len(DENSITIES)} masks, MLP 2 × {WIDTH}, 5,000 images'
  wall = times['side by side'].wall
  return [row(f'{title}, side by side', statistics.median(wall), 's', low=min(wall), high=max(wall)),
          ratio(f'{title}: one after another / side by side', times['one after another'], times['side by side'])]


def growth(quick: bool) -> list[Row]:
  """A whole task after 99 others against one after one other: begun, trained for STEPS, its mask found among eight."""
  images, labels = examples(5000)
  net = hk.without_apply_rng(hk.transform(lambda x: hk.nets.MLP([100, 100, 10])(x)))
  tx = protect(target_propagation(optax.sgd(0.1, 0.9), REPARAM))
  phi = REPARAM.inverse(jax.jit(net.init)(jax.random.key(2), images[:1]))

  def loss(theta: Tree, i: jax.Array) -> jax.Array:
    x, y = (jax.lax.dynamic_slice_in_dim(a, i * BATCH % 4096, BATCH) for a in (images, labels))
    return optax.softmax_cross_entropy_with_integer_labels(net.apply(theta, x), y).mean()

  @jax.jit
  def learn(phi: Tree, state: Any) -> Tree:
    def step(carry: Any, i: jax.Array) -> Any:
      phi, state = carry
      updates, state = tx.update(jax.grad(loss)(REPARAM.weights(phi), i), state, phi)
      return (optax.apply_updates(phi, updates), state), None
    return jax.lax.scan(step, (phi, state), jnp.arange(STEPS))[0][0]

  def accuracy(phi: Tree) -> jax.Array:
    return jnp.mean(jnp.argmax(net.apply(REPARAM.weights(phi), images), axis=1) == labels)
  finish = jax.jit(lambda memory, t, phi: packnet.end_task(memory, t, phi, phi, accuracy, DENSITIES, side_by_side=False))
  remember = jax.jit(task_masks.remember)

  def turn(memory: task_masks.Memory, others: int) -> None:
    jax.block_until_ready(finish(memory, others, learn(phi, packnet.begin_task(tx, memory, phi))))
  memory, weights = task_masks.begin(phi, 100), task_masks.shared(task_masks.begin(phi, 1), phi)
  keys = iter(jax.random.split(jax.random.key(3), 400))
  memories = {}
  for task in range(99):
    mask = jax.tree.map(lambda x: jax.random.uniform(next(keys), x.shape) < 0.005, weights)
    memories[task + 1] = memory = remember(memory, task, mask, phi)
  functions = {others: functools.partial(turn, memories[others], others) for others in (1, 99)}
  times = take_turns({str(others): function for others, function in functions.items()}, 3 if quick else 15)
  return [ratio('the hundredth task / the second, MLP 2 × 100', times['99'], times['1'], 1.05)]


def run(quick: bool) -> list[Row]:
  return steps(quick) + search(quick) + growth(quick)
