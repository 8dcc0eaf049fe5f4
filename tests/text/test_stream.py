from tokenizers import decoders

from zamba2_jax.text.stream import UNFINISHED, TextStream


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


def test_a_stop_string_leaks_nothing_before_a_character_that_is_not_finished():
    given, stream = pieces("A\n問".encode(), ["\n問"])
    assert given == ["A", "", "", "", "", ""]
    assert stream.stopped
    assert stream.text == "A"


def test_broken_bytes_keep_whole_characters_and_end():
    """A decoder of byte tokens, as those of Llama's kind, gives up all bytes of a run that is no UTF-8."""
    fallback = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])

    def decode(tokens):
        return fallback.decode([f"<0x{token:02X}>" for token in tokens])

    stream = TextStream(decode)
    data = "é".encode() + "日".encode()[:1]
    assert [*map(stream.add, data), stream.end()] == ["", "é", "", UNFINISHED]
    assert decode(data) == 3 * UNFINISHED
    garbage, stream = b"\xff" * 50 + "日".encode(), TextStream(decode_bytes)
    assert "".join([*map(stream.add, garbage), stream.end()]) == decode_bytes(garbage)


SPECIAL = {200: "<|im_end|>", 201: "<x>"}


def without_special(tokens):
    return decode_bytes([token for token in tokens if token not in SPECIAL])


def test_a_special_token_stops_though_it_is_not_in_the_text():
    def run(tokens, stops):
        stream = TextStream(without_special, stops, hidden=SPECIAL)
        given = [stream.add(token) for token in tokens]
        return given, stream

    given, stream = run([*b"hi", 200], ["<|im_end|>"])
    assert (given, stream.stopped, stream.text) == (["h", "i", ""], True, "hi")
    # Also as part of a stop string; else it leaves no trace.
    given, stream = run([*b"hi", 200, *b"\n"], ["<|im_end|>\n"])
    assert (given, stream.stopped, stream.text) == (["h", "i", "", ""], True, "hi")
    given, stream = run([*b"h<", 201, *b"i", 200, *b"!"], ["<|im_end|>\n"])
    assert ("".join(given), stream.stopped) == ("h<i!", False)


def test_the_work_is_linear():
    """In the tokens that are decoded, and in the characters that are searched for stop strings."""
    decoded = 0

    def decode(tokens):
        nonlocal decoded
        decoded += len(tokens)
        return decode_bytes(tokens)

    def work(data):
        nonlocal decoded
        decoded, stream = 0, TextStream(decode, ["never there", "\n\n\n\n"])
        for token in data:
            stream.add(token)
        assert stream.end() + stream.text  # all of it was given
        return decoded

    for text in (b"some words and more ", "日本語".encode(), b"\xff", b" ", b"\n\n\n."):
        data = (text * 4000)[:4000]
        assert work(data) < 12 * len(data)
        assert work(data) <= 4.1 * work(data[:1000])


def test_a_token_may_end_one_character_and_begin_the_next():
    tokens = [b"\xf1", b"\xad", b"\xad", b"\x89\xf0", b"\x9f", b"\x8e", b"\x89", b"!"]
    stream = TextStream(lambda tokens: b"".join(tokens).decode(errors="replace"))
    assert [*map(stream.add, tokens), stream.end()] == ["", "", "", "", "", "", "\U0006db49\U0001f389", "!", ""]


def test_the_replacement_character_itself_is_text():
    def decode(tokens):  # of bytes without a whole character, as sentencepiece's byte tokens are decoded
        try:
            return bytes(tokens).decode()
        except UnicodeDecodeError:
            return "\N{REPLACEMENT CHARACTER}" * len(tokens)

    text = "\N{REPLACEMENT CHARACTER}Û"
    stream = TextStream(decode)
    assert "".join([*map(stream.add, text.encode()), stream.end()]) == text
