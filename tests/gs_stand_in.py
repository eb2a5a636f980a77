"""gs:// paths served from a local folder: `install(folder)` makes gs://bucket/x stand for folder/bucket/x, for etils.epath and orbax.

Tensorstore's own gcs driver is replaced by its file driver; what is tested is every path that this repository and orbax build.
"""

import pathlib
import sys
import types

from etils.epath import backend, gpath
from orbax.checkpoint._src.path import gcs_utils


def install(folder):
    folder, local = pathlib.Path(folder), backend.os_backend

    def inside(value):
        if isinstance(value, str) and value.startswith("gs://"):
            path = folder / value.removeprefix("gs://")
            path.parent.mkdir(parents=True, exist_ok=True)  # object stores have no folders to make
            return str(path)
        return value

    class StandIn:
        def __getattr__(self, name):
            method = getattr(local, name)

            def call(*arguments, **named):
                found = method(*map(inside, arguments), **{key: inside(value) for key, value in named.items()})
                back = lambda text: text.replace(f"{folder}/", "gs://", 1) if isinstance(text, str) else text
                return [back(item) for item in found] if isinstance(found, list) else back(found)

            return call

    gpath._PREFIX_TO_BACKEND["gs"] = StandIn()
    gpath._is_tf_installed = lambda: False
    gcs_utils.is_hierarchical_namespace_enabled = lambda path: False  # would ask the bucket
    gcs_utils.get_kvstore_for_gcs = lambda path: {"driver": "file", "path": inside(path)}
    for name in ("gcsfs", "google.cloud.storage"):
        sys.modules[name] = types.ModuleType(name)
