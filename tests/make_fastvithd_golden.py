"""Makes tests/fastvithd_golden.npz: what transformers' FastVLM gives, with weights and inputs by fastvithd_weights.py.

    pip install torch==2.13.0 transformers==5.24.0 timm==1.0.31 pillow numpy tokenizers
    python -m tests.make_fastvithd_golden

It needs timm, which the tests do without. In the file:

  names, shapes   all tensors of the model: 628 of the vision tower, which begin with IN_FILES, and 43 others
  config          its config.json
  384x256, ...    features (tokens, features[FEATURES]) of picture(384, 256), computed in float64, and their scale
  visual          what the language model gets for the picture of whole_model_input (tokens, hidden), float32 from here
  ids             its prompt, IMAGE_ID at each visual token
  logits          of ids' text tokens (text tokens, TOKENS), those of padding rows left out
  answer          the 16 tokens that greedy decoding adds
  pixels_crc      zlib.crc32 of the resized picture, uint8
"""
import re
import zlib
from pathlib import Path

import numpy as np
import torch

from tests import fastvithd_weights as formula
from tests import tiny


def declare_torchvision():
    """timm imports torchvision, whose wheel does not load beside a CPU build of torch unless its operators exist."""
    import importlib.util
    root = Path(importlib.util.find_spec("torchvision").submodule_search_locations[0])
    names = {name for path in root.rglob("*.py")
             for name in re.findall(r"(?:register_meta\(\"|torchvision::)(\w+)", path.read_text())}
    library = torch.library.Library("torchvision", "DEF")
    for name in sorted(names):
        library.define(name + "(Tensor a) -> Tensor")
    return library


def reference():
    """FastVlmForConditionalGeneration with the full tower and a small language model."""
    from transformers import FastVlmConfig, FastVlmForConditionalGeneration, Qwen2Config
    text = Qwen2Config(**formula.TEXT, rope_parameters={"rope_type": "default", "rope_theta": formula.ROPE_THETA})
    config = FastVlmConfig(text_config=text, image_token_index=formula.IMAGE_ID, tie_word_embeddings=False,
                           image_seq_length=(formula.SIDE // 64) ** 2)
    model = FastVlmForConditionalGeneration(config).eval()
    model.load_state_dict({name: torch.from_numpy(formula.weight(name, tuple(x.shape))).to(x.dtype)
                           for name, x in model.state_dict().items()})
    return model


@torch.inference_mode()
def main():
    library = declare_torchvision()  # as long as this lives
    model, found = reference(), {}
    tower = model.model.vision_tower.timm_model
    print(f"{sum(p.numel() for p in tower.parameters()):,} parameters in {len(tower.state_dict())} tensors")
    found["names"] = np.array(list(model.state_dict()))
    found["shapes"] = np.array([",".join(map(str, x.shape)) for x in model.state_dict().values()])
    found["config"] = np.array(model.config.to_json_string())

    image, pixels, ids = formula.whole_model_input(tiny.tokenizer())
    where, ids, pixels = np.array(ids), torch.tensor([ids]), torch.from_numpy(pixels)
    found["visual"] = model.get_image_features(pixels, return_dict=True).pooler_output[0].numpy()
    text = where != formula.IMAGE_ID
    found["logits"] = model(input_ids=ids, pixel_values=pixels).logits[0, text, :formula.TOKENS].numpy()
    answer = model.generate(input_ids=ids, pixel_values=pixels, attention_mask=torch.ones_like(ids), do_sample=False,
                            max_new_tokens=16, eos_token_id=None, pad_token_id=0,
                            suppress_tokens=list(range(formula.TOKENS, formula.TEXT["vocab_size"])))
    found["ids"], found["answer"] = where, answer[0, len(where):].numpy()
    found["pixels_crc"] = np.array(zlib.crc32(formula.square(image, formula.SIDE).tobytes()))
    print(f"logits {found['logits'].shape} of scale {found['logits'].std():.2f}, visual tokens "
          f"{found['visual'].std():.2f}; answer {found['answer'].tolist()}")

    single = {size: tower.forward_features(torch.from_numpy(formula.pixels(formula.picture(*size))))
              for size in formula.SIZES}
    tower.double()
    for (width, height), y in single.items():
        x = torch.from_numpy(formula.pixels(formula.picture(width, height))).double()
        exact = tower.forward_features(x).flatten(2).transpose(1, 2)[0]                # (tokens, 3072)
        found[f"{width}x{height}"] = exact[:, formula.FEATURES].float().numpy()
        found[f"{width}x{height} scale"] = exact.std().float().numpy()
        print(f"{width} x {height}: {len(exact)} tokens, scale {exact.std():.2f}, largest {exact.abs().max():.1f}; in "
              f"float32 it differs by {(y.flatten(2).transpose(1, 2)[0] - exact).abs().max():.1e}")
    np.savez_compressed(formula.GOLDEN, **found)
    print(f"{formula.GOLDEN}: {formula.GOLDEN.stat().st_size:,} bytes")
    del library


if __name__ == "__main__":
    main()
