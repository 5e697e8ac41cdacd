"""The dense model equals transformers' LLaVA-OneVision: logits, then tokens (random weights, float32)."""
import copy

import numpy as np
import pytest
import torch
from transformers import LlavaOnevisionConfig, LlavaOnevisionForConditionalGeneration, Qwen2Config, SiglipVisionConfig
from transformers.models.llava_onevision.image_processing_pil_llava_onevision import LlavaOnevisionImageProcessorPil

from data import chatml, collate, encode, place_images, process_image
from model import VLM
from tests import tiny

IMAGE_ID = 300  # their placeholder; beyond our vocabulary, as a padded row would be
SIZES = [(1, 1), (16, 9), (224, 224), (333, 500), (500, 375), (640, 480), (820, 369), (1375, 1125), (400, 3000),
         (3000, 40), (1001, 1399), (1700, 2200), (2500, 2400)]
MODELS = {
    "1 layer, 4 of 4 heads, tied, padded vocabulary": dict(layers=1, heads=4, kv_heads=4, tied=True, vocab=320),
    "2 layers, 4 of 2 heads, untied": dict(layers=2, heads=4, kv_heads=2, tied=False, vocab=301),
    "3 layers, 4 of 1 head, tied": dict(layers=3, heads=4, kv_heads=1, tied=True, vocab=301),
    "4 layers, 6 of 2 heads, untied, padded": dict(layers=4, heads=6, kv_heads=2, tied=False, vocab=384),
}


def save_reference(directory, layers, heads, kv_heads, tied, vocab, seed=0):
    """A random LlavaOnevisionForConditionalGeneration with logits of scale 10, saved by transformers itself."""
    torch.manual_seed(seed)
    config = LlavaOnevisionConfig(
        vision_config=SiglipVisionConfig(hidden_size=48, num_hidden_layers=2, num_attention_heads=3,
                                         intermediate_size=96, image_size=384, patch_size=14, vision_use_head=False),
        text_config=Qwen2Config(hidden_size=16 * heads, num_hidden_layers=layers, num_attention_heads=heads,
                                num_key_value_heads=kv_heads, intermediate_size=128, vocab_size=vocab,
                                tie_word_embeddings=tied, rope_parameters={"rope_type": "default", "rope_theta": 1e6}),
        image_token_index=IMAGE_ID, tie_word_embeddings=tied)
    reference = tiny.shake(LlavaOnevisionForConditionalGeneration(config)).eval()
    with torch.no_grad():
        if tied:  # a strong MLP and random signs, or each token would only repeat itself
            reference.model.language_model.layers[-1].mlp.down_proj.weight.mul_(8)
            reference.model.language_model.norm.weight.mul_(torch.randn(16 * heads).sign())
        else:
            reference.lm_head.weight.mul_(10)
    reference.save_pretrained(directory)
    tiny.tokenizer().save(str(directory / "tokenizer.json"))
    return reference


@pytest.fixture(scope="module", params=MODELS, ids=list(MODELS))
def pair(request, tmp_path_factory):
    directory = tmp_path_factory.mktemp("llava")
    return save_reference(directory, **MODELS[request.param]), VLM.from_pretrained(directory)


def inputs(images, prompt):
    """The same prompt for transformers."""
    ids = np.full(prompt.end, IMAGE_ID)
    ids[prompt.t_pos] = prompt.ids
    out = {"input_ids": torch.from_numpy(ids)[None]}
    if images:
        processor = LlavaOnevisionImageProcessorPil(image_mean=[0.5] * 3, image_std=[0.5] * 3)
        out.update(processor([images] if len(images) > 1 else images, return_tensors="pt"))
    return out


def check(pair, images, text):
    """Logits of every text token agree, in bfloat16 to 2 % of the largest; returns that one."""
    reference, ours = pair
    processed = [process_image(image, ours.config, single_image=len(images) == 1) for image in images]
    prompt = encode(text, ours.tokenizer, processed)
    with torch.inference_mode():
        theirs = reference(**inputs(images, prompt)).logits[0, prompt.t_pos][:, :ours.config.vocab]
        mine = ours.head(ours(collate([prompt]), ours.config.configuration("dense")))[0]
    scale = theirs.float().abs().max()
    assert (theirs.float() - mine.float()).abs().max() <= (1e-4 if mine.dtype == torch.float32 else 2e-2 * scale)
    return scale


@pytest.mark.parametrize("size", SIZES, ids=lambda s: f"{s[0]}x{s[1]}")
def test_logits_one_image(pair, size):
    scale = check(pair, [tiny.image(*size, seed=size[0])], chatml([place_images("What is it?", 1)]))
    assert 5 < scale < 100  # or the tolerance would mean nothing


@pytest.mark.parametrize("n", [0, 2, 3])
def test_logits_no_or_several_images(pair, n):
    images = [tiny.image(90 + 200 * i, 300 - 70 * i, seed=i) for i in range(n)]
    check(pair, images, chatml([place_images("What is it?", n)]))


def test_logits_several_turns_and_images_in_the_text(pair):
    images = [tiny.image(50, 80, 1), tiny.image(300, 20, 2)]
    check(pair, images, chatml(["First <image> then\n<image>?", "Two images.", "And now?"]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_logits_compiled(pair, dtype):
    torch.compiler.reset()
    reference, ours = (copy.deepcopy(model).to(dtype) for model in pair)
    ours.compile(backend="aot_eager")
    for size in ((333, 500), (640, 480)):
        check((reference, ours), [tiny.image(*size, seed=size[0])], chatml([place_images("What is it?", 1)]))


@pytest.mark.parametrize("sizes", [[], [(500, 375)], [(60, 200), (200, 60)]], ids=["none", "one", "two"])
def test_greedy_tokens(pair, sizes):
    """32 tokens, or fewer where both stop at <|im_end|>. Theirs may not choose rows that are only padding."""
    reference, ours = pair
    images = [tiny.image(*size, seed=7) for size in sizes]
    processed = [process_image(image, ours.config, single_image=len(images) == 1) for image in images]
    prompt = encode(chatml([place_images("Tell me", len(images))]), ours.tokenizer, processed)
    sent = inputs(images, prompt)
    vocab = reference.config.text_config.vocab_size
    theirs = reference.generate(**sent, max_new_tokens=32, do_sample=False, eos_token_id=ours.stop_id, pad_token_id=0,
                                suppress_tokens=list(range(ours.config.vocab, vocab)) or None)
    theirs = [i for i in theirs[0, sent["input_ids"].shape[1]:].tolist() if i != ours.stop_id]
    assert len(set(theirs)) > 3
    assert ours.generate([prompt], ours.config.configuration("dense"), max_tokens=32) == [theirs]
