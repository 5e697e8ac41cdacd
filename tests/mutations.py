"""Changes of inputs for the fuzz tests: small functions (random.Random, input) -> another input.

Bytes, JSON as values, and what is made of them: JSON Lines, safetensors, pictures, command lines.
"""
import json
import struct
import zlib

# --- changes of bytes -----------------------------------------------------------------------------------------------

SPLINTERS = [b"\0", b"\xff", b"\xff\xfe", b"\xef\xbb\xbf", b"\xed\xa0\x80", b"\n", b"\r\n\r\n", b"NaN", b"-Infinity",
             b"{", b"[" * 100_000, b"]", b'"', b"\\", b",", b":", b"- ", b"&a *a", b"9" * 5000, b"\xff" * 8,
             b"\0\0\0\x7f", b"\x7f\xff\xff\xff", b"\0" * 1000]


def span(rng, x):
    """The ends of a piece of x, mostly a short one."""
    start = rng.randrange(len(x) + 1)
    return start, min(len(x), start + rng.choice((1, 1, 4, 30, len(x))))


def flip(rng, x):
    """Changes some bytes."""
    x = bytearray(x)
    for _ in range(rng.choice((1, 1, 3, 20)) if x else 0):
        x[rng.randrange(len(x))] ^= 1 << rng.randrange(8)
    return bytes(x)


def cut(rng, x):
    """Truncates."""
    return x[:rng.choice((0, rng.randrange(len(x) + 1), max(0, len(x) - 1 - rng.randrange(9))))]


def drop(rng, x):
    """Takes a piece away."""
    a, b = span(rng, x)
    return x[:a] + x[b:]


def double(rng, x):
    """A piece stands twice."""
    a, b = span(rng, x)
    return x[:b] + x[a:]


def insert(rng, x):
    """Puts a splinter somewhere; at the front as often as not."""
    a = rng.choice((0, rng.randrange(len(x) + 1)))
    return x[:a] + rng.choice(SPLINTERS) + x[a:]


def overwrite(rng, x):
    """A splinter in the place of as many bytes."""
    splinter, (a, _) = rng.choice(SPLINTERS), span(rng, x)
    return x[:a] + splinter + x[a + len(splinter):]


def recode(rng, x):
    """Another encoding of text."""
    return x.decode("latin-1").encode(rng.choice(("utf-16", "utf-16-be", "utf-32", "utf-8-sig")))


def change_bytes(rng, x):
    for _ in range(rng.choice((1, 1, 2, 5))):
        x = rng.choice((flip, flip, cut, drop, double, insert, overwrite, recode))(rng, x)
    return x


# --- changes of JSON ------------------------------------------------------------------------------------------------

RAW = {"@list@": "[" * 100_000 + "]" * 100_000, "@dict@": '{"a":' * 100_000 + "1" + "}" * 100_000,
       "@digits@": "9" * 5000}  # what json.dumps cannot write
NUMBERS = [0, 1, -1, 2, 3, 7, 1000, 10 ** 6, 2 ** 31, 2 ** 63, 10 ** 30, 10 ** 400, 0.5, 2.5, -0.0, 1e-300, 1e308,
           float("nan"), float("inf"), float("-inf")]
TEXTS = ["", " ", "0", "1", "-1", "nan", "x", "é\u2028", "\ud800", "\0", "\n", "<image>", "<video>", "{a,b}" * 24,
         "..", "first:9%", "random:-1", "BF16", "I8", "\ud83d", "a" * 5000, '"' * 60_000, *RAW]
OTHERS = [None, True, False, [], {}, [[]], [None], {"": None}, [0] * 1000, [1.5], ["x"], {"x": [1]}]


class Twice(dict):
    """A dict that json.dumps writes with a key too many."""

    def items(self):
        return [*super().items(), self.again]


def replace(rng, holder, key):
    holder[key] = rng.choice(rng.choice((NUMBERS, NUMBERS, TEXTS, OTHERS)))


