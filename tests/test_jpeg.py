"""Crops of photographs: their geometry against ramps, whose values between pixels are known, and files of every kind."""
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from made_photographs import encoded, ramp

from experiments.data import jpeg
from experiments.data.jpeg import Box

pytest.importorskip('simplejpeg')
pytest.importorskip('cv2')


def expected(height, width, box, size):
  """The ramp of that size at the centres of `size` × `size` cells of the box, in float64."""
  y = box.top + (np.arange(size) + 0.5) * box.height / size - 0.5
  x = box.left + (np.arange(size) + 0.5) * box.width / size - 0.5
  plane = 20 + 150 * x[None] / (width - 1) + 50 * y[:, None] / (height - 1)
  return np.stack([plane + 10 * c for c in range(3)], 2)


@pytest.mark.parametrize('read', [jpeg.decode, jpeg.decode_any])
@pytest.mark.parametrize('height, width, box, size', [
    (375, 500, Box(40, 60, 300, 200), 224),    # at its full size
    (375, 500, Box(0, 0, 375, 500), 224),      # libjpeg's half would be too low
    (450, 500, Box(0, 20, 448, 470), 224),     # half
    (450, 500, Box(30, 0, 400, 480), 64),      # a quarter
    (449, 503, Box(1, 2, 440, 500), 32),       # an eighth, of sizes that it does not divide
    (90, 70, Box(10, 5, 20, 30), 64),          # made larger
    (60, 60, Box(30, 59, 1, 1), 1)])
def test_a_part_of_a_ramp(read, height, width, box, size):
  image = read(encoded(ramp(height, width)), lambda h, w: (h, w) == (height, width) and box, size)
  assert image.dtype == np.uint8 and image.shape == (size, size, 3)
  # JPEG of quality 95 is off by 2, rounding by 1, and a scaled crop begins at a whole pixel: up to 8 of the image's.
  slope = 8 * (150 / (width - 1) + 50 / (height - 1)) if read is jpeg.decode and size <= 64 and height > 400 else 0.7
  difference = image - expected(height, width, box, size)
  inside = difference if size == 1 else difference[1:-1, 1:-1]   # at the image's edge there is nothing to blend with
  assert np.abs(inside).max() <= 3 + slope and np.abs(inside.mean()) <= 1 + slope / 2


def test_what_is_decoded_is_no_larger_than_it_has_to_be(monkeypatch):
  """224 pixels of a whole image of 450: libjpeg gives its half; of half the image: all of it."""
  shapes = []
  monkeypatch.setattr(jpeg, 'cut', lambda image, *rest: shapes.append(image.shape))
  data = encoded(ramp(450, 500))
  for box, size in ((Box(0, 0, 450, 500), 224), (Box(0, 0, 225, 250), 224), (Box(0, 0, 225, 250), 50), (Box(0, 0, 450, 500), 50)):
    jpeg.decode(data, lambda h, w, box=box: box, size)
  assert shapes == [(225, 250, 3), (450, 500, 3), (113, 125, 3), (57, 63, 3)]


@pytest.mark.parametrize('form', ['png', 'cmyk'])
def test_what_pillow_reads_is_averaged_where_it_is_made_smaller(form):
  """Stripes, of 8 columns one white: a mean of 32, where a few pixels between them are all black."""
  stripes = np.zeros((512, 512, 3), np.uint8)
  stripes[:, ::8] = 255
  image = jpeg.decode_any(encoded(stripes, form), lambda h, w: Box(0, 0, 512, 512), 64).astype(float)
  assert np.abs(image - 255 / 8).max() <= (1 if form == 'png' else 8)


@given(st.integers(1, 3000), st.integers(1, 3000), st.integers(0, 2**32))
def test_random_boxes_lie_in_the_image(height, width, seed):
  box = jpeg.random_box(np.random.default_rng(seed), height, width)
  assert box.height >= 1 and box.width >= 1
  assert 0 <= box.top <= height - box.height and 0 <= box.left <= width - box.width
  if min(height, width) > 100 and 3 / 4 <= width / height <= 4 / 3:   # one pixel of rounding in a side
    assert box.height * box.width / (height * width) >= 0.08 * 0.95
    assert 3 / 4 * 0.95 <= box.width / box.height <= 4 / 3 * 1.05


def test_random_boxes_are_spread_as_they_should_be():
  """Area uniform where all aspects fit, log-aspect symmetric, every place alike: means within five of their standard errors."""
  rng = np.random.default_rng(0)
  boxes = np.array([jpeg.random_box(rng, 800, 800) for _ in range(20_000)], float)
  area = boxes[:, 2] * boxes[:, 3] / 800**2
  small = area[area < 0.5]   # all aspects fit: 4/3 of half the area has a side of 0.816
  assert abs(small.mean() - 0.29) < 5 * (0.42 / 12**0.5) / len(small) ** 0.5
  assert abs(np.log(boxes[:, 3] / boxes[:, 2]).mean()) < 5 * 0.166 / 20_000**0.5
  for place, side in ((0, 2), (1, 3)):
    free = 800 - boxes[:, side]
    assert abs((boxes[:, place] / np.maximum(free, 1))[free > 50].mean() - 0.5) < 5 * 0.29 / 20_000**0.5


def test_where_no_random_box_fits_the_centre_is_taken():
  assert jpeg.random_box(np.random.default_rng(0), 1, 1000) == Box(0, 499, 1, 1)


@pytest.mark.parametrize('height, width, box', [
    (256, 256, (16, 16, 224, 224)), (256, 341, (16, 58, 224, 224)), (375, 500, (23, 86, 328, 328)), (1, 1, (0, 0, 1, 1))])
def test_the_centre(height, width, box):
  """By hand: 224/256 of the shorter side."""
  assert jpeg.centre_box(height, width) == box


@pytest.mark.parametrize('form', ['grey', 'cmyk', 'png'])
def test_other_files(form):
  """Grey JPEGs are JPEGs; what is no JPEG of three colours is left to Pillow."""
  data, box = encoded(ramp(80, 90), form), Box(5, 6, 60, 70)
  if form != 'grey':
    with pytest.raises(ValueError):
      jpeg.decode(data, lambda h, w: box, 16)
  image = (jpeg.decode if form == 'grey' else jpeg.decode_any)(data, lambda h, w: box, 16)
  wanted = expected(80, 90, box, 16)
  # Rec. 601: 0.299 red + 0.587 green + 0.114 blue, which are 10 apart.
  wanted = np.repeat(wanted[..., :1] + 0.587 * 10 + 0.114 * 20, 3, 2) if form == 'grey' else wanted
  assert np.abs(image[1:-1, 1:-1] - wanted[1:-1, 1:-1]).max() <= 4


@pytest.mark.parametrize('damage', [lambda data: data[:len(data) // 2], lambda data: data[:20], lambda data: b'',
                                    lambda data: b'not an image at all', lambda data: data[:300] + bytes(400) + data[700:]])
def test_damaged_files(damage):
  data = damage(encoded(ramp(80, 90)))
  for read in (jpeg.decode, jpeg.decode_any):
    if read is jpeg.decode or len(data) < 700:   # Pillow takes rubbish within a scan for pixels
      with pytest.raises(ValueError) as caught:
        read(data, jpeg.centre_box, 16)
      assert ' at 0x' not in str(caught.value)   # the place of a buffer tells nobody anything
