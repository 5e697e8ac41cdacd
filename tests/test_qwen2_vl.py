"""Qwen2-VL equals transformers' own: the vision tower alone, and the whole model (random weights, float32)."""
import copy
import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from tokenizers import AddedToken
from torch._dynamo.utils import counters
from transformers import AttentionInterface, Qwen2VLConfig, Qwen2VLForConditionalGeneration
from transformers.models.qwen2_vl.configuration_qwen2_vl import Qwen2VLVisionConfig
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from transformers.models.qwen2_vl.modeling_qwen2_vl import Qwen2VisionTransformerPretrainedModel

import data
from conversation import Conversation
from encoders import normalise
from encoders.qwen2_vl import VisionTower, rope_table_2d
from families import read_config
from layout import Past, rotary_ids
from model import VLM
from tests import tiny

# --- the tower ------------------------------------------------------------------------------------------------------

TOWERS = {
    "1 layer, 1 head of 8": dict(depth=1, embed_dim=8, num_heads=1, mlp_ratio=4),
    "2 layers, 3 heads of 16": dict(depth=2, embed_dim=48, num_heads=3, mlp_ratio=4),
    "4 layers, 2 heads of 20": dict(depth=4, embed_dim=40, num_heads=2, mlp_ratio=3),  # 20 / 4 is odd
}
HEIGHTS_WIDTHS = [(28, 28), (28, 140), (84, 28), (56, 112), (196, 140)]


def towers_of(name):
    """(theirs, ours) with the same random weights."""
    torch.manual_seed(0)
    theirs = tiny.shake(Qwen2VisionTransformerPretrainedModel(Qwen2VLVisionConfig(
        hidden_size=24, **TOWERS[name]))).eval()
    c = theirs.config
    ours = VisionTower(SimpleNamespace(
        vision_hidden=c.embed_dim, vision_layers=c.depth, vision_heads=c.num_heads,
        vision_ffn=c.embed_dim * c.mlp_ratio, vision_eps=1e-6, patch=14))
    weights = {k.replace("merger.ln_q", "merger_norm"): v for k, v in theirs.state_dict().items() if "mlp." not in k
               or k.startswith("blocks")}
    ours.load_state_dict(weights)  # all other keys are the same
    return theirs, ours.eval()


@pytest.fixture(scope="module", params=TOWERS, ids=list(TOWERS))
def towers(request):
    return towers_of(request.param)


def patchify(x):
    """Pixels (3, height, width) -> (N, 3 * 2 * 14 * 14): two equal frames, patches of 2 x 2 squares together."""
    rows = []
    for top in range(0, x.shape[1], 28):
        for left in range(0, x.shape[2], 28):
            for dy, dx in ((0, 0), (0, 14), (14, 0), (14, 14)):
                patch = x[:, top + dy:top + dy + 14, left + dx:left + dx + 14]
                rows.append(np.stack([patch, patch], axis=1).ravel())
    return np.stack(rows)


