"""Errors that are the user's to mend, not the program's."""


class UserError(Exception):
  """A mistake of the user's: experiments.main prints it as one line without traceback, and exits non-zero."""


class DataError(UserError):
  """A data set that is missing, damaged or not the one that was asked for. Names the file and the reason."""
