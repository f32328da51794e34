"""What the smaller commands share: flags of their own, --help, and one line for a mistake."""
import sys

from absl import flags


def parse(text: str, values: flags.FlagValues, argv: list[str]) -> list[str]:
  """The arguments that are no flags, the command's name first. --help prints `text` and the flags, and ends with 0; a mistake
  prints one line, and ends with 2."""
  if {'--help', '-h', '-help'} & set(argv[1:]):
    print(f'{text.strip()}\n\nFlags:\n{values.get_help()}')
    sys.exit(0)
  try:
    return list(values(argv))
  except flags.Error as error:
    print(f'error: {error}', file=sys.stderr)
    sys.exit(2)
