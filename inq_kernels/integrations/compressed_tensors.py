"""``quantization_config`` as the compressed-tensors library reads and writes it: the two layouts that are used here.

mxfp4-pack-quantized: NAME.weight_packed uint8 [N, K/2] and NAME.weight_scale uint8 [N, K/32] (mxfp4.py).
float-quantized: NAME.weight float8_e4m3fn [N, K] and NAME.weight_scale, float [N, 1], [N, K/G] or one for all (fp8.py).
Nothing of that library is imported.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from .. import files
from ..file_format import some
from ..files import CheckpointError
from . import mxfp4

METHOD = "compressed-tensors"
MXFP4, FP8 = "mxfp4-pack-quantized", "float-quantized"
_READ_AS = {MXFP4: MXFP4, FP8: FP8, "naive-quantized": FP8}
PACKED, SCALE = "weight_packed", "weight_scale"
# Output layers that many models tie to their embedding: no tensor of the files tells of them, and a loader would expect
# quantized weights.
_TIED = ("lm_head", "lm_head.decoder", "embed_out", "cls.predictions.decoder")

_WEIGHTS: dict[str, dict[str, object]] = {
    MXFP4: {
        "num_bits": 4, "type": "float", "symmetric": True, "dynamic": False, "strategy": "group",
        "group_size": mxfp4.GROUP, "scale_dtype": "torch.uint8", "zp_dtype": "torch.uint8",
    },
    FP8: {"num_bits": 8, "type": "float", "symmetric": True, "dynamic": False, "strategy": "channel"},
}  # fmt: skip


def config(layout: str, quantized: Iterable[str], others: Iterable[str]) -> dict[str, object]:
    """The configuration of a model whose Linear modules ``quantized`` are in ``layout`` and whose ``others`` are not.
    Activations are not quantized."""
    quantized = set(quantized)
    return {
        "quant_method": METHOD,
        "format": layout,
        "quantization_status": "compressed",
        "config_groups": {
            "group_0": {
                "targets": ["Linear"],
                "weights": dict(_WEIGHTS[layout]),
                "input_activations": None,
                "output_activations": None,
                "format": layout,
            }
        },
        "ignore": sorted({*others, *_TIED} - quantized),
        "kv_cache_scheme": None,
        "global_compression_ratio": None,
    }


@dataclass(frozen=True)
class Scheme:
    """What a configuration says of weights: their ``layout``, MXFP4 or FP8, the ``strategy`` of FP8's scales ("tensor",
    "channel" or "group"), and groups' size."""

    layout: str
    strategy: str
    group_size: int | None


def read(where: str, configuration: Mapping[str, object]) -> Scheme:
    """The scheme of a configuration: one for all quantized weights, and nothing quantized beside weights.

    Raises:
        CheckpointError: it is of another library, or another layout, or of several, or quantizes activations.
    """
    if (method := configuration.get("quant_method")) != METHOD:
        raise CheckpointError(
            f"{where}: quant_method: expected {METHOD!r} or a model that is not quantized, got {_short(method)}"
        )
    for key in ("kv_cache_scheme", "sparsity_config", "transform_config"):
        if configuration.get(key):
            raise CheckpointError(f"{where}: {key}: expected none, got {_short(configuration[key])}")
    groups = configuration.get("config_groups")
    if not isinstance(groups, dict) or not groups or not all(isinstance(group, dict) for group in groups.values()):
        raise CheckpointError(f"{where}: config_groups: expected an object of objects, got {_short(groups)}")
    schemes = {_group(f"{where}: {name}", group, configuration.get("format")) for name, group in groups.items()}
    if len(schemes) > 1:
        raise CheckpointError(f"{where}: config_groups: expected one scheme for all, got {len(schemes)}: {schemes}")
    return schemes.pop()


