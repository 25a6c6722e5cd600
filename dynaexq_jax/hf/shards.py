"""Which safetensors files a model has: a single one, or the shards that an index names."""

from pathlib import Path
from typing import Final

from dynaexq_jax.errors import InputError
from dynaexq_jax.hf.safetensors_file import SafetensorsFile
from dynaexq_jax.json_file import read_json_object

SINGLE: Final = "model.safetensors"
INDEX: Final = "model.safetensors.index.json"
_REMEDY: Final = "download the model again, whole"


def open_shards(path: Path) -> tuple[SafetensorsFile, ...]:
    """Opens all weight files of a directory; no tensor name occurs in two of them.

    Raises InputError if files are missing or damaged, or if the index and the shards differ.
    """
    single, index = (path / SINGLE).exists(), (path / INDEX).exists()
    if single and index:
        raise InputError(
            f"{path}: has both {SINGLE} and {INDEX}; remove the one that is not the model"
        )
    if single:
        return (SafetensorsFile.open(path / SINGLE),)
    if not index:
        raise InputError(
            f"{path}: has neither {SINGLE} nor {INDEX}; weights must be in safetensors form"
        )
    return _open_indexed(path)


def _open_indexed(path: Path) -> tuple[SafetensorsFile, ...]:
    index = path / INDEX
    weight_map = read_json_object(index, _REMEDY).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise InputError(f"{index}: weight_map must be an object that is not empty; {_REMEDY}")
    for name, shard in weight_map.items():
        if not isinstance(shard, str) or Path(shard).name != shard or "\0" in shard:
            raise InputError(f"{index}: {name} is mapped to {shard!r}, not a file name; {_REMEDY}")
    shards = sorted(set(weight_map.values()))
    missing = [shard for shard in shards if not (path / shard).exists()]
    if missing:
        raise InputError(
            f"{index}: names {len(shards)} shards, {len(missing)} of them are missing: "
            f"{', '.join(missing[:3])}; {_REMEDY}"
        )
    files = tuple(SafetensorsFile.open(path / shard) for shard in shards)
    for file in files:
        promised = {name for name, shard in weight_map.items() if shard == file.path.name}
        _check_promise(file, promised)
    return files


def _check_promise(file: SafetensorsFile, promised: set[str]) -> None:
    """The tensors of a shard are those that the index puts there."""
    absent, unlisted = sorted(promised - set(file.tensors)), sorted(set(file.tensors) - promised)
    if absent:
        raise InputError(
            f"{file.path}: lacks {len(absent)} tensors that {INDEX} puts there, "
            f"first {absent[0]}; {_REMEDY}"
        )
    if unlisted:
        raise InputError(
            f"{file.path}: holds {len(unlisted)} tensors that {INDEX} does not put there, "
            f"first {unlisted[0]}; {_REMEDY}"
        )
