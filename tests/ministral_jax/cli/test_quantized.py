"""Quantised checkpoints on the command line: scored, generated from, inspected."""

import json

import numpy as np
import pytest

from ministral_jax.cli import main
from tests.checkpoint_files import tiny_config
from tests.quantized_files import write_quantized_checkpoint

IDS = "1,5,9,2,77,31,8,64"


@pytest.fixture(scope="module")
def int8_model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("int8")
    write_quantized_checkpoint(folder, tiny_config(n_layers=2), "hf", ("int8_channel", "dynamic", "compressed"))
    return str(folder)


def printed(capsys, *arguments):
    assert main(list(arguments)) == 0
    return json.loads(capsys.readouterr().out)


def test_activations_are_rounded_unless_plain_is_asked_for(int8_model, capsys):
    scores = {
        choice: np.array(printed(capsys, "score", int8_model, "--ids", IDS, "--json", *choice.split())["logprobs"][1:])
        for choice in ("", "--activations quantized", "--activations plain")
    }
    np.testing.assert_array_equal(scores[""], scores["--activations quantized"])
    difference = np.abs(scores[""] - scores["--activations plain"]).max()
    assert 1e-3 < difference < 1


def test_a_quantised_model_generates(int8_model, capsys):
    found = printed(capsys, "generate", int8_model, "--ids", IDS, "--max-tokens", "3", "--ignore-eos", "--json")
    assert len(found["ids"]) == 3


def test_inspect_counts_the_bytes_of_quantised_weights(int8_model, capsys):
    found = printed(capsys, "inspect", int8_model, "--json")
    assert found["files"]["mismatch"] is None
    assert found["files"]["bytes_by_dtype"]["I8"] == 2 * (2 * 64 * 64 + 2 * 32 * 64 + 3 * 64 * 96)
    assert main(["inspect", int8_model]) == 0
    assert "projections in int8_channel" in capsys.readouterr().out
