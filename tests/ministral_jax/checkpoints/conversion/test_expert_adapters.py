"""Adapters of experts between single matrices of the mistral layout and PEFT's two for all experts of a layer."""

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from ministral_jax.checkpoints.conversion import expert_adapters
from ministral_jax.checkpoints.conversion.convert import convert
from ministral_jax.config import ModelConfig
from ministral_jax.config_files import write_params_json
from ministral_jax.errors import MinistralError
from tests.architecture_files import MIXTRAL, SMALL_4
from tests.ministral_jax.checkpoints.conversion.test_adapters import (
    LORA,
    PEFT,
    RANK,
    lora_weights,
    peft_name,
    write_mistral_adapter,
)

BASES = {"mixtral": MIXTRAL, "small_4": SMALL_4}
KINDS = pytest.mark.parametrize("kind", BASES)
SCALING = 0.75
LAYER = "base_model.model.model.layers.{}.mlp.experts"


def stem(config: ModelConfig, layer: int) -> str:
    return f"layers.{layer}.{'' if config.latent else 'feed_forward.'}experts"


def products(tensors: dict[str, np.ndarray], config: ModelConfig, layer: int) -> dict[str, np.ndarray]:
    """`B A` of each projection of all experts [E, out, in], of a mistral file."""
    return {
        part: np.stack(
            [
                tensors[f"{stem(config, layer)}.{e}.{part}.lora_B.weight"].astype(np.float64)
                @ tensors[f"{stem(config, layer)}.{e}.{part}.lora_A.weight"]
                for e in range(config.moe.n_experts)
            ]
        )
        for part in ("w1", "w2", "w3")
    }


def products_of_peft(tensors: dict[str, np.ndarray], name: str, n_experts: int) -> np.ndarray:
    """`B A` of all experts by PEFT's own formula (ParamWrapper.get_delta_weight)."""
    a, b = (tensors[f"{name}.lora_{letter}.weight"].astype(np.float64) for letter in "AB")
    return np.einsum("ore,eri->eoi", b.reshape(len(b), -1, n_experts), a.reshape(n_experts, -1, a.shape[1]))


@KINDS
def test_peft_gets_the_products_of_all_experts_and_the_way_back_gives_the_very_bytes(tmp_path, kind):
    config = BASES[kind]
    write_mistral_adapter(tmp_path / "a", config, scaling=SCALING, dropout=0.1)
    convert(tmp_path / "a", tmp_path / "p", to="hf", verify=True)
    ours, theirs = load_file(tmp_path / "a" / LORA), load_file(tmp_path / "p" / PEFT)
    document = json.loads((tmp_path / "p" / "adapter_config.json").read_text())
    for layer in range(config.n_layers):
        expected, name = products(ours, config, layer), LAYER.format(layer)
        fused = products_of_peft(theirs, f"{name}.base_layer", config.moe.n_experts)
        np.testing.assert_allclose(fused, np.concatenate([expected["w1"], expected["w3"]], axis=1), rtol=0, atol=1e-12)
        down = products_of_peft(theirs, name, config.moe.n_experts)
        np.testing.assert_allclose(down, expected["w2"], rtol=0, atol=1e-12)
        gate_up, factor = f"model.layers.{layer}.mlp.experts.gate_up_proj", document["lora_alpha"] / document["r"]
        assert document["rank_pattern"][gate_up] == 2 * RANK
        assert document["alpha_pattern"][gate_up] / (2 * RANK) == factor == SCALING
    assert document["target_parameters"] == ["mlp.experts.down_proj", "mlp.experts.gate_up_proj"]
    assert document["lora_dropout"] == 0  # which PEFT refuses otherwise
    convert(tmp_path / "p", tmp_path / "c", to="mistral", verify=True)
    again = load_file(tmp_path / "c" / LORA)
    assert again.keys() == ours.keys()
    assert all(np.array_equal(again[name], ours[name]) for name in ours)


def write_peft(
    folder: Path, config: ModelConfig, targets: tuple[str, ...] = ("gate_up_proj", "down_proj"), rank: int = 3
) -> dict[str, np.ndarray]:
    """An adapter of experts alone as PEFT writes it: one A for w1 and w3."""
    random, moe, dim = np.random.default_rng(4), config.moe, config.dim
    shapes = {"gate_up_proj": (dim, 2 * moe.expert_hidden_dim), "down_proj": (moe.expert_hidden_dim, dim)}
    tensors = {}
    for layer in range(config.n_layers):
        for target in targets:
            n_in, n_out = shapes[target]
            name = LAYER.format(layer) + (".base_layer" if len(targets) == 2 and target == "gate_up_proj" else "")
            tensors[f"{name}.lora_A.weight"] = random.standard_normal((moe.n_experts * rank, n_in)).astype(np.float32)
            tensors[f"{name}.lora_B.weight"] = random.standard_normal((n_out, moe.n_experts * rank)).astype(np.float32)
    document = {"peft_type": "LORA", "r": rank, "lora_alpha": 6, "bias": "none", "target_modules": [],
                "target_parameters": [f"mlp.experts.{target}" for target in targets]}  # fmt: skip
    folder.mkdir()
    save_file(tensors, folder / PEFT)
    (folder / "adapter_config.json").write_text(json.dumps(document))
    (folder.parent / "base").mkdir(exist_ok=True)
    write_params_json(config, folder.parent / "base" / "params.json")
    return tensors


