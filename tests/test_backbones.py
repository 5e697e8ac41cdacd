"""VISOR on every backbone: SigLIP's tiles, FastVLM's padded squares and tiles, Qwen2-VL's pictures as they are.

What is computed once, cached or left out, against one sequence with masks (paper/masked.py) and against the same prompt
anew. That the dense models are the published ones, test_parity, test_qwen2_vl and test_fastvithd show.
"""
import json
import random
import re

import numpy as np
import pytest
import torch

import data
import explain
import families
import flops
import router
import sample
import train
from config import PRESETS, Config, preset
from conversation import Conversation
from data import chatml, collate, encode, family_form, place_images, process_image, split_shared, tiling
from families import read_config
from layout import Past, rotary_ids
from model import VLM
from paper.masked import masked_logits, rotary_positions
from pictures import SampleError
from tests import test_fastvlm, tiny
from tests.test_flops import counted
from tests.test_llava import talk, written
from tests.test_router import call

BACKBONES = {"siglip": {}, **tiny.BACKBONES}
DENSE = tuple(range(6))
CONFIGURATIONS = (), (1,), (4,), (1, 4), (5,), DENSE
CLOSE = 1e-4


@pytest.fixture(scope="module", params=BACKBONES)
def backbone(request):
    """(name, VISOR with random weights and a router that has no favourite)."""
    m = tiny.model(7, **BACKBONES[request.param])
    torch.nn.init.normal_(m.lm_head.weight)
    m.config.add_visor((2, 5), (1, 3, 4), ((1,), (1, 4), (1, 3, 4)))  # they differ from layer 3 on
    return request.param, tiny.shake(m.add_router(), 0.7).eval()


@pytest.fixture
def model(backbone):
    m = backbone[1]
    yield m
    m.config.reduce = ""


def prompt_of(m, rng, n, words="What is it?"):
    """A prompt of n images of random sizes."""
    sizes = [(rng.randint(20, 300), rng.randint(20, 300)) for _ in range(n)]
    images = [process_image(tiny.image(*size, rng.randrange(1 << 30)), m.config, n == 1) for size in sizes]
    return encode(chatml([place_images(words, n, m.config)]), m.tokenizer, images)


def logits(m, prompts, sa):
    with torch.no_grad():
        return [m.head(h[:len(p.ids)]) for h, p in zip(m(collate(prompts), sa), prompts)]


def close(a, b):
    return a.shape == b.shape and a.abs().max() > 1 and (a - b).abs().max() < CLOSE


# --- equalities -------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("sa", CONFIGURATIONS, ids=str)
def test_two_streams_equal_one_sequence_with_masks(sa, model):
    rng = random.Random(str(sa))
    with torch.no_grad():
        for n in (0, 1, 1, 3):
            prompt = prompt_of(model, rng, n)
            assert close(logits(model, [prompt], sa)[0], masked_logits(model, prompt, sa))


@pytest.mark.parametrize("reduce", ["pack:2", "pack:4", "downsample", "m3:8"])
def test_fewer_tokens_before_any_configuration(reduce, model):
    rng, model.config.reduce = random.Random(reduce), reduce
    with torch.no_grad():
        for sa, n in (((), 1), ((1, 4), 2), (DENSE, 1)):
            prompt = prompt_of(model, rng, n)
            full = tiling(99, 200, model.config.unreduced(), n == 1).tokens
            assert tiling(99, 200, model.config, n == 1).tokens < full
            assert close(logits(model, [prompt], sa)[0], masked_logits(model, prompt, sa))


def test_batches_of_mixed_configurations(model):
    rng = random.Random(3)
    prompts = [prompt_of(model, rng, n, "why" * (n + 1)) for n in (2, 0, 1, 1, 3)]
    chosen = [(1, 4), (), DENSE, (), (1,)]
    for prompt, sa, got in zip(prompts, chosen, logits(model, prompts, chosen)):
        assert close(got, logits(model, [prompt], sa)[0])
    answers = model.generate(prompts, chosen, max_tokens=5)
    assert answers == [model.generate([p], sa, max_tokens=5)[0] for p, sa in zip(prompts, chosen)]


