"""What the smaller commands share: flags of their own, --help, and one line for a mistake."""
import sys
from collections.abc import Callable

from absl import flags

from experiments.errors import UserError


def run(main: Callable[[list[str]], None], text: str, values: flags.FlagValues) -> None:
  """Calls `main` with the arguments that are no flags, the command's name first.

  --help prints `text` and the flags, and ends with 0; a mistake prints one line, and ends with 2.
  """
  if {'--help', '-h', '-help'} & set(sys.argv[1:]):
    print(f'{text.strip()}\n\nFlags:\n{values.get_help()}')
    sys.exit(0)
  try:
    main(list(values(sys.argv)))
  except (flags.Error, UserError) as error:
    print(f'error: {error}', file=sys.stderr)
    sys.exit(2)
  except KeyboardInterrupt:
    print('\nstopped; the same command goes on.', file=sys.stderr)
    sys.exit(130)
