"""The timeline of a GPU, from events as JAX's profiler writes them."""

import timeline
from timeline import Event, Idle, Timeline


def meta(kind, name, pid, tid=0):
    return {"ph": "M", "name": kind, "pid": pid, "tid": tid, "args": {"name": name}}


def event(name, pid, tid, start_us, length_us):
    return {"ph": "X", "name": name, "pid": pid, "tid": tid, "ts": start_us, "dur": length_us}


EVENTS = [
    meta("process_name", "/device:GPU:0", 1),
    meta("process_name", "/host:CPU", 2),
    meta("thread_name", "Stream #13(Compute)", 1, 13),
    meta("thread_name", "Stream #14(MemcpyH2D)", 1, 14),
    meta("thread_name", "XLA Ops", 1, 15),
    meta("thread_name", "Stream #13", 2, 13),
    event("loop_scatter_fusion", 1, 13, 7000, 100),
    event("decode_layers", 1, 13, 4000, 2500),
    event("MemcpyH2D", 1, 14, 5000, 800),
    event("MemcpyD2H", 1, 14, 5900, 3),
    event("Memset", 1, 13, 6600, 1),
    event("decode_layers", 1, 15, 4000, 2500),  # the same again, by operation
    event("decode_layers", 2, 13, 4000, 2500),  # of the host
]


def test_kernels_and_copies_of_the_device_by_time(tmp_path):
    found = timeline._sorted(timeline._of_device(EVENTS))
    assert found.kernels == [
        Event("decode_layers", 0.0, 2.5), Event("loop_scatter_fusion", 3.0, 0.1),
    ]  # fmt: skip
    assert found.copies == [Event("MemcpyH2D", 1.0, 0.8)]
    timeline.draw(found, tmp_path / "timeline.png", "steps and copies")
    assert (tmp_path / "timeline.png").read_bytes().startswith(b"\x89PNG")


def test_time_without_kernels_and_what_of_it_is_beside_copies_of_pages():
    kernels = [
        Event("chunk", 0.0, 10.0),
        Event("beside it", 2.0, 1.0),
        Event("step", 12.0, 3.0),
        Event("step", 15.0, 3.0),
        Event("step", 18.5, 3.0),
    ]
    copies = [Event("MemcpyH2D", start, length) for start, length in (
        (1.0, 2.0), (9.5, 1.0), (11.0, 0.001), (11.75, 0.5), (18.0, 0.5), (21.5, 4.0),
    )]  # fmt: skip
    idle = Idle.of(Timeline(kernels, copies))
    assert idle.total == 2.0 + 0.5
    assert idle.beside_copies == 0.5 + 0.25 + 0.5
    assert Idle.of(Timeline(kernels[:1], copies)) == Idle(0.0, 0.0)
