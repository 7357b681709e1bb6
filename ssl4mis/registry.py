"""Methods by name: `ua_mt` is ssl4mis/methods/ua_mt.py, and `package.module:Class` names one from elsewhere.

Wheels of third parties add names through the entry-point group `ssl4mis.methods`.
"""
import pkgutil
from difflib import get_close_matches
from functools import cache
from importlib import import_module
from importlib.metadata import entry_points
from pathlib import Path

from ssl4mis import docstring
from ssl4mis.errors import UserError

ALIASES = {"mt": "mean_teacher"}
FOLDER = Path(__file__).parent / "methods"


@cache
def plugins() -> dict:
    """Entry points of third parties by the names that they add; read once, for they are in files of every package."""
    return {point.name: point for point in entry_points(group="ssl4mis.methods")}


def names() -> list[str]:
    """All known method names, sorted, without importing any of them."""
    return sorted([*(module.name for module in pkgutil.iter_modules([str(FOLDER)])), *plugins()])


def nearest(kind: str, value: str, known) -> str:
    """One line that says that `value` is no such thing and names the nearest one."""
    known = sorted(known)
    close = get_close_matches(value.lower(), known, 1, 0.4) or get_close_matches(value, known, 1, 0.4)
    hint = f"did you mean {close[0]}?" if close else f"expected one of {', '.join(known)}"
    return f"{kind} {value!r} is not known: {hint}"


def canonical(name: str) -> str:
    """The registered name behind an alias or another spelling (`MT`, `ua-mt`); UserError naming the nearest one."""
    if ":" in name:
        return name
    plain = name.lower().replace("-", "_")
    plain = ALIASES.get(plain, plain)
    if plain not in names():
        raise UserError(nearest("method", name, [*names(), *ALIASES]))
    return plain


def method_class(name: str) -> type:
    """The `Method` subclass of a name; UserError where there is none."""
    from ssl4mis.method import Method

    name = canonical(name)
    module, _, wanted = name.partition(":")
    if not wanted:
        if name in plugins():
            return plugins()[name].load()
        module = f"ssl4mis.methods.{name}"
    try:
        found = import_module(module)
    except (ModuleNotFoundError, ValueError) as error:
        raise UserError(f"method {name!r}: {error}; expected package.module:Class, found from PYTHONPATH") from error
    own = [value for key, value in vars(found).items() if isinstance(value, type) and issubclass(value, Method)
           and (key == wanted if wanted else value.__module__ == module)]
    if len(own) != 1:
        raise UserError(f"method {name!r}: expected one subclass of Method in {module}, found {len(own)}")
    return own[0]


def title(name: str, folder: Path | None = None) -> str:
    """First line of the docstring of a method, or of a module in another folder, read without importing it."""
    path = (folder or FOLDER) / f"{name}.py"
    return docstring.of_file(path).title if path.exists() else ""
