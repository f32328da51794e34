"""A miniature ImageNet of pictures whose every pixel is known, in the layouts in which people have the real one."""

import io
import pathlib
import tarfile

import numpy as np
import pytest

CLASSES = ('n01440764', 'n01443537', 'n01484850')   # the first three of ImageNet's
ODD = {1: 'cmyk', 2: 'grey', 3: 'png'}               # pictures of each class that are not as the others


def ramp(height, width, colours=3):
  """uint8 [H, W, C]: brightness grows along a row, more slowly down the columns, and differs between colours."""
  y, x = np.mgrid[:height, :width]
  planes = [20 + 10 * c + 150 * x / (width - 1) + 50 * y / (height - 1) for c in range(colours)]
  return np.rint(np.stack(planes, 2)).astype(np.uint8)


def encoded(pixels, form='jpeg'):
  image_module = pytest.importorskip('PIL.Image')
  buffer, image = io.BytesIO(), image_module.fromarray(pixels)
  if form == 'png':
    image.save(buffer, 'PNG')
  else:
    image.convert({'cmyk': 'CMYK', 'grey': 'L'}.get(form, 'RGB')).save(buffer, 'JPEG', quality=95)
  return buffer.getvalue()


def pictures(count, first=0):
  """(name without its class, bytes) of `count` pictures of odd sizes; number 1 is CMYK, 2 grey, 3 a PNG that is called a JPEG."""
  rng = np.random.default_rng(first)
  for i in range(count):
    height, width = (int(n) for n in rng.integers(40, 90, 2))
    yield i, encoded(ramp(height, width), ODD.get(i, 'jpeg'))


def write_folders(root, train=6, validation=4):
  for number, name in enumerate(CLASSES):
    for split, count in (('train', train), ('val', validation)):
      folder = root / split / name
      folder.mkdir(parents=True)
      for i, data in pictures(count, 10 * number + len(split)):
        (folder / f'{name}_{i}.JPEG').write_bytes(data)
  return root


def write_archives(root, train=6, validation=5):
  """The two official tar files: tars of classes within a tar, and pictures in a row."""
  root.mkdir(parents=True)

  def add(archive, name, data):
    member = tarfile.TarInfo(name)
    member.size = len(data)
    archive.addfile(member, io.BytesIO(data))

  with tarfile.open(root / 'ILSVRC2012_img_train.tar', 'w') as whole:
    for number, name in enumerate(CLASSES):
      inner = io.BytesIO()
      with tarfile.open(fileobj=inner, mode='w') as archive:
        for i, data in pictures(train, number):
          add(archive, f'{name}_{i}.JPEG', data)
      add(whole, f'{name}.tar', inner.getvalue())
  with tarfile.open(root / 'ILSVRC2012_img_val.tar', 'w') as whole:
    for i, data in pictures(validation, 99):
      add(whole, f'ILSVRC2012_val_{i + 1:08d}.JPEG', data)
  return pathlib.Path(root)
