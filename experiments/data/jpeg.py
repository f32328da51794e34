"""Photographs of any size, decoded, cropped and resized to squares: fast where they are JPEGs, by Pillow where they are not.

JPEGs are decoded at a half, a quarter or an eighth of their size where what is left of the crop still fills the square, which
libjpeg-turbo does in the inverse cosine transform, and others are averaged over 2, 4, 8 ... pixels. Crops are resized bilinearly
from what is left, those of files that are not as large as eight times the square at most by half.
"""
import io
import re
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

AREA = 0.08, 1.0       # of the random crop, in those of the image
ASPECT = 3 / 4, 4 / 3  # width / height of the random crop
ATTEMPTS = 10          # at a random crop, before the centre is taken
EVALUATED = 224 / 256  # side of the centre crop, in those of the shorter side of the image


class Box(NamedTuple):
  """A part of an image, in pixels."""
  top: int
  left: int
  height: int
  width: int


Choose = Callable[[int, int], Box]   # height and width of an image → the part that is wanted


def random_box(rng: np.random.Generator, height: int, width: int) -> Box:
  """A part of random area and aspect ratio at a random place; the central square after ATTEMPTS that do not fit.

  The area is uniform in AREA · H · W, the logarithm of width / height uniform between those of ASPECT.
  Source: Szegedy et al. 2015 (arXiv:1409.4842), section 6, with the lower bound of the area that all who train ResNets use.
  """
  for _ in range(ATTEMPTS):
    area = rng.uniform(*AREA) * height * width
    aspect = np.exp(rng.uniform(*np.log(ASPECT)))
    h, w = round(np.sqrt(area / aspect)), round(np.sqrt(area * aspect))
    if 0 < h <= height and 0 < w <= width:
      return Box(int(rng.integers(height - h + 1)), int(rng.integers(width - w + 1)), h, w)
  return centre_box(height, width, 1.0)


def centre_box(height: int, width: int, share: float = EVALUATED) -> Box:
  """The square in the centre whose side is `share` of the shorter side: what resizing that to 256 and cutting out 224 gives."""
  side = max(1, round(share * min(height, width)))
  return Box((height - side) // 2, (width - side) // 2, side, side)


def decode(data: bytes, choose: Choose, size: int) -> np.ndarray:
  """The chosen part of a JPEG, resized to uint8 [size, size, 3]; grey is spread to three channels.

  Raises: ValueError for whatever is no intact JPEG in grey or YCbCr: `decode_any` may read it.
  """
  import simplejpeg
  height, width, colours, _ = simplejpeg.decode_jpeg_header(data)
  if colours not in ('Gray', 'YCbCr'):
    raise ValueError(f'its colours are {colours}')
  box = choose(height, width)
  # The smallest size that leaves the crop at least `size` pixels: the whole, or at most a half. What simplejpeg's
  # manual says of min_factor: smaller ones may take longer.
  image = simplejpeg.decode_jpeg(data, 'RGB', min_height=min(height, -(-height * size // box.height)),
                                 min_width=min(width, -(-width * size // box.width)), min_factor=2)
  return cut(image, box, (height, width), size)


def decode_any(data: bytes, choose: Choose, size: int) -> np.ndarray:
  """As `decode`, for every format that Pillow reads, in all colours: CMYK, a palette, with transparency (left out).

  Raises: ValueError with the reason for what cannot be read, or has more than 178 million pixels.
  """
  from PIL import Image
  try:
    with Image.open(io.BytesIO(data)) as image:
      whole = image.convert('RGB')
  except Exception as error:   # Pillow's plug-ins raise errors of many types
    reason = re.sub(r' <_io\..*?>', '', str(error)).strip()   # Pillow names its buffer
    raise ValueError(reason.splitlines()[0] if reason else type(error).__name__) from None
  box = choose(whole.height, whole.width)
  times = max(1, min(box.height, box.width) // size)   # the largest power of 2 in it leaves the crop at least `size` pixels
  return cut(np.asarray(whole.reduce(1 << times.bit_length() - 1)), box, (whole.height, whole.width), size)


def cut(image: np.ndarray, box: Box, whole: tuple[int, ...], size: int) -> np.ndarray:
  """The part `box` of an image of the size `whole`, of which `image` is a copy of perhaps another size, as [size, size, 3]."""
  import cv2
  down, across = image.shape[0] / whole[0], image.shape[1] / whole[1]
  top, left = int(box.top * down), int(box.left * across)
  bottom = max(top + 1, round((box.top + box.height) * down))
  right = max(left + 1, round((box.left + box.width) * across))
  return cv2.resize(image[top:bottom, left:right], (size, size), interpolation=cv2.INTER_LINEAR)