@pytest.mark.parametrize("n", [0, 1, 3])
def test_ask_many(n, model):
    """Images once, three questions in every configuration, and a conversation that goes on: as each anew."""
    rng, c = random.Random(n), model.config
    images = [process_image(tiny.image(rng.randint(30, 300), rng.randint(30, 300), k), c, n == 1) for k in range(n)]
    texts = [chatml([place_images(words, n, c)]) for words in ("What?", "Where is the cat in it?", "Why?")]
    tree = model.prefill([encode(split_shared(texts[0])[0], model.tokenizer, images)], [(), (1,), (1, 4), DENSE])
    with torch.no_grad():
        for text in texts:
            own = encode(split_shared(text)[1], model.tokenizer, start=tree.end)
            tree.extend([own])
            for sa in ((), (1,), (1, 4), DENSE):
                got = model.head(model.language_model.norm(tree.run(sa)[0]))[0]
                assert close(got, logits(model, [encode(text, model.tokenizer, images)], sa)[0][-len(own.ids):])
            tree.truncate(1)
    first, second = split_shared(texts[0])
    conversation = Conversation(model, encode(first, model.tokenizer, images), (1,))
    said = conversation.answer(encode(second, model.tokenizer, start=conversation.end), keep=True, max_tokens=4)
    more = "<|im_start|>user\nAnd then?<|im_end|>\n" + data.ANSWER
    got = conversation.answer(encode(more, model.tokenizer, start=conversation.end), max_tokens=6)
    whole = data.join(encode(texts[0], model.tokenizer, images), encode("", model.tokenizer))
    for ids in (said + model.tokenizer.encode("<|im_end|>\n", add_special_tokens=False).ids,
                model.tokenizer.encode(more, add_special_tokens=False).ids):
        whole = data.join(whole, data.Prompt(ids, [whole.end + i for i in range(len(ids))], [], [], []))
    assert got == model.generate([whole], (1,), max_tokens=6)[0]


@pytest.mark.parametrize("sa", CONFIGURATIONS[:5], ids=str)
def test_decoding_from_the_cache(sa, model):
    prompt = prompt_of(model, random.Random(str(sa)), 2)
    answer = model.generate([prompt], sa, max_tokens=6)[0]
    for token in answer:
        assert logits(model, [prompt], sa)[0][-1].argmax() == token
        prompt = data.join(prompt, data.Prompt([token], [prompt.end], [], [], []))


def test_a_routed_answer_is_that_of_the_same_configuration_by_name(model):
    rng, routes = random.Random(5), []
    prompts = [prompt_of(model, rng, n, words) for n, words in ((1, "a"), (2, "bb"), (0, "ccc"), (1, "dddd"), (3, "e"))]
    routed = model.generate(prompts, "auto", max_tokens=5, routes=routes)
    assert routed == model.generate(prompts, [plan.sa for plan in routes], max_tokens=5)
    assert routed == [model.generate([p], "auto", max_tokens=5)[0] for p in prompts]


def test_the_routing_token_stands_where_the_answer_begins(model):
    """A routing token as the last token of the prompt, in one sequence: the same score."""
    prompt, scores = prompt_of(model, random.Random(8), 2), model.router.layers
    tree = model.prefill([prompt], "auto", 0)
    with torch.no_grad():
        got = model.route_scores(tree, [prompt.answer_starts])[0, 0]
        model.language_model.embed_tokens.weight.data[0], old = scores.token.data.clone(), (
            model.language_model.embed_tokens.weight.data[0].clone())
        batch = collate([data.join(prompt, data.Prompt([0], [prompt.end], [], [], []))])
        t, _ = model.language_model.run(*model.embed(batch), model.layout(batch), (1,), 0, model.config.route_layer)
        model.language_model.embed_tokens.weight.data[0] = old
        assert (scores(t[:, -1])[0] - got).abs().max() < CLOSE


