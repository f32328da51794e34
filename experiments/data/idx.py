"""The IDX format of MNIST and its kin: an array of unsigned bytes from a file, which may be hostile."""

import math
import os

import numpy as np

from experiments.data.files import open_unpacked
from experiments.errors import DataError


def parse_idx(data: bytes, name: str, shape: tuple[int, ...] | None = None) -> np.ndarray:
  """Array of an unpacked IDX file: 00 00 08 ndim, ndim big-endian uint32 sizes, then the values row by row.

  Copies nothing: the array is a read-only view of `data`, whatever sizes the header claims.

  Args:
    data: the whole file.
    name: how errors call it.
    shape: the shape that it must have, or None for any of 1 to 4 dimensions, none of them 0.
  Returns: uint8 of the header's shape.
  Raises: DataError on anything but exactly one array of unsigned bytes.
  """
  if len(data) < 4:
    raise DataError(f'{name}: truncated, {len(data)} bytes where an IDX header takes at least 8')
  if data[:3] != b'\0\0\x08' or not 1 <= data[3] <= 4:
    wanted = '00 00 08 ' + ('01 to 04' if shape is None else f'{len(shape):02x}')
    raise DataError(f'{name}: wrong magic number {data[:4].hex(" ")} instead of {wanted} (IDX, uint8)')
  start = 4 + 4 * data[3]
  if len(data) < start:
    raise DataError(f'{name}: truncated, {len(data)} bytes where the header takes {start}')
  found = tuple(int.from_bytes(data[i:i + 4], 'big') for i in range(4, start, 4))
  if shape is not None and found != shape:
    hint = '; are images and labels swapped?' if len(found) != len(shape) else ''
    raise DataError(f'{name}: holds {_what(found)} instead of {_what(shape)}{hint}')
  if 0 in found:
    raise DataError(f'{name}: holds nothing, {_what(found)}')
  end = start + math.prod(found)
  if len(data) < end:
    raise DataError(f'{name}: truncated, {len(data):,} bytes where {_what(found)} take {end:,}')
  if len(data) > end:
    raise DataError(f'{name}: too long, bytes follow after the {end:,} of {_what(found)}')
  return np.frombuffer(data, np.uint8, offset=start).reshape(found)


def read_idx(path: str | os.PathLike[str], shape: tuple[int, ...]) -> np.ndarray:
  """`parse_idx` of a file, plain or gzip (told by its first bytes).

  Of the unpacked file one byte more than `shape` needs is read at most: so much a gzip bomb can cost.

  Raises: DataError that names the file, also where it cannot be read.
  """
  with open_unpacked(path) as stream:
    data = stream.read(4 + 4 * len(shape) + math.prod(shape) + 1)
  return parse_idx(data, str(path), shape)


def _what(shape: tuple[int, ...]) -> str:
  """What an array of this shape is, in words."""
  if len(shape) == 1:
    return f'{shape[0]:,} labels'
  return f'{shape[0]:,} images of {"x".join(map(str, shape[1:]))}'
