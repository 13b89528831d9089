"""Any work, links and codecs that a pipeline may have."""

from hypothesis import strategies as st

from offload.prefetch.pipeline import CodecCost, LayerWork, Links

SHARES = st.floats(0, 1)
_SECONDS = st.just(0.0) | st.floats(1e-6, 1e2)
_BYTES = st.just(0.0) | st.floats(1.0, 1e12)
_SPEEDS = st.floats(1e3, 1e12)

WORK = st.builds(
    LayerWork,
    disk_bytes=_BYTES,
    host_bytes=_BYTES,
    num_reads=st.integers(0, 10_000),
    compute_s=_SECONDS,
    layers_ahead=st.integers(1, 4),
)
LINKS = st.builds(
    Links,
    disk_bytes_per_s=_SPEEDS,
    read_s=_SECONDS,
    bus_bytes_per_s=_SPEEDS,
    is_shared=st.booleans(),
)
CODECS = st.builds(
    CodecCost,
    name=st.just("some"),
    ratio=st.floats(0.5, 10),
    decode_bytes_per_s=_SPEEDS,
    decodes_on=st.sampled_from(["host", "device"]),
    error=st.floats(0, 1),
)
