"""Object stores of fsspec as pyarrow file systems whose errors are errors.

pyarrow's own handler asks fsspec's `isdir`, `isfile`, `exists` and `find`, which answer "not there" when a store refuses or
does not answer: checkpoints would seem to be gone, and a run would begin anew.
"""

from __future__ import annotations

from typing import Any

from pyarrow import PythonFile, fs


class Store(fs.FSSpecHandler):  # type: ignore[misc]  # pyarrow brings no types
    """Calls of fsspec that raise: FileNotFoundError for what is not there, any other OSError where that is not known."""

    def get_file_info_selector(self, selector: Any) -> list[Any]:
        """List a folder; a recursive listing is nobody's need here."""
        if selector.recursive:
            raise NotImplementedError("folders of an object store are listed level by level")
        base = selector.base_dir.strip("/")
        try:
            found = self.fs.ls(selector.base_dir, detail=True)
        except FileNotFoundError:
            if selector.allow_not_found:
                return []
            raise
        return [self._create_file_info(one["name"], one) for one in found if one["name"].strip("/") != base]

    def delete_file(self, path: str) -> None:
        """Delete a file."""
        self.fs.rm(path)

    def open_input_stream(self, path: str) -> Any:
        """Open a file for reading."""
        return PythonFile(self.fs.open(path, mode="rb"), mode="r")

    open_input_file = open_input_stream


def object_store(files: Any) -> Any:
    """Return an fsspec file system as pyarrow's."""
    return fs.PyFileSystem(Store(files))