# --- positions --------------------------------------------------------------------------------------------------------

def test_rotary_positions_are_counted_token_by_token(model):
    rng = random.Random(1)
    prompts = [prompt_of(model, rng, n) for n in (3, 0, 1)]
    batch = collate(prompts)
    text, vision = rotary_ids(*batch.positions, Past.empty(3))
    for b, prompt in enumerate(prompts):
        by_position = np.array(rotary_positions(prompt))
        if not model.config.mrope:
            by_position = by_position[:, 0]
        assert (text[b, :len(prompt.ids)] == by_position[prompt.t_pos]).all()
        assert (vision[b, :len(prompt.v_pos)] == by_position[prompt.v_pos]).all()


def test_dropping_vision_never_moves_the_counter(model):
    """What follows an image in the same configuration, cached or not, stands behind the image's largest position."""
    prompt = prompt_of(model, random.Random(2), 2)
    past = Past.empty(1).extend(*collate([prompt]).positions)
    behind = len(prompt.ids) + len(prompt.v_pos) - 1 - max(max(x) for x in rotary_positions(prompt))
    assert past.behind[0] == behind and (behind > 0) == bool(model.config.mrope)
    more = collate([encode("more", model.tokenizer, start=prompt.end)])
    assert (rotary_ids(*more.positions, past)[0].ravel()[0] == prompt.end - behind)


# --- around it --------------------------------------------------------------------------------------------------------

def test_save_and_load(backbone, tmp_path):
    name, m = backbone
    m.save_pretrained(tmp_path / "saved")
    again, prompt = VLM.from_pretrained(tmp_path / "saved"), prompt_of(m, random.Random(4), 1)
    assert again.config == m.config and {k for k, _ in again.named_buffers()} == {k for k, _ in m.named_buffers()}
    assert torch.equal(logits(again, [prompt], (1,))[0], logits(m, [prompt], (1,))[0])
    assert (m.image_newline is None) == (name in ("fastvlm", "qwen2-vl"))


def test_the_counted_operations_are_those_of_the_modules(model):
    c, image = model.config, process_image(tiny.image(130, 70), model.config)
    x = torch.zeros(image.pixels.shape)
    t = image.tiling
    said = flops.tower_flops(c, t.tiles, t.patches)
    assert said == pytest.approx(counted(model.vision_tower, x), rel=0.005)
    y = torch.zeros(t.tiles, t.patches[0] * t.patches[1], c.features)
    assert flops.connector_flops(c, t.tiles, t.patches) == pytest.approx(counted(model.multi_modal_projector, y))
    assert flops.encoder_flops(c, [t, t]) == 2 * (said + flops.connector_flops(c, t.tiles, t.patches))


def test_where_attention_goes_is_drawn(model, tmp_path):
    image = tiny.image(120, 60)
    seen = process_image(image, model.config)
    prompt = encode(chatml([place_images("Where?", 1, model.config)]), model.tokenizer, [seen])
    with torch.no_grad():
        look = explain.attention_to_images(model, prompt, [5, 6], (1,))
    assert set(look.weights) == {1, 2, 5} and all(len(w) == len(prompt.v_pos) for w in look.weights.values())
    maps = explain.heat(look.weights[1], look.places, [seen])[0]
    assert maps[0].shape == seen.tiling.cells
    assert sum(x.sum() for x in maps) == pytest.approx(look.weights[1][look.places >= 0].sum(), rel=1e-4)