def tweak(rng, holder, key):
    """Another value of the same type, or one that looks the same."""
    x = holder[key]
    if isinstance(x, (int, float)):
        holder[key] = rng.choice((-x, x + 1, x - 1, x * 1000, x // 2, str(x), [x], not x))
    elif isinstance(x, str):
        a = rng.randrange(len(x) + 1)
        holder[key] = rng.choice((x[:a], x[a:], x[:a] + rng.choice(TEXTS) + x[a:], x * 2, x.upper(), [x], list(x)))
    elif isinstance(x, list):
        holder[key] = rng.choice((x * 2, x[::-1], x[:1], x * 1000 if len(x) < 100 else x, dict(enumerate(x))))
    elif isinstance(x, dict):
        holder[key] = rng.choice((list(x.items()), list(x), {k: x for k in x}))


def delete(rng, holder, key):
    del holder[key]


def rename(rng, holder, key):
    if isinstance(holder, dict):
        x = holder.pop(key)
        key = str(key)  # an earlier change may have left a number
        holder[rng.choice((key.upper(), key + " ", rng.choice(TEXTS), key[1:]))] = x


def repeat(rng, holder, key):
    """An element, or a key with another value, stands twice."""
    if isinstance(holder, list):
        holder.insert(key, holder[key])
    elif isinstance(holder[key], dict):
        x = holder[key] = Twice(holder[key])
        x.again = rng.choice([*x, "x"]), rng.choice(OTHERS)


def swap(rng, holder, key):
    """Two values of a list or a dict change places."""
    other = rng.choice(list(holder) if isinstance(holder, dict) else range(len(holder)))
    holder[key], holder[other] = holder[other], holder[key]


def somewhere(rng, box):
    """(list or dict, key) of some value, those of a short list as likely as those of a long one."""
    holder, key = box, 0
    while isinstance(holder[key], (list, dict)) and holder[key] and rng.random() < 0.85:
        holder = holder[key]
        key = rng.choice(list(holder) if isinstance(holder, dict) else range(len(holder)))
    return holder, key


def dump(rng, x):
    text = json.dumps(x, ensure_ascii=rng.random() < 0.7)
    for name, raw in RAW.items():
        text = text.replace(f'"{name}"', raw)
    return text.encode("utf-8", "surrogatepass")


def change_json(rng, text):
    box = [json.loads(text)]
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        if box:
            rng.choice((replace, replace, tweak, tweak, delete, rename, repeat, swap))(rng, *somewhere(rng, box))
    return dump(rng, box[0]) if box else b""


def change_text(rng, text):
    """As JSON, as bytes, or as one after the other."""
    how = rng.random()
    text = change_json(rng, text) if how < 0.7 else text
    return change_bytes(rng, text) if how > 0.6 else text


def change_lines(rng, text):
    """JSON, JSON Lines or YAML: one line that is JSON as such, or the bytes of all."""
    lines = text.split(b"\n")
    i = rng.choice([i for i, line in enumerate(lines) if line[:1] in (b"{", b"[")] or [-1])
    if i < 0 or rng.random() < 0.3:
        return change_bytes(rng, text)
    lines[i] = change_text(rng, lines[i])
    return b"\n".join(lines)


def change_safetensors(rng, x):
    """Its header as JSON, its length, or bytes of any of them."""
    n = 8 + struct.unpack("<Q", x[:8])[0]
    how = rng.random()
    if how < 0.6:
        header = change_json(rng, x[8:n])
        return struct.pack("<Q", len(header)) + header + x[n:]
    return change_bytes(rng, x) if how < 0.8 else change_bytes(rng, x[:n]) + x[n:]


def change_picture(rng, x):
    """Bytes; of a PNG also inside a chunk whose checksum is made good."""
    if x[1:4] != b"PNG" or rng.random() < 0.4:
        return change_bytes(rng, x)
    chunks, at = [], 8
    while at < len(x):
        n = struct.unpack(">I", x[at:at + 4])[0]
        chunks.append((x[at + 4:at + 8], x[at + 8:at + 8 + n]))
        at += 12 + n
    i = rng.randrange(len(chunks))
    chunks[i] = chunks[i][0], change_bytes(rng, chunks[i][1])
    return x[:8] + b"".join(struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))
                            for name, body in chunks)


# --- changes of command lines ---------------------------------------------------------------------------------------

FIGURES = ["0", "-1", "1", "2.5", "nan", "inf", "-inf", "1e999", "1e-320", "9" * 30, "9" * 5000, "1000000000", "0x10",
           "٣", "²", "²x²", "1x1", "0x5", "1e3x7", "1x", "99999999999x1", "1,4", "1,,4", "99", "none,1", "", " ",
           "1_0"]
WORDS = [*FIGURES, "dense", "auto", "-", "--", "-h", "--j", "x\ny", "\udcff", "é", "/", ".", "..", "/dev/null",
         "nofile.json", "a.png", "./no/where.png", "a" * 5000, "nano", "{a,b}" * 24, "visor", "--model", "--json",
         "--seed", "--text", "--n"]


def change_words(rng, words):
    """Words added, taken away, twice, changed; figures in the place of figures more often."""
    words = list(words)
    for _ in range(rng.choice((1, 1, 2, 3))):
        i, how = rng.randrange(len(words) + 1), rng.random()
        if how < 0.15 or i == len(words):
            words.insert(i, rng.choice(WORDS))
        elif how < 0.3:
            del words[i]
        elif how < 0.4:
            words.insert(i, words[i])
        elif how < 0.55:
            word = change_bytes(rng, words[i].encode("utf-8", "surrogateescape"))[:2000].replace(b"\0", b"")
            words[i] = word.decode("utf-8", "surrogateescape")
        else:
            words[i] = rng.choice(FIGURES if any(c.isdigit() for c in words[i]) else WORDS)
    return words
