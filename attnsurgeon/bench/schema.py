"""The results as JSON: every key, what it means, and a check of what is read back.

`SCHEMA` is a JSON Schema; `attnsurgeon bench --schema` prints it. A key is never renamed or
given another meaning without a new VERSION; new ones may come.
"""

from __future__ import annotations

from typing import Any

VERSION = 1
PACKAGES = ("attnsurgeon", "torch", "torchvision", "onnxruntime", "numpy", "triton", "timm")
"""Whose versions the times depend on."""
Kind = dict[str, Any]


def _of(kind: str, meaning: str, *, null: bool = False) -> Kind:
    return {"type": [kind, "null"] if null else kind, "description": meaning}


def _list(of: Kind, meaning: str, *, null: bool = False) -> Kind:
    return {**_of("array", meaning, null=null), "items": of}


def _table(meaning: str, **keys: Kind) -> Kind:
    return {**_of("object", meaning), "properties": keys, "required": list(keys)}


_TEXT, _NUMBER = {"type": "string"}, {"type": "number"}
_PAIR = "lower and upper end of the 95 % interval"
_RATIO = {
    "ratio": _of(
        "number",
        "time over the baseline's, above 1 is slower: of the faster half of the blocks of each, "
        "or, where most were held up, as the doubts say",
    ),
    "interval95": _list(_NUMBER, f"{_PAIR} of the ratio"),
}

_JOB = {
    "engine": _of("string", "what ran it"),
    "device": _of("string", "cpu, or cuda:N"),
    "batch": _of("integer", "images per call"),
    "precision": _of("string", "fp32, tf32, bf16 or fp16; in training the autocast's"),
    "channels_last": _of("boolean", "whether maps lie in memory with the channels last"),
    "train": _of("boolean", "whether a call is forward, backward and a step of SGD"),
}

_RUN = _table(
    "one target in one job",
    target=_of("string", "as typed"),
    **_JOB,
    median_ms=_of("number", "middle of all timed calls"),
    p5_ms=_of("number", "time that 5 % of the calls stay under"),
    p50_ms=_of("number", "the median again"),
    p90_ms=_of("number", "time that 90 % of the calls stay under"),
    p95_ms=_of("number", "time that 95 % of the calls stay under"),
    p99_ms=_of("number", "time that 99 % of the calls stay under"),
    samples_ms=_list(_NUMBER, "every timed call, in the order of running"),
    parameters=_of(
        "integer",
        "gates included; of an .onnx or frozen file all; null of a compiled one",
        null=True,
    ),
    macs=_of("integer", "multiply-adds for one image; null for a compiled file", null=True),
    file_bytes=_of("integer", "size of the file, with the data beside it", null=True),
    provider=_of("string", "of ONNX Runtime, as the session reports it", null=True),
    weights=_of("string", "random, file, or given with the module or by its factory"),
    median95_ms=_list(_NUMBER, f"{_PAIR} of the median", null=True),
    images_per_s=_of("number", "throughput at the median"),
    variation=_of("number", "standard deviation of the calls over their mean"),
    load_s=_of("number", "reading the target and making it ready for the engine", null=True),
    first_run_ms=_of("number", "the first call, compiling included", null=True),
    peak_host_bytes=_of("integer", "host memory of a call at its highest", null=True),
    peak_device_bytes=_of("integer", "device memory of a call at its highest", null=True),
    uncounted=_list(_TEXT, "operators that compute something besides the multiply-adds"),
    bandwidth_share=_of(
        "number",
        "bytes of all operators one by one in the median time, over what is copied in it; above 1 "
        "where fusion or caches save traffic",
        null=True,
    ),
    arithmetic_share=_of(
        "number", "multiply-adds in the median time over those of a matrix product", null=True
    ),
    doubts=_list(_TEXT, "reasons not to trust these times"),
)

_COMPARISON = _table(
    "one target against the baseline in one job",
    target=_of("string", "as typed"),
    baseline=_of("string", "what it is compared with"),
    **_JOB,
    **_RATIO,
    verdict=_of("string", "the ratio in words, to the digits that the interval supports"),
    doubts=_list(_TEXT, "reasons not to trust the ratio"),
)

_FAILURE = _table("a job that did not fit into memory", **_JOB, reason=_of("string", "one line"))

_OPERATOR = _table(
    "one operator",
    name=_of("string", "as the engine calls it"),
    calls=_of("integer", "in one run"),
    ms=_of("number", "of one run, without operators inside it"),
    share=_of("number", "of the sum of all operators"),
)

