"""What only some uses need is installed by an extra of the package; without it, the error says by which."""

from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def extra(name: str) -> Iterator[None]:
    """Around imports of packages that `pip install 'mrl-redimnet[name]'` brings.

    Raises ModuleNotFoundError that says so where one of them is not installed.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        message = f"{error.name} is not installed: pip install 'mrl-redimnet[{name}]'."
        raise ModuleNotFoundError(message, name=error.name) from error
