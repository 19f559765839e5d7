"""Random checkpoints: the real models' shapes, weights that behave, a tokenizer that others can load."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest

from finial.config import ModelConfig
from finial.errors import FileError, ModelError
from finial.files.safetensors import open_safetensors
from finial.files.synth import PRESETS, preset_config, synth
from finial.files.synth_tokenizer import tokenizer_json
from finial.names import parameter_count, weight_shapes

PROMPT = "The capital of France is Paris.\n\n  def f(x):\n\treturn x ** 2  # 北京 é́ 👩‍👩‍👧 1234567"


@pytest.mark.parametrize("name", PRESETS)
def test_parameters_are_the_published_number(name: str) -> None:
    config = ModelConfig.from_hf(preset_config(name))
    assert parameter_count(config) == PRESETS[name].parameters


def test_published_counts() -> None:
    # As stated by the models' pages (safetensors metadata); transformers counts the same.
    assert {name: preset.parameters for name, preset in PRESETS.items()} == {
        "qwen3-0.6b": 596_049_920,
        "qwen3-1.7b": 1_720_574_976,
        "qwen3-4b": 4_022_468_096,
        "qwen2.5-0.5b": 494_032_768,
        "qwen2.5-1.5b": 1_543_714_304,
        "llama-3.2-1b": 1_235_814_400,
        "smollm2-135m": 134_515_008,
    }


@pytest.mark.parametrize("name", ["qwen3-0.6b", "qwen2.5-0.5b", "llama-3.2-1b", "smollm2-135m"])
def test_transformers_builds_the_same_tensors(name: str) -> None:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    fields = preset_config(name, layers=2)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**fields))
    shapes = {key: tuple(value.shape) for key, value in model.named_parameters()}
    assert shapes == weight_shapes(ModelConfig.from_hf(fields))


@pytest.mark.parametrize("name", PRESETS)
def test_the_tokenizer_has_the_exact_size_and_loses_nothing(name: str) -> None:
    from tokenizers import Tokenizer

    preset = PRESETS[name]
    if any(p.vocabulary is preset.vocabulary for n, p in PRESETS.items() if n < name):
        return  # the same tokenizer as an earlier preset's
    size = preset.config["vocab_size"]
    tokenizer = Tokenizer.from_str(json.dumps(tokenizer_json(preset.vocabulary, size)))
    assert tokenizer.get_vocab_size(with_added_tokens=True) == size
    assert sorted(tokenizer.get_vocab(with_added_tokens=True).values()) == list(range(size))
    for token_id, token in preset.vocabulary.specials.items():
        assert tokenizer.token_to_id(token) == token_id
    encoded = tokenizer.encode(PROMPT)
    if preset.vocabulary.bos and preset.vocabulary.add_bos:
        assert encoded.ids[0] == preset.config["bos_token_id"]
    assert tokenizer.decode(encoded.ids) == PROMPT
    assert len(encoded.ids) < len(PROMPT.encode())


@pytest.fixture(scope="module")
def smollm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return synth("smollm2-135m", tmp_path_factory.mktemp("synth") / "model", seed=3, layers=2)


def test_weights_are_reproducible_and_depend_on_the_seed(smollm: Path, tmp_path: Path) -> None:
    def digest(folder: Path) -> str:
        return hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()

    seen: list[tuple[int, int]] = []
    again = synth("smollm2-135m", tmp_path / "a", seed=3, layers=2, progress=lambda *n: seen.append(n))
    assert digest(again) == digest(smollm)
    assert digest(synth("smollm2-135m", tmp_path / "b", seed=4, layers=2)) != digest(smollm)
    assert seen == sorted(seen) and seen[-1][0] == seen[-1][1]
    assert {p.name for p in tmp_path.iterdir()} == {"a", "b"}  # nothing half-written stays behind


def test_weights_are_normal_and_no_row_repeats(smollm: Path) -> None:
    config = ModelConfig.from_hf(json.loads((smollm / "config.json").read_text()))
    tensors = open_safetensors(smollm)
    assert {name: t.shape for name, t in tensors.items()} == weight_shapes(config)
    assert {t.format for t in tensors.values()} == {"bf16"}
    embedding = tensors["model.embed_tokens.weight"]
    bits = embedding.data.view("<u2").reshape(embedding.shape)
    # Neither equal rows nor negated ones: compare without signs, on a prefix that random rows practically never share.
    assert len(np.unique(bits[:, :16] & 0x7FFF, axis=0)) == len(bits)
    q, down = (
        tensors[f"model.layers.1.{n}.weight"].decode().astype(np.float64) for n in ("self_attn.q_proj", "mlp.down_proj")
    )
    # The mean of n normals has standard error sd/sqrt(n), their variance a relative one of sqrt(2/n): five of each.
    for values, deviation in ((q, 576**-0.5), (down, (1536 * 4) ** -0.5)):
        assert abs(values.mean()) < 5 * deviation / values.size**0.5
        assert values.var() / deviation**2 == pytest.approx(1, abs=5 * (2 / values.size) ** 0.5 + 2**-8)
    assert (tensors["model.norm.weight"].decode() == 1).all()


def test_transformers_loads_it_and_its_activations_are_sane(smollm: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(smollm)
    assert len(tokenizer) == 49152 and tokenizer.decode(tokenizer(PROMPT).input_ids) == PROMPT
    chat = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Hi"}], add_generation_prompt=True, tokenize=False
    )
    assert chat == "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    model = AutoModelForCausalLM.from_pretrained(smollm, dtype=torch.float32)
    assert model.generation_config.eos_token_id == 0
    with torch.no_grad():
        logits = model(torch.tensor([tokenizer(PROMPT).input_ids])).logits
    assert torch.isfinite(logits).all() and 0.3 < logits.std() < 3


def test_refusals(tmp_path: Path, smollm: Path) -> None:
    with pytest.raises(ModelError, match="no preset 'qwen3-9b'") as caught:
        synth("qwen3-9b", tmp_path / "x")
    assert "qwen3-0.6b" in caught.value.fix
    with pytest.raises(ModelError, match="layers is 31, smollm2-135m has 30"):
        synth("smollm2-135m", tmp_path / "x", layers=31)
    before = (smollm / "config.json").stat()
    with pytest.raises(FileError, match="exists"):
        synth("smollm2-135m", smollm, layers=1)
    assert (smollm / "config.json").stat() == before
    assert list(tmp_path.iterdir()) == []
