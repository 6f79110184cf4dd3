"""LoRA adapters between mistral-finetune's file and PEFT's folder: names, rows, factors, and what is refused."""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from ministral_jax.checkpoints.conversion.compare import compare
from ministral_jax.checkpoints.conversion.convert import convert
from ministral_jax.checkpoints.conversion.opening import open_checkpoint
from ministral_jax.config import ModelConfig
from ministral_jax.config_files import params_from_config, write_params_json
from ministral_jax.errors import MinistralError
from tests.architecture_files import EXAMPLES, make, mistral_tensors, write_example
from tests.checkpoint_files import interleaved, tiny_config

RANK = 4
PEFT, LORA = "adapter_model.safetensors", "lora.safetensors"


def lora_weights(config: ModelConfig, seed: int = 0) -> dict[str, np.ndarray]:
    """Matrices for every projection of a dense decoder, rows half-split, by mistral names."""
    generator = np.random.default_rng(seed)
    shapes = {name: values.shape for name, values in make(config).tensors.items() if "layers." in name}
    weights = {}
    for name, shape in shapes.items():
        module = name.removesuffix(".weight")
        if len(shape) == 2 and module.rsplit(".", 1)[1][0] == "w" and not name.startswith("vision"):
            weights[f"{module}.lora_A.weight"] = generator.standard_normal((RANK, shape[1])).astype(np.float32)
            weights[f"{module}.lora_B.weight"] = generator.standard_normal((shape[0], RANK)).astype(np.float32)
    return weights


def write_mistral_adapter(folder: Path, config: ModelConfig, **lora: Any) -> dict[str, np.ndarray]:
    weights = lora_weights(config)
    rows = {
        name: interleaved(values, config.head_dim) if re.search(r"w[qk]\.lora_B", name) else values
        for name, values in weights.items()
    }
    folder.mkdir()
    save_file(rows, folder / LORA)
    document = {**params_from_config(config), "lora": {"enable": True, "rank": RANK, "scaling": 2.0, **lora}}
    (folder / "params.json").write_text(json.dumps(document))
    return weights


def peft_name(name: str, outer: str = "model.") -> str:
    words = {
        "attention.wq": "self_attn.q_proj", "attention.wk": "self_attn.k_proj", "attention.wv": "self_attn.v_proj",
        "attention.wo": "self_attn.o_proj", "feed_forward.w1": "mlp.gate_proj", "feed_forward.w2": "mlp.down_proj",
        "feed_forward.w3": "mlp.up_proj", "feed_forward.experts": "block_sparse_moe.experts",
    }  # fmt: skip
    for ours, theirs in words.items():
        name = name.replace(ours, theirs)
    return f"base_model.model.{outer}{name}"


def test_an_adapter_goes_to_peft_and_back_byte_by_byte(tmp_path):
    weights = write_mistral_adapter(tmp_path / "a", tiny_config("ministral3"), dropout=0.1, note="kept")
    convert(tmp_path / "a", tmp_path / "p", to="hf", verify=True)
    found = load_file(tmp_path / "p" / PEFT)
    assert found.keys() == {peft_name(name) for name in weights}
    for name, values in weights.items():
        np.testing.assert_array_equal(found[peft_name(name)], values)
    convert(tmp_path / "p", tmp_path / "c", to="mistral", verify=True)
    first, last = load_file(tmp_path / "a" / LORA), load_file(tmp_path / "c" / LORA)
    assert first.keys() == last.keys()
    assert all(np.array_equal(first[name], last[name]) for name in first)
    assert json.loads((tmp_path / "c" / "params.json").read_text()) == json.loads(
        (tmp_path / "a" / "params.json").read_text()
    )


def test_base_and_adapter_converted_apart_multiply_to_the_merged_model_converted(tmp_path):
    """What the row order is about: W' + s B' A' is W + s B A with its rows in the other order."""
    example = EXAMPLES["mistral"]()
    for name in [name for name, values in example.tensors.items()]:
        example.tensors[name] = example.tensors[name].astype(np.float32)
    weights = write_mistral_adapter(tmp_path / "lora", example.config)
    lora = load_file(tmp_path / "lora" / LORA)
    merged = mistral_tensors(example)
    for name in [name for name in merged if f"{name.removesuffix('.weight')}.lora_A.weight" in weights]:
        module = name.removesuffix(".weight")
        merged[name] = merged[name] + 2.0 * lora[f"{module}.lora_B.weight"] @ lora[f"{module}.lora_A.weight"]
    write_example(tmp_path / "base", example, "mistral")
    write_example(tmp_path / "merged", example, "mistral")
    save_file(merged, tmp_path / "merged" / "consolidated.safetensors")
    for name in ("base", "lora", "merged"):
        convert(tmp_path / name, tmp_path / f"{name}_hf", to="hf")
    base, expected = (load_file(tmp_path / n / "model.safetensors") for n in ("base_hf", "merged_hf"))
    peft = load_file(tmp_path / "lora_hf" / PEFT)
    document = json.loads((tmp_path / "lora_hf" / "adapter_config.json").read_text())
    scale = document["lora_alpha"] / document["r"]
    for name in base:
        module = f"base_model.model.{name.removesuffix('.weight')}"
        total = base[name]
        if f"{module}.lora_A.weight" in peft:
            total = total + scale * peft[f"{module}.lora_B.weight"] @ peft[f"{module}.lora_A.weight"]
        np.testing.assert_allclose(total, expected[name], rtol=1e-5, atol=1e-5)