_PROFILE = _table(
    "the engine's own per-operator table",
    **_JOB,
    target=_of("string", "as typed"),
    operators=_list(_OPERATOR, "the costliest first"),
)

_SITE = _table(
    "one site",
    path=_of("string", "of the block in the network"),
    placement=_of("string", "where in the block"),
    block=_of("string", "which attention"),
    shape=_list({"type": "integer"}, "of the features it reads, for one image"),
    alone_in=_table("the host with this site's attention alone, against the host", **_RATIO),
    alone_out=_table("all attention, against all but this site's", **_RATIO),
)

_SITES = _table(
    "what the attention at each site costs",
    **_JOB,
    target=_of("string", "as typed"),
    sites=_list(_SITE, "in the order of the network"),
    sum_alone_in=_of("number", "sum of what each costs alone, as a share of the host's time"),
    whole=_of("number", "what all cost together, as a share of the host's time"),
    whole95=_list(_NUMBER, f"{_PAIR} of the whole"),
    doubts=_list(_TEXT, "reasons not to trust them"),
)

_ENVIRONMENT = _table(
    "what the times depend on",
    command=_of("string", "what was typed, or called"),
    cpu=_of("string", "model of the processor"),
    cores=_of("integer", "of the machine"),
    usable_cores=_of("integer", "that this process may use"),
    governor=_of(
        "string", "how the clock is chosen; null where the system does not tell", null=True
    ),
    load_average=_of("number", "of the minute before"),
    threads=_of("integer", "CPU threads of every engine"),
    device=_of("string", "cpu, or cuda:N"),
    gpu=_of("string", "its model", null=True),
    driver=_of("string", "of the GPU", null=True),
    cuda=_of("string", "version of the toolkit that torch was built with", null=True),
    platform=_of("string", "operating system"),
    python=_of("string", "version"),
    **{name: _of("string", "version, where it is installed", null=True) for name in PACKAGES},
    seconds=_of("number", "of measuring for each job"),
    input_shapes=_list(_list({"type": "integer"}, "one input"), "of the inputs, for one image"),
    gates=_of("string", "how they were opened"),
    ceilings=_list(
        _table(
            "measured in the same run",
            precision=_of("string", "of the matrices"),
            bytes_per_s=_of("number", "copied, read and written"),
            macs_per_s=_of("number", "multiply-adds of a matrix product"),
        ),
        "what the device can do at most",
    ),
    notes=_list(_TEXT, "what the reader has to know"),
)

SCHEMA: Kind = {
    "$schema": "https://json-schema.org/draft/2020-12/schema",
    "title": f"attnsurgeon bench results, schema {VERSION}",
    **_table(
        "all that one call of bench found",
        schema={"const": VERSION, "type": "integer", "description": "version of this layout"},
        environment=_ENVIRONMENT,
        runs=_list(_RUN, "one for each job and target"),
        comparisons=_list(_COMPARISON, "of every target but the first with the first"),
        failures=_list(_FAILURE, "what did not fit into memory"),
        sites=_list(_SITES, "with --per-site"),
        profiles=_list(_PROFILE, "with --profile"),
        interrupted=_of("boolean", "whether an interrupt or an error left the rest out"),
    ),
}

_TYPES: dict[str, tuple[type, ...]] = {
    "string": (str,),
    "number": (int, float),
    "integer": (int,),
    "boolean": (bool,),
    "array": (list,),
    "object": (dict,),
    "null": (type(None),),
}


def misfit(value: Any, kind: Kind = SCHEMA, where: str = "results") -> str | None:
    """Return what of a value does not fit a kind, as `results.runs[0].batch is no integer`."""
    names = kind["type"] if isinstance(kind["type"], list) else [kind["type"]]
    is_bool = isinstance(value, bool) and "boolean" not in names
    if is_bool or not isinstance(value, tuple(t for name in names for t in _TYPES[name])):
        return f"{where} is no {' or '.join(names)}"
    if isinstance(value, dict):
        parts = [(f"{where}.{key}", key, sub) for key, sub in kind.get("properties", {}).items()]
        missing = [name for name, key, _ in parts if key not in value]
        if missing:
            return f"{missing[0]} is missing"
        return _first(misfit(value[key], sub, name) for name, key, sub in parts)
    if isinstance(value, list):
        return _first(misfit(v, kind["items"], f"{where}[{i}]") for i, v in enumerate(value))
    return None


def _first(found: Any) -> str | None:
    return next((text for text in found if text), None)
