"""Files whose format is right and whose contents nobody would write, built by hypothesis: read, or refused in a sentence."""

import io
import json
import tarfile

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as extra
from ruamel.yaml import YAML

from tests.fuzz import mutate
from tests.fuzz.run import judge
from tests.fuzz.targets import TARGETS, encoded

some = settings(max_examples=40)
few = settings(some, max_examples=12)

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | st.text(max_size=9),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)
BYTES = st.sampled_from([b"", b"\0" * 9, encoded("PNG"), encoded("JPEG"), encoded("PNG")[:60]])
WORDS = st.sampled_from(["train", "val", "ape", "bee", "3", "1.0", "nan", "", "a\nb", "../x", "s3://b/x"]) | st.text(
    max_size=6
)
LABELS = st.integers(-3, 3) | st.integers(-(2**63), 2**63 - 1)
IMAGES = st.fixed_dictionaries({"bytes": BYTES | st.none(), "path": WORDS | st.none()})
COLUMNS = st.sampled_from(
    [
        (pa.binary(), BYTES),
        (pa.large_binary(), BYTES),
        (pa.binary_view(), BYTES),
        (pa.list_(pa.binary()), st.lists(BYTES, max_size=2)),
        (pa.struct([("bytes", pa.binary()), ("path", pa.string())]), IMAGES),
        (pa.struct([("path", pa.string())]), st.fixed_dictionaries({"path": WORDS})),
        (pa.string(), WORDS),
        (pa.large_string(), WORDS),
        (pa.dictionary(pa.int8(), pa.string()), WORDS),
        (pa.int64(), LABELS),
        (pa.uint8(), st.integers(0, 255)),
        (pa.float64(), st.floats() | st.sampled_from([0.0, 1.0, 2.0])),
        (pa.bool_(), st.booleans()),
        (pa.list_(pa.int64()), st.lists(LABELS, max_size=2)),
        (pa.null(), st.none()),
        (pa.decimal128(9, 2), st.none()),
        (pa.timestamp("ns"), st.none()),
    ]
)


@st.composite
def tables(draw):
    rows, table = draw(st.integers(0, 4)), {}
    for name in draw(st.lists(st.sampled_from(["image", "label", "cls", "split", "jpg", "url"]), unique=True, min_size=1)):
        kind, values = draw(COLUMNS)
        # Columns of images and labels that are such, more often than by chance: else nothing behind them is reached.
        if name == "image" and draw(st.booleans()):
            kind, values = pa.struct([("bytes", pa.binary()), ("path", pa.string())]), IMAGES
        if name == "label" and draw(st.booleans()):
            kind, values = pa.int64(), st.integers(0, 2)
        table[name] = pa.array(draw(st.lists(values | st.none(), min_size=rows, max_size=rows)), kind)
    return pa.table(table)


@st.composite
def archives(draw):
    stream = io.BytesIO()
    with tarfile.open(
        fileobj=stream, mode="w", format=draw(st.sampled_from([tarfile.USTAR_FORMAT, tarfile.PAX_FORMAT]))
    ) as tar:
        for name, content in draw(st.sampled_from([{}, {"0.png": encoded("PNG"), "0.cls": b"0"}])).items():
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            tar.addfile(entry, io.BytesIO(content))
        for _ in range(draw(st.integers(0, 4))):
            stem = draw(st.sampled_from(["a", "b", "./a", "x/a", "a.b", "._a", "/abs", "../up", "ä", "a " * 30]))
            entry = tarfile.TarInfo(f"{stem}{draw(st.sampled_from(['.png', '.jpg', '.cls', '.json', '', '.txt', '/']))}")
            kinds = [tarfile.REGTYPE] * 5 + [
                tarfile.DIRTYPE,
                tarfile.SYMTYPE,
                tarfile.LNKTYPE,
                tarfile.FIFOTYPE,
                tarfile.CHRTYPE,
            ]
            entry.type, entry.linkname = (
                draw(st.sampled_from(kinds)),
                draw(st.sampled_from(["a.png", "/etc/passwd", entry.name])),
            )
            labels = st.sampled_from(
                [b"0", b"1", b" 2\n", b"-1", b"3.0", b"99999999999999999999", b"\xff", b'{"label": 1}', b"[]"]
            )
            content = draw(labels | BYTES) if entry.isfile() else b""
            entry.size = len(content)
            tar.addfile(entry, io.BytesIO(content))
    return stream.getvalue()