@KINDS
def test_what_peft_trained_comes_back_to_the_bit_with_one_a_for_w1_and_w3(tmp_path, kind):
    config = BASES[kind]
    theirs = write_peft(tmp_path / "p", config)
    convert(tmp_path / "p", tmp_path / "m", to="mistral", base=tmp_path / "base", verify=True)
    ours = load_file(tmp_path / "m" / LORA)
    for layer in range(config.n_layers):
        found, name = products(ours, config, layer), LAYER.format(layer)
        expected = products_of_peft(theirs, f"{name}.base_layer", config.moe.n_experts)
        np.testing.assert_allclose(np.concatenate([found["w1"], found["w3"]], axis=1), expected, rtol=0, atol=1e-12)
        np.testing.assert_allclose(found["w2"], products_of_peft(theirs, name, config.moe.n_experts), atol=1e-12)
    assert {len(values) for name, values in ours.items() if "lora_A" in name} == {3}
    assert json.loads((tmp_path / "m" / "params.json").read_text())["lora"]["scaling"] == 2
    convert(tmp_path / "m", tmp_path / "q", to="hf", verify=True)
    again = load_file(tmp_path / "q" / PEFT)
    assert again.keys() == theirs.keys()
    assert all(np.array_equal(again[name], theirs[name]) for name in theirs)


def test_rows_of_b_do_not_depend_on_how_much_is_put_together_at_a_time(tmp_path, monkeypatch):
    write_mistral_adapter(tmp_path / "a", MIXTRAL)
    convert(tmp_path / "a", tmp_path / "p", to="hf")
    monkeypatch.setattr(expert_adapters, "_BLOCK_BYTES", 7 * 4 * RANK * MIXTRAL.moe.n_experts)
    convert(tmp_path / "a", tmp_path / "q", to="hf", verify=True)
    assert (tmp_path / "p" / PEFT).read_bytes() == (tmp_path / "q" / PEFT).read_bytes()


@pytest.mark.parametrize("parts", [("w1",), ("w3",), ("w2",), ("w2", "w3")])
def test_projections_without_an_adapter_get_rows_of_zeros(tmp_path, parts):
    write_mistral_adapter(tmp_path / "a", MIXTRAL)
    path = tmp_path / "a" / LORA
    kept = {name: values for name, values in load_file(path).items() if name.split(".")[-3] in parts}
    save_file(kept, path)
    convert(tmp_path / "a", tmp_path / "p", to="hf", verify=True)
    theirs = load_file(tmp_path / "p" / PEFT)
    if "w2" not in parts:
        (part,) = parts
        assert theirs.keys() == {f"{LAYER.format(layer)}.lora_{x}.weight" for layer in range(2) for x in "AB"}
        fused = products_of_peft(theirs, LAYER.format(0), 4).reshape(4, 2, 96, 64)
        b, a = (kept[f"{stem(MIXTRAL, 0)}.2.{part}.lora_{x}.weight"].astype(np.float64) for x in "BA")
        np.testing.assert_allclose(fused[2, int(part == "w3")], b @ a, rtol=0, atol=1e-12)
        assert not fused[:, int(part == "w1")].any()
    convert(tmp_path / "p", tmp_path / "c", to="mistral", verify=True)
    again = load_file(tmp_path / "c" / LORA)
    assert again.keys() == kept.keys()
    assert all(np.array_equal(again[name], kept[name]) for name in kept)


def test_single_experts_of_older_peft_are_read(tmp_path):
    """As for the transformers of which every expert was a module."""
    weights = lora_weights(MIXTRAL)
    (tmp_path / "p").mkdir()
    save_file({peft_name(name): values for name, values in weights.items()}, tmp_path / "p" / PEFT)
    document = {"peft_type": "LORA", "r": RANK, "lora_alpha": 8, "target_modules": ["q_proj", "w1", "w2", "w3"]}
    (tmp_path / "p" / "adapter_config.json").write_text(json.dumps(document))
    (tmp_path / "base").mkdir()
    write_params_json(MIXTRAL, tmp_path / "base" / "params.json")
    convert(tmp_path / "p", tmp_path / "m", to="mistral", base=tmp_path / "base", verify=True)
    again = load_file(tmp_path / "m" / LORA)
    assert all(np.array_equal(again[name], weights[name]) for name in weights if ".experts." in name)


