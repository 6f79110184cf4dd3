"""FP8 of experts that share a tensor, a scale for each: read, run, and converted there and back."""

import dataclasses
import json
import re

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from ministral_jax.checkpoints.conversion.convert import convert
from ministral_jax.checkpoints.conversion.merge import merge
from ministral_jax.checkpoints.load import load_model
from ministral_jax.config import QuantizationConfig
from ministral_jax.config_files import hf_from_config, params_from_config
from ministral_jax.errors import CheckpointError
from ministral_jax.linear import projections
from ministral_jax.parameters import fill, parameters
from ministral_jax.transformer import Transformer
from tests.architecture_files import EXPERTS, SMALL_4, Example, hf_tensors, make, mistral_tensors, read_file
from tests.ministral_jax.paged_runner import QUICK
from tests.quantized_files import E4M3

TOKENS = jnp.asarray([[1, 5, 9, 2, 77, 31, 8, 64]])
HF, MISTRAL = "model.safetensors", "consolidated.safetensors"
WHOLE = re.compile(r"(.*\.experts)\.(gate_up_proj|down_proj)")
N = EXPERTS.n_experts


def is_quantized(name):
    return re.search(r"\.(attention\.w\w+|w[123])\.weight$", name)


def encoded(weight, largest):
    scale = np.float32(largest / 448)
    return np.clip(weight / scale, -448, 448).astype(E4M3), scale


def example(activations="static", config=SMALL_4, scale_dtype=np.float32):
    """Tensors by their mistral names, FP8 as Mistral publishes Small 4, but w1 and w3 of an expert with one scale; and
    what they mean."""
    quantization = QuantizationConfig(format="fp8_tensor", activations=activations)
    dense = make(dataclasses.replace(config, quantization=quantization), dtype=np.dtype(np.float32))
    tensors, meant = {}, {}
    for number, (name, weight) in enumerate(dense.tensors.items()):
        if not is_quantized(name):
            tensors[name] = meant[name] = weight * np.float32(0.3) if weight.ndim == 2 else 1 + weight / 10
            continue
        module = name.removesuffix(".weight")
        weight = weight * np.float32(0.3)
        twin = {"w1": "w3", "w3": "w1"}.get(module[-2:]) if ".experts." in module else None
        others = [dense.tensors[f"{module[:-2]}{twin}.weight"] * np.float32(0.3)] if twin else []
        payload, scale = encoded(weight, max(np.abs(array).max() for array in (weight, *others)))
        scale = np.asarray(scale, scale_dtype)
        tensors |= {name: payload, f"{module}.qscale_weight": scale}
        if activations == "static":
            number = number if not twin else int(re.search(r"experts\.(\d+)", module)[1])
            tensors[f"{module}.qscale_act"] = np.asarray(0.01 + number / 1000, scale_dtype)
        meant[name] = payload.astype(np.float32) * scale.astype(np.float32)
    return Example(dense.config, tensors), meant


def fused_file(written):
    """The HF tensors of an example, scales of single experts put beside the tensors of all."""
    tensors = hf_tensors(written)
    found = {}
    for name, values in tensors.items():
        single = re.fullmatch(
            r"(.*\.mlp\.experts)\.(\d+)\.(gate|up|down)_proj\.(weight_scale_inv|activation_scale)", name
        )
        if not single:
            found[name] = values
        elif single[3] != "up":
            whole = f"{single[1]}.{'down' if single[3] == 'down' else 'gate_up'}_proj_"
            whole += "scale_inv" if single[4] == "weight_scale_inv" else "activation_scale"
            found.setdefault(whole, {})[int(single[2])] = values
    for name, values in found.items():
        if isinstance(values, dict):
            scales = np.stack([values[e] for e in range(N)])
            found[name] = scales.reshape(N, 1, 1) if name.endswith("scale_inv") else scales
    return found


def write(folder, written, layout, tensors=None):
    folder.mkdir()
    if layout == "mistral":
        save_file(mistral_tensors(written), folder / MISTRAL)
        (folder / "params.json").write_text(json.dumps(params_from_config(written.config)))
    else:
        save_file(fused_file(written) if tensors is None else tensors, folder / HF, metadata={"format": "pt"})
        (folder / "config.json").write_text(json.dumps(hf_from_config(written.config)))
    return folder


