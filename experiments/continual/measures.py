"""From the matrix of accuracies to what it says: averages, transfer, forgetting. NumPy, in float64.

A matrix [T + 1, T] of one network has at [t, j] the accuracy on task j + 1 after t tasks; line 0 is before the first. NaN: not
known. Where a measure needs what is not known it is NaN.
"""
import numpy as np


def averages(matrix: np.ndarray) -> np.ndarray:
  """[T]: after t tasks, the mean over these t tasks."""
  return np.array([matrix[t, :t].mean() for t in range(1, len(matrix))])


def backward_transfer(matrix: np.ndarray) -> float:
  """Mean over all tasks but the last of A[T, j] − A[j, j]: what later tasks have done to them, negative where they harmed.

  Source: Lopez-Paz and Ranzato 2017 (arXiv:1706.08840).
  """
  return _mean(matrix[-1, :-1] - np.diagonal(matrix[1:])[:-1])


def forward_transfer(matrix: np.ndarray) -> float:
  """Mean over all tasks but the first of A[j − 1, j] − A[0, j]: what earlier tasks have done for one that was not begun, over the
  network as it was initialised.

  Source: Lopez-Paz and Ranzato 2017 (arXiv:1706.08840).
  """
  return _mean(np.diagonal(matrix[1:], 1) - matrix[0, 1:])


def forgetting(matrix: np.ndarray) -> float:
  """Mean over all tasks but the last of the best accuracy before the end, since it was learned, minus that at the end.

  Where only some lines of the matrix are known, the best of those. Source: Chaudhry et al. 2018 (arXiv:1801.10112).
  """
  size = matrix.shape[1]
  return _mean(np.array([np.nanmax(matrix[j + 1:-1, j]) if not np.isnan(matrix[j + 1:-1, j]).all() else np.nan
                         for j in range(size - 1)]) - matrix[-1, :-1])


def intersection_over_union(masks: np.ndarray) -> np.ndarray:
  """Masks bool [T, n] → [T, T]: of the weights that either task uses, the share that both use; 1 where neither uses any."""
  wide = masks.astype(np.float32)
  both = (wide @ wide.T).astype(np.float64)   # counts are whole, and below 2^24 exact
  either = np.diagonal(both)[:, None] + np.diagonal(both)[None] - both
  return np.where(either > 0, both / np.maximum(either, 1), 1.0)


def _mean(values: np.ndarray) -> float:
  return float(values.mean()) if values.size else float('nan')
