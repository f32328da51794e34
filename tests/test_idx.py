"""The IDX parser and reader on hostile bytes."""

import gzip
import struct
import tracemalloc

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from made_sets import as_idx

from experiments.data import idx
from experiments.errors import DataError


def reference_parse(raw):
  """(shape, values) by struct and a loop, or None where the bytes are not exactly one IDX array."""
  if len(raw) < 4 or tuple(raw[:3]) != (0, 0, 8) or raw[3] not in (1, 2, 3, 4) or len(raw) < 4 + 4 * raw[3]:
    return None
  shape = struct.unpack_from(f'>{raw[3]}I', raw, 4)
  count = 1
  for size in shape:
    count *= size
  values = list(raw[4 + 4 * raw[3]:])
  return (shape, values) if count > 0 and len(values) == count else None


@st.composite
def idx_like(draw):
  """Bytes that are IDX, nearly IDX, or nothing of the kind."""
  if draw(st.integers(0, 5)) == 0:
    return draw(st.binary(max_size=64))
  shape = draw(st.lists(st.integers(0, 5), max_size=5))
  magic = draw(st.sampled_from([b'\0\0\x08'] * 5 + [b'\0\0\x09', b'\0\x01\x08', b'\x1f\x8b\x08']))
  raw = bytearray(magic + bytes([len(shape)]) + b''.join(struct.pack('>I', size) for size in shape))
  raw += draw(st.binary(max_size=4)) if draw(st.integers(0, 3)) == 0 else bytes(int(np.prod(shape)))
  change = draw(st.sampled_from(['none', 'cut', 'add', 'set']))
  if change == 'cut':
    raw = raw[:draw(st.integers(0, len(raw)))]
  elif change == 'add':
    raw += draw(st.binary(min_size=1, max_size=3))
  elif change == 'set':
    raw[draw(st.integers(0, len(raw) - 1))] = draw(st.sampled_from([0, 1, 2, 127, 255]))
  return bytes(raw)


@settings(max_examples=1000, deadline=None)
@given(idx_like())
@example(b'\0\0\x08\x02' + b'\xff' * 8)  # claims 2^64 values
@example(b'\0\0\x08\x03' + bytes(4) + b'\xff' * 8)  # none of them, but of a shape that NumPy refuses
@example(b'\0\0\x08\x04' + struct.pack('>4I', 1, 1, 1, 2) + b'\1\2')
@example(b'\0\0\x08\0')
def test_parser_agrees_with_reference_on_any_bytes(raw):
  expected = reference_parse(raw)
  if expected is None:
    with pytest.raises(DataError, match=r'^hostile: .'):
      idx.parse_idx(raw, 'hostile')
  else:
    array = idx.parse_idx(raw, 'hostile')
    assert array.dtype == np.uint8 and array.shape == expected[0] and array.ravel().tolist() == expected[1]


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(1, 6), min_size=1, max_size=4), st.randoms(use_true_random=False))
def test_parser_returns_what_was_written(shape, random):
  array = np.array([random.randrange(256) for _ in range(int(np.prod(shape)))], np.uint8).reshape(shape)
  np.testing.assert_array_equal(idx.parse_idx(as_idx(array), 'x'), array)
  np.testing.assert_array_equal(idx.parse_idx(as_idx(array), 'x', array.shape), array)


def peak_bytes(function):
  """Result, and the most memory that Python and NumPy held for it at once."""
  tracemalloc.start()
  try:
    return function(), tracemalloc.get_traced_memory()[1]
  finally:
    tracemalloc.stop()


def test_parser_allocates_nothing_for_what_a_header_claims_or_holds():
  def claim():
    with pytest.raises(DataError, match='truncated'):
      idx.parse_idx(b'\0\0\x08\x01' + struct.pack('>I', 2 ** 31) + bytes(100), 'x')
  raw = as_idx(np.zeros((1000, 1000), np.uint8))
  assert peak_bytes(claim)[1] < 100_000  # pytest.raises and the message; the claim is 2 GB
  assert peak_bytes(lambda: idx.parse_idx(raw, 'x'))[1] < 100_000  # a view: the values are 1 MB


def test_gzip_bomb_costs_no_more_than_the_expected_size(tmp_path):
  path = tmp_path / 'train-images-idx3-ubyte.gz'
  header = struct.pack('>4B3I', 0, 0, 8, 3, 10, 28, 28)
  with gzip.open(path, 'wb', 9) as file:
    file.write(header)
    for _ in range(64):
      file.write(bytes(2 ** 20))
  def read():
    with pytest.raises(DataError, match='too long'):
      idx.read_idx(path, (10, 28, 28))
  assert peak_bytes(read)[1] < 2 ** 20  # 7,857 bytes are wanted, gzip's buffers take 100 kB, the whole 64 MB


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_reader_on_damaged_gzip_gives_the_array_or_a_data_error(tmp_path_factory, draw):
  array = np.arange(60, dtype=np.uint8).reshape(3, 4, 5)
  raw = bytearray(gzip.compress(as_idx(array), mtime=0))
  for _ in range(draw.draw(st.integers(0, 3))):
    raw[draw.draw(st.integers(0, len(raw) - 1))] = draw.draw(st.integers(0, 255))
  raw = raw[:draw.draw(st.sampled_from([len(raw), len(raw), len(raw) - 1, 9, 2, 1, 0]))]
  raw += draw.draw(st.sampled_from([b'', b'', b'\0\0', b'rest', bytes(raw)]))
  path = tmp_path_factory.getbasetemp() / 'damaged.gz'
  path.write_bytes(raw)
  try:
    result = idx.read_idx(path, (3, 4, 5))
  except DataError as error:
    assert str(error).startswith(f'{path}: ')  # which file, and below a single line
    assert '\n' not in str(error)
  else:
    np.testing.assert_array_equal(result, array)  # gzip's CRC covers every byte of it