def test_the_config_says_what_peft_needs(tmp_path):
    write_mistral_adapter(tmp_path / "a", tiny_config("mistral"), scaling=0.75, dropout=0.25)
    convert(tmp_path / "a", tmp_path / "p", to="hf")
    document = json.loads((tmp_path / "p" / "adapter_config.json").read_text())
    assert (document["peft_type"], document["r"], document["lora_alpha"]) == ("LORA", RANK, 3)
    assert (document["lora_dropout"], document["bias"]) == (0.25, "none")
    assert document["target_modules"] == sorted(
        ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    )


def test_beside_a_vision_tower_only_the_text_modules_are_meant(tmp_path):
    config = EXAMPLES["vision"]().config
    weights = write_mistral_adapter(tmp_path / "a", config)
    convert(tmp_path / "a", tmp_path / "p", to="hf")
    found = load_file(tmp_path / "p" / PEFT)
    assert found.keys() == {peft_name(name, "model.language_model.") for name in weights}
    pattern = json.loads((tmp_path / "p" / "adapter_config.json").read_text())["target_modules"]
    assert re.fullmatch(pattern, "model.language_model.layers.1.self_attn.q_proj")
    assert not re.fullmatch(pattern, "model.vision_tower.transformer.layers.1.attention.q_proj")


def write_peft(folder: Path, config: ModelConfig, outer: str = "model.", **changes: Any) -> dict[str, Any]:
    document = {
        "peft_type": "LORA", "r": RANK, "lora_alpha": 8, "lora_dropout": 0.0, "bias": "none", "task_type": "CAUSAL_LM",
        "target_modules": ["q_proj"], "base_model_name_or_path": None, "peft_version": "0.21.2", **changes,
    }  # fmt: skip
    folder.mkdir()
    save_file({peft_name(name, outer): values for name, values in lora_weights(config).items()}, folder / PEFT)
    (folder / "adapter_config.json").write_text(json.dumps(document))
    return document


@pytest.mark.parametrize(("changes", "scaling"), [({}, 2.0), ({"use_rslora": True}, 4.0), ({"lora_alpha": 3}, 0.75)])
def test_the_factor_of_peft_becomes_the_scaling(tmp_path, changes, scaling):
    config = tiny_config("mistral")
    document = write_peft(tmp_path / "p", config, **changes)
    (tmp_path / "base").mkdir()
    write_params_json(config, tmp_path / "base" / "params.json")
    convert(tmp_path / "p", tmp_path / "m", to="mistral", base=tmp_path / "base", verify=True)
    lora = json.loads((tmp_path / "m" / "params.json").read_text())["lora"]
    assert (lora["rank"], lora["scaling"]) == (RANK, scaling)
    convert(tmp_path / "m", tmp_path / "q", to="hf")
    assert json.loads((tmp_path / "q" / "adapter_config.json").read_text()) == document
    with (
        open_checkpoint(tmp_path / "p", base=tmp_path / "base") as a,
        open_checkpoint(tmp_path / "q") as b,
    ):
        assert compare(a, b).same


def test_without_its_base_an_adapter_asks_for_it(tmp_path):
    write_peft(tmp_path / "p", tiny_config("mistral"))
    with pytest.raises(MinistralError, match=r"adapter_config\.json: base_model_name_or_path is missing; .*--base"):
        convert(tmp_path / "p", tmp_path / "m", to="mistral")
    write_peft(tmp_path / "q", tiny_config("mistral"), base_model_name_or_path="nobody/nothing")
    with pytest.raises(MinistralError, match=r"adapter_config\.json: .*nobody/nothing.*--base"):
        convert(tmp_path / "q", tmp_path / "m", to="mistral")


@pytest.mark.parametrize(
    "changes",
    [
        {"use_dora": True}, {"bias": "all"}, {"modules_to_save": ["lm_head"]}, {"lora_bias": True}, {"r": 3},
        {"rank_pattern": {"q_proj": 2}}, {"alpha_pattern": {"q_proj": 2}}, {"fan_in_fan_out": True}, {"r": 0},
        {"target_parameters": ["x"]}, {"use_qalora": True}, {"trainable_token_indices": [1]}, {"peft_type": "IA3"},
        {"layer_replication": [[0, 1]]}, {"lora_alpha": "8"}, {"lora_dropout": -1}, {"lora_alpha": float("nan")},
        {"init_lora_weights": "pissa_niter_4"}, {"init_lora_weights": "new"}, {"rank_pattern": {"(": 4}},
        {"rank_pattern": {"(a+)+q_proj": 4}}, {"rank_pattern": [4]}, {"alpha_pattern": {"x": 0}},
        {"alpha_pattern": {"x" * 999: 1}}, {"rank_pattern": {f"x{i}": 4 for i in range(5000)}},
    ],
)  # fmt: skip
def test_more_than_plain_lora_is_refused_in_one_line(tmp_path, changes):
    config = tiny_config("mistral")
    write_peft(tmp_path / "p", config, **changes)
    (tmp_path / "base").mkdir()
    write_params_json(config, tmp_path / "base" / "params.json")
    with pytest.raises(MinistralError) as caught:
        convert(tmp_path / "p", tmp_path / "m", to="mistral", base=tmp_path / "base")
    assert "\n" not in str(caught.value)
    assert str(caught.value).startswith(str(tmp_path / "p"))


