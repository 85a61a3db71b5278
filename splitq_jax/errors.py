"""The one exception for what a user gives us."""


class InputError(ValueError):
    """Input that is refused: the message names the file, tensor, sample or flag, what was found, what was expected and the mend."""
