"""Routing traces: what is appended is what is read, however the run ended."""

import json

import numpy as np
import pytest

from dynaexq_jax.errors import InputError
from dynaexq_jax.traffic import Trace, TraceWriter


def same(intervals, others):
    for (mass, tokens), (other_mass, other_tokens) in zip(intervals, others, strict=True):
        np.testing.assert_array_equal(mass, other_mass)
        assert tokens == other_tokens
    return True


def test_header_and_intervals_come_back(recorded, header, traffic):
    trace = Trace.read(recorded)
    assert same(trace.intervals(), traffic)
    assert trace.dropped_bytes == 0
    expected = vars(header()) | {"benefit": None}
    assert vars(trace.header) | {"benefit": None} == expected
    assert trace.header.benefit.tobytes() == header().benefit.tobytes()
    line = recorded.read_bytes().split(b"\n")[0]
    assert (len(line) + 1) % 64 == 0
    assert json.loads(line)["interval"] == 4


@pytest.mark.parametrize("merge", [1, 2, 4, 22, 100])
def test_merged_intervals_are_sums_and_none_is_lost(recorded, traffic, merge):
    merged = list(Trace.read(recorded).intervals(merge))
    groups = [traffic[start : start + merge] for start in range(0, len(traffic), merge)]
    expected = [
        (sum(mass.astype(np.float64) for mass, _ in group), sum(tokens for _, tokens in group))
        for group in groups
    ]
    assert same(merged, expected)


def test_a_killed_run_keeps_what_it_had(recorded, traffic):
    """Cut off anywhere in the last two records."""
    whole = recorded.read_bytes()
    record = Trace.read(recorded).header.record_type.itemsize
    for cut in (1, record - 1, record, record + 1):
        recorded.write_bytes(whole[:-cut])
        trace = Trace.read(recorded)
        kept = len(traffic) - -(-cut // record)
        assert same(trace.intervals(), traffic[:kept])
        assert trace.dropped_bytes == -cut % record


def test_a_file_that_exists_is_not_touched(recorded, header):
    before = recorded.read_bytes()
    with pytest.raises(InputError, match=r"exists already; give another file, or delete it"):
        TraceWriter(recorded, header())
    assert recorded.read_bytes() == before
    for path in (recorded.parent, recorded.parent / "no" / "trace"):
        with pytest.raises(InputError, match="give a file in a directory that exists"):
            TraceWriter(path, header())


def test_where_it_cannot_be_written_the_trace_ends_and_says_so(recorded, header, traffic, caplog):
    path = recorded.with_name("second.trace")
    writer = TraceWriter(path, header())
    writer.add(*traffic[0])
    before = path.read_bytes()
    path.unlink()
    path.mkdir()
    for _ in range(3):
        writer.add(*traffic[1])
    assert caplog.messages == [f"the routing trace {path} ends here"]
    path.rmdir()
    path.write_bytes(before)
    writer.add(*traffic[2])  # no gap in the middle
    assert same(Trace.read(path).intervals(), traffic[:1])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format": None}, "is not a routing trace; record it again"),
        ({"version": 9}, "version is 9, this program reads 1"),
        ({"bits": [4, 8]}, r"is not a valid routing trace \(bits must begin"),
        ({"base_bits": 3}, r"base_bits must be one of \(2, 4, 8\), got 3"),
        ({"benefit": [[1.0]]}, "is not a valid routing trace"),
        ({"benefit": [[1.0, -1.0]] * 3}, "benefit must be finite and not negative"),
        ({"pinned": [1]}, "is not a valid routing trace"),
        ({"pinned": [[2, 8]]}, "pinned expert 8 of layer 2 is not of 3 layers of 8 experts"),
        ({"pinned": [[float("inf"), 8]]}, "cannot convert float infinity to integer"),
        ({"interval": 0}, "interval must be at least 1, got 0"),
        ({"pool_pages": -1}, "pool_pages must be at least 0, got -1"),
        ({"model": {}}, "is not a valid routing trace"),
    ],
)
def test_damaged_headers_are_refused(recorded, changes, message):
    line, records = recorded.read_bytes().split(b"\n", 1)
    recorded.write_bytes(json.dumps(json.loads(line) | changes).encode() + b"\n" + records)
    with pytest.raises(InputError, match=message) as error:
        Trace.read(recorded)
    assert str(error.value).startswith(str(recorded))


def test_other_files_are_refused(recorded, header, tmp_path):
    with pytest.raises(InputError, match=r"none\.trace: cannot be read \(No such file"):
        Trace.read(tmp_path / "none.trace")
    cases = {b"": "not valid JSON", b"\x00" * 99: "not valid JSON", b"{}\n": "not a routing trace"}
    for content, message in cases.items():
        recorded.write_bytes(content)
        with pytest.raises(InputError, match=message):
            Trace.read(recorded)
    recorded.write_bytes(header().to_line())
    with pytest.raises(InputError, match="holds no interval"):
        Trace.read(recorded)


@pytest.mark.parametrize(("value", "tokens"), [(np.nan, 1), (np.inf, 1), (-1, 1), (1, -1)])
def test_damaged_records_are_refused(recorded, header, value, tokens):
    path = recorded.with_name("second.trace")
    mass = np.zeros((3, 8), np.float32)
    mass[1, 2] = value
    TraceWriter(path, header()).add(mass, tokens)
    with pytest.raises(InputError, match="mass or tokens are negative or not finite"):
        Trace.read(path)
