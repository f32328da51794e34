"""Masks chosen once, before training, by a score of the weights at initialisation: SNIP, GraSP and SynFlow.

Functions of parameters and data that return a tree of masks for `given`, and not updaters: θ would have to stand still until the
scores are in. They know θ only; the network of any α gets its masks by its weights at initialisation:

    theta = reparam.weights(phi)
    mask = snip_masks(loss_fn, theta, batches, 0.95)
    tx = sparsify(inner, given(mask), reparam)

All run under jit, and under vmap over seeds with parameters and batches mapped. There a mask is a traced value, which `init`
takes and `update` does not look at: give `sparsify(inner, given(mask), reparam).init(phi)` back from the map.

At high sparsity one threshold over all layers may leave one of them nothing, and the network then learns nothing: seen with
SNIP and GraSP, not with SynFlow. What is promised is the total; `at_least` keeps so many of every leaf within it. Where a last
layer begins at zeros, as that of hk.nets.ResNet50, all scores but its own are 0, or all of them, and masks are by chance: give
it another initialiser.
"""
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from powerprop import masks as masks_lib
from powerprop.distributions import Distribution, Sparsity, globally
from powerprop.masks import is_none
from powerprop.reparam import Tree, Where, is_weight, leaf_name
from powerprop.updaters.common import budget, everything, select, sizes, sum_counts, under

Loss = Callable[[Tree, Any], jax.Array]            # (parameters, batch) → scalar
Network = Callable[[Tree, jax.Array], jax.Array]   # (parameters, inputs) → outputs


def snip_masks(loss_fn: Loss, theta: Tree, batches: Any, sparsity: Sparsity, distribution: Distribution = globally,
               dense: Sequence[str] = (), where: Where = is_weight, at_least: int = 0) -> Tree:
  """SNIP: keep the weights to which the loss is most sensitive, s = |θ · ∂L/∂θ|, L the mean loss over all batches.

  The absolute value is of the mean, so that several batches score as the one large batch that they make up: the paper's score,
  in which signs cancel between examples. Since φ ∂L/∂φ = α θ ∂L/∂θ, φ and θ have the same mask where α is the same.

  Cost: a gradient for each batch; memory for one batch and two float32 copies of the weights. Score: |θ ∂L/∂θ|, once;
  distribution and scope: `globally`, by layer for others.

  Args:
    loss_fn: (parameters, batch) → mean loss of the batch, a scalar.
    theta: all parameters, as the network sees them.
    batches: tree of arrays with a leading axis over batches, of equal size.
    sparsity: share of weights removed, or a mapping from patterns of leaf names to shares.
    distribution: `globally`, as in the paper, `erk` or `uniform`.
    dense: patterns of leaf names that are not pruned and not counted.
    where: predicate of leaf name and leaf: which may be pruned; as for `powerpropagation`.
    at_least: every leaf keeps at least so many weights, or all that it has; for one total over all leaves only.
  Returns: tree of bool like `theta`, None for leaves that are not masked.
  Raises: ValueError for settings that cannot be met, and for batches without a common leading axis.
  Source: Lee et al. 2019 (arXiv:1810.02340), eqs. (4) to (6).
  """
  weights = _weights(theta, where)
  grads = _mean(lambda batch: _gradient(loss_fn, theta, weights, batch), weights, batches)
  weights, counts = budget(weights, sparsity, distribution, dense)
  scores = jax.tree.map(lambda x, g: x.astype(jnp.float32) * g, weights, under(weights, grads))
  return _choose(select, scores, counts, at_least)


