"""What the smaller commands share: flags of their own, --help, one line for a mistake, and an orderly end at a signal."""
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from typing import NoReturn

from absl import flags

from experiments.errors import UserError

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Terminated(KeyboardInterrupt):
  """SIGTERM, once `obey` has been called: it ends a command as Ctrl-C does, but for the exit status."""


def run(main: Callable[[list[str]], None], text: str, values: flags.FlagValues,
        hint: Callable[[str], str] = lambda flag: '') -> None:
  """Calls `main` with the arguments that are no flags, the command's name first.

  --help prints `text` and the flags, and ends with 0; a mistake prints one line, and ends with 2. `hint`: what that line says
  besides of an unknown flag.
  """
  if {'--help', '-h', '-help'} & set(sys.argv[1:]):
    print(f'{text.strip()}\n\nFlags:\n{values.get_help()}')
    sys.exit(0)
  obey()
  try:
    main(list(values(sys.argv)))
  except (flags.Error, UserError) as error:
    more = hint(error.flagname) if isinstance(error, flags.UnrecognizedFlagError) else ''
    print(f'error: {error}{more}', file=sys.stderr)
    sys.exit(2)
  except KeyboardInterrupt as stop:
    end(stop, 'stopped; the same command goes on.')


def obey() -> None:
  """From now on SIGTERM raises Terminated."""
  def handle(*_: object) -> NoReturn:
    raise Terminated
  signal.signal(signal.SIGTERM, handle)


def end(stop: KeyboardInterrupt, message: str) -> NoReturn:
  """Ends with the line and the exit status that belong to a signal."""
  for number in SIGNALS:
    signal.signal(number, signal.SIG_IGN)   # one is enough
  print(f'\n{message}', file=sys.stderr, flush=True)
  sys.exit(128 + (signal.SIGTERM if isinstance(stop, Terminated) else signal.SIGINT))


def child(command: Sequence[str]) -> int:
  """Exit status of a process that is started and waited for. A signal to end is handed on to it, and raised here when it has
  ended: it is never left behind."""
  asked: list[int] = []
  before = {number: signal.signal(number, lambda n, _: asked.append(n)) for number in SIGNALS
            if signal.getsignal(number) is not signal.SIG_IGN}   # as under nohup, which holds for the process, too
  try:
    process, told = subprocess.Popen(command), 0
    while True:
      try:
        status = process.wait(timeout=1)
        break
      except subprocess.TimeoutExpired:   # a terminal sends Ctrl-C to both, and the process has had a second to end by itself
        for number in asked[told:]:
          process.send_signal(number)
        told = len(asked)
  finally:
    for number, handler in before.items():
      signal.signal(number, handler)
  if asked:
    raise Terminated if signal.SIGTERM in asked else KeyboardInterrupt
  return status