A, B = (f"{LAYER.format(0)}.base_layer.lora_{letter}.weight" for letter in "AB")


@pytest.mark.parametrize(
    ("change", "metadata", "named"),
    [
        (lambda t: t.pop(A), {}, "without its other half"),
        (lambda t: t.update({A: t[A][:-1].copy()}), {}, r"have shapes \[11, 64\] and \[192, 12\]; expected those of"),
        (lambda t: t.update({B: t[B][:-1].copy()}), {}, r"have shapes \[12, 64\] and \[191, 12\]; expected those of"),
        (lambda t: t.update({A: t[A][:0].copy(), B: t[B][:, :0].copy()}), {}, "rank 0"),
        (lambda t: t.update({A: t[A].reshape(-1)}), {}, r"have shapes \[768\]"),
        (lambda t: t.update({A.replace(".base_layer", ""): t[A], B.replace(".base_layer", ""): t[B]}), {}, "has what"),
        (lambda t: None, {A.rpartition(".lora")[0]: "w1=2 w3=2"}, "expected 'w1=R w3=R' with 3 ranks in all"),
        (lambda t: None, {A.rpartition(".lora")[0]: "2"}, "expected 'w1=R w3=R' with 3 ranks in all"),
        (lambda t: None, {A.rpartition(".lora")[0]: "w1=2 w3=1"}, "has other ranks for w1 and w3 than its metadata"),
        (lambda t: t.update({A: t[A][:8].copy(), B: t[B][:, :8].copy()}), {}, "of rank 2; expected 3"),
    ],
)  # fmt: skip
def test_a_damaged_pair_is_named_in_one_line(tmp_path, change, metadata, named):
    tensors = write_peft(tmp_path / "p", MIXTRAL)
    change(tensors)
    save_file(tensors, tmp_path / "p" / PEFT, metadata=metadata or None)
    with pytest.raises(MinistralError, match=named) as caught:
        convert(tmp_path / "p", tmp_path / "m", to="mistral", base=tmp_path / "base")
    assert "\n" not in str(caught.value)
    assert str(caught.value).startswith(str(tmp_path / "p" / PEFT))
    assert not (tmp_path / "m").exists()


def test_what_peft_has_no_form_for_stays_in_the_mistral_layout(tmp_path):
    write_mistral_adapter(tmp_path / "a", MIXTRAL)
    path, first = tmp_path / "a" / LORA, f"{stem(MIXTRAL, 0)}.1.w2.lora"
    whole = load_file(path)
    save_file({name: values for name, values in whole.items() if not name.startswith(first)}, path)
    with pytest.raises(MinistralError, match=r"adapts w2 of 3 of the 4 experts of layers\.0, .*expected --to mistral"):
        convert(tmp_path / "a", tmp_path / "p", to="hf")
    narrow = {f"{first}_A.weight": whole[f"{first}_A.weight"][:2], f"{first}_B.weight": whole[f"{first}_B.weight"]}
    narrow[f"{first}_B.weight"] = narrow[f"{first}_B.weight"][:, :2].copy()
    save_file(whole | narrow, path)
    with pytest.raises(MinistralError, match="not all of them with one rank"):
        convert(tmp_path / "a", tmp_path / "p", to="hf")


def test_a_base_without_experts_and_other_parameters_are_refused(tmp_path):
    write_peft(tmp_path / "p", MIXTRAL)
    params = json.loads((tmp_path / "base" / "params.json").read_text())
    (tmp_path / "base" / "params.json").write_text(json.dumps({k: v for k, v in params.items() if k != "moe"}))
    with pytest.raises(MinistralError, match="adapts experts, which the base model has not"):
        convert(tmp_path / "p", tmp_path / "m", to="mistral", base=tmp_path / "base")
    path = tmp_path / "p" / "adapter_config.json"
    document = json.loads(path.read_text())
    for target in ("gate.weight", "mlp.experts", 3):
        path.write_text(json.dumps({**document, "target_parameters": [target]}))
        with pytest.raises(MinistralError, match=r"target_parameters.*expected only experts"):
            convert(tmp_path / "p", tmp_path / "m", to="mistral", base=tmp_path / "base")


def test_ranks_that_were_put_together_are_told_in_the_file(tmp_path):
    write_mistral_adapter(tmp_path / "a", MIXTRAL)
    convert(tmp_path / "a", tmp_path / "p", to="hf")
    with safe_open(tmp_path / "p" / PEFT, "numpy") as file:
        found = {key: value for key, value in file.metadata().items() if key != "format"}
    assert found == {f"{LAYER.format(layer)}.base_layer": f"w1={RANK} w3={RANK}" for layer in range(2)}
