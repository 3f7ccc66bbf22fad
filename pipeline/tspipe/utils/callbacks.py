"""The callback for callers who want none."""


def ignore(*_: object) -> None:
    """Do nothing."""