@pytest.mark.parametrize("name", ["fastvlm", "qwen2-vl"])  # of SigLIP: test_llava_training
def test_files_are_learned_from_in_every_stage_and_resumed(name, tmp_path):
    dense = tiny.model(3, visor=False, **BACKBONES[name])
    dense.config.stage = "pretrained"
    dense.save_pretrained(tmp_path / "dense")
    rng = random.Random(6)
    for i in range(6):
        tiny.image(rng.randint(30, 250), rng.randint(30, 250), i).save(tmp_path / f"{i}.png")
    file = written(tmp_path / "data.json", [
        talk("<image>\nWhat is it?", f"A {i}.", image=f"{i}.png") for i in range(6)] + [talk("Why?", "So.")] * 2 + [
        talk("<image>\n<image>\nBoth?", "Yes.", image=["1.png", "2.png"])] * 2)
    common = ["--data", file, "--out", tmp_path / "out", "--batch-size", 4, "--micro-batch-size", 2, "--workers", 0,
              "--sample-every", 0, "--device", "cpu"]
    assert call(train.main, "--stage", 1, "--model", tmp_path / "dense", "--steps", 2, *common) == 0
    assert call(train.main, "--stage", 2, "--steps", 3, "--save-every", 2, *common) == 0
    end = (tmp_path / "out/stage2-000003/model.safetensors").read_bytes()
    (tmp_path / "out/stage2-000003").rename(tmp_path / "first")
    assert call(train.main, "--stage", 2, "--resume", *common) == 0
    assert (tmp_path / "out/stage2-000003/model.safetensors").read_bytes() == end
    trained, before = (VLM.from_pretrained(tmp_path / x) for x in ("out/stage2-000003", "dense"))
    moved = {k for k, p in before.named_parameters() if not torch.equal(p, dict(trained.named_parameters())[k])}
    assert any(k.startswith("vision_tower") for k in moved) and any(k.startswith("language_model") for k in moved)
    assert call(train.main, "--stage", 3, "--steps", 2, "--questions", 2, *common[:4], "--batch-size", 4) == 0


@pytest.mark.parametrize("flags", [[], ["--sa", "dense", "--reduce", "pack:2"]], ids=str)
def test_the_command_answers(backbone, flags, tmp_path, capsys):
    name, m = backbone
    m.save_pretrained(tmp_path / "m")
    tiny.image(90, 200).save(tmp_path / "x.png")
    assert call(sample.main, "--image", tmp_path / "x.png", "--q", "what?", "--model", tmp_path / "m", "--max-tokens",
                4, "--json", "--explain", tmp_path / "e.png", "--device", "cpu", *flags) == 0
    report = json.loads(capsys.readouterr().out)
    c = VLM.from_pretrained(tmp_path / "m").config
    c.reduce = report["reduce"]
    assert report["vision_tokens"] == (data.overview_tokens(c) if report["pixels"] == "overview" else
                                       tiling(90, 200, c).tokens)
    assert (tmp_path / "e.png").is_file() and report["flops"]["encoder"] > 0


def test_the_prompt_has_the_familys_form():
    qwen = Config(**{k: v for k, v in tiny.BACKBONES["qwen2-vl"].items()}, head_dim=16)
    one = "<|vision_start|><image><|vision_end|>"
    assert place_images("What?", 2, qwen) == f"{one}{one}What?"
    assert place_images("See <image> and <image>: why?", 2, qwen) == f"See {one} and {one}: why?"
    assert family_form("<image>\n<image>\nBoth?", qwen) == f"{one}{one}Both?" and place_images("Hm", 0, qwen) == "Hm"
    assert place_images("What?", 2, Config()) == "<image> <image>\nWhat?" == place_images("What?", 2)


@pytest.mark.parametrize("name", PRESETS)
def test_published_sizes_have_configurations_that_a_router_can_choose_from(name):
    c = preset(name)
    assert len(c.viable) == 13 and c.route_layer == 4 and all(1 in sa for sa in c.viable)
    assert bool(c.overview) == (c.aspect == "anyres") and not set(c.ca) & set(c.sa)


@pytest.mark.parametrize("change, message", [
    (dict(aspect="anyres"), "aspect anyres does not go with encoder qwen2_vl"),
    (dict(mrope=(2, 3)), "mrope"), (dict(mrope=(2, 3, 4)), "mrope"), (dict(mrope="abc"), "mrope"),
    (dict(min_pixels=10 ** 6), "min_pixels"), (dict(vision_heads=16), "vision_heads 16"),
    (dict(reduce="visionzip"), "SigLIP's attention"), (dict(reduce="pyramiddrop:1:.5"), "M-RoPE"),
    (dict(overview=((),), viable=((),)), "overview")], ids=str)
