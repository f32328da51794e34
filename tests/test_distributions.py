"""Counts of weights: totals exact, by tables typed by hand and by an independent solution of ERK's equation."""
import math

import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from powerprop.distributions import erk, globally, leave_dense, make_counts, uniform

LENET = {'linear_0': {'w': np.zeros((784, 300)), 'b': None}, 'linear_1': {'w': np.zeros((300, 100)), 'b': None},
         'linear_2': {'w': np.zeros((100, 10)), 'b': None}}
shapes = st.lists(st.lists(st.integers(1, 9), min_size=1, max_size=4), min_size=1, max_size=6)


def of(*sizes):
  return {f'l{i}': np.zeros(n) for i, n in enumerate(sizes)}


@pytest.mark.parametrize('sizes, sparsity, expected', [
  ((100, 10), 0.9, [10, 1]), ((30, 30, 30), 0.9, [3, 3, 3]), ((10, 10, 10), 0.75, [3, 3, 2]),   # 2.5 each, 7.5 in all: 8
  ((7, 7), 0.5, [4, 3]), ((5, 50), 0.0, [5, 50]), ((3, 1000), 0.8, [1, 200]), ((1, 1, 10), 0.45, [1, 1, 5]),   # 0.55: one
  ((17, 13), 0.8, [3, 3]), ((13, 17), 0.8, [3, 3]),   # 3.4 and 2.6: the larger remainder gets the sixth, not the first name
  ((30, 14), 0.9, [3, 1]), ((5,), 0.5, [3])])   # 0.1 · 30 is a bit less than 3 in floats; a half is rounded up
def test_uniform_by_hand(sizes, sparsity, expected):
  assert list(uniform(of(*sizes), sparsity).values()) == expected


def test_uniform_of_lenet():
  assert jax.tree.leaves(uniform(LENET, 0.95)) == [11760, 1500, 50]


def test_erk_by_another_road():
  """ε by bisection in float64 of Σ min(1, ε r_l) n_l = total, which has one solution."""
  weights = [np.zeros((3, 3, 3, 16)), np.zeros((3, 3, 16, 32)), np.zeros((512, 10)), np.zeros((4, 2))]
  for sparsity in (0.5, 0.8, 0.9):
    sizes = np.array([w.size for w in weights], float)
    raw = np.array([sum(w.shape) for w in weights]) / sizes
    total, low, high = (1 - sparsity) * sizes.sum(), 0.0, 1e6
    for _ in range(200):
      middle = (low + high) / 2
      low, high = (middle, high) if np.sum(np.minimum(1, middle * raw) * sizes) < total else (low, middle)
    ideal = np.minimum(1, low * raw) * sizes
    counts = erk(weights, sparsity)
    assert sum(counts) == round(total) and np.max(np.abs(np.array(counts) - ideal)) < 1
    assert counts[3] == 8 or sparsity > 0.8   # the smallest is dense


@given(shapes, st.floats(0, 0.99), st.sampled_from([uniform, erk]))
def test_totals_are_exact_and_layers_live(shapes, sparsity, distribution):
  weights = [np.zeros(shape) for shape in shapes]
  sizes = [w.size for w in weights]
  try:
    counts = distribution(weights, sparsity)
  except ValueError as error:   # a leaf that is to keep less than half a weight, or fewer weights than leaves
    assert 'less than one' in str(error)
    total = math.floor((1 - sparsity) * sum(sizes) + 0.5 + 1e-6)
    assert 'keeps' in str(error) and (total < len(sizes) or f'weights, less than one for each of {len(sizes)}' not in str(error))
    return
  assert all(1 <= k <= n for k, n in zip(counts, sizes, strict=True))
  assert abs(sum(counts) - (1 - sparsity) * sum(sizes)) <= 0.5 + 1e-5


def test_many_small_leaves_that_are_lifted_to_one_weight():
  """53.5 of 1070 weights, rounded up: half a weight of each of six leaves becomes one, and the large leaf pays for all."""
  weights = {f'small_{i}': np.zeros(10) for i in range(6)} | {'large': np.zeros(1010)}
  assert uniform(weights, 0.95) == {f'small_{i}': 1 for i in range(6)} | {'large': 48}


def test_erk_fills_layers_in_more_than_one_round():
  """10, 60 and 3000 weights, of which 13.68 % are 420: the first fills up, then, by what it leaves, the second too."""
  raw = [11 / 10, 23 / 60, 130 / 3000]
  first, second = 419.976 / (11 + 23 + 130), 409.976 / (23 + 130)   # ε of the two rounds
  assert first * raw[0] > 1 > first * raw[1] and second * raw[1] > 1
  assert erk([np.zeros((1, 10)), np.zeros((3, 20)), np.zeros((30, 100))], 0.8632) == [10, 60, 350]


def test_one_number_for_all():
  assert globally(LENET, 0.9) == 26620 and globally(of(5), 0.5) == 3 and make_counts(of(5), {'*': 0.5}) == {'l0': 3}


def test_a_mapping_of_patterns():
  counts = make_counts(LENET, {'*_2/w': 0.5, '*': 0.9})
  assert jax.tree.leaves(counts) == [23520, 3000, 500] and counts['linear_0']['b'] is None


def test_dense_leaves_are_not_counted():
  weights = leave_dense(LENET, ['linear_0/*'])
  assert weights['linear_0'] == {'w': None, 'b': None} and globally(weights, 0.9) == 3100
  assert jax.tree.leaves(uniform(weights, 0.9)) == [3000, 100]


@pytest.mark.parametrize('call, message', [
  (lambda: uniform(of(100, 4), 0.9), r'sparsity 0.9 keeps 0.4 of the 4 weights of l1, less than one'),
  (lambda: uniform(of(1, 1, 1, 1), 0.49), r'sparsity 0.49 keeps 2 weights, less than one for each of 4 leaves'),
  (lambda: globally(of(4), 0.9), 'less than one of 4'),
  (lambda: uniform({}, 0.5), 'no leaf is left'),
  (lambda: uniform({'a/w': np.zeros(4), 'a': {'w': np.zeros(9)}}, 0.5), r"two have the same one; there are \['a/w'\]"),
  (lambda: erk(of(10, 0), 0.5), 'l1 has no weights'),
  (lambda: erk(of(10), 1.0), 'below 1; got 1.0'),
  (lambda: erk(of(10), -0.1), 'below 1; got -0.1'),
  (lambda: uniform(of(10), '0.5'), "below 1; got '0.5'"),
  (lambda: make_counts(of(10), {'x': 0.5}), "no pattern for l0; it has \\['x'\\]"),
  (lambda: make_counts(of(10), {'*': 0.99}), 'keeps 0.1 of the 10 weights of l0'),
  (lambda: leave_dense(of(10), ['conv*']), "the pattern 'conv\\*', which fits none of \\['l0'\\]")])
def test_errors(call, message):
  with pytest.raises(ValueError, match=message):
    call()