def in_memory(meant, config):
    """Arrays of a dense model: experts stacked, under the feed-forward."""
    arrays = {}
    for name, values in meant.items():
        name = re.sub(r"(?<=\d\.)(?=gate\.|experts\.|shared_experts\.)", "feed_forward.", name)
        expert = re.search(r"\bexperts\.(\d+)\.", name)
        if expert:
            arrays.setdefault(name.replace(expert[0], "experts."), {})[int(expert[1])] = values
        else:
            arrays[name] = values
    return {
        name: jnp.asarray(np.stack([values[e] for e in range(N)]) if isinstance(values, dict) else values)
        for name, values in arrays.items()
    }


def logits(model):
    return np.asarray(jax.jit(model.__call__, compiler_options=QUICK)(TOKENS))


@pytest.mark.parametrize(("layout", "activations"), [("mistral", "dynamic"), ("hf", "static")])
def test_a_scale_for_each_expert_is_read_and_gives_the_logits_of_the_weights_it_means(tmp_path, layout, activations):
    written, meant = example(activations)
    model = load_model(write(tmp_path / "m", written, layout), activations="plain")
    dense = in_memory(meant, written.config)
    for name, linear in projections(model).items():
        assert linear.stored.format == "fp8_tensor"
        parts = {part: getattr(linear, part)[...] for part in linear.stored.parts(*linear.shape)}
        if ".experts." in name:
            assert parts["weight_scale"].shape == (N,)
            assert len(set(np.asarray(parts["weight_scale"]).tolist())) == N
            found = jax.vmap(lambda one, linear=linear: linear.stored.weight(one).dequantize())(parts)
        else:
            found = linear.quantized_weight().dequantize()
        np.testing.assert_array_equal(found, dense[f"{name}.weight"], err_msg=name)
    plain = fill(Transformer(dataclasses.replace(written.config, quantization=None)), dense)
    expected = logits(plain)
    assert np.abs(logits(model) - expected).max() < 1e-5 * np.ptp(expected)


def test_activations_of_each_expert_have_its_own_scale(tmp_path):
    written, _ = example("static")
    model = load_model(write(tmp_path / "m", written, "hf"))
    found = projections(model)["layers.1.feed_forward.experts.w3"].input_scale[...]
    np.testing.assert_array_equal(found, np.float32(0.01) + np.arange(N, dtype=np.float32) / 1000)
    both = load_model(write(tmp_path / "n", written, "mistral"))
    for name, array in parameters(both).items():
        np.testing.assert_array_equal(array, parameters(model)[name], err_msg=name)


@pytest.mark.parametrize("scale_dtype", [np.dtype(np.float32), np.dtype(ml_dtypes.bfloat16)], ids=str)
@pytest.mark.parametrize("activations", ["static", "dynamic"])
def test_both_layouts_are_converted_into_each_other_byte_by_byte(tmp_path, activations, scale_dtype):
    written, _ = example(activations, scale_dtype=scale_dtype)
    write(tmp_path / "m", written, "mistral")
    write(tmp_path / "h", written, "hf")
    for source, to, file in (("m", "hf", HF), ("h", "mistral", MISTRAL)):
        convert(tmp_path / source, tmp_path / to, to=to, verify=True)
        found, expected = read_file(tmp_path / to / file), read_file(tmp_path / {"hf": "h", "mistral": "m"}[to] / file)
        assert found.keys() == expected.keys()
        for name, values in expected.items():
            assert (found[name].dtype, found[name].shape) == (values.dtype, values.shape), name
            assert found[name].tobytes() == values.tobytes(), name
    document = json.loads((tmp_path / "hf" / "config.json").read_text())["quantization_config"]
    assert (document["quant_method"], document["activation_scheme"]) == ("fp8", activations)
    assert document["weight_block_size"] is None
    convert(tmp_path / "hf", tmp_path / "back", to="mistral", verify=True)
    before, after = (json.loads((tmp_path / folder / "params.json").read_text()) for folder in ("m", "back"))
    assert before == after