def test_settings_that_do_not_go_with_qwen2_vl(change, message):
    with pytest.raises(ValueError, match=message):
        tiny.config(**{**tiny.BACKBONES["qwen2-vl"], **change})


@pytest.mark.parametrize("change", [dict(tile=100), dict(patch=32), dict(vision_hidden=96), dict(reduce="hired")],
                         ids=str)
def test_settings_that_do_not_go_with_fastvithd(change):
    with pytest.raises(ValueError, match="FastViTHD|SigLIP"):
        tiny.config(**{**tiny.BACKBONES["fastvlm"], **change})


@pytest.mark.parametrize("size", [(201 * 40, 40), (3, 900)])
def test_a_picture_that_is_too_long_for_qwen2_vl(size):
    with pytest.raises(SampleError, match="200 times"):
        process_image(tiny.image(*size), tiny.config(**tiny.BACKBONES["qwen2-vl"]))


@pytest.mark.parametrize("name", ["fastvlm", "qwen2-vl"])
def test_without_tiles_there_is_no_overview(name):
    m = tiny.model(1, **BACKBONES[name])
    with pytest.raises(ValueError, match="no base tile"):
        m.generate([prompt_of(m, random.Random(1), 1)], (), "overview")


# --- config.json of Qwen2-VL ------------------------------------------------------------------------------------------

QWEN = {"model_type": "qwen2_vl", "hidden_size": 64, "num_hidden_layers": 6, "num_attention_heads": 4,
        "num_key_value_heads": 2, "intermediate_size": 96, "vocab_size": 300, "rope_theta": 1e6,
        "tie_word_embeddings": True, "rope_scaling": {"type": "mrope", "mrope_section": [2, 3, 3]},
        "vision_config": {"hidden_size": 64, "embed_dim": 32, "depth": 2, "num_heads": 2, "in_chans": 3,
                          "spatial_patch_size": 14}}
PICTURES = {"min_pixels": 3136, "max_pixels": 12845056, "patch_size": 14, "merge_size": 2, "temporal_patch_size": 2}


def qwen_directory(path, changes=(), pictures=()):
    """A directory with the small files; changes and pictures: {"a.b": value} over what the hub has."""
    raw = json.loads(json.dumps(QWEN))
    for name, value in dict(changes).items():
        *parts, last = name.split(".")
        part = raw
        for x in parts:
            part = part[x]
        part[last] = value
    (path / "config.json").write_text(json.dumps(raw))
    if pictures is not None:
        (path / "preprocessor_config.json").write_text(json.dumps({**PICTURES, **dict(pictures)}))
    return path


def test_qwen2_vl_as_the_hub_has_it(tmp_path):
    c = read_config(qwen_directory(tmp_path))
    assert (c.encoder, c.aspect, c.mrope, c.vision_ffn, c.features) == ("qwen2_vl", "dynamic", (2, 3, 3), 128, 128)
    assert (c.min_pixels, c.max_pixels, c.tied, c.has_newlines) == (3136, 12845056, True, False)
    sized = {"min_pixels": None, "max_pixels": None, "size": {"shortest_edge": 784, "longest_edge": 7840}}
    c = read_config(qwen_directory(tmp_path, (), sized))
    assert (c.min_pixels, c.max_pixels) == (784, 7840)


