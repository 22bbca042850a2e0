"""Compiled loops on disk: what numba keeps, held to a checksum; what is broken is compiled again.

numba writes an index of signatures (`.nbi`) and the machine code of each (`.nbc`), and raises
whatever a cut file makes `pickle` raise, in every process and for good. Here a file that cannot be
read counts as missing, with a line in the log, and the next compilation replaces it. The code that
runs is the same either way, so results are, too.
"""

import logging
import pickle
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path
from typing import Any, no_type_check

from numba.core.caching import FunctionCache, IndexDataCacheFile

_log = logging.getLogger(__name__)


@no_type_check
class LoopCache(FunctionCache):
    """What numba asks for the machine code of one loop.

    Args:
        function: The loop.

    Raises:
        RuntimeError: There is no folder to keep it in.
    """

    def __init__(self, function: Callable[..., Any]):
        super().__init__(function)
        kept = self._cache_file
        self._cache_file = _Files(self._cache_path, self._impl.filename_base, kept._source_stamp)

    def load_overload(self, sig, target_context):
        """Return the code of a signature; None if there is none, or none that is whole."""
        try:
            return super().load_overload(sig, target_context)
        except Exception as error:  # whatever pickle makes of other bytes
            _log.warning("%s: a compiled loop there is broken (%r) and is compiled again", self._cache_path, error)
            return None

    def save_overload(self, sig, data):
        """Keep the code of a signature; a full disk costs the next process a compilation."""
        try:
            super().save_overload(sig, data)
        except OSError as error:
            _log.warning("%s: no compiled loop can be kept there: %s", self._cache_path, error)


@no_type_check
class _Files(IndexDataCacheFile):
    """An index, which counts as empty if it is broken, and files of code behind their checksums."""

    def _load_index(self):
        try:
            return super()._load_index()
        except Exception as error:
            _log.warning("%s: is broken (%r) and is made anew", self._index_path, error)
            return {}

    def _save_data(self, name, data):
        raw = self._dump(data)
        with self._open_for_write(self._data_path(name)) as file:
            file.write(sha256(raw).digest() + raw)

    def _load_data(self, name):
        raw = Path(self._data_path(name)).read_bytes()
        if sha256(raw[32:]).digest() != raw[:32]:
            raise ValueError(f"{name}: its checksum is wrong")
        return pickle.loads(raw[32:])
