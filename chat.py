"""A conversation on the terminal: `python sample.py --image x.png` without --q.

Images are encoded once and their features kept, answers are streamed as they come, and what was said stays: the next
question can refer to it. A change of layers goes on from the same turns.
"""
import shlex
import sys
import time
from functools import reduce
from pathlib import Path

import data
import pictures
from cli import counted, is_out_of_memory
from config import sa_name
from costs import Costs, Route, report_of

HELP = """/image FILE ...    other images, and a new conversation; without a file: none
/sa LAYERS         auto, dense, none, or numbers such as 1,4: from the next answer on
/explain FILE.png  draws where the last answer's attention went
/help              this
Ctrl-C stops an answer, Ctrl-D leaves."""


class Stream:
    """Writes an answer to the terminal as it comes. Bytes of a character that is not complete yet are held back."""

    def __init__(self, tokenizer):
        self.tokenizer, self.ids, self.shown = tokenizer, [], ""

    def __call__(self, _, token):
        self.ids.append(token)
        text = self.tokenizer.decode(self.ids).rstrip("\ufffd")
        print(text[len(self.shown):], end="", flush=True)
        self.shown = text


class Chat:
    """One person's conversation with a model. Lines that begin by / are commands, all others questions."""

    def __init__(self, model, images, sa, choose, check, warn=None, **how):
        """images: PIL images. sa: what --sa said. choose(sa, prefix, text, dense_vision): (what VLM.generate is called
        with, the configurations that a router may choose, the pixels) for such a --sa and a prompt, as in
        sample.configuration. check(sa): raises ValueError for layers that are not there, warns of unlearned ones.
        warn(questions, images): says what the model can't know of them. how: as in decoding.generate."""
        self.model, self.sa, self.choose, self.check, self.how = model, sa, choose, check, how
        self.warn = warn or (lambda questions, images: None)
        self.begin(images)

    def begin(self, images):
        """Forgets what was said, and looks at other images."""
        c, single = self.model.config, len(images) == 1
        images = [pictures.to_rgb(image, c.transparency) for image in images]
        self.warn([], images)
        processed = [data.process_image(image, c, single) for image in images]
        self.dense_vision = sum(data.tiling(*image.size, c.unreduced(), single).tokens for image in images)
        text = data.chatml([data.place_images("?", len(images), c)])
        self.prefix = data.encode(data.split_shared(text)[0], self.model.tokenizer, processed)
        self.images, self.conversation, self.last = images, None, None

    def ask(self, question):
        """Answers a question, streamed, and keeps both. Raises ValueError; interrupted, all is as it was."""
        if data.IMAGE in question:
            raise ValueError(f"images stand before the conversation: write the question without {data.IMAGE}")
        c, n = self.model.config, len(self.images)
        if self.conversation is None or len(self.conversation.prompts) == 1:
            text = data.split_shared(data.chatml([data.place_images(question, n, c)]))[1]
        else:
            data.place_images(question, 0)  # raises where it is empty
            text = data.chatml([question])
            text = text[text.index("<|im_start|>user"):]
        self.warn([question], [])
        said = self.conversation.prompts if self.conversation else [self.prefix]
        prompt = data.encode(text, self.model.tokenizer, start=said[-1].end)
        n_text = sum(len(p.ids) for p in said) + len(prompt.ids)
        sa, allowed, pixels = self.choose(self.sa, self.prefix, n_text, self.dense_vision)
        timings, routes, layer_tokens, start = {}, [], [], time.perf_counter()
        if self.conversation is None:
            from conversation import Conversation  # with torch, 1.5 s
            self.conversation = Conversation(self.model, self.prefix, sa, pixels, timings=timings)
        elif (self.conversation.sa, self.conversation.wanted) != (sa, pixels):
            self.conversation = self.conversation.with_layers(sa, pixels)
        tokens = self.conversation.answer(prompt, keep=True, routes=routes, layer_tokens=layer_tokens, timings=timings,
                                          allowed=allowed, on_token=Stream(self.model.tokenizer), **self.how)
        print(flush=True)
        self.last = question, prompt, tokens, Route("", sa, pixels, routes[0], layer_tokens[0])
        shown = len(self.prefix.v_pos) if routes[0].pixels == "all" else data.overview_tokens(c)
        return (f"--sa {sa_name(c, routes[0].sa)}{' over the overview' * (routes[0].pixels == 'overview')}, "
                f"{n_text} text + {counted(shown, 'visual token')}, {len(tokens) or 'none'} of answer, "
                f"{time.perf_counter() - start:.2f} s")

    def explain(self, path):
        """Draws the last answer's picture. Raises ValueError."""
        import explain
        if not self.images:
            raise ValueError("/explain draws an image, and there is none: /image FILE first")
        if self.last is None:
            raise ValueError("/explain draws a whole answer, and there is none yet: ask first")
        if Path(path).suffix != ".png" or not Path(path).parent.is_dir():
            raise ValueError(f"/explain {path}: give a .png file in a directory that exists")
        question, prompt, tokens, route = self.last
        c, said = self.model.config, self.conversation.prompts
        whole = reduce(data.join, said[:-1])   # up to the question; behind it stands the answer
        later = reduce(data.join, said[1:-1])
        costs = Costs(c, self.prefix.images, self.dense_vision)
        report = {"question": question, **report_of(self.model, costs, route, self.prefix, later, tokens)}
        seen = data.seen(whole, route.ran.pixels, c)
        look = explain.attention_to_images(self.model, seen, tokens, route.ran.sa)
        explain.draw(path, self.images, seen.images, c, report, look)
        return f"{path}: where the last answer's attention went"

    def command(self, line):
        """Does what a line with / in front says; what to tell about it. Raises ValueError."""
        try:
            name, *words = shlex.split(line)
        except ValueError as e:
            raise ValueError(f"{line}: {e}") from None
        if name == "/help" and not words:
            return HELP
        if name == "/image":
            self.begin([pictures.load_image(word) for word in words])
            return f"{counted(len(words), 'image')}, {counted(len(self.prefix.v_pos), 'visual token')}"
        if name == "/sa" and len(words) == 1:
            self.check(words[0])
            self.sa = words[0]
            return f"--sa {self.sa} from the next answer on"
        if name == "/explain" and len(words) == 1:
            return self.explain(words[0])
        raise ValueError(f"{line}: give one of /image FILE ..., /sa LAYERS, /explain FILE.png, /help; Ctrl-D leaves")


def talk(chat, read=None):
    """Asks for lines until there are no more. read(prompt): the next line, or EOFError (default: input)."""
    try:
        __import__("readline")  # arrow keys and earlier lines; not on every system
    except ImportError:
        pass
    tell("Ask about the images; /help says what else there is, Ctrl-D leaves.")
    while True:
        try:
            line = (read or input)("> ").strip()
        except EOFError:
            return print()
        except KeyboardInterrupt:  # of a line that was begun
            print()
            continue
        except UnicodeDecodeError:
            tell("error: that line is not valid UTF-8; write it anew")
            continue
        try:
            if line:
                tell(chat.command(line) if line.startswith("/") else chat.ask(line))
        except KeyboardInterrupt:
            print()
            tell("stopped; the question is forgotten, what was said before is not")
        except (ValueError, OSError, MemoryError, RuntimeError) as e:
            if isinstance(e, RuntimeError) and not is_out_of_memory(e):
                raise
            tell(f"error: {' '.join(str(e).split()) or 'out of memory'}")


def tell(text):
    """What is no answer, dim on a terminal."""
    dim = sys.stderr.isatty()
    print(f"\x1b[2m{text}\x1b[0m" if dim else text, file=sys.stderr, flush=True)