@pytest.mark.parametrize("changes, pictures, message", [
    ({"model_type": "qwen2_5_vl"}, (), "model_type 'qwen2_5_vl' is no"),
    ({"model_type": {}}, (), "model_type {} is no"), ({"model_type": ["qwen2_vl"]}, (), "is no"),
    ({}, None, "preprocessor_config.json is missing"),
    ({}, {"min_pixels": None}, "min_pixels is missing"), ({}, {"max_pixels": "many"}, "max_pixels 'many'"),
    ({}, {"max_pixels": 100}, "min_pixels"), ({}, {"merge_size": 4}, "merge_size 4"),
    ({}, {"patch_size": 16}, "patch_size"),
    ({}, {"image_mean": [0.5] * 3}, "image_mean"), ({"rope_scaling": {"type": "mrope"}}, (), "mrope_section"),
    ({"rope_scaling.mrope_section": [2, 3, 4]}, (), "mrope"), ({"rope_scaling.mrope_section": [8]}, (), "mrope"),
    ({"rope_scaling.mrope_section": "2,3,3"}, (), "mrope_section"), ({"rope_scaling.type": "yarn"}, (), "yarn"),
    ({"vision_config.hidden_act": "gelu"}, (), "hidden_act"), ({"vision_config.mlp_ratio": 0}, (), "mlp_ratio"),
    ({"vision_config.hidden_size": 128}, (), "hidden_size"), ({"vision_config": 3}, (), "vision_config 3"),
    ({"vision_config.spatial_merge_size": 4}, (), "spatial_merge_size")], ids=str)
def test_what_a_qwen2_vl_directory_may_not_say(changes, pictures, message, tmp_path):
    with pytest.raises(ValueError, match=re.escape(message)):
        read_config(qwen_directory(tmp_path, changes, pictures))


@pytest.mark.parametrize("flags, message", [
    (["--min-pixels", "1000000"], "--min-pixels 1000000: must not be above --max-pixels"),
    (["--max-pixels", "0"], "--max-pixels 0: must be a whole number"),
    (["--max-pixels", "x"], "--max-pixels"), (["--pixels", "overview"], "no base tile")], ids=str)
def test_flags_of_pictures(flags, message, tmp_path, capsys):
    tiny.model(1, **BACKBONES["qwen2-vl"]).save_pretrained(tmp_path / "m")
    tiny.image(90, 90).save(tmp_path / "x.png")
    words = ["--image", tmp_path / "x.png", "--q", "what?", "--model", tmp_path / "m", "--max-tokens", 2, "--sa",
             "none"]
    assert call(sample.main, *words, "--json", "--max-pixels", 28 * 28 * 4) == 0
    assert json.loads(capsys.readouterr().out)["vision_tokens"] == 4
    assert call(sample.main, *words, *flags) == 2
    error, = [line for line in capsys.readouterr().err.splitlines() if "error" in line]
    assert message in error


def test_pixels_by_flag_are_for_pictures_without_tiles(capsys):
    assert call(flops.main, "--max-pixels", 10 ** 6) == 2 and "tiles of 384 pixels" in capsys.readouterr().err
    assert call(flops.main, "--model", "qwen2-vl-2b", "--tiles", 3) == 2 and "--tiles" in capsys.readouterr().err


# --- found by review --------------------------------------------------------------------------------------------------

def test_a_tokenizer_without_the_marks_of_images_is_refused(tmp_path):
    tiny.model(1, **BACKBONES["qwen2-vl"]).save_pretrained(tmp_path)
    (tmp_path / "tokenizer.json").write_text(tiny.tokenizer().to_str())
    with pytest.raises(ValueError, match="no <.vision_start.> and <.vision_end.>"):
        VLM.from_pretrained(tmp_path)


def test_the_overview_is_refused_before_any_question(tmp_path, capsys):
    tiny.model(1, **BACKBONES["fastvlm"]).save_pretrained(tmp_path / "m")
    tiny.image(50, 60).save(tmp_path / "x.png")
    (tmp_path / "q.jsonl").write_text(json.dumps({"image": "x.png", "question": "what?"}) + "\n")
    words = ["--batch", tmp_path / "q.jsonl", "--model", tmp_path / "m", "--pixels", "overview", "--sa", "none"]
    assert call(sample.main, *words) == 2
    out, err = capsys.readouterr()
    assert out == "" and "no base tile" in err


