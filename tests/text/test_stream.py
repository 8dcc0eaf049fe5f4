from zamba2_jax.text.stream import TextStream


def decode_bytes(tokens):
    return bytes(tokens).decode("utf-8", errors="replace")


def pieces(data, stops=()):
    stream = TextStream(decode_bytes, stops)
    given = []
    for token in data:
        given.append(stream.add(token))
        if stream.stopped:
            break
    return [*given, stream.end()], stream


def test_pieces_hold_whole_characters_and_make_the_text():
    text = "né 日本 🎉"
    given, stream = pieces(text.encode())
    assert "".join(given) == stream.text == text
    assert not any("\N{REPLACEMENT CHARACTER}" in piece for piece in given)
    assert given[:3] == ["n", "", "é"]


def test_half_a_character_at_the_end_is_given_at_the_end():
    given, stream = pieces("aé".encode()[:-1])
    assert given == ["a", "", "\N{REPLACEMENT CHARACTER}"]
    assert "".join(given) == stream.text


def test_text_ends_before_the_first_stop_string():
    given, stream = pieces(b"one STOP two", ["two", "STOP"])
    assert "".join(given) == stream.text == "one "
    assert stream.stopped


def test_what_may_become_a_stop_string_is_held_back():
    given, stream = pieces(b"a\n\nb\n", ["\n\n\n"])
    assert given == ["a", "", "", "\n\nb", "", "\n"]
    assert not stream.stopped
    assert stream.text == "a\n\nb\n"


def test_a_character_begun_before_belongs_to_the_text():
    data = "né 日本".encode()
    for cut in range(1, len(data)):
        stream = TextStream(decode_bytes, before=data[:cut])
        given = "".join(stream.add(byte) for byte in data[cut:])
        assert data[:cut].decode(errors="ignore") + given == "né 日本"
