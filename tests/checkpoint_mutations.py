"""Ways to damage a checkpoint, as Hypothesis strategies: JSON, safetensors headers, tensors, bytes.

A checkpoint is `{file name: bytes}` in memory; each `mutate_*` draws what to do and changes it.
"""

import json
import struct
from collections.abc import Callable, Iterator
from typing import Any

import hypothesis.strategies as st
from hypothesis.strategies import DataObject

Files = dict[str, bytes]
Header = dict[str, Any]

WEIGHTS = "model.safetensors"
SIZES = [0, 1, 2, 3, 7, 64, 128, 2**31 - 1, 2**31, 2**63 - 1, 2**63, 10**30, 10**400]
SCALARS = [
    *(None, True, False, *SIZES, *(-size for size in SIZES), 0.5, -1.5, 1e-9, 1e308),
    *(float("nan"), float("inf"), "", "x", "4", "128", "gptq", "gptq_v2", "awq", "bfloat16"),
    *("float32", "silu", "yarn", "\ud800", "\0", "../x", "(", "(" * 3000, "a{99999999999}"),
]
KEYS = """
    head_dim rope_theta rope_scaling rope_parameters partial_rotary_factor hidden_act rms_norm_eps
    num_experts n_routed_experts mlp_only_layers decoder_sparse_step layer_types sliding_window
    use_sliding_window attention_bias tie_word_embeddings dtype torch_dtype architectures model_type
    norm_topk_prob num_hidden_layers quantization_config dynamic quant_method sym desc_act bits
    group_size zero_point version format extra_config type factor beta_fast mscale attention_factor
    low_freq_factor rope_type quantization ignore config_groups actorder strategy targets weights
""".split()
DTYPES = ["BOOL", "U8", "I8", "I16", "I32", "U32", "I64", "F4", "F8_E4M3", "F16", "BF16", "F32"]
PARTS = ["weight", "bias", "qweight", "scales", "qzeros", "g_idx", "weight_scale", "blocks", "x"]


def nested(depth: int) -> list:
    """A list in a list, `depth` times."""
    value: list = []
    for _ in range(depth):
        value = [value]
    return value


def json_values() -> st.SearchStrategy:
    """Values of every JSON type; numbers past every size, text of every meaning."""
    scalars = st.sampled_from(SCALARS)
    lists = st.lists(scalars, max_size=3)
    objects = st.dictionaries(st.sampled_from(KEYS), scalars | lists, max_size=3)
    deep = st.sampled_from([nested(30), nested(300), {"a": nested(300)}])
    return scalars | lists | objects | st.lists(objects, max_size=2) | deep


def containers(value: Any) -> Iterator[dict | list]:
    """All that has items within a JSON value, itself included."""
    if isinstance(value, (dict, list)):
        yield value
        for item in list(value.values() if isinstance(value, dict) else value):
            yield from containers(item)


def mutate_json(files: Files, data: DataObject) -> None:
    """One key of a config or index: removed, renamed, added, or given another value."""
    name = data.draw(st.sampled_from(sorted(name for name in files if name.endswith(".json"))))
    config = json.loads(files[name])
    # The top and the quantization config hold most of what is read.
    often = [config, config.get("quantization_config", config)] * 4
    site = data.draw(st.sampled_from([site for site in [*containers(config), *often] if site]))
    keys = sorted(site) if isinstance(site, dict) else range(len(site))
    key = data.draw(st.sampled_from(keys))
    action = data.draw(st.sampled_from(["value", "value", "value", "remove", "rename", "add"]))
    new = data.draw(st.sampled_from(KEYS))
    if action == "remove":
        del site[key]
    elif action == "rename" and isinstance(site, dict):
        site[new] = site.pop(key)
    elif isinstance(site, list) or action == "value":
        site[key] = data.draw(json_values())
    else:
        site[new] = data.draw(json_values())
    files[name] = json.dumps(config).encode()


