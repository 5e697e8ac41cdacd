"""What feeds the model: pixels are bytes until they are on the device, and nothing is read, sent or decoded twice."""
import copy
from multiprocessing.connection import Connection
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import checkpoints
import data
import encoders
import evaluation
import pictures
import router
import train
from arrange import Pieces, arrange
from config import Config
from data import normalised, process_image
from encoders import normalise, send
from evaluation import all_results
from llava.batches import ConversationBatches
from llava.samples import Samples, eval_questions
from model import VLM
from paper import ablate, miniature, routing
from tests import tiny
from tests.test_llava import talk, written
from tests.test_router import call


def floats(pixels):
    """As the pixels were made before: float32, on the host."""
    return ((pixels.astype(np.float64) * (1 / 255)).astype(np.float32) - np.float32(0.5)) / np.float32(0.5)


# --- pixels -----------------------------------------------------------------------------------------------------------

def test_pixels_stay_bytes_through_the_pipe(tmp_path, monkeypatch):
    """From a worker process a picture of 17 tiles is 7.5 MB; as float32 it was 30."""
    tiny.image(1536, 1536).save(tmp_path / "x.png", compress_level=1)
    path = written(tmp_path / "a.json", [talk("<image>\nQ", "yes", image="x.png")])
    samples = Samples(path, None, tiny.tokenizer(), Config())
    settings = {"batch_size": 1, "micro_batch_size": 1, "seed": 0, "workers": 1, "overfit": True, "fsdp": False,
                "steps": 1}
    alone = SimpleNamespace(rank=0, size=1, wrap=lambda model, fsdp: (None, None))
    sizes, real = [], Connection.recv_bytes

    def counted(self, *args):
        content = real(self, *args)
        sizes.append(len(content))
        return content
    monkeypatch.setattr(Connection, "recv_bytes", counted)
    (_, sample), = next(ConversationBatches(None, 2, samples, settings, tmp_path, alone).batches(0))
    pixels = sample.prompt.images[0].pixels
    assert pixels.dtype == np.uint8 and pixels.shape == (17, 3, 384, 384) and pixels.flags.c_contiguous
    assert 0 < max(sizes) - pixels.nbytes < 100_000 and pixels.nbytes == 7_520_256


