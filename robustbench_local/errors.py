"""The errors that are told in one sentence, without a traceback."""


class UserError(ValueError):
    """Something the user can put right.

    The message is one sentence that says what came, what was expected and what to type.
    """


class FoulError(RuntimeError):
    """Something an attack did that makes its result void; the run ends and is not recorded."""
