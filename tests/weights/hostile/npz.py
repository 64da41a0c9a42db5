"""``params.npz``: zip files of npy files, each of which can lie about the other."""

import io
import os
import pickle
import struct
import zipfile
from pathlib import Path

import numpy as np

import jaxtc
from jaxtc.weights.files.transcoder import open_transcoder
from tests.weights.hostile.mutate import mutate_bytes, pick, whole
from tests.weights.hostile.tensors import MESHES, SITES, OneFile, put, read_all, same

SHAPES = {"W_enc": (5, 7), "W_dec": (7, 3), "b_enc": (7,), "b_dec": (3,), "threshold": (7,)}
CENTRAL, LOCAL = b"PK\x01\x02", b"PK\x03\x04"
BOMB = 200 << 20


class Bomb:
    """What a pickle could do: it would be seen."""

    def __reduce__(self):
        return (os._exit, (66,))


def arrays() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    return {key: rng.standard_normal(shape).astype(np.float32) for key, shape in SHAPES.items()}


def npy(array: np.ndarray) -> bytes:
    stream = io.BytesIO()
    np.lib.format.write_array(stream, array, allow_pickle=False)
    return stream.getvalue()


def header(text: str, version: bytes = b"\x01\x00", length: int | None = None) -> bytes:
    """An npy header of any text."""
    raw = text.encode("latin1")
    raw += b" " * (-(len(raw) + 11) % 64) + b"\n"
    size = (len(raw) if length is None else length) % 2 ** (16 if version == b"\x01\x00" else 32)
    return (
        b"\x93NUMPY" + version + struct.pack("<H" if version == b"\x01\x00" else "<I", size) + raw
    )


def zipped(members: list[tuple[str, bytes]], compression=zipfile.ZIP_STORED) -> bytearray:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", compression) as archive:
        for name, content in members:
            archive.writestr(zipfile.ZipInfo(name), content, compression)
    return bytearray(stream.getvalue())


def odd_array(key: str, array: np.ndarray, rng: np.random.Generator) -> bytes:
    """An npy of another dtype, order or shape than it should have."""
    if rng.random() < 0.15:
        text = f"{{'descr': '|O', 'fortran_order': False, 'shape': {array.shape!r}, }}"
        return header(text) + pickle.dumps([Bomb()] * array.size)
    kinds = [
        ">f4", "f8", ">f8", "f2", "i4", "u1", "?", "c8", "c16", "f4,f4", "(2,)f4", "U4", "S4",
        "M8[s]", "m8[s]", "V4", "g",
    ]  # fmt: skip
    shapes = [
        array.T, array[None], array[..., None], array.ravel(), array[:0], array[:1], array * 2,
        np.asfortranarray(array), np.float32(1), np.repeat(array, 2, 0),
        np.where(rng.random(array.shape) < 0.1, np.nan, array),
    ]  # fmt: skip
    if rng.random() < 0.6:
        try:
            return npy(array.astype(pick(rng, kinds)))
        except (TypeError, ValueError):
            return npy(np.zeros(array.shape, pick(rng, kinds)))
    return npy(np.asarray(pick(rng, shapes)))