def test_a_scaling_that_nothing_states_is_that_of_mistral_inference_and_said(tmp_path, caplog):
    write_mistral_adapter(tmp_path / "a", tiny_config("mistral"))
    document = json.loads((tmp_path / "a" / "params.json").read_text())
    del document["lora"]
    (tmp_path / "a" / "params.json").write_text(json.dumps(document))
    convert(tmp_path / "a", tmp_path / "p", to="hf")
    assert "has no lora.scaling; taken as 2" in caplog.text
    assert json.loads((tmp_path / "p" / "adapter_config.json").read_text())["lora_alpha"] == 2 * RANK


def damaged(weights: dict[str, np.ndarray]) -> dict[str, dict[str, np.ndarray]]:
    a, b = "layers.0.attention.wq.lora_A.weight", "layers.0.attention.wq.lora_B.weight"
    return {
        "half missing": {name: values for name, values in weights.items() if name != a},
        "wrong in": weights | {a: weights[a][:, :-1].copy()},
        "wrong out": weights | {b: weights[b][:-2].copy()},
        "no rank": weights | {a: weights[a][:0].copy(), b: weights[b][:, :0].copy()},
        "ranks apart": weights | {b: weights[b][:, :2].copy()},
        "no such layer": weights | {"layers.9.attention.wq.lora_A.weight": weights[a]},
        "no matrix": weights | {a: weights[a].reshape(-1)},
        "a norm": weights | {"layers.0.ffn_norm.lora_A.weight": weights[a]},
        "a model's": weights | {"norm.weight": np.ones(64, np.float32)},
        "a huge expert": weights | {"layers.0.feed_forward.experts.999999.w1.lora_A.weight": weights[a]},
        "nothing": {},
    }


@pytest.mark.parametrize("what", damaged(lora_weights(tiny_config("mistral"))))
def test_damaged_adapters_are_refused_in_one_line(tmp_path, what):
    weights = write_mistral_adapter(tmp_path / "a", tiny_config("mistral"))
    save_file(damaged(weights)[what], tmp_path / "a" / LORA)
    with pytest.raises(MinistralError) as caught:
        convert(tmp_path / "a", tmp_path / "p", to="hf")
    assert str(caught.value).startswith(str(tmp_path / "a" / LORA)), caught.value
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "p").exists()


def test_modules_of_another_rank_or_factor_get_patterns_in_peft_and_the_mistral_layout_has_one_factor(tmp_path):
    config = tiny_config("mistral")
    weights = write_mistral_adapter(tmp_path / "a", config)
    a, b = "layers.0.attention.wq.lora_A.weight", "layers.0.attention.wq.lora_B.weight"
    small = load_file(tmp_path / "a" / LORA)
    small |= {a: weights[a][:2].copy(), b: small[b][:, :2].copy()}
    save_file(small, tmp_path / "a" / LORA)
    convert(tmp_path / "a", tmp_path / "p", to="hf", verify=True)
    path = tmp_path / "p" / "adapter_config.json"
    document = json.loads(path.read_text())
    module = "model.layers.0.self_attn.q_proj"
    assert (document["r"], document["lora_alpha"]) == (RANK, 2 * RANK)
    assert (document["rank_pattern"], document["alpha_pattern"]) == ({module: 2}, {module: 4})
    convert(tmp_path / "p", tmp_path / "m", to="mistral", verify=True)
    again = load_file(tmp_path / "m" / LORA)
    assert all(np.array_equal(again[name], values) for name, values in small.items())
    path.write_text(json.dumps({**document, "alpha_pattern": {r"layers\.0\..*q_proj": 5}}))
    with pytest.raises(
        MinistralError, match=r"factors from 2 to 2\.5, the mistral layout one for all; expected --to hf"
    ):
        convert(tmp_path / "p", tmp_path / "n", to="mistral")
    convert(tmp_path / "p", tmp_path / "q", to="hf", verify=True)


def test_orbax_has_no_form_for_adapters(tmp_path):
    write_mistral_adapter(tmp_path / "a", tiny_config("mistral"))
    with pytest.raises(MinistralError, match="is an adapter"):
        convert(tmp_path / "a", tmp_path / "o", to="orbax")