def sent(pixels):
    """Pixels (P, 3, height, width) as transformers' tower takes them."""
    grid = [[1, x.shape[1] // 14, x.shape[2] // 14] for x in pixels]
    return torch.from_numpy(np.concatenate([patchify(x) for x in pixels.numpy()])), torch.tensor(grid)


def before_connector(theirs, pixels):
    """What their merger's MLP is given, (P, tokens, 4 * embed_dim)."""
    found = []
    hook = theirs.merger.mlp.register_forward_pre_hook(lambda module, inputs: found.append(inputs[0]))
    patches, grid = sent(pixels)
    theirs(patches.to(theirs.dtype), grid)
    hook.remove()
    return found[0].unflatten(0, (len(pixels), -1))


def in_bfloat16(net):
    """A copy in bfloat16, whose rotary frequencies stay exact, as where transformers loads it so."""
    new = copy.deepcopy(net).bfloat16()
    for a, b in zip(new.buffers(), net.buffers()):
        a.data = b.data
    return new


def noise(pictures, height, width):
    """Pixels of scale 1."""
    return torch.randn(pictures, 3, height, width, generator=torch.Generator().manual_seed(height + width))


@torch.no_grad()
@pytest.mark.parametrize("pictures", [1, 2])
@pytest.mark.parametrize("size", HEIGHTS_WIDTHS, ids=lambda s: f"{s[0]}x{s[1]}")
def test_tower_is_that_of_transformers(towers, size, pictures):
    theirs, ours = towers
    x = noise(pictures, *size)
    wanted, found = before_connector(theirs, x), ours(x)
    assert found.shape == (pictures, size[0] * size[1] // 28 ** 2, 4 * theirs.config.embed_dim) == wanted.shape
    assert 0.8 < wanted.std() < 1.5  # or the tolerance would mean nothing
    assert (found - wanted).abs().max() < 1e-5


def test_rotary_angles():
    """Every cosine and sine, in float64: head size 80 at 1260 x 2016 pixels, and small ones."""
    for rows, columns, size in ((2, 2, 4), (2, 6, 8), (8, 4, 20), (90, 144, 80)):
        half, wanted = size // 2, []
        for top in range(0, rows, 2):
            for left in range(0, columns, 2):
                for y, x in ((top, left), (top, left + 1), (top + 1, left), (top + 1, left + 1)):
                    wanted.append([place * 10000.0 ** (-2 * i / half) for place in (y, x) for i in range(half // 2)])
        wanted = np.array(wanted)
        cos, sin = (t[:, 0].double().numpy() for t in rope_table_2d(rows, columns, size))
        assert cos.shape == sin.shape == (rows * columns, size)
        assert np.abs(cos - np.cos(np.concatenate([wanted, wanted], 1))).max() < 2e-5
        assert np.abs(sin - np.sin(np.concatenate([-wanted, wanted], 1))).max() < 2e-5
    assert rope_table_2d(2, 2, 8)[0].dtype == torch.float32


@torch.no_grad()
def test_looks_are_the_queries_and_keys_of_each_picture(towers, monkeypatch):
    theirs, ours = towers
    seen, x = [], noise(2, 56, 84)

    def spy(module, q, k, v, **how):
        seen.append((q[0].transpose(0, 1), k[0].transpose(0, 1)))  # (N, H, D) each
        y = torch.nn.functional.scaled_dot_product_attention(q, k, v)
        return y.transpose(1, 2), None
    AttentionInterface.register("spy", spy)
    monkeypatch.setattr(theirs.config, "_attn_implementation", "spy")
    theirs(*sent(x))
    looks = dict.fromkeys({0, theirs.config.depth - 1})
    plain = ours(x)
    assert torch.equal(ours(x, looks), plain)
    for layer, (q, k) in looks.items():
        for picture in range(2):
            wanted_q, wanted_k = seen[2 * layer + picture]  # theirs attend picture by picture
            assert (q[picture] - wanted_q).abs().max() < 1e-5 and (k[picture] - wanted_k).abs().max() < 1e-5


def test_tower_learns_as_theirs_does(towers):
    """Gradients of all weights, the two frames of the kernel among them; the output is that without gradients."""
    theirs, ours = towers
    x = noise(2, 56, 84)
    with torch.no_grad():
        plain = ours(x)
    weight = torch.randn(plain.shape, generator=torch.Generator().manual_seed(1))
    for net, y in ((ours, ours(x)), (theirs, before_connector(theirs, x))):
        net.zero_grad()
        (y * weight).sum().backward()
        assert torch.allclose(y, plain, atol=1e-5)
    for name, p in theirs.named_parameters():
        if not name.startswith("merger.mlp"):
            mine = ours.get_parameter(name.replace("merger.ln_q", "merger_norm")).grad
            assert (mine - p.grad).abs().max() < 1e-4 * p.grad.abs().max(), name
    for net in towers:
        net.zero_grad()


@torch.no_grad()
def test_tower_in_bfloat16(towers):
    ours, x = towers[1], noise(2, 84, 56)
    exact = ours(x)
    with torch.autocast("cpu", torch.bfloat16):
        mixed = ours(x).float()
    theirs, ours = map(in_bfloat16, towers)
    wanted, found = before_connector(theirs, x), ours(x.bfloat16())
    assert wanted.dtype == found.dtype == torch.bfloat16
    rounding = (wanted - exact).norm()
    assert 0 < rounding < 0.05 * exact.norm()
    assert (found - exact).norm() < 1.3 * rounding and (mixed - exact).norm() < 1.3 * rounding


@torch.no_grad()
def test_rotary_positions_are_not_rounded_to_bfloat16(towers):
    ours, made, looks = in_bfloat16(towers[1]), [], {0: None}
    ours.blocks[0].attn.qkv.register_forward_hook(lambda module, inputs, y: made.append(y.clone()))
    ours(noise(1, 56, 84).bfloat16(), looks)
    cos, sin = (t.double() for t in rope_table_2d(4, 6, ours.head_dim))
    for x, found in zip(made[0].double().chunk(3, -1), looks[0]):
        x = x.unflatten(-1, (-1, ours.head_dim))
        exact = x * cos + x.roll(ours.head_dim // 2, -1) * sin
        assert ((found.double() - exact).abs() <= 2.0 ** -8 * exact.abs() + 1e-6).all()  # rounded once, at the end


@torch.no_grad()
def test_few_compiled_graphs_serve_all_sizes():
    """One for any number of patches and all layers, and one for several pictures at once."""
    torch.compiler.reset()
    counters.clear()
    plain = towers_of("4 layers, 2 heads of 20")[1]
    fast = copy.deepcopy(plain)
    for block in fast.blocks:
        block.compile(dynamic=True, backend="aot_eager")
    for pictures, size in ((1, (56, 84)), (1, (28, 28)), (2, (84, 28)), (3, (28, 140)), (1, (112, 84))):
        assert torch.allclose(plain(noise(pictures, *size)), fast(noise(pictures, *size)), atol=1e-5)
    assert 0 < counters["stats"]["unique_graphs"] <= 2 and not counters["graph_break"]


# --- the whole model ------------------------------------------------------------------------------------------------

IM_END, VISION_START, VISION_END, IMAGE_PAD, VIDEO_PAD = range(258, 263)
MODELS = {
    "1 layer, 2 of 2 heads of 16, tied, padded vocabulary": dict(
        layers=1, heads=2, kv_heads=2, hidden=32, sections=[2, 3, 3], tied=True, vocab=320,
        tower=dict(depth=1, embed_dim=32, num_heads=2), pixels=(3136, 18816)),
    "2 layers, 4 of 2 heads of 8, untied": dict(
        layers=2, heads=4, kv_heads=2, hidden=32, sections=[1, 1, 2], tied=False, vocab=263,
        tower=dict(depth=2, embed_dim=40, num_heads=2), pixels=(4704, 25000)),
    "3 layers, 6 of 1 head of 16, untied, padded vocabulary": dict(
        layers=3, heads=6, kv_heads=1, hidden=96, sections=[4, 1, 3], tied=False, vocab=384,
        tower=dict(depth=1, embed_dim=24, num_heads=3, mlp_ratio=2), pixels=(784, 12000)),
}
SIZES = [(20, 20), (1, 1), (28, 28), (56, 56), (42, 70), (97, 99), (140, 112), (140, 140), (133, 77), (200, 200),
         (199, 9), (3, 190), (900, 15)]  # width, height: 42 and 70 are 1.5 and 2.5 tokens, 190 is 63 times 3
SETS = [[], [(97, 60)], [(42, 70), (70, 42)], [(150, 126), (20, 20), (150, 126)]]  # of images in one prompt


def save_reference(directory, layers, heads, kv_heads, hidden, sections, tied, vocab, tower, pixels):
    """A random Qwen2VLForConditionalGeneration with logits of scale 10, saved by transformers itself, and the files
    that come with it. Returns it and its image processor."""
    torch.manual_seed(0)
    config = Qwen2VLConfig(
        vision_config=dict(hidden_size=hidden, **tower), tie_word_embeddings=tied,
        text_config=dict(hidden_size=hidden, num_hidden_layers=layers, num_attention_heads=heads,
                         num_key_value_heads=kv_heads, intermediate_size=128, vocab_size=vocab, rms_norm_eps=1e-6,
                         bos_token_id=None, eos_token_id=IM_END,
                         rope_parameters={"rope_type": "default", "rope_theta": 1e4, "mrope_section": sections}),
        image_token_id=IMAGE_PAD, video_token_id=VIDEO_PAD, vision_start_token_id=VISION_START,
        vision_end_token_id=VISION_END)
    reference = tiny.shake(Qwen2VLForConditionalGeneration(config)).eval()
    with torch.no_grad():
        if tied:  # a strong MLP and random signs, or each token would only repeat itself
            reference.model.language_model.layers[-1].mlp.down_proj.weight.mul_(8)
            reference.model.language_model.norm.weight.mul_(torch.randn(hidden).sign())
            reference.model.language_model.embed_tokens.weight.mul_(0.5)
        else:
            reference.lm_head.weight.mul_(3)
    reference.save_pretrained(directory)
    (directory / "preprocessor_config.json").write_text(json.dumps({
        "image_processor_type": "Qwen2VLImageProcessor", "processor_class": "Qwen2VLProcessor", "patch_size": 14,
        "temporal_patch_size": 2, "merge_size": 2, "do_resize": True, "do_rescale": True, "do_normalize": True,
        "image_mean": [0.48145466, 0.4578275, 0.40821073], "image_std": [0.26862954, 0.26130258, 0.27577711],
        "min_pixels": pixels[0], "max_pixels": pixels[1]}))
    tokenizer = tiny.tokenizer()
    tokenizer.add_special_tokens([AddedToken(f"<|{x}|>", normalized=False) for x in (
        "vision_start", "vision_end", "image_pad", "video_pad")])
    tokenizer.save(str(directory / "tokenizer.json"))
    return reference, Qwen2VLImageProcessorPil.from_pretrained(directory)


@pytest.fixture(scope="module", params=MODELS, ids=list(MODELS))
def pair(request, tmp_path_factory):
    """The same model of transformers and of ours, their image processor, and the directory of the files."""
    directory = tmp_path_factory.mktemp("qwen2_vl")
    theirs, processor = save_reference(directory, **MODELS[request.param])
    return SimpleNamespace(theirs=theirs, processor=processor, ours=VLM.from_pretrained(directory), files=directory)


def pictures_of(sizes):
    return [tiny.image(*size, seed=i) for i, size in enumerate(sizes)]


def prompt_of(m, images, question="What is it?"):
    processed = [data.process_image(image, m.config) for image in images]
    text = data.chatml([data.place_images(question, len(images), m.config)])
    return data.encode(text, m.tokenizer, processed)


def inputs(pair, images, question="What is it?"):
    """The same prompt for transformers, written and encoded anew: images stand before the question if it places none.
    """
    pad, out = "<|vision_start|><|image_pad|><|vision_end|>", {}
    question = question.replace("<image>", pad) if "<image>" in question else pad * len(images) + question
    text = ("<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
            f"<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n")
    if images:
        out = dict(pair.processor(images, return_tensors="pt"))
        counts = iter(out["image_grid_thw"].prod(1) // 4)
        first, *rest = text.split("<|image_pad|>")
        text = first + "".join("<|image_pad|>" * next(counts) + chunk for chunk in rest)
    out["input_ids"] = torch.tensor([pair.ours.tokenizer.encode(text).ids])
    out["mm_token_type_ids"] = (out["input_ids"] == IMAGE_PAD).int()
    return out


def dense(m):
    return tuple(range(m.config.layers))


def placed(prompt, t, v):
    """What belongs to text tokens and what to visual ones, in the order of the prompt."""
    both = np.concatenate([t, v])
    return both[np.argsort(prompt.t_pos + prompt.v_pos)]


def ids_of(prompts):
    """Of each prompt in a batch (tokens, 3): time, row and column of all its tokens."""
    batch = data.collate(prompts)
    t, v = rotary_ids(*batch.positions, Past.empty(len(prompts)))
    t = t if t.ndim == 3 else t[..., None].repeat(3, 2)  # without any image one number says all three
    v = v if v.ndim == 3 else v[..., None].repeat(3, 2)
    return [placed(p, a[:len(p.t_pos)], b[:len(p.v_pos)]) for p, a, b in zip(prompts, t, v)]


def their_ids(reference, sent):
    """The same of transformers, of one prompt."""
    if "image_grid_thw" not in sent:
        return np.arange(sent["input_ids"].shape[1])[:, None].repeat(3, 1)
    return reference.model.get_rope_index(sent["input_ids"], sent["mm_token_type_ids"], sent["image_grid_thw"]
                                          )[0][:, 0].T.numpy()


def same_pixels(pair, image):
    c = pair.ours.config
    wanted, found = pair.processor(image, return_tensors="np"), data.process_image(image, c)
    assert found.pixels.dtype == np.uint8 and found.pixels.shape[:2] == (1, 3)
    floats = normalise(torch.from_numpy(found.pixels), torch.float32, c)[0].numpy()
    assert floats.dtype == np.float32 and np.array_equal(patchify(floats), wanted["pixel_values"])
    rows, columns = found.tiling.size if found.tiling.size != (0, 0) else found.tiling.cells
    assert [[1, 2 * rows, 2 * columns]] == wanted["image_grid_thw"].tolist() and found.tiling.tokens == rows * columns
    return rows * columns


def test_pixels_are_bit_for_bit_theirs(pair):
    """Of small and of large pictures, of narrow ones, and between two sizes."""
    least, most = (n // 784 for n in (pair.ours.config.min_pixels, pair.ours.config.max_pixels))
    *tokens, narrow = [same_pixels(pair, tiny.image(*size, seed=i)) for i, size in enumerate(SIZES)]
    assert least <= min(tokens) and max(tokens) <= most < narrow and len(set(tokens)) > 3  # never less than one high


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "LA", "CMYK", "1"])
def test_pixels_of_other_modes(pair, mode):
    alpha = Image.fromarray(np.linspace(0, 255, 60 * 90).reshape(90, 60).astype(np.uint8))
    image = tiny.image(60, 90)
    if mode in ("RGBA", "LA"):
        image = image.convert(mode)
        image.putalpha(alpha)
    same_pixels(pair, image.convert(mode))


@pytest.mark.parametrize("sizes", SETS, ids=lambda s: f"{len(s)} images")
def test_prompt_and_positions(pair, sizes):
    reference, ours = pair.theirs, pair.ours
    images = pictures_of(sizes)
    sent, prompt = inputs(pair, images), prompt_of(ours, images)
    ids = placed(prompt, prompt.ids, [IMAGE_PAD] * len(prompt.v_pos))
    assert ids.tolist() == sent["input_ids"][0].tolist()
    assert np.array_equal(ids_of([prompt])[0], their_ids(reference, sent))


def test_positions_in_batches_and_piece_by_piece(pair):
    """Prompts with 0 to 3 images side by side, and the last one as three pieces that follow each other."""
    reference, ours = pair.theirs, pair.ours
    wanted = [their_ids(reference, inputs(pair, pictures_of(sizes))) for sizes in SETS]
    prompts = [prompt_of(ours, pictures_of(sizes)) for sizes in SETS]
    for found, ids in zip(ids_of(prompts), wanted):
        assert np.array_equal(found, ids)

    whole, past, found = prompts[-1], Past.empty(1), []
    text = data.chatml([data.place_images("What is it?", 3, ours.config)])
    a, b, c, d = text.split("<image>")
    start = 0
    for piece, images in ((f"{a}<image>", whole.images[:1]), (f"{b}<image>{c}<image>", whole.images[1:]), (d, ())):
        prompt = data.encode(piece, ours.tokenizer, images, start=start)
        batch = data.collate([prompt])
        t, v = rotary_ids(*batch.positions, past)
        t, v = (x[0] if x.ndim == 3 else x[0, :, None].repeat(3, 1) for x in (t, v))
        found.append(placed(prompt, t, v))
        past, start = past.extend(*batch.positions), prompt.end
    assert np.array_equal(np.concatenate(found), wanted[-1])


@torch.no_grad()
def check(pair, images, question="What is it?"):
    """Logits of every text token agree; returns the largest."""
    reference, ours = pair.theirs, pair.ours
    prompt = prompt_of(ours, images, question)
    theirs = reference(**inputs(pair, images, question)).logits[0, prompt.t_pos][:, :ours.config.vocab]
    mine = ours.head(ours(data.collate([prompt]), dense(ours)))[0]
    assert mine.shape == theirs.shape and (theirs - mine).abs().max() < 1e-4
    return theirs.abs().max()


@pytest.mark.parametrize("size", SIZES, ids=lambda s: f"{s[0]}x{s[1]}")
def test_logits_one_image(pair, size):
    scale = check(pair, [tiny.image(*size, seed=size[0])])
    assert 5 < scale < 100  # or the tolerance would mean nothing


@pytest.mark.parametrize("sizes", SETS, ids=lambda s: f"{len(s)} images")
def test_logits_no_or_several_images(pair, sizes):
    check(pair, pictures_of(sizes))


def test_logits_images_in_the_text(pair):
    check(pair, pictures_of([(50, 80), (130, 20)]), "First <image> then\n<image>?")


@torch.no_grad()
def test_logits_in_bfloat16(pair):
    """As far from float32 as theirs are."""
    images, reference, ours = pictures_of(SETS[3]), in_bfloat16(pair.theirs), in_bfloat16(pair.ours)
    prompt = prompt_of(ours, images)
    exact, theirs = (net(**inputs(pair, images)).logits[0, prompt.t_pos][:, :ours.config.vocab]
                     for net in (pair.theirs, reference))
    mine = ours.head(ours(data.collate([prompt]), dense(ours)))[0]
    assert theirs.dtype == mine.dtype == torch.bfloat16
    assert 0 < (mine - exact).norm() < 1.3 * (theirs - exact).norm() < 0.05 * exact.norm()


@torch.no_grad()
def test_layers_on_text_alone_keep_the_positions_of_the_whole_prompt(pair):
    """Each configuration against their layers, run one by one: all tokens, or text alone with the ids it has there."""
    reference, ours = pair.theirs, pair.ours
    images = pictures_of(SETS[3])
    prompt, sent, c = prompt_of(ours, images), inputs(pair, images), ours.config
    net, ids = reference.model.language_model, torch.from_numpy(their_ids(reference, sent))
    x = net.embed_tokens(sent["input_ids"])
    x[0, prompt.v_pos] = torch.cat(reference.model.get_image_features(
        sent["pixel_values"], sent["image_grid_thw"], return_dict=True).pooler_output)
    for sa in {(), (0,), (c.layers - 1,), dense(ours)}:
        whole = x
        for l, layer in enumerate(net.layers):
            own = list(range(prompt.end)) if l in sa else prompt.t_pos
            rope = net.rotary_emb(x, ids[own].T[:, None])
            mask = torch.full((len(own), len(own)), float("-inf")).triu(1)[None, None]
            whole = whole.clone()
            whole[:, own] = layer(whole[:, own], attention_mask=mask, position_embeddings=rope)
        wanted = net.norm(whole)[0, prompt.t_pos]
        assert (ours(data.collate([prompt]), sa)[0] - wanted).abs().max() < 2e-5, sa


@pytest.mark.parametrize("sizes", SETS, ids=lambda s: f"{len(s)} images")
def test_greedy_tokens(pair, sizes):
    """32 tokens, or fewer where both stop at <|im_end|>. Theirs may not choose rows that are only padding."""
    reference, ours = pair.theirs, pair.ours
    images = pictures_of(sizes)
    sent, vocab = inputs(pair, images, "Tell me"), reference.config.text_config.vocab_size
    theirs = reference.generate(**sent, max_new_tokens=32, do_sample=False, eos_token_id=IM_END, pad_token_id=0,
                                suppress_tokens=list(range(ours.config.vocab, vocab)) or None)
    theirs = [i for i in theirs[0, sent["input_ids"].shape[1]:].tolist() if i != IM_END]
    assert len(set(theirs)) > 3
    assert ours.generate([prompt_of(ours, images, "Tell me")], dense(ours), max_tokens=32) == [theirs]


@torch.no_grad()
def test_decoding_from_the_cache_is_computing_anew(pair):
    """Also where only some layers see the images."""
    ours = pair.ours
    for sa in {dense(ours), (0,), ()}:
        prompt = whole = prompt_of(ours, pictures_of(SETS[2]), "Tell me more")
        found, = ours.generate([prompt], sa, max_tokens=12)
        for token in found:
            assert ours.head(ours(data.collate([whole]), sa))[0, -1].argmax() == token
            whole = whole._replace(ids=[*whole.ids, token], t_pos=[*whole.t_pos, whole.end])
        assert len(set(found)) > 2


@torch.no_grad()
def test_a_batch_is_each_prompt_alone(pair):
    ours = pair.ours
    prompts = [prompt_of(ours, pictures_of(sizes), "What" + " is" * i + " it?") for i, sizes in enumerate(SETS)]
    for sa in {dense(ours), (0,)}:
        together = ours(data.collate(prompts), sa)
        for row, prompt in zip(together, prompts):
            assert (row[:len(prompt.ids)] - ours(data.collate([prompt]), sa)[0]).abs().max() < 2e-5
        alone = [ours.generate([prompt], sa, max_tokens=16)[0] for prompt in prompts]
        assert ours.generate(prompts, sa, max_tokens=16) == alone and len(set(map(tuple, alone))) > 1


@torch.no_grad()
@pytest.mark.parametrize("layers", ["dense", "first"])
def test_questions_one_after_another(pair, layers):
    """Each from the cache of what came before it, as if all were one prompt."""
    ours = pair.ours
    sa = dense(ours) if layers == "dense" else (0,)
    whole = prompt_of(ours, pictures_of(SETS[2]), "What?")
    shared, text = data.split_shared(data.chatml([data.place_images("What?", 2, ours.config)]))
    talk = Conversation(ours, data.encode(shared, ours.tokenizer, whole.images), sa)
    for question in ("And now?", "Sure?", ""):
        found = talk.answer(data.encode(text, ours.tokenizer, start=talk.end), keep=True, max_tokens=8)
        assert ours.generate([whole], sa, max_tokens=8) == [found]
        closed = [*found, IM_END, *ours.tokenizer.encode("\n").ids]
        whole = whole._replace(ids=whole.ids + closed, t_pos=whole.t_pos + list(range(whole.end, talk.end)))
        text = f"<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n"
        whole = data.join(whole, data.encode(text, ours.tokenizer, start=talk.end))


# --- its files ------------------------------------------------------------------------------------------------------

def test_config_as_on_the_hub(pair, tmp_path):
    """The language model's settings stand by themselves there, and the defaults are left out."""
    raw = json.loads((pair.files / "config.json").read_text())
    text, vision = raw.pop("text_config"), raw.pop("vision_config")
    rope = text.pop("rope_parameters")
    kept = {k: vision[k] for k in ("depth", "embed_dim", "num_heads", "mlp_ratio", "hidden_size")}
    raw |= {k: v for k, v in text.items() if k not in ("model_type", "layer_types", "dtype")}
    raw |= {"rope_theta": rope["rope_theta"], "rope_scaling": {"type": "mrope", "mrope_section": rope["mrope_section"]},
            "vision_config": {**kept, "in_chans": 3, "spatial_patch_size": 14}, "sliding_window": 32768,
            "tie_word_embeddings": pair.theirs.config.tie_word_embeddings}
    (tmp_path / "config.json").write_text(json.dumps(raw))
    (tmp_path / "preprocessor_config.json").write_text((pair.files / "preprocessor_config.json").read_text())
    theirs = Qwen2VLConfig.from_pretrained(tmp_path)
    assert theirs.text_config.rope_parameters["mrope_section"] == rope["mrope_section"]
    assert theirs.text_config.num_hidden_layers == text["num_hidden_layers"]
    found = read_config(tmp_path)
    assert found == read_config(pair.files) and found.mrope == tuple(rope["mrope_section"])


def test_weights_by_newer_names(pair, tmp_path):
    """transformers' module names since 4.52, which some files have."""
    for name in ("config.json", "preprocessor_config.json", "tokenizer.json"):
        (tmp_path / name).write_text((pair.files / name).read_text())
    state = {k: v.contiguous() for k, v in pair.theirs.state_dict().items()}
    if pair.theirs.config.tie_word_embeddings:
        del state["lm_head.weight"]
    assert "model.visual.merger.ln_q.weight" in state and "model.language_model.norm.weight" in state
    assert not state.keys() & load_file(pair.files / "model.safetensors").keys() - {"lm_head.weight"}
    save_file(state, tmp_path / "model.safetensors")
    same_model(VLM.from_pretrained(tmp_path), pair.ours)


def test_what_is_saved_is_loaded_again(pair, tmp_path):
    pair.ours.save_pretrained(tmp_path / "own")
    same_model(VLM.from_pretrained(tmp_path / "own"), pair.ours)


def same_model(a, b):
    assert a.config == b.config and a.state_dict().keys() == b.state_dict().keys()
    assert all(torch.equal(a.state_dict()[name], x) for name, x in b.state_dict().items())