def grasp_masks(loss_fn: Loss, theta: Tree, batches: Any, sparsity: Sparsity, distribution: Distribution = globally,
                dense: Sequence[str] = (), where: Where = is_weight, at_least: int = 0) -> Tree:
  """GraSP: keep the weights whose removal lowers the gradient flow gᵀg most: the largest θ · Hg, sign included.

    gᵀg at θ + δ ≈ gᵀg + 2 δᵀHg;   removing θ_i, δ_i = −θ_i, changes it by −2 θ_i (Hg)_i

  g and H are of the mean loss over all batches, by the weights alone, those of `dense` leaves included; Hg is the derivative of
  the gradient along g. Differs from the paper: no temperature divides the logits, which `loss_fn` may do; and what is scored is
  θ as it is given, where the paper draws the linear layers anew.

  Cost: a gradient and a Hessian-vector product, two to three gradients more, for each batch; memory for one batch. Score: θ · Hg,
  once; distribution and scope: as for `snip_masks`.

  Args: as for `snip_masks`.
  Source: Wang et al. 2020 (arXiv:2002.07376), section 4, eqs. (6) to (8).
  """
  weights = _weights(theta, where)
  g = jax.tree.map(lambda x, v: v.astype(x.dtype), weights,
                   _mean(lambda batch: _gradient(loss_fn, theta, weights, batch), weights, batches))

  def product(batch: Any) -> Tree:
    return jax.jvp(lambda w: _gradient(loss_fn, theta, w, batch), (weights,), (g,))[1]

  curved = _mean(product, weights, batches)
  weights, counts = budget(weights, sparsity, distribution, dense)
  scores = jax.tree.map(lambda x, h: x.astype(jnp.float32) * h, weights, under(weights, curved))
  return _choose(_select_signed, scores, counts, at_least)


def synflow_masks(network: Network, theta: Tree, shape: Sequence[int], sparsity: Sparsity, distribution: Distribution = globally,
                  dense: Sequence[str] = (), where: Where = is_weight, rounds: int = 100) -> Tree:
  """SynFlow: keep the weights that carry most of the flow R = Σ network(|θ|, 1), pruning a little at a time and without data.

    s = θ · ∂R/∂θ;   m ← top(s, N (k / N)^(i / rounds), m),   i = 1, ..., rounds

  R of a deep network leaves the range of float32: a layer of n inputs multiplies it by some √n. Input and output are scaled by
  R^(−1/2) each, which multiplies all scores by one number and leaves the masks as they are; R may lie in 10^(±68). For that the
  output has to be in proportion to the input: activations are ReLU, biases 0, as at initialisation, and batch normalisation
  uses its stored averages.

  Cost: `rounds` gradients and three times as many forward passes, of one example. Score: θ · ∂R/∂θ, in rounds; distribution and
  scope: as for `snip_masks`.

  Args:
    network: (parameters, inputs) → outputs; parameters that are no weights enter as |x|, too.
    theta: all parameters, as the network sees them.
    shape: of the inputs, with their batch axis: (1, 28, 28, 1).
    sparsity, distribution, dense, where: as for `snip_masks`.
    rounds: at least 1; 100 in the paper.
  Returns: tree of bool like `theta`, None for leaves that are not masked.
  Raises: ValueError for settings that cannot be met.
  Source: Tanaka et al. 2020 (arXiv:2006.05467), algorithm 1.
  """
  if type(rounds) is not int or rounds < 1:
    raise ValueError(f'rounds must be an integer of at least 1, got {rounds!r}.')
  weights, counts = budget(_weights(theta, where), sparsity, distribution, dense)
  together = isinstance(counts, int)
  size = jax.tree.map(lambda x: jnp.abs(x).astype(jnp.float32), theta)
  ones = jnp.ones(tuple(shape), jnp.float32)

  def prune(mask: Tree, now: Any) -> tuple[Tree, None]:
    live = masks_lib.apply(mask, under(mask, size))
    return select(_flow(lambda w, x: network(_put(w, size), x), live, ones), now, together, mask), None

  table = jax.tree.map(lambda k, n: jnp.asarray(_geometric(n, k, rounds)), counts, sizes(weights, together))
  return lax.scan(prune, everything(weights), table)[0]