@pytest.mark.parametrize("shape", [(N,), (N, 1), (N, 2, 1)])
def test_scales_of_other_shapes_are_the_same_numbers(tmp_path, shape):
    written, _ = example("dynamic")
    tensors = fused_file(written)
    for name in [name for name in tensors if WHOLE.match(name) and name.endswith("scale_inv")]:
        twice = len(shape) == 3 and "gate_up" in name
        tensors[name] = (
            np.repeat(tensors[name], 2, axis=1) if twice else tensors[name].reshape(N, *[1] * (len(shape) - 1))
        )
    found = parameters(load_model(write(tmp_path / "a", written, "hf", tensors)))
    expected = parameters(load_model(write(tmp_path / "b", written, "hf")))
    assert all(np.array_equal(array, expected[name]) for name, array in found.items())
    convert(tmp_path / "a", tmp_path / "m", to="mistral", verify=True)
    assert read_file(tmp_path / "m" / MISTRAL)["layers.0.experts.2.w3.qscale_weight"].shape == ()


def test_scales_of_blocks_of_all_experts_are_cut_between_w1_and_w3(tmp_path):
    """As transformers has them where it keeps experts in FP8 blocks."""
    config = dataclasses.replace(SMALL_4, moe=dataclasses.replace(EXPERTS, expert_hidden_dim=256))
    quantization = QuantizationConfig(format="fp8_block", activations="dynamic")
    written = make(dataclasses.replace(config, quantization=quantization), dtype=np.dtype(np.float32))
    tensors, random = hf_tensors(written), np.random.default_rng(2)
    meant = {}
    for name in [name for name in tensors if WHOLE.fullmatch(name)]:
        payload = (10 * tensors[name]).astype(E4M3)
        _, rows, columns = payload.shape
        scale = random.uniform(0.01, 0.1, (N, -(-rows // 128), -(-columns // 128))).astype(np.float32)
        tensors |= {name: payload, f"{name}_scale_inv": scale}
        spread = np.repeat(np.repeat(scale, 128, 1)[:, :rows], 128, 2)[..., :columns]
        meant[name] = payload.astype(np.float32) * spread
    model = load_model(write(tmp_path / "m", written, "hf", tensors))
    for part, whole, rows in (("w1", "gate_up", slice(0, 256)), ("w3", "gate_up", slice(256, 512)),
                              ("w2", "down", slice(None))):  # fmt: skip
        linear = projections(model)[f"layers.1.feed_forward.experts.{part}"]
        assert linear.stored.format == "fp8_block"
        parts = {name: getattr(linear, name)[...] for name in ("weight", "weight_scale")}
        found = jax.vmap(lambda one, linear=linear: linear.stored.weight(one).dequantize())(parts)
        expected = meant[f"model.layers.1.mlp.experts.{whole}_proj"][:, rows]
        np.testing.assert_array_equal(found, expected)


def test_scales_are_read_into_their_shards(tmp_path):
    written, _ = example("static")
    expected = parameters(load_model(write(tmp_path / "m", written, "hf")))
    model = load_model(tmp_path / "m", mesh="expert=2")
    scale = parameters(model)["layers.0.feed_forward.experts.w1.weight_scale"]
    assert scale.addressable_shards[0].data.shape == (N // 2,)
    for name, array in parameters(model).items():
        np.testing.assert_array_equal(array, expected[name], err_msg=name)


def test_an_adapter_is_merged_into_what_the_scales_mean(tmp_path):
    written, meant = example("dynamic")
    write(tmp_path / "m", written, "hf")
    rank, module = 2, "layers.1.experts.3.w3"
    a, b = np.ones((rank, 64), np.float32), np.full((32, rank), 0.5, np.float32)
    (tmp_path / "a").mkdir()
    save_file({f"{module}.lora_A.weight": a, f"{module}.lora_B.weight": b}, tmp_path / "a" / "lora.safetensors")
    params = params_from_config(dataclasses.replace(written.config, quantization=None))
    (tmp_path / "a" / "params.json").write_text(json.dumps({**params, "lora": {"rank": rank, "scaling": 1.5}}))
    merge(tmp_path / "m", tmp_path / "a", tmp_path / "whole", dtype="float32", to="mistral")
    found = read_file(tmp_path / "whole" / MISTRAL)
    np.testing.assert_allclose(found[f"{module}.weight"], meant[f"{module}.weight"] + 1.5 * b @ a, rtol=1e-6)
    np.testing.assert_array_equal(found["layers.1.experts.3.w1.weight"], meant["layers.1.experts.3.w1.weight"])


def test_two_scales_of_an_expert_have_no_form_in_hf(tmp_path):
    written, _ = example("static")
    name = "layers.1.experts.2.w3.qscale_weight"
    written.tensors[name] = np.asarray(2 * written.tensors[name], np.float32)
    write(tmp_path / "m", written, "mistral")
    with pytest.raises(CheckpointError, match=rf"{name}' is .*; the HF layout has one scale for both"):
        convert(tmp_path / "m", tmp_path / "h", to="hf")
    assert load_model(tmp_path / "m")  # which the mistral layout has


def test_a_scale_for_each_of_w1_and_w3_is_read_as_such(tmp_path):
    """Of which transformers' parameter has room for two."""
    written, _ = example("dynamic")
    tensors, name = fused_file(written), "model.layers.1.mlp.experts.gate_up_proj_scale_inv"
    tensors[name] = np.concatenate([tensors[name], 3 * tensors[name]], axis=1)
    model = load_model(write(tmp_path / "h", written, "hf", tensors))
    one, three = (
        projections(model)[f"layers.1.feed_forward.experts.{part}"].weight_scale[...] for part in ("w1", "w3")
    )
    np.testing.assert_array_equal(one, tensors[name][:, 0, 0])
    np.testing.assert_array_equal(three, tensors[name][:, 1, 0])
    convert(tmp_path / "h", tmp_path / "m", to="mistral", verify=True)
    found = read_file(tmp_path / "m" / MISTRAL)
    np.testing.assert_array_equal(found["layers.1.experts.2.w3.qscale_weight"], tensors[name][2, 1, 0])
    np.testing.assert_array_equal(found["layers.1.experts.2.w1.qscale_weight"], tensors[name][2, 0, 0])


FIRST = "model.layers.0.mlp.experts.gate_up_proj"


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda t: t.pop(f"{FIRST}_scale_inv"), f"tensor '{FIRST}_scale_inv' is missing; expected with fp8_tensor"),
        (lambda t: t.pop(f"{FIRST}_activation_scale"), f"tensor '{FIRST}_activation_scale' is missing"),
        (lambda t: t.update({f"{FIRST}_scale_inv": np.ones(3, np.float32)}), "has shape [3], expected [4, 1, 1]"),
        (lambda t: t.update({f"{FIRST}_scale_inv": np.ones((4, 3, 1), np.float32)}), "has shape [4, 3, 1], expected"),
        (lambda t: t.update({f"{FIRST}_scale_inv": np.ones((4, 1, 1), np.int8)}), "has dtype I8, expected F32"),
        (lambda t: t.update({FIRST: t[FIRST].view(np.int8)}), "has dtype I8, expected F8_E4M3"),
        (lambda t: t.update({FIRST: t[FIRST][:3].copy()}), "has shape [3, 64, 64], expected [4, 64, 64]"),
        (lambda t: t.update({FIRST: t[FIRST].astype(np.float32)}), "is a part of a quantised weight, but"),
        (lambda t: t.update({f"{FIRST}_bias": np.ones(4, np.float32)}), "is not part of the model"),
    ],
)  # fmt: skip
def test_a_part_that_does_not_fit_is_one_line(tmp_path, change, named):
    written, _ = example("static")
    tensors = fused_file(written)
    change(tensors)
    with pytest.raises(CheckpointError, match=re.escape(named)) as caught:
        load_model(write(tmp_path / "m", written, "hf", tensors))
    assert "\n" not in str(caught.value)
