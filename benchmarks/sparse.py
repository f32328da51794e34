"""Times and memory of sparse training: updates of masks on the weights of a ResNet-50, and what a training step pays."""
import functools
import statistics
from collections.abc import Callable
from typing import Any

import haiku as hk
import jax
import jax.numpy as jnp
import optax

import powerprop
from benchmarks.paired import Row, Times, ratio, row, take_turns
from experiments.models import MODELS
from powerprop import SparsityUpdater, updaters
from powerprop.distributions import make_counts, uniform
from powerprop.reparam import Tree, is_weight, leaf_name

SPARSITY, EVERY = 0.9, 100
BATCH, LARGE = 128, 256   # of CIFAR's networks, of ResNet-50
STEM = '*/initial_conv/w'   # of hk.nets.ResNet50: stays dense under a uniform distribution


def resnet50() -> Tree:
  """Random weights in the shapes of ResNet-50's 25.5 M parameters."""
  net = hk.transform_with_state(lambda x: hk.nets.ResNet50(1000)(x, True))
  shapes, _ = jax.eval_shape(net.init, jax.random.key(0), jnp.zeros((1, 224, 224, 3)))
  return random_like(shapes, 0)


def random_like(shapes: Tree, seed: int) -> Tree:
  leaves, treedef = jax.tree.flatten(shapes)
  keys = jax.random.split(jax.random.key(seed), len(leaves))
  return jax.tree.unflatten(treedef, [jax.random.normal(k, x.shape) for k, x in zip(keys, leaves, strict=True)])


def weights_of(params: Tree) -> Tree:
  return jax.tree_util.tree_map_with_path(lambda path, x: x if is_weight(leaf_name(path), x) else None, params)


# ---- updates of masks -------------------------------------------------------------------------------------------


def argsort_gradual(theta: Tree, masks: Tree) -> Tree:
  """The k largest of each layer as one writes it by hand: sort its indices, set the first k."""
  counts = make_counts(theta, SPARSITY)
  return jax.tree.map(lambda x, k, m: top_by_argsort(jnp.where(m, jnp.abs(x), -1.0), k), theta, counts, masks)