def test_normalised_bytes_are_the_floats_of_before():
    every = np.arange(256, dtype=np.uint8).reshape(1, 4, 8, 8)
    assert np.array_equal(normalised("siglip")[0], floats(every).ravel())
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        found = normalise(torch.from_numpy(every), dtype, Config())
        assert found.is_contiguous() and torch.equal(found, torch.from_numpy(floats(every)).to(dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_encoding_is_that_of_the_float_path_bit_for_bit(dtype):
    m = tiny.model(visor=False).to(dtype).requires_grad_(False)
    images = [process_image(tiny.image(w, h, w), m.config) for w, h in ((200, 90), (30, 40), (300, 300))]
    for x, found in zip(images, m.encode(images), strict=True):
        features = torch.from_numpy(floats(x.pixels)).to(dtype)
        tiles = Pieces(m.multi_modal_projector(m.vision_tower(features)), None, None)
        plain = arrange(tiles, x.tiling, m.image_newline, m.config)
        assert torch.equal(plain, m.encode([x])[0])
        if dtype == torch.float32:  # in one batch with others, to rounding
            assert torch.allclose(plain, found, atol=1e-4)


def test_the_table_is_sent_once_and_serves_inference_and_training(monkeypatch):
    m, sent = tiny.model(), []
    encoders.table.cache_clear()
    monkeypatch.setattr(encoders, "send", lambda x, device: sent.append(x.shape) or x.to(device))
    image = process_image(tiny.image(50, 40), m.config)
    with torch.inference_mode():
        m.encode([image])
    m.encode([image])[0].sum().backward()
    assert sent == [(256,)] and m.vision_tower.embeddings["patch_embedding"].weight.grad.any()
    encoders.table.cache_clear()


def test_cuda_is_not_waited_for():
    """The copy starts from pinned memory, which is what makes non_blocking true."""
    did = []
    x = SimpleNamespace(pin_memory=lambda: did.append("pin") or x, to=lambda device, **how: did.append((device, how)))
    send(x, torch.device("cuda"))
    assert did == ["pin", (torch.device("cuda"), {"non_blocking": True})]


# --- the optimiser ----------------------------------------------------------------------------------------------------

def stepped(model, opt, steps=5):
    """A model after some steps with gradients by seed."""
    torch.manual_seed(0)
    for _ in range(steps):
        for p in model.parameters():
            p.grad = torch.randn_like(p)
        opt.step()
    return model


def test_fused_adamw_takes_the_plain_steps():
    a = tiny.model()
    b = copy.deepcopy(a)
    fused, *_ = train.optimizers(a, 1e-3)["adamw"]
    plain = torch.optim.AdamW(b.parameters(), 1e-3, weight_decay=0.0, foreach=False)
    assert fused.defaults["fused"] is True
    for x, y in zip(stepped(a, fused).parameters(), stepped(b, plain).parameters()):
        assert torch.allclose(x, y, rtol=1e-6, atol=1e-6)
    assert not train.optimizers(a.to("meta"), 1e-3)["adamw"][0].defaults["fused"]  # only where there is such a kernel


def test_a_restored_optimiser_stands_on_the_device_as_a_whole(tmp_path):
    """Fused kernels read the counter of steps there."""
    m = tiny.model()
    opts = train.optimizers(m, 1e-3)
    stepped(m, opts["adamw"][0])
    saved = checkpoints.save(tmp_path, m, opts, {"stage": 2, "step": 5, "steps": 9})
    again = train.optimizers(m, 1e-3)
    checkpoints.restore(saved, again)
    for p, old in opts["adamw"][0].state.items():
        new = again["adamw"][0].state[p]
        assert old.keys() == new.keys() and all(torch.equal(old[k], new[k]) for k in old) and new["step"] == 5
    elsewhere = train.optimizers(m.to("meta"), 1e-3)
    checkpoints.restore(saved, elsewhere)
    assert {x.device.type for state in elsewhere["adamw"][0].state.values() for x in state.values()} == {"meta"}


# --- labels -----------------------------------------------------------------------------------------------------------

SIZES = [(40, 40), (90, 40), (40, 41), (200, 90), (40, 90)]


@pytest.fixture
def asked(tmp_path):
    """(a model, a training file about ten images of five sizes, one question each)."""
    model = tiny.model(visor=False).add_cross_attention((1, 2, 5), (0, 3), [(0,), (0, 3)])
    for i in range(10):
        tiny.image(*SIZES[i % 5], i).save(tmp_path / f"{i}.png")
    rows = [talk(f"<image>\nquestion {i}?", "yes", image=f"{i}.png") for i in range(10)]
    return model, written(tmp_path / "data.json", rows)


def questions_of(model, file):
    return eval_questions(Samples(file, None, model.tokenizer, model.config), 100)


@pytest.fixture
def loads(monkeypatch):
    """Names of the images decoded, in order."""
    found, real = [], pictures.load_image
    monkeypatch.setattr(pictures, "load_image", lambda path: found.append(Path(path).name) or real(path))
    return found


def test_each_image_is_decoded_once_for_labels(asked, loads, tmp_path):
    model, file = asked
    model.save_pretrained(tmp_path / "m")
    words = "--model", tmp_path / "m", "--data", file
    assert call(router.main, "--label", tmp_path / "l.jsonl", *words) == 0
    assert len(loads) == len(set(loads)) == 10
    lines = (tmp_path / "l.jsonl").read_text().splitlines(keepends=True)
    for kept in (11, 7):  # all of it, and part
        loads.clear()
        (tmp_path / "l.jsonl").write_text("".join(lines[:kept]))
        assert call(router.main, "--label", tmp_path / "l.jsonl", *words) == 0
        assert len(loads) == len(set(loads)) and (kept < 11) <= len(loads) <= 11 - kept + 2  # a list may be cut
        assert (tmp_path / "l.jsonl").read_text() == "".join(lines)
    loads.clear()
    assert call(router.main, "--search", *words) in (0, 2) and len(loads) == len(set(loads)) == 10


def test_stage_3_decodes_what_it_learns_from_and_no_more(asked, loads, tmp_path, monkeypatch):
    model, file = asked
    model.save_pretrained(tmp_path / "m")
    before, real = [], router.log_results
    monkeypatch.setattr(router, "log_results", lambda *args: (real(*args), before.append(len(loads)))[0])
    assert call(train.main, "--stage", 3, "--model", tmp_path / "m", "--data", file, "--out", tmp_path / "out",
                "--steps", 2, "--batch-size", 3) == 0
    assert before == [10] and len(loads) == 10 + 2 * 3 + 10 + 1  # labels, steps, the table and its reference image


def test_a_broken_image_is_named_and_passed_over(asked, tmp_path, capsys):
    model, file = asked
    whole = router.log_results(tmp_path / "a.jsonl", model, questions_of(model, file))
    number = [path.name for path, _ in questions_of(model, file)].index("3.png")
    broken = tmp_path / "3.png"
    broken.write_bytes(broken.read_bytes()[:900])
    with pytest.raises(ValueError, match="another model or evaluation set"):  # its bytes have changed
        router.log_results(tmp_path / "a.jsonl", model, questions_of(model, file))
    capsys.readouterr()
    found = router.log_results(tmp_path / "b.jsonl", model, questions_of(model, file))
    assert "3.png: broken image" in capsys.readouterr().err
    assert [r["image"] for r in found] == [i for i in range(10) if i != number]
    assert {r["image"]: r["correct"] for r in whole if r["image"] != number} == {
        r["image"]: r["correct"] for r in found}
    assert router.log_results(tmp_path / "b.jsonl", model, questions_of(model, file)) == found
    for path, _ in questions_of(model, file):
        path.write_bytes(b"nothing")
    with pytest.raises(ValueError, match="none of the images can be read"):
        all_results(model, questions_of(model, file), model.config.plans)


def test_few_images_wait_for_others_of_their_kind(asked, loads):
    """Whatever may wait, each image comes once, and those of a list have equally many visual tokens."""
    model, file = asked
    eval_set, most = questions_of(model, file), {}
    for waiting in (0, 100_000, 1 << 29):
        come, most[waiting] = [], 0
        for batch in evaluation.image_batches(eval_set, model.config, waiting=waiting):
            come += [i for i, *_ in batch]
            most[waiting] = max(most[waiting], len(loads) - len(come))
            assert len({x.tiling.tokens for _, x, _ in batch}) == 1
        assert sorted(come) == list(range(10))
        loads.clear()
    assert most[0] == 0 < most[100_000] < most[1 << 29]  # images that wait while a list is evaluated
    assert all(len(x) == 1 for x in evaluation.image_batches(eval_set, model.config, batch_size=1))
    left = evaluation.image_batches(eval_set, model.config, range(3, 10))
    assert [i for batch in left for i, *_ in batch] == [0, 1, 2]


def test_an_evaluation_reads_back_two_numbers_a_target_once_a_question(asked, monkeypatch):
    """A hit and a loss for each configuration and target; never logits."""
    model, _ = asked
    image, read = process_image(tiny.image(40, 40), model.config), []
    prompt = data.encode("a <image>", model.tokenizer, [image])
    tree = model.prefill([prompt] * 3, list(model.config.viable))
    for name in ("tolist", "item", "numpy", "cpu", "nonzero", "__bool__", "__int__", "__float__", "__index__"):
        def noted(self, *args, name=name, real=getattr(torch.Tensor, name), **kw):
            read.append((name, self.numel()))
            return real(self, *args, **kw)
        monkeypatch.setattr(torch.Tensor, name, noted)
    pairs = [("what?", "yes"), ("and?", "no"), ("why", "so")]
    with torch.no_grad():
        evaluation.score_answers(model, pairs, tree)
    targets = sum(len(answer) + 1 for _, answer in pairs)  # bytes, and <|im_end|>
    assert read == [("cpu", 2 * 2 * targets), ("numpy", 2 * 2 * targets)]


# --- where evaluations run --------------------------------------------------------------------------------------------

class Ran(Exception):
    """Raised in place of an evaluation, with its model."""


@pytest.mark.parametrize("module", [miniature, ablate, routing], ids=lambda m: m.__name__)
@pytest.mark.parametrize("flags, dtype", [([], torch.float32), (["--dtype", "bfloat16"], torch.bfloat16)], ids=str)
def test_papers_programs_take_device_and_dtype(module, flags, dtype, tmp_path, monkeypatch):
    """Training is in float32; the tables are unless another dtype is asked for."""
    def evaluated(model, *_):
        raise Ran(model)

    def trained(model, stage, out, settings):
        assert model.image_newline.dtype == torch.float32
        out.mkdir(parents=True, exist_ok=True)
        (out / "labels.jsonl").touch()  # which stage 3 makes
        return model
    monkeypatch.setattr(train, "train", trained)
    monkeypatch.setattr(module, "all_results", evaluated)
    monkeypatch.setattr(torch, "set_num_threads", lambda n: None)
    words = [] if module is miniature else ["--out", str(tmp_path)]
    with pytest.raises(Ran) as ran:
        module.main([*words, "--questions", "1", "--device", "cpu", *flags])
    assert ran.value.args[0].image_newline.dtype == dtype


def test_the_final_table_evaluates_both_models_on_one_device(monkeypatch, tmp_path):
    """The dense model beside the trained one."""
    where, real = [], VLM.from_pretrained
    monkeypatch.setattr(VLM, "from_pretrained", lambda *args, **how: where.append(how["device"]) or real(*args))
    monkeypatch.setattr(train, "all_results", lambda *_: [])
    monkeypatch.setattr(router, "summarise", lambda *_: SimpleNamespace(
        text=lambda: "", routes=lambda: "", save=lambda _: None, draw=lambda _: None))
    config = SimpleNamespace(layers=12, viable=((), (4,)), plans=(), router=False)
    model = SimpleNamespace(config=config, device="somewhere")
    train.print_report(model, SimpleNamespace(seed=0, questions=1), tmp_path)
    assert where == ["somewhere"]