@st.composite
def archives_of_arrays(draw):
    stream = io.BytesIO()
    kinds = extra.unsigned_integer_dtypes() | extra.integer_dtypes() | extra.floating_dtypes() | extra.boolean_dtypes()
    kinds = st.just(np.dtype(np.uint8)) | kinds | extra.complex_number_dtypes() | extra.unicode_string_dtypes(max_len=3)
    shapes = st.sampled_from([(2, 8, 8, 3), (3, 3, 8, 8), (1, 8, 8, 1), (2, 8, 6, 4), (8, 8, 3)])
    shapes |= extra.array_shapes(min_dims=0, max_dims=5, min_side=0, max_side=4)
    names = draw(st.lists(st.sampled_from(["arr_0", "samples", "mu", "sigma", "arr_1", "x"]), unique=True, max_size=3))
    np.savez(stream, **{name: draw(extra.arrays(draw(kinds), draw(shapes))) for name in names})
    return stream.getvalue()


class Reader:
    """A reader of tests.fuzz.targets with its folder, made once for all examples of a test."""

    def __init__(self, name, root):
        self.target, self.folder = TARGETS[name], root / name.replace(" ", "-")
        if not self.folder.exists():
            self.folder.mkdir()
            self.target.make(self.folder)

    def given(self, name, content, where=""):
        """Return whether the reader takes this content of one of its files, and fail unless it does or says why not."""
        path = self.folder / name
        before = path.read_bytes()
        path.write_bytes(content)
        try:
            outcome = judge(self.target, self.folder, name, content, {}, set(), where)
            assert not outcome.startswith("finding"), outcome
            return self.target.read(self.folder) if outcome == "accepted" else None
        finally:
            path.write_bytes(before)


@some
@given(tables())
def test_parquet_of_any_columns(tmp_path, table):
    stream = io.BytesIO()
    pq.write_table(table, stream)
    read = Reader("Parquet of images", tmp_path).given("train/a.parquet", stream.getvalue())
    if read is not None:
        labels, classes, images = read
        assert len(labels) == len(images) > 0
        assert all(0 <= label < len(classes) for label in labels)


@some
@given(archives())
def test_tars_of_any_members(tmp_path, content):
    read = Reader("webdataset", tmp_path).given("train/000.tar", content)
    if read is not None:
        assert len(read[0]) == len(read[1]) > 0 and min(read[0]) >= 0


@some
@given(archives_of_arrays())
def test_npz_of_any_arrays(tmp_path, content):
    Reader("samples", tmp_path).given("samples.npz", content)
    Reader("statistics of a reference", tmp_path).given("reference.npz", content)


def replaced(data, value, pick):
    """Return JSON data with `value` at a place that `pick` chooses."""
    if isinstance(data, dict) and data and (name := pick([None, *data])) is not None:
        return {**data, name: replaced(data[name], value, pick)}
    if isinstance(data, list) and data and (place := pick([None, *range(len(data))])) is not None:
        return [*data[:place], replaced(data[place], value, pick), *data[place + 1 :]]
    return value


RECORDS = {
    "rule": "rule.json",
    "unit of work": "a.json",
    "scores": "scores.json",
    "checkpoints": "run/step-00000002/state.json",
    "training of a report": "timings.json",
    "patch maps": "maps/summary.json",
}


@pytest.mark.parametrize("name", RECORDS)
@few
@given(data=st.data())
def test_records_whose_digest_holds_and_whose_values_do_not(tmp_path, name, data):
    reader = Reader(name, tmp_path)
    record = json.loads((reader.folder / RECORDS[name]).read_text())
    changed = replaced(record, data.draw(VALUES), lambda names: data.draw(st.sampled_from(names)))
    reader.given(RECORDS[name], mutate.sealed(changed), "json_values")


@few
@given(data=st.data())
def test_params_of_any_values(tmp_path, data):
    reader = Reader("params", tmp_path)
    values = YAML(typ="safe").load((reader.folder / "params.yaml").read_text())
    changed = replaced(values, data.draw(VALUES), lambda names: data.draw(st.sampled_from(names)))
    stream = io.StringIO()
    YAML(typ="safe").dump(changed, stream)
    reader.given("params.yaml", stream.getvalue().encode("utf-8", "surrogatepass"))
