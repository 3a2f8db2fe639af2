"""An object store that fails at a chosen call: `faulty://` addresses, kept in a folder."""

from __future__ import annotations

import errno
import os
from typing import Any

import fsspec
from fsspec.implementations.local import LocalFileSystem

ERRORS = {
    "EIO": lambda: OSError(errno.EIO, os.strerror(errno.EIO)),
    "ConnectionError": lambda: ConnectionError("the store closed the connection"),
    "TimeoutError": lambda: TimeoutError("the store did not answer"),
    "PermissionError": lambda: PermissionError(errno.EACCES, "access denied"),
}


class Faulty(LocalFileSystem):
    """The local file system behind an address of its own. Set `error`, `at`, `lasting` on the class before it is used."""

    protocol = "faulty"
    cachable = False
    error, at, lasting, calls = "", -1, False, 0

    @classmethod
    def _strip_protocol(cls, path: Any) -> str:
        return super()._strip_protocol(str(path).removeprefix("faulty://"))

    @classmethod
    def _count(cls) -> None:
        number, cls.calls = Faulty.calls, Faulty.calls + 1
        Faulty.calls = cls.calls
        if Faulty.error and (number == Faulty.at or (number > Faulty.at >= 0 and Faulty.lasting)):
            raise ERRORS[Faulty.error]()

    def _open(self, *arguments: Any, **how: Any) -> Any:
        self._count()
        return super()._open(*arguments, **how)

    def info(self, *arguments: Any, **how: Any) -> Any:
        self._count()
        return super().info(*arguments, **how)

    def ls(self, *arguments: Any, **how: Any) -> Any:
        self._count()
        return super().ls(*arguments, **how)

    def makedirs(self, *arguments: Any, **how: Any) -> None:
        self._count()
        super().makedirs(*arguments, **how)

    def rm(self, *arguments: Any, **how: Any) -> None:
        self._count()
        super().rm(*arguments, **how)


def register() -> None:
    fsspec.register_implementation("faulty", Faulty, clobber=True)