def lying_header(array: np.ndarray, rng: np.random.Generator) -> bytes:
    """The honest bytes of an array behind a header that says something else."""
    shape = pick(rng, [
        array.shape, array.shape[::-1], (10**9, 10**9), (2**63, 2), (2**64,), (-5, -7), (0,), (),
        (array.size,), (1, array.size), (array.size, 1), (True, array.size), (5.0, 7.0), "x", None,
        [5, 7], (2**32, 2**32), (10**300, 10**300), (1,) * 70 + array.shape, ((5, 7),),
    ])  # fmt: skip
    descr = pick(
        rng,
        ["'<f4'"] * 6
        + [
            "'<f8'",
            "'<f2'",
            "'|O'",
            "'O'",
            "'<f16'",
            "'x'",
            "5",
            "None",
            "[('a', '<f4')]",
            "('<f4', (2,))",
            "'<f4,<f4'",
            "'<c8'",
            "'|V4'",
        ],
    )
    order = pick(rng, ["False"] * 4 + ["True", "0", "'no'", "None"])
    body = f"'descr': {descr}, 'fortran_order': {order}, 'shape': {shape!r}, "
    text = pick(rng, [
        *["{" + body + "}"] * 6, "{" + body, body, "{" + body + "'more': 1}",
        "(" * 1000 + ")" * 1000, "{" + body + "}" + " " * 20_000, "-" * 9000 + "1", "[" * 9000,
        "__import__('os')._exit(66)", "{" + body + "'descr': '<f4'}", "'" * 3 + body,
        "{" + body.replace("'", '"') + "}", "\\" * 9, "{'a': " * 300, "\x00" * 64,
        "{" + body + "} # x", "{" + body.replace(", ", ",\n ") + "}",
    ])  # fmt: skip
    version = pick(rng, [b"\x01\x00"] * 6 + [b"\x02\x00", b"\x03\x00", b"\x00\x00", b"\xff\xff"])
    length = pick(rng, [None] * 6 + [0, 1, 10, 65535, 2**32 - 1])
    return header(text, version, length) + array.tobytes()


def zip_lie(members: list[tuple[str, bytes]], rng: np.random.Generator) -> bytes:
    """A sound zip with one field of its directory, or of a member's own header, made a lie."""
    packed = zipped(members, pick(rng, [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED]))
    central = rng.random() < 0.7
    mark = CENTRAL if central else LOCAL
    starts = [i for i in range(len(packed) - 4) if packed[i : i + 4] == mark]
    # Offset and size of: version, flags, method, date, CRC, sizes, lengths, offset.
    places = {
        "version": (6, 2), "flags": (8, 2), "method": (10, 2), "time": (12, 4), "crc": (16, 4),
        "packed": (20, 4), "size": (24, 4), "name": (28, 2), "extra": (30, 2), "comment": (32, 2),
        "disk": (34, 2), "offset": (42, 4),
    }  # fmt: skip
    place, size = pick(rng, list(places.values()))
    place -= 0 if central else 2
    start = pick(rng, starts) + place
    old = int.from_bytes(packed[start : start + size], "little")
    new = pick(rng, [
        0, 1, 8, 12, 14, 93, 99, old + 1, old - 1, old ^ 1, old * 2, 2 ** (8 * size) - 1,
        2 ** (8 * size - 1), old + 64, 0x41, 0x2000, 0x0800, int(rng.integers(2**16)),
    ])  # fmt: skip
    packed[start : start + size] = (new % 2 ** (8 * size)).to_bytes(size, "little")
    return bytes(packed)


def zip64_lie(members: list[tuple[str, bytes]], rng: np.random.Generator) -> bytes:
    """Sizes and offsets in zip64 extra fields, right or wrong."""
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        for name, content in members:
            info = zipfile.ZipInfo(name)
            claim = pick(rng, [len(content), len(content) + 1, 2**32 + 5, 2**63, 2**64 - 1, 0])
            size = int(pick(rng, [0, 8, 16, 24, 28, 65535, 4]))
            info.extra = struct.pack("<HHQQQ", 1, size, claim, claim, pick(rng, [0, 5, 2**40]))
            archive.writestr(info, content)
    packed = bytearray(stream.getvalue())
    for i in range(len(packed) - 46):
        if packed[i : i + 4] == CENTRAL and rng.random() < 0.8:
            packed[i + 20 : i + 28] = b"\xff" * 8
    return bytes(packed)


