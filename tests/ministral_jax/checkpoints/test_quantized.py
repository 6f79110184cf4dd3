"""Loading quantised checkpoints: every format, layout and spelling against the dense weights that they mean."""

import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file

from ministral_jax.checkpoints.load import load_model
from ministral_jax.checkpoints.safetensors import SafetensorsFile
from ministral_jax.errors import CheckpointError, ConfigError
from ministral_jax.linear import projections
from ministral_jax.parameters import fill, parameter_specs, parameters
from ministral_jax.transformer import Transformer
from tests.checkpoint_files import tiny_config
from tests.quantized_files import CASES, write_quantized_checkpoint

TOKENS = jnp.asarray([[1, 5, 9, 2, 77, 31, 8, 64]])
# Mistral's own and transformers' fp8 have a spelling in the other layout's config too; the files of each are its own.
FILES = [
    (layout, case)
    for layout in ("mistral", "hf")
    for case in CASES
    if case[2] not in ("mistral", "hf") or case[2] == layout
]


def load_file(path):
    """All tensors of a file; the safetensors library's own numpy reader knows no eight-bit floats."""
    with SafetensorsFile(path) as file:
        return {name: file.read(name) for name in file.tensors}


def weights_of(model):
    """Dense values of every parameter, as float32."""
    dense = {f"{name}.weight": layer for name, layer in projections(model).items() if layer.stored}
    plain = {
        name: array for name, array in parameters(model).items() if name in parameter_specs(Transformer(model.config))
    }
    found = {name: np.asarray(array) for name, array in plain.items() if name not in dense}
    return found | {name: np.asarray(layer.quantized_weight().dequantize()) for name, layer in dense.items()}


@pytest.mark.parametrize(("layout", "case"), FILES)
def test_every_format_means_the_same_dense_weights(tmp_path, layout, case):
    config = tiny_config(n_layers=1)
    meant = write_quantized_checkpoint(tmp_path, config, layout, case)
    model = load_model(tmp_path)
    found = weights_of(model)
    assert sorted(found) == sorted(meant)
    for name, array in meant.items():
        np.testing.assert_array_equal(found[name], array.astype(np.float32), err_msg=name)
    assert all(layer.stored and layer.stored.activations == case[1] for layer in projections(model).values())


def test_logits_are_those_of_the_dense_weights(tmp_path):
    meant = write_quantized_checkpoint(tmp_path, tiny_config(), "mistral", ("fp8_tensor", "static", "mistral"))
    quantized = load_model(tmp_path, activations="plain")
    dense = fill(Transformer(tiny_config()), {name: jnp.asarray(array, jnp.float32) for name, array in meant.items()})
    expected = np.asarray(jax.jit(dense.__call__)(TOKENS))
    found = np.asarray(jax.jit(quantized.__call__)(TOKENS))
    assert np.abs(found - expected).max() / np.ptp(expected) < 1e-5
    rounded = np.asarray(jax.jit(load_model(tmp_path).__call__)(TOKENS))
    assert np.abs(rounded - expected).max() / np.ptp(expected) > 1e-3


def test_a_projection_that_is_dense_in_the_file_stays_dense(tmp_path):
    skip = ("layers.0.attention.wo.weight", "layers.0.attention.wk.weight")
    meant = write_quantized_checkpoint(tmp_path, tiny_config(n_layers=1), "mistral", CASES[0], skip=skip)
    model = load_model(tmp_path)
    assert {f"{name}.weight" for name, layer in projections(model).items() if not layer.stored} == set(skip)
    for name, array in weights_of(model).items():
        np.testing.assert_array_equal(array, meant[name].astype(np.float32), err_msg=name)


def test_the_compute_dtype_is_that_of_what_is_not_quantised(tmp_path):
    write_quantized_checkpoint(tmp_path, tiny_config(n_layers=1), "hf", CASES[0])
    arrays = parameters(load_model(tmp_path, dtype="bfloat16"))
    assert arrays["norm.weight"].dtype == jnp.bfloat16
    assert arrays["layers.0.attention.wq.weight"].dtype == jnp.int8
    assert arrays["layers.0.attention.wq.weight_scale"].dtype == jnp.float32


def test_every_part_has_axes_to_be_sharded_along(tmp_path):
    write_quantized_checkpoint(tmp_path, tiny_config(n_layers=1), "hf", ("nvfp4", "dynamic", "compressed"))
    specs = parameter_specs(load_model(tmp_path))
    assert specs["layers.0.feed_forward.w2.weight_packed"].axes == ("embed", "hidden")
    assert specs["layers.0.feed_forward.w2.weight_scale"].axes == ("embed", "hidden")
    assert specs["layers.0.feed_forward.w2.weight_global_scale"].axes == ()


