"""Everything around the experiment: runs, checkpoints, devices, scores. Nothing here needs editing."""


class UserError(Exception):
    """A fault that the user can mend. The message is one sentence, and no traceback follows it."""
