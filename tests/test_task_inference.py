"""Which task: entropies by NumPy, and SupSup's gradient against autodiff by the weights of the masks themselves."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from powerprop import powerpropagation, task_inference, task_masks
from powerprop.task_inference import infer_by_entropy, infer_by_gradient

REPARAM = powerpropagation(2.0)
RNG = np.random.default_rng(6)
SLOTS, HERE = 4, [0, 2, 3]


def test_the_surest_mask_in_numpy():
  logits = RNG.normal(size=(SLOTS, 5, 3)).astype(np.float32)
  logits[0, 0] = [1e4, 0, -1e4]   # no doubt at all, and no NaN
  here = np.isin(np.arange(SLOTS), HERE)
  p = np.exp(logits - logits.max(-1, keepdims=True), dtype=np.float64)
  p /= p.sum(-1, keepdims=True)
  entropy = -np.sum(np.where(p > 0, p * np.log(np.where(p > 0, p, 1)), 0), -1)
  np.testing.assert_allclose(task_inference.entropy(jnp.asarray(logits)), entropy, rtol=1e-5, atol=1e-6)
  each = infer_by_entropy(jnp.asarray(logits), jnp.asarray(here))
  assert each.task.tolist() == [HERE[i] for i in entropy[HERE].argmin(0)]
  assert int(each.task[0]) == 0 and np.isneginf(each.scores[1]).all()
  whole = infer_by_entropy(jnp.asarray(logits), jnp.asarray(here), together=True)
  assert int(whole.task) == HERE[entropy[HERE].mean(1).argmin()]
  np.testing.assert_allclose(whole.scores[np.array(HERE)], -entropy[HERE].mean(1), rtol=1e-5)
  with pytest.raises(ValueError, match=r'here is \[slots\]; got \(4, 5, 3\) and \(3,\)'):
    infer_by_entropy(jnp.asarray(logits), jnp.ones(3, bool))


def test_outputs_without_a_part_and_networks_that_have_diverged():
  """A logit of −∞ is as good as not there; NaN wins nothing; without a task there is none to be inferred."""
  few, minus = RNG.normal(size=(2, 5, 3)).astype(np.float32), np.full((2, 5, 2), -np.inf, np.float32)
  np.testing.assert_allclose(task_inference.entropy(jnp.concatenate([few, minus], -1)), task_inference.entropy(few), rtol=1e-6)
  slope = jax.grad(lambda x: task_inference.entropy(jnp.append(x, -jnp.inf)))(jnp.asarray(few[0, 0]))
  np.testing.assert_allclose(slope, jax.grad(task_inference.entropy)(jnp.asarray(few[0, 0])), rtol=1e-5)
  broken = jnp.stack([jnp.asarray(few[0]), jnp.full((5, 3), jnp.nan)])
  for together in (False, True):
    found = infer_by_entropy(broken, jnp.ones(2, bool), together)
    assert (found.task == 0).all() and np.isneginf(found.scores[1]).all()
    assert (infer_by_entropy(broken, jnp.zeros(2, bool), together).task == -1).all()
    assert (infer_by_entropy(broken[1:], jnp.ones(1, bool), together).task == -1).all()
  memory = task_masks.begin({'w': jnp.ones((3, 2))}, 2)
  assert int(infer_by_gradient(lambda p: jnp.ones((4, 3)) @ p['w'], memory, {'w': jnp.ones((3, 2))}).task) == -1


@pytest.mark.parametrize('rest', ['frozen', 'own'])
def test_one_gradient_step_is_autodiff_by_the_weights_of_the_masks(rest):
  """∂H / ∂a_t at a_t = 1/T, T the tasks that are there, of the mixture written out; one slot is empty."""
  phi = {'a': {'w': jnp.asarray(RNG.normal(size=(6, 8)), jnp.float32), 'b': jnp.asarray(RNG.normal(size=8), jnp.float32)},
         'head': {'w': jnp.asarray(RNG.normal(size=(8, 3)), jnp.float32)}}
  x = jnp.asarray(RNG.normal(size=(10, 6)), jnp.float32)
  memory = task_masks.begin(phi, SLOTS, rest=rest, heads=lambda name, leaf: name.startswith('head'))
  def other(v):
    return jnp.asarray(RNG.normal(size=v.shape), jnp.float32)
  tasks = {t: (jnp.asarray(RNG.random((6, 8)) < 0.4), jax.tree.map(other, phi)) for t in HERE}
  remember = jax.jit(task_masks.remember)
  for t, (mask, params) in tasks.items():
    memory = remember(memory, t, {'a': {'w': mask, 'b': None}, 'head': {'w': None}}, params)

  def apply(theta):
    return jax.nn.relu(x @ theta['a']['w'] + jnp.broadcast_to(theta['a']['b'], (10, 8))) @ theta['head']['w']

  def squared(v):
    return v * jnp.abs(v)   # Ψ at α = 2

  def entropy(a):
    w = sum(a[i] * squared(jnp.where(tasks[t][0], phi['a']['w'], 0)) for i, t in enumerate(HERE))
    head = sum(a[i] * squared(tasks[t][1]['head']['w']) for i, t in enumerate(HERE))
    b = phi['a']['b'] if rest == 'frozen' else sum(a[i] * tasks[t][1]['a']['b'] for i, t in enumerate(HERE))
    log_p = jax.nn.log_softmax(apply({'a': {'w': w, 'b': b}, 'head': {'w': head}}))
    return -jnp.mean(jnp.sum(jnp.exp(log_p) * log_p, -1))
  slope = jax.jit(jax.grad(entropy))(jnp.full(3, 1 / 3))
  found = jax.jit(lambda memory, phi: infer_by_gradient(apply, memory, phi, REPARAM.weights))(memory, phi)
  np.testing.assert_allclose(found.scores[np.array(HERE)], -slope, rtol=1e-4, atol=1e-6)
  assert int(found.task) == HERE[int(np.argmin(slope))] and np.isneginf(found.scores[1])


def test_a_count_among_the_leaves_has_no_slope():
  """As BatchNorm's: scores are those without it, whatever it is."""
  x, w = RNG.normal(size=(6, 4)), jnp.asarray(RNG.normal(size=(4, 3)), jnp.float32)
  mask = jnp.asarray(RNG.random((2, 4, 3)) < 0.5)
  scores = []
  for count in ({}, {'n': jnp.int32(7)}):
    phi = {'w': w, **count}
    memory = task_masks.begin(phi, 2, where=lambda name, leaf: name == 'w', rest='own')
    for t in range(2):
      memory = task_masks.remember(memory, t, {'w': mask[t], **dict.fromkeys(count)}, phi)
    scores.append(infer_by_gradient(lambda p: x @ p['w'], memory, phi).scores)
  np.testing.assert_array_equal(*scores)