def _group(where: str, group: Mapping[str, object], default: object) -> Scheme:
    name = group.get("format") or default
    layout = _READ_AS.get(name) if isinstance(name, str) else None
    if layout is None:
        raise CheckpointError(f"{where}: format: expected one of {', '.join(_READ_AS)}, got {_short(name)}")
    for key in ("input_activations", "output_activations"):
        if group.get(key) is not None:
            raise CheckpointError(
                f"{where}: {key}: expected none, since only weights are brought back, got {_short(group[key])}"
            )
    weights = group.get("weights")
    if not isinstance(weights, dict):
        raise CheckpointError(f"{where}: weights: expected an object, got {_short(weights)}")
    expected = dict(_WEIGHTS[layout])
    for key in ("num_bits", "type", "symmetric", "dynamic"):
        default_value = {"symmetric": True, "dynamic": False}.get(key)
        got = weights.get(key, default_value)
        if got != expected[key] or type(got) is not type(expected[key]):
            raise CheckpointError(f"{where}: weights: {key}: expected {expected[key]!r}, got {_short(got)}")
    if weights.get("actorder"):
        raise CheckpointError(f"{where}: weights: actorder: expected none, got {_short(weights['actorder'])}")
    size, strategy = weights.get("group_size"), weights.get("strategy")
    if layout == MXFP4:
        if strategy != "group" or not files.is_int(size, mxfp4.GROUP, mxfp4.GROUP):
            raise CheckpointError(
                f"{where}: weights: expected groups of {mxfp4.GROUP}, got strategy {_short(strategy)} of {_short(size)}"
            )
        return Scheme(layout, strategy, size)
    if strategy not in ("tensor", "channel", "group"):
        raise CheckpointError(
            f"{where}: weights: strategy: expected 'tensor', 'channel' or 'group', got {_short(strategy)}"
        )
    if strategy == "group" and not files.is_int(size, 1, files.MAX_ELEMENTS):
        raise CheckpointError(f"{where}: weights: group_size: expected an int ≥ 1, got {_short(size)}")
    return Scheme(layout, strategy, size if strategy == "group" else None)


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:80] + "…"


@dataclass(frozen=True)
class Parts:
    """A quantized weight's tensors by name: ``values`` (codes or e4m3) and ``scales``, and its logical shape."""

    values: str
    scales: str
    shape: tuple[int, int]


def parts(where: str, scheme: Scheme, infos: Mapping[str, files.TensorInfo]) -> dict[str, Parts]:
    """The quantized weights among the tensors of a model, under NAME.weight, checked by dtype and shape alone.

    Raises:
        CheckpointError: a part is missing, has another dtype or shape, or belongs to no weight.
    """
    found: dict[str, Parts] = {}
    ending = PACKED if scheme.layout == MXFP4 else "weight"
    wanted = "U8" if scheme.layout == MXFP4 else "F8_E4M3"
    for name, info in infos.items():
        if not (name == ending or name.endswith(f".{ending}")) or info.dtype != files.DTYPES[wanted]:
            continue
        stem = name[: -len(ending)]
        scale = infos.get(f"{stem}{SCALE}")
        if scale is None:
            raise CheckpointError(f"{where}: tensor {name!r}: expected its scales {stem + SCALE!r}, got none")
        if len(info.shape) != 2 or 0 in info.shape:
            raise CheckpointError(f"{where}: tensor {name!r}: expected rank 2 and no 0, got {list(info.shape)}")
        if scheme.layout == MXFP4 and f"{stem}weight" in infos:
            raise CheckpointError(f"{where}: tensor {name!r}: expected no {stem + 'weight'!r} beside it, got one")
        found[f"{stem}weight"] = _checked(where, scheme, name, f"{stem}{SCALE}", info, scale)
    if not found:
        raise CheckpointError(f"{where}: expected weights in {scheme.layout}, got none")
    used = {part for each in found.values() for part in (each.values, each.scales)}
    endings = (PACKED, SCALE, "zero_point", "global_scale", "g_idx", "weight_shape", "input_scale", "output_scale")
    if strange := [name for name in infos if name not in used and name.endswith(endings)]:
        raise CheckpointError(f"{where}: expected {ending} and {SCALE} of quantized weights alone, got {some(strange)}")
    return found


def _checked(
    where: str, scheme: Scheme, name: str, scale_name: str, info: files.TensorInfo, scale: files.TensorInfo
) -> Parts:
    n, columns = info.shape
    if scheme.layout == MXFP4:
        k = columns * 2
        shapes = [(n, k // mxfp4.GROUP)] if k % mxfp4.GROUP == 0 else []
        dtypes = ["U8"]
    else:
        k = columns
        groups = [(n, k // scheme.group_size)] if scheme.group_size and k % scheme.group_size == 0 else []
        shapes = {"tensor": [(1,), (), (1, 1)], "channel": [(n, 1), (n,)], "group": groups}[scheme.strategy]
        dtypes = ["F32", "BF16", "F16", "F64"]
    if scale.shape not in shapes or scale.dtype not in [files.DTYPES[each] for each in dtypes]:
        expected = " or ".join(str(list(shape)) for shape in shapes) or f"groups of {scheme.group_size}"
        raise CheckpointError(
            f"{where}: tensor {scale_name!r}: expected {' or '.join(dtypes)} {expected} for the {list(info.shape)} of "
            f"{name!r}, got {scale.dtype} {list(scale.shape)}"
        )
    return Parts(name, scale_name, (n, k))