def test_a_smaller_picture_that_would_be_enlarged_again_is_refused():
    with pytest.raises(ValueError, match="downsample:4$"):
        tiny.config(**{**tiny.BACKBONES["fastvlm"], "reduce": "downsample:4:picture"})
    assert tiny.config(**{**tiny.BACKBONES["qwen2-vl"], "reduce": "downsample:4:picture"}).reduction.option == "picture"


def test_statistics_are_part_of_what_labels_are_of():
    m, eval_set = tiny.model(1, **BACKBONES["fastvlm"]), [(tiny.image(9, 9), [("a", "b", "c")])]
    before = router.fingerprint(m, eval_set)
    next(m.buffers()).add_(1)
    assert router.fingerprint(m, eval_set) != before


def test_large_pictures_are_encoded_a_few_at_a_time():
    m, sizes = tiny.model(1, **{**BACKBONES["qwen2-vl"], "max_pixels": 10 ** 6}), []
    m.vision_tower.register_forward_pre_hook(lambda _, args: sizes.append(tuple(args[0].shape)))
    small, large = (process_image(tiny.image(n, n), m.config) for n in (84, 560))
    with torch.no_grad():
        found = m.encode([small] * 20 + [large] * 9)
    assert [n for n, _, h, _ in sizes if h == 84] == [16, 4] and [n for n, _, h, _ in sizes if h == 560] == [7, 2]
    assert len(found) == 29 and all(torch.equal(x, found[0]) for x in found[:16])


@pytest.mark.parametrize("changes", [{"rescale_factor": 1 / 128}, {"resample": 2}, {"size": {"shortest_edge": 512}},
                                     {"crop_size": {"height": 192, "width": 64}}], ids=str)
def test_other_sizes_and_resampling_are_refused(changes, tmp_path):
    c = tiny.config(**tiny.BACKBONES["fastvlm"])
    (tmp_path / "preprocessor_config.json").write_text(json.dumps({
        "rescale_factor": 1 / 255, "resample": 3, "size": {"shortest_edge": 192}, "crop_size": {"height": 192}}))
    assert families._with_other_files(c, tmp_path) == c
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(changes))
    with pytest.raises(ValueError, match=[*changes][0]):
        families._with_other_files(c, tmp_path)


NASTY = [None, "", "x", -1, 0, 1, 2 ** 70, 1e400, float("nan"), True, [], [1], [[]], {}, {"a": 1}, [None] * 3, "1e9",
         0.5]


@pytest.mark.parametrize("family", ["qwen2-vl", "fastvlm by Apple", "fastvlm by transformers"])
def test_whatever_a_file_says_is_read_or_refused_in_one_line(family, tmp_path):
    """Every setting of the small files in turn is nonsense of many kinds."""
    raw = {"qwen2-vl": QWEN, "fastvlm by Apple": test_fastvlm.apples_config(),
           "fastvlm by transformers": json.loads(str(test_fastvlm.GOLDEN["config"]))}[family]
    files = {"config.json": raw, "preprocessor_config.json": PICTURES if family == "qwen2-vl" else {
        "size": {"shortest_edge": 256}, "image_mean": [0.0] * 3, "resample": 3}}

    def places(part, path=()):
        for key, value in part.items():
            yield *path, key
            if isinstance(value, dict):
                yield from places(value, (*path, key))
    read = 0
    for name, content in files.items():
        for other, unchanged in files.items():
            (tmp_path / other).write_text(json.dumps(unchanged))
        for path in places(content):
            for value in NASTY:
                changed = json.loads(json.dumps(content))
                part = changed
                for key in path[:-1]:
                    part = part[key]
                part[path[-1]] = value
                (tmp_path / name).write_text(json.dumps(changed))
                try:
                    read_config(tmp_path)
                    read += 1
                except ValueError as e:
                    assert str(e) and "\n" not in str(e) and len(str(e)) < 600, (path, value)
    assert read > 20  # what is not looked at, or what is another right value