def test_parts_are_read_into_their_shards(tmp_path):
    meant = write_quantized_checkpoint(tmp_path, tiny_config(n_layers=1), "mistral", CASES[0])
    model = load_model(tmp_path, mesh="tensor=2", rules="tensor")
    scale = parameters(model)["layers.0.attention.wq.weight_scale"]
    assert scale.addressable_shards[0].data.shape == (scale.shape[0] // 2,)
    name = "layers.0.attention.wq.weight"
    np.testing.assert_array_equal(weights_of(model)[name], meant[name].astype(np.float32))


def damaged(tmp_path, case, change):
    """The message about a checkpoint in which `change` was made to the tensors."""
    write_quantized_checkpoint(tmp_path, tiny_config(n_layers=1), "hf", case)
    path = tmp_path / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(CheckpointError) as caught:
        load_model(tmp_path)
    message = str(caught.value)
    assert "\n" not in message
    return message


STEM = "model.layers.0.self_attn.q_proj"


@pytest.mark.parametrize(
    ("case", "change", "expected"),
    [
        (CASES[0], lambda t: t.pop(f"{STEM}.weight_scale"), f"tensor '{STEM}.weight_scale' is missing"),
        (CASES[2], lambda t: t.pop(f"{STEM}.activation_scale"), f"tensor '{STEM}.input_scale' is missing"),
        (CASES[0], lambda t: t.update({f"{STEM}.weight_scale": np.ones((3, 1), np.float32)}), "has shape [3, 1]"),
        (CASES[0], lambda t: t.update({f"{STEM}.weight_scale": np.ones((64, 1), np.int32)}), "has dtype I32"),
        (CASES[0], lambda t: t.update({f"{STEM}.weight": np.ones((64, 64), np.float32)}), "is a part of a quantised"),
        (
            CASES[3],
            lambda t: t.update({f"{STEM}.weight": np.ones((64, 64), np.int8)}),
            "has dtype I8, expected F8_E4M3",
        ),
        (CASES[9], lambda t: t.update({f"{STEM}.weight_packed": np.ones((64, 64), np.uint8)}), "has shape [64, 64]"),
        (CASES[9], lambda t: t.update({"model.other.weight_packed": np.ones((2, 2), np.uint8)}), "is not part of the"),
    ],
)
def test_a_part_that_does_not_fit_is_one_line(tmp_path, case, change, expected):
    assert re.search(re.escape(expected), damaged(tmp_path, case, change))


def test_blocks_that_cut_heads_cannot_be_reordered(tmp_path):
    config = tiny_config(n_layers=1, n_heads=2, n_kv_heads=2, head_dim=96)
    write_quantized_checkpoint(tmp_path, config, "mistral", ("fp8_block", "dynamic", "compressed"))
    with pytest.raises(CheckpointError, match="blocks of 128 rows, which cut heads of 96"):
        load_model(tmp_path)


def test_activations_are_quantised_only_where_the_format_says_how(tmp_path):
    write_quantized_checkpoint(tmp_path, tiny_config(n_layers=1), "hf", ("nf4", "none", "compressed"))
    with pytest.raises(ConfigError, match="say nothing of activations; expected plain"):
        load_model(tmp_path, activations="quantized")


def test_plain_activations_need_no_scales(tmp_path):
    write_quantized_checkpoint(tmp_path, tiny_config(n_layers=1), "hf", CASES[2])
    path = tmp_path / "model.safetensors"
    tensors = {name: array for name, array in load_file(path).items() if not name.endswith("activation_scale")}
    save_file(tensors, path)
    model = load_model(tmp_path, activations="plain")
    assert not any("input_scale" in name for name in parameters(model))


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"strategy": "tensor", "dynamic": True}, "make one sequence depend on another"),
        ({"num_bits": 4}, "num_bits"),
        ({"symmetric": False}, "zero points"),
    ],
)
def test_activation_schemes_that_are_not_computed_are_refused_by_name(tmp_path, changes, expected):
    write_quantized_checkpoint(tmp_path, tiny_config(n_layers=1), "hf", CASES[0])
    path = tmp_path / "config.json"
    document = json.loads(path.read_text())
    document["quantization_config"]["config_groups"]["group_0"]["input_activations"] |= changes
    path.write_text(json.dumps(document))
    with pytest.raises(ConfigError, match=expected):
        load_model(tmp_path)