def mutate_text(files: Files, data: DataObject) -> None:
    """Bytes of a config or index: not JSON, a number or a nesting without end, a lost end."""
    name = data.draw(st.sampled_from(sorted(name for name in files if name.endswith(".json"))))
    text = files[name]
    at = data.draw(st.integers(0, len(text)))
    new = [
        b"",
        b"\xff",
        b"{}",
        b'"',
        b"9" * 5000,
        b"[" * 100_000,
        b"NaN",
        b"-",
        b"\0",
        b'{"bits":4}',
    ]
    cut = data.draw(st.sampled_from([0, 1, 8, len(text)]))
    files[name] = text[:at] + data.draw(st.sampled_from(new)) + text[at + cut :]


def mutate_file(files: Files, data: DataObject) -> None:
    """A whole file: gone, empty, under another name, in place of another."""
    name = data.draw(st.sampled_from(sorted(files)))
    content = files.pop(name)
    others = [name, WEIGHTS, "config.json", "a.safetensors", "model.safetensors.index.json"]
    others += ["quantize_config.json", "model-00001-of-00002.safetensors"]
    if data.draw(st.booleans()):
        files[data.draw(st.sampled_from(others))] = data.draw(
            st.sampled_from([content, b"", b"{}"])
        )


def mutate_bytes(files: Files, data: DataObject) -> None:
    """Bytes of a safetensors file: flipped in header or data, cut off, or added."""
    name, raw = _weights(files, data)
    header_end = 8 + int.from_bytes(raw[:8], "little")
    action = data.draw(st.sampled_from(["length", "header", "data", "truncate", "extend"]))
    if action == "truncate":
        files[name] = raw[: data.draw(st.integers(0, 16) | st.integers(0, len(raw)))]
        return
    if action == "extend":
        files[name] = raw + data.draw(st.binary(min_size=1, max_size=16))
        return
    first, last = {
        "length": (0, 8),
        "header": (8, header_end),
        "data": (header_end, len(raw)),
    }[action]
    damaged = bytearray(raw)
    for at in data.draw(st.lists(st.integers(first, max(first, last - 1)), min_size=1, max_size=4)):
        if at < len(raw):
            damaged[at] = data.draw(st.integers(0, 255))
    files[name] = bytes(damaged)


def mutate_entry(files: Files, data: DataObject) -> None:
    """What a header says of one tensor, so that most of the time it is a lie."""
    name, header, content = _header(files, data)
    tensor = _tensor(header, data)
    entry = header[tensor]
    field = data.draw(
        st.sampled_from(["dtype", "shape", "data_offsets", "entry", "remove", "axis"])
    )
    if field == "entry":
        header[tensor] = data.draw(json_values())
    elif field == "remove":
        del entry[data.draw(st.sampled_from(sorted(entry)))]
    elif field == "axis":
        where = data.draw(st.sampled_from(["shape", "data_offsets"]))
        if entry[where]:
            entry[where][data.draw(st.integers(0, len(entry[where]) - 1))] = data.draw(
                st.sampled_from(SCALARS)
            )
    elif field == "dtype":
        entry["dtype"] = data.draw(st.sampled_from(DTYPES) | json_values())
    else:
        entry[field] = data.draw(st.lists(st.sampled_from(SIZES), max_size=70) | json_values())
    files[name] = pack(header, content)