def argsort_rigl(theta: Tree, grads: Tree, masks: Tree) -> Tree:
  """RigL's exchange of a tenth, by two sorts a layer."""
  def leaf(x: jax.Array, g: jax.Array, m: jax.Array, k: int) -> jax.Array:
    kept = top_by_argsort(jnp.where(m, jnp.abs(x), -1.0), k - k // 10)
    return kept | top_by_argsort(jnp.where(kept, -1.0, jnp.abs(g)), k // 10)
  return jax.tree.map(leaf, theta, grads, masks, make_counts(theta, SPARSITY))


def top_by_argsort(score: jax.Array, k: int) -> jax.Array:
  order = jnp.argsort(-score.ravel())
  return jnp.zeros(score.size, bool).at[order[:k]].set(True).reshape(score.shape)


def mask_updates(quick: bool) -> list[Row]:
  """All layers of a ResNet-50 at once, against argsorts."""
  rounds = 3 if quick else 7
  theta = weights_of(resnet50())
  grads = random_like(theta, 1)
  total = sum(x.size for x in jax.tree.leaves(theta))
  rows: list[Row] = [] if jax.default_backend() == 'cpu' else [resnet50_step(rounds)]
  rules = {'gradual': updaters.gradual(SPARSITY, 0, 10 * EVERY, EVERY, uniform),
           'RigL': updaters.rigl(SPARSITY, 10 * EVERY, EVERY, 0.2, uniform)}
  by_hand = {'gradual': lambda t, g, m: argsort_gradual(t, m), 'RigL': argsort_rigl}
  for name, target in (('gradual', 0.35), ('RigL', 0.7)):
    updater = rules[name]
    masks, memory = jax.jit(updater.init)(theta, jax.random.key(2))
    ours = jax.jit(functools.partial(updater.update, jnp.int32(5 * EVERY)))
    naive = jax.jit(by_hand[name])
    functions = {'ours': lambda f=ours, m=masks, s=memory: jax.block_until_ready(f(m, s, theta, grads))}
    wall = take_turns(functions, rounds)['ours'].wall
    rows.append(row(f'{name}: masks of ResNet-50, {total / 1e6:.1f} M weights', statistics.median(wall), 's', target,
                    low=min(wall), high=max(wall)))
    functions['argsort'] = lambda f=naive, m=masks: jax.block_until_ready(f(theta, grads, m.forward))
    both = take_turns(functions, 1 if quick else 3)
    rows.append(ratio(f'{name}: by argsort, layer by layer / ours', both['argsort'], both['ours'], 7.0, least=True))
    if jax.default_backend() != 'cpu':
      share = statistics.median(wall) / rows[0]['value']
      rows.append(row(f'{name}: masks of ResNet-50 / a training step of it, batch {LARGE}, 224²', share, '×'))
  return rows


def resnet50_step(rounds: int) -> Row:
  """Seconds of a training step of a dense ResNet-50 in the default precision: for an accelerator."""
  net = hk.transform_with_state(lambda x: hk.nets.ResNet50(1000)(x, True))
  images = jax.random.uniform(jax.random.key(0), (LARGE, 224, 224, 3))
  labels = jax.random.randint(jax.random.key(1), (LARGE,), 0, 1000)
  turn = stepper(net.init, lambda p, s, x: net.apply(p, s, None, x), None, images, labels)(0)
  wall = take_turns({'': turn}, rounds)[''].wall
  return row(f'ResNet-50: a dense training step, batch {LARGE}, 224²', statistics.median(wall), 's',
             low=min(wall), high=max(wall))


def growth(quick: bool) -> list[Row]:
  """Time by weights and by layers: linear where the time of each is the same."""
  rows = []
  for n, layers in ((10**5, 1), (10**6, 1), (10**7, 1), (10**5, 10), (10**5, 100)):
    theta = {f'l{i}': jax.random.normal(jax.random.key(i), (n // 100, 100)) for i in range(layers)}
    updater = updaters.gradual(SPARSITY, 0, 10 * EVERY, EVERY, uniform)
    masks, memory = updater.init(theta, None)
    call = functools.partial(jax.jit(functools.partial(updater.update, jnp.int32(5 * EVERY))), masks, memory, theta, theta)
    wall = take_turns({'': lambda f=call: jax.block_until_ready(f())}, 3 if quick else 7)[''].wall
    each = 1e9 * statistics.median(wall) / (n * layers)
    rows.append(row(f'gradual: {layers} layers of {n:.0e} weights', each, 'ns per weight'))
  return rows


def memory(quick: bool) -> list[Row]:
  """What the state of `sparsify` adds on a ResNet-50, and what an update needs beside its arguments and results."""
  params = resnet50()
  size = sum(x.size for x in jax.tree.leaves(weights_of(params)))
  rows = []
  for name, updater in (('gradual', updaters.gradual(SPARSITY, 0, 10 * EVERY, EVERY, uniform)),
                        ('RigL', updaters.rigl(SPARSITY, 10 * EVERY, EVERY, 0.2, uniform)),
                        ('Top-KAST', updaters.top_kast(SPARSITY, 0.8, EVERY, distribution=uniform)),
                        ('SNFS', updaters.snfs(SPARSITY, 10 * EVERY, EVERY, 0.2, uniform))):
    inner, dense = optax.sgd(0.1, 0.9), optax.sgd(0.1, 0.9)
    tx = powerprop.sparsify(inner, updater, key=jax.random.key(0))
    states = [jax.eval_shape(t.init, params) for t in (tx, dense)]
    held = [sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(state) if hasattr(x.dtype, 'itemsize')) for state in states]
    rows.append(row(f"{name}: state on top of the optimiser's, ResNet-50", (held[0] - held[1]) / size, 'bytes per weight'))
    compiled = jax.jit(tx.update, donate_argnums=(0, 1)).lower(params, states[0], params).compile()
    temporary = compiled.memory_analysis().temp_size_in_bytes
    rows.append(row(f"{name}: temporary memory of a step's update, ResNet-50", temporary / size, 'bytes per weight'))
  return rows


# ---- steps ------------------------------------------------------------------------------------------------------


def stepper(init: Callable[..., Any], apply: Callable[..., Any], updater: SparsityUpdater | None, images: jax.Array,
            labels: jax.Array) -> Callable[[int], Callable[[], Any]]:
  """n → one more training step, by momentum, each time it is called, at step n of the schedule. One compilation."""
  inner = optax.with_extra_args_support(optax.sgd(0.1, 0.9))
  tx = inner if updater is None else powerprop.sparsify(inner, updater, key=jax.random.key(3))

  @functools.partial(jax.jit, donate_argnums=0)
  def step(state: Any, images: jax.Array, labels: jax.Array, n: jax.Array) -> Any:
    phi, opt_state, net_state = state
    def loss_fn(theta: Tree) -> Any:
      logits, new = apply(theta, net_state, images)
      return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean(), new
    theta = phi if updater is None else powerprop.masked(opt_state, phi)
    grads, net_state = jax.grad(loss_fn, has_aux=True)(theta)
    updates, opt_state = tx.update(grads, opt_state, phi, step=n)
    return optax.apply_updates(phi, updates), opt_state, net_state

  phi, net_state = jax.jit(init)(jax.random.key(2), images[:1])
  state = phi, jax.jit(tx.init)(phi), net_state

  def at(n: int) -> Callable[[], Any]:
    def turn() -> Any:
      nonlocal state
      state = jax.block_until_ready(step(state, images, labels, jnp.int32(n)))
    return turn
  return at


def overheads(quick: bool) -> list[Row]:
  """A step of a ResNet-20, on an accelerator of a ResNet-18, at batch 128 with masks, against one without, by momentum: between
  two updates of masks, at one, and the two weighed as one update in 100 steps."""
  title, model = ('ResNet-20', 'resnet_20') if jax.default_backend() == 'cpu' else ('ResNet-18', 'resnet_18')
  net = hk.transform_with_state(MODELS[model](10, 0.0).forward)
  images = jax.random.uniform(jax.random.key(0), (BATCH, 32, 32, 3))
  labels = jax.random.randint(jax.random.key(1), (BATCH,), 0, 10)
  rules: dict[str, SparsityUpdater | None] = {
      'dense': None, 'gradual': updaters.gradual(SPARSITY, 0, 10 * EVERY, EVERY, uniform),
      'RigL': updaters.rigl(SPARSITY, 10 * EVERY, EVERY, 0.2, uniform),
      'Top-KAST': updaters.top_kast(SPARSITY, 0.8, EVERY, distribution=uniform)}
  steppers = {name: stepper(lambda key, x: net.init(key, x, True), lambda p, s, x: net.apply(p, s, None, x, True), updater,
                            images, labels) for name, updater in rules.items()}
  moments = {'between': 5 * EVERY, 'at': 5 * EVERY - 1}
  functions = {f'{name} {when}': steppers[name](n) for name in rules for when, n in moments.items()
               if name != 'dense' or when == 'between'}
  times = take_turns(functions, 2 if quick else 9)
  rows = []
  for name in ('gradual', 'RigL', 'Top-KAST'):
    between, at = times[f'{name} between'], times[f'{name} at']
    rows.append(ratio(f'{title} step: {name} between updates / dense', between, times['dense between'], 1.03))
    weighed = Times(*([(99 * b + a) / 100 for a, b in zip(x, y, strict=True)] for x, y in zip(at, between, strict=True)))
    rows.append(ratio(f'{title} step: {name}, an update in 100 steps / between', weighed, between, 1.02))
  rows.append(ratio(f'{title} step: Top-KAST, masks at every step / dense', times['Top-KAST at'], times['dense between'], 1.15))
  return rows


def run(quick: bool) -> list[Row]:
  return mask_updates(quick) + growth(quick) + memory(quick) + overheads(quick)