def _flow(network: Network, weights: Tree, ones: jax.Array) -> Tree:
  """|θ| · ∂R/∂|θ| divided by R: activations and gradients meet half-way in the exponents of float32."""
  def output(w: Tree, scale: jax.Array) -> jax.Array:
    return scale * jnp.sum(network(w, scale * ones).astype(jnp.float32))

  # R is scale⁻² of what comes out; of three scales one is finite and not 0, unless no flow is left.
  scales = 2.0 ** jnp.array([0.0, -100.0, 100.0], jnp.float32)
  logs = lax.map(lambda scale: jnp.log(output(weights, scale)) - 2 * jnp.log(scale), scales)
  found = jnp.isfinite(logs)
  scale = jnp.where(jnp.any(found), jnp.exp(-logs[jnp.argmax(found)] / 2), 1.0)
  return jax.tree.map(jnp.multiply, weights, jax.grad(output)(weights, scale))


def _choose(pick: Callable[[Tree, Any, bool, Tree], Tree], scores: Tree, counts: Any, at_least: int) -> Tree:
  """Masks of `counts` entries; where one number is for all leaves, `at_least` of each go first."""
  together, live = isinstance(counts, int), everything(scores)
  if type(at_least) is not int or at_least < 0:
    raise ValueError(f'at_least must be an integer of at least 0, got {at_least!r}.')
  if not at_least:
    return pick(scores, counts, together, live)
  if not together:
    raise ValueError('at_least is for one total over all leaves, as by `globally`; other distributions say what each leaf keeps.')
  least = jax.tree.map(lambda x: min(at_least, x.size), scores)
  held = sum(jax.tree.leaves(least))
  if held > counts:
    raise ValueError(f'at_least={at_least} keeps {held} weights, more than the {counts} that the sparsity leaves.')
  first = pick(scores, least, False, live)
  rest = pick(scores, counts - held, True, jax.tree.map(jnp.logical_not, first))
  return jax.tree.map(jnp.logical_or, first, rest)


def _select_signed(scores: Tree, counts: Any, together: bool, live: Tree) -> Tree:
  """As `select`, but by the score with its sign: what is too many goes from below, the most negative first."""
  def count(mask: Tree) -> Any:
    return sum_counts(mask) if together else masks_lib.counts(mask)

  below = jax.tree.map(lambda s, m: m & (s < 0), scores, live)
  gone = select(scores, jax.tree.map(lambda n, k: n - k, count(live), counts), together, below)
  stay = jax.tree.map(lambda b, g: b & ~g, below, gone)
  more = jax.tree.map(lambda k, n: k - n, counts, count(stay))
  above = select(scores, more, together, jax.tree.map(lambda m, b: m & ~b, live, below))
  return jax.tree.map(jnp.logical_or, stay, above)


def _weights(theta: Tree, where: Where) -> Tree:
  """θ where a leaf may be pruned, None elsewhere."""
  return jax.tree_util.tree_map_with_path(lambda path, x: x if where(leaf_name(path), x) else None, theta)


def _put(weights: Tree, theta: Tree) -> Tree:
  """All parameters: `weights`, and those of θ where they are None."""
  return jax.tree.map(lambda w, x: x if w is None else w, weights, theta, is_leaf=is_none)


def _gradient(loss_fn: Loss, theta: Tree, weights: Tree, batch: Any) -> Tree:
  return jax.grad(lambda w: loss_fn(_put(w, theta), batch))(weights)


def _mean(f: Callable[[Any], Tree], like: Tree, batches: Any) -> Tree:
  """Mean of f over the leading axis, float32, one batch at a time."""
  shapes = [jnp.shape(x) for x in jax.tree.leaves(batches)]
  lengths = {shape[:1] for shape in shapes}
  if len(lengths) != 1 or lengths <= {(), (0,)}:
    raise ValueError(f'batches need one leading axis over at least one batch; got the shapes {shapes}.')
  number = shapes[0][0]

  def add(total: Tree, batch: Any) -> tuple[Tree, None]:
    return jax.tree.map(lambda t, x: t + x.astype(jnp.float32) / number, total, f(batch)), None
  return lax.scan(add, jax.tree.map(lambda x: jnp.zeros_like(x, jnp.float32), like), batches)[0]


def _geometric(size: int, count: int, rounds: int) -> np.ndarray:
  """[rounds] int32: counts from `size`, not included, down to `count`, each the same share of the one before."""
  return np.round(size * (count / size) ** (np.arange(1, rounds + 1) / rounds)).astype(np.int32)