class Npz(OneFile):
    """One file of Gemma Scope's format."""

    def __init__(self, folder: Path):
        place = folder / "layer_2/width_7/average_l0_1"
        place.mkdir(parents=True)
        self.members = [(f"{key}.npy", npy(array)) for key, array in arrays().items()]
        (place / "params.npz").write_bytes(zipped(self.members))
        super().__init__(place / "params.npz")
        self._bomb = b""

    def bomb(self) -> bytes:
        """Some hundred kilobytes that would unpack to 200 MB of zeros, made once."""
        if not self._bomb:
            content = npy(np.zeros((BOMB // 28, 7), np.float32))
            members = [("W_enc.npy", content), *self.members[1:]]
            self._bomb = bytes(zipped(members, zipfile.ZIP_DEFLATED))
        return self._bomb

    def mutate(self, rng: np.random.Generator) -> str:
        """Put a mutant in its place."""
        self.restore()
        self.kind = pick(rng, [
            "array", "header", "zip", "zip", "zip64", "members", "bytes", "bytes", "deflated",
            "whole", "special",
        ])  # fmt: skip
        members = list(self.members)
        index = int(rng.integers(len(members)))
        name = members[index][0]
        array = arrays()[name.removesuffix(".npy")]
        method = pick(rng, [zipfile.ZIP_STORED, zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
        content = self.raw
        if self.kind == "array":
            members[index] = (name, odd_array(name, array, rng))
            content = zipped(members, method)
        elif self.kind == "header":
            members[index] = (name, lying_header(array, rng))
            content = zipped(members, method)
        elif self.kind == "members":
            members = pick(rng, [
                members[:index] + members[index + 1 :], [*members, ("../x.npy", members[0][1])],
                [*members, ("/etc/x", b"x")], [*members, ("scale.npy", members[0][1])],
                [*members, ("folder/", b"")], members[::-1], [],
                [(n.removesuffix(".npy"), c) for n, c in members],
                [(n.upper(), c) for n, c in members], [(n + "\x00", c) for n, c in members],
                [*members[:index], (name, b""), *members[index + 1 :]],
                [*members, *((f"{i}.npy", b"") for i in range(500))],
            ])  # fmt: skip
            content = zipped(
                members, pick(rng, [method, method, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
            )
            if rng.random() < 0.3 and b"b_enc" in content:
                content = bytes(content).replace(b"b_enc", b"b_dec")  # a name twice
        elif self.kind == "zip":
            content = zip_lie(members, rng)
        elif self.kind == "zip64":
            content = zip64_lie(members, rng)
        elif self.kind == "bytes":
            content = mutate_bytes(self.raw, rng)
            if rng.random() < 0.3:
                end = len(self.raw) - self.raw.index(CENTRAL)
                content = self.raw[:-end] + mutate_bytes(self.raw[-end:], rng)
        elif self.kind == "deflated":
            content = mutate_bytes(bytes(zipped(members, zipfile.ZIP_DEFLATED)), rng)
        elif self.kind == "whole":
            content = whole(self.raw, rng)
        elif rng.random() < 0.15:
            self.kind, content = "bomb", self.bomb()
        elif rng.random() < 0.3:
            put(self.path, pick(rng, ["fifo", "device", "loop"]))
            return self.kind
        else:
            content = pick(rng, [
                b"\x00" * 99 + self.raw, self.raw + b"PK\x05\x06" + bytes(18),
                self.raw + b"\x00" * 99, self.raw + self.raw,
            ])  # fmt: skip
        self.path.write_bytes(content)
        return self.kind

    def load(self, deep: int) -> dict[str, np.ndarray]:
        """The five parameters."""
        if deep:
            made = jaxtc.load_transcoder(self.path, mesh=MESHES[deep], **SITES)
            return {key: np.asarray(getattr(made, key)[...]) for key in SHAPES}
        with open_transcoder(self.path) as opened:
            return read_all(opened)

    def check(self, loaded: dict[str, np.ndarray]) -> None:
        """Compare with what numpy reads."""
        with np.load(self.path, allow_pickle=False) as known:
            assert {name.removesuffix(".npy") for name in known.files} == set(loaded)
            for name, array in loaded.items():
                same(name, array, known[name])


CASES = {"npz": Npz}