def mutate_tensor(files: Files, data: DataObject) -> None:
    """A true header over other tensors: missing, renamed, swapped, reshaped, reinterpreted, new."""
    name, header, content = _header(files, data)
    first, second = _tensor(header, data), _tensor(header, data)
    module, _, part = first.rpartition(".")
    renamed = [f"{module}.{other}" for other in PARTS] + ["x", "", "9" * 5000, "\ud800", second]
    renamed += [
        first.replace("layers.0", "layers.1"),
        first.replace("experts.0", "experts.8"),
        f".{part}",
    ]
    action = data.draw(st.sampled_from(
        ["remove", "rename", "swap", "reshape", "dtype", "add", "fill", "fill", "metadata"]
    ))  # fmt: skip
    entry = header[first]
    start, stop = entry["data_offsets"]
    if action == "remove":
        content = content[:start] + content[stop:]
        del header[first]
        for other in header.values():
            if other["data_offsets"][0] >= stop:
                other["data_offsets"] = [at - (stop - start) for at in other["data_offsets"]]
    elif action == "rename":
        header[data.draw(st.sampled_from(renamed))] = header.pop(first)
    elif action == "swap":
        header[first], header[second] = header[second], header[first]
    elif action == "reshape":
        shape, size = entry["shape"], stop - start
        shapes = [shape[::-1], [1, *shape], [*shape, 1], [1] * 40 + shape, [1] * 70 + shape]
        entry["shape"] = data.draw(st.sampled_from([*shapes, [size], [size // 2], [size // 4]]))
    elif action == "dtype":
        entry["dtype"] = data.draw(st.sampled_from(["F16", "BF16", "I16", "F32", "I32", "U32"]))
    elif action == "add":  # of no bytes
        shape = [0, *data.draw(st.lists(st.sampled_from(SIZES), max_size=3))]
        dtype = data.draw(st.sampled_from(DTYPES))
        new = data.draw(st.sampled_from(renamed))
        header[new] = {"dtype": dtype, "shape": shape, "data_offsets": [len(content)] * 2}
    elif action == "fill":
        word = data.draw(
            st.sampled_from(
                [b"\0\0\0\0", b"\xff\xff\xff\xff", b"\0\x7e\0\x7c", b"\x80\x7f\x80\x7f"]
            )
        )
        content = content[:start] + (word * (stop - start))[: stop - start] + content[stop:]
    else:
        header["__metadata__"] = data.draw(json_values())
    files[name] = pack(header, content)


def mutate_shards(files: Files, data: DataObject) -> None:
    """Two files and an index, which may repeat a tensor, lack one, or lie."""
    name, header, content = _header(files, data)
    tensors, halves = sorted(header), ({}, {})
    weight_map: dict[str, Any] = {}
    for tensor in tensors:
        half = len(tensor) % 2
        halves[half][tensor] = header[tensor]
        weight_map[tensor] = f"model-0000{half + 1}-of-00002.safetensors"
    chosen, action = (
        data.draw(st.sampled_from(tensors)),
        data.draw(st.sampled_from(["none", "twice", "lost", "index", "other", "file", "no index"])),
    )
    if action == "twice":
        halves[1 - len(chosen) % 2][chosen] = header[chosen]
    elif action == "lost":
        del halves[len(chosen) % 2][chosen]
    elif action == "index":
        del weight_map[chosen]
    elif action == "other":
        weight_map[chosen] = data.draw(json_values())
    del files[name]
    for half, entries in enumerate(halves):
        files[f"model-0000{half + 1}-of-00002.safetensors"] = gathered(entries, content)
    if action == "file":
        del files["model-00002-of-00002.safetensors"]
    if action != "no index":
        index = {"metadata": {}, "weight_map": weight_map}
        files["model.safetensors.index.json"] = json.dumps(index).encode()


MUTATIONS: tuple[Callable[[Files, DataObject], None], ...] = (
    mutate_json, mutate_json, mutate_json, mutate_text, mutate_file, mutate_bytes, mutate_entry,
    mutate_tensor, mutate_tensor, mutate_shards,
)  # fmt: skip


def pack(header: Header, content: bytes) -> bytes:
    """A safetensors file."""
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + content


def gathered(entries: Header, content: bytes) -> bytes:
    """A safetensors file of some of a file's tensors."""
    header, parts, end = {}, [], 0
    for name, entry in entries.items():
        start, stop = entry["data_offsets"]
        header[name] = {**entry, "data_offsets": [end, end + stop - start]}
        parts.append(content[start:stop])
        end += stop - start
    return pack(header, b"".join(parts))


def _weights(files: Files, data: DataObject) -> tuple[str, bytes]:
    name = data.draw(st.sampled_from(sorted(n for n in files if n.endswith(".safetensors"))))
    return name, files[name]


def _header(files: Files, data: DataObject) -> tuple[str, Header, bytes]:
    name, raw = _weights(files, data)
    end = 8 + int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8:end])
    header.pop("__metadata__", None)
    return name, header, raw[end:]


def _tensor(header: Header, data: DataObject) -> str:
    return data.draw(st.sampled_from(sorted(header)))
