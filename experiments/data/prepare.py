"""Prepares ImageNet for training from its official archives, by tensorflow-datasets but without TensorFlow.

  python -m experiments.data.prepare --archives=DIRECTORY --to=DIRECTORY

--archives holds ILSVRC2012_img_train.tar and ILSVRC2012_img_val.tar as they were downloaded; training takes both of them. The
result, in --to/imagenet2012/VERSION, is what `tfds build --file_format=array_record` makes, but for a score of files that are
CMYK or PNG: those stay as they are, and are converted when they are read. It takes the room of the archives once more, and as
long as copying.
"""
import importlib
import os
import pathlib
import tarfile
import types

from absl import flags, logging

from experiments.commands import run
from experiments.errors import UserError

FLAGS = flags.FlagValues()   # of this command alone
ARCHIVES = flags.DEFINE_string('archives', None, 'Required. Directory of the official archives.', flag_values=FLAGS)
TO = flags.DEFINE_string('to', None, 'Required. Directory for the prepared set; made if it is not there.', flag_values=FLAGS)

TRAIN, VALIDATION = 'ILSVRC2012_img_train.tar', 'ILSVRC2012_img_val.tar'


def prepare(archives: pathlib.Path, to: pathlib.Path) -> pathlib.Path:
  """The folder of the prepared set. One that is there is left as it is.

  Raises: UserError where there are no archives, no room for the result, or tensorflow-datasets cannot read them.
  """
  if not archives.is_dir():
    raise UserError(f'--archives={archives} is no directory.')
  if not any((archives / name).is_file() for name in (TRAIN, VALIDATION)):
    raise UserError(f'--archives={archives} holds neither {TRAIN} nor {VALIDATION}.')
  try:
    to.mkdir(parents=True, exist_ok=True)
  except OSError as error:
    raise UserError(f'--to={to} cannot be made ({error.strerror}).') from None
  try:
    import tensorflow_datasets as tfds
  except ImportError as error:
    raise UserError(f"preparing takes tensorflow-datasets: pip install -e '.[imagenet]' ({error}).") from None
  without_tensorflow()
  builder = tfds.builder('imagenet2012', data_dir=str(to), file_format='array_record')
  settings = tfds.download.DownloadConfig(manual_dir=str(archives), try_download_gcs=False)
  try:
    builder.download_and_prepare(download_dir=str(to / 'downloads'), download_config=settings)
  except Exception as error:   # whatever its readers raise of a damaged archive
    reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
    cut = [name for name in (TRAIN, VALIDATION) if (archives / name).is_file() and not _is_whole(archives / name)]
    raise UserError(f'{archives}{"/" * bool(cut)}{" and ".join(cut)} cannot be prepared ({reason}).') from None
  return pathlib.Path(builder.data_dir)


def _is_whole(archive: pathlib.Path) -> bool:
  try:
    with tarfile.open(archive) as opened:
      return all(member.offset_data + member.size <= archive.stat().st_size for member in opened)
  except tarfile.TarError:
    return False


def without_tensorflow() -> None:
  """Gives tensorflow-datasets the few calls of TensorFlow that preparing this set makes: opening local files."""
  files = types.SimpleNamespace(GFile=open, exists=os.path.exists)
  stand_in = types.SimpleNamespace(io=types.SimpleNamespace(gfile=files), compat=types.SimpleNamespace(as_text=_text))
  for name in ('core.download.extractor', 'datasets.imagenet2012.imagenet2012_dataset_builder',
               'datasets.imagenet2012.imagenet_common'):
    vars(importlib.import_module(f'tensorflow_datasets.{name}'))['tf'] = stand_in
  vars(importlib.import_module('tensorflow_datasets.core.utils')).update(jpeg_cmyk_to_rgb=bytes, png_to_jpeg=bytes)


def _text(value: str | bytes) -> str:
  return value.decode() if isinstance(value, bytes) else value


def main(argv: list[str]) -> None:
  if len(argv) > 1:
    raise UserError(f'unknown argument {argv[1]!r}; flags are given as --name=value.')
  for flag in (ARCHIVES, TO):
    if not flag.value:
      raise UserError(f'--{flag.name} is needed; see --help.')
  logging.set_verbosity(logging.WARNING)
  print(f'prepared {prepare(pathlib.Path(str(ARCHIVES.value)), pathlib.Path(str(TO.value)))}')


if __name__ == '__main__':
  run(main, __doc__ or '', FLAGS)
