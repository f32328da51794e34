"""Schedules against tables typed by hand."""
import numpy as np
import pytest

from powerprop.schedules import check_steps, cosine, cubic, due


@pytest.mark.parametrize('start, end, every, expected', [
  (2, 8, 3, [2, 5, 8]), (2, 9, 3, [2, 5, 8, 9]), (0, 4, 2, [0, 2, 4]), (5, 5, 1, [5]), (3, 4, 100, [3, 4])])
def test_due_on_the_grid_and_at_the_end(start, end, every, expected):
  assert [n for n in range(15) if due(n, start, end, every)] == expected


def test_cubic_by_hand():
  found = [float(cubic(n, 10, 20)) for n in (0, 10, 15, 18, 20, 99)]
  np.testing.assert_allclose(found, [0, 0, 1 - 0.125, 1 - 0.008, 1, 1], rtol=1e-6)
  assert found[-2:] == [1.0, 1.0] and [float(cubic(n, 7, 7)) for n in (6, 7)] == [0.0, 1.0]


def test_cosine_by_hand():
  np.testing.assert_allclose([float(cosine(n, 80, 0.3)) for n in (0, 20, 40, 80, 100)],
                             [0.3, 0.15 * (1 + np.sqrt(0.5)), 0.15, 0, 0], atol=1e-7)


@pytest.mark.parametrize('steps, message', [
  ((5, 4, 1), 'start_step=5, end_step=4'), ((-1, 4, 1), 'start_step must be an integer of at least 0, got -1'),
  ((0, 0, 1), 'end_step must be an integer of at least 1'), ((0, 4, 0), 'every_steps must be an integer of at least 1, got 0'),
  ((0, 4.0, 1), 'end_step must be an integer of at least 1, got 4.0')])
def test_errors(steps, message):
  with pytest.raises(ValueError, match=message):
    check_steps(*steps)
