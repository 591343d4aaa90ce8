"""Command line -> flags and Config; a user's mistake -> one line and exit status 2. Touches no device."""

import importlib.util
import os
import re
import select
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path

from absl import flags
from ml_collections import ConfigDict, config_flags

from bd3_jax.config import Config
from bd3_jax.config_dict import from_config_dict, unknown
from bd3_jax.errors import UserError
from bd3_jax.folders import reachable

USER_ERROR = 2
INTERRUPTED = 130  # what a shell reports for a program that Ctrl-C ended
UNREAD = 141  # and for one that nobody listens to any more, as after `| head`


def exit_status(run: Callable[[], None]) -> int:
    """Runs a command: 0, 2 for a user's mistake, 130 for Ctrl-C, the last two with one line on standard error.

    What the system refuses to do with a file is the user's to mend, too. Where whoever read the output has left, it
    ends silently with 141. Any other exception is a fault of this program and keeps its traceback.
    """
    try:
        try:
            return _exit_status(run)
        finally:
            sys.stdout.flush()  # now, not when the interpreter ends
    except BrokenPipeError:
        listener = select.poll()
        listener.register(sys.stdout, 0)
        if not listener.poll(0):  # it was another pipe
            raise
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # where the rest goes
        return UNREAD


def _exit_status(run: Callable[[], None]) -> int:
    try:
        run()
    except UserError as error:
        print(f"error: {_one_line(error)}", file=sys.stderr)
        return USER_ERROR
    except OSError as error:
        if error.filename is None:
            raise
        print(f"error: {error.filename}: {error.strerror}", file=sys.stderr)
        return USER_ERROR
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return INTERRUPTED
    return 0


def parse(argv: Sequence[str], values: flags.FlagValues, usage: str) -> Config:
    """Reads argv (without the program's name) into `values`, and --config with its overrides into a Config.

    --config is FILE.py or FILE.py:STRING, where STRING goes to the file's `get_config`. Without it, the settings that
    a run left in WORKDIR/config.json are used. `--config.group.name=value` overrides a field in both cases.

    Raises:
      UserError: for any flag, file, override or combination of settings that is not allowed.
      SystemExit: with status 0, after --help has printed `usage`.
    """
    if "--help" in argv or "-h" in argv:
        print(usage.strip())
        raise SystemExit(0)
    try:
        path, rest = _take("config", values.read_flags_from_files(list(argv), force_gnu=False))
        config = load(path or _recorded(_take("workdir", rest)[0]))
        for arg in rest:
            _check_override(arg, config)
        config_flags.DEFINE_config_dict("config", config, flag_values=values, sys_argv=rest)
        positional = values(["bd3", *rest])[1:]
    except flags.Error as error:
        raise UserError(str(error)) from error
    if positional:
        raise UserError(f"unexpected argument {positional[0]!r}; every setting is a flag, as in --workdir=DIR")
    return from_config_dict(values.config)


def positional(argv: Sequence[str], values: flags.FlagValues, usage: str) -> list[str]:
    """Reads flags of argv (without the program's name) into `values` and returns what is no flag.

    Raises:
      UserError: an unknown flag, or a value that it does not take.
      SystemExit: with status 0, after --help has printed `usage`.
    """
    if "--help" in argv or "-h" in argv:
        print(usage.strip())
        raise SystemExit(0)
    try:
        values.set_gnu_getopt(True)
        return values(["bd3", *argv])[1:]
    except flags.Error as error:
        raise UserError(str(error)) from error


def load(path: str) -> ConfigDict:
    """Loads FILE.py or FILE.py:STRING; a `configs/NAME.py` that the current directory lacks is the installed one.

    Raises:
      UserError: if there is no such file, or it fails, or its `get_config` returns no ConfigDict.
    """
    name, *argument = path.split(":", 1)
    file = Path(name).absolute()
    if not file.is_file() and Path(name).parent == Path("configs"):
        file = _installed() / file.name
    if not file.is_file() or file.suffix != ".py":
        known = sorted(f"configs/{found.name}" for found in _installed().glob("[a-z]*.py") if found.stem != "workdir")
        raise UserError(f"--config={path}: no such Python file; installed are {', '.join(known)}")
    try:
        spec = importlib.util.spec_from_file_location("bd3_config", file)
        assert spec is not None  # so it is for every .py file
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        config = module.get_config(*argument)
    except UserError:
        raise
    except Exception as error:
        lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(file)]
        where = f" in line {lines[-1]}" if lines else ""
        raise UserError(f"--config={path} fails{where}: {type(error).__name__}: {error}") from error
    if not isinstance(config, ConfigDict):
        raise UserError(f"--config={path}: get_config must return an ml_collections.ConfigDict, found {config!r}")
    return config


def required(values: flags.FlagValues, name: str, allowed: str) -> str:
    """The value of a flag that has no default.

    Raises:
      UserError: if it was not given.
    """
    value = values[name].value
    if not value:
        raise UserError(f"--{name} is missing; allowed: {allowed}")
    return value


def _recorded(directory: str | None) -> str:
    """The --config that reads the settings of an earlier run."""
    if directory and (reachable(directory, "--workdir") / "config.json").exists():
        return f"{_installed() / 'workdir.py'}:{directory}"
    where = f"{directory}/config.json does not exist" if directory else "no --workdir to take it from"
    raise UserError(f"--config is missing, as in --config=configs/quickstart.py:bd3lm,block_size=8 ({where})")


def _installed() -> Path:
    from bd3_jax import configs

    return Path(configs.__file__).parent


def _take(name: str, argv: Sequence[str]) -> tuple[str | None, list[str]]:
    """The value of --name=VALUE or --name VALUE (the last, or None), and argv without it."""
    value: str | None = None
    rest: list[str] = []
    args = iter(argv)
    for arg in args:
        flag, equals, after = arg.partition("=")
        if flag not in (f"--{name}", f"-{name}"):
            rest.append(arg)
            continue
        value = after if equals else next(args, "")
        if not value:
            raise UserError(f"--{name} needs a value, as in --{name}=...")
    return value, rest


def _check_override(arg: str, config: ConfigDict) -> None:
    """--config.group.name must name a field, not a group and nothing unknown."""
    match = re.match(r"--?(?:no)?config\.([^=]*)", arg)
    if not match:
        return
    path, node = "config", config
    for name in match[1].split("."):
        if not isinstance(node, ConfigDict):
            raise UserError(f"{arg}: {path} is a value, not a group of settings")
        if name not in node:
            raise unknown(name, list(node), path)
        path, node = f"{path}.{name}", node[name]
    if isinstance(node, ConfigDict):
        raise UserError(f"{arg}: {path} is a group; set one of its fields: {', '.join(node)}")


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())
