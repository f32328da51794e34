"""What a run tells on the terminal."""
import re

import numpy as np
import pytest

from experiments import progress


@pytest.mark.parametrize('seconds, text', [(0, '0 min 00 s'), (59.6, '1 min 00 s'), (125, '2 min 05 s'), (3600, '1 h 00 min'),
                                           (7384, '2 h 03 min')])
def test_clock(seconds, text):
  assert progress.clock(seconds) == text


@pytest.mark.parametrize('losses, loss', [([[1.0, 2.0]], '1.5000'), ([[1.0, np.nan]], '1.0000'), ([[np.nan, np.inf]], 'nan')])
def test_progress_line(losses, loss, capsys):
  line = progress.Progress(2_000, 1_000, 2, before=60.0)
  line.show(1_500, np.array(losses))
  assert capsys.readouterr().out == ''   # no terminal: one line each ten seconds, and the last
  line.show(2_000, np.array(losses))
  told = capsys.readouterr().out
  assert re.fullmatch(rf'step 2,000/2,000 \| 0\.\d\d ms a step and network \| loss {loss} \| 0 min 00 s left\n', told)
  assert 60 < line.seconds < 61


def test_rate_and_time_left_leave_out_the_part_that_compiles(monkeypatch, capsys):
  now = iter([0.0, 100.0, 120.0, 130.0])   # made, and three calls of show: 100 s for the first 500 steps, 30 s for 1,000
  monkeypatch.setattr(progress.time, 'monotonic', lambda: next(now))
  monkeypatch.setattr(progress.sys.stdout, 'isatty', lambda: False, raising=False)
  line = progress.Progress(3_000, 0, 2, before=0.0)
  for step in (500, 1_250, 1_500):
    line.show(step, np.array([[1.0]]))
  first, second, third = capsys.readouterr().out.splitlines()
  assert first.startswith('step 500/3,000 | 100.00 ms a step') and '8 min 20 s left' in first   # nothing else is known yet
  assert '13.33 ms a step' in second and '0 min 47 s left' in second   # 20 s for 750 steps of two networks
  assert '15.00 ms a step' in third and '0 min 45 s left' in third


def test_what_was_waited_for_before_is_no_part_of_the_rate(monkeypatch, capsys):
  now = iter([0.0, 200.0, 200.0, 208.0])   # made; after 200 s of compiling one step is done; 8 s for four more
  monkeypatch.setattr(progress.time, 'monotonic', lambda: next(now))
  monkeypatch.setattr(progress.sys.stdout, 'isatty', lambda: False, raising=False)
  line = progress.Progress(60, 0, 1, before=0.0)
  line.begin(1)
  line.show(1, np.array([[1.0]]))
  assert capsys.readouterr().out == ''
  line.show(5, np.array([[1.0]]))
  assert capsys.readouterr().out.startswith('step 5/60 | 2000.00 ms a step and network | loss 1.0000 | 1 min 50 s left')
