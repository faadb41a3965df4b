from hypothesis import given, strategies as st

from kvtransfer.landed import LandedMessage, pack, unpack
from pdserve.request import Key

messages = st.builds(
    LandedMessage,
    st.binary(min_size=16, max_size=16),
    st.builds(Key, st.text("0123456789abcdef", min_size=32, max_size=32), st.integers(0, 999)),
    st.integers(0, (1 << 31) - 1),
    st.integers(0, (1 << 31) - 1),
    st.none() | st.integers(0, (1 << 32) - 1),
)


@given(messages)
def test_what_is_packed_is_unpacked(message):
    assert unpack(pack(message)) == message


@given(st.binary(max_size=80))
def test_any_bytes_are_a_message_or_none(data):
    message = unpack(data)
    assert message is None or pack(message)[:41] == data[:41]


@given(messages, st.integers(0, 55))
def test_a_shorter_or_longer_one_is_none(message, cut):
    data = pack(message)
    assert unpack(data[: min(cut, len(data) - 1)]) is None
    assert unpack(data + b"\0") is None
