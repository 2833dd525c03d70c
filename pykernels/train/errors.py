"""What the command line says in one sentence."""


class TrainingError(ValueError):
    """The user's input does not allow the run; the message says what to do."""
