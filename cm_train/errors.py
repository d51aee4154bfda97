"""The one exception that means "the user's input is wrong"; the commands turn it into one line and exit code 2."""


class InputError(ValueError):
    """What is wrong, what was got, what is allowed and how to fix it, in one line."""

    def __init__(self, what: str, got: object = None, allowed: str | None = None, fix: str | None = None):
        parts = [what]
        if got is not None:
            parts.append(f"got {got!r}" if isinstance(got, str) else f"got {got}")
        if allowed:
            parts.append(f"allowed: {allowed}")
        if fix:
            parts.append(f"fix: {fix}")
        super().__init__("; ".join(" ".join(part.split()) for part in parts))
