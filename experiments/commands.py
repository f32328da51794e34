"""What the smaller commands share: flags of their own, --help, one line for a mistake, and an orderly end at a signal."""
import contextlib
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent import futures
from typing import NoReturn, TypeVar

from absl import flags

from experiments.errors import UserError

SIGNALS = (signal.SIGINT, signal.SIGTERM)
Result = TypeVar('Result')


class Terminated(KeyboardInterrupt):
  """SIGTERM, once `obey` has been called: it ends a command as Ctrl-C does, but for the exit status."""


class Stopped(SystemExit):
  """The end that a signal asked for, with its exit status."""
  code: int


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
  raise Stopped(128 + (signal.SIGTERM if isinstance(stop, Terminated) else signal.SIGINT))


def heeding(work: Callable[[], Result]) -> Result:
  """`work()`, and a signal that raises ends the command in the midst of it: for what XLA compiles, in which Python would hear of
  none for minutes. The thread that does it cannot be stopped; only the end of the process ends it. What JAX keeps by thread, as
  `with jax.default_matmul_precision(...)` of the caller, does not hold in it."""
  found: futures.Future[Result] = futures.Future()

  def do() -> None:
    try:
      found.set_result(work())
    except BaseException as error:
      found.set_exception(error)
  threading.Thread(target=do, daemon=True).start()
  return found.result()


@contextlib.contextmanager
def held() -> Iterator[list[int]]:
  """Signals to end that come meanwhile, raised when this has ended. In a thread that gets no signals it does nothing.

  For what an exception from nowhere would break: threads that are being started are never joined then, and a process that
  should end waits for them.
  """
  asked: list[int] = []
  if threading.current_thread() is not threading.main_thread():
    yield asked
    return
  before = {number: signal.signal(number, lambda n, _: asked.append(n)) for number in SIGNALS
            if not _is_jaxs(number) and signal.getsignal(number) not in (signal.SIG_IGN, None)}   # nohup's holds for a child, too
  try:
    yield asked
  finally:
    for number, handler in before.items():
      signal.signal(number, handler)
    if asked:
      signal.raise_signal(asked[0])


def _is_jaxs(number: int) -> bool:
  """Of several processes SIGTERM has a handler of JAX's own, which raises nothing. Python does not see it, and could not put it
  back."""
  jax = sys.modules.get('jax')
  return number == signal.SIGTERM and jax is not None and jax.distributed.is_initialized()


def child(command: Sequence[str]) -> int:
  """Exit status of a process that is started and waited for. A signal to end is handed on to it, and raised here when it has
  ended: it is never left behind."""
  with held() as asked:
    process, told = subprocess.Popen(command), 0
    while True:
      try:
        return process.wait(timeout=1)
      except subprocess.TimeoutExpired:   # a terminal sends Ctrl-C to both, and the process has had a second to end by itself
        for number in asked[told:]:
          process.send_signal(number)
        told = len(asked)
