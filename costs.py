"""What the questions of a run cost: operations as they were run, and those of dense asked the same."""
import math
import textwrap
from collections import Counter
from typing import NamedTuple

import data
from cli import counted
from config import PIXELS, Plan, branch_layers, sa_name
from flops import answer_flops, asking_flops, encoder_flops, llm_flops, pixel_flops, prompt_flops, router_flops


class Route(NamedTuple):
    """How a question was asked, and what came of it."""
    shared: object  # what it has in common with others, as a key
    sa: object      # of VLM.generate
    pixels: str     # likewise
    ran: Plan
    layer_tokens: object = None  # of flops, where visual tokens were dropped inside


def report_of(model, costs, route, prefix, prompt, tokens):
    """What --json says of an answer, `tokens`. route, prefix, prompt: as in Costs.add."""
    vision = len(prefix.v_pos) if route.ran.pixels == "all" else data.overview_tokens(model.config)
    reduce = model.config.reduce
    return {"answer": model.tokenizer.decode(tokens).strip(), "tokens": tokens, "sa": list(route.ran.sa),
            "pixels": route.ran.pixels, "reduce": reduce, "routed": route.sa == "auto",
            "text_tokens": len(prefix.ids) + len(prompt.ids), "vision_tokens": vision,
            "flops": costs.add(route, prefix, prompt, len(tokens))}


class Costs:
    """Operations of a run's questions as they were run, and of dense without reduction asked the same. In both, images
    and shared text count once."""

    def __init__(self, config, images, dense_vision):
        self.config, self.plain, self.dense_vision = config, config.unreduced(), dense_vision
        self.encoder = {"all": encoder_flops(config, [image.tiling for image in images]),
                        "overview": encoder_flops(config, [data.overview_tiling(config)])}
        self.dense_encoder = encoder_flops(self.plain, [image.tiling for image in images])
        self.encoded = Counter()  # operations, of each conversation (what makes one: all of a Route but what ran)
        self.ran, self.total, self.questions = {}, Counter(), 0  # ran: of each cache (configuration, layers) so far

    def encode(self, route, pixels):
        """Operations of encoding the tiles that a conversation has not encoded yet."""
        flops = max(0, self.encoder[pixels] - self.encoded[route[:3]])
        self.encoded[route[:3]] += flops
        return flops

    def add(self, route, prefix, prompt, answer):
        """FLOPs of one more question: what was spent on it, and what was saved over all so far. prefix, prompt: over
        all pixels; answer: its number of tokens."""
        c, shared, own = self.config, len(prefix.ids), len(prompt.ids)
        new = not any(key[0] == route.shared for key in self.ran)  # to dense, which has one cache
        decides = route.pixels == "auto" and data.has_overview(prefix)
        prefill = encoder = 0
        if route.layer_tokens:  # nothing is shared but the encoder's work
            self.ran.setdefault((*route[:3], route.ran.pixels), [])
            encoder = self.encode(route, route.ran.pixels)
            prefill = prompt_flops(c, route.ran.sa, shared + own, route.layer_tokens)
            tried = ()
        else:             # over the overview first, where that was to be decided
            tried = PIXELS if decides and route.ran.pixels == "all" else [route.ran.pixels]
        for pixels in tried:
            last = pixels == route.ran.pixels
            sa, stop = (route.ran.sa, c.layers) if last else (c.overview[0], c.pixel_layer)
            ran = self.ran.setdefault((*route[:3], pixels), [])
            known = max([min([*branch_layers([sa, other]), end]) for other, end in ran], default=0)  # layers
            seen = len(prefix.v_pos) if pixels == "all" else data.overview_tokens(c)
            prefill += llm_flops(c, sa, shared, seen, head=False, layers=range(known, stop))
            prefill += llm_flops(c, sa, own, 0, shared, seen, head=last, layers=range(stop))
            prefill += pixel_flops(c, shared + own) if decides and pixels == "overview" else 0
            prefill += router_flops(c, shared + own, seen) if route.sa == "auto" and last and (
                len(c.configurations(pixels)) > 1) else 0
            encoder += self.encode(route, pixels)
            ran.append((sa, stop))
        llm = prefill + answer_flops(c, route.ran.sa, shared + own, route.layer_tokens or seen, answer)

        everything = range(c.layers)
        dense = llm_flops(c, everything, shared, self.dense_vision, head=False, layers=everything if new else ())
        dense += llm_flops(c, everything, own, 0, shared, self.dense_vision)
        dense_encoder = self.dense_encoder if new else 0
        dense_llm = dense + answer_flops(c, everything, shared + own, self.dense_vision, answer)

        self.questions += 1
        self.total.update(llm=llm, dense=dense_llm, first=encoder + prefill, dense_first=dense_encoder + dense)
        return {"encoder": encoder, "llm": llm, "llm_dense": dense_llm,
                "saving": round(self.total["dense"] / self.total["llm"], 3),
                "first_token_saving": round(self.total["dense_first"] / self.total["first"], 3)}


def summary(config, report, questions):
    """For people: what a question cost and what it took; `questions`: how many there are so far."""
    s, n, flops = report["seconds"], len(report["tokens"]), report["flops"]
    rate = f" ({(n - 1) / s['decode']:.1f} tokens/s)" if n > 1 and s["decode"] else ""  # prefill gave the first
    saving = flops["saving"]
    less = f"{saving:.3g}x less than" if saving > 1 else f"{1 / saving:.3g}x more than" if saving < 1 else "as much as"
    so_far = f" for this question; {less} dense over the {questions} so far" if questions > 1 else f", {less} dense"
    return textwrap.fill(f"{'routed to' if report['routed'] else 'ran'} --sa {sa_name(config, report['sa'])}"
                         f"{' over the overview' * (report['pixels'] == 'overview')}; "
                         f"{report['text_tokens']} text + {counted(report['vision_tokens'], 'visual token')}; "
                         f"language model {flops['llm'] / 1e9:,.4g} GFLOP{so_far}; encoder {s['encoder']:.2f} s, "
                         f"prefill {s['prefill']:.2f} s, decode {s['decode']:.2f} s{rate}", 80)


def within_budget(c, budget, text, vision, dense_vision, asks):
    """The viable configurations whose prompt, router included, costs at most `budget` of dense, the costliest first.
    Raises ValueError.

    Dense has the `dense_vision` visual tokens that the prompt has without reduction. asks: whether the router decides
    on the pixels first.
    """
    dense = llm_flops(c, range(c.layers), text, dense_vision)
    router = (router_flops(c, text, vision) if c.router else 0) + (asking_flops(c, text) if asks else 0)
    costs = {sa: (llm_flops(c, sa, text, vision) + router) / dense for sa in c.viable}
    if not costs:
        raise ValueError("--budget: this checkpoint has no viable configurations; give --sa instead")
    if not vision:  # then all cost the same
        return sorted(costs, key=len, reverse=True)
    affordable = sorted([sa for sa in costs if costs[sa] <= budget], key=costs.get, reverse=True)
    if not affordable:
        cheapest = min(costs, key=costs.get)
        instead = ", or leave out what deciding on the pixels costs: --pixels all" if asks else ""
        raise ValueError(f"--budget {budget:g}: the cheapest viable configuration, --sa {sa_name(c, cheapest)}, costs "
                         f"{math.ceil(costs[cheapest] * 1000) / 1000:g} of dense; raise the budget to that{instead}")
    return affordable