def test_both_find_the_task_where_masks_know_their_inputs():
  """Task t has the weights of its own three features, and inputs in which only those are not noise."""
  w = np.zeros((9, 3), np.float32)
  memory = task_masks.begin({'w': jnp.asarray(w)}, 3, where=lambda name, leaf: True)
  for t in range(3):
    w[3 * t:3 * t + 3] = 4 * np.eye(3)
    mask = np.zeros((9, 3), bool)
    mask[3 * t:3 * t + 3] = True
    memory = task_masks.remember(memory, t, {'w': jnp.asarray(mask)}, {'w': jnp.asarray(w)})
  theta = {'w': jnp.asarray(w)}

  @jax.jit
  def infer(x):
    each = jax.lax.map(lambda t: x @ task_masks.recall(memory, t, theta)['w'], jnp.arange(3))
    return (infer_by_entropy(each, memory.here).task, infer_by_entropy(each, memory.here, together=True).task,
            infer_by_gradient(lambda p: x @ p['w'], memory, theta).task)
  for t in range(3):
    x = 0.1 * RNG.normal(size=(30, 9))
    x[np.arange(30), 3 * t + RNG.integers(3, size=30)] += 1
    each, together, gradient = infer(jnp.asarray(x, jnp.float32))
    assert (each == t).all() and int(together) == int(gradient) == t
