"""Settings, and the mistakes in them that a user is told of in one line."""

import difflib


class BadInput(ValueError):
    """A mistake in what the user passed: one line on stderr and exit code 2."""


def require(condition, message):
    """Raises BadInput with this message unless the condition holds."""
    if not condition:
        raise BadInput(message)


def flag(name):
    """The flag of a setting: --lr-student of `lr_student`."""
    return "--" + name.replace("_", "-")


def at_least(least, cfg, *names):
    """Raises BadInput for a setting among `names` that is given and below `least`."""
    for name in names:
        value = getattr(cfg, name)
        fine = value is None or least <= value < float("inf")
        require(fine, f"{flag(name)} {value}: at least {least}")


def positive(cfg, *names):
    """Raises BadInput for a setting among `names` that is given and is no positive number."""
    for name in names:
        value = getattr(cfg, name)
        fine = value is None or 0 < value < float("inf")
        require(fine, f"{flag(name)} {value}: a positive number")


def did_you_mean(word, known):
    """The end of a sentence on `word`: which of the known words is near it, or nothing."""
    near = difflib.get_close_matches(word, known, n=1)
    if not near:
        return ""
    return f"; did you mean {near[0]}?"
